"""Loading a trained model from a workdir, a bundle or this package."""

import os
from pathlib import Path

from musicgenre.errors import UserError, did_you_mean
from musicgenre.runs.bundle import packaged_models, read_bundle
from musicgenre.runs.notes import TrainedModel, model_of_notes
from musicgenre.runs.provenance import TrainedOn, read_workdir

__all__ = ["TrainedModel", "load_model", "training_clips"]


def load_model(
    source: str | os.PathLike[str], which: str = "last", *, field: str = ""
) -> TrainedModel:
    """Loads a trained model.

    Args:
      source: a workdir, a bundle (see `musicgenre.runs.bundle`), or the name of a model that comes
        with this package, such as "gtzan". Such a name wins over a folder without checkpoints.
      which: of a workdir: "last", "best" (by the validation measure) or a step. A bundle holds one
        checkpoint.
      field: the config field that names the source, for messages.

    Raises:
      UserError: there is no such workdir, bundle or checkpoint, or it cannot be read.
    """
    path = _resolved(source, field)
    if path.is_file():
        if which not in ("last", "best"):
            raise UserError(f"{path}: a bundle holds one checkpoint, so it has no step {which!r}.")
        return read_bundle(path)
    from musicgenre.runs.checkpoints import read_model  # imports Orbax, which takes a second

    found = read_model(path / "checkpoints", which)
    fields = {"workdir": path, "step": found.step, "which": which, "trained_on": read_workdir(path)}
    return model_of_notes(found.meta, found.value, **fields)


def training_clips(source: str | os.PathLike[str], *, field: str = "") -> TrainedOn:
    """Returns what a model was trained on, without its checkpoint; see `load_model`."""
    path = _resolved(source, field)
    return read_bundle(path).trained_on if path.is_file() else read_workdir(path)


def _resolved(source: str | os.PathLike[str], field: str) -> Path:
    path = Path(source)
    if not path.is_file() and not (path / "checkpoints").is_dir():
        path = packaged_models().get(str(source), path)
    if path.exists():
        return path
    hint = did_you_mean(str(source), packaged_models())
    name = f"{field}: {str(source)!r}" if field else str(source)
    remedy = f"Train it: musicgenre train --config=... --workdir={source}"
    raise UserError(f"{name}: no such workdir, bundle or packaged model.{hint} {remedy}")
