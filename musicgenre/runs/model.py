"""A trained model, out of a workdir, a bundle or this package, with everything that travels with it."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from musicgenre.audio.features import FeatureSpec
from musicgenre.audio.layout import ClipLayout
from musicgenre.config import from_plain
from musicgenre.errors import UserError, did_you_mean
from musicgenre.runs.bundle import packaged_models, resolve_source
from musicgenre.runs.notes import saved_module, saved_shapes


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model as it was saved.

    Attributes:
      workdir: the run that it comes from, or the file of a bundle.
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
      card: what people should know of it, Markdown; "" for a workdir.
      temperature: what the logits are divided by (Guo et al. 2017, arXiv:1706.04599); 1 as it was trained.
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

    def __post_init__(self) -> None:
        """Refuses a temperature that has no meaning."""
        if not 0 < self.temperature < math.inf:
            raise UserError(
                f"{self.workdir}: a temperature must be a number above 0, not {self.temperature}."
            )
        if self.temperature != 1 and self.task == "regression":
            raise UserError(
                f"{self.workdir}: a temperature belongs to probabilities, and a regression has none."
            )

    @property
    def frames(self) -> int:
        """Frames of one input of the network."""
        return int(self.config.data.crop_frames) or self.layout.frames

    def probabilities(self, logits: jax.Array) -> jax.Array:
        """Returns what the network's logits say, `[batch, classes]`: probabilities, or a regression's outputs as they are.

        Whatever shows probabilities of a trained model takes them from here, so that its temperature is in all of them.
        """
        # Loaded here and not above: it brings Optax, which tagging needs for nothing else.
        from musicgenre.models.apply import probabilities

        return probabilities(
            logits if self.temperature == 1 else logits / self.temperature, self.task
        )


def load_model(source: str | os.PathLike[str], which: str = "last") -> TrainedModel:
    """Loads a model.

    Args:
      source: a run's folder, a bundle (see `musicgenre.runs.bundle_writer`), or the name of a model that comes with this package,
        such as "gtzan". Of a name that is also a folder without checkpoints, the package's model is meant.
      which: of a run: "last", "best" (by the validation measure) or a step. A bundle holds one.

    Raises:
      UserError: no such run, checkpoint or bundle, or none that can be read.
    """
    path = resolve_source(source)
    if path.is_file():
        from musicgenre.runs.bundle_writer import load_bundle

        if which not in ("last", "best"):
            raise UserError(
                f"{path}: a bundle holds one checkpoint; a step such as {which!r} can be asked of a workdir only."
            )
        return load_bundle(path)
    if not path.is_dir():
        names = did_you_mean(str(source), packaged_models())
        raise UserError(
            f"{path}: no such workdir, bundle or packaged model.{names} Train first: experiments/train.py --config=... "
            f"--workdir={path}"
        )
    from musicgenre.runs.checkpoints import read_model  # brings Orbax, which a bundle does not need

    restored = read_model(path / "checkpoints", which, saved_shapes)
    meta = restored.meta
    return model_of_notes(
        meta,
        restored.value,
        workdir=path,
        step=restored.step,
        which=which,
        measure=(meta["metric"], meta["measure"]),
    )


def model_of_notes(
    meta: Mapping[str, Any],
    variables: Any,
    *,
    workdir: Path,
    step: int,
    which: str,
    measure: tuple[str, float | None],
    card: str = "",
) -> TrainedModel:
    """Returns the model that saved notes and what `TrainState.model()` gave make together.

    Args:
      meta: see `musicgenre.runs.notes.run_notes`.
      variables: `variables` and `norm`.
      workdir: see `TrainedModel`, as the rest.
      step: of the checkpoint.
      which: what was asked for.
      measure: name and value.
      card: Markdown.
    """
    return TrainedModel(
        workdir=workdir,
        step=step,
        which=which,
        measure=measure,
        config=from_plain(meta["config"]),
        module=saved_module(dict(meta)),
        model=variables,
        label_names=tuple(meta["label_names"]),
        task=meta["task"],
        features=FeatureSpec.from_dict(meta["features"]),
        layout=ClipLayout(**meta["layout"]),
        dataset=meta["dataset"],
        card=card,
        temperature=float(meta.get("temperature", 1.0)),
    )
