"""Atomic writes, JSON, hashes, and one format for named arrays with notes and a checksum."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from musicgenre.errors import UserError

StrPath = str | os.PathLike[str]


@contextlib.contextmanager
def replacing(path: StrPath) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`, renamed to `path` on success.

    Raises:
      UserError: the folder cannot be written or the disk is full; `path` is as it was before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}). "
            "Free some space or choose another folder; the old file is unchanged."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: StrPath, text: str) -> None:
    """Writes `text` (UTF-8) to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: StrPath, value: Any) -> None:
    """Writes `value` as indented JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: StrPath, what: str = "JSON file") -> Any:
    """Reads a JSON file.

    Raises:
      UserError: it is missing or is not JSON; the message calls it `what`.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable {what} ({error}).") from error


def sha256(path: StrPath) -> str:
    """Returns the SHA-256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fingerprint(value: Any, digits: int = 8) -> str:
    """Returns the first hexadecimal digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 of named arrays in hexadecimal; their order does not matter."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        total.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def write_arrays(
    path: StrPath, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any], *, key: str
) -> None:
    """Writes contiguous arrays and JSON notes with a checksum to a safetensors file, atomically.

    The notes, `schema` among them, are the file's metadata `key`, which tells one type of file from
    another; the arrays' digest is added as `sha256`. Raises UserError like `replacing`.
    """
    from safetensors.numpy import save

    notes = {**notes, "sha256": arrays_digest(arrays)}
    text = json.dumps(notes, ensure_ascii=False, allow_nan=False, sort_keys=True)
    with replacing(path) as temporary:
        # save_file would ignore the umask and raise no OSError on a full disk.
        temporary.write_bytes(save(dict(arrays), metadata={key: text}))


def read_arrays(
    path: StrPath, *, key: str, schemas: Collection[int], what: str, remedy: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays and the notes of a file of `write_arrays`.

    `schemas` are the values of the notes' `schema` that the caller can read. Messages call the
    file `what`, such as "model", and end in `remedy`.

    Raises:
      UserError: the file is missing, damaged, of another type or of a newer version.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise UserError(f"{path}: no such {what} file.")
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            text = (file.metadata() or {}).get(key)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable {what}, or cut short ({error}). {remedy}"
        ) from error
    if text is None:
        raise UserError(f"{path}: holds other arrays and no {what}. {remedy}")
    try:
        notes = json.loads(text)
        schema, checksum = notes["schema"], notes["sha256"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged: its notes cannot be read ({error}). {remedy}") from error
    if schema not in schemas:
        raise UserError(f"{path}: this version does not read schema {schema!r}. Update musicgenre.")
    if arrays_digest(arrays) != checksum:
        raise UserError(f"{path}: damaged: its arrays do not match their SHA-256. {remedy}")
    return arrays, notes
