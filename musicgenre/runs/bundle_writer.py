"""A trained model as one file without pickle: safetensors with the network, and JSON with all that is needed to use it."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save

from musicgenre.config import to_plain
from musicgenre.errors import UserError
from musicgenre.files import replacing
from musicgenre.runs.bundle import KEY, SCHEMA, digest, read_bundle
from musicgenre.runs.model import TrainedModel, model_of_notes

SUFFIX = ".safetensors"


def save_bundle(
    model: TrainedModel, path: str | os.PathLike[str], card: str = "", *, half: bool = False
) -> None:
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
    arrays = {
        name: np.ascontiguousarray(value)
        for name, value in _flat(jax.device_get(model.model)).items()
    }
    if half:
        arrays = {
            name: _halved(value) if _may_be_halved(name) else value
            for name, value in arrays.items()
        }
    config = to_plain(model.config)
    config["init_from"] = ""
    if "distill" in config:  # runs of earlier versions have none
        config["distill"]["teachers"] = []
    config["data"].update(root="", store="", stores_root="stores")
    metric, measure = model.measure
    notes = {
        "schema": SCHEMA,
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
        "sha256": digest(arrays),
    }
    if model.temperature != 1:
        notes["temperature"] = model.temperature
    text = json.dumps(notes, ensure_ascii=False, allow_nan=False, sort_keys=True)
    with replacing(path) as temporary:
        temporary.write_bytes(save(arrays, metadata={KEY: text}))


def load_bundle(path: str | os.PathLike[str]) -> TrainedModel:
    """Reads a model that `save_bundle` wrote.

    Raises:
      UserError: the file is missing, is none of ours or of a newer version, is damaged, or its arrays do not fit its network.
    """
    path = Path(path)
    notes, variables = read_bundle(path)
    return model_of_notes(
        notes,
        variables,
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
    measured = (
        "not measured"
        if measure is None
        else f"{metric} {measure:.4f} on the validation split ({checkpoint})"
    )
    chosen = (
        ", on which this checkpoint was chosen, so it is a little too good"
        if model.which == "best" and measure
        else ""
    )
    lines = [
        f"# {config.model.name} on {data['name']}",
        "",
        *(
            ["**Trained on made-up audio: its labels mean nothing for real music.**", ""]
            if data.get("synthetic")
            else []
        ),
        f"- Task: {model.task}, {len(model.label_names)} outputs",
        f"- Data: {data['name']}; split: {data['protocol']}",
        f"- Measured: {measured}{chosen}",
        f"- Input: {seconds:.2f} s windows ({model.frames} frames x {model.features.bands} bands) of {clip:.2f} s clips",
        f"- Front end: {model.features.describe()}",
        f"- Training: seed {config.seed}, {config.epochs} epochs, batch {config.batch_size}, {config.optimizer.name} "
        f"{config.optimizer.learning_rate:g}",
        *(
            [f"- Temperature: {model.temperature:.4g}, by which the logits are divided"]
            if model.temperature != 1
            else []
        ),
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
    exact = np.abs(half.astype(np.float32) - value) <= 2.0**-11 * np.maximum(
        np.abs(value), 1e-3 * np.abs(value).max()
    )
    return half if exact.all() else value
