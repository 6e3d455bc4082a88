"""An untrained model of three labels with fixed parameters, for tests that need any model."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from musicgenre.config import base_config, clip_layout, feature_spec, to_plain
from musicgenre.runs.model import TrainedModel, model_of_notes
from musicgenre.runs.notes import saved_module, saved_shapes


def tiny_model(
    task: str = "single_label",
    labels: tuple[str, ...] = ("low", "middle", "high/est"),
    **changes: Any,
) -> TrainedModel:
    """Returns a model of windows of 64 frames x 16 bands at a hop of 512 samples (1.49 s).

    `changes` are config fields, with `__` for the dot.
    """
    config = base_config()
    config.data.frames = 64
    config.data.normalise = "band"
    config.features.n_mels = 16
    config.features.hop_length = 512
    config.model = ConfigDict(
        {"name": "conv1d", "module": "", "filters": (8, 16), "dense": (16,), "batch_norm": True}
    )
    config.data.root = "/somewhere/private"
    for name, value in changes.items():
        node = config
        *parents, leaf = name.split("__")
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    notes = {
        "config": to_plain(config),
        "label_names": list(labels),
        "task": task,
        "metric": "accuracy",
        "measure": 0.5,
        "features": feature_spec(config).to_dict(),
        "layout": vars(clip_layout(config)),
        "dataset": {
            "name": "example",
            "root": "/somewhere/private",
            "protocol": "random",
            "task": task,
            "synthetic": False,
        },
    }
    shapes = saved_shapes(notes)
    bands = feature_spec(config).bands
    frames = config.data.crop_frames or config.data.frames
    module = saved_module(notes)
    start = jax.jit(
        lambda: module.init(
            jax.random.key(0), np.zeros((1, frames, bands), np.float32), train=False
        )
    )()
    noise = np.random.default_rng(1)
    # Far from even probabilities, so that a wrong window shows.
    params = jax.tree.map(
        lambda a: np.asarray(a) + 0.3 * noise.standard_normal(a.shape).astype(np.float32),
        start["params"],
    )
    variables = {name: params if name == "params" else start[name] for name in shapes["variables"]}
    norm = {
        name: np.full(shape.shape, {"mean": -30.0, "std": 15.0}[name], np.float32)
        for name, shape in shapes["norm"].items()
    }
    return model_of_notes(
        notes, {"variables": variables, "norm": norm}, workdir=Path("run"), step=7, which="last"
    )
