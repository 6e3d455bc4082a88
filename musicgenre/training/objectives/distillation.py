"""Distillation: teachers' predictions replace a fraction of the label target.

After Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), with cross-fitting: a clip's teachers are
the models that did not train on it, since the prediction for a memorised clip is little more than
its label.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from musicgenre.config import differences
from musicgenre.errors import UserError
from musicgenre.files import fingerprint, read_json, replacing, sha256, write_json
from musicgenre.runs.model import TrainedModel, load_model
from musicgenre.store.store import Store
from musicgenre.training.parallel import Parallel
from musicgenre.training.scoring import score_clips
from musicgenre.training.step import make_score_step

TARGETS, NOTES = "teachers.npy", "teachers.json"


def distils(config: ConfigDict) -> bool:
    """Returns whether a run of this config learns from teachers."""
    return bool(config.distill.teachers) and config.distill.weight > 0


def read_teachers(config: ConfigDict, store: Store) -> list[TrainedModel]:
    """Reads the teachers of a run; of a workdir, the last checkpoint.

    Raises:
      UserError: one is missing or does not fit the store, or the task or loss has no soft targets.
    """
    if store.task == "regression":
        raise UserError(
            "config.distill.teachers: a regression has no probabilities to learn from. "
            "Leave it empty."
        )
    if config.loss.name == "mse":
        raise UserError(
            "config.distill.teachers needs the cross entropy: leave config.loss.name empty."
        )
    teachers = []
    for source in config.distill.teachers:
        teachers.append(load_model(source, field="config.distill.teachers"))
        _check_fits(str(source), teachers[-1], store)
    return teachers


def soft_targets(
    config: ConfigDict,
    store: Store,
    workdir: Path,
    spread: Parallel,
    teachers: Sequence[TrainedModel] | None,
) -> np.ndarray:
    """Returns the teachers' predictions for the training clips, saved in the workdir.

    Each teacher scores a clip as its own evaluation does, softened by `config.distill.temperature`.

    Args:
      config: the run's.
      store: its store.
      workdir: its folder; gets `teachers.npy`, and `teachers.json` with what it was made from.
      spread: the devices.
      teachers: from `read_teachers`; None reads the saved predictions.

    Returns:
      Probabilities, float32 `[training clips, classes]`.

    Raises:
      UserError: the saved predictions are damaged or belong to another run.
    """
    clips = store.indices("train")
    made_for = {
        "temperature": float(config.distill.temperature),
        "label_names": list(store.label_names),
        "clips": fingerprint([store.clip_ids[clips].tolist(), store.hashes[clips].tolist()], 16),
        "teachers": list(config.distill.teachers),
    }
    if teachers is None:
        return _saved_targets(workdir, made_for)
    names = store.clip_ids[clips].tolist(), store.hashes[clips].tolist()
    seen = np.stack([teacher.trained_on.has_seen(*names) for teacher in teachers])
    scores = np.stack([_scores(teacher, store, clips, spread) for teacher in teachers])
    softer = softened(scores, config.distill.temperature, store.task)
    targets = cross_fitted(softer, seen).astype(np.float32)
    by_all = int(seen.all(axis=0).sum())
    counts = {"clips_taught_by_others": len(clips) - by_all, "clips_taught_by_all": by_all}
    if jax.process_index() == 0:
        buffer = io.BytesIO()
        np.save(buffer, targets)
        with replacing(workdir / TARGETS) as temporary:
            temporary.write_bytes(buffer.getvalue())
        notes = made_for | {"steps": [teacher.step for teacher in teachers]} | counts
        write_json(workdir / NOTES, notes | {"sha256": sha256(workdir / TARGETS)})
        print(
            f"{workdir}: {len(clips) - by_all} of {len(clips)} training clips are taught by "
            f"teachers that did not train on them, {by_all} by all {len(teachers)}",
            flush=True,
        )
    if by_all:
        logging.warning(
            "config.distill: every teacher trained, or may have trained, on %d of the %d training "
            "clips, so their predictions are little more than the labels. Teachers of different "
            "folds (musicgenre ablate --folds=5) leave none",
            by_all,
            len(clips),
        )
    _warn_of_leak(teachers, store)
    return targets


def softened(scores: np.ndarray, temperature: float, task: str) -> np.ndarray:
    """Returns the probabilities that logits divided by `temperature` would give, float64.

    Args:
      scores: probabilities, `[..., classes]`.
      temperature: above 1 flattens them, below 1 sharpens them.
      task: "single_label" or "multi_label".
    """
    scores = np.asarray(scores, np.float64)
    if temperature == 1:
        return scores
    # The largest of each row (each tag) is scaled to 1, so that not all powers underflow.
    if task == "single_label":
        powers = (scores / scores.max(axis=-1, keepdims=True)) ** (1.0 / temperature)
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
    others = 1.0 - scores
    top = np.maximum(scores, others)
    powers = (scores / top) ** (1.0 / temperature)
    return np.asarray(powers / (powers + (others / top) ** (1.0 / temperature)))


def cross_fitted(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Returns each clip's mean over the teachers that did not train on it, or over all if all did.

    `scores` are `[teachers, clips, classes]`, `seen` is bool `[teachers, clips]`, and the result
    `[clips, classes]`.
    """
    chosen = (~seen | seen.all(axis=0)).astype(scores.dtype)
    return np.asarray(np.einsum("tc,tck->ck", chosen / chosen.sum(axis=0), scores))


def _check_fits(source: str, teacher: TrainedModel, store: Store) -> None:
    """Raises UserError if a teacher was trained on other features, clip lengths or labels."""
    name = f"config.distill.teachers: {source!r}"
    there, here = dataclasses.asdict(teacher.features), dataclasses.asdict(store.features)
    if changed := differences(there, here):
        raise UserError(
            f"{name} was trained on other features (there -> here): {'; '.join(changed)}. "
            "Choose another teacher."
        )
    for field, its, ours in (
        ("frames per clip", teacher.layout.frames, store.layout.frames),
        ("task", teacher.task, store.task),
        ("labels, in their order", ", ".join(teacher.label_names), ", ".join(store.label_names)),
    ):
        if its != ours:
            raise UserError(
                f"{name} has other {field} (there -> here): {its} -> {ours}. "
                "Choose another teacher."
            )


def _scores(teacher: TrainedModel, store: Store, clips: np.ndarray, spread: Parallel) -> np.ndarray:
    """Returns a teacher's predictions, as its evaluation does, float64 `[clips, classes]`."""
    data = teacher.config.data
    step = make_score_step(teacher.module, teacher.task, teacher.temperature)
    return score_clips(
        spread.score_step(step),
        spread.place_state(teacher.model),
        store,
        clips,
        batch_size=spread.round_up(int(teacher.config.batch_size)),
        crop_frames=int(data.crop_frames),
        chunks=int(data.eval_chunks),
    )


def _saved_targets(workdir: Path, made_for: Mapping[str, Any]) -> np.ndarray:
    """Returns the targets saved in a workdir. Raises UserError if they are not this run's."""
    notes = read_json(workdir / NOTES, "list of teachers, which this run has learnt from")
    again = "Put back what was there, or choose another --workdir."
    if changed := [name for name, value in made_for.items() if notes.get(name) != value]:
        raise UserError(f"{workdir / NOTES}: its {changed[0]} is not that of this run. {again}")
    path = workdir / TARGETS
    try:
        fits = notes["sha256"] == sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {again}") from None
    if not fits:
        raise UserError(f"{path}: not the teachers' predictions (SHA-256). {again}")
    targets: np.ndarray = np.load(path, allow_pickle=False)
    return targets


def _warn_of_leak(teachers: Sequence[TrainedModel], store: Store) -> None:
    """Warns of teachers that trained on clips that this run is evaluated on."""
    records = [teacher.trained_on for teacher in teachers]
    for split in [name for name in ("valid", "test") if name in store.splits]:
        clips = store.indices(split)
        names = store.clip_ids[clips].tolist(), store.hashes[clips].tolist()
        known = [record.has_seen(*names) for record in records if not record.unknown]
        if count := int(np.any(known, axis=0).sum()) if known else 0:
            logging.warning(
                "config.distill: teachers were trained on %d of the %d clips of the %s split, on "
                "which this run will look better than it is; its evaluation lists them",
                count,
                len(clips),
                split,
            )
    if unknown := [record.unknown for record in records if record.unknown]:
        logging.warning(
            "config.distill: training clips unknown: %s; no audit can say that nothing leaks",
            unknown[0],
        )
