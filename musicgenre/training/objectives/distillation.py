"""Distillation: teachers' predictions replace a fraction of the label target.

After Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), with cross-fitting: a clip's teachers are
the models that did not train on it, since the prediction for a memorised clip is little more than
its label.
"""

import dataclasses
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
from musicgenre.training.run import Run
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
    name = "config.distill.teachers"
    if store.task == "regression":
        raise UserError(f"{name}: a regression has no probabilities to learn from. Leave it empty.")
    if config.loss.name == "mse":
        raise UserError(f"{name} needs the cross entropy: leave config.loss.name empty.")
    here, teachers = _described(store), []
    for source in config.distill.teachers:
        teachers.append(load_model(source, field=name))
        if changed := differences(_described(teachers[-1]), here):
            raise UserError(
                f"{name}: {source!r} does not fit the store (there -> here): "
                f"{'; '.join(changed)}. Choose another teacher."
            )
    return teachers


def _described(it: TrainedModel | Store) -> dict[str, Any]:
    features, labels = dataclasses.asdict(it.features), ", ".join(it.label_names)
    return {"features": features, "frames": it.layout.frames, "task": it.task, "labels": labels}


def soft_targets(run: Run, teachers: Sequence[TrainedModel] | None) -> np.ndarray:
    """Returns the teachers' predictions for the training clips, float32 `[clips, classes]`.

    Each teacher scores a clip as its own evaluation does, softened by `config.distill.temperature`.
    The run's folder gets them as `teachers.npy`, and `teachers.json` with what they were made from.
    Where `teachers`, from `read_teachers`, is None, they are read from there.

    Raises:
      UserError: the saved predictions are damaged or belong to another run.
    """
    store, clips, settings = run.store, run.clips, run.config.distill
    names = store.clip_ids[clips].tolist(), store.hashes[clips].tolist()
    notes = {
        "temperature": float(settings.temperature),
        "label_names": list(store.label_names),
        "clips": fingerprint(list(names), 16),
        "teachers": list(settings.teachers),
    }
    if teachers is None:
        return _saved_targets(run.workdir, notes)
    seen = np.stack([teacher.trained_on.has_seen(*names) for teacher in teachers])
    scores = []
    for teacher in teachers:
        step = make_score_step(teacher.module, teacher.task, teacher.temperature)
        compiled, model = run.spread.score_step(step), run.spread.place_state(teacher.model)
        scores.append(run.scores(compiled, model, clips, teacher.config))
    softer = softened(np.stack(scores), settings.temperature, store.task)
    targets = cross_fitted(softer, seen).astype(np.float32)
    by_all = int(seen.all(axis=0).sum())
    by_others = len(clips) - by_all
    if jax.process_index() == 0:
        with replacing(run.workdir / TARGETS) as temporary, temporary.open("wb") as file:
            np.save(file, targets)
        notes |= {"steps": [teacher.step for teacher in teachers]}
        notes |= {"clips_taught_by_others": by_others, "clips_taught_by_all": by_all}
        write_json(run.workdir / NOTES, notes | {"sha256": sha256(run.workdir / TARGETS)})
        print(
            f"{run.workdir}: {by_others} of {len(clips)} training clips are taught by teachers "
            f"that did not train on them, {by_all} by all {len(teachers)}",
            flush=True,
        )
    if by_all:
        logging.warning(
            "config.distill: every teacher trained, or may have trained, on %d of the %d training "
            "clips, so their predictions are little more than the labels. Teachers of different "
            "folds (musicgenre ablate --folds=5) leave none",
            *(by_all, len(clips)),
        )
    _warn_of_leak(teachers, store)
    return targets


def softened(scores: np.ndarray, temperature: float, task: str) -> np.ndarray:
    """Returns the probabilities that logits divided by `temperature` would give, float64.

    `scores` are probabilities `[..., classes]`; `task` is "single_label" or "multi_label".
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


def _saved_targets(workdir: Path, made_for: Mapping[str, Any]) -> np.ndarray:
    """Returns the targets saved in a workdir. Raises UserError if they are not this run's."""
    notes = read_json(workdir / NOTES, "list of teachers, which this run has learnt from")
    again = "Put back what was there, or choose another --workdir."
    if changed := [name for name, value in made_for.items() if notes.get(name) != value]:
        raise UserError(f"{workdir / NOTES}: its {changed[0]} is not that of this run. {again}")
    path = workdir / TARGETS
    if not path.is_file() or notes["sha256"] != sha256(path):
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
                *(count, len(clips), split),
            )
    if unknown := [record.unknown for record in records if record.unknown]:
        logging.warning(
            "config.distill: training clips unknown: %s; no audit can say that nothing leaks",
            unknown[0],
        )
