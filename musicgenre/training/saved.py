"""The notes that a run's checkpoints hold, and the network that they describe."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from musicgenre import models
from musicgenre.audio.features import FeatureSpec
from musicgenre.config import from_plain, to_plain
from musicgenre.pipeline.store import Store


def run_notes(config: ConfigDict, store: Store) -> dict[str, Any]:
    """Returns what a checkpoint says of its run, so that the model can be used without the store."""
    return {
        "config": to_plain(config),
        "label_names": list(store.label_names),
        "task": store.task,
        "features": store.features.to_dict(),
        "layout": dataclasses.asdict(store.layout),
        "dataset": store.dataset,
    }


def saved_module(meta: dict[str, Any]) -> nn.Module:
    """Builds the module that a checkpoint's notes describe."""
    frames, bands = saved_input(meta)
    return models.build(
        from_plain(meta["config"]["model"]).to_dict(),
        num_classes=len(meta["label_names"]),
        frames=frames,
        bands=bands,
        kind=FeatureSpec.from_dict(meta["features"]).kind,
        dtype=meta["config"]["dtype"],
    )


def saved_input(meta: dict[str, Any]) -> tuple[int, int]:
    """Returns the frames and bands of one input of the network."""
    frames = meta["config"]["data"]["crop_frames"] or meta["layout"]["frames"]
    return frames, FeatureSpec.from_dict(meta["features"]).bands


def saved_shapes(meta: dict[str, Any]) -> dict[str, Any]:
    """Returns the shapes of what `TrainState.model()` of that run holds, for this machine's first device."""
    frames, bands = saved_input(meta)
    module = saved_module(meta)
    x = jax.ShapeDtypeStruct((1, frames, bands), jnp.float32)
    variables = dict(jax.eval_shape(lambda key, x: module.init(key, x, train=False), jax.random.key(0), x))
    variables.pop("intermediates", None)
    norm_shape = (frames if meta["config"]["data"]["normalise"] == "position" else 1, bands)
    norm = {name: jax.ShapeDtypeStruct(norm_shape, jnp.float32) for name in ("mean", "std")}
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), {"variables": variables, "norm": norm}
    )
