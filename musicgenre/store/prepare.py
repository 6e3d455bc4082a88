"""Clips to a spectrogram store: parallel, resumable, and nothing skipped without saying so."""

import contextlib
import dataclasses
import hashlib
import itertools
import math
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from musicgenre.audio.decode import load_audio
from musicgenre.audio.features import FeatureSpec, mfcc_from_db
from musicgenre.audio.layout import ClipLayout
from musicgenre.datasets import arrays
from musicgenre.datasets.base import Clip, Dataset
from musicgenre.errors import UserError
from musicgenre.files import read_json, replacing, sha256, write_json
from musicgenre.store.store import (
    SHARD_SCHEMA,
    clip_columns,
    file_problem,
    shard_columns,
    write_manifest,
)

Item = TypeVar("Item")
# Clips of one shard: at most this much work is lost when the machine stops.
CLIPS_PER_SHARD = 128
# Clips that a worker process computes at a time.
_CLIPS_PER_CALL = 4
# What a plan knows of a clip: nothing, an entry of another source, features, or a reason for skipping it.
_NEW, _STALE, _COMPUTED, _SKIPPED = range(4)
# Of a worker process: see `_begin_worker`.
_worker: tuple["Recipe", np.ndarray]


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
            lines.append(
                f"  ... and {len(self.skipped) - 20} more: see {self.store}/skipped-*.jsonl"
            )
        return lines


def process_clip(
    clip: Clip, spec: FeatureSpec, layout: ClipLayout, array_layout: str, min_seconds: float
) -> ClipFeatures | str:
    """Turns one clip into the features that the store keeps, or says why that cannot be.

    The same function serves every way of running over a data set, so that all of them give the same bytes.

    Returns:
      The features, or the reason for skipping the clip.
    """
    try:
        if clip.row is None:
            digest = sha256(clip.path)
            samples = load_audio(
                clip.path, spec.sample_rate, min_seconds=min_seconds, resampler=spec.resampler
            ).samples
            features = layout.features(samples, spec)
        else:
            if spec.kind not in ("logmel", "mfcc"):
                raise UserError(
                    f"{clip.path}: holds log-mel spectrograms, from which features.kind={spec.kind!r} cannot be made."
                )
            if spec.compression != "db":
                raise UserError(
                    f"{clip.path}: is in dB, from which features.compression={spec.compression!r} cannot be made."
                )
            features = arrays.open_array_file(clip.path, array_layout).spectrogram(clip.row)
            digest = hashlib.sha256(features.tobytes()).hexdigest()
            if spec.kind == "mfcc":
                features = mfcc_from_db(features, spec.n_mfcc)
            if features.shape[1] != spec.bands:
                raise UserError(
                    f"{clip.path}: {features.shape[1]} bands where features.n_mels says {spec.bands}."
                )
    except (UserError, OSError) as error:
        return str(error)
    fitted, length = layout.fit(features)
    return ClipFeatures(fitted.astype(np.float16), length, digest)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How clips become rows of a store: `process_clip` with its settings, in a form that travels to other processes.

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
        """Returns what `process_clip` makes of the clip."""
        return process_clip(clip, self.spec, self.layout, self.array_layout, self.min_seconds)

    @property
    def made_with(self) -> dict[str, Any]:
        """What every shard record says of how it was made; a store never mixes two of these."""
        return {
            "schema": SHARD_SCHEMA,
            "features": self.spec.to_dict(),
            "layout": dataclasses.asdict(self.layout),
        }


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """Clips that become one shard.

    Attributes:
      number: the shard's number, which names its files.
      clips: in the order of the shard's rows.
      sources: for each clip, what tells a changed source from an unchanged one (absolute path, bytes, time of change, row).
    """

    number: int
    clips: tuple[Clip, ...]
    sources: tuple[list[Any], ...]


class StorePlan:
    """What a store lacks and how it is completed; the same for every way of running over the clips.

    What is known of the clips is kept in arrays: a million of them take some 100 MB here.

    Attributes:
      dataset: the clips.
      recipe: how they become rows.
      path: the store's folder.
      shards: the folder of its shards.
      todo: clips to compute, in the data set's order.
      reusable: how many clips are there already.
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
        """Reads what is there.

        Args:
          dataset: the clips.
          recipe: how they become rows.
          path: the store's folder.
          verify: compare the shards that are there with their checksums, not only their sizes.
          progress: draw a progress bar where this takes more than a moment.

        Raises:
          UserError: the folder holds a store made with another front end or layout, or of another data set, or
            something that is no store.
        """
        self.dataset, self.recipe, self.path = dataset, recipe, Path(path)
        self.shards = self.path / "shards"
        _check_folder(self.path, dataset)
        count = len(dataset.clips)
        self._place = {clip.clip_id: i for i, clip in enumerate(dataset.clips)}
        # Size and time of change, before anything is read: a file that changes later is computed again by the next run.
        self._status = np.fromiter(
            (number for clip in dataset.clips for number in _status(clip)), np.int64
        ).reshape(count, 2)
        self._state = np.full(count, _NEW, np.uint8)
        self._shard, self._row, self._length = (np.zeros(count, np.int32) for _ in range(3))
        self._sha256 = np.zeros((count, 32), np.uint8)
        self._reasons: dict[int, str] = {}
        # Rows, bytes and SHA-256 of each shard by its number.
        self._shards: dict[int, tuple[int, int, str]] = {}
        for record in _read_shards(self.shards, recipe.made_with, verify, progress):
            self.add(record)
        self._todo = np.flatnonzero(self._state <= _STALE)
        self.todo = [dataset.clips[i] for i in self._todo]
        self.reusable = count - len(self.todo)

    def tasks(self, clips_per_shard: int, *, fill_gaps: bool = False) -> Iterator[ShardTask]:
        """Yields the shards to write, in order; the same ones however often it is called before one is added.

        Args:
          clips_per_shard: clips of each but the last.
          fill_gaps: take free numbers below the highest one first. Where shards are finished in any order, a run that
            died leaves gaps; filling them ends at the same store as a run that did not die. Where a clip's source has
            changed, the numbers go on from the highest all the same: the later of a clip's two entries is the valid one.
        """
        taken = set(self._shards)
        fill_gaps = fill_gaps and not (self._state == _STALE).any()
        first = 0 if fill_gaps else max(taken, default=-1) + 1
        numbers = (number for number in itertools.count(first) if number not in taken)
        for start in range(0, len(self._todo), clips_per_shard):
            chosen = self._todo[start : start + clips_per_shard].tolist()
            clips = tuple(self.dataset.clips[i] for i in chosen)
            yield ShardTask(next(numbers), clips, tuple(self._source(i) for i in chosen))

    def add(self, record: dict[str, Any]) -> None:
        """Takes note of a shard that was written; of a clip's several entries the last one counts."""
        number = int(Path(record["file"]).stem)
        self._shards[number] = (record["rows"], record["bytes"], record["sha256"])
        for entry in record["clips"]:
            i = self._place.get(entry["clip_id"])
            if i is None:
                continue
            if entry["source"] != self._source(i):
                self._state[i] = _STALE
            elif "skipped" in entry:
                self._state[i] = _SKIPPED
                self._reasons[i] = entry["skipped"]
            else:
                self._state[i] = _COMPUTED
                self._shard[i], self._row[i], self._length[i] = (
                    number,
                    entry["row"],
                    entry["length"],
                )
                self._sha256[i] = np.frombuffer(bytes.fromhex(entry["sha256"]), np.uint8)

    def finish(self) -> PrepareSummary:
        """Writes the manifest, once every task's record was added, and returns what was done.

        Raises:
          UserError: no clip of some split could be used.
        """
        clips = self.dataset.clips
        skipped = [dataclasses.asdict(entry) for entry in self.dataset.skipped]
        for i in np.flatnonzero(self._state == _SKIPPED).tolist():
            skipped.append(
                {
                    "clip_id": clips[i].clip_id,
                    "path": str(clips[i].path),
                    "reason": self._reasons[i],
                }
            )
        kept = np.flatnonzero(self._state == _COMPUTED)
        used = [clips[i] for i in kept]
        splits = dict(sorted(Counter(clip.split for clip in used).items()))
        for split in sorted({clip.split for clip in clips} - set(splits)):
            lost = {clip.clip_id for clip in clips if clip.split == split}
            reason = next(entry["reason"] for entry in skipped if entry["clip_id"] in lost)
            raise UserError(
                f"{self.dataset.root}: no clip of the split {split!r} could be used; the first was skipped because of: {reason}"
            )
        # Shards of which every clip was skipped have a record and no file.
        numbers = sorted(number for number, (rows, _, _) in self._shards.items() if rows)
        columns = clip_columns(
            self.dataset.label_names,
            tuple(splits),
            clip_id=[clip.clip_id for clip in used],
            path=[str(clip.path) for clip in used],
            labels=[clip.labels for clip in used],
            split=[clip.split for clip in used],
            group=[clip.group for clip in used],
            shard=np.searchsorted(numbers, self._shard[kept]),
            row=self._row[kept],
            length=self._length[kept],
            sha256=self._sha256[kept],
            values=np.array([clip.values for clip in used])
            if self.dataset.task == "regression"
            else None,
        )
        header = self.recipe.made_with | {
            "dataset": _describe(self.dataset),
            "label_names": list(self.dataset.label_names),
            "splits": splits,
        }
        shards = [(number, *self._shards[number]) for number in numbers]
        write_manifest(self.path, header, columns | shard_columns(shards), skipped)
        return PrepareSummary(self.path, len(used), len(self.todo), self.reusable, skipped, splits)

    def _source(self, i: int) -> list[Any]:
        """What tells a changed source of a clip from an unchanged one without reading it."""
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
      verify: compare the shards that are there with their checksums, not only their sizes. Of a store of 165 GB that
        takes minutes.

    Raises:
      UserError: the folder holds a store made with another front end or layout, or of another data set, or
        something that is no store; or no clip of some split could be used.
    """
    plan = StorePlan(
        dataset,
        Recipe(spec, layout, array_layout, min_seconds),
        path,
        verify=verify,
        progress=progress,
    )
    with (
        progress_bar(plan, progress) as bar,
        contextlib.closing(_ordered_map(plan.recipe, plan.todo, workers)) as mapped,
    ):
        results = _counted(mapped, bar)
        for task in plan.tasks(CLIPS_PER_SHARD):
            made = list(itertools.islice(results, len(task.clips)))
            plan.add(write_shard(plan.shards, task, made, plan.recipe.made_with))
    return plan.finish()


def progress_bar(plan: StorePlan, progress: bool) -> Any:
    """Returns a bar that counts a plan's clips; it draws nothing where there is nothing to do or no `progress` is wanted."""
    return tqdm(
        total=len(plan.dataset.clips),
        initial=plan.reusable,
        unit="clip",
        desc="prepare",
        disable=not progress or not plan.todo,
    )


def _check_folder(path: Path, dataset: Dataset) -> None:
    """Refuses a folder that holds something else than a store of this data set."""
    if path.is_file():
        raise UserError(f"{path}: is a file; a store needs a folder.")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / "shards").is_dir():
        raise UserError(
            f"{path}: the folder is not empty and holds no store. Choose another with --config.data.store=..."
        )
    if (path / "manifest.json").is_file():
        there = read_json(path / "manifest.json", "store manifest").get("dataset", {})
        for field, value in _describe(dataset).items():
            if field in there and there[field] != value:
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
        "group_name": dataset.group_name,
    }


def _read_shards(
    folder: Path, made_with: dict[str, Any], verify: bool, progress: bool
) -> Iterator[dict[str, Any]]:
    """Yields the records of the sound shards that earlier runs have written, in the order of their numbers.

    Damaged ones are removed: their clips count as missing, so they are computed again into a new shard.
    """
    sidecars = sorted(folder.glob("*.json"), key=lambda place: (len(place.name), place.name))
    some = 64  # records in memory at a time

    def problem(record: dict[str, Any]) -> str:
        return file_problem(folder, record, full=verify) if record["rows"] else ""

    with (
        tqdm(total=len(sidecars), unit="shard", desc="check", delay=2, disable=not progress) as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        for start in range(0, len(sidecars), some):
            records = [
                read_json(sidecar, "shard record") for sidecar in sidecars[start : start + some]
            ]
            for record, (field, value) in itertools.product(records, made_with.items()):
                if record.get(field) != value:
                    raise UserError(
                        f"{folder.parent}: this store was made with other {field} ({record.get(field)}), not "
                        f"{value}. A store never mixes them: choose another with --config.data.store=..."
                    )
            for sidecar, record, damaged in zip(
                sidecars[start : start + some], records, pool.map(problem, records), strict=True
            ):
                if damaged:
                    sidecar.unlink()
                    (folder / record["file"]).unlink(missing_ok=True)
                else:
                    yield record
                bar.update()


def _status(clip: Clip) -> tuple[int, int]:
    """Returns the size of a clip's file and its time of change in nanoseconds, or zeros where it cannot be seen."""
    try:
        status = os.stat(clip.path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def write_shard(
    folder: Path, task: ShardTask, results: Sequence[ClipFeatures | str], made_with: dict[str, Any]
) -> dict[str, Any]:
    """Writes one shard and then its record; without the record the shard does not count.

    Args:
      folder: where the shards lie; made if missing.
      task: the clips.
      results: what became of each of them.
      made_with: the recipe's.

    Returns:
      The record.

    Raises:
      UserError: the folder cannot be written, or the disk is full.
    """
    file = folder / f"{task.number:05d}.npy"
    entries: list[dict[str, Any]] = []
    rows: list[np.ndarray] = []
    for clip, source, result in zip(task.clips, task.sources, results, strict=True):
        entry: dict[str, Any] = {"clip_id": clip.clip_id, "path": str(clip.path), "source": source}
        if isinstance(result, str):
            entry["skipped"] = result
        else:
            entry |= {"row": len(rows), "length": result.length, "sha256": result.sha256}
            rows.append(result.features)
        entries.append(entry)
    record: dict[str, Any] = made_with | {
        "file": file.name,
        "rows": len(rows),
        "bytes": 0,
        "sha256": "",
        "clips": entries,
    }
    if rows:
        with replacing(file) as temporary, open(temporary, "wb") as handle:
            np.save(handle, np.stack(rows), allow_pickle=False)
        record |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_json(file.with_suffix(".json"), record)
    return record


def finished_shard(
    folder: Path, task: ShardTask, made_with: dict[str, Any]
) -> dict[str, Any] | None:
    """Returns the record of a task's shard if it is there, is of these clips and made in this way, and the shard is sound."""
    file = folder / f"{task.number:05d}.json"
    if not file.is_file():
        return None
    record: dict[str, Any] = read_json(file, "shard record")
    entries = [(entry["clip_id"], entry["source"]) for entry in record["clips"]]
    wanted = [(clip.clip_id, source) for clip, source in zip(task.clips, task.sources, strict=True)]
    if entries != wanted or any(record.get(field) != value for field, value in made_with.items()):
        return None
    if record["rows"] and file_problem(folder, record, full=True):
        return None
    return record


def _counted(items: Iterable[Item], bar: Any) -> Iterator[Item]:
    """Yields the items and moves the bar by one for each."""
    for item in items:
        bar.update()
        yield item


def _ordered_map(
    recipe: Recipe, clips: Sequence[Clip], workers: int
) -> Generator[ClipFeatures | str, None, None]:
    """Yields `recipe(clip)` in order, from worker processes, with a bounded number of results waiting.

    Rows come over in shared memory and a few clips at a time: one by one through a pipe they cost an eighth of the time that it
    takes to compute them.

    Raises:
      UserError: a worker died; the message names a clip that it may have died of.
    """
    workers = min(workers or os.cpu_count() or 1, len(clips) // _CLIPS_PER_CALL)
    if workers <= 1:
        with one_thread():
            yield from map(recipe, clips)
        return
    # New processes, no copies of this one: its threads may hold locks. They take a quarter of a second to start, as long as what
    # this module imports stays small.
    context = multiprocessing.get_context("spawn")
    shape = (2 * workers, _CLIPS_PER_CALL, recipe.layout.frames, recipe.spec.bands)
    memory = context.RawArray("B", 2 * math.prod(shape))
    slots = np.frombuffer(memory, np.float16).reshape(shape)
    calls = zip(
        itertools.cycle(range(len(slots))), range(0, len(clips), _CLIPS_PER_CALL), strict=False
    )
    waiting: deque[tuple[int, Clip, Future[list[ClipFeatures | str]]]] = deque()
    with (
        _one_thread_per_process(),
        ProcessPoolExecutor(
            workers, context, initializer=_begin_worker, initargs=(recipe, memory, shape)
        ) as pool,
    ):

        def submit(count: int) -> None:
            for slot, first in itertools.islice(calls, count):
                waiting.append(
                    (
                        slot,
                        clips[first],
                        pool.submit(_work, slot, clips[first : first + _CLIPS_PER_CALL]),
                    )
                )

        clip = clips[0]
        try:
            submit(len(slots))
            while waiting:
                slot, clip, future = waiting.popleft()
                results = [
                    result
                    if isinstance(result, str)
                    else dataclasses.replace(result, features=row.copy())
                    for row, result in zip(slots[slot], future.result(), strict=False)
                ]
                submit(1)  # the slots go round: it takes the one that was copied just now
                yield from results
        except BrokenProcessPool as error:
            raise UserError(
                f"a worker process died at or soon after {clip}; what was finished is kept. Run again with "
                "--workers=1 to see where."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(recipe: Recipe, memory: Any, shape: tuple[int, ...]) -> None:
    """Gives a worker process what `_work` needs: the recipe, and the memory that it shares with the process that started it."""
    global _worker
    _worker = recipe, np.frombuffer(memory, np.float16).reshape(shape)


def _work(slot: int, clips: Sequence[Clip]) -> list[ClipFeatures | str]:
    """Computes clips in a worker process, leaves their features in a slot of the shared memory and returns the rest."""
    recipe, slots = _worker
    results: list[ClipFeatures | str] = []
    for row, result in zip(slots[slot], map(recipe, clips), strict=False):
        if isinstance(result, str):
            results.append(result)
        else:
            row[:] = result.features
            results.append(dataclasses.replace(result, features=row[:0]))
    return results


class _OneThread:
    """The limit that `one_thread` sets once for all that are inside at the same time, since it is the process's."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.limits: Any = None


_ONE_THREAD = _OneThread()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keeps this process's matrix products to one thread each: their number decides the last bit of some products.

    With it, every way of running over the clips gives the same bytes. Threads may be inside at the same time.
    """
    with _ONE_THREAD.lock:
        if not _ONE_THREAD.inside:
            _ONE_THREAD.limits = threadpool_limits(1)
        _ONE_THREAD.inside += 1
    try:
        yield
    finally:
        with _ONE_THREAD.lock:
            _ONE_THREAD.inside -= 1
            if not _ONE_THREAD.inside:
                _ONE_THREAD.limits.restore_original_limits()


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
