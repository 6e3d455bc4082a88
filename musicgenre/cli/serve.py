"""Serve a page on this machine: genres, labels over time, spectrogram and similar files.

musicgenre serve                                          # then open the address that it prints
musicgenre serve --model=runs/mine --index=music.index    # similar files, from: musicgenre similar
curl --data-binary @song.mp3 -H 'X-File-Name: song.mp3' http://127.0.0.1:8000/api/tag    # JSON

Needs: pip install 'musicgenre[demo]'. Only this machine can reach the page unless --host says
otherwise. The page loads nothing from other hosts, and uploads are deleted once answered.
"""

import ipaddress
import math
import socket
import sys

from absl import flags

from musicgenre.cli.files import define_model, load_tagger
from musicgenre.errors import UserError

# Seconds that a running request has after Ctrl-C or SIGTERM.
_GRACE_SECONDS = 1

FLAGS = flags.FlagValues()
define_model(FLAGS)
flags.DEFINE_string("index", "", "Index of the same model, to find similar files in.", FLAGS)
flags.DEFINE_string("host", "127.0.0.1", "Address or name to listen on.", FLAGS)
flags.DEFINE_integer("port", 8000, "0 takes a free one.", 0, 65535, flag_values=FLAGS)
flags.DEFINE_multi_string("allow_host", [], "Another name of this server.", FLAGS)
flags.DEFINE_float("max_mb", 200.0, "Largest upload in megabytes.", flag_values=FLAGS)
flags.DEFINE_float("max_seconds", 600.0, "Longest sound in seconds.", flag_values=FLAGS)
flags.DEFINE_integer("max_waiting", 8, "Uploads that may wait for another.", 0, flag_values=FLAGS)


def main() -> None:
    """Serves the page until it is stopped."""
    for name in ("max_mb", "max_seconds"):
        if not 0 < FLAGS[name].value < math.inf:
            raise UserError(f"--{name} must be positive, not {FLAGS[name].value:g}.")
    try:
        import uvicorn

        from musicgenre.web.app import Limits, create_app, is_address
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "musicgenre":
            raise
        raise UserError(f"the page needs {error.name}: pip install 'musicgenre[demo]'") from None
    host = FLAGS.host
    with _listen(host, FLAGS.port) as listening:
        tagger, index = load_tagger(FLAGS), None
        if FLAGS.index:
            from musicgenre.inference.index import EmbeddingIndex

            index = EmbeddingIndex.load(FLAGS.index)
            index.check_model(tagger.model)
        limits = Limits(round(FLAGS.max_mb * 1e6), FLAGS.max_seconds, FLAGS.max_waiting)
        hosts = [*FLAGS.allow_host, *([] if is_address(host) else [host])]
        app = create_app(tagger, index, limits, hosts=hosts)
        address, port = listening.getsockname()[:2]
        if not ipaddress.ip_address(address).is_loopback:
            text = "everybody who reaches this machine can use the page. There is no password"
            print(f"WARNING: --host={host}: {text} and no encryption.", file=sys.stderr)
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{port}  (Ctrl-C stops it)", flush=True)
        config = uvicorn.Config(
            app,
            # Uvicorn's set-up of logging closes existing handlers; absl's closes standard error.
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            limit_concurrency=64,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
    except OSError as error:
        raise UserError(f"--host={host}: no such address ({error.strerror}).") from None
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = f"cannot listen there ({error.strerror}). --port=0 takes a free port."
        raise UserError(f"--host={host} --port={port}: {reason}") from None
