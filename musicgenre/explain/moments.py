"""The window of a file to explain, and the moments of many files that excite a unit most."""

import heapq
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.ndimage

from musicgenre.errors import UserError
from musicgenre.explain.attribution import silence
from musicgenre.explain.taps import OUTPUT, Explainer
from musicgenre.inference.windows import (
    BATCH,
    FileWindows,
    Network,
    Window,
    padded_batch,
    score_windows,
    weighted_mean,
)
from musicgenre.runs.model import TrainedModel

# A unit without positions in time is located by the second with most evidence for it.
_MOMENT_SECONDS = 1.0


class Chosen(NamedTuple):
    """The window of a file that is explained.

    Attributes:
      window: the window.
      start: seconds.
      end: seconds; at most the end of the file.
      probabilities: of the window, float32 `[classes]`.
      label: number of the explained label.
      file_probabilities: mean over the file, float32 `[classes]`.
      seconds: length of the file.
    """

    window: Window
    start: float
    end: float
    probabilities: np.ndarray
    label: int
    file_probabilities: np.ndarray
    seconds: float


class Moment(NamedTuple):
    """A moment that excites a unit.

    Attributes:
      layer: of the unit.
      unit: its number.
      path: the sound file.
      time: seconds; for a unit without positions in time, the middle of the second with most
        evidence for it.
      start: of the window, seconds.
      end: of the window, seconds.
      activation: its value; for the "output", the probability.
    """

    layer: str
    unit: int
    path: str
    time: float
    start: float
    end: float
    activation: float


def choose_window(
    model: TrainedModel,
    network: Network,
    path: str | os.PathLike[str],
    *,
    label: int | None = None,
    at: float | None = None,
    min_seconds: float = 1.0,
) -> Chosen:
    """Finds the window of a file to explain, in bounded memory.

    Args:
      model: a trained model.
      network: its network.
      path: the sound file.
      label: the label's number; None for the most probable label of the file, or with `at` of the
        window. For a regression it is the largest output.
      at: seconds; the window whose middle is nearest. None for the window in which the label is
        most probable.
      min_seconds: shorter files are refused.

    Raises:
      UserError: the file cannot be used, or `at` is beyond its end.
    """
    windows = FileWindows(path, model, step=model.frames, min_seconds=min_seconds)
    hop = model.features.hop_length / model.features.sample_rate
    # The best window per label, or the one nearest to `at`.
    best: dict[int, tuple[float, Window, np.ndarray]] = {}
    weights, rows = [], []
    for window, row, _ in score_windows(windows, network):
        weights.append(window.weight)
        rows.append(row)
        middle = (window.start + window.length / 2) * hop
        for number, value in enumerate(row.tolist() if at is None else [-abs(middle - at)]):
            if number not in best or value > best[number][0]:
                best[number] = (value, window, row)
    seconds = windows.samples / model.features.sample_rate
    if at is not None and not 0 <= at <= seconds:
        raise UserError(f"{path}: {at:g} s is beyond its end; it is {seconds:.1f} s long.")
    whole = weighted_mean(weights, rows)
    if label is None:
        label = int((whole if at is None else best[0][2]).argmax())
    _, window, row = best[label if at is None else 0]
    end = min((window.start + window.length) * hop, seconds)
    return Chosen(window, window.start * hop, end, row, label, whole, seconds)


class _Entry(NamedTuple):
    """A candidate for a moment; `step` is its position in time, 0 for a unit without."""

    activation: float
    step: int
    window: Window
    file: FileWindows


def strongest_moments(
    explainer: Explainer,
    paths: Sequence[str | os.PathLike[str]],
    units: Sequence[tuple[str, int]],
    *,
    count: int = 5,
    min_seconds: float = 1.0,
    failed: Callable[[str], None] | None = None,
) -> list[Moment]:
    """Finds the moments that excite units most, over any number of files, in bounded memory.

    A window gives a unit at most one moment. Of equal activations the earlier is kept.

    Args:
      explainer: of the model.
      paths: sound files.
      units: layer and number of each.
      count: moments per unit.
      min_seconds: shorter files are refused.
      failed: receives the reason why a file cannot be used; None raises it.

    Returns:
      Moments in the order of the units, the strongest first.

    Raises:
      UserError: an unknown unit.
    """
    for layer, unit in units:
        explainer.check_unit(layer, unit)
    model, names = explainer.model, tuple(sorted({layer for layer, _ in units}))
    best: list[list[_Entry]] = [[] for _ in units]
    for path in paths:
        file = FileWindows(path, model, step=model.frames, min_seconds=min_seconds)
        found = best
        try:
            for window, values in _activations(explainer, file, names):
                peaks = [_peak(values[layer][..., unit], window, model) for layer, unit in units]
                found = [
                    heapq.nlargest(count, [*kept, _Entry(*peak, window, file)], lambda one: one[0])
                    for kept, peak in zip(found, peaks, strict=True)
                ]
        except UserError as error:
            if failed is None:
                raise
            failed(str(error))
        else:
            best = found
    return [
        moment
        for unit, entries in zip(units, best, strict=True)
        for moment in _moments(explainer, *unit, entries)
    ]


def _activations(
    explainer: Explainer, windows: FileWindows, names: tuple[str, ...]
) -> Iterator[tuple[Window, dict[str, np.ndarray]]]:
    """Yields each window with the values of layers; those of the output are probabilities."""
    remaining = iter(windows)
    while batch := list(itertools.islice(remaining, BATCH)):
        inputs = padded_batch(np.stack([window.inputs for window in batch]))
        found = explainer.activations(inputs, names)
        if OUTPUT in found:
            found[OUTPUT] = np.asarray(explainer.model.probabilities(jnp.asarray(found[OUTPUT])))
        for row, window in enumerate(batch):
            yield window, {name: values[row] for name, values in found.items()}


def _peak(values: np.ndarray, window: Window, model: TrainedModel) -> tuple[float, int]:
    """Returns the maximum over the positions `[steps, ...]` that are not padding, and its step."""
    steps = values.reshape(len(values) if values.ndim else 1, -1).max(axis=1)
    steps = steps[: max(round(window.length / model.frames * len(steps)), 1)]
    return float(steps.max()), int(steps.argmax())


def _moments(
    explainer: Explainer, layer: str, unit: int, entries: Sequence[_Entry]
) -> Iterator[Moment]:
    """Yields the moments of entries: at their steps, or at the frames with most evidence."""
    model, tap = explainer.model, explainer.taps[layer]
    hop = model.features.hop_length / model.features.sample_rate
    frames = [(entry.step + 0.5) * model.frames / tap.steps - 0.5 for entry in entries]
    if len(tap.shape) < 2:
        frames = []
        for first in range(0, len(entries), BATCH):
            windows = [entry.window for entry in entries[first : first + BATCH]]
            frames += _busiest_frames(explainer, windows, layer, unit)
    for (activation, _, window, file), frame in zip(entries, frames, strict=True):
        seconds = file.samples / model.features.sample_rate
        # Frames of a waveform begin at multiples of the hop; others are centred there.
        time = (window.start + frame + (0.5 if model.features.kind == "waveform" else 0.0)) * hop
        end = min((window.start + window.length) * hop, seconds)
        time = min(max(time, 0.0), seconds)
        yield Moment(layer, unit, file.path, time, window.start * hop, end, activation)


def _busiest_frames(
    explainer: Explainer, windows: Sequence[Window], layer: str, unit: int
) -> list[float]:
    """Returns the middle of the second of each window with most evidence for a unit, as a frame.

    The evidence is the derivative times the difference of the sound from silence.
    """
    spec = explainer.model.features
    features = np.stack([window.inputs for window in windows]).astype(np.float32)
    # The batch is filled, so that one size is compiled.
    gradients = explainer.gradients(np.resize(features, (BATCH, *features.shape[1:])), layer, unit)
    width = max(round(_MOMENT_SECONDS * spec.sample_rate / spec.hop_length), 1)
    found = []
    for window, values, gradient in zip(windows, features, gradients.inputs, strict=False):
        evidence = (gradient * (values - silence(values, spec))).sum(axis=1, dtype=np.float64)
        size = min(width, window.length)
        smooth = scipy.ndimage.uniform_filter1d(evidence[: window.length], size, mode="constant")
        found.append(float(smooth.argmax()))
    return found
