"""The page's server: receives a sound file, returns the model's predictions, and stores nothing."""

import contextlib
import dataclasses
import ipaddress
import tempfile
import threading
import unicodedata
import uuid
from asyncio import CancelledError, timeout
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from musicgenre import __version__
from musicgenre.errors import UserError
from musicgenre.inference.index import EmbeddingIndex
from musicgenre.inference.tagger import Tagger
from musicgenre.runs.bundle import model_card
from musicgenre.web.analysis import Abandoned, analyse

# The header that names an upload, percent-encoded. A page of another site cannot send it without
# permission (CORS), which this server never gives, so no such page can use this server.
NAME_HEADER = "X-File-Name"
# The start of the name of the folder of uploads, below the system's temporary folder.
FOLDER_PREFIX = "musicgenre-uploads-"
# Seconds after which a refused client should try again.
_RETRY_SECONDS = 5
# The status of a response to a client that has disconnected.
_DISCONNECTED = 499
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; media-src blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of uploads. The length of a file bounds the time it takes; there is no other deadline.

    Attributes:
      max_bytes: largest upload.
      max_seconds: longest sound.
      max_waiting: uploads that are received or wait while another is analysed.
      upload_seconds: time in which an upload must arrive.
    """

    max_bytes: int = 200_000_000
    max_seconds: float = 600.0
    max_waiting: int = 8
    upload_seconds: float = 300.0


def create_app(
    tagger: Tagger,
    index: EmbeddingIndex | None = None,
    limits: Limits | None = None,
    *,
    hosts: Collection[str] = (),
) -> FastAPI:
    """Returns the application: the page at `/`, `GET /api/model` and `POST /api/tag`.

    `POST /api/tag` takes the bytes of a sound file as its body and the file's name in the header
    `X-File-Name` (percent-encoded), and returns the result of `musicgenre.web.analysis.analyse`.
    Otherwise it returns `error`, a text, and the status 400 (no name), 408 (too slow), 413 (too
    large), 422 (not a usable sound, or too long), 503 (too many waiting; see `Retry-After`) or 507
    (the disk is full).

    Uploads are stored in a private folder under random names until they are answered. The folder is
    deleted when the server stops.

    `index` holds embeddings of this model, for the nearest files. `hosts` are names of this server
    besides `localhost` and addresses. A request for another host is refused, so that no page can
    reach this server by a name that its owner directs here (DNS rebinding).
    """
    limits = limits or Limits()
    about = _about(tagger, index, limits)
    here = 0

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with tempfile.TemporaryDirectory(
            prefix=FOLDER_PREFIX, ignore_cleanup_errors=True
        ) as folder:
            app.state.folder = Path(folder)
            # One file at a time: the network and the decoder each use every core.
            app.state.turn = anyio.Lock()
            yield

    app = FastAPI(title="musicgenre", version=__version__, lifespan=lifespan, openapi_url=None)

    @app.get("/api/model")
    async def model() -> Response:
        return JSONResponse(about)

    @app.post("/api/tag")
    async def tag(request: Request) -> Response:
        nonlocal here
        # A refusal is sent at once; the server reads the rest of the upload and discards it.
        name = _shown(request.headers.get(NAME_HEADER, ""))
        if not name:
            return _error(400, f"the header {NAME_HEADER} must name the file (percent-encoded).")
        if here > limits.max_waiting:
            busy = f"{name}: too many files are waiting. Try again in {_RETRY_SECONDS} seconds."
            return _error(503, busy, {"Retry-After": str(_RETRY_SECONDS)})
        here += 1
        path = app.state.folder / uuid.uuid4().hex
        try:
            refusal = await _receive(request, path, name, limits)
            return refusal or await answer_to(request, path, name)
        except CancelledError:
            return _error(503, f"{name}: the server has been stopped.")
        finally:
            path.unlink(missing_ok=True)
            here -= 1

    async def answer_to(request: Request, path: Path, name: str) -> Response:
        gone = threading.Event()
        answer = Response(status_code=_DISCONNECTED)

        async def leave_with_client(scope: anyio.CancelScope) -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            gone.set()
            scope.cancel()

        def work() -> Response:
            try:
                longest, wanted = limits.max_seconds, lambda: not gone.is_set()
                found = analyse(tagger, path, name, max_seconds=longest, index=index, wanted=wanted)
            except UserError as error:
                return _error(422, str(error).replace(str(path), name))
            except Abandoned:
                return answer
            return JSONResponse(found)

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(leave_with_client, group.cancel_scope)
                async with app.state.turn:
                    answer = await anyio.to_thread.run_sync(work)
                group.cancel_scope.cancel()
        finally:
            gone.set()
        return answer

    app.mount("/", StaticFiles(directory=Path(__file__).parent / "static", html=True))
    app.add_middleware(_Guard, hosts=frozenset(host.lower() for host in hosts))
    return app


def is_address(host: str) -> bool:
    """Returns whether a host is an IP address, not a name."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


class _Guard:
    """Refuses requests for other hosts, and forbids browsers to load anything from elsewhere."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app, self._hosts = app, hosts | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        host = _host(Headers(scope=scope).get("host", ""))
        if host in self._hosts or is_address(host):
            await self._app(scope, receive, send_with_headers)
        else:
            refusal = "this server does not accept that host name; start it with --allow_host."
            await _error(400, refusal)(scope, receive, send_with_headers)


def _host(header: str) -> str:
    """Returns the host of a `Host` header, without its port and, of an IPv6 address, brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower().rstrip(".")


def _shown(header: str) -> str:
    """Returns the name of an upload for display: a path's last part, printable and not too long."""
    name = unquote(header, errors="replace").replace("\\", "/").rpartition("/")[2]
    printable = "".join(letter for letter in name if unicodedata.category(letter)[0] != "C")
    return printable.strip()[:200]


async def _receive(request: Request, path: Path, name: str, limits: Limits) -> Response | None:
    """Writes an upload to a file; returns the refusal, or None."""
    too_large = f"{name}: larger than the {limits.max_bytes / 1e6:g} MB that this server accepts."
    try:
        declared = int(request.headers.get("content-length", "0"))
    except ValueError:
        declared = 0
    # The declared length may be wrong, so the bytes are counted as well.
    if declared > limits.max_bytes:
        return _error(413, too_large)
    received = 0
    try:
        with open(path, "wb") as file:
            async with timeout(limits.upload_seconds):
                async for chunk in request.stream():
                    received += len(chunk)
                    if received > limits.max_bytes:
                        return _error(413, too_large)
                    file.write(chunk)
    except TimeoutError:
        return _error(408, f"{name}: did not arrive within {limits.upload_seconds:g} seconds.")
    except ClientDisconnect:
        return Response(status_code=_DISCONNECTED)
    except OSError as error:
        return _error(507, f"{name}: this server cannot store it ({error.strerror}).")
    return None


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


def _about(tagger: Tagger, index: EmbeddingIndex | None, limits: Limits) -> dict[str, Any]:
    """Returns the page's facts about the model."""
    model = tagger.model
    measure, value = model.measure
    return {
        "network": str(model.config.model.name),
        "dataset": str(model.dataset["name"]),
        "synthetic": bool(model.dataset.get("synthetic")),
        "task": model.task,
        "labels": list(model.label_names),
        "measure": None
        if value is None
        else {"name": measure, "value": float(value), "split": "validation"},
        "window_seconds": model.frames * model.features.hop_length / model.features.sample_rate,
        "card": model.card or model_card(model),
        "neighbours": index is not None,
        "max_bytes": limits.max_bytes,
        "max_seconds": limits.max_seconds,
        "version": __version__,
    }
