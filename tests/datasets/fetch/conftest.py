"""One HTTP server on this machine stands in for every host."""

import contextlib
import http.server
import threading

import pytest


class Handler(http.server.BaseHTTPRequestHandler):
    """Passes each request to `server.respond`, which a test module sets."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.respond(self)

    do_HEAD = do_GET

    def answer(self, status, body=b"", headers=(), length=None):
        """Sends a response; `length` announces another one than the body's."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """The server; `address` is its URL, `released` ends responses that wait for it."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.released = threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()
