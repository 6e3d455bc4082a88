"""A page on this machine: drop music on it and see genres, labels over time, the spectrogram and similar files.

musicgenre serve                                            # then open the address that it prints
musicgenre serve --model=runs/mine --index=music.index      # nearest files, from: musicgenre similar
curl --data-binary @song.mp3 -H 'X-File-Name: song.mp3' http://127.0.0.1:8000/api/tag    # the same as JSON

It needs the extra `demo`: pip install 'musicgenre[demo]'. Nobody but this machine reaches it unless --host says so, it loads
nothing from elsewhere, and uploads are removed as soon as they are answered.
"""

import argparse
import ipaddress
import math
import socket
import sys
from typing import TYPE_CHECKING

from musicgenre.cli.files import add_model, load_tagger

if TYPE_CHECKING:
    from musicgenre.inference.index import EmbeddingIndex
    from musicgenre.inference.tagger import Tagger

# Seconds that a file in work has after Ctrl-C or SIGTERM.
_GRACE_SECONDS = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_model(parser)
    parser.add_argument(
        "--index",
        default="",
        help="index of embeddings that the nearest files are looked up in, made with the same model",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address or name to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--allow_host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that this server is called by; repeatable",
    )
    parser.add_argument(
        "--max_mb",
        type=float,
        default=200.0,
        help="largest upload in megabytes (default: %(default)g)",
    )
    parser.add_argument(
        "--max_seconds",
        type=float,
        default=600.0,
        help="longest sound in seconds (default: %(default)g)",
    )
    parser.add_argument(
        "--max_waiting",
        type=int,
        default=8,
        help="uploads that may wait while one is worked on (default: %(default)s)",
    )
    parser.add_argument(
        "--min_seconds",
        type=float,
        default=1.0,
        help="shorter files are refused (default: %(default)g)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serves the page until it is stopped."""
    from musicgenre.errors import UserError

    for name in ("max_mb", "max_seconds"):
        if not 0 < getattr(arguments, name) < math.inf:
            raise UserError(f"--{name} must be positive, not {getattr(arguments, name):g}.")
    if arguments.max_waiting < 0:
        raise UserError(f"--max_waiting must not be negative, but is {arguments.max_waiting}.")
    if not 0 <= arguments.port <= 65535:
        raise UserError(f"--port must be between 0 and 65535, not {arguments.port}.")
    try:
        import uvicorn

        from musicgenre.web.app import Limits, create_app, is_address
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "musicgenre":
            raise
        raise UserError(f"the page needs {error.name}: pip install 'musicgenre[demo]'") from None
    listening = _listen(arguments.host, arguments.port)
    with listening:
        tagger = load_tagger(arguments)
        limits = Limits(
            max_bytes=round(arguments.max_mb * 1e6),
            max_seconds=arguments.max_seconds,
            max_waiting=arguments.max_waiting,
        )
        hosts = [*arguments.allow_host, *([] if is_address(arguments.host) else [arguments.host])]
        app = create_app(tagger, _index(arguments.index, tagger), limits, hosts=hosts)
        address, port = listening.getsockname()[:2]
        if not ipaddress.ip_address(address).is_loopback:
            print(
                f"WARNING: --host={arguments.host}: everybody who reaches this machine can use the page. "
                "There is no password and no encryption.",
                file=sys.stderr,
            )
        shown = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        print(f"http://{shown}:{port}  (Ctrl-C stops it)", flush=True)
        config = uvicorn.Config(
            app,
            # Uvicorn's own set-up of logging closes the handlers that are there; absl's closes standard error with it.
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
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens.

    Raises:
      UserError: there is no such address, or the port is taken.
    """
    from musicgenre.errors import UserError

    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UserError(f"--host={host}: no such address ({error.strerror}).") from None
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port}: cannot listen there ({error.strerror}). --port=0 takes a free port."
        ) from None


def _index(path: str, tagger: "Tagger") -> "EmbeddingIndex | None":
    """Returns the index, or None without one.

    Raises:
      UserError: it cannot be read, or was made with another model.
    """
    if not path:
        return None
    from musicgenre.inference.index import EmbeddingIndex

    index = EmbeddingIndex.load(path)
    index.check_model(tagger.model)
    return index
