"""Variants of one config, each with several seeds and perhaps on several folds, and one table of what came out."""

import csv
import dataclasses
import io
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
from musicgenre.evaluation.audit import AuditResult, AuditSide, audit
from musicgenre.evaluation.intervals import bootstrap_mean, seeds_summary
from musicgenre.evaluation.plots import folds_plot, measure_name
from musicgenre.evaluation.report import summarise_variants
from musicgenre.files import write_text
from musicgenre.runs.model import load_model
from musicgenre.runs.provenance import TrainedOn, fingerprints, read_workdir
from musicgenre.store.prepare import prepare_store
from musicgenre.store.store import Store
from musicgenre.studies.evaluate import evaluate_model
from musicgenre.training.fit import TrainResult, train
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


@dataclasses.dataclass(frozen=True)
class FoldsRow:
    """One variant over its folds: how many of the clips that were held out were right, and what the training had of them.

    Attributes:
      name: of the variant.
      overrides: what it changes.
      folds: 1 for a split that has none.
      trainings: folds x seeds.
      steps: of the shortest and the longest training.
      trained: clips (or segments) trained on, a fold, the mean.
      mean: accuracy over all clips that were held out; where a clip was in several trainings it counts as their mean.
      std: deviation of the trainings' accuracies; None for one training.
      interval: 95 % interval of `mean`, resampling artists (a clip where none is known); None for a single artist.
      values: accuracy of each training.
      clips: clips (or segments) that were held out in some fold.
      leaks: how many of them have the same clip, a near-identical one, or another one by their artist in the training they
        were held out of, by these three names.
      unknown: how many of them are by an artist that is not known.
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
    """Returns (name, overrides, its checked configs) for each variant, before anything is trained.

    Args:
      config: what the variants change.
      variants: names with overrides by dotted field.
      seeds: without folds, a config for each.
      folds: a config for each of so many folds and each seed, one fold after the other. A variant whose split has no folds is
        given so many times the seeds instead, so that every variant is trained equally often. 0 leaves the folds alone.

    Raises:
      UserError: a name twice or not fit for a folder, an override that the config does not take, or folds where no variant has
        any, or all of them would be in one store.
    """
    expanded = []
    names: set[str] = set()
    for name, overrides in variants:
        if name in names or not name or set(name) & set('/\\:*?"<>|'):
            raise UserError(
                f"sweep(): the name {name!r} is used twice, empty or not fit for a folder."
            )
        names.add(name)
        base = _changed(config, name, overrides)
        runs: list[dict[str, Any]] = [{"seed": seed} for seed in seeds]
        if folds and _in_folds(base):
            if base.data.store:
                raise UserError(
                    "each fold needs a store of its own: leave --config.data.store empty, or set stores_root instead."
                )
            runs = [
                {"data.folds": folds, "data.fold": fold, "seed": seed}
                for fold in range(folds)
                for seed in seeds
            ]
        elif folds:
            runs = [{"seed": seeds[0] + i} for i in range(folds * len(seeds))]
        configs = [_changed(base, name, run) for run in runs]
        for changed in configs:
            # Each run may start from another run of its seed, or of its fold.
            for field, value in (("seed", changed.seed), ("fold", changed.data.fold)):
                changed.init_from = changed.init_from.replace("{" + field + "}", str(value))
            check_config(changed)
        expanded.append((name, dict(overrides), configs))
    if not expanded:
        raise UserError("sweep() yields no variants.")
    if folds and not any(_in_folds(configs[0]) for _, _, configs in expanded):
        raise UserError(
            "--folds: no variant has a split that is made of folds. For arrays set --config.data.protocol=artist_kfold "
            f"(or {', '.join(FOLD_PROTOCOLS[1:])}); other data sets have no such protocol."
        )
    return expanded


def _changed(config: ConfigDict, name: str, overrides: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy with the overrides of the variant `name`."""
    changed = ConfigDict(config.to_dict())
    for field, value in overrides.items():
        node = changed
        *parents, leaf = field.split(".")
        for parent in parents:
            if parent not in node:
                raise UserError(f"sweep(), {name!r}: config.{field} does not exist.")
            node = node[parent]
        node[leaf] = value
    return changed


def _in_folds(config: ConfigDict) -> bool:
    return config.data.dataset == "arrays" and config.data.protocol in FOLD_PROTOCOLS


def run_ablation(
    config: ConfigDict,
    variants: Iterable[Variant],
    workdir: str | Path,
    seeds: Sequence[int],
    *,
    progress: bool = True,
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
        measured[name] = [
            (result.workdir.name, _last_measures(result.workdir)) for result in results
        ]
        write_table(workdir, rows, results[0].metric)
        summarise_variants(
            workdir,
            measured,
            title=f"{workdir.name}: the validation split at the end of training",
            synthetic=results[0].synthetic,
        )
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
    """Trains each variant on every fold with every seed, and writes one table over the clips that were held out.

    The table is `ablation.csv`, `ablation.md` and `variants.png`; beside each accuracy stands what the training had of the clips
    that were held out (see `musicgenre.evaluation.audit`). As in `run_ablation`, nothing is selected on them, and the same call
    resumes.

    Args:
      config: what the variants change. Folds are made of its train and valid files: with a train file alone, of that.
      variants: names with overrides by dotted field.
      workdir: gets a folder `<variant>/fold<fold>/seed<seed>` for each run (without the fold where there are none), with the
        predictions for the clips that were held out in `held_out.csv`.
      seeds: seeds on each fold.
      folds: how many, see `expand`.
      steps: length of each training to within half an epoch, whatever its number of clips; 0 goes by `config.epochs`.
      progress: draw progress bars.
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
                raise UserError(
                    f"{store.path}: folds are for clips with one label each and need a validation split."
                )
            if steps:
                each = math.ceil(len(store.indices("train")) / changed.batch_size)
                changed.epochs = changed.eval_every = max(1, round(steps / each))
            fold = f"fold{changed.data.fold}" if _in_folds(changed) else ""
            results.append(
                train(changed, workdir / name / fold / f"seed{changed.seed}", progress=progress)
            )
            print(results[-1].line(), flush=True)
            held_out.append(_held_out(results[-1].workdir, store))
            if store.path not in audits:
                learnt = read_workdir(results[-1].workdir)
                audits[store.path] = _audited(
                    store, learnt, segments=changed.data.protocol == "segment_leaked"
                )
        rows.append(folds_row(name, overrides, results, list(audits.values()), held_out))
        write_folds_table(workdir, rows)
        folds_plot(
            workdir / "variants.png",
            [dataclasses.asdict(row) for row in rows],
            f"{workdir.name}: clips that were held out",
        )
    return rows


def _audited(store: Store, learnt: TrainedOn, segments: bool) -> AuditResult:
    """Compares the validation split with all that a run has learnt from; segments of one clip count as the same clip.

    Args:
      store: the run's.
      learnt: what the run was trained on; clips that are not in the store have no spectrogram.
      segments: the clips are segments.
    """
    place = {clip_id: i for i, clip_id in enumerate(store.clip_ids.tolist())}

    def side(
        ids: Sequence[str], hashes: Sequence[str | None], groups: Sequence[str | None]
    ) -> AuditSide:
        here = [row for row, clip_id in enumerate(ids) if clip_id in place]
        found = fingerprints(store, np.array([place[ids[row]] for row in here]))
        prints = np.zeros((len(ids), found.shape[1]), np.float32)  # zeros are like nothing
        prints[here] = found
        return AuditSide(
            [whole_clip(clip_id) for clip_id in ids] if segments else ids, hashes, groups, prints
        )

    valid = store.indices("valid")
    held_out = side(
        store.clip_ids[valid].tolist(),
        store.hashes[valid].tolist(),
        [store.groups[i] for i in valid],
    )
    trained = side(learnt.clip_ids, learnt.hashes, learnt.groups)
    return audit(held_out, trained, group_name=store.group_name)


def _held_out(workdir: Path, store: Store) -> list[dict[str, str]]:
    """Returns clip_id, group, label and predicted of each validation clip, from `held_out.csv` or scored now."""
    place = workdir / "held_out.csv"
    if not place.is_file():
        evaluation = evaluate_model(load_model(workdir), store, "valid", compare_spectrograms=False)
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["clip_id", "group", "label", "predicted"])
        for clip_id, group, target, scores in zip(
            evaluation.clip_ids,
            evaluation.groups,
            evaluation.targets,
            evaluation.scores,
            strict=True,
        ):
            names = evaluation.label_names
            writer.writerow([clip_id, group or "", names[int(target)], names[int(scores.argmax())]])
        write_text(place, buffer.getvalue())
    with open(place, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def folds_row(
    name: str,
    overrides: dict[str, Any],
    results: Sequence[TrainResult],
    audits: Sequence[AuditResult],
    held_out: Sequence[Sequence[Mapping[str, str]]],
) -> FoldsRow:
    """Puts the trainings of a variant together; `audits` has one for each fold, the others one for each training."""
    right: dict[str, list[bool]] = {}
    groups: dict[str, str | None] = {}
    for rows in held_out:
        for row in rows:
            right.setdefault(row["clip_id"], []).append(row["label"] == row["predicted"])
            groups[row["clip_id"]] = row["group"] or None
    shares = np.array([np.mean(values) for values in right.values()])
    accuracies = [
        float(np.mean([row["label"] == row["predicted"] for row in rows])) for rows in held_out
    ]

    def leaked(*kinds: str) -> int:
        return sum(
            finding.clips
            for result in audits
            for finding in result.findings
            if finding.kind in kinds
        )

    return FoldsRow(
        name=name,
        overrides=overrides,
        folds=len(audits),
        trainings=len(results),
        steps=(min(result.step for result in results), max(result.step for result in results)),
        trained=float(np.mean([result.trained for result in audits])),
        mean=float(shares.mean()),
        std=seeds_summary(accuracies)["std"],
        interval=bootstrap_mean(shares, list(groups.values())),
        values=accuracies,
        clips=len(right),
        leaks={
            "same clip": leaked("same clip", "same content"),
            "near-identical": leaked("near-identical"),
            "same artist": leaked(f"same {audits[0].group_name}"),
        },
        unknown=sum(not artist_known(clip_id, group) for clip_id, group in groups.items()),
    )


def write_folds_table(workdir: Path, rows: Sequence[FoldsRow]) -> None:
    """Writes the rows as CSV and Markdown."""
    kinds = list(rows[0].leaks)
    buffer = io.StringIO()
    columns = [_folds_cells(row) for row in rows]
    writer = csv.DictWriter(buffer, list(columns[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(columns)
    lines = [
        "| variant | overrides | folds x seeds | steps | clips trained on | held out | accuracy | 95 % interval | "
        + " | ".join(f"{kind} in training" for kind in kinds)
        + " | artist not known |",
        "| --- " * (9 + len(kinds)) + "|",
    ]
    for row in rows:
        least, most = row.steps
        spread = "" if row.std is None else f" ± {row.std:.3f}"
        interval = (
            "one artist"
            if row.interval is None
            else f"{row.interval[0]:.3f} to {row.interval[1]:.3f}"
        )
        shares = " | ".join(
            f"{100 * count / row.clips:.1f} %" for count in [*row.leaks.values(), row.unknown]
        )
        lines.append(
            f"| {row.name} | {_changes(row.overrides).replace('|', ' ')} | {row.folds} x {row.trainings // row.folds} "
            f"| {least if least == most else f'{least} to {most}'} | {row.trained:.0f} | {row.clips} "
            f"| {row.mean:.3f}{spread} | {interval} | {shares} |"
        )
    lines += [
        "",
        "Accuracy over all clips that were held out, each counted once (the mean where several trainings held it out), ± the",
        "deviation of the trainings. The interval resamples artists, with the trained networks as they are. After it: the share",
        "of these clips that have the same clip, a near-identical one, or another by their artist in the training that they were",
        "held out of.",
    ]
    write_text(workdir / "ablation.csv", buffer.getvalue())
    write_text(workdir / "ablation.md", "\n".join(lines) + "\n")


def _folds_cells(row: FoldsRow) -> dict[str, Any]:
    """Returns a row of the CSV file."""
    low, high = row.interval or ("", "")
    return {
        "variant": row.name,
        "overrides": _changes(row.overrides),
        "folds": row.folds,
        "trainings": row.trainings,
        "steps_least": row.steps[0],
        "steps_most": row.steps[1],
        "trained_clips": row.trained,
        "held_out_clips": row.clips,
        "accuracy": row.mean,
        "std": "" if row.std is None else row.std,
        "ci95_low": low,
        "ci95_high": high,
        **{f"{kind} in training": count for kind, count in row.leaks.items()},
        "artist not known": row.unknown,
        "values": " ".join(f"{value:.6f}" for value in row.values),
    }


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
        workers=1
        if config.data.dataset == "arrays"
        else 0,  # arrays are only copied: other processes start no sooner
        min_seconds=config.data.min_seconds,
        array_layout=config.data.array_layout,
        progress=progress,
    )
    print("\n".join(summary.lines()), flush=True)


def _last_measures(workdir: Path) -> dict[str, Any]:
    """Returns the validation measures of a run's last evaluation."""
    row = [row for row in read_rows(workdir) if "valid_loss" in row][-1]
    return {
        name.removeprefix("valid_"): value
        for name, value in row.items()
        if name.startswith("valid_")
    }


def write_table(workdir: Path, rows: Sequence[Row], metric: str) -> None:
    """Writes the rows as CSV and Markdown."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            "variant",
            "overrides",
            "seeds",
            f"valid_{metric}_mean",
            "std",
            "ci95_low",
            "ci95_high",
            "values",
        ]
    )
    lines = [
        f"| variant | overrides | seeds | validation {measure_name(metric)} | 95 % interval of the mean |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        changes = _changes(row.overrides)
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
        lines.append(
            f"| {row.name} | {changes.replace('|', ' ')} | {row.n} | {row.mean:.3f}{spread} | {interval} |"
        )
    write_text(workdir / "ablation.csv", buffer.getvalue())
    write_text(workdir / "ablation.md", "\n".join(lines) + "\n")


def _changes(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"{field}={value}" for field, value in overrides.items()) or "none"
