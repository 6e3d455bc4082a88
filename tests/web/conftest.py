import contextlib
import socket
import threading
import time

import pytest


@pytest.fixture
def live():
    """A context manager that serves an application on a free local port, and yields the port."""
    uvicorn = pytest.importorskip("uvicorn", reason="the extra demo is not installed")

    @contextlib.contextmanager
    def serve(app):
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(
                app, log_config=None, log_level="warning", ws="none", timeout_graceful_shutdown=1
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()

    return serve
