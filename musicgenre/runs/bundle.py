"""Reading a model's one file: safetensors with the network, and JSON with all that is needed to use it."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from musicgenre.errors import UserError
from musicgenre.runs.notes import saved_shapes

# Models that come with the package: <name>.safetensors.
WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
# The key of the notes in the file's metadata, and their version.
KEY, SCHEMA = "musicgenre", 1
_NOTES = (
    "config",
    "label_names",
    "task",
    "features",
    "layout",
    "dataset",
    "step",
    "which",
    "metric",
    "measure",
    "card",
)


class Bundle(NamedTuple):
    """What a bundle holds: its notes (see `musicgenre.runs.notes.run_notes`), and `variables` and `norm`."""

    notes: dict[str, Any]
    value: dict[str, Any]


def packaged_models() -> dict[str, Path]:
    """Returns the models that come with this package: file by name."""
    return {path.stem: path for path in sorted(WEIGHTS.glob("*.safetensors"))}


def resolve_source(source: str | os.PathLike[str]) -> Path:
    """Returns the path that a model's source means: the source itself, or the file of a model that comes with this package.

    Of a name that is also a folder without checkpoints, the package's model is meant.
    """
    path = Path(source)
    if path.is_file() or (path / "checkpoints").is_dir():
        return path
    return packaged_models().get(str(source), path)


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Reads what `musicgenre.runs.bundle_writer.save_bundle` wrote.

    Raises:
      UserError: the file is missing, is none of ours or of a newer version, is damaged, or its arrays do not fit its network.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise UserError(
                    f"{path}: not a model of this package (make one with: musicgenre bundle <workdir> <file>)."
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable model, or cut short ({error}).") from error
    try:
        notes = json.loads(metadata[KEY])
        schema = notes["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged: its notes cannot be read ({error}).") from error
    if schema != SCHEMA:
        raise UserError(
            f"{path}: schema {schema!r} is not the one that this version reads ({SCHEMA}). Update musicgenre."
        )
    if missing := [name for name in (*_NOTES, "sha256") if name not in notes]:
        raise UserError(f"{path}: damaged: its notes lack {missing[0]!r}.")
    if digest(arrays) != notes["sha256"]:
        raise UserError(
            f"{path}: damaged: its arrays are not those that were saved (SHA-256). Copy the file anew."
        )
    return Bundle(notes, _fitted(path, arrays, saved_shapes(notes)))


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 of named arrays, whatever their order."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        total.update(np.ascontiguousarray(arrays[name]).tobytes())
    return total.hexdigest()


def _fitted(path: Path, arrays: Mapping[str, np.ndarray], expected: Any) -> dict[str, Any]:
    """Returns the arrays as the tree that the network takes, in its types."""
    wanted: dict[str, jax.ShapeDtypeStruct] = flatten_dict(expected, sep="/")
    if names := wanted.keys() ^ arrays.keys():
        name = min(names)
        where = "is missing" if name in wanted else "is not one of the network's"
        raise UserError(
            f"{path}: the array {name!r} {where}. The network of this version differs from the one that was saved."
        )
    for name, shape in wanted.items():
        if arrays[name].shape != shape.shape:
            raise UserError(
                f"{path}: the array {name!r} has the shape {arrays[name].shape} where {shape.shape} is needed."
            )
    tree: dict[str, Any] = unflatten_dict(
        {name: jax.numpy.asarray(arrays[name], wanted[name].dtype) for name in wanted}, sep="/"
    )
    return tree
