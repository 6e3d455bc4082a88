"""Variants of one config, trained with several seeds or on several folds, in one table."""

import csv
import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from musicgenre.config import check_config, clip_layout, dataset_options, feature_spec, store_path
from musicgenre.datasets import load_dataset
from musicgenre.datasets.arrays import FOLD_PROTOCOLS, artist_known, whole_clip
from musicgenre.errors import UserError
from musicgenre.evaluation.audit import AuditResult, audit
from musicgenre.evaluation.comparison import summarise_variants
from musicgenre.evaluation.intervals import bootstrap_mean, seeds_summary
from musicgenre.evaluation.plots import comparison_plot, save
from musicgenre.evaluation.render import csv_text, markdown_table, measure_name
from musicgenre.files import write_text
from musicgenre.runs.model import load_model
from musicgenre.runs.provenance import TrainedOn, clips_of, fingerprints, read_workdir
from musicgenre.store.prepare import prepare_store
from musicgenre.store.store import Store
from musicgenre.studies.evaluate import evaluate_model
from musicgenre.training.fit import TrainResult, train
from musicgenre.training.telemetry import read_rows

Variant = tuple[str, Mapping[str, Any]]

_FOLDS_NOTE = """
Accuracy over all held-out clips, each counted once (the mean if several trainings held it out),
± the standard deviation of the trainings. The interval resamples artists, with the trained networks
as they are. After it: the fraction of these clips that have the same clip, a near-identical one, or
another by their artist in the training that they were held out of.
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant: its overrides, and the final validation measure of the seeds."""

    name: str
    overrides: dict[str, Any]
    n: int
    mean: float
    std: float | None
    interval: Sequence[float] | None
    values: list[float]


@dataclasses.dataclass(frozen=True)
class FoldsRow:
    """One variant over its folds: accuracy on held-out clips, and what leaked into training.

    Attributes:
      overrides: the fields that the variant changes.
      folds: 1 for a split without folds.
      trainings: folds x seeds.
      steps: of the shortest and the longest training.
      trained: mean number of training clips (or segments) per fold.
      mean: accuracy over all held-out clips; a clip of several trainings counts as their mean.
      std: of the trainings' accuracies; None for one training.
      interval: 95 % interval of `mean`, resampling artists; None for a single artist.
      values: accuracy of each training.
      clips: clips (or segments) that were held out in some fold.
      leaks: how many of them have the same clip, a near-identical one, or another one by their
        artist in the training that they were held out of, by these three names.
      unknown: how many of them have an unknown artist.
    """

    name: str
    overrides: dict[str, Any]
    folds: int
    trainings: int
    steps: tuple[int, int]
    trained: float
    mean: float
    std: float | None
    interval: tuple[float, float] | None
    values: list[float]
    clips: int
    leaks: dict[str, int]
    unknown: int


def expand(
    config: ConfigDict, variants: Iterable[Variant], seeds: Sequence[int], folds: int = 0
) -> list[tuple[str, dict[str, Any], list[ConfigDict]]]:
    """Returns (name, overrides, its checked configs) of each variant, before any training.

    Args:
      config: what the variants change.
      variants: names with overrides by dotted field.
      seeds: without folds, one config for each.
      folds: one config for each fold and each seed, one fold after the other. A variant whose split
        has no folds gets so many times the seeds instead, so that every variant is trained equally
        often. 0 leaves the folds alone.

    Raises:
      UserError: a name that occurs twice or cannot be a folder, an override that the config does
        not have, or folds where no variant has any, or all of them would share one store.
    """
    expanded: dict[str, tuple[dict[str, Any], list[ConfigDict]]] = {}
    any_folds = not folds
    for name, overrides in variants:
        if name in expanded or not name or set(name) & set('/\\:*?"<>|'):
            raise UserError(f"sweep(): the name {name!r} is repeated, empty or not a folder name.")
        base = _changed(config, name, overrides)
        runs: list[dict[str, Any]] = [{"seed": seed} for seed in seeds]
        if folds and _in_folds(base):
            any_folds = True
            if base.data.store:
                raise UserError("each fold needs its own store: leave --config.data.store empty.")
            fields = [{"data.folds": folds, "data.fold": fold} for fold in range(folds)]
            runs = [fold | seed for fold in fields for seed in runs]
        elif folds:
            runs = [{"seed": seeds[0] + i} for i in range(folds * len(seeds))]
        configs = [_changed(base, name, run) for run in runs]
        for changed in configs:
            # Each run may start from another run with its seed or its fold.
            start = changed.init_from.replace("{seed}", str(changed.seed))
            changed.init_from = start.replace("{fold}", str(changed.data.fold))
            check_config(changed)
        expanded[name] = dict(overrides), configs
    if not expanded:
        raise UserError("sweep() yields no variants.")
    if not any_folds:
        raise UserError(
            "--folds: no variant has a split that is made of folds. Only arrays have one: "
            f"--config.data.protocol=artist_kfold (or {', '.join(FOLD_PROTOCOLS[1:])})."
        )
    return [(name, *rest) for name, rest in expanded.items()]


def run_ablation(
    config: ConfigDict,
    variants: Iterable[Variant],
    workdir: str | Path,
    seeds: Sequence[int],
    *,
    progress: bool = True,
) -> list[Row]:
    """Prepares each variant's store if missing, trains it with every seed and writes one table.

    The table is `ablation.csv`, `ablation.md`, `variants.png` and `report.html`. The same call
    resumes: finished runs are not repeated. The measure is that of the validation split at the end
    of training, not of the best checkpoint: nothing is selected on it.

    Args:
      config: what the variants change.
      variants: names with overrides by dotted field: ("wide", {"model.filters": (512, 512, 512)}).
      workdir: gets a folder `<variant>/seed<seed>` for each run, and the table, after each variant.
      seeds: seeds of each variant.
      progress: draw progress bars.

    Raises:
      UserError: see `expand`; or the store has no validation split.
    """
    workdir = Path(workdir)
    rows: list[Row] = []
    measured: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, overrides, configs in expand(config, variants, seeds):
        _prepare(configs[0], progress)
        folder = workdir / name
        results = [_train(own, folder / f"seed{own.seed}", progress) for own in configs]
        values = [result.last for result in results if result.last is not None]
        if len(values) < len(results):
            raise UserError("an ablation needs a validation split, and the store has none.")
        rows.append(Row(name, overrides, **seeds_summary(values)))
        measured[name] = [(run.workdir.name, _last_measures(run.workdir)) for run in results]
        _write_table(workdir, [_seeds_cells(row, results[0].metric) for row in rows])
        title = f"{workdir.name}: the validation split at the end of training"
        summarise_variants(workdir, measured, title=title, synthetic=results[0].synthetic)
    return rows


def run_folds(
    config: ConfigDict,
    variants: Iterable[Variant],
    workdir: str | Path,
    seeds: Sequence[int],
    folds: int,
    *,
    steps: int = 0,
    progress: bool = True,
) -> list[FoldsRow]:
    """Trains each variant on every fold with every seed and writes a table over held-out clips.

    The table is `ablation.csv`, `ablation.md` and `variants.png`; it also has the held-out clips
    that leaked into the training (see `musicgenre.evaluation.audit`). As in `run_ablation`, nothing
    is selected on them, and the same call resumes.

    Args:
      config: what the variants change. Folds are made of its train and valid files.
      variants: names with overrides by dotted field.
      workdir: gets a folder `<variant>/fold<fold>/seed<seed>` for each run (without the fold for a
        split without folds), with the predictions for the held-out clips in `held_out.csv`.
      seeds: seeds on each fold.
      folds: how many, see `expand`.
      steps: length of each training to within half an epoch; 0 uses `config.epochs`.
      progress: draw progress bars.

    Raises:
      UserError: see `expand`; or the store has no single labels or no validation split.
    """
    workdir = Path(workdir)
    rows: list[FoldsRow] = []
    for name, overrides, configs in expand(config, variants, seeds, folds):
        results: list[TrainResult] = []
        audits: dict[Path, AuditResult] = {}
        held_out: list[list[dict[str, str]]] = []
        for changed in configs:
            _prepare(changed, progress)
            store = Store.open(store_path(changed))
            if store.task != "single_label" or "valid" not in store.splits:
                raise UserError(f"{store.path}: folds need one label per clip and a valid split.")
            if steps:
                each = math.ceil(len(store.indices("train")) / changed.batch_size)
                changed.epochs = changed.eval_every = max(1, round(steps / each))
            fold = f"fold{changed.data.fold}" if _in_folds(changed) else ""
            run = workdir / name / fold / f"seed{changed.seed}"
            results.append(_train(changed, run, progress))
            held_out.append(_held_out(run, store))
            if store.path not in audits:
                segments = changed.data.protocol == "segment_leaked"
                audits[store.path] = _audited(store, read_workdir(run), segments)
        rows.append(folds_row(name, overrides, results, list(audits.values()), held_out))
        _write_table(workdir, [_folds_cells(row) for row in rows], _FOLDS_NOTE)
        plain = [dataclasses.asdict(row) for row in rows]
        figure = comparison_plot(plain, "accuracy", percent=True, each="one training")
        save(figure, workdir / "variants.png", f"{workdir.name}: held-out clips")
    return rows


def _train(config: ConfigDict, workdir: Path, progress: bool) -> TrainResult:
    result = train(config, workdir, progress=progress)
    print(result.line(), flush=True)
    return result


def folds_row(
    name: str,
    overrides: dict[str, Any],
    results: Sequence[TrainResult],
    audits: Sequence[AuditResult],
    held_out: Sequence[Sequence[Mapping[str, str]]],
) -> FoldsRow:
    """Returns the row of a variant; `audits` has one for each fold, the others one per training."""
    correct = [[row["label"] == row["predicted"] for row in rows] for rows in held_out]
    right: dict[str, list[bool]] = {}
    groups: dict[str, str | None] = {}
    for rows, values in zip(held_out, correct, strict=True):
        for row, value in zip(rows, values, strict=True):
            right.setdefault(row["clip_id"], []).append(value)
            groups[row["clip_id"]] = row["group"] or None
    of_clips = np.array([np.mean(values) for values in right.values()])
    accuracies = [float(np.mean(values)) for values in correct]
    types = {"same clip": "same clip", "same content": "same clip"}
    types |= {"near-identical": "near-identical", f"same {audits[0].group_name}": "same artist"}
    leaks = dict.fromkeys(types.values(), 0)
    for finding in (finding for result in audits for finding in result.findings):
        leaks[types[finding.kind]] += finding.clips
    steps = [result.step for result in results]
    return FoldsRow(
        name=name,
        overrides=overrides,
        folds=len(audits),
        trainings=len(results),
        steps=(min(steps), max(steps)),
        trained=float(np.mean([result.trained for result in audits])),
        mean=float(of_clips.mean()),
        std=seeds_summary(accuracies)["std"],
        interval=bootstrap_mean(of_clips, list(groups.values())),
        values=accuracies,
        clips=len(right),
        leaks=leaks,
        unknown=sum(not artist_known(clip_id, group) for clip_id, group in groups.items()),
    )


def _changed(config: ConfigDict, name: str, overrides: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy with the overrides of the variant `name`."""
    changed = ConfigDict(config.to_dict())
    for field, value in overrides.items():
        *parents, leaf = field.split(".")
        try:
            functools.reduce(lambda node, parent: node[parent], parents, changed)[leaf] = value
        except KeyError:
            raise UserError(f"sweep(), {name!r}: config.{field} does not exist.") from None
    return changed


def _in_folds(config: ConfigDict) -> bool:
    return config.data.dataset == "arrays" and config.data.protocol in FOLD_PROTOCOLS


def _prepare(config: ConfigDict, progress: bool) -> None:
    """Prepares the store of a config if it is missing; variants of the front end have their own."""
    path = store_path(config)
    if (path / "manifest.json").is_file():
        return
    summary = prepare_store(
        load_dataset(dataset_options(config)),
        feature_spec(config),
        clip_layout(config),
        path,
        # Arrays are only copied, so other processes would not help.
        workers=1 if config.data.dataset == "arrays" else 0,
        min_seconds=config.data.min_seconds,
        array_layout=config.data.array_layout,
        progress=progress,
    )
    print("\n".join(summary.lines()), flush=True)


def _audited(store: Store, learnt: TrainedOn, segments: bool) -> AuditResult:
    """Compares the validation split with a run's training clips; segments count as their clip."""
    rows = {clip_id: i for i, clip_id in enumerate(store.clip_ids.tolist())}

    def side(clips: TrainedOn) -> Any:
        here = [i for i, clip_id in enumerate(clips.clip_ids) if clip_id in rows]
        found = fingerprints(store, np.array([rows[clips.clip_ids[i]] for i in here]))
        prints = np.zeros((len(clips), found.shape[1]), np.float32)  # zeros match nothing
        prints[here] = found
        ids = [whole_clip(clip_id) if segments else clip_id for clip_id in clips.clip_ids]
        return dataclasses.replace(clips.audit_side(), clip_ids=ids, fingerprints=prints)

    held_out = clips_of(store, store.indices("valid"))
    return audit(side(held_out), side(learnt), group_name=store.group_name)


def _held_out(workdir: Path, store: Store) -> list[dict[str, str]]:
    """Returns clip_id, group, label and predicted of each validation clip, from `held_out.csv`.

    The clips are scored and the file is written if it is missing.
    """
    path = workdir / "held_out.csv"
    if not path.is_file():
        found = evaluate_model(load_model(workdir), store, "valid", compare_spectrograms=False)
        names = found.label_names
        labels = [names[int(target)] for target in found.targets]
        predicted = [names[int(scores.argmax())] for scores in found.scores]
        groups = [group or "" for group in found.groups]
        rows = zip(found.clip_ids, groups, labels, predicted, strict=True)
        write_text(path, csv_text(["clip_id", "group", "label", "predicted"], rows))
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _last_measures(workdir: Path) -> dict[str, Any]:
    """Returns the validation measures of a run's last evaluation."""
    row = [row for row in read_rows(workdir) if "valid_loss" in row][-1]
    return {name[6:]: value for name, value in row.items() if name.startswith("valid_")}


# The columns of both tables for one row: names and cells of `ablation.csv` and of `ablation.md`.
_Cells = tuple[dict[str, Any], dict[str, Any]]


def _seeds_cells(row: Row, metric: str) -> _Cells:
    overrides, spread, mean, interval = _common_cells(row)
    both = {"variant": row.name, "overrides": overrides, "seeds": row.n}
    shown = {
        f"validation {measure_name(metric)}": mean,
        "95 % interval of the mean": interval or "one seed",
    }
    return both | {f"valid_{metric}_mean": row.mean} | spread, both | shown


def _folds_cells(row: FoldsRow) -> _Cells:
    overrides, spread, mean, interval = _common_cells(row)
    both = {"variant": row.name, "overrides": overrides}
    least, most = row.steps
    leaks = {f"{leak} in training": count for leak, count in row.leaks.items()}
    leaks["artist not known"] = row.unknown
    values = {"values": spread.pop("values")}  # the last column
    cells = {
        "folds": row.folds,
        "trainings": row.trainings,
        "steps_least": least,
        "steps_most": most,
        "trained_clips": row.trained,
        "held_out_clips": row.clips,
        "accuracy": row.mean,
    }
    shown = {
        "folds x seeds": f"{row.folds} x {row.trainings // row.folds}",
        "steps": least if least == most else f"{least} to {most}",
        "clips trained on": f"{row.trained:.0f}",
        "held out": row.clips,
        "accuracy": mean,
        "95 % interval": interval or "one artist",
    }
    fractions = {leak: f"{100 * count / row.clips:.1f} %" for leak, count in leaks.items()}
    return both | cells | spread | leaks | values, both | shown | fractions


def _common_cells(row: Row | FoldsRow) -> tuple[str, dict[str, Any], str, str]:
    """Returns the overrides, the spread (for CSV), and the mean and its interval (for Markdown)."""
    overrides = ", ".join(f"{field}={value}" for field, value in row.overrides.items()) or "none"
    low, high = row.interval or ("", "")
    spread = {"std": "" if row.std is None else row.std, "ci95_low": low, "ci95_high": high}
    spread["values"] = " ".join(f"{value:.6f}" for value in row.values)
    mean = f"{row.mean:.3f}" + ("" if row.std is None else f" ± {row.std:.3f}")
    return overrides, spread, mean, " to ".join(f"{limit:.3f}" for limit in row.interval or ())


def _write_table(workdir: Path, rows: Sequence[_Cells], note: str = "") -> None:
    """Writes `ablation.csv` and `ablation.md`."""
    cells, shown = zip(*rows, strict=True)
    text = csv_text(list(cells[0]), [[*row.values()] for row in cells])
    write_text(workdir / "ablation.csv", text)
    table = markdown_table(list(shown[0]), [[*row.values()] for row in shown])
    write_text(workdir / "ablation.md", f"{table}\n{note}")
