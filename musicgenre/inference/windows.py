"""A model over sound files of any length in bounded memory: streamed, cut into windows, probabilities and embeddings of each.

A stretch of the model's clip length (`layout.frames`) is treated as a clip of its own: it has its own dB reference, and passes
through float16 as the clips of the store do. Clips follow each other from the file's start and the last one ends where the file
does, so that a stream need not know its length beforehand and a time has the same window however long the file goes on.
"""

import collections
import dataclasses
import itertools
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from musicgenre.audio.decode import BLOCK, stream_audio
from musicgenre.audio.features import (
    FeatureSpec,
    compress,
    frame_waveform,
    mel_power,
    mfcc_from_db,
    stft_power,
    to_db,
)
from musicgenre.errors import UserError
from musicgenre.models import apply_model
from musicgenre.runs.model import TrainedModel

# Windows of one call of the network.
BATCH = 8
# Files that are decoded while the network works, and the windows of each that wait for it.
_FILES_AHEAD = 4
_WINDOWS_AHEAD = 2 * BATCH
# How often a thread that waits looks whether anybody still wants its windows, seconds.
_LOOK_UP = 0.1


class Window(NamedTuple):
    """One input of the network.

    Attributes:
      start: its first frame in the file.
      length: how many of its frames are real; the rest fills it up.
      inputs: float16 `[frames, bands]`.
    """

    start: int
    length: int
    inputs: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class WindowScores:
    """What a model says of each window of a file.

    Attributes:
      starts: seconds, float64 `[windows]`, growing.
      ends: seconds, float64 `[windows]`.
      probabilities: float32 `[windows, classes]`; a regression's outputs.
      embeddings: float32 `[windows, d]`; d is 0 where the network gives none.
    """

    starts: np.ndarray
    ends: np.ndarray
    probabilities: np.ndarray
    embeddings: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class FileScores:
    """What a model says of a file, or the reason why it says nothing.

    Attributes:
      path: the file, as it was given.
      probabilities: mean over its windows, float32 `[classes]`; None where there is an error.
      embedding: mean over its windows, float32 `[d]`; None where there is an error.
      windows: each window, where they were asked for.
      error: why the file cannot be used; "" if it can.
    """

    path: str
    probabilities: np.ndarray | None = None
    embedding: np.ndarray | None = None
    windows: WindowScores | None = None
    error: str = ""


class Network:
    """A trained model's network, compiled once.

    A batch of fewer windows than `BATCH` is filled up to the next power of two. What comes out for a file therefore depends on
    its own windows alone, not on the files beside it, and a file of one window costs one.
    """

    def __init__(self, model: TrainedModel) -> None:
        # Loaded here and not above: it brings Optax, which tagging needs for nothing else.
        from musicgenre.models.apply import normalise

        module = model.module

        def scores(saved: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            normalised = normalise(x, saved["norm"])
            try:
                logits, embedding = apply_model(module, saved["variables"], normalised)
            except KeyError:  # a network of the user's own that sows no embedding
                logits = module.apply(saved["variables"], normalised, train=False)
                embedding = jnp.zeros((len(x), 0))
            return model.probabilities(logits), embedding

        self._scores = jax.jit(scores)
        self._saved = jax.device_put(model.model)

    def __call__(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns probabilities and embeddings, float32 `[n, classes]` and `[n, d]`, of `[n, frames, bands]`, n up to `BATCH`."""
        count = len(inputs)
        room = (1 << (count - 1).bit_length()) - count
        filled = np.concatenate([inputs, np.zeros((room, *inputs.shape[1:]), inputs.dtype)])
        probabilities, embeddings = jax.device_get(self._scores(self._saved, filled))
        return np.asarray(probabilities[:count], np.float32), np.asarray(
            embeddings[:count], np.float32
        )


def score_files(
    model: TrainedModel,
    paths: Iterable[str | os.PathLike[str]],
    *,
    network: Network | None = None,
    step: int = 0,
    keep_windows: bool = False,
    min_seconds: float = 1.0,
) -> Iterator[FileScores]:
    """Yields what the model says of each file, in order. A file that cannot be used yields its reason; the rest goes on.

    The next files are decoded and their features computed while the network works. No file is ever held as a whole.

    Args:
      model: a trained model.
      paths: sound files.
      network: the model's, where it is used more than once.
      step: see `stream_windows`.
      keep_windows: give every window's scores, too.
      min_seconds: shorter files are refused.
    """
    network = network or Network(model)
    queued: collections.deque[_Reader] = collections.deque()
    names = iter(paths)
    with ThreadPoolExecutor(_FILES_AHEAD, thread_name_prefix="decode") as pool:

        def start(count: int) -> None:
            for path in itertools.islice(names, count):
                queued.append(_Reader(path, model, step, min_seconds))
                pool.submit(queued[-1].run)

        try:
            start(_FILES_AHEAD)
            while queued:
                reader = queued[0]
                yield _scores_of(reader, model.features, network, keep_windows)
                queued.popleft()
                start(1)
        finally:
            for reader in queued:
                reader.stop()


def stream_windows(
    blocks: Iterable[np.ndarray], spec: FeatureSpec, model: TrainedModel, *, step: int = 0
) -> Iterator[Window]:
    """Yields the windows of a file whose samples come in blocks.

    Args:
      blocks: mono samples, float32 `[any]`, at the front end's rate.
      spec: the model's front end.
      model: gives the clip's length and padding, and of one that was trained on crops the length of these.
      step: frames from one window to the next, at most a window. 0 takes what an evaluation takes: consecutive clips, and
        of a model that was trained on crops `data.eval_chunks` crops in each clip.
    """
    frames, clip_frames = model.frames, model.layout.frames
    if not 0 <= step <= frames:
        raise UserError(
            f"the step of {step} frames must be at least 1 and at most a window's {frames}."
        )
    crops = frames < clip_frames
    last = -1
    for start, power in _clips(
        stream_power(blocks, spec), clip_frames, clip_frames if crops else step or clip_frames, spec
    ):
        features, length = model.layout.fit(_finished(power, spec))
        for first in _crop_starts(length, frames, step, model) if crops else [0]:
            # The last clip overlaps the one before it; in a row of windows none comes twice.
            if step and start + first <= last:
                continue
            last = start + first
            yield Window(
                last,
                min(length - first, frames),
                features[first : first + frames].astype(np.float16),
            )


def file_inputs(samples: np.ndarray, model: TrainedModel, *, step: int = 0) -> np.ndarray:
    """Returns `stream_windows` of a whole file's samples `[samples]` as one array, float16 `[inputs, frames, bands]`."""
    return np.stack(
        [window.inputs for window in stream_windows([samples], model.features, model, step=step)]
    )


def stream_power(blocks: Iterable[np.ndarray], spec: FeatureSpec) -> Iterator[np.ndarray]:
    """Yields the spectrogram of a whole file in parts, float32 `[any, bands]`: what comes before the logarithm.

    The frames are those of the whole file, centred on multiples of the hop: each block is computed with as much of its neighbours
    as its first and last frames reach into.

    Args:
      blocks: mono samples, float32 `[any]`.
      spec: the front end. Of the kind "waveform" the parts are framed samples, of "mfcc" mel power.
    """
    hop = spec.hop_length
    if spec.kind == "waveform":
        yield from _stream_frames(blocks, hop)
        return
    power = stft_power if spec.kind == "stft" else mel_power
    after = spec.n_fft - spec.n_fft // 2
    context = -(-(spec.n_fft // 2) // hop)
    # `waiting` begins at the frame number `done` before the first that is still to be computed.
    waiting, done = np.zeros(0, np.float32), 0
    for block in blocks:
        waiting = np.concatenate([waiting, block])
        ready = (len(waiting) - after) // hop + 1
        if ready > done:
            yield power(waiting[: (ready - 1) * hop + after], spec)[done:ready]
            first = max(ready - context, 0)
            waiting, done = waiting[first * hop :], ready - first
    rest = power(waiting, spec)[done:]
    if len(rest):
        yield rest


def _stream_frames(blocks: Iterable[np.ndarray], hop: int) -> Iterator[np.ndarray]:
    waiting, empty = np.zeros(0, np.float32), True
    for block in blocks:
        waiting = np.concatenate([waiting, block])
        if len(waiting) >= hop:
            framed = frame_waveform(waiting, hop)
            waiting, empty = waiting[framed.size :], False
            yield framed
    if empty:
        yield frame_waveform(waiting, hop)


def _clips(
    parts: Iterable[np.ndarray], frames: int, step: int, spec: FeatureSpec
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first frame, `[up to frames, bands]`) of clips at multiples of `step`, and of one more that ends with the file.

    The frame that is centred on the file's very end makes no clip longer and asks for none of its own. A file that is shorter
    than a clip is one clip.
    """
    held = np.zeros((0, spec.bands if spec.kind != "mfcc" else spec.n_mels), np.float32)
    origin = start = 0
    for part in parts:
        held = np.concatenate([held, part])
        while start + frames <= origin + len(held):
            yield start, held[start - origin : start - origin + frames]
            start += step
        # The one that ends with the file begins after the last one that was given.
        passed = max(start - step - origin, 0)
        held, origin = held[passed:], origin + passed
    total = origin + len(held) - (spec.kind != "waveform")
    if start == 0:
        yield 0, held
    elif start - step + frames < total:
        first = total - frames
        yield first, held[first - origin : first - origin + frames]


def _finished(power: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns the features of one clip from its power (or framed samples) `[frames, any]`."""
    if spec.kind == "waveform":
        return power
    return (
        mfcc_from_db(to_db(power, spec), spec.n_mfcc)
        if spec.kind == "mfcc"
        else compress(power, spec)
    )


def _crop_starts(length: int, frames: int, step: int, model: TrainedModel) -> list[int]:
    """Returns the first frames of the windows in a clip of `length` real frames."""
    if not step:
        from musicgenre.store.loader import chunk_starts  # brings Grain

        starts: list[int] = chunk_starts(
            length, frames, int(model.config.data.eval_chunks)
        ).tolist()
        return starts
    last = max(length - frames, 0)
    return [*range(0, last, step), last]


class _Reader:
    """The windows of one file, made in a thread; a few of them wait to be taken."""

    def __init__(
        self, path: str | os.PathLike[str], model: TrainedModel, step: int, min_seconds: float
    ) -> None:
        self.path = path
        self._model, self._step, self._min_seconds = model, step, min_seconds
        self._made: queue.Queue[Window | int | Exception] = queue.Queue(_WINDOWS_AHEAD)
        self._unwanted = threading.Event()
        self._samples = 0

    def run(self) -> None:
        """Makes all windows, or finds out why there are none."""
        spec = self._model.features
        try:
            for window in stream_windows(self._counted(spec), spec, self._model, step=self._step):
                self._put(window)
                if self._unwanted.is_set():
                    return
            self._put(self._samples)
        except Exception as error:  # whoever takes the windows raises it again
            self._put(error)

    def stop(self) -> None:
        """Nobody wants the rest."""
        self._unwanted.set()

    def batches(self) -> Iterator[list[Window]]:
        """Yields windows, `BATCH` at a time, as they are made.

        Raises:
          UserError: the file cannot be used.
        """
        batch: list[Window] = []
        while True:
            item = self._made.get()
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Window):
                batch.append(item)
            if batch and (len(batch) == BATCH or not isinstance(item, Window)):
                yield batch
                batch = []
            if not isinstance(item, Window):
                return

    @property
    def samples(self) -> int:
        """How many samples the file has, once all its windows are made."""
        return self._samples

    def _counted(self, spec: FeatureSpec) -> Iterator[np.ndarray]:
        for block in stream_audio(
            self.path,
            spec.sample_rate,
            min_seconds=self._min_seconds,
            block=BLOCK,
            resampler=spec.resampler,
        ):
            self._samples += len(block)
            yield block

    def _put(self, item: Window | int | Exception) -> None:
        while not self._unwanted.is_set():
            try:
                self._made.put(item, timeout=_LOOK_UP)
                return
            except queue.Full:
                continue


def _scores_of(
    reader: _Reader, spec: FeatureSpec, network: Network, keep_windows: bool
) -> FileScores:
    path = os.fspath(reader.path)
    count = 0
    sums: tuple[Any, Any] = (0.0, 0.0)
    kept: list[tuple[np.ndarray, ...]] = []
    try:
        for batch in reader.batches():
            scores = network(np.stack([window.inputs for window in batch]))
            count += len(batch)
            sums = (
                sums[0] + scores[0].sum(axis=0, dtype=np.float64),
                sums[1] + scores[1].sum(axis=0, dtype=np.float64),
            )
            if keep_windows:
                first = np.array([window.start for window in batch])
                kept.append((first, first + np.array([window.length for window in batch]), *scores))
    except UserError as error:
        return FileScores(path, error=str(error))
    mean, embedding = ((total / count).astype(np.float32) for total in sums)
    if not keep_windows:
        return FileScores(path, mean, embedding)
    starts, ends, probabilities, embeddings = (
        np.concatenate(column) for column in zip(*kept, strict=True)
    )
    rate = spec.sample_rate
    windows = WindowScores(
        starts * spec.hop_length / rate,
        np.minimum(ends * spec.hop_length, reader.samples) / rate,
        probabilities,
        embeddings,
    )
    return FileScores(path, mean, embedding, windows)


def overview_spec(spec: FeatureSpec) -> FeatureSpec:
    """Returns the front end of a picture of what a model hears: a mel spectrogram in dB, whatever the network takes."""
    if spec.kind in ("waveform", "stft"):
        spec = FeatureSpec(sample_rate=spec.sample_rate)
    return dataclasses.replace(spec, kind="logmel", compression="db", db_ref="max", top_db=80.0)


def overview(
    path: str | os.PathLike[str], spec: FeatureSpec, most: int = 2000, *, min_seconds: float = 1.0
) -> tuple[np.ndarray, float]:
    """Returns a spectrogram's power for a picture of a file of any length, in bounded memory.

    Neighbouring frames are averaged two by two as often as is needed.

    Args:
      path: a sound file.
      spec: the front end; of the kind "logmel" or "stft".
      most: most columns; at least half as many where the file has them.
      min_seconds: shorter files are refused.

    Returns:
      Power, float32 `[columns, bands]`, and the seconds from one to the next.

    Raises:
      UserError: the file cannot be used.
    """
    columns: np.ndarray = np.zeros((0, spec.bands), np.float32)
    rest = columns
    together = 1
    blocks = stream_audio(
        Path(path), spec.sample_rate, min_seconds=min_seconds, resampler=spec.resampler
    )
    for part in stream_power(blocks, spec):
        rest = np.concatenate([rest, part])
        whole = len(rest) // together
        columns = np.concatenate(
            [
                columns,
                rest[: whole * together].reshape(whole, together, columns.shape[1]).mean(axis=1),
            ]
        )
        rest = rest[whole * together :]
        while len(columns) > most:
            if len(columns) % 2:
                # The odd one goes back, as frames that are all its mean.
                rest = np.concatenate([np.repeat(columns[-1:], together, axis=0), rest])
                columns = columns[:-1]
            columns = columns.reshape(len(columns) // 2, 2, -1).mean(axis=1)
            together *= 2
    return columns, together * spec.hop_length / spec.sample_rate
