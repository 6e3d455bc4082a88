"""The spectrogram store to batches with Grain; each step gathers one batch from the shards."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from musicgenre.errors import UserError
from musicgenre.store.store import Store

Batch = dict[str, np.ndarray]
# Steps whose windows are drawn together.
_STEPS_DRAWN = 32


@dataclasses.dataclass(frozen=True)
class _MakeBatch:
    """Step number -> training batch: a picklable function of (store, settings, step) alone.

    Caches the last draw, since drawing many steps at once is cheaper. `stride` is the distance
    between the steps that it is called for, `window` 0 if there is none around the crops.
    """

    store: Store
    clips: np.ndarray
    batch_size: int
    frames: int
    seed: int
    window: int = 0
    resident: bool = False
    process_index: int = 0
    process_count: int = 1
    stride: int = 1
    teacher: np.ndarray | None = None
    named: bool = False
    _kept: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)

    def __call__(self, step: int) -> Batch:
        block, offset = divmod(step, _STEPS_DRAWN * self.stride)
        row, phase = divmod(offset, self.stride)
        first_step = block * _STEPS_DRAWN * self.stride + phase
        if (drawn := self._kept.get(first_step)) is None:
            drawn = self._draw(first_step)
            self._kept.clear()
            self._kept[first_step] = drawn
        # Drawn for the whole batch, so the windows do not depend on the number of processes.
        local = self.batch_size // self.process_count
        mine = slice(self.process_index * local, (self.process_index + 1) * local)
        positions, clips, lengths, starts = drawn[:, row, mine]
        batch = {"y": self.store.targets(clips), "mask": np.ones(local, np.float32)}
        if self.teacher is not None:
            batch["teacher"] = self.teacher[positions]
        first = starts
        if self.window:
            # The usable part of a clip: its real frames, or padding up to the crop.
            usable = np.maximum(lengths, self.frames)
            first = np.minimum(starts, np.maximum(usable - self.window, 0))
            batch["offset"] = (starts - first).astype(np.int32)
            batch["length"] = np.minimum(usable - first, self.window).astype(np.int32)
        if self.resident or self.named:
            batch["clip"] = positions.astype(np.int32)
        if self.resident:
            return batch | {"start": first.astype(np.int32)}
        return batch | {"x": self.store.gather(clips, first, self.window or self.frames)}

    def _draw(self, first_step: int) -> np.ndarray:
        """Returns positions in the split, clips, lengths and first frames `[4, steps, batch]`."""
        steps = first_step + self.stride * np.arange(_STEPS_DRAWN)
        rows = steps[:, None] * self.batch_size + np.arange(self.batch_size)
        positions = self._shuffled(rows.ravel()).reshape(rows.shape)
        clips = self.clips[positions]
        lengths = self.store.lengths[clips].astype(np.int64)
        starts = np.zeros_like(lengths)
        if self.frames < self.store.layout.frames:
            ends = np.maximum(lengths - self.frames, 0) + 1
            for row, step in enumerate(steps.tolist()):
                # One stream per (seed, step), so restarts do not change the crops.
                starts[row] = np.random.default_rng((self.seed, step, 0)).integers(0, ends[row])
        return np.stack([positions, clips, lengths, starts])

    def _shuffled(self, numbers: np.ndarray) -> np.ndarray:
        """Returns positions in the split, `[n]`, at `[n]` of the endless shuffled epochs."""
        epochs, offsets = np.divmod(numbers, len(self.clips))
        clips = np.empty_like(numbers)
        for epoch in range(epochs[0], epochs[-1] + 1):
            chosen = epochs == epoch
            clips[chosen] = _permutation(self.seed, epoch, len(self.clips))[offsets[chosen]]
        return clips


class _InPlace(grain.DatasetIterator[Batch]):
    """Makes each batch when it is requested; its state is that of Grain's own iterator.

    Without threads it saves a quarter of the time of a small batch.
    """

    def __init__(self, make: _MakeBatch, steps: int) -> None:
        super().__init__()
        self._make, self._steps, self._next = make, steps, 0

    def __next__(self) -> Batch:
        if self._next >= self._steps:
            raise StopIteration
        batch = self._make(self._next)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the next batch's number."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues with the batch of a state."""
        self._next = state["next_index"]


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, 0x5EED, epoch)).permutation(size)


def train_batches(
    store: Store,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    crop_frames: int = 0,
    window_frames: int = 0,
    resident: bool = False,
    teacher: np.ndarray | None = None,
    named: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> grain.DatasetIterator:
    """Returns a Grain iterator over training batches, whose state can be saved and restored.

    Epochs follow each other without a break: every clip occurs once per epoch, and all steps have
    the same size on every process. The batches do not depend on the number of processes.

    Args:
      store: the clips.
      batch_size: clips per step over all processes.
      steps: length of the iteration.
      seed: of the order and the crops.
      crop_frames: frames of a random crop in time; 0 takes full clips.
      window_frames: frames to read around each crop, for a step that crops later (time stretch); 0
        reads the crop.
      resident: the clips are on the devices: return their positions and first frames only.
      teacher: further targets, float32 `[clips of the split, classes]`.
      named: return each clip's position in `clip` as well, as with `resident`.
      process_index: this process's slice of each batch, of `process_count`.
      process_count: processes that divide each batch.
      workers: Grain worker processes; 0, usually the fastest, reads in this process.

    Returns:
      An iterator over `x` float16 `[batch, frames, bands]`, `y` int32 `[batch]` or float32 `[batch,
      labels]` and `mask` float32 `[batch]` (all ones). With `resident`, `x` is replaced by int32
      `[batch]` `clip`, the position in the split, and `start`, the first frame. With
      `window_frames`, also int32 `[batch]` `offset`, the start of the crop within the window, and
      `length`, the usable frames of the window. With `teacher`, its rows as `teacher`.

    Raises:
      UserError: an empty split, a crop longer than the clips, or a batch size that the number of
        processes does not divide.
    """
    total = store.layout.frames
    frames = crop_frames or total
    if not 1 <= frames <= total:
        raise UserError(
            f"data.crop_frames={crop_frames} is not between 1 and the store's {total} frames."
        )
    if batch_size % process_count:
        raise UserError(f"batch_size={batch_size} is not a multiple of {process_count} processes.")
    crops = batch_size, frames, seed, window_frames, resident
    share = process_index, process_count, max(workers, 1)  # n workers make every n-th step each
    make = _MakeBatch(store, store.indices("train"), *crops, *share, teacher, named)
    # `musicgenre.training.parallel.Feed` requests batches while the device computes. A reading
    # thread would take longer to hand over most batches than to read them.
    if not workers:
        return _InPlace(make, steps)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    dataset = grain.MapDataset.range(steps).map(make).to_iter_dataset(options)
    return iter(dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)))


def chunk_starts(length: int, frames: int, chunks: int) -> np.ndarray:
    """Returns first frames, int `[chunks]`, of windows spread evenly over `length` frames.

    One window is centred; several extend from the first frame to the last of a longer clip.
    """
    room = max(length - frames, 0)
    if chunks == 1:
        return np.array([room // 2])
    return np.linspace(0, room, chunks).round().astype(int)


def eval_batches(
    store: Store,
    indices: np.ndarray,
    *,
    batch_size: int,
    crop_frames: int = 0,
    chunks: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields every window of every clip exactly once; the last batch is padded and masked.

    Args:
      store: the clips.
      indices: which clips, `[n]`.
      batch_size: windows per step over all processes.
      crop_frames: frames of a window; 0 for the full clip.
      chunks: evenly spaced windows per clip, if `crop_frames` is set.
      process_index: this process's slice of each batch, of `process_count`.
      process_count: processes that divide each batch.

    Yields:
      `x` float16 `[batch, frames, bands]`, `mask` float32 `[batch]` (0 for padding) and `clip`
      int32 `[batch]`, the position of each row's clip in `indices`.
    """
    frames = crop_frames or store.layout.frames
    count = chunks if crop_frames else 1
    clip = np.repeat(np.arange(len(indices), dtype=np.int32), count)
    starts = np.concatenate(
        [chunk_starts(store.lengths[i] if crop_frames else frames, frames, count) for i in indices]
    )
    local = batch_size // process_count
    for first in range(process_index * local, -(-len(clip) // batch_size) * batch_size, batch_size):
        numbers = np.arange(first, first + local)
        rows = np.minimum(numbers, len(clip) - 1)
        x = store.gather(indices[clip[rows]], starts[rows], frames)
        yield {"x": x, "mask": (numbers < len(clip)).astype(np.float32), "clip": clip[rows]}


def normalisation(store: Store, mode: str, block: int = 64, clips: int = 0) -> dict[str, Any]:
    """Returns the mean and standard deviation of the training clips, for `(x - mean) / std`.

    Args:
      store: the clips.
      mode: "position" (per frame and band, as in the report), "band" (per band, over the real
        frames), "global" (one of each) or "none".
      block: clips read at a time.
      clips: number of clips to read, evenly spaced in order of their ids; 0 reads all.

    Returns:
      `mean` and `std`, float32 `[frames, bands]` ("position") or `[1, bands]`. A standard deviation
      of zero becomes one.
    """
    shape = (1, store.bands)
    if mode == "none":
        return {"mean": np.zeros(shape, np.float32), "std": np.ones(shape, np.float32)}
    indices = store.indices("train")
    if 0 < clips < len(indices):
        indices = indices[np.arange(clips) * len(indices) // clips]
    total = np.zeros((store.layout.frames, store.bands))
    squares, count = np.zeros_like(total), np.zeros((store.layout.frames, 1))
    # Subtracting a rough mean first limits cancellation in the difference of the two sums.
    guess = store.gather(indices[:1]).astype(np.float64).mean()
    for start in range(0, len(indices), block):
        chosen = indices[start : start + block]
        x = store.gather(chosen).astype(np.float64) - guess
        real = (np.arange(x.shape[1]) < store.lengths[chosen, None]) | (mode == "position")
        total += (x * real[:, :, None]).sum(axis=0)
        squares += (np.square(x) * real[:, :, None]).sum(axis=0)
        count += real.sum(axis=0)[:, None]
    if mode != "position":
        total, squares, count = (
            each.sum(axis=0, keepdims=True) for each in (total, squares, count)
        )
    if mode == "global":
        count = count * store.bands
        total, squares = np.full(shape, total.sum()), np.full(shape, squares.sum())
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 0.0))
    std = np.where(std > 1e-6, std, 1.0)
    return {"mean": (mean + guess).astype(np.float32), "std": std.astype(np.float32)}
