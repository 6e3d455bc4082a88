"""A trained model as one file without pickle: safetensors with the network, and JSON with all that is needed to use it."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from musicgenre.config import to_plain
from musicgenre.errors import UserError
from musicgenre.files import replacing
from musicgenre.inference.model import TrainedModel, model_of_notes
from musicgenre.training.saved import saved_shapes

SUFFIX = ".safetensors"
# The key of the notes in the file's metadata, and their version.
_KEY, _SCHEMA = "musicgenre", 1
_NOTES = ("config", "label_names", "task", "features", "layout", "dataset", "step", "which", "metric", "measure", "card")


def save_bundle(model: TrainedModel, path: str | os.PathLike[str], card: str = "", *, half: bool = False) -> None:
    """Writes a model to one file, atomically.

    Places on this machine (the data set's folder, the stores, a run that it started from) are left out.

    Args:
      model: a trained model.
      path: the file, named `.safetensors`.
      card: what people should know of it, Markdown; see `model_card`. "" keeps the model's own.
      half: store parameters and normalisation in float16, which halves the file and moves a value by up to 1 part in 2,048. The
        statistics of batch normalisation, and an array that has no room in float16's range, stay float32.

    Raises:
      UserError: the name has another ending, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise UserError(f"{path}: the file of a model must be named {path.stem}{SUFFIX}.")
    arrays = {name: np.ascontiguousarray(value) for name, value in _flat(jax.device_get(model.model)).items()}
    if half:
        arrays = {name: _halved(value) if _may_be_halved(name) else value for name, value in arrays.items()}
    config = to_plain(model.config)
    config["init_from"] = ""
    config["data"].update(root="", store="", stores_root="stores")
    metric, measure = model.measure
    notes = {
        "schema": _SCHEMA,
        "config": config,
        "label_names": list(model.label_names),
        "task": model.task,
        "features": model.features.to_dict(),
        "layout": dataclasses.asdict(model.layout),
        "dataset": {**model.dataset, "root": ""},
        "step": model.step,
        "which": model.which,
        "metric": metric,
        "measure": measure,
        "card": card or model.card,
        "sha256": _digest(arrays),
    }
    text = json.dumps(notes, ensure_ascii=False, allow_nan=False, sort_keys=True)
    with replacing(path) as temporary:
        temporary.write_bytes(save(arrays, metadata={_KEY: text}))


def load_bundle(path: str | os.PathLike[str]) -> TrainedModel:
    """Reads a model that `save_bundle` wrote.

    Raises:
      UserError: the file is missing, is none of ours or of a newer version, is damaged, or its arrays do not fit its network.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise UserError(f"{path}: not a model of this package (make one with: musicgenre bundle <workdir> <file>).")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable model, or cut short ({error}).") from error
    try:
        notes = json.loads(metadata[_KEY])
        schema = notes["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged: its notes cannot be read ({error}).") from error
    if schema != _SCHEMA:
        raise UserError(f"{path}: schema {schema!r} is not the one that this version reads ({_SCHEMA}). Update musicgenre.")
    if missing := [name for name in (*_NOTES, "sha256") if name not in notes]:
        raise UserError(f"{path}: damaged: its notes lack {missing[0]!r}.")
    if _digest(arrays) != notes["sha256"]:
        raise UserError(f"{path}: damaged: its arrays are not those that were saved (SHA-256). Copy the file anew.")
    return model_of_notes(
        notes,
        _fitted(path, arrays, saved_shapes(notes)),
        workdir=path,
        step=int(notes["step"]),
        which=str(notes["which"]),
        measure=(notes["metric"], notes["measure"]),
        card=str(notes["card"]),
    )


def model_card(model: TrainedModel, remarks: str = "") -> str:
    """Returns what is known of a model, in Markdown: data, protocol, measure, labels in order, front end and limits.

    Args:
      model: a trained model.
      remarks: what else is to be said, such as the result on the test list.
    """
    data, config = model.dataset, model.config
    metric, measure = model.measure
    seconds = model.frames * model.features.hop_length / model.features.sample_rate
    clip = model.layout.frames * model.features.hop_length / model.features.sample_rate
    checkpoint = f"{model.which} checkpoint, step {model.step}"
    measured = "not measured" if measure is None else f"{metric} {measure:.4f} on the validation split ({checkpoint})"
    chosen = ", on which this checkpoint was chosen, so it is a little too good" if model.which == "best" and measure else ""
    lines = [
        f"# {config.model.name} on {data['name']}",
        "",
        *(["**Trained on made-up audio: its labels mean nothing for real music.**", ""] if data.get("synthetic") else []),
        f"- Task: {model.task}, {len(model.label_names)} outputs",
        f"- Data: {data['name']}; split: {data['protocol']}",
        f"- Measured: {measured}{chosen}",
        f"- Input: {seconds:.2f} s windows ({model.frames} frames x {model.features.bands} bands) of {clip:.2f} s clips",
        f"- Front end: {model.features.describe()}",
        f"- Training: seed {config.seed}, {config.epochs} epochs, batch {config.batch_size}, {config.optimizer.name} "
        f"{config.optimizer.learning_rate:g}",
        f"- Labels in the order of the outputs: {', '.join(model.label_names)}",
        "- Limits: it knows these labels only and names one of them for any sound, speech and noise too. A measure holds for "
        "music like that of its data set.",
    ]
    return "\n".join(lines) + "\n" + (f"\n{remarks.strip()}\n" if remarks.strip() else "")


def _flat(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = flatten_dict(dict(tree), sep="/")
    return {name: np.asarray(value) for name, value in flat.items()}


def _may_be_halved(name: str) -> bool:
    return name.startswith(("variables/params/", "norm/"))


def _halved(value: np.ndarray) -> np.ndarray:
    if value.dtype != np.float32:
        return value
    with np.errstate(over="ignore"):
        half = value.astype(np.float16)
    # What overflows, or is so small beside the array's largest value that it loses its digits, would change the model.
    exact = np.abs(half.astype(np.float32) - value) <= 2.0**-11 * np.maximum(np.abs(value), 1e-3 * np.abs(value).max())
    return half if exact.all() else value


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _fitted(path: Path, arrays: Mapping[str, np.ndarray], expected: Any) -> dict[str, Any]:
    """Returns the arrays as the tree that the network takes, in its types."""
    wanted: dict[str, jax.ShapeDtypeStruct] = flatten_dict(expected, sep="/")
    if names := wanted.keys() ^ arrays.keys():
        name = min(names)
        where = "is missing" if name in wanted else "is not one of the network's"
        raise UserError(f"{path}: the array {name!r} {where}. The network of this version differs from the one that was saved.")
    for name, shape in wanted.items():
        if arrays[name].shape != shape.shape:
            raise UserError(f"{path}: the array {name!r} has the shape {arrays[name].shape} where {shape.shape} is needed.")
    tree: dict[str, Any] = unflatten_dict({name: jax.numpy.asarray(arrays[name], wanted[name].dtype) for name in wanted}, sep="/")
    return tree
