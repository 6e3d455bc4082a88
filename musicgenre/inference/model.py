"""A trained model out of a workdir, with everything that travels with it."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from musicgenre.audio.features import FeatureSpec
from musicgenre.config import from_plain
from musicgenre.errors import UserError
from musicgenre.pipeline.store import ClipLayout
from musicgenre.training.checkpoints import read_model
from musicgenre.training.saved import saved_module, saved_shapes


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model as it was saved.

    Attributes:
      workdir: the run that it comes from.
      step: the checkpoint's step.
      which: "last", "best" or the step, as it was asked for.
      measure: the validation measure that the best checkpoint is chosen by, its name and value at this step.
      config: the run's config.
      module: the Linen module.
      model: its `variables`, and the `norm` of its training split.
      label_names: labels in the order of its outputs.
      task: "single_label", "multi_label" or "regression".
      features: the front end.
      layout: frames per clip, padding, excerpt.
      dataset: what it was trained on: name, protocol, and whether the audio was synthetic.
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

    @property
    def frames(self) -> int:
        """Frames of one input of the network."""
        return int(self.config.data.crop_frames) or self.layout.frames


def load_model(workdir: str | os.PathLike[str], which: str = "last") -> TrainedModel:
    """Loads a model from a run.

    Args:
      workdir: the run's folder.
      which: "last", "best" (by the validation measure) or a step.

    Raises:
      UserError: no such run or checkpoint, or none that can be read.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such workdir. Train first: experiments/train.py --config=... --workdir={workdir}")
    restored = read_model(workdir / "checkpoints", which, saved_shapes)
    meta = restored.meta
    return TrainedModel(
        workdir=workdir,
        step=restored.step,
        which=which,
        measure=(meta["metric"], meta["measure"]),
        config=from_plain(meta["config"]),
        module=saved_module(meta),
        model=restored.value,
        label_names=tuple(meta["label_names"]),
        task=meta["task"],
        features=FeatureSpec.from_dict(meta["features"]),
        layout=ClipLayout(**meta["layout"]),
        dataset=meta["dataset"],
    )
