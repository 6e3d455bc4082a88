"""Distillation: a run that learns what other models say of its training clips, beside their labels.

After Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), with cross-fitting: a clip is taught by the models that did not train on
it. What a network says of a clip that it has learnt by heart is little more than the label.
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
    """Returns whether a run of this config has teachers that count."""
    return bool(config.distill.teachers) and config.distill.weight > 0


def read_teachers(config: ConfigDict, store: Store) -> list[TrainedModel]:
    """Reads the teachers of a run, of a workdir the last checkpoint.

    Raises:
      UserError: one is missing or does not fit the store, or the task or the loss cannot be taught.
    """
    if store.task == "regression":
        raise UserError(
            "config.distill.teachers: a regression has no probabilities that could be taught. Leave it empty."
        )
    if config.loss.name == "mse":
        raise UserError(
            "config.distill.teachers goes with the cross entropy: leave config.loss.name empty."
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
    """Returns what the teachers say of the training clips, and writes it into the workdir, or reads it from there.

    Each teacher scores a clip as its own evaluation does, softened by `config.distill.temperature`.

    Args:
      config: the run's.
      store: its store.
      workdir: its folder; gets `teachers.npy`, and `teachers.json` with what it was made from.
      spread: the devices.
      teachers: from `read_teachers`; None reads what was written.

    Returns:
      Probabilities, float32 `[clips of the train split, classes]`.

    Raises:
      UserError: what is in the workdir is damaged or was made for something else.
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
    said = np.stack([_scores(teacher, store, clips, spread) for teacher in teachers])
    softer = softened(said, config.distill.temperature, store.task)
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
            f"{workdir}: {len(clips) - by_all} of {len(clips)} training clips are taught by teachers that did not train on them, "
            f"{by_all} by all {len(teachers)}",
            flush=True,
        )
    if by_all:
        logging.warning(
            "config.distill: every teacher trained, or may have trained, on %d of the %d training clips, of which they then say "
            "little more than the labels. Teachers of different folds (musicgenre ablate --folds=5) leave none",
            by_all,
            len(clips),
        )
    _warn_of_leak(teachers, store)
    return targets


def softened(scores: np.ndarray, temperature: float, task: str) -> np.ndarray:
    """Returns probabilities as if the logits behind them had been divided by `temperature`, float64.

    Args:
      scores: probabilities, `[..., classes]`.
      temperature: above 1 evens them out, below 1 sharpens them.
      task: "single_label" or "multi_label".
    """
    scores = np.asarray(scores, np.float64)
    if temperature == 1:
        return scores
    # Of each row (each tag) the largest is made 1, so that no power of all of them is 0.
    others = 1.0 - scores
    top = (
        scores.max(axis=-1, keepdims=True) if task == "single_label" else np.maximum(scores, others)
    )
    powers = (scores / top) ** (1.0 / temperature)
    rest = (
        powers.sum(axis=-1, keepdims=True)
        if task == "single_label"
        else powers + (others / top) ** (1.0 / temperature)
    )
    softer: np.ndarray = powers / rest
    return softer


def cross_fitted(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Returns for each clip the mean over the teachers that did not train on it, or over all where every one did.

    Args:
      scores: `[teachers, clips, classes]`.
      seen: which of them trained on which clip, bool `[teachers, clips]`.

    Returns:
      `[clips, classes]`.
    """
    chosen = (~seen | seen.all(axis=0)).astype(scores.dtype)
    mean: np.ndarray = np.einsum("tc,tck->ck", chosen / chosen.sum(axis=0), scores)
    return mean


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
                f"{name} has other {field} (there -> here): {its} -> {ours}. Choose another teacher."
            )


def _scores(teacher: TrainedModel, store: Store, clips: np.ndarray, spread: Parallel) -> np.ndarray:
    """Returns what a teacher says of clips, as its evaluation does, float64 `[clips, classes]`."""
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
    """Returns the targets in a workdir, which are to have been made for this run."""
    notes = read_json(workdir / NOTES, "list of teachers, which this run has learnt from")
    again = "Put back what was there, or choose another --workdir."
    if changed := [name for name, value in made_for.items() if notes.get(name) != value]:
        raise UserError(f"{workdir / NOTES}: its {changed[0]} is not that of this run. {again}")
    try:
        fits = notes["sha256"] == sha256(workdir / TARGETS)
    except OSError as error:
        raise UserError(
            f"{workdir / TARGETS}: cannot be read ({error.strerror}). {again}"
        ) from None
    if not fits:
        raise UserError(f"{workdir / TARGETS}: not what the teachers said (SHA-256). {again}")
    targets: np.ndarray = np.load(workdir / TARGETS, allow_pickle=False)
    return targets


def _warn_of_leak(teachers: Sequence[TrainedModel], store: Store) -> None:
    """Says how many clips that this run is measured on a teacher has learnt from."""
    for split in [name for name in ("valid", "test") if name in store.splits]:
        clips = store.indices(split)
        seen = [
            teacher.trained_on.has_seen(
                store.clip_ids[clips].tolist(), store.hashes[clips].tolist()
            )
            for teacher in teachers
        ]
        known = [
            row
            for row, teacher in zip(seen, teachers, strict=True)
            if not teacher.trained_on.unknown
        ]
        if count := int(np.any(known, axis=0).sum()) if known else 0:
            logging.warning(
                "config.distill: teachers were trained on %d of the %d clips of the %s split, on which this run will look better "
                "than it is; its evaluation lists them",
                count,
                len(clips),
                split,
            )
    if unknown := [
        teacher.trained_on.unknown for teacher in teachers if teacher.trained_on.unknown
    ]:
        logging.warning(
            "config.distill: training clips unknown: %s; no audit can say that nothing leaks",
            unknown[0],
        )
