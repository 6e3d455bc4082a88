"""The notes that a run leaves: in its checkpoints, with the network that they describe, and of the clips that it learnt from."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from musicgenre import models
from musicgenre.audio.features import FeatureSpec
from musicgenre.config import from_plain, to_plain
from musicgenre.store.store import Store

# What `train_clips.json` lists of each clip.
CLIP_LISTS = ("clip_id", "sha256", "group")


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
    variables = dict(
        jax.eval_shape(lambda key, x: module.init(key, x, train=False), jax.random.key(0), x)
    )
    variables.pop("intermediates", None)
    norm_shape = (frames if meta["config"]["data"]["normalise"] == "position" else 1, bands)
    norm = {name: jax.ShapeDtypeStruct(norm_shape, jnp.float32) for name in ("mean", "std")}
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        {"variables": variables, "norm": norm},
    )


def trained_clips(record: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Returns all clips that a run has learnt from: its own, those of the run it started from and of its teachers, each once.

    Args:
      record: its `train_clips.json`.

    Returns:
      The record with longer lists, and whose clips are not known; "" where all are.
    """
    unknown = []
    known = set(record["clip_id"])
    whole = dict(record) | {name: list(record[name]) for name in CLIP_LISTS}
    if "init_from" in record:
        if record["init_from"] is None:
            unknown.append("the model that this run started from does not list them")
        else:
            before, missing = trained_clips(record["init_from"])
            add_clips(whole, before, known)
            unknown.append(missing)
    if "teachers" in record:
        add_clips(whole, record["teachers"], known)
        unknown.append(record["teachers"]["unknown"])
    return whole, "; ".join(filter(None, unknown))


def add_clips(record: dict[str, Any], other: Mapping[str, Any], known: set[str]) -> None:
    """Adds another record's clips to the lists of one, and to those `known`, where they are not yet."""
    for clip_id, content, group in zip(*(other[name] for name in CLIP_LISTS), strict=True):
        if clip_id not in known:
            known.add(clip_id)
            for name, value in zip(CLIP_LISTS, (clip_id, content, group), strict=True):
                record[name].append(value)
