"""Scores sound files of any length in bounded memory: streamed, split into windows and averaged.

A stretch of the model's clip length (`layout.frames`) is treated as a clip: it has its own dB
reference and is rounded to float16 as the clips of a store are. Clips follow each other from the
file's start. The last one ends with the file and overlaps the one before it. A stream therefore
need not know its length, and the windows before the last do not depend on it.

A file's score is the weighted mean of its windows' scores. A window's weight is what it adds, the
new frames that no earlier window covers, as a fraction of what a regular window adds:

    weight = min(end - covered, stride) / stride
    score(file) = sum(weight * score(window)) / sum(weight)

where `covered` is the end of the window before, and `stride` is the step from one window to the
next. For 29 s in consecutive windows of 3 s, nine have the weight 1 and the last, from 26 to 29 s,
has 2/3. Overlapping windows (a step shorter than a window) have the weight 1, but the last counts
as the fraction of a step that it advances. If a model was trained on crops and an evaluation takes
several per clip, `end`, `covered` and `stride` are those of the clips: the crops of a clip count
equally.
"""

import collections
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from musicgenre.models.apply import apply_model, normalise
from musicgenre.runs.model import TrainedModel

# Windows per call of the network.
BATCH = 8
# Files that are decoded while the network computes, and the windows of each that are made at once.
_FILES_AHEAD = 4
_WINDOWS_AHEAD = 2 * BATCH


class Window(NamedTuple):
    """One input of the network.

    Attributes:
      start: its first frame in the file.
      length: how many of its frames are real; the rest is padding.
      inputs: float16 `[frames, bands]`.
      weight: in the mean over the file, above 0 and at most 1.
    """

    start: int
    length: int
    inputs: np.ndarray
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class WindowScores:
    """A model's outputs for each window of a file.

    Attributes:
      starts: seconds, float64 `[windows]`, increasing.
      ends: seconds, float64 `[windows]`.
      probabilities: float32 `[windows, classes]`; a regression's outputs.
      embeddings: float32 `[windows, d]`; d is 0 if the network has no embedding.
    """

    starts: np.ndarray
    ends: np.ndarray
    probabilities: np.ndarray
    embeddings: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class FileScores:
    """A model's outputs for a file, or the reason why there are none.

    Attributes:
      path: the file as given.
      probabilities: weighted mean over its windows, float32 `[classes]`; None after an error.
      embedding: weighted mean over its windows, float32 `[d]`; None after an error.
      windows: each window, if requested.
      error: why the file cannot be used; "" if it can.
    """

    path: str
    probabilities: np.ndarray | None = None
    embedding: np.ndarray | None = None
    windows: WindowScores | None = None
    error: str = ""


class Network:
    """A trained model's network, compiled once per batch size.

    A batch of fewer windows than `BATCH` is padded to the next power of two. The outputs for a file
    therefore depend on its own windows alone, and a file of one window costs one.
    """

    def __init__(self, model: TrainedModel) -> None:
        module = model.module

        def scores(saved: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = normalise(x, saved["norm"])
            try:
                logits, embedding = apply_model(module, saved["variables"], x)
            except KeyError:  # a user's network that sows no embedding
                logits = jnp.asarray(module.apply(saved["variables"], x, train=False))
                embedding = jnp.zeros((len(x), 0))
            return model.probabilities(logits), embedding

        self._scores = jax.jit(scores)
        self._saved = jax.device_put(model.model)

    def __call__(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns probabilities and embeddings, float32 `[n, classes]` and `[n, d]`.

        Args:
          inputs: `[n, frames, bands]`, n up to `BATCH`.
        """
        scores = jax.device_get(self._scores(self._saved, padded_batch(inputs)))
        probabilities, embeddings = (np.asarray(one[: len(inputs)], np.float32) for one in scores)
        return probabilities, embeddings


def no_embedding(model: TrainedModel) -> str:
    """Returns the message for a network that has no embedding."""
    name = model.config.model.name
    return f"the model {name!r} sows no embedding; see docs/tutorials/add_network.md."


def padded_batch(inputs: np.ndarray) -> np.ndarray:
    """Returns inputs `[n, ...]` padded to the next power of two, so that few sizes are compiled."""
    room = (1 << (len(inputs) - 1).bit_length()) - len(inputs)
    return np.pad(inputs, [(0, room)] + [(0, 0)] * (inputs.ndim - 1))


class FileWindows:
    """The windows of a file, computed while iterating. Iterate only once.

    Args:
      path: a sound file.
      model: a trained model.
      step: see `stream_windows`.
      min_seconds: a shorter file is refused.
      blocks: the file's mono samples at the front end's rate in blocks; None decodes the file.

    Attributes:
      path: the file.
      model: the model.
      samples: the number of samples so far; all of the file's after the last window.

    Raises:
      UserError: while iterating, if the file cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: TrainedModel,
        *,
        step: int = 0,
        min_seconds: float = 1.0,
        blocks: Iterable[np.ndarray] | None = None,
    ) -> None:
        self.path, self.model, self.samples = os.fspath(path), model, 0
        self._step, self._min_seconds, self._blocks = step, min_seconds, blocks

    def __iter__(self) -> Iterator[Window]:
        return stream_windows(self._counted(), self.model.features, self.model, step=self._step)

    def _counted(self) -> Iterator[np.ndarray]:
        spec = self.model.features
        options: dict[str, Any] = {"min_seconds": self._min_seconds, "resampler": spec.resampler}
        decoded = stream_audio(self.path, spec.sample_rate, block=BLOCK, **options)
        for block in self._blocks or decoded:
            self.samples += len(block)
            yield block


def score_windows(
    windows: Iterable[Window], network: Network
) -> Iterator[tuple[Window, np.ndarray, np.ndarray]]:
    """Yields each window with its probabilities `[classes]` and its embedding `[d]`, float32."""
    remaining = iter(windows)
    while batch := list(itertools.islice(remaining, BATCH)):
        scores = network(np.stack([window.inputs for window in batch]))
        yield from zip(batch, *scores, strict=True)


def weighted_mean(weights: Sequence[float], values: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the weighted mean, float32 `[d]`, of arrays `[d]`, computed in float64."""
    return np.average(np.array(values, np.float64), axis=0, weights=weights).astype(np.float32)


def score_file(windows: FileWindows, network: Network, *, keep_windows: bool = False) -> FileScores:
    """Returns the scores of one file, and with `keep_windows` those of each window.

    Raises:
      UserError: the file cannot be used.
    """
    found, probabilities, embeddings = zip(*score_windows(windows, network), strict=True)
    spec, weights = windows.model.features, [window.weight for window in found]
    means = weighted_mean(weights, probabilities), weighted_mean(weights, embeddings)
    if not keep_windows:
        return FileScores(windows.path, *means)
    starts, lengths = np.array([(window.start, window.length) for window in found]).T
    ends = np.minimum((starts + lengths) * spec.hop_length, windows.samples) / spec.sample_rate
    starts = starts * spec.hop_length / spec.sample_rate
    each = WindowScores(starts, ends, np.array(probabilities), np.array(embeddings))
    return FileScores(windows.path, *means, each)


def score_files(
    model: TrainedModel,
    paths: Iterable[str | os.PathLike[str]],
    *,
    network: Network | None = None,
    step: int = 0,
    keep_windows: bool = False,
    min_seconds: float = 1.0,
) -> Iterator[FileScores]:
    """Yields the scores of each file, in order. A file that cannot be used yields the reason.

    The next files are decoded and their features computed while the network computes. No file is
    ever held in memory as a whole.

    Args:
      model: a trained model.
      paths: sound files.
      network: the model's network, to compile it once for several calls.
      step: see `stream_windows`.
      keep_windows: include the scores of every window.
      min_seconds: shorter files are refused.
    """
    network, names = network or Network(model), iter(paths)
    pool = ThreadPoolExecutor(_FILES_AHEAD, thread_name_prefix="decode")

    def started(count: int) -> Iterator[_ReadAhead]:
        for path in itertools.islice(names, count):
            yield _ReadAhead(pool, path, model, step=step, min_seconds=min_seconds)

    try:
        queued = collections.deque(started(_FILES_AHEAD))
        while queued:
            try:
                yield score_file(queued[0], network, keep_windows=keep_windows)
            except UserError as error:
                yield FileScores(queued[0].path, error=str(error))
            queued.popleft()
            queued.extend(started(1))
    finally:
        pool.shutdown(cancel_futures=True)


class _ReadAhead(FileWindows):
    """The windows of a file; the next ones are made in a thread while some are consumed."""

    def __init__(self, pool: ThreadPoolExecutor, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._pool, self._remaining = pool, super().__iter__()
        self._next = pool.submit(self._take)

    def _take(self) -> list[Window]:
        return list(itertools.islice(self._remaining, _WINDOWS_AHEAD))

    def __iter__(self) -> Iterator[Window]:
        while batch := self._next.result():
            self._next = self._pool.submit(self._take)
            yield from batch


def stream_windows(
    blocks: Iterable[np.ndarray], spec: FeatureSpec, model: TrainedModel, *, step: int = 0
) -> Iterator[Window]:
    """Yields the windows of a file whose samples come in blocks.

    Args:
      blocks: mono samples, float32 `[any]`, at the front end's rate.
      spec: the model's front end.
      model: gives the clip's length and padding, and the length of crops.
      step: frames from one window to the next, at most a window. 0 uses the windows of an
        evaluation: consecutive clips, and `data.eval_chunks` crops per clip if the model was
        trained on crops.

    Raises:
      UserError: a step that is negative or longer than a window.
    """
    frames, clip_frames = model.frames, model.layout.frames
    if not 0 <= step <= frames:
        limits = f"at least 1 and at most a window's {frames}"
        raise UserError(f"the step of {step} frames must be {limits}.")
    crops = frames < clip_frames
    stride = step or clip_frames
    last, covered = -1, 0
    parts, every = stream_power(blocks, spec), clip_frames if crops else stride
    for start, power in _clips(parts, clip_frames, every, spec):
        features, length = model.layout.fit(_finished(power, spec))
        end = covered
        for first in _crop_starts(length, frames, step, model) if crops else [0]:
            # The last clip overlaps the one before it. With a step, no window is repeated.
            if step and start + first <= last:
                continue
            last, real = start + first, min(length - first, frames)
            end = last + real if step else start + length
            inputs = features[first : first + frames].astype(np.float16)
            yield Window(last, real, inputs, min(end - covered, stride) / stride)
            if step:
                covered = end
        covered = end


def file_inputs(samples: np.ndarray, model: TrainedModel, *, step: int = 0) -> np.ndarray:
    """Returns the windows of a file's samples `[samples]`, float16 `[windows, frames, bands]`."""
    windows = stream_windows([samples], model.features, model, step=step)
    return np.stack([window.inputs for window in windows])


def stream_power(blocks: Iterable[np.ndarray], spec: FeatureSpec) -> Iterator[np.ndarray]:
    """Yields a file's power spectrogram in parts, float32 `[any, bands]`, before the logarithm.

    The frames are those of the file as a whole, centred on multiples of the hop: each block of mono
    samples, float32 `[any]`, is computed with as much of its neighbours as its first and last
    frames need. For the type "waveform" the parts are framed samples, for "mfcc" mel power.
    """
    hop = spec.hop_length
    if spec.kind == "waveform":
        yield from _stream_frames(blocks, hop)
        return
    power = stft_power if spec.kind == "stft" else mel_power
    after = spec.n_fft - spec.n_fft // 2
    context = -(-(spec.n_fft // 2) // hop)
    # The first `done` frames of `waiting` were yielded before.
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
    """Yields (first frame, `[up to frames, bands]`) of clips at multiples of `step`.

    One more ends with the file. The frame that is centred on the file's end neither lengthens a
    clip nor requires another. A file that is shorter than a clip is one clip.
    """
    held = np.zeros((0, spec.n_mels if spec.kind == "mfcc" else spec.bands), np.float32)
    origin = start = 0
    for part in parts:
        held = np.concatenate([held, part])
        while start + frames <= origin + len(held):
            yield start, held[start - origin : start - origin + frames]
            start += step
        # The clip that ends with the file begins after the last one yielded.
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
    if spec.kind == "mfcc":
        return mfcc_from_db(to_db(power, spec), spec.n_mfcc)
    return compress(power, spec)


def _crop_starts(length: int, frames: int, step: int, model: TrainedModel) -> list[int]:
    """Returns the first frames of the windows in a clip of `length` real frames."""
    if not step:
        from musicgenre.store.loader import chunk_starts  # brings Grain

        return chunk_starts(length, frames, int(model.config.data.eval_chunks)).tolist()
    last = max(length - frames, 0)
    return [*range(0, last, step), last]
