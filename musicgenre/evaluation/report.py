"""The report of one evaluation: metrics.json, predictions.csv, figures and one report.html."""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure

from musicgenre.errors import UserError
from musicgenre.evaluation import metrics as scoring
from musicgenre.evaluation import plots, render
from musicgenre.evaluation.audit import AuditResult
from musicgenre.evaluation.calibration import cross_fitted, fit_temperature, risk_coverage, tempered
from musicgenre.evaluation.intervals import LEVEL, bootstrap, bootstrap_mean, wilson
from musicgenre.files import write_json, write_text

# What metrics.json has of an evaluation as it is.
_SAVED = (
    *("title", "dataset", "protocol", "split", "synthetic", "checkpoint", "skipped"),
    *("command", "versions", "config"),
)
_MISTAKES_SHOWN = 20
_MOST_ROC_CURVES = 10


class _Task(NamedTuple):
    """What depends on the task: its metrics and headline, and what it calls its labels."""

    metrics: Callable[..., dict[str, Any]]
    main: tuple[str, ...]
    bootstrapped: tuple[str, ...]
    one: str
    many: str


_AUCS, _ERRORS = ("macro_roc_auc", "macro_pr_auc"), ("r2", "mse")
_TASKS = {
    "single_label": _Task(scoring.single_label_metrics, ("accuracy",), _AUCS, "class", "classes"),
    "multi_label": _Task(scoring.multi_label_metrics, _AUCS, _AUCS, "tag", "tags"),
    "regression": _Task(scoring.regression_metrics, _ERRORS, _ERRORS, "output", "outputs"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Everything that a report contains. Arrays and lists over clips share one order.

    Attributes:
      protocol: how the split was made.
      task: "single_label", "multi_label" or "regression".
      label_names: `[classes]`, in the order of the scores.
      clip_ids: unique, `[clips]`.
      paths: the sound file or array of each clip, `[clips]`.
      groups: the artist or track (`group_name`) of each clip, `[clips]`; None if it is not known.
      scores: probabilities, or a regression's outputs, `[clips, classes]`.
      targets: class numbers `[clips]`, 0/1 tags or numbers `[clips, classes]`.
      curves: rows of the run's metrics.jsonl.
      audit: from `musicgenre.evaluation.audit.audit`, or None without an audit.
      skipped: clips that could not be used, dicts with `clip_id`, `path` and `reason`.
      synthetic: the audio is synthetic; the report warns at the top.
      checkpoint: `step`, `which` ("last" or "best") and `selected_on` (in words).
      windows: probabilities of each window (and each model of an ensemble), whose mean the scores
        are, `[clips, windows, classes]`; None if each clip has one, its scores.
      temperature: that the scores were made with, see `musicgenre.runs.model.TrainedModel`.
    """

    title: str
    dataset: str
    protocol: str
    split: str
    task: str
    label_names: Sequence[str]
    clip_ids: Sequence[str]
    paths: Sequence[str]
    groups: Sequence[str | None]
    scores: np.ndarray
    targets: np.ndarray
    curves: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    audit: AuditResult | None = None
    skipped: Sequence[Mapping[str, Any]] = ()
    synthetic: bool = False
    command: str = ""
    checkpoint: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    group_name: str = "artist"
    windows: np.ndarray | None = None
    temperature: float = 1.0


def measure(
    evaluation: Evaluation,
    *,
    calibration: Evaluation | float | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the metrics of an evaluation, with intervals.

    Args:
      evaluation: what was scored.
      calibration: of single labels: the same model's evaluation to fit a temperature on, which may
        be this one, or a temperature. None for neither.
      resamples: draws of the bootstrap.
      seed: of the bootstrap.

    Returns:
      The result of `single_label_metrics`, `multi_label_metrics` or `regression_metrics`, with
      `task` and `intervals`: `level`, `bootstrap_unit` (what was resampled, such as "artist";
      "clip" if no group is known), `bootstrap_units` (their number) and for each headline measure a
      dict with `bootstrap` and, for accuracy, `wilson`, each [low, high] or None. Each class or tag
      has `recall_wilson`, the interval of its recall. Single labels have `ece_by_chance`,
      `abstention` (see `musicgenre.evaluation.calibration.risk_coverage`) and, if it was given,
      `calibration`: `temperature`, `fitted_on` (in words), `shared` (clips of the fit among those
      evaluated here), `before` and `after` (`calibration_metrics` without and with it), and
      `cross_fitted`, the same measures where each fold of the groups has the temperature fitted on
      the others, with these `temperatures`; None unless it was fitted on the evaluated clips. All
      other measures are those of the probabilities without the temperature.

    Raises:
      UserError: fields that do not fit together, a clip id twice, or what the metrics raise.
    """
    _check(evaluation)
    n = len(evaluation.clip_ids)
    known = [group for group in evaluation.groups if group is not None]
    groups = evaluation.groups if known else None
    intervals: dict[str, Any] = {
        "level": LEVEL,
        "bootstrap_unit": evaluation.group_name if known else "clip",
        "bootstrap_units": len(set(known)) + n - len(known),
    }
    draws: dict[str, Any] = {"resamples": resamples, "seed": seed}
    scores, targets = np.asarray(evaluation.scores), np.asarray(evaluation.targets)
    metrics = label_metrics(evaluation)
    if evaluation.task == "regression":
        statistic = scoring.weighted_r2(scores, targets)
    else:
        statistic = scoring.weighted_macro_aucs(scores, _one_hot(evaluation))
        for row in metrics["per_class"]:
            hits, support = round((row["recall"] or 0) * row["support"]), row["support"]
            row["recall_wilson"] = list(wilson(hits, support)) if support else None
    if evaluation.task == "single_label":
        correct, confidence = scores.argmax(axis=1) == targets, scores.max(axis=1)
        over_clips = bootstrap_mean(correct, groups, **draws)
        intervals["accuracy"] = {
            "wilson": list(wilson(int(correct.sum()), n)),
            "bootstrap": over_clips and list(over_clips),
        }
        metrics["ece_by_chance"] = scoring.ece_by_chance(confidence)
        metrics["abstention"] = risk_coverage(confidence, correct)
        if calibration is not None:
            metrics["calibration"] = _calibrated(evaluation, calibration)
    both = bootstrap(statistic, n, groups, **draws)
    for name, interval in zip(_TASKS[evaluation.task].bootstrapped, both, strict=True):
        intervals[name] = {"bootstrap": interval and list(interval)}
    return {"task": evaluation.task, **metrics, "intervals": intervals}


def label_metrics(evaluation: Evaluation) -> dict[str, Any]:
    """Returns the metrics of an evaluation's task, without intervals; see `measure`."""
    scores, targets = np.asarray(evaluation.scores), np.asarray(evaluation.targets)
    return _TASKS[evaluation.task].metrics(scores, targets, evaluation.label_names)


def main_measures(task: str) -> tuple[str, ...]:
    """Returns the headline measures of a task, such as ("accuracy",)."""
    return _TASKS[task].main


def headline(metrics: Mapping[str, Any]) -> str:
    """Returns the main `metrics` in one line, with their intervals if there are any.

    For example, "accuracy 48.7 % (95 % Wilson 41.8-55.7, ...), 197 clips".
    """
    name = "regression" if "r2" in metrics else "multi_label"
    task = _TASKS["single_label" if "accuracy" in metrics else name]
    parts = []
    for name in task.main:
        shown = ", ".join(render.interval_texts(metrics, name))
        value = f"{render.measure_name(name)} {render.value_text(name, metrics[name])}"
        parts.append(f"{value} ({shown})" if shown else value)
    parts.append(f"{metrics['n']} clips")
    if task.many in metrics:
        parts.append(f"{metrics[task.many]} {task.many}")
    if metrics.get("undefined_count"):
        parts.append(f"{task.many} left out of the means: {metrics['undefined_count']}")
    return ", ".join(parts)


def calibration_line(metrics: Mapping[str, Any]) -> str:
    """Returns the effect of a temperature in one line, or "" for metrics without one."""
    if (found := metrics.get("calibration")) is None:
        return ""
    measured = {name: found[name] for name in ("before", "after", "cross_fitted") if found[name]}
    errors = ", ".join(
        f"{name.replace('_', '-')} {render.value_text('ece', of['ece'])}"
        for name, of in measured.items()
    )
    nll = ", ".join(f"{of['nll']:.3f}" for of in measured.values())
    fitted = f"temperature {found['temperature']:.3f}, {found['fitted_on']}"
    return f"{fitted}: calibration error {errors}; negative log likelihood {nll}"


def write_report(
    out_dir: str | os.PathLike[str],
    evaluation: Evaluation,
    *,
    metrics: Mapping[str, Any] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Path:
    """Writes `metrics.json`, `predictions.csv`, the figures (PNG) and `report.html`.

    Files in the folder are replaced one by one. `metrics` is the result of `measure`, which is
    called, with `resamples` and `seed`, if it is None.

    Returns:
      The path of `report.html`, which needs no other file.

    Raises:
      UserError: what `measure` raises, or the folder cannot be written.
    """
    out_dir, task = Path(out_dir), _TASKS[evaluation.task]
    metrics = measure(evaluation, resamples=resamples, seed=seed) if metrics is None else metrics
    notes = [*evaluation.notes, *_own_notes(evaluation, metrics)]
    saved = {name: getattr(evaluation, name) for name in _SAVED}
    saved |= {"headline": headline(metrics), "notes": notes, **metrics}
    saved["audit"] = evaluation.audit.to_dict() if evaluation.audit else None
    write_json(out_dir / "metrics.json", saved)
    write_text(out_dir / "predictions.csv", _predictions(evaluation))
    about = (evaluation.dataset, evaluation.protocol, evaluation.split, f"{metrics['n']} clips")
    where = " · ".join(("SYNTHETIC", *about) if evaluation.synthetic else about)
    figures = _figures(evaluation, metrics)
    for name, (heading, figure) in figures.items():
        plots.save(figure, out_dir / f"{name}.png", f"{heading} · {where}")
    page = render.rendered(
        "report.html.j2",
        evaluation=evaluation,
        metrics=metrics,
        notes=notes,
        headline=headline(metrics),
        figures={name: render.data_uri(out_dir / f"{name}.png") for name in figures},
        mistakes=_mistakes(evaluation),
        main=task.main,
        others=[name for name in render.MEASURES if name in metrics and name not in task.main],
        skipped_reasons=Counter(str(row["reason"]) for row in evaluation.skipped).most_common(),
        config=flatten_dict(evaluation.config, sep="."),
        what=(task.one, task.many),
    )
    write_text(out_dir / "report.html", page)
    return out_dir / "report.html"


def windows_of(evaluation: Evaluation) -> np.ndarray:
    """Returns the probabilities whose means are the scores, `[clips, windows, classes]`."""
    windows = evaluation.windows
    return np.asarray(evaluation.scores)[:, None] if windows is None else windows


def _check(evaluation: Evaluation) -> None:
    if evaluation.task not in _TASKS:
        raise UserError(f"task must be one of {', '.join(_TASKS)}, not {evaluation.task!r}.")
    clips = len(evaluation.clip_ids)
    for name in ("paths", "groups", "scores", "targets"):
        if len(getattr(evaluation, name)) != clips:
            raise UserError(f"{clips} clip ids but {len(getattr(evaluation, name))} {name}.")
    [(clip_id, most)] = Counter(evaluation.clip_ids).most_common(1) or [("", 0)]
    if most > 1:
        raise UserError(f"the clip id {clip_id!r} occurs more than once; ids must be unique.")


def _calibrated(evaluation: Evaluation, source: Evaluation | float) -> dict[str, Any]:
    """Returns the `calibration` of the metrics of a single-label evaluation."""
    windows, labels = windows_of(evaluation), np.asarray(evaluation.targets)
    folds, shared = None, 0
    if isinstance(source, Evaluation):
        # The scores already have the model's temperature: the reported one is the product of both.
        factor = fit_temperature(windows_of(source), np.asarray(source.targets))
        shared = len(set(source.clip_ids) & set(evaluation.clip_ids))
        fitted_on = f"fitted on {source.split} ({len(source.clip_ids)} clips of {source.dataset})"
        if source.split == "train":
            fitted_on += ", training clips, on which models are too confident"
        if shared == len(evaluation.clip_ids):
            folds = cross_fitted(windows, labels, evaluation.groups)
    else:
        factor, fitted_on = source / evaluation.temperature, "given"
    crossed = None
    if folds is not None:
        temperatures = [own * evaluation.temperature for own in folds[1]]
        crossed = scoring.calibration_metrics(folds[0], labels) | {"temperatures": temperatures}
    return {
        "temperature": factor * evaluation.temperature,
        "fitted_on": fitted_on,
        "shared": shared,
        "before": scoring.calibration_metrics(tempered(windows, 1), labels),
        "after": scoring.calibration_metrics(tempered(windows, factor), labels),
        "cross_fitted": crossed,
    }


def _one_hot(evaluation: Evaluation) -> np.ndarray:
    """Returns the truth as 0/1, `[clips, classes]`."""
    targets = np.asarray(evaluation.targets)
    return np.eye(len(evaluation.label_names), dtype=int)[targets] if targets.ndim == 1 else targets


def _predictions(evaluation: Evaluation) -> str:
    """Returns the text of predictions.csv, sorted by clip id."""
    names = np.array(evaluation.label_names, dtype=object)
    scores, targets = np.asarray(evaluation.scores, float), np.asarray(evaluation.targets)
    columns = [f"{what}_{name}" for what in ("truth", "predicted") for name in names]
    if evaluation.task == "regression":
        both = np.hstack([targets, scores]).astype(float)
        rows: list[list[Any]] = [[f"{value:.6g}" for value in row] for row in both]
    else:
        columns = ["truth", "predicted", "correct", *(f"p_{name}" for name in names)]
        truth, chosen = _one_hot(evaluation) == 1, scores >= 0.5
        if evaluation.task == "single_label":
            chosen = np.eye(len(names), dtype=bool)[scores.argmax(axis=1)]
        rows = [
            ["|".join(names[true]), "|".join(names[own]), int((true == own).all())]
            + [f"{score:.6f}" for score in values]
            for true, own, values in zip(truth, chosen, scores, strict=True)
        ]
    by_id = sorted(zip(evaluation.clip_ids, rows, strict=True))
    return render.csv_text(
        ["clip_id", "split", *columns], [[clip, evaluation.split, *row] for clip, row in by_id]
    )


def _mistakes(evaluation: Evaluation) -> tuple[list[str], list[list[Any]]]:
    """Returns the table of the most confident mistakes: wrong labels, or tags with large errors."""
    if evaluation.task == "regression":
        return [], []
    scores, truth = np.asarray(evaluation.scores, float), _one_hot(evaluation)
    names, ids, paths = evaluation.label_names, evaluation.clip_ids, evaluation.paths
    if evaluation.task == "single_label":
        columns = ["clip", "truth", "predicted", "probability", "of the truth", "file"]
        predicted, labels = scores.argmax(axis=1), truth.argmax(axis=1)
        order = np.argsort(-scores.max(axis=1), kind="stable")
        worst = [i for i in order if predicted[i] != labels[i]][:_MISTAKES_SHOWN]
        return columns, [
            [ids[i], names[label], names[guess], scores[i, guess], scores[i, label], paths[i]]
            for i, label, guess in zip(worst, labels[worst], predicted[worst], strict=True)
        ]
    error = np.abs(scores - truth)
    order = np.argsort(-error, axis=None, kind="stable")[:_MISTAKES_SHOWN]
    rows = [
        [ids[i], names[j], "yes" if truth[i, j] else "no", scores[i, j], paths[i]]
        for i, j in zip(*np.unravel_index(order, error.shape), strict=True)
        if error[i, j] > 0.5
    ]
    return ["clip", "tag", "truth", "probability", "file"], rows


def _own_notes(evaluation: Evaluation, metrics: Mapping[str, Any]) -> list[str]:
    """Returns what a reader must know about these numbers."""
    notes, n = [], metrics["n"]
    if names := metrics["undefined"]:
        why = "constant" if evaluation.task == "regression" else "no clip with or without them"
        many = _TASKS[evaluation.task].many
        count = f"{len(names)} of {len(metrics['per_class'])} {many} ({', '.join(names)})"
        notes.append(f"Left out of the means ({why}): {count}.")
    calibration = metrics.get("calibration") or {"cross_fitted": None, "shared": 0}
    if calibration["cross_fitted"]:
        folds = len(calibration["cross_fitted"]["temperatures"])
        notes.append(
            "The temperature was fitted on the evaluated clips themselves, so its gain is a little "
            f"too good. The cross-fitted numbers are not: in these, each of {folds} folds of the "
            f"{metrics['intervals']['bootstrap_unit']}s has the temperature that was fitted on the "
            "others."
        )
    elif shared := calibration["shared"]:
        notes.append(
            f"The temperature was fitted on {shared} of the {n} evaluated clips, so its gain is "
            "too good."
        )
    if unknown := sum(group is None for group in evaluation.groups):
        notes.append(
            f"The {evaluation.group_name} is unknown for {unknown} of {n} clips; the bootstrap "
            "treats each of them as its own group."
        )
    return notes


def _figures(evaluation: Evaluation, metrics: Mapping[str, Any]) -> dict[str, tuple[str, Figure]]:
    """Draws the figures; returns the heading and the figure by name."""
    task, names = _TASKS[evaluation.task], evaluation.label_names
    step, scores = evaluation.checkpoint.get("step"), np.asarray(evaluation.scores)
    found = {}
    if evaluation.curves:
        curves = plots.learning_curves(evaluation.curves, task.main[0], step)
        found["curves"] = "Learning curves", curves
    if evaluation.task == "single_label":
        found["confusion"] = "Confusion", plots.confusion_matrix(metrics["confusion"], names)
    found["per_class"] = f"Per {task.one}", plots.per_class_bars(metrics)
    if evaluation.task == "regression":
        return found
    if len(names) <= _MOST_ROC_CURVES:
        found["roc"] = "ROC", plots.roc_curves(scores, _one_hot(evaluation), names)
    observed, counted = "fraction with the tag", "entries"
    diagrams = {"reliability": ("Calibration", metrics)}
    if evaluation.task == "single_label":
        observed, counted = "accuracy", "clips"
        found["abstention"] = "Abstention", plots.coverage_curve(metrics["abstention"])
        if of := metrics.get("calibration"):
            how = "cross-fitted temperature" if of["cross_fitted"] else "temperature"
            heading = f"Calibration, {how} {of['temperature']:.2f}"
            diagrams["reliability_after"] = heading, of["cross_fitted"] or of["after"]
    for key, (heading, of) in diagrams.items():
        figure = plots.reliability_diagram(of["reliability"], of["ece"], observed, counted)
        found[key] = heading, figure
    return found
