"""A trained model on a split of any compatible store: scores, audit, report."""

import dataclasses
import importlib.metadata
import math
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from musicgenre import __version__
from musicgenre.config import differences, to_plain
from musicgenre.datasets.arrays import load_arrays
from musicgenre.datasets.base import SPLITS
from musicgenre.errors import UserError
from musicgenre.evaluation import report as reports
from musicgenre.evaluation.audit import AuditResult, audit
from musicgenre.evaluation.comparison import ensemble, summarise_seeds
from musicgenre.evaluation.report import Evaluation, measure, write_report
from musicgenre.files import read_json, write_json
from musicgenre.models.apply import normalise
from musicgenre.runs.model import TrainedModel, load_model
from musicgenre.runs.provenance import clips_of, fingerprints
from musicgenre.store.loader import eval_batches
from musicgenre.store.prepare import prepare_store
from musicgenre.store.store import Store
from musicgenre.studies.retrieval import neighbour_report, neighbour_table
from musicgenre.training.parallel import Parallel
from musicgenre.training.telemetry import read_rows

PathLike = str | os.PathLike[str]


class EvaluatedRuns(NamedTuple):
    """The result of `evaluate_runs`.

    Attributes:
      lines: what a command prints: measures, audits, paths of the reports.
      report: the path of the report, over all runs if there are several.
      leaks: an audit found leaks, or the training clips of a model are unknown.
    """

    lines: list[str]
    report: Path
    leaks: bool


def evaluate_runs(
    workdirs: Sequence[PathLike],
    *,
    split: str = "test",
    store: PathLike = "",
    arrays: PathLike = "",
    checkpoint: str = "last",
    out: PathLike = "",
    temperature: str = "",
    neighbours: Sequence[int] = (),
    command: str = "",
) -> EvaluatedRuns:
    """Evaluates trained models on a split and writes their reports.

    Several are seeds of one experiment: `<out>/run<i>` has the report of each, `<out>/ensemble`
    that of the mean of their scores, and `<out>` the summary.

    Args:
      workdirs: runs, bundles or names of packaged models.
      split: "train", "valid" or "test".
      store: the store to evaluate on; empty for the one that the model was trained on.
      arrays: a file of spectrograms to evaluate on instead, all of it as the split.
      checkpoint: "last", "best" or a step.
      out: folder of the report; empty for `<workdir>/evaluation-<split>`.
      temperature: for single labels: a temperature, or what to fit it on, a split or a file of
        spectrograms (`.npz`, `.npy`); empty for none.
      neighbours: numbers of nearest neighbours for `musicgenre.studies.retrieval.neighbour_report`.
      command: the command line, for the reports.

    Raises:
      UserError: a model, its clips or the temperature cannot be used, or `out` is needed.
    """
    several = len(workdirs) > 1
    if several and not out:
        raise UserError("several --workdir need a folder for their common report: --out=...")
    lines: list[str] = []
    metrics, evaluations, calibrations = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        for number, workdir in enumerate(map(str, workdirs)):
            model = load_model(workdir, checkpoint)
            if model.workdir.is_file() and not out:
                raise UserError(f"{workdir}: the report on a bundle needs a folder: --out=...")
            folder = Path(out or Path(workdir) / f"evaluation-{split}")
            folder = folder / f"run{number}" if several else folder
            if arrays:
                clips = store_of_arrays(model, arrays, split, Path(scratch, f"clips{number}"))
            else:
                clips = Store.open(Path(store) if store else training_store(model.workdir))
            evaluation = evaluate_model(model, clips, split, command=command)
            source = None
            if temperature:
                files, asked = Path(scratch, f"temperature{number}"), (temperature, evaluation)
                source = temperature_source(*asked, model, clips, files, alone=bool(arrays))
                if source is None:
                    lines.append(f"--temperature has no effect: the task is {evaluation.task}.")
            metrics.append(measure(evaluation, calibration=source))
            report = write_report(folder, evaluation, metrics=metrics[-1])
            if neighbours:
                found = neighbour_report(model, clips, split, ks=neighbours)
                write_json(folder / "neighbours.json", found)
                lines.append(neighbour_table(found))
            lines += _lines(workdir, evaluation, metrics[-1])
            lines += evaluation.audit.summary() if evaluation.audit else []
            evaluations.append(evaluation)
            calibrations.append(source)
    if several:
        runs = list(zip(map(str, workdirs), metrics, strict=True))
        report, more = _together(Path(out), runs, evaluations, calibrations)
        lines += more
    leaks = any(one.audit is not None and not one.audit.clean for one in evaluations)
    return EvaluatedRuns([*lines, f"report: {report}"], report, leaks)


def _together(
    out: Path,
    runs: Sequence[tuple[str, dict[str, Any]]],
    evaluations: Sequence[Evaluation],
    calibrations: Sequence[Evaluation | float | None],
) -> tuple[Path, list[str]]:
    """Writes the reports of the ensemble and over all runs; returns the latter, and the lines."""
    first, names = evaluations[0], [name for name, _ in runs]
    together = ensemble(evaluations, names)
    fitted = [source for source in calibrations if isinstance(source, Evaluation)]
    metrics = measure(together, calibration=ensemble(fitted, names) if fitted else calibrations[0])
    of_ensemble = write_report(out / "ensemble", together, metrics=metrics)
    title = f"{len(runs)} runs on {first.dataset}, {first.protocol}, {first.split}"
    report = summarise_seeds(out, runs, title=title, evaluations=evaluations, ensemble=metrics)
    return report, [
        *_lines(f"ensemble of {len(runs)} (mean of their scores)", together, metrics),
        (out / "summary.json").read_text(encoding="utf-8"),
        f"report of the ensemble: {of_ensemble}",
    ]


def _lines(name: str, evaluation: Evaluation, metrics: dict[str, Any]) -> list[str]:
    """Returns the measures of an evaluation in one or two lines."""
    synthetic = "SYNTHETIC audio, " if evaluation.synthetic else ""
    first = f"{synthetic}{name}, {evaluation.split}: {reports.headline(metrics)}"
    return list(filter(None, [first, reports.calibration_line(metrics)]))


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
      command: the command line, for the report.
      compare_spectrograms: the audit also searches for near-identical spectrograms.

    Raises:
      UserError: the store does not fit the model (features, length, task or labels), or the split
        is empty.
    """
    _check_fits(model, store)
    indices, config = store.indices(split), model.config
    windows = _score_windows(model, store, indices)
    metric, value = model.measure
    best = model.which == "best"
    selected = f"validation {metric} ({value:.4f})" if best and value is not None else "nothing"
    # The splits of a bundle's training are not known; those of the store may be others.
    own = not model.workdir.is_file()
    notes, result = [], None
    if split == "train" and own:
        notes.append(
            "Training clips: the measures show the fit, not how well the model generalises."
        )
    else:
        result = _audit(model, store, indices, compare_spectrograms)
    if split == "valid" and best:
        was, are = ("was", "are") if own else ("may have been", "may be")
        notes.append(
            f"The checkpoint {was} chosen on this very split, so its measures {are} a little too "
            "good."
        )
    curves = read_rows(model.workdir)
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
        targets=_targets(model, store, indices),
        curves=[row for row in curves if row["step"] <= model.step or model.which != "last"],
        config=to_plain(config),
        audit=result,
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


def store_of_arrays(model: TrainedModel, file: PathLike, split: str, folder: Path) -> Store:
    """Writes a store of one file of spectrograms for a model to `folder`, all of it as `split`.

    The file is `.npz` or `.npy`, see `musicgenre.datasets.arrays.load_arrays`.

    Raises:
      UserError: the file cannot be used.
    """
    path, layout = Path(file), str(model.config.data.array_layout)
    dataset = load_arrays(path.parent, {split: path.name}, layout)
    how: dict[str, Any] = {"workers": 1, "array_layout": layout, "progress": False}
    prepare_store(dataset, model.features, model.layout, folder, **how)
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
    """Returns the `calibration` for `measure` that --temperature names; None without single labels.

    The evaluation is that of the model on the store. The store of a file is written to `folder`.
    With `alone`, the store has no split but the evaluated one, and others are those of the training
    store.

    Raises:
      UserError: it is none of these, or cannot be used.
    """
    split = asked if asked in SPLITS else "valid"
    if asked not in SPLITS and Path(asked).suffix not in (".npz", ".npy"):
        try:
            temperature = float(asked)
        except ValueError:
            temperature = math.nan
        if not 0 < temperature < math.inf:
            raise UserError(f"--temperature={asked}: must be a split, a .npz or .npy file, or > 0.")
        return temperature if evaluation.task == "single_label" else None
    if evaluation.task != "single_label":
        return None
    if asked == evaluation.split:
        return evaluation
    if asked not in SPLITS:
        store = store_of_arrays(model, asked, split, folder)
    elif alone:
        store = Store.open(training_store(model.workdir))
    return evaluate_model(model, store, split, compare_spectrograms=False)


def training_store(workdir: PathLike) -> Path:
    """Returns the path of the store that a run was trained on.

    Raises:
      UserError: the run has no record of it, as bundles never have.
    """
    if (path := Path(workdir)).is_file():
        raise UserError(f"{path}: a bundle does not name its training store. Give --store=...")
    return Path(read_json(path / "train_clips.json", "list of training clips")["store"])


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "librosa")
    return {
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "musicgenre": __version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _score_windows(model: TrainedModel, store: Store, indices: np.ndarray) -> np.ndarray:
    """Returns the predictions for the windows of each clip, float64 `[clips, windows, classes]`."""
    spread, data = Parallel.create(), model.config.data

    def step(saved: Any, x: jax.Array) -> jax.Array:
        inputs = normalise(x, saved["norm"])
        logits: Any = model.module.apply(saved["variables"], inputs, train=False)
        return model.probabilities(logits)

    score, placed = spread.score_step(step), spread.place_state(model.model)
    size = spread.round_up(int(model.config.batch_size))
    crops = {"crop_frames": int(data.crop_frames), "chunks": int(data.eval_chunks)}
    batches = eval_batches(store, indices, batch_size=size, **crops)
    # A clip's windows follow each other; the padding of the last batch is left out.
    scores = np.concatenate([score(placed, batch["x"])[batch["mask"] > 0] for batch in batches])
    return scores.reshape(len(indices), -1, scores.shape[-1]).astype(np.float64)


def _check_fits(model: TrainedModel, store: Store) -> None:
    if store.features != model.features:
        lines = differences(dataclasses.asdict(store.features), dataclasses.asdict(model.features))
        raise UserError(
            f"{store.path}: its features differ from those that the model was trained on "
            f"(store -> model): {'; '.join(lines)}. Prepare the clips with the model's front end."
        )
    for what, has, wanted in (
        ("frames per clip", store.layout.frames, model.layout.frames),
        ("task", store.task, model.task),
    ):
        if has != wanted:
            raise UserError(f"{store.path}: its {what}: {has}; the model's: {wanted}.")
    if unknown := [name for name in store.label_names if name not in model.label_names]:
        known = ", ".join(model.label_names)
        raise UserError(
            f"{store.path}: the model does not know the label {unknown[0]!r}; it knows {known}."
        )


def _targets(model: TrainedModel, store: Store, indices: np.ndarray) -> np.ndarray:
    """Returns the truth in the order of the model's labels; the store may have fewer."""
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
    """Compares the clips with those that this model was trained on, as far as they are known."""
    trained, evaluated = model.trained_on, clips_of(store, indices)
    if compare_spectrograms:
        trained = trained.with_fingerprints()
        if trained.fingerprints is not None:
            prints = fingerprints(store, indices)
            evaluated = dataclasses.replace(evaluated, fingerprints=prints)
    sides, group_name = (evaluated.audit_side(), trained.audit_side()), store.group_name
    return audit(*sides, group_name=group_name, unknown=trained.unknown)
