"""A trained model on a split of any compatible store: scores, audit, report."""

import dataclasses
import importlib.metadata
import math
import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

from musicgenre.config import differences, to_plain
from musicgenre.datasets.arrays import load_arrays
from musicgenre.errors import UserError
from musicgenre.evaluation.audit import AuditResult, audit
from musicgenre.evaluation.report import Evaluation
from musicgenre.files import read_json
from musicgenre.models.apply import normalise
from musicgenre.runs.model import TrainedModel
from musicgenre.runs.provenance import clips_of, fingerprints
from musicgenre.store.loader import eval_batches
from musicgenre.store.prepare import prepare_store
from musicgenre.store.store import Store
from musicgenre.training.parallel import Parallel
from musicgenre.training.telemetry import read_rows


def evaluate_model(
    model: TrainedModel,
    store: Store,
    split: str,
    *,
    command: str = "",
    compare_spectrograms: bool = True,
) -> Evaluation:
    """Scores every clip of a split once and gathers what the report needs.

    Args:
      model: a trained model.
      store: a store made with the model's front end and clip length.
      split: "train", "valid" or "test".
      command: what was typed, for the report.
      compare_spectrograms: look for near-identical spectrograms between the split and the training clips.

    Raises:
      UserError: the store does not fit the model (features, length, task or labels), or the split is empty.
    """
    _check_fits(model, store)
    indices = store.indices(split)
    config = model.config
    windows = _score_windows(model, store, indices)
    targets = _targets(model, store, indices)
    metric, value = model.measure
    rows = [
        row
        for row in read_rows(model.workdir)
        if row["step"] <= model.step or model.which != "last"
    ]
    selected = (
        f"validation {metric} ({value:.4f})"
        if model.which == "best" and value is not None
        else "nothing"
    )
    notes = []
    # A bundle's own splits are not known; a store's may be others.
    own = not model.workdir.is_file()
    if split == "train" and own:
        notes.append(
            "These clips were trained on: this says how well they were learnt, not how well others will be recognised."
        )
    if split == "valid" and model.which == "best":
        notes.append(
            f"The checkpoint {'was' if own else 'may have been'} chosen on this very split, so its measures "
            f"{'are' if own else 'may be'} a little too good."
        )
    return Evaluation(
        title=f"{model.workdir.name}: {config.model.name} on {store.dataset['name']}",
        dataset=store.dataset["name"],
        protocol=store.dataset["protocol"],
        split=split,
        task=model.task,
        label_names=model.label_names,
        clip_ids=store.clip_ids[indices].tolist(),
        paths=store.paths[indices].tolist(),
        groups=[store.groups[i] for i in indices],
        scores=windows.mean(axis=1),
        targets=targets,
        curves=rows,
        config=to_plain(config),
        audit=_audit(model, store, indices, compare_spectrograms)
        if split != "train" or not own
        else None,
        skipped=store.skipped,
        synthetic=bool(store.dataset["synthetic"] or model.dataset["synthetic"]),
        command=command,
        checkpoint={"step": model.step, "which": model.which, "selected_on": selected},
        versions=versions(),
        notes=notes,
        group_name=store.group_name,
        windows=windows,
        temperature=model.temperature,
    )


def store_of_arrays(
    model: TrainedModel, file: str | os.PathLike[str], split: str, folder: Path
) -> Store:
    """Makes a store of one file of spectrograms, as a split of its own.

    Args:
      model: the model that is to be evaluated on it; gives the front end and the clip length.
      file: `.npz` or `.npy`, see `musicgenre.datasets.arrays.load_arrays`.
      split: what the file is, such as "test".
      folder: where the store is written.

    Raises:
      UserError: the file cannot be used.
    """
    path = Path(file)
    layout = str(model.config.data.array_layout)
    dataset = load_arrays(path.parent, {split: path.name}, layout)
    prepare_store(
        dataset,
        model.features,
        model.layout,
        folder,
        workers=1,
        array_layout=layout,
        progress=False,
    )
    return Store.open(folder)


def temperature_source(
    asked: str,
    evaluation: Evaluation,
    model: TrainedModel,
    store: Store,
    folder: Path,
    *,
    alone: bool = False,
) -> Evaluation | float | None:
    """Returns what `musicgenre.evaluation.report.measure` takes a temperature from; None for tags and regressions.

    Args:
      asked: a split, a file of spectrograms (`.npz` or `.npy`), or the temperature itself.
      evaluation: what is evaluated.
      model: its model.
      store: its store.
      folder: where the store of a file is written.
      alone: the store holds the evaluated split alone; others are those of the store that the model was trained on.

    Raises:
      UserError: it is none of these, or cannot be used.
    """
    fitted = asked in ("train", "valid", "test") or Path(asked).suffix in (".npz", ".npy")
    try:
        temperature = 1.0 if fitted else float(asked)
    except ValueError:
        temperature = math.nan
    if not 0 < temperature < math.inf:
        raise UserError(
            f"--temperature={asked}: must be a split, a file named .npz or .npy, or a number above 0."
        )
    if evaluation.task != "single_label":
        return None
    if not fitted:
        return temperature
    if asked == evaluation.split:
        return evaluation
    if asked in ("train", "valid", "test"):
        other = Store.open(training_store(model.workdir)) if alone else store
        return evaluate_model(model, other, asked, compare_spectrograms=False)
    return evaluate_model(
        model, store_of_arrays(model, asked, "valid", folder), "valid", compare_spectrograms=False
    )


def training_store(workdir: str | os.PathLike[str]) -> Path:
    """Returns the store that a run was trained on, wherever the command is run from.

    Raises:
      UserError: the run does not say, or a bundle is asked, which never does.
    """
    if (path := Path(workdir)).is_file():
        raise UserError(
            f"{path}: a bundle does not say which store it was trained on. Name the one to use: --store=..."
        )
    return Path(read_json(Path(workdir) / "train_clips.json", "list of training clips")["store"])


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    packages = ("musicgenre", "jax", "jaxlib", "flax", "optax", "numpy", "librosa")
    return {
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _score_windows(model: TrainedModel, store: Store, indices: np.ndarray) -> np.ndarray:
    """Returns what the model says of each window that an evaluation takes of each clip, float64 `[clips, windows, classes]`."""
    spread = Parallel.create()

    def step(saved: Any, x: jax.Array) -> jax.Array:
        return model.probabilities(
            model.module.apply(saved["variables"], normalise(x, saved["norm"]), train=False)
        )

    score, placed, data = (
        spread.score_step(step),
        spread.place_state(model.model),
        model.config.data,
    )
    batches = eval_batches(
        store,
        indices,
        batch_size=spread.round_up(int(model.config.batch_size)),
        crop_frames=int(data.crop_frames),
        chunks=int(data.eval_chunks),
    )
    # A clip's windows follow each other; what fills up the last batch does not count.
    scores = np.concatenate([score(placed, batch["x"])[batch["mask"] > 0] for batch in batches])
    return scores.reshape(len(indices), -1, scores.shape[-1]).astype(np.float64)


def _check_fits(model: TrainedModel, store: Store) -> None:
    if store.features != model.features:
        lines = differences(dataclasses.asdict(store.features), dataclasses.asdict(model.features))
        raise UserError(
            f"{store.path}: its features are not those that the model was trained on (store -> model): {'; '.join(lines)}. "
            "Prepare the clips with the model's front end."
        )
    if store.layout.frames != model.layout.frames:
        raise UserError(
            f"{store.path}: {store.layout.frames} frames per clip where the model was trained on {model.layout.frames}."
        )
    if store.task != model.task:
        raise UserError(f"{store.path}: its task is {store.task}, the model's {model.task}.")
    if unknown := [name for name in store.label_names if name not in model.label_names]:
        raise UserError(
            f"{store.path}: the model does not know the label {unknown[0]!r}; it knows {', '.join(model.label_names)}."
        )


def _targets(model: TrainedModel, store: Store, indices: np.ndarray) -> np.ndarray:
    """Returns the truth in the order of the model's labels, which may be more than the store's."""
    columns = np.array([model.label_names.index(name) for name in store.label_names])
    targets = store.targets(indices)
    if targets.ndim == 1:
        return columns[targets]
    arranged = np.zeros((len(targets), len(model.label_names)), targets.dtype)
    arranged[:, columns] = targets
    return arranged


def _audit(
    model: TrainedModel, store: Store, indices: np.ndarray, compare_spectrograms: bool
) -> AuditResult:
    """Compares the clips with those that this very model was trained on, wherever they are now, as far as they are known."""
    trained, evaluated = model.trained_on, clips_of(store, indices)
    if compare_spectrograms:
        trained = trained.with_fingerprints()
        if trained.fingerprints is not None:
            prints = fingerprints(store, indices)
            evaluated = dataclasses.replace(evaluated, fingerprints=prints)
    return audit(
        evaluated.audit_side(),
        trained.audit_side(),
        group_name=store.group_name,
        unknown=trained.unknown,
    )
