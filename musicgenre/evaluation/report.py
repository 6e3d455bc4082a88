"""Writes an evaluation down: metrics.json, predictions.csv, figures and one self-contained report.html."""

import base64
import csv
import dataclasses
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from musicgenre.errors import UserError
from musicgenre.evaluation import plots
from musicgenre.evaluation.audit import AuditResult
from musicgenre.evaluation.calibration import cross_fitted, fit_temperature, risk_coverage, tempered
from musicgenre.evaluation.intervals import bootstrap, bootstrap_mean, seeds_summary, wilson
from musicgenre.evaluation.metrics import (
    calibration_metrics,
    ece_by_chance,
    multi_label_metrics,
    regression_metrics,
    single_label_metrics,
    weighted_macro_aucs,
    weighted_r2,
)
from musicgenre.files import write_json, write_text

LEVEL = 0.95
_MISTAKES_SHOWN = 20
_MOST_ROC_CURVES = 10
# In the order in which they are shown; those of the second line are shares, shown in percent.
_MEASURES = (
    "accuracy",
    "balanced_accuracy",
    "top3_accuracy",
    "macro_roc_auc",
    "macro_pr_auc",
    "macro_f1",
    "micro_f1",
    "nll",
    "ece",
    "brier",
    "r2",
    "mse",
    "mae",
    "correlation",
)
_IN_PERCENT = ("accuracy", "balanced_accuracy", "top3_accuracy", "ece")
# The measures that say how good a model is, by its task.
_MAIN = {
    "single_label": ("accuracy",),
    "multi_label": ("macro_roc_auc", "macro_pr_auc"),
    "regression": ("r2", "mse"),
}
_CALLED = {
    "single_label": ("class", "classes"),
    "multi_label": ("tag", "tags"),
    "regression": ("output", "outputs"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Everything a report says. Arrays and lists over clips share one order.

    Attributes:
      title: heading of the report.
      dataset: name of the data set.
      protocol: how its split was made.
      split: which split was evaluated.
      task: "single_label", "multi_label" or "regression".
      label_names: `[classes]`, in the order of the scores.
      clip_ids: unique, `[clips]`.
      paths: the sound file or array of each clip, `[clips]`.
      groups: the artist or track of each clip, `[clips]`; None where it is not known.
      scores: probabilities, or a regression's outputs, `[clips, classes]`.
      targets: class numbers `[clips]`, 0/1 tags or numbers `[clips, classes]`.
      curves: rows of the run's metrics.jsonl.
      config: the run's configuration.
      audit: from `musicgenre.evaluation.audit.audit`, or None where it was not made.
      skipped: clips that could not be used, dicts with `clip_id`, `path` and `reason`.
      synthetic: the sound is made up; the report says so at the top.
      command: what was typed.
      checkpoint: `step`, `which` ("last" or "best") and `selected_on` (such as "valid accuracy").
      versions: version by package.
      notes: sentences shown under the headline.
      group_name: what a group is.
      windows: probabilities of each window (and each model of an ensemble), whose mean the scores are,
        `[clips, windows, classes]`; None where each clip has one, its scores.
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
      calibration: the same model's evaluation that a temperature is fitted on, which may be this one, or a temperature; also says
        what its probabilities are then worth. None for neither, and of no effect on tags and regressions.
      resamples: draws of the bootstrap.
      seed: of the bootstrap.

    Returns:
      What `single_label_metrics`, `multi_label_metrics` or `regression_metrics` returns, with `task` and `intervals`: `level`,
      `bootstrap_unit` (what was resampled, such as "artist"; "clip" where no group is known),
      `bootstrap_units` (how many there are) and for each headline measure a dict with `bootstrap` and, for
      accuracy, `wilson`, each [low, high] or None. Each class or tag has `recall_wilson`, the interval of its recall.
      A classifier of single labels has `ece_by_chance` (see there), `abstention`, see
      `musicgenre.evaluation.calibration.risk_coverage`, and, where it was asked for, `calibration`: `temperature`, `fitted_on`
      (in words), `shared` (how many of the clips that it was fitted on are evaluated here), `before` and `after`
      (`calibration_metrics` without and with it), and `cross_fitted`, the same measures where each fold of the groups has the
      temperature fitted on the others, with these `temperatures`; None unless it was fitted on the evaluated clips. All other
      measures are of the probabilities as they are, without the temperature.

    Raises:
      UserError: fields that do not fit together, a clip id twice, or what the metrics raise.
    """
    _check(evaluation)
    n = len(evaluation.clip_ids)
    grouped = any(group is not None for group in evaluation.groups)
    groups = evaluation.groups if grouped else None
    known = [group for group in evaluation.groups if group is not None]
    intervals: dict[str, Any] = {
        "level": LEVEL,
        "bootstrap_unit": evaluation.group_name if grouped else "clip",
        "bootstrap_units": len(set(known)) + n - len(known),
    }
    scores, targets = np.asarray(evaluation.scores), np.asarray(evaluation.targets)
    if evaluation.task == "single_label":
        metrics = single_label_metrics(scores, targets, evaluation.label_names)
        correct = scores.argmax(axis=1) == targets
        over_clips = bootstrap_mean(correct, groups, resamples=resamples, seed=seed, level=LEVEL)
        intervals["accuracy"] = {
            "wilson": list(wilson(int(correct.sum()), n, LEVEL)),
            "bootstrap": over_clips and list(over_clips),
        }
        metrics["ece_by_chance"] = ece_by_chance(scores.max(axis=1))
        metrics["abstention"] = risk_coverage(scores.max(axis=1), correct, LEVEL)
        if calibration is not None:
            metrics["calibration"] = _calibrated(evaluation, calibration)
    elif evaluation.task == "multi_label":
        metrics = multi_label_metrics(scores, targets, evaluation.label_names)
    else:
        metrics = regression_metrics(scores, targets, evaluation.label_names)
    for row in metrics["per_class"] if evaluation.task != "regression" else ():
        support = row["support"]
        row["recall_wilson"] = (
            list(wilson(round(row["recall"] * support), support, LEVEL)) if support else None
        )
    if evaluation.task == "regression":
        names, statistic = _MAIN["regression"], weighted_r2(scores, targets)
    else:
        names, statistic = _MAIN["multi_label"], weighted_macro_aucs(scores, _one_hot(evaluation))
    both = bootstrap(statistic, n, groups, resamples=resamples, seed=seed, level=LEVEL)
    for name, interval in zip(names, both, strict=True):
        intervals[name] = {"bootstrap": interval and list(interval)}
    return {"task": evaluation.task, **metrics, "intervals": intervals}


def headline(metrics: Mapping[str, Any]) -> str:
    """Returns metrics in one line, such as "accuracy 48.7 % (95 % Wilson 41.8-55.7, ...), 197 clips".

    Args:
      metrics: from `measure` or a `metrics.json`; without `intervals` the line has none.
    """
    task = _task_of(metrics)
    parts = []
    for name in _MAIN[task]:
        shown = ", ".join(_intervals(metrics, name))
        value = f"{plots.measure_name(name)} {_value(name, metrics[name])}"
        parts.append(f"{value} ({shown})" if shown else value)
    parts.append(f"{metrics['n']} clips")
    what = _CALLED[task][1]
    if task != "single_label":
        parts.append(f"{metrics[what]} {what}")
    if metrics.get("undefined_count"):
        parts.append(f"{what} left out of the means: {metrics['undefined_count']}")
    return ", ".join(parts)


def calibration_line(metrics: Mapping[str, Any]) -> str:
    """Returns what a temperature does, in one line, or "" where none was asked for."""
    if (found := metrics.get("calibration")) is None:
        return ""
    rows = [
        f"{name.replace('_', '-')} {_value('ece', found[name]['ece'])}"
        for name in ("before", "after")
    ]
    nll = f"negative log likelihood {found['before']['nll']:.3f}, {found['after']['nll']:.3f}"
    if found["cross_fitted"]:
        rows.append(f"cross-fitted {_value('ece', found['cross_fitted']['ece'])}")
        nll += f", {found['cross_fitted']['nll']:.3f}"
    return f"temperature {found['temperature']:.3f}, {found['fitted_on']}: calibration error {', '.join(rows)}; {nll}"


def write_report(
    out_dir: str | os.PathLike[str],
    evaluation: Evaluation,
    *,
    metrics: Mapping[str, Any] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Path:
    """Writes `metrics.json`, `predictions.csv`, the figures (PNG) and `report.html`.

    Args:
      out_dir: folder; made where it is missing, files in it are replaced one by one.
      evaluation: what to report.
      metrics: what `measure` returned for it; measured here if None.
      resamples: draws of the bootstrap.
      seed: of the bootstrap.

    Returns:
      The path of `report.html`, which needs no other file.

    Raises:
      UserError: what `measure` raises, or the folder cannot be written.
    """
    out_dir = Path(out_dir)
    metrics = measure(evaluation, resamples=resamples, seed=seed) if metrics is None else metrics
    notes = [*evaluation.notes, *_own_notes(evaluation, metrics)]
    audit = evaluation.audit
    reasons = Counter(str(row["reason"]) for row in evaluation.skipped)
    write_json(
        out_dir / "metrics.json",
        {
            "title": evaluation.title,
            "dataset": evaluation.dataset,
            "protocol": evaluation.protocol,
            "split": evaluation.split,
            "synthetic": evaluation.synthetic,
            "checkpoint": dict(evaluation.checkpoint),
            "headline": headline(metrics),
            **metrics,
            "audit": audit.to_dict() if audit else None,
            "skipped": [dict(row) for row in evaluation.skipped],
            "notes": notes,
            "command": evaluation.command,
            "versions": dict(evaluation.versions),
            "config": dict(evaluation.config),
        },
    )
    write_text(out_dir / "predictions.csv", _predictions(evaluation))
    figures = _figures(out_dir, evaluation, metrics)
    page = rendered(
        "report.html.j2",
        evaluation=evaluation,
        metrics=metrics,
        notes=notes,
        headline=headline(metrics),
        figures={name: _data_uri(path) for name, path in figures.items()},
        mistakes=_mistakes(evaluation),
        cards=_cards(metrics),
        skipped_reasons=reasons.most_common(),
        config=list(_flat(evaluation.config)),
        what=_CALLED[evaluation.task],
    )
    write_text(out_dir / "report.html", page)
    return out_dir / "report.html"


def summarise_seeds(
    out_dir: str | os.PathLike[str],
    runs: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    title: str,
    correct: np.ndarray | None = None,
    groups: Sequence[str | None] | None = None,
    group_name: str = "artist",
    ensemble: Mapping[str, Any] | None = None,
    synthetic: bool = False,
    command: str = "",
    notes: Sequence[str] = (),
) -> Path:
    """Writes what several seeds of one experiment give: `summary.json`, `seeds.png` and `report.html`.

    Args:
      out_dir: folder.
      runs: the name (such as "seed 0") and the metrics of each, from `measure` or a `metrics.json`.
      title: what was run.
      correct: whether each seed was right on each clip, 0/1 `[seeds, clips]`; gives the mean accuracy an
        interval over clips, which the spread of the seeds says nothing about.
      groups: the group of each clip for that interval, `[clips]`.
      group_name: what a group is.
      ensemble: the metrics of all together, from `measure`, to be set beside them.
      synthetic: the sound is made up.
      command: what was typed.
      notes: sentences shown under the headline.

    Returns:
      The path of `report.html`.

    Raises:
      UserError: no runs, runs without a measure in common, or `correct` of a wrong shape.
    """
    measures, left_out = _summarise(runs)
    main = next(iter(measures))
    summary: dict[str, Any] = {
        "title": title,
        "synthetic": synthetic,
        "runs": [name for name, _ in runs],
        "measures": measures,
        "left_out": left_out,
    }
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "mean": metrics[main],
            "values": [],
            "interval": _best_interval(metrics, main),
        }
        for name, metrics in runs
    ]
    over_seeds = measures[main]
    rows.append({"name": f"mean of {len(runs)} seeds (t interval)", **over_seeds})
    if correct is not None:
        correct = np.asarray(correct)
        if correct.ndim != 2 or len(correct) != len(runs):
            raise UserError(
                f"correct must have the shape [seeds, clips] for {len(runs)} seeds, not {list(correct.shape)}."
            )
        interval = bootstrap_mean(correct.mean(axis=0), groups, level=LEVEL)
        unit = (
            group_name
            if groups is not None and any(group is not None for group in groups)
            else "clip"
        )
        summary["over_clips"] = {
            "accuracy": float(correct.mean()),
            "bootstrap": interval and list(interval),
            "bootstrap_unit": unit,
            "clips": correct.shape[1],
        }
        rows.append(
            {
                "name": f"mean of {len(runs)} seeds ({unit} bootstrap)",
                "mean": float(correct.mean()),
                "interval": interval,
                "values": [],
            }
        )
    if ensemble is not None and ensemble.get(main) is not None:
        summary["ensemble"] = {name: ensemble[name] for name in measures} | {
            "intervals": ensemble["intervals"]
        }
        row = {"name": "ensemble: mean of all scores", "mean": ensemble[main], "values": []}
        rows.append({**row, "interval": _best_interval(ensemble, main)})
    tables = [("", runs, measures)]
    return _write_summary(Path(out_dir), "seeds.png", summary, rows, main, tables, command, notes)


def summarise_variants(
    out_dir: str | os.PathLike[str],
    variants: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]],
    *,
    title: str,
    synthetic: bool = False,
    command: str = "",
    notes: Sequence[str] = (),
) -> Path:
    """Writes how variants compare, each over its seeds: `summary.json`, `variants.png` and `report.html`.

    Args:
      out_dir: folder.
      variants: for each name the (name, metrics) of its runs, as for `summarise_seeds`.
      title: what was compared.
      synthetic: the sound is made up.
      command: what was typed.
      notes: sentences shown under the headline.

    Returns:
      The path of `report.html`.

    Raises:
      UserError: no variants, or runs without a measure in common.
    """
    _, left_out = _summarise([run for runs in variants.values() for run in runs])
    tables = []
    for name, runs in variants.items():
        measures, _ = _summarise(runs)
        tables.append(
            (name, runs, {key: value for key, value in measures.items() if key not in left_out})
        )
    main = next(iter(tables[0][2]))
    summary = {
        "title": title,
        "synthetic": synthetic,
        "left_out": left_out,
        "variants": {
            name: {"runs": [run for run, _ in runs], "measures": measures}
            for name, runs, measures in tables
        },
    }
    rows = [{"name": name, **measures[main]} for name, _, measures in tables]
    return _write_summary(
        Path(out_dir), "variants.png", summary, rows, main, tables, command, notes
    )


def _write_summary(
    out_dir: Path,
    figure: str,
    summary: dict[str, Any],
    rows: list[dict[str, Any]],
    main: str,
    tables: list[tuple[str, Sequence[tuple[str, Mapping[str, Any]]], dict[str, Any]]],
    command: str,
    notes: Sequence[str],
) -> Path:
    write_json(out_dir / "summary.json", {**summary, "notes": list(notes), "command": command})
    title = ("SYNTHETIC · " if summary["synthetic"] else "") + summary["title"]
    plots.comparison_plot(
        out_dir / figure, rows, title, measure=plots.measure_name(main), percent=main in _IN_PERCENT
    )
    page = rendered(
        "summary.html.j2",
        summary=summary,
        tables=tables,
        main=main,
        figure=_data_uri(out_dir / figure),
        command=command,
        notes=notes,
    )
    write_text(out_dir / "report.html", page)
    return out_dir / "report.html"


def _summarise(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[dict[str, Any], list[str]]:
    """Returns the summary of each measure that every run has, and the names of those that only some have."""
    if not runs:
        raise UserError("a summary needs at least one run.")
    defined = {name: [metrics.get(name) is not None for _, metrics in runs] for name in _MEASURES}
    measures = {
        name: seeds_summary([metrics[name] for _, metrics in runs], LEVEL)
        for name in _MEASURES
        if all(defined[name])
    }
    if not measures:
        raise UserError(
            f"the runs {', '.join(name for name, _ in runs)} have no measure in common."
        )
    return measures, [name for name in _MEASURES if any(defined[name]) and not all(defined[name])]


def _best_interval(metrics: Mapping[str, Any], name: str) -> Sequence[float] | None:
    """Returns the bootstrap interval of a measure where there is one, or Wilson's."""
    intervals = metrics.get("intervals", {}).get(name, {})
    return intervals.get("bootstrap") or intervals.get("wilson")


def _check(evaluation: Evaluation) -> None:
    if evaluation.task not in _MAIN:
        raise UserError(f"task must be one of {', '.join(_MAIN)}, not {evaluation.task!r}.")
    clips = len(evaluation.clip_ids)
    for name in ("paths", "groups", "scores", "targets"):
        if len(getattr(evaluation, name)) != clips:
            raise UserError(f"{clips} clip ids but {len(getattr(evaluation, name))} {name}.")
    if twice := [clip for clip, count in Counter(evaluation.clip_ids).items() if count > 1]:
        raise UserError(f"the clip id {twice[0]!r} occurs more than once; ids must be unique.")


def _calibrated(evaluation: Evaluation, source: Evaluation | float) -> dict[str, Any]:
    """Returns the `calibration` of the metrics of a single-label evaluation."""
    windows, labels = _windows(evaluation), np.asarray(evaluation.targets)
    fold_temperatures = None
    shared = 0
    if isinstance(source, Evaluation):
        # On top of the one that the scores have already; what is told is both in one.
        factor = fit_temperature(_windows(source), np.asarray(source.targets))
        shared = len(set(source.clip_ids) & set(evaluation.clip_ids))
        fitted_on = f"fitted on {source.split} ({len(source.clip_ids)} clips of {source.dataset})"
        if source.split == "train":
            fitted_on += ", clips that models are trained on, of which they are too sure"
        if shared == len(evaluation.clip_ids):
            fold_temperatures = cross_fitted(windows, labels, evaluation.groups)
    else:
        factor, fitted_on = source / evaluation.temperature, "given"
    found = {
        "temperature": factor * evaluation.temperature,
        "fitted_on": fitted_on,
        "shared": shared,
        "before": calibration_metrics(tempered(windows, 1), labels),
        "after": calibration_metrics(tempered(windows, factor), labels),
        "cross_fitted": None,
    }
    if fold_temperatures is not None:
        scores, factors = fold_temperatures
        found["cross_fitted"] = calibration_metrics(scores, labels) | {
            "temperatures": [factor * evaluation.temperature for factor in factors]
        }
    return found


def _windows(evaluation: Evaluation) -> np.ndarray:
    """Returns the probabilities whose means are the scores, `[clips, windows, classes]`."""
    return (
        np.asarray(evaluation.scores)[:, None] if evaluation.windows is None else evaluation.windows
    )


def _one_hot(evaluation: Evaluation) -> np.ndarray:
    """Returns the truth as 0/1, `[clips, classes]`."""
    targets = np.asarray(evaluation.targets)
    return np.eye(len(evaluation.label_names), dtype=int)[targets] if targets.ndim == 1 else targets


def _chosen(evaluation: Evaluation) -> np.ndarray:
    """Returns what is predicted as True/False, `[clips, classes]`."""
    scores = np.asarray(evaluation.scores)
    if evaluation.task == "single_label":
        return np.eye(scores.shape[1], dtype=bool)[scores.argmax(axis=1)]
    return scores >= 0.5


def _predictions(evaluation: Evaluation) -> str:
    """Returns the text of predictions.csv, sorted by clip id."""
    if evaluation.task == "regression":
        return _numbers(evaluation)
    truth, chosen = _one_hot(evaluation) == 1, _chosen(evaluation)
    names = np.array(evaluation.label_names, dtype=object)
    scores = np.asarray(evaluation.scores, float)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["clip_id", "split", "truth", "predicted", "correct", *(f"p_{name}" for name in names)]
    )
    for i in sorted(range(len(evaluation.clip_ids)), key=lambda i: evaluation.clip_ids[i]):
        writer.writerow(
            [
                evaluation.clip_ids[i],
                evaluation.split,
                "|".join(names[truth[i]]),
                "|".join(names[chosen[i]]),
                int((truth[i] == chosen[i]).all()),
                *(f"{score:.6f}" for score in scores[i]),
            ]
        )
    return buffer.getvalue()


def _numbers(evaluation: Evaluation) -> str:
    """Returns the text of a regression's predictions.csv: the truth and the prediction of each output, sorted by clip id."""
    names = evaluation.label_names
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            "clip_id",
            "split",
            *(f"truth_{name}" for name in names),
            *(f"predicted_{name}" for name in names),
        ]
    )
    for i in sorted(range(len(evaluation.clip_ids)), key=lambda i: evaluation.clip_ids[i]):
        both = [*np.asarray(evaluation.targets[i], float), *np.asarray(evaluation.scores[i], float)]
        writer.writerow(
            [evaluation.clip_ids[i], evaluation.split, *(f"{value:.6g}" for value in both)]
        )
    return buffer.getvalue()


def _mistakes(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Returns the surest mistakes: wrong labels by their probability, or tags by how far they are off; numbers have none."""
    if evaluation.task == "regression":
        return []
    scores, truth = np.asarray(evaluation.scores, float), _one_hot(evaluation)
    names = evaluation.label_names
    if evaluation.task == "single_label":
        predicted, labels = scores.argmax(axis=1), truth.argmax(axis=1)
        sure = np.where(predicted != labels, scores.max(axis=1), -1)
        worst = [i for i in np.argsort(-sure, kind="stable")[:_MISTAKES_SHOWN] if sure[i] >= 0]
        return [
            {
                "clip_id": evaluation.clip_ids[i],
                "truth": names[labels[i]],
                "predicted": names[predicted[i]],
                "probability": float(sure[i]),
                "of_truth": float(scores[i, labels[i]]),
                "path": evaluation.paths[i],
            }
            for i in worst
        ]
    off = np.abs(scores - truth)
    order = np.argsort(-off, axis=None, kind="stable")[:_MISTAKES_SHOWN]
    return [
        {
            "clip_id": evaluation.clip_ids[i],
            "tag": names[j],
            "truth": "yes" if truth[i, j] else "no",
            "probability": float(scores[i, j]),
            "path": evaluation.paths[i],
        }
        for i, j in zip(*np.unravel_index(order, off.shape), strict=True)
        if off[i, j] > 0.5
    ]


def _own_notes(evaluation: Evaluation, metrics: Mapping[str, Any]) -> list[str]:
    """Returns what a reader has to know about these numbers."""
    notes = []
    checkpoint = evaluation.checkpoint
    selected_on = str(checkpoint.get("selected_on", "")).split()
    if checkpoint.get("which") == "best" and evaluation.split in selected_on:
        notes.append(
            f"The checkpoint was chosen by its score on this split ({evaluation.split}), so these numbers flatter it."
        )
    if metrics["undefined"]:
        what = _CALLED[evaluation.task][1]
        why = (
            "for being constant"
            if evaluation.task == "regression"
            else "for want of a clip with or without them"
        )
        notes.append(
            f"Left out of the means, {why}: "
            f"{metrics['undefined_count']} of {len(metrics['per_class'])} {what} "
            f"({', '.join(metrics['undefined'])})."
        )
    if calibration := metrics.get("calibration"):
        shared, clips = calibration["shared"], metrics["n"]
        if calibration["cross_fitted"]:
            notes.append(
                "The temperature was fitted on the evaluated clips themselves, so what it gains is a little too good. The "
                f"cross-fitted numbers are not: in these each of {len(calibration['cross_fitted']['temperatures'])} parts of "
                f"the {metrics['intervals']['bootstrap_unit']}s has the temperature that was fitted on the others."
            )
        elif shared:
            notes.append(
                f"The temperature was fitted on {shared} of the {clips} evaluated clips, so what it gains is too good."
            )
    unknown = sum(group is None for group in evaluation.groups)
    if unknown:
        notes.append(
            f"The {evaluation.group_name} is unknown for {unknown} of {metrics['n']} clips; the "
            "bootstrap takes each of them for itself."
        )
    return notes


def _figures(out_dir: Path, evaluation: Evaluation, metrics: Mapping[str, Any]) -> dict[str, Path]:
    """Draws the figures and returns their paths by name."""
    task, single = evaluation.task, evaluation.task == "single_label"
    title = (
        f"{evaluation.dataset} · {evaluation.protocol} · {evaluation.split} · {metrics['n']} clips"
    )
    if evaluation.synthetic:
        title = f"SYNTHETIC · {title}"
    names, rows = evaluation.label_names, metrics["per_class"]
    paths = {}
    if evaluation.curves:
        paths["curves"] = out_dir / "curves.png"
        plots.learning_curves(
            paths["curves"],
            evaluation.curves,
            f"Learning curves · {title}",
            metric=_MAIN[task][0],
            evaluated_step=evaluation.checkpoint.get("step"),
        )
    if single:
        paths["confusion"] = out_dir / "confusion.png"
        plots.confusion_matrix(
            paths["confusion"], metrics["confusion"], names, f"Confusion · {title}"
        )
    paths["per_class"] = out_dir / "per_class.png"
    measures = {
        "single_label": {"F1": "f1", "ROC-AUC": "roc_auc"},
        "multi_label": {"ROC-AUC": "roc_auc", "PR-AUC": "pr_auc"},
        "regression": {"R2": "r2", "correlation": "correlation"},
    }[task]
    plots.per_class_bars(
        paths["per_class"],
        names,
        {name: [row[key] for row in rows] for name, key in measures.items()},
        [row["support"] for row in rows],
        f"Per {_CALLED[task][0]} · {title}",
    )
    if task == "regression":
        return paths
    if len(names) <= _MOST_ROC_CURVES:
        paths["roc"] = out_dir / "roc.png"
        plots.roc_curves(
            paths["roc"],
            np.asarray(evaluation.scores),
            _one_hot(evaluation),
            names,
            f"ROC · {title}",
        )
    if single:
        paths["abstention"] = out_dir / "abstention.png"
        plots.coverage_curve(paths["abstention"], metrics["abstention"], f"Abstention · {title}")
    diagrams = {"reliability": ("Calibration", metrics)}
    if calibration := metrics.get("calibration"):
        kind = "cross_fitted" if calibration["cross_fitted"] else "after"
        name = f"Calibration, {'cross-fitted temperature' if calibration['cross_fitted'] else 'temperature'}"
        diagrams["reliability_after"] = (
            f"{name} {calibration['temperature']:.2f}",
            calibration[kind],
        )
    for key, (name, found) in diagrams.items():
        paths[key] = out_dir / f"{key}.png"
        plots.reliability_diagram(
            paths[key],
            found["reliability"],
            found["ece"],
            f"{name} · {title}",
            observed="accuracy" if single else "share with the tag",
            counted="clips" if single else "entries",
        )
    return paths


def _value(name: str, value: float | None) -> str:
    if value is None:
        return "undefined"
    return f"{100 * value:.1f} %" if name in _IN_PERCENT else f"{value:.3f}"


def _range(name: str, interval: Sequence[float]) -> str:
    if name in _IN_PERCENT:
        return f"{100 * interval[0]:.1f}-{100 * interval[1]:.1f}"
    return f"{interval[0]:.3f}-{interval[1]:.3f}"


def _intervals(metrics: Mapping[str, Any], name: str) -> list[str]:
    """Returns the intervals of a measure in words, the level with the first."""
    intervals = metrics.get("intervals", {})
    kinds = {"wilson": "Wilson", "bootstrap": f"{intervals.get('bootstrap_unit')} bootstrap"}
    found = [
        f"{kinds[kind]} {_range(name, interval)}"
        for kind, interval in intervals.get(name, {}).items()
        if interval
    ]
    return [f"{100 * intervals['level']:.0f} % {found[0]}", *found[1:]] if found else []


def _task_of(metrics: Mapping[str, Any]) -> str:
    """Returns the task that metrics are of, by what they hold."""
    return (
        "single_label"
        if "accuracy" in metrics
        else "regression"
        if "r2" in metrics
        else "multi_label"
    )


def _cards(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the numbers at the top of the report; the first ones are the headline."""
    main = _MAIN[_task_of(metrics)]
    shown = [*main, *(name for name in _MEASURES if name in metrics and name not in main)]
    return [
        {
            "name": plots.measure_name(name),
            "value": _value(name, metrics[name]),
            "main": name in main,
            "intervals": _intervals(metrics, name),
        }
        for name in shown
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return found


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def rendered(template: str, **values: Any) -> str:
    """Returns the page that a template of this package makes of values, which are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = lambda value: "n/a" if value is None else f"{value:.3f}"
    environment.globals.update(
        show_value=_value,
        show_range=_range,
        show_intervals=_intervals,
        measure_name=plots.measure_name,
    )
    return environment.get_template(template).render(**values)
