"""A trained model in one file without pickle: safetensors with its arrays, and JSON notes."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from musicgenre.errors import UserError
from musicgenre.files import write_arrays
from musicgenre.runs.notes import TrainedModel, model_of_notes, run_notes, saved_shapes
from musicgenre.runs.provenance import KEY, PREFIX, SCHEMA, TrainedOn, read_bundle_arrays

# Models that come with the package: <name>.safetensors.
WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
SUFFIX = ".safetensors"
_HALVED = ("variables/params/", "norm/")
_NOTES = ["config", "label_names", "task", "features", "layout", "dataset"]
_NOTES += ["step", "which", "metric", "measure", "card"]


def packaged_models() -> dict[str, Path]:
    """Returns the files of the models that come with this package, by name."""
    return {path.stem: path for path in sorted(WEIGHTS.glob(f"*{SUFFIX}"))}


def save_bundle(
    model: TrainedModel, path: str | os.PathLike[str], card: str = "", *, half: bool = False
) -> None:
    """Writes a model to one file, atomically, with a record of its training clips.

    Paths on this machine are left out.

    Args:
      model: a trained model.
      path: the file, named `.safetensors`.
      card: what users should know about it, Markdown; see `model_card`. "" keeps the model's own.
      half: store parameters and normalisation as float16, which changes a value by up to 1 part in
        2,048. Batch normalisation statistics and arrays beyond float16's range stay float32.

    Raises:
      UserError: the name has another suffix, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise UserError(f"{path}: the file of a model must be named {path.stem}{SUFFIX}.")
    flat: dict[str, Any] = flatten_dict(dict(jax.device_get(model.model)), sep="/")
    arrays = {name: np.ascontiguousarray(value) for name, value in flat.items()}
    for name in [name for name in arrays if half and name.startswith(_HALVED)]:
        arrays[name] = _halved(arrays[name])
    notes = run_notes(model.config, model)
    config, (metric, measure) = notes["config"], model.measure
    config["init_from"] = ""
    if "distill" in config:  # runs of earlier versions have none
        config["distill"]["teachers"] = []
    config["data"].update(root="", store="", stores_root="stores")
    notes |= {"schema": SCHEMA, "dataset": {**model.dataset, "root": ""}}
    notes |= {"step": model.step, "which": model.which, "metric": metric, "measure": measure}
    notes["card"] = card or model.card
    if model.temperature != 1:
        notes["temperature"] = model.temperature
    write_arrays(path, arrays | model.trained_on.to_arrays(), notes, key=KEY)


def read_bundle(path: Path) -> TrainedModel:
    """Reads a file of `save_bundle`.

    Raises:
      UserError: the file is missing, damaged, not a model or of a newer version, or its arrays do
        not fit its network.
    """
    arrays, notes = read_bundle_arrays(path)
    if missing := [name for name in _NOTES if name not in notes]:
        raise UserError(f"{path}: damaged: its notes lack {missing[0]!r}.")
    trained_on = TrainedOn.from_arrays(arrays, path)
    arrays = {name: array for name, array in arrays.items() if not name.startswith(PREFIX)}
    wanted: dict[str, jax.ShapeDtypeStruct] = flatten_dict(saved_shapes(notes), sep="/")
    for name in sorted(wanted.keys() | arrays.keys()):
        there, needed = (list(d[name].shape) if name in d else None for d in (arrays, wanted))
        if there != needed:
            raise UserError(
                f"{path}: the array {name!r} has the shape {there} where this version's network "
                f"has {needed}."
            )
    values = {name: jax.numpy.asarray(arrays[name], wanted[name].dtype) for name in wanted}
    fields = {name: notes[name] for name in ("step", "which", "card")}
    model = unflatten_dict(values, sep="/")
    return model_of_notes(notes, model, workdir=path, trained_on=trained_on, **fields)


def model_card(model: TrainedModel, remarks: str = "") -> str:
    """Returns a Markdown card of a model: data, protocol, measure, labels, front end and limits.

    `remarks` are added, such as the result on the test split.
    """
    data, config = model.dataset, model.config
    (metric, measure), rate = model.measure, model.features.sample_rate
    seconds = model.frames * model.features.hop_length / rate
    clip = model.layout.frames * model.features.hop_length / rate
    measured = "not measured"
    if measure is not None:
        checkpoint = f"({model.which} checkpoint, step {model.step})"
        measured = f"{metric} {measure:.4f} on the validation split {checkpoint}"
        if model.which == "best":
            measured += ", which also selected this checkpoint, so it is slightly optimistic"
    lines = [f"# {config.model.name} on {data['name']}", ""]
    if data.get("synthetic"):
        lines += ["**Trained on synthetic audio: its labels mean nothing for real music.**", ""]
    lines += [
        f"- Task: {model.task}, {len(model.label_names)} outputs",
        f"- Data: {data['name']}; split: {data['protocol']}",
        f"- Measured: {measured}",
        f"- Input: {seconds:.2f} s windows ({model.frames} frames x {model.features.bands} bands) "
        f"of {clip:.2f} s clips",
        f"- Front end: {model.features.describe()}",
        f"- Training: seed {config.seed}, {config.epochs} epochs, batch {config.batch_size}, "
        f"{config.optimizer.name} {config.optimizer.learning_rate:g}",
    ]
    if model.temperature != 1:
        lines.append(f"- Temperature: {model.temperature:.4g}, which divides the logits")
    lines += [
        f"- Labels in the order of the outputs: {', '.join(model.label_names)}",
        "- Limits: it knows only these labels and assigns one of them to any sound, even speech or "
        "noise. The measure holds for music like that of its data set.",
    ]
    return "\n".join(lines) + "\n" + (f"\n{remarks.strip()}\n" if remarks.strip() else "")


def _halved(value: np.ndarray) -> np.ndarray:
    if value.dtype != np.float32:
        return value
    with np.errstate(over="ignore"):
        half = value.astype(np.float16)
    # Overflow, or values so far below the array's largest that float16 drops their digits.
    exact = np.abs(half.astype(np.float32) - value) <= 2.0**-11 * np.maximum(
        np.abs(value), 1e-3 * np.abs(value).max()
    )
    return half if exact.all() else value
