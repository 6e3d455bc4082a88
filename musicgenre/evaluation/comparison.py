"""Several runs together: summaries over seeds and over variants, and ensembles of models."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from musicgenre.errors import UserError
from musicgenre.evaluation import plots
from musicgenre.evaluation.intervals import bootstrap_mean, seeds_summary
from musicgenre.evaluation.render import IN_PERCENT, MEASURES, data_uri, measure_name, rendered
from musicgenre.evaluation.report import Evaluation, windows_of
from musicgenre.files import write_json, write_text

# The name and the metrics of a run, from `measure` or a `metrics.json`.
Run = tuple[str, Mapping[str, Any]]


def summarise_seeds(
    out_dir: str | os.PathLike[str],
    runs: Sequence[Run],
    *,
    title: str,
    evaluations: Sequence[Evaluation] = (),
    ensemble: Mapping[str, Any] | None = None,
) -> Path:
    """Writes what the seeds of one experiment give: `summary.json`, `seeds.png`, `report.html`.

    Args:
      out_dir: folder.
      runs: the name (such as "seed 0") and the metrics of each.
      title: what was run.
      evaluations: of the runs, on the same clips. With single labels, they give the mean accuracy
        an interval over clips, which the spread of the seeds does not cover.
      ensemble: the metrics of the ensemble, from `measure`.

    Returns:
      The path of `report.html`.

    Raises:
      UserError: no runs, or runs without a measure in common.
    """
    measures, left_out = _summarise(runs)
    main, mean = next(iter(measures)), f"mean of {len(runs)} seeds"
    summary: dict[str, Any] = {
        "title": title,
        "synthetic": any(one.synthetic for one in evaluations),
        "runs": [name for name, _ in runs],
        "measures": measures,
        "left_out": left_out,
    }
    rows = [_row(name, metrics[main], _best_interval(metrics, main)) for name, metrics in runs]
    rows.append({"name": f"{mean} (t interval)", **measures[main]})
    if evaluations and evaluations[0].task == "single_label":
        correct = np.stack([one.scores.argmax(axis=1) == one.targets for one in evaluations])
        groups, unit = evaluations[0].groups, evaluations[0].group_name
        interval = bootstrap_mean(correct.mean(axis=0), groups)
        unit = unit if any(group is not None for group in groups) else "clip"
        summary["over_clips"] = {
            "accuracy": float(correct.mean()),
            "bootstrap": interval and list(interval),
            "bootstrap_unit": unit,
            "clips": correct.shape[1],
        }
        rows.append(_row(f"{mean} ({unit} bootstrap)", float(correct.mean()), interval))
    if ensemble is not None and ensemble.get(main) is not None:
        summary["ensemble"] = {name: ensemble[name] for name in (*measures, "intervals")}
        name = "ensemble: mean of all scores"
        rows.append(_row(name, ensemble[main], _best_interval(ensemble, main)))
    command = evaluations[0].command if evaluations else ""
    tables = [("", runs, measures)]
    return _write_summary(Path(out_dir), "seeds.png", summary, rows, tables, command)


def summarise_variants(
    out_dir: str | os.PathLike[str],
    variants: Mapping[str, Sequence[Run]],
    *,
    title: str,
    synthetic: bool = False,
) -> Path:
    """Writes how variants compare over seeds: `summary.json`, `variants.png`, `report.html`.

    The runs of each variant are those of `summarise_seeds`. Returns the path of `report.html`.

    Raises:
      UserError: no variants, or runs without a measure in common.
    """
    common, left_out = _summarise([run for runs in variants.values() for run in runs])
    tables = [
        (name, runs, {key: of for key, of in _summarise(runs)[0].items() if key in common})
        for name, runs in variants.items()
    ]
    summary = {
        "title": title,
        "synthetic": synthetic,
        "left_out": left_out,
        "variants": {
            name: {"runs": [run for run, _ in runs], "measures": measures}
            for name, runs, measures in tables
        },
    }
    rows = [{"name": name, **measures[next(iter(common))]} for name, _, measures in tables]
    return _write_summary(Path(out_dir), "variants.png", summary, rows, tables)


def ensemble(evaluations: Sequence[Evaluation], names: Sequence[str]) -> Evaluation:
    """Returns the evaluation of the arithmetic mean of several models' probabilities (or outputs).

    If their configurations differ, a field becomes the list of its values. The audit is the first
    with findings, if any. `names` are those of the models.

    Raises:
      UserError: no evaluations, or the clips, their truth or the labels differ.
    """
    if not evaluations or len(evaluations) != len(names):
        raise UserError(f"an ensemble of {len(evaluations)} evaluations with {len(names)} names.")
    first, *others = evaluations
    for name, other in zip(names[1:], others, strict=True):
        same_clips = list(other.clip_ids) == list(first.clip_ids)
        if not same_clips or not np.array_equal(other.targets, first.targets):
            raise UserError(f"{names[0]} and {name} were not evaluated on the same clips.")
        if tuple(other.label_names) != tuple(first.label_names):
            raise UserError(f"the labels of {names[0]} and {name} differ.")
    windows = [windows_of(one) for one in evaluations]
    if len({part.shape for part in windows}) > 1:
        windows = [np.asarray(one.scores)[:, None] for one in evaluations]
    audits = [one.audit for one in evaluations if one.audit is not None]
    checkpoint = dict(first.checkpoint)
    for key, value in checkpoint.items():
        found = dict.fromkeys(str(one.checkpoint.get(key)) for one in evaluations)
        checkpoint[key] = value if len(found) == 1 else ", ".join(found)
    what = "outputs" if first.task == "regression" else "probabilities"
    note = f"Arithmetic mean of the {what} of {len(names)} models: {', '.join(names)}."
    return dataclasses.replace(
        first,
        title=f"Ensemble of {len(evaluations)} models on {first.dataset}",
        scores=np.mean([one.scores for one in evaluations], axis=0),
        windows=np.concatenate(windows, axis=1),
        curves=(),
        config={"models": list(names), **_together([one.config for one in evaluations])},
        audit=next((audit for audit in audits if not audit.clean), audits[0] if audits else None),
        synthetic=any(one.synthetic for one in evaluations),
        checkpoint=checkpoint,
        notes=[note, *dict.fromkeys(note for one in evaluations for note in one.notes)],
    )


def _write_summary(
    out_dir: Path,
    figure: str,
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    tables: Sequence[tuple[str, Sequence[Run], Mapping[str, Any]]],
    command: str = "",
) -> Path:
    main = next(iter(tables[0][2]))
    write_json(out_dir / "summary.json", {**summary, "notes": [], "command": command})
    title = ("SYNTHETIC · " if summary["synthetic"] else "") + summary["title"]
    drawn = plots.comparison_plot(rows, measure_name(main), percent=main in IN_PERCENT)
    plots.save(drawn, out_dir / figure, title)
    values = {"summary": summary, "tables": tables, "main": main, "command": command}
    page = rendered("summary.html.j2", figure=data_uri(out_dir / figure), **values)
    write_text(out_dir / "report.html", page)
    return out_dir / "report.html"


def _summarise(runs: Sequence[Run]) -> tuple[dict[str, Any], list[str]]:
    """Returns the summary of each measure that all runs have, and the names that only some have."""
    if not runs:
        raise UserError("a summary needs at least one run.")
    values = {name: [metrics.get(name) for _, metrics in runs] for name in MEASURES}
    known = {name: [value for value in own if value is not None] for name, own in values.items()}
    measures = {name: seeds_summary(own) for name, own in known.items() if len(own) == len(runs)}
    if not measures:
        names = ", ".join(name for name, _ in runs)
        raise UserError(f"the runs {names} have no measure in common.")
    return measures, [name for name, own in known.items() if 0 < len(own) < len(runs)]


def _best_interval(metrics: Mapping[str, Any], name: str) -> Sequence[float] | None:
    """Returns the bootstrap interval of a measure if it has one, else Wilson's."""
    intervals = metrics.get("intervals", {}).get(name, {})
    return intervals.get("bootstrap") or intervals.get("wilson")


def _row(name: str, mean: float, interval: Sequence[float] | None) -> dict[str, Any]:
    return {"name": name, "mean": mean, "interval": interval, "values": []}


def _together(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the fields of all configs; where they differ, the list of their values."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for config in configs for key in config):
        values: list[Any] = [config.get(key) for config in configs]
        if all(isinstance(value, Mapping) for value in values):
            found[key] = _together(values)
        else:
            found[key] = values[0] if all(value == values[0] for value in values) else values
    return found
