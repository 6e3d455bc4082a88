"""Loading a trained model from a workdir, a bundle or this package."""

import os
from pathlib import Path

from musicgenre.errors import UserError, did_you_mean
from musicgenre.runs.bundle import packaged_models, read_bundle
from musicgenre.runs.notes import TrainedModel, model_of_notes, saved_shapes
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
            raise UserError(
                f"{path}: a bundle holds one checkpoint, so it has no step {which!r}. "
                "Ask a workdir for a step."
            )
        notes, value, trained_on = read_bundle(path)
        return model_of_notes(
            notes,
            value,
            workdir=path,
            step=int(notes["step"]),
            which=str(notes["which"]),
            measure=(notes["metric"], notes["measure"]),
            trained_on=trained_on,
            card=str(notes["card"]),
        )
    from musicgenre.runs.checkpoints import read_model  # imports Orbax, which takes a second

    restored = read_model(path / "checkpoints", which, saved_shapes)
    meta = restored.meta
    return model_of_notes(
        meta,
        restored.value,
        workdir=path,
        step=restored.step,
        which=which,
        measure=(meta["metric"], meta["measure"]),
        trained_on=read_workdir(path),
    )


def training_clips(source: str | os.PathLike[str], *, field: str = "") -> TrainedOn:
    """Returns what a model was trained on, without its checkpoint.

    Args:
      source: see `load_model`.
      field: the config field that names the source, for messages.

    Raises:
      UserError: there is no such workdir or bundle, or it cannot be read.
    """
    path = _resolved(source, field)
    return read_bundle(path).trained_on if path.is_file() else read_workdir(path)


def _resolved(source: str | os.PathLike[str], field: str) -> Path:
    """Returns the workdir or bundle that a source names."""
    path = Path(source)
    if not path.is_file() and not (path / "checkpoints").is_dir():
        path = packaged_models().get(str(source), path)
    if path.exists():
        return path
    names = did_you_mean(str(source), packaged_models())
    name = f"{field}: {str(source)!r}" if field else str(source)
    raise UserError(
        f"{name}: no such workdir, bundle or packaged model.{names} "
        f"Train one first: musicgenre train --config=... --workdir={source}"
    )
