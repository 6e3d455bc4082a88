"""The notes in checkpoints and bundles, and the trained model that they describe."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from musicgenre import models
from musicgenre.audio.features import FeatureSpec
from musicgenre.audio.layout import ClipLayout
from musicgenre.config import from_plain, to_plain
from musicgenre.errors import UserError
from musicgenre.runs.provenance import UNKNOWN, TrainedOn
from musicgenre.store.store import Store


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A saved model.

    Attributes:
      workdir: the run that it comes from, or the file of a bundle.
      step, which: the checkpoint's step, and its name: "last", "best" or the step.
      measure: name and value (at this step) of the validation measure that selects the best
        checkpoint.
      config, module: the run's config and Linen module.
      model: its `variables`, and the `norm` of its training split.
      label_names: labels in the order of its outputs.
      task: "single_label", "multi_label" or "regression".
      features: the front end.
      layout: frames per clip, padding, excerpt.
      dataset: its data set: name, protocol, and whether the audio was synthetic.
      card: what users should know about it, Markdown; "" for a workdir.
      temperature: divides the logits (Guo et al. 2017, arXiv:1706.04599); 1 if not calibrated.
      trained_on: the clips that it was trained on.
    """

    workdir: Path
    step: int
    which: str
    measure: tuple[str, float | None]
    config: ConfigDict
    module: nn.Module
    model: Any
    label_names: tuple[str, ...]
    task: str
    features: FeatureSpec
    layout: ClipLayout
    dataset: dict[str, Any]
    card: str = ""
    temperature: float = 1.0
    trained_on: TrainedOn = UNKNOWN

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            wrong = f"must be a number above 0, not {self.temperature}"
            raise UserError(f"{self.workdir}: a temperature {wrong}.")
        if self.temperature != 1 and self.task == "regression":
            raise UserError(
                f"{self.workdir}: a temperature is for probabilities; a regression has none."
            )

    @property
    def frames(self) -> int:
        """Frames of one input of the network."""
        return int(self.config.data.crop_frames) or self.layout.frames

    def probabilities(self, logits: jax.Array) -> jax.Array:
        """Returns probabilities, or a regression's outputs, of logits `[batch, classes]`."""
        # A late import: it brings Optax, which tagging does not need otherwise.
        from musicgenre.models.apply import probabilities

        scaled = logits if self.temperature == 1 else logits / self.temperature
        return probabilities(scaled, self.task)


def model_of_notes(notes: Mapping[str, Any], variables: Any, **fields: Any) -> TrainedModel:
    """Returns a model from saved notes and `TrainState.model()` (`variables` and `norm`).

    `fields` are those of `TrainedModel` that the notes do not have: `workdir`, `step`, `which`, and
    optionally `trained_on` and `card`.
    """
    return TrainedModel(
        measure=(notes["metric"], notes["measure"]),
        config=from_plain(notes["config"]),
        module=saved_module(notes),
        model=variables,
        label_names=tuple(notes["label_names"]),
        task=notes["task"],
        features=FeatureSpec.from_dict(notes["features"]),
        layout=ClipLayout(**notes["layout"]),
        dataset=notes["dataset"],
        temperature=float(notes.get("temperature", 1.0)),
        **fields,
    )


def run_notes(config: ConfigDict, source: Store | TrainedModel) -> dict[str, Any]:
    """Returns the notes with which a model of a store can be used without the store."""
    return {
        "config": to_plain(config),
        "label_names": list(source.label_names),
        "task": source.task,
        "features": source.features.to_dict(),
        "layout": dataclasses.asdict(source.layout),
        "dataset": source.dataset,
    }


def saved_module(notes: Mapping[str, Any]) -> nn.Module:
    """Builds the module that saved notes describe."""
    frames, bands = _input_shape(notes)
    return models.build(
        from_plain(notes["config"]["model"]).to_dict(),
        num_classes=len(notes["label_names"]),
        frames=frames,
        bands=bands,
        kind=notes["features"]["kind"],
        dtype=notes["config"]["dtype"],
    )


def saved_shapes(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the shapes of the saved `TrainState.model()`, for this machine's first device."""
    frames, bands = _input_shape(notes)
    module = saved_module(notes)
    x = jax.ShapeDtypeStruct((1, frames, bands), jnp.float32)
    variables = dict(jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), x))
    variables.pop("intermediates", None)
    norm_shape = (frames if notes["config"]["data"]["normalise"] == "position" else 1, bands)
    norm = {name: jax.ShapeDtypeStruct(norm_shape, jnp.float32) for name in ("mean", "std")}
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        {"variables": variables, "norm": norm},
    )


def _input_shape(notes: Mapping[str, Any]) -> tuple[int, int]:
    frames = notes["config"]["data"]["crop_frames"] or notes["layout"]["frames"]
    return frames, FeatureSpec.from_dict(notes["features"]).bands
