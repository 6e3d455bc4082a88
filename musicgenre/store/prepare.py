"""Clips to a spectrogram store: parallel, resumable, with every skipped clip reported."""

import contextlib
import dataclasses
import hashlib
import itertools
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from musicgenre.audio.decode import load_audio
from musicgenre.audio.features import FeatureSpec, mfcc_from_db
from musicgenre.audio.layout import ClipLayout
from musicgenre.datasets import arrays
from musicgenre.datasets.base import Clip, Dataset, Skipped
from musicgenre.errors import UserError
from musicgenre.files import read_json, replacing, sha256, write_json
from musicgenre.store.store import SHARD_SCHEMA, file_problem, make_columns, write_manifest

# Clips per shard: at most this much work is lost when the machine stops.
CLIPS_PER_SHARD = 128
# Clips per call of a worker process.
_CLIPS_PER_CALL = 4
# States of a clip in a plan: unknown, computed from a changed source, computed, skipped.
_NEW, _STALE, _COMPUTED, _SKIPPED = range(4)
_ANOTHER = "Choose another folder with --config.data.store=..."
# What a plan keeps of each clip, 45 bytes.
_ROW = np.dtype(
    [("state", "u1"), ("shard", "i4"), ("row", "i4"), ("length", "i4"), ("sha256", "u1", 32)]
)


@dataclasses.dataclass(frozen=True)
class ClipFeatures:
    """A clip's features, float16 `[frames, bands]`, its real frames, and its source's SHA-256."""

    features: np.ndarray
    length: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class PrepareSummary:
    """The numbers of clips in the store, computed and reused by `prepare_store`; skipped clips."""

    store: Path
    clips: int
    computed: int
    reused: int
    skipped: list[dict[str, str]]
    splits: dict[str, int]

    def lines(self) -> list[str]:
        """Returns the summary for people."""
        splits = ", ".join(f"{name} {count}" for name, count in self.splits.items())
        counts = (
            f"{self.computed} computed, {self.reused} already there, {len(self.skipped)} skipped"
        )
        lines = [f"{self.store}: {self.clips} clips ({splits}); {counts}."]
        lines += [f"  skipped {entry['clip_id']}: {entry['reason']}" for entry in self.skipped[:20]]
        if (more := len(self.skipped) - 20) > 0:
            lines.append(f"  ... and {more} more: see {self.store}/skipped-*.jsonl")
        return lines


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a clip becomes a row of a store. Every way of running over a data set calls it.

    Attributes:
      spec: the front end.
      layout: frames per clip, padding and excerpt.
      array_layout: order of the axes of array files, "mel_time" or "time_mel".
      min_seconds: shorter sound files are skipped.
    """

    spec: FeatureSpec
    layout: ClipLayout
    array_layout: str = "mel_time"
    min_seconds: float = 1.0

    def __call__(self, clip: Clip) -> ClipFeatures | str:
        """Returns a clip's features, or the reason for skipping it."""
        try:
            if clip.row is not None:
                features, digest = self._of_array(clip.path, clip.row)
            else:
                digest, spec = sha256(clip.path), self.spec
                rate, resampler, shortest = spec.sample_rate, spec.resampler, self.min_seconds
                samples = load_audio(clip.path, rate, min_seconds=shortest, resampler=resampler)[0]
                features = self.layout.features(samples, spec)
        except (UserError, OSError) as error:
            return str(error)
        fitted, length = self.layout.fit(features)
        return ClipFeatures(fitted.astype(np.float16), length, digest)

    def _of_array(self, path: Path, row: int) -> tuple[np.ndarray, str]:
        spec = self.spec
        for field, usable in (("kind", ("logmel", "mfcc")), ("compression", ("db",))):
            if (value := getattr(spec, field)) not in usable:
                made = f"features.{field}={value!r} cannot be made"
                raise UserError(f"{path}: holds log-mel spectrograms in dB, from which {made}.")
        features = arrays.open_array_file(path, self.array_layout).spectrogram(row)
        digest = hashlib.sha256(features.tobytes()).hexdigest()
        if spec.kind == "mfcc":
            features = mfcc_from_db(features, spec.n_mfcc)
        if (bands := features.shape[1]) != spec.bands:
            raise UserError(f"{path}: {bands} bands, but features.n_mels is {spec.bands}.")
        return features, digest

    @property
    def made_with(self) -> dict[str, Any]:
        """How a shard was made, in its record; a store never mixes two of these."""
        return {
            "schema": SHARD_SCHEMA,
            "features": self.spec.to_dict(),
            "layout": dataclasses.asdict(self.layout),
        }


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """The clips of one shard.

    Attributes:
      number: the shard's number, which names its files.
      clips: in the order of the shard's rows.
      sources: for each clip, absolute path, size, modification time and row, to detect changes.
    """

    number: int
    clips: tuple[Clip, ...]
    sources: tuple[list[Any], ...]


class StorePlan:
    """What is missing from a store; the same for every way of running over the clips.

    Attributes:
      dataset: the clips.
      recipe: how they become rows.
      path: the store's folder.
      shards: the folder of its shards.
      todo: clips to compute, in the data set's order.
      reusable: number of clips that are already computed.
    """

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        path: str | Path,
        *,
        verify: bool = True,
        progress: bool = False,
    ) -> None:
        """Reads the existing shards, with a progress bar if this takes more than a moment.

        See `prepare_store` for the arguments and errors.
        """
        self.dataset, self.recipe, self.path = dataset, recipe, Path(path)
        self.shards = self.path / "shards"
        _check_folder(self.path, self._description)
        count = len(dataset.clips)
        self._position = {clip.clip_id: i for i, clip in enumerate(dataset.clips)}
        # Taken before any file is read: the next run recomputes a file that changes meanwhile.
        status = itertools.chain.from_iterable(map(_status, dataset.clips))
        self._status = np.fromiter(status, np.int64).reshape(count, 2)
        self._rows = np.zeros(count, _ROW)
        self._reasons: dict[int, str] = {}
        # Rows, bytes and SHA-256 of each shard by number.
        self._shards: dict[int, tuple[int, int, str]] = {}
        for record in _read_shards(self.shards, recipe.made_with, verify, progress):
            self.add(record)
        self._todo = np.flatnonzero(self._rows["state"] <= _STALE)
        self.todo = [dataset.clips[int(i)] for i in self._todo]
        self.reusable = count - len(self.todo)

    def tasks(self, clips_per_shard: int, *, fill_gaps: bool = False) -> Iterator[ShardTask]:
        """Yields the shards to write, in order; always the same ones until one is added.

        Args:
          clips_per_shard: clips of each but the last.
          fill_gaps: use free numbers below the highest first, which runs that finish shards in any
            order leave when they die; the store then equals that of an undisturbed run. If the
            source of a clip has changed, numbers continue from the highest instead, because the
            later of a clip's entries is the valid one.
        """
        fill_gaps = fill_gaps and not (self._rows["state"] == _STALE).any()
        taken = set(self._shards)
        first = 0 if fill_gaps else max(taken, default=-1) + 1
        numbers = (number for number in itertools.count(first) if number not in taken)
        for start in range(0, len(self._todo), clips_per_shard):
            chosen = self._todo[start : start + clips_per_shard].tolist()
            clips = tuple(self.dataset.clips[i] for i in chosen)
            yield ShardTask(next(numbers), clips, tuple(self._source(i) for i in chosen))

    def add(self, record: dict[str, Any]) -> None:
        """Adds the record of a written shard; the last of a clip's entries is valid."""
        number = int(Path(record["file"]).stem)
        self._shards[number] = (record["rows"], record["bytes"], record["sha256"])
        for entry in record["clips"]:
            i = self._position.get(entry["clip_id"])
            if i is None:
                continue
            if entry["source"] != self._source(i):
                self._rows["state"][i] = _STALE
            elif "skipped" in entry:
                self._rows["state"][i] = _SKIPPED
                self._reasons[i] = entry["skipped"]
            else:
                digest = np.frombuffer(bytes.fromhex(entry["sha256"]), np.uint8)
                self._rows[i] = _COMPUTED, number, entry["row"], entry["length"], digest

    def finish(self) -> PrepareSummary:
        """Writes the manifest after every task's record was added, and returns the summary.

        Raises:
          UserError: no clip of some split could be used.
        """
        dataset, clips = self.dataset, self.dataset.clips
        unusable = np.flatnonzero(self._rows["state"] == _SKIPPED).tolist()
        lost = [Skipped(clips[i].clip_id, str(clips[i].path), self._reasons[i]) for i in unusable]
        skipped = [dataclasses.asdict(entry) for entry in [*dataset.skipped, *lost]]
        kept = np.flatnonzero(self._rows["state"] == _COMPUTED)
        used, rows = [clips[int(i)] for i in kept], self._rows[kept]
        splits = dict(sorted(Counter(clip.split for clip in used).items()))
        for i in unusable:
            if (split := clips[i].split) not in splits:
                raise UserError(
                    f"{dataset.root}: no clip of the split {split!r} could be used; the first was "
                    f"skipped because of: {self._reasons[i]}"
                )
        # Shards with only skipped clips have a record and no file.
        numbers = sorted(number for number, (size, _, _) in self._shards.items() if size)
        rows["shard"] = np.searchsorted(numbers, rows["shard"])
        shards = [(number, *self._shards[number]) for number in numbers]
        columns = make_columns(used, dataset.label_names, tuple(splits), rows, shards)
        if dataset.task == "regression":
            columns["values"] = np.array([clip.values for clip in used], np.float32)
        header = self.recipe.made_with | {
            "dataset": self._description,
            "label_names": list(dataset.label_names),
            "splits": splits,
        }
        write_manifest(self.path, header, columns, skipped)
        return PrepareSummary(self.path, len(used), len(self.todo), self.reusable, skipped, splits)

    @property
    def _description(self) -> dict[str, Any]:
        fields = ("name", "root", "protocol", "task", "synthetic", "group_name")
        described = {field: getattr(self.dataset, field) for field in fields}
        return described | {"root": os.path.abspath(self.dataset.root)}

    def _source(self, i: int) -> list[Any]:
        """Returns a clip's entry of `ShardTask.sources`."""
        clip = self.dataset.clips[i]
        return [os.path.abspath(clip.path), *self._status[i].tolist(), clip.row]


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
    verify: bool = True,
) -> PrepareSummary:
    """Writes the store of a data set, or updates an existing one.

    Clips whose source is unchanged (same size and modification time) are not computed again; those
    of damaged shards are. An interrupted run resumes after its last complete shard.

    Args:
      dataset: the clips.
      spec: the front end.
      layout: frames per clip, padding and excerpt.
      path: the store's folder; created if missing.
      workers: processes; 0 means one per core, 1 works in this process.
      min_seconds: shorter sound files are skipped.
      array_layout: order of the axes of array files, "mel_time" or "time_mel".
      progress: draw a progress bar.
      verify: compare existing shards with their checksums, not only their sizes, which takes
        minutes for a store of 165 GB.

    Raises:
      UserError: the folder holds no store, or a store of another front end, layout or data set; or
        no clip of some split could be used.
    """
    recipe = Recipe(spec, layout, array_layout, min_seconds)
    plan = StorePlan(dataset, recipe, path, verify=verify, progress=progress)
    with (
        progress_bar(plan, progress) as bar,
        contextlib.closing(_ordered_map(plan.recipe, plan.todo, workers)) as mapped,
    ):
        for task in plan.tasks(CLIPS_PER_SHARD):
            made = []
            for result in itertools.islice(mapped, len(task.clips)):
                made.append(result)
                bar.update()
            plan.add(write_shard(plan.shards, task, made, plan.recipe.made_with))
    return plan.finish()


def progress_bar(plan: StorePlan, progress: bool) -> Any:
    """Returns a bar that counts a plan's clips; it is hidden if there is nothing to do."""
    return tqdm(
        total=len(plan.dataset.clips),
        initial=plan.reusable,
        unit="clip",
        desc="prepare",
        disable=not progress or not plan.todo,
    )


def _check_folder(path: Path, description: dict[str, Any]) -> None:
    """Raises UserError for a folder with anything but a store of this data set."""
    if path.is_file():
        raise UserError(f"{path}: is a file; a store needs a folder.")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / "shards").is_dir():
        raise UserError(f"{path}: the folder is not empty and holds no store. {_ANOTHER}")
    if (path / "manifest.json").is_file():
        present = read_json(path / "manifest.json", "store manifest").get("dataset", {})
        for field, value in description.items():
            if (found := present.get(field, value)) != value:
                raise UserError(
                    f"{path}: this store is of {field} {found!r}, not {value!r}. {_ANOTHER}"
                )


def _read_shards(
    folder: Path, made_with: dict[str, Any], verify: bool, progress: bool
) -> Iterator[dict[str, Any]]:
    """Yields the records of intact shards in the order of their numbers, and removes damaged ones.

    The clips of a damaged shard then count as missing and are computed into a new shard.
    """
    paths = sorted(folder.glob("*.json"), key=lambda path: (len(path.name), path.name))
    batch = 64  # records in memory at a time

    def check(path: Path) -> tuple[dict[str, Any], str]:
        record: dict[str, Any] = read_json(path, "shard record")
        for field, value in made_with.items():
            if (found := record.get(field)) != value:
                raise UserError(
                    f"{folder.parent}: this store was made with other {field} ({found}), not "
                    f"{value}. A store never mixes them. {_ANOTHER}"
                )
        return record, file_problem(folder, record, full=verify) if record["rows"] else ""

    with (
        tqdm(total=len(paths), unit="shard", desc="check", delay=2, disable=not progress) as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        for start in range(0, len(paths), batch):
            for record, damage in pool.map(check, paths[start : start + batch]):
                if damage:
                    (folder / record["file"]).with_suffix(".json").unlink()
                    (folder / record["file"]).unlink(missing_ok=True)
                else:
                    yield record
                bar.update()


def _status(clip: Clip) -> tuple[int, int]:
    """Returns size and modification time (ns) of a clip's file, or zeros if it is not visible."""
    try:
        status = os.stat(clip.path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def write_shard(
    folder: Path, task: ShardTask, results: Sequence[ClipFeatures | str], made_with: dict[str, Any]
) -> dict[str, Any]:
    """Writes one shard and then its record, without which the shard does not count.

    Args:
      folder: the folder of the shards; created if missing.
      task: the clips.
      results: their features or reasons for skipping them.
      made_with: the recipe's.

    Returns:
      The record.

    Raises:
      UserError: the folder cannot be written, or the disk is full.
    """
    file, entries = folder / f"{task.number:05d}.npy", []
    rows: list[np.ndarray] = []
    for clip, source, result in zip(task.clips, task.sources, results, strict=True):
        entry: dict[str, Any] = {"clip_id": clip.clip_id, "path": str(clip.path), "source": source}
        if isinstance(result, str):
            entry["skipped"] = result
        else:
            entry |= {"row": len(rows), "length": result.length, "sha256": result.sha256}
            rows.append(result.features)
        entries.append(entry)
    record = made_with | {"file": file.name, "rows": len(rows), "bytes": 0, "sha256": ""}
    record["clips"] = entries
    if rows:
        with replacing(file) as temporary, open(temporary, "wb") as handle:
            np.save(handle, np.stack(rows), allow_pickle=False)
        record |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_json(file.with_suffix(".json"), record)
    return record


def finished_shard(
    folder: Path, task: ShardTask, made_with: dict[str, Any]
) -> dict[str, Any] | None:
    """Returns the record of a task's shard if the shard exists, is intact and of these clips."""
    file = folder / f"{task.number:05d}.json"
    if not file.is_file():
        return None
    record: dict[str, Any] = read_json(file, "shard record")
    entries = [(entry["clip_id"], entry["source"]) for entry in record["clips"]]
    wanted = [(clip.clip_id, source) for clip, source in zip(task.clips, task.sources, strict=True)]
    same = entries == wanted and record | made_with == record
    intact = same and not (record["rows"] and file_problem(folder, record, full=True))
    return record if intact else None


def _ordered_map(
    recipe: Recipe, clips: Sequence[Clip], workers: int
) -> Generator[ClipFeatures | str, None, None]:
    """Yields `recipe(clip)` in order from worker processes; few results are pending at a time.

    Raises:
      UserError: a worker died; the message names a clip that may be the reason.
    """
    workers = min(workers or os.cpu_count() or 1, len(clips) // _CLIPS_PER_CALL)
    if workers <= 1:
        with one_thread():
            yield from map(recipe, clips)
        return
    # Spawned, since a fork could copy locks held by threads. They start in a quarter of a second as
    # long as this module imports little.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_begin_worker
    )
    starts = iter(range(0, len(clips), _CLIPS_PER_CALL))
    waiting: deque[tuple[Clip, Future[list[ClipFeatures | str]]]] = deque()

    def submit(count: int) -> None:
        for first in itertools.islice(starts, count):
            some = clips[first : first + _CLIPS_PER_CALL]
            waiting.append((some[0], pool.submit(_compute, recipe, some)))

    clip = clips[0]
    try:
        submit(2 * workers)
        while waiting:
            clip, future = waiting.popleft()
            results = future.result()
            submit(1)
            yield from results
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process died at or soon after {clip.clip_id}; finished shards are kept. Run "
            "again with --workers=1 to see where."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    threadpool_limits(1)  # two workers with two threads each run 3-5 times slower


def _compute(recipe: Recipe, clips: Sequence[Clip]) -> list[ClipFeatures | str]:
    return list(map(recipe, clips))


_lock = threading.Lock()
_limits: list[Any] = []  # one entry per user of `one_thread`


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limits this process's matrix products to one thread; their number changes the last bits.

    Several threads may use it at the same time: the first sets the limit and the last removes it.
    """
    with _lock:
        _limits.append(_limits[0] if _limits else threadpool_limits(1))
    try:
        yield
    finally:
        with _lock:
            limits = _limits.pop()
            if not _limits:
                limits.restore_original_limits()
