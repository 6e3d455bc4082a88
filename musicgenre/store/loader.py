"""The spectrogram store to batches, with Grain: one whole batch a step, gathered straight from the shards."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import grain.python as grain
import numpy as np

from musicgenre.errors import UserError
from musicgenre.store.store import Store

Batch = dict[str, np.ndarray]
# Steps whose crops are drawn together.
_STEPS_DRAWN = 32


@dataclasses.dataclass(frozen=True)
class _MakeBatch:
    """Step number -> training batch. A picklable function of (store, settings, step) alone.

    What it drew last it keeps: many steps at once take less time. `stride` is from one step that it is asked for to the next.
    """

    store: Store
    clips: np.ndarray
    batch_size: int
    frames: int
    window: int
    windowed: bool
    seed: int
    resident: bool
    process_index: int
    process_count: int
    stride: int = 1
    teacher: np.ndarray | None = None
    named: bool = False
    _kept: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __call__(self, step: int) -> Batch:
        some, offset = divmod(step, _STEPS_DRAWN * self.stride)
        row, first_step = (
            offset // self.stride,
            some * _STEPS_DRAWN * self.stride + offset % self.stride,
        )
        drawn_for, drawn = self._kept.get("drawn", (None, None))
        if drawn is None or drawn_for != first_step:
            drawn = self._draw(first_step)
            self._kept["drawn"] = first_step, drawn
        # Drawn for the whole batch, of which each process takes its slice: the crops do not depend on the processes.
        local = self.batch_size // self.process_count
        mine = slice(self.process_index * local, (self.process_index + 1) * local)
        places, clips, lengths, starts = drawn[:, row, mine]
        batch = {"y": self.store.targets(clips), "mask": np.ones(local, np.float32)}
        if self.teacher is not None:
            batch["teacher"] = self.teacher[places]
        first = starts
        if self.windowed:
            # What can be used of a clip: its real frames, or as many filled ones as a crop takes.
            usable = np.maximum(lengths, self.frames)
            first = np.minimum(starts, np.maximum(usable - self.window, 0))
            batch["offset"] = (starts - first).astype(np.int32)
            batch["length"] = np.minimum(usable - first, self.window).astype(np.int32)
        if self.resident:
            return batch | {"clip": places.astype(np.int32), "start": first.astype(np.int32)}
        if self.named:
            batch["clip"] = places.astype(np.int32)
        return batch | {"x": self.store.gather(clips, first, self.window)}

    def _draw(self, first_step: int) -> np.ndarray:
        """Draws the crops of every `stride`-th step from one on.

        Returns:
          Places among the split's clips, clips, lengths and first frames, int64 `[4, steps, batch]`.
        """
        steps = first_step + self.stride * np.arange(_STEPS_DRAWN)
        places = self._places(
            (steps[:, None] * self.batch_size + np.arange(self.batch_size)).ravel()
        )
        clips = self.clips[places]
        lengths = self.store.lengths[clips].astype(np.int64)  # what the draws are made in
        drawn = np.stack([places, clips, lengths, np.zeros_like(lengths)]).reshape(
            4, _STEPS_DRAWN, self.batch_size
        )
        if self.frames < self.store.layout.frames:
            ends = np.maximum(drawn[2] - self.frames, 0) + 1
            for step, end, starts in zip(steps.tolist(), ends, drawn[3], strict=True):
                # A stream for each (seed, step): the same crops however the run was cut up by restarts.
                starts[:] = np.random.default_rng((self.seed, step, 0)).integers(0, end)
        return drawn

    def _places(self, positions: np.ndarray) -> np.ndarray:
        """The clips at positions of the endless row of shuffled epochs."""
        epochs, offsets = np.divmod(positions, len(self.clips))
        if epochs[0] == epochs[-1]:
            return _permutation(self.seed, int(epochs[0]), len(self.clips))[offsets]
        places = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            places[chosen] = _permutation(self.seed, int(epoch), len(self.clips))[offsets[chosen]]
        return places


class _InPlace(grain.DatasetIterator[Batch]):
    """Makes each batch where it is asked for: Grain's own reader without its threads, with the same state.

    That one's bookkeeping takes as long as a quarter of a small batch.
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
        """Returns the number of the next batch."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to the batch of a state."""
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
    split: str = "train",
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> grain.DatasetIterator:
    """Returns a Grain iterator over training batches, whose state can be saved and restored.

    Epochs follow each other without a break: a batch may hold the end of one and the start of the next, so that
    every clip comes once an epoch and every step has the same size on every process.

    Args:
      store: where the clips are.
      batch_size: clips of one step over all processes.
      steps: length of the iteration.
      seed: of the order and the crops.
      crop_frames: frames of a random crop in time; 0 for whole clips.
      window_frames: frames to read around each crop, for a step that cuts it out itself (time stretch); 0 reads the crop.
      resident: the clips are on the devices: say which ones and where the crops begin instead of reading them.
      teacher: what else goes with each clip of the split, float32 `[clips of the split, classes]`, such as what teachers say.
      named: name each batch's clips in `clip`, as with `resident`, though they are read.
      split: the split to train on.
      process_index: which slice of each batch is this process's.
      process_count: processes that share each batch.
      workers: Grain worker processes; 0, the fastest here, reads in this one.

    Returns:
      An iterator over `x` float16 `[batch, frames, bands]`, `y` int32 `[batch]` or float32 `[batch, labels]` and
      `mask` float32 `[batch]` (all ones). With `resident`, instead of `x`: `clip`, int32 `[batch]`, the place among the
      split's clips, and `start`, the first frame. With `window_frames`, also int32 `[batch]` `offset`, where in the window the
      crop begins, and `length`, the window's frames that can be used. With `teacher`, its rows as `teacher`, `[batch, classes]`.
      All these are the same for any number of processes.

    Raises:
      UserError: the split is empty, the crop longer than the clips, or the batch does not divide by the processes.
    """
    frames = crop_frames or store.layout.frames
    if not 1 <= frames <= store.layout.frames:
        raise UserError(
            f"data.crop_frames={crop_frames} is not between 1 and the store's {store.layout.frames} frames."
        )
    if batch_size % process_count:
        raise UserError(
            f"batch_size={batch_size} does not divide by the {process_count} processes."
        )
    clips = store.indices(split)
    window = window_frames or frames
    if not frames <= window <= store.layout.frames:
        raise UserError(
            f"window_frames={window} is not between the crop's {frames} and the store's {store.layout.frames} frames."
        )
    share = (process_index, process_count)
    # Of several workers each is asked for every so many-th step.
    make = _MakeBatch(
        store,
        clips,
        batch_size,
        frames,
        window,
        window_frames > 0,
        seed,
        resident,
        *share,
        max(workers, 1),
        teacher,
        named,
    )
    # Read where it is asked for, which `musicgenre.training.parallel.Feed` does while the device is at work. Handing batches
    # over from a reading thread takes longer than reading most of them, and the memory of those that wait is not reused.
    if not workers:
        return _InPlace(make, steps)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    dataset = grain.MapDataset.range(steps).map(make).to_iter_dataset(options)
    return iter(dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)))


def chunk_starts(length: int, frames: int, chunks: int) -> np.ndarray:
    """Returns first frames, int `[chunks]`, of chunks spread evenly over a clip of `length` frames.

    One chunk lies in the middle; several reach from the first frame to the last. A clip no longer than a chunk
    has every chunk at 0.
    """
    room = max(length - frames, 0)
    return (
        np.array([room // 2]) if chunks == 1 else np.round(np.linspace(0, room, chunks)).astype(int)
    )


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
    """Yields every chunk of every clip exactly once; the last batch is filled up and masked, nothing is dropped.

    Args:
      store: where the clips are.
      indices: the clips, `[n]`.
      batch_size: chunks of one step over all processes.
      crop_frames: frames of a chunk; 0 for the whole clip as one chunk.
      chunks: evenly spaced chunks per clip when `crop_frames` is set.
      process_index: which slice of each batch is this process's.
      process_count: processes that share each batch.

    Yields:
      `x` float16 `[batch, frames, bands]`, `mask` float32 `[batch]` (0 where the row only fills up) and `clip`
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
        rows = np.minimum(np.arange(first, first + local), len(clip) - 1)
        mask = (np.arange(first, first + local) < len(clip)).astype(np.float32)
        yield {
            "x": store.gather(indices[clip[rows]], starts[rows], frames),
            "mask": mask,
            "clip": clip[rows],
        }


def normalisation(
    store: Store, mode: str, split: str = "train", block: int = 64, clips: int = 0
) -> dict[str, Any]:
    """Returns the mean and standard deviation of the training split, for `(x - mean) / std`.

    Args:
      store: where the clips are.
      mode: "position" (for each frame and band, as in the report), "band" (for each band, over the real frames),
        "global" (one of each) or "none".
      split: the split that they are taken from; nothing else is looked at.
      block: clips read at a time.
      clips: how many are read, evenly spaced over the split in order of their ids; 0 reads all.

    Returns:
      `mean` and `std`, float32 `[frames, bands]` ("position") or `[1, bands]`. A deviation of zero becomes one.

    Raises:
      UserError: the mode is unknown.
    """
    if mode not in ("position", "band", "global", "none"):
        raise UserError(
            f"data.normalise must be 'position', 'band', 'global' or 'none', not {mode!r}."
        )
    shape = (1, store.bands)
    if mode == "none":
        return {"mean": np.zeros(shape, np.float32), "std": np.ones(shape, np.float32)}
    indices = store.indices(split)
    if 0 < clips < len(indices):
        indices = indices[np.arange(clips) * len(indices) // clips]
    total = np.zeros((store.layout.frames, store.bands))
    squares = np.zeros_like(total)
    count = np.zeros((store.layout.frames, 1))
    # Deviations from a first guess keep the difference of the two sums exact enough.
    guess = store.gather(indices[:1]).astype(np.float64).mean()
    for start in range(0, len(indices), block):
        chosen = indices[start : start + block]
        x = store.gather(chosen).astype(np.float64) - guess
        real = (
            np.ones(x.shape[:2])
            if mode == "position"
            else np.arange(x.shape[1]) < store.lengths[chosen, None]
        )
        total += (x * real[:, :, None]).sum(axis=0)
        squares += (np.square(x) * real[:, :, None]).sum(axis=0)
        count += real.sum(axis=0)[:, None]
    if mode != "position":
        total, squares = total.sum(axis=0, keepdims=True), squares.sum(axis=0, keepdims=True)
        count = count.sum(axis=0, keepdims=True)
    if mode == "global":
        count = count * store.bands
        total = np.full(shape, total.sum())
        squares = np.full(shape, squares.sum())
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 0.0))
    return {
        "mean": (mean + guess).astype(np.float32),
        "std": np.where(std > 1e-6, std, 1.0).astype(np.float32),
    }
