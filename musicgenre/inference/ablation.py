"""Variants of one config, each with several seeds, and one table of what came out."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from musicgenre.config import check_config, clip_layout, dataset_options, feature_spec, store_path
from musicgenre.datasets import load_dataset
from musicgenre.errors import UserError
from musicgenre.evaluation.intervals import seeds_summary
from musicgenre.evaluation.plots import measure_name
from musicgenre.evaluation.report import summarise_variants
from musicgenre.files import write_text
from musicgenre.pipeline.prepare import prepare_store
from musicgenre.training.loop import TrainResult, train
from musicgenre.training.telemetry import read_rows

Variant = tuple[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant: its overrides, and the validation measure at the end of training over the seeds."""

    name: str
    overrides: dict[str, Any]
    n: int
    mean: float
    std: float | None
    interval: tuple[float, float] | None
    values: list[float]


def expand(
    config: ConfigDict, variants: Iterable[Variant], seeds: Sequence[int]
) -> list[tuple[str, dict[str, Any], list[ConfigDict]]]:
    """Returns (name, overrides, one checked config a seed) for each variant, before anything is trained.

    Raises:
      UserError: a name twice or not fit for a folder, or an override that the config does not take.
    """
    expanded = []
    names: set[str] = set()
    for name, overrides in variants:
        if name in names or not name or set(name) & set('/\\:*?"<>|'):
            raise UserError(f"sweep(): the name {name!r} is used twice, empty or not fit for a folder.")
        names.add(name)
        configs = []
        for seed in seeds:
            changed = ConfigDict(config.to_dict())
            for field, value in {**overrides, "seed": seed}.items():
                node = changed
                *parents, leaf = field.split(".")
                for parent in parents:
                    if parent not in node:
                        raise UserError(f"sweep(), {name!r}: config.{field} does not exist.")
                    node = node[parent]
                node[leaf] = value
            check_config(changed)
            configs.append(changed)
        expanded.append((name, dict(overrides), configs))
    if not expanded:
        raise UserError("sweep() yields no variants.")
    return expanded


def run_ablation(
    config: ConfigDict, variants: Iterable[Variant], workdir: str | Path, seeds: Sequence[int], *, progress: bool = True
) -> list[Row]:
    """Prepares each variant's store where it is missing, trains it with every seed and writes one table of all.

    The table is `ablation.csv`, `ablation.md`, `variants.png` and `report.html`.
    Finished runs are not repeated and unfinished ones go on, so the same call resumes. The measure is that of the
    validation split at the end of training, not of the best checkpoint, so that nothing is selected on it.

    Args:
      config: what the variants change.
      variants: names with overrides by dotted field, such as ("wide", {"model.filters": (512, 512, 512)}).
      workdir: gets a folder `<variant>/seed<seed>` for each run, and the table, which grows with every variant.
      seeds: seeds of each variant.
      progress: draw progress bars.
    """
    workdir = Path(workdir)
    rows: list[Row] = []
    measured: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, overrides, configs in expand(config, variants, seeds):
        _prepare(configs[0], progress)
        results: list[TrainResult] = []
        for seed, changed in zip(seeds, configs, strict=True):
            results.append(train(changed, workdir / name / f"seed{seed}", progress=progress))
            print(results[-1].line(), flush=True)
        values = [result.last for result in results if result.last is not None]
        if len(values) < len(results):
            raise UserError("an ablation needs a validation split, and the store has none.")
        rows.append(Row(name, overrides, **seeds_summary(values)))
        measured[name] = [(result.workdir.name, _last_measures(result.workdir)) for result in results]
        write_table(workdir, rows, results[0].metric)
        summarise_variants(
            workdir,
            measured,
            title=f"{workdir.name}: the validation split at the end of training",
            synthetic=results[0].synthetic,
        )
    return rows


def _prepare(config: ConfigDict, progress: bool) -> None:
    """Makes the store of a config unless a finished one is there; a variant of the front end has one of its own."""
    place = store_path(config)
    if (place / "manifest.json").is_file():
        return
    summary = prepare_store(
        load_dataset(dataset_options(config)),
        feature_spec(config),
        clip_layout(config),
        place,
        min_seconds=config.data.min_seconds,
        array_layout=config.data.array_layout,
        progress=progress,
    )
    print("\n".join(summary.lines()), flush=True)


def _last_measures(workdir: Path) -> dict[str, Any]:
    """Returns the validation measures of a run's last evaluation."""
    row = [row for row in read_rows(workdir) if "valid_loss" in row][-1]
    return {name.removeprefix("valid_"): value for name, value in row.items() if name.startswith("valid_")}


def write_table(workdir: Path, rows: Sequence[Row], metric: str) -> None:
    """Writes the rows as CSV and Markdown."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["variant", "overrides", "seeds", f"valid_{metric}_mean", "std", "ci95_low", "ci95_high", "values"])
    lines = [
        f"| variant | overrides | seeds | validation {measure_name(metric)} | 95 % interval of the mean |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        changes = ", ".join(f"{field}={value}" for field, value in row.overrides.items()) or "none"
        low, high = row.interval or ("", "")
        writer.writerow(
            [
                row.name,
                changes,
                row.n,
                row.mean,
                "" if row.std is None else row.std,
                low,
                high,
                " ".join(f"{value:.6f}" for value in row.values),
            ]
        )
        spread = "" if row.std is None else f" ± {row.std:.3f}"
        interval = f"{row.interval[0]:.3f} to {row.interval[1]:.3f}" if row.interval else "one seed"
        lines.append(f"| {row.name} | {changes.replace('|', ' ')} | {row.n} | {row.mean:.3f}{spread} | {interval} |")
    write_text(workdir / "ablation.csv", buffer.getvalue())
    write_text(workdir / "ablation.md", "\n".join(lines) + "\n")
