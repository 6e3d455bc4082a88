"""Clips to a spectrogram store: parallel, resumable, and nothing skipped without saying so."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from musicgenre.audio.decode import load_audio
from musicgenre.audio.features import FeatureSpec, compute_features, mfcc_from_db
from musicgenre.datasets import arrays
from musicgenre.datasets.base import Clip, Dataset
from musicgenre.errors import UserError
from musicgenre.files import read_json, replacing, sha256, write_json
from musicgenre.pipeline.store import SCHEMA, ClipLayout, shard_problem

Item = TypeVar("Item")
Result = TypeVar("Result")
# Clips of one shard: at most this much work is lost when the machine stops.
CLIPS_PER_SHARD = 128


@dataclasses.dataclass(frozen=True)
class ClipFeatures:
    """What one clip became: features float16 `[frames, bands]`, its real frames, and its source's SHA-256."""

    features: np.ndarray
    length: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class PrepareSummary:
    """What a run of `prepare_store` did: the store, clips in it, computed now, reused, and skipped by reason."""

    store: Path
    clips: int
    computed: int
    reused: int
    skipped: list[dict[str, str]]
    splits: dict[str, int]

    def lines(self) -> list[str]:
        """The summary for people, one line an item."""
        splits = ", ".join(f"{name} {count}" for name, count in self.splits.items())
        lines = [
            f"{self.store}: {self.clips} clips ({splits}); {self.computed} computed, {self.reused} already there, "
            f"{len(self.skipped)} skipped."
        ]
        lines += [f"  skipped {entry['clip_id']}: {entry['reason']}" for entry in self.skipped[:20]]
        if len(self.skipped) > 20:
            lines.append(f"  ... and {len(self.skipped) - 20} more: see {self.store / 'manifest.json'}")
        return lines


def process_clip(clip: Clip, spec: FeatureSpec, layout: ClipLayout, array_layout: str, min_seconds: float) -> ClipFeatures | str:
    """Turns one clip into the features that the store keeps, or says why that cannot be.

    The same function serves every way of running over a data set, so that all of them give the same bytes.

    Returns:
      The features, or the reason for skipping the clip.
    """
    try:
        if clip.row is None:
            digest = sha256(clip.path)
            samples = load_audio(clip.path, spec.sample_rate, min_seconds=min_seconds).samples
            features = compute_features(layout.cut(samples, spec), spec)
        else:
            features = arrays.open_array_file(clip.path, array_layout).spectrogram(clip.row)
            digest = hashlib.sha256(features.tobytes()).hexdigest()
            if spec.kind == "mfcc":
                features = mfcc_from_db(features, spec.n_mfcc)
            if features.shape[1] != spec.bands:
                raise UserError(f"{clip.path}: {features.shape[1]} bands where features.n_mels says {spec.bands}.")
    except (UserError, OSError) as error:
        return str(error)
    fitted, length = layout.fit(features)
    return ClipFeatures(fitted.astype(np.float16), length, digest)


def prepare_store(
    dataset: Dataset,
    spec: FeatureSpec,
    layout: ClipLayout,
    path: str | Path,
    *,
    workers: int = 0,
    min_seconds: float = 1.0,
    array_layout: str = "mel_time",
    progress: bool = True,
) -> PrepareSummary:
    """Writes the store of a data set, or brings an existing one up to date.

    Clips whose source is unchanged (same size and time of change) are not computed again; damaged shards are. A
    run that was stopped in the middle goes on from its last whole shard.

    Args:
      dataset: the clips.
      spec: the front end.
      layout: frames per clip, padding and excerpt.
      path: the store's folder; made if missing.
      workers: processes; 0 means one for each core, 1 works in this process.
      min_seconds: shorter sound files are skipped.
      array_layout: order of the axes of array files, "mel_time" or "time_mel".
      progress: draw a progress bar.

    Raises:
      UserError: the folder holds a store made with another front end or layout, or of another data set, or
        something that is no store; or no clip of some split could be used.
    """
    path = Path(path)
    shards = path / "shards"
    made_with = {"schema": SCHEMA, "features": spec.to_dict(), "layout": dataclasses.asdict(layout)}
    _check_folder(path, dataset)
    known, records = _read_shards(shards, made_with)

    sources = {clip.clip_id: _source(clip) for clip in dataset.clips}
    reusable = {
        clip.clip_id for clip in dataset.clips if clip.clip_id in known and known[clip.clip_id]["source"] == sources[clip.clip_id]
    }
    todo = [clip for clip in dataset.clips if clip.clip_id not in reusable]

    bar = tqdm(total=len(dataset.clips), initial=len(reusable), unit="clip", desc="prepare", disable=not progress or not todo)
    process = _Processor(spec, layout, array_layout, min_seconds)
    with bar, contextlib.closing(_ordered_map(process, todo, workers)) as mapped:
        number = max((int(Path(record["file"]).stem) for record in records), default=-1) + 1
        for batch in _batched(zip(todo, _counted(mapped, bar), strict=True), CLIPS_PER_SHARD):
            record = _write_shard(shards, number, batch, sources, made_with)
            records.append(record)
            known.update(_entries(record))
            number += 1
    skipped = [dataclasses.asdict(entry) for entry in dataset.skipped]
    manifest = _manifest(dataset, known, records, made_with, skipped)
    _write_if_changed(path / "manifest.json", manifest)
    return PrepareSummary(
        path,
        len(manifest["clips"]["clip_id"]),
        len(todo),
        len(reusable),
        manifest["skipped"],
        dict(sorted(Counter(manifest["clips"]["split"]).items(), key=lambda item: item[0])),
    )


def _check_folder(path: Path, dataset: Dataset) -> None:
    """Refuses a folder that holds something else than a store of this data set."""
    if path.is_file():
        raise UserError(f"{path}: is a file; a store needs a folder.")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / "shards").is_dir():
        raise UserError(f"{path}: the folder is not empty and holds no store. Choose another with --config.data.store=...")
    if (path / "manifest.json").is_file():
        there = read_json(path / "manifest.json", "store manifest").get("dataset", {})
        for field, value in _describe(dataset).items():
            if there.get(field) != value:
                raise UserError(
                    f"{path}: this store is of {field} {there.get(field)!r}, not {value!r}. "
                    "Choose another folder with --config.data.store=..."
                )


def _describe(dataset: Dataset) -> dict[str, Any]:
    """What a manifest says of its data set."""
    return {
        "name": dataset.name,
        "root": os.path.abspath(dataset.root),
        "protocol": dataset.protocol,
        "task": dataset.task,
        "synthetic": dataset.synthetic,
    }


def _read_shards(folder: Path, made_with: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Reads what earlier runs have written: entries by clip id, and the records of the sound shards."""
    known: dict[str, dict[str, Any]] = {}
    records = []
    for sidecar in sorted(folder.glob("*.json")):
        record = read_json(sidecar, "shard record")
        for field, value in made_with.items():
            if record.get(field) != value:
                raise UserError(
                    f"{folder.parent}: this store was made with other {field} ({record.get(field)}), not "
                    f"{value}. A store never mixes them: choose another with --config.data.store=..."
                )
        if record["rows"] and shard_problem(folder, record, full=True):
            # Its clips count as missing, so they are computed again into a new shard.
            sidecar.unlink()
            (folder / record["file"]).unlink(missing_ok=True)
            continue
        records.append(record)
        known.update(_entries(record))
    return known, records


def _entries(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns a shard's clips by id, each with the file it lies in."""
    return {entry["clip_id"]: entry | {"file": record["file"]} for entry in record["clips"]}


def _source(clip: Clip) -> list[Any]:
    """What tells a changed source from an unchanged one without reading it."""
    try:
        status = clip.path.stat()
    except OSError:
        return [os.path.abspath(clip.path), 0, 0, clip.row]
    return [os.path.abspath(clip.path), status.st_size, status.st_mtime_ns, clip.row]


def _write_shard(
    folder: Path,
    number: int,
    batch: list[tuple[Clip, ClipFeatures | str]],
    sources: dict[str, list[Any]],
    made_with: dict[str, Any],
) -> dict[str, Any]:
    """Writes one shard and then its record; without the record the shard does not count."""
    file = folder / f"{number:05d}.npy"
    entries: list[dict[str, Any]] = []
    rows: list[np.ndarray] = []
    for clip, result in batch:
        entry: dict[str, Any] = {"clip_id": clip.clip_id, "path": str(clip.path), "source": sources[clip.clip_id]}
        if isinstance(result, str):
            entry["skipped"] = result
        else:
            entry |= {"row": len(rows), "length": result.length, "sha256": result.sha256}
            rows.append(result.features)
        entries.append(entry)
    record: dict[str, Any] = made_with | {"file": file.name, "rows": len(rows), "bytes": 0, "sha256": "", "clips": entries}
    if rows:
        with replacing(file) as temporary, open(temporary, "wb") as handle:
            np.save(handle, np.stack(rows), allow_pickle=False)
        record |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_json(file.with_suffix(".json"), record)
    return record


def _manifest(
    dataset: Dataset,
    known: dict[str, dict[str, Any]],
    records: list[dict[str, Any]],
    made_with: dict[str, Any],
    skipped: list[dict[str, str]],
) -> dict[str, Any]:
    """Puts the data set's view of the shards together.

    Raises:
      UserError: a split that the data set has is left without a single usable clip.
    """
    numbers = {record["file"]: i for i, record in enumerate(r for r in records if r["rows"])}
    columns: dict[str, list[Any]] = {
        name: [] for name in ("clip_id", "path", "labels", "split", "group", "shard", "row", "length", "sha256")
    }
    for clip in dataset.clips:
        entry = known[clip.clip_id]
        if "skipped" in entry:
            skipped.append({"clip_id": clip.clip_id, "path": str(clip.path), "reason": entry["skipped"]})
            continue
        values = {
            "clip_id": clip.clip_id,
            "path": str(clip.path),
            "labels": list(clip.labels),
            "split": clip.split,
            "group": clip.group,
            "shard": numbers[entry["file"]],
        } | {k: entry[k] for k in ("row", "length", "sha256")}
        for name, column in columns.items():
            column.append(values[name])
    for split in sorted({clip.split for clip in dataset.clips}):
        if split not in columns["split"]:
            first = next(s for s in skipped if s["clip_id"] in {c.clip_id for c in dataset.clips if c.split == split})
            raise UserError(
                f"{dataset.root}: no clip of the split {split!r} could be used; the first was skipped because "
                f"of: {first['reason']}"
            )
    shards = [{k: record[k] for k in ("file", "rows", "bytes", "sha256")} for record in records if record["rows"]]
    return made_with | {
        "dataset": _describe(dataset),
        "label_names": list(dataset.label_names),
        "shards": shards,
        "clips": columns,
        "skipped": skipped,
    }


def _write_if_changed(path: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest unless the same is there already, so that a second run changes no file."""
    if path.is_file() and path.read_text(encoding="utf-8") == json.dumps(manifest, indent=1, ensure_ascii=False) + "\n":
        return
    write_json(path, manifest)


@dataclasses.dataclass(frozen=True)
class _Processor:
    """`process_clip` with its settings, in a form that travels to worker processes."""

    spec: FeatureSpec
    layout: ClipLayout
    array_layout: str
    min_seconds: float

    def __call__(self, clip: Clip) -> ClipFeatures | str:
        return process_clip(clip, self.spec, self.layout, self.array_layout, self.min_seconds)


def _counted(items: Iterable[Item], bar: Any) -> Iterator[Item]:
    """Yields the items and moves the bar by one for each."""
    for item in items:
        bar.update()
        yield item


def _batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields lists of up to `size` items."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _ordered_map(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Generator[Result, None, None]:
    """Yields `function(item)` in order, from worker processes, with a bounded number of results waiting.

    Raises:
      UserError: a worker died; the message names the item it may have died of.
    """
    workers = min(workers or os.cpu_count() or 1, len(items) // 4)
    if workers <= 1:
        yield from map(function, items)
        return
    with _one_thread_per_process(), ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        queue = iter(items)
        try:
            for item in itertools.islice(queue, 8 * workers):
                waiting.append((item, pool.submit(function, item)))
            while waiting:
                item, future = waiting.popleft()
                result = future.result()
                for following in itertools.islice(queue, 1):
                    waiting.append((following, pool.submit(function, following)))
                yield result
        except BrokenProcessPool as error:
            raise UserError(
                f"a worker process died at or soon after {item}; what was finished is kept. Run again with "
                "--workers=1 to see where."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _one_thread_per_process() -> Iterator[None]:
    """Keeps each worker's matrix products on its own core: two workers with two threads run 3-5 times slower."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
