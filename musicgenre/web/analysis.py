"""One sound file to all that the page shows of it, as plain JSON values."""

import base64
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from musicgenre.audio.decode import BLOCK, stream_audio
from musicgenre.audio.features import to_db
from musicgenre.errors import UserError
from musicgenre.inference.tagger import Tagger
from musicgenre.inference.windows import (
    BATCH,
    Window,
    WindowScores,
    overview,
    overview_spec,
    stream_windows,
)

if TYPE_CHECKING:
    from musicgenre.inference.index import EmbeddingIndex

# Columns of the spectrogram at most: as many pixels as a wide screen gives it.
COLUMNS = 1500
# The labels over time: a window's length has this many windows, as long as the file has no more than `_WINDOWS` of them.
_WINDOWS_A_WINDOW = 8
_WINDOWS = 240
# Seconds of a file that are decoded at a time at most, whatever its rate.
_BLOCK_SECONDS = 30.0
NEIGHBOURS = 8


class Abandoned(Exception):
    """Nobody waits for the result any more."""


def analyse(
    tagger: Tagger,
    path: str | os.PathLike[str],
    name: str,
    *,
    max_seconds: float,
    index: "EmbeddingIndex | None" = None,
    wanted: Callable[[], bool] = lambda: True,
) -> dict[str, Any]:
    """Returns labels, labels over time, spectrogram and nearest files of a sound file; its memory does not grow with the file.

    Args:
      tagger: the model.
      path: the sound file.
      name: what the file is called in the result.
      max_seconds: longer files are refused.
      index: where the nearest files are looked up.
      wanted: is asked now and then whether to go on.

    Returns:
      `file`; `seconds`; `labels`: `label` and `probability` of each, in the order and to the bit of `Tagger.tag`; `taggram`:
      `starts` and `ends` in seconds `[windows]`, `labels`, and `probabilities` `[windows, labels]`; `spectrogram`: see
      `_spectrogram`; `neighbours`: `file` (its name and that of its folder, no more) and `similarity` of each, or None without
      an index.

    Raises:
      UserError: the file cannot be used, or is too long; the message begins with `path`.
      Abandoned: `wanted` says no.
    """
    model, spec = tagger.model, tagger.model.features
    path = Path(path)

    def scores(step: int) -> tuple[WindowScores, int]:
        counted = _Counted(path, tagger, max_seconds, wanted)
        return _scores(tagger, stream_windows(counted, spec, model, step=step), counted)

    whole, samples = scores(0)
    total = samples // spec.hop_length
    # Windows one after the other are few and coarse; overlapping ones follow the music.
    step = min(max(model.frames // _WINDOWS_A_WINDOW, -(-total // _WINDOWS), 1), model.frames)
    taggram = scores(step)[0]
    values = _mean(whole.probabilities)
    order = (
        np.arange(len(values)) if model.task == "regression" else np.argsort(-values, kind="stable")
    )
    neighbours = None
    if index is not None:
        # Of a model of crops, `Tagger.embed` and so an index has other windows than an evaluation.
        windows = whole if model.frames == model.layout.frames else scores(model.frames)[0]
        neighbours = [
            {
                "file": "/".join(PurePath(found.path).parts[-2:]),
                "similarity": float(found.similarity),
            }
            for found in index.search(_mean(windows.embeddings), NEIGHBOURS)
        ]
    return {
        "file": name,
        "seconds": samples / spec.sample_rate,
        "labels": [
            {"label": tagger.labels[i], "probability": float(values[i])} for i in order.tolist()
        ],
        "taggram": {
            "starts": taggram.starts.round(4).tolist(),
            "ends": taggram.ends.round(4).tolist(),
            "labels": list(tagger.labels),
            "probabilities": taggram.probabilities.astype(np.float64).round(5).tolist(),
        },
        "spectrogram": _spectrogram(tagger, path),
        "neighbours": neighbours,
    }


class _Counted:
    """The samples of a file in blocks at the model's rate, counted; a file that is too long is not decoded to its end."""

    def __init__(
        self, path: Path, tagger: Tagger, max_seconds: float, wanted: Callable[[], bool]
    ) -> None:
        self.samples = 0
        self._path, self._tagger, self._max_seconds, self._wanted = (
            path,
            tagger,
            max_seconds,
            wanted,
        )

    def __iter__(self) -> Iterator[np.ndarray]:
        spec = self._tagger.model.features
        rate, block = spec.sample_rate, BLOCK
        try:
            with soundfile.SoundFile(self._path) as file:
                if file.frames < 2**62 and file.frames > self._max_seconds * file.samplerate:
                    raise self._too_long()
                # At a rate of 1 Hz a usual block would be three days of sound.
                block = min(BLOCK, max(int(_BLOCK_SECONDS * file.samplerate), 1))
        except (soundfile.LibsndfileError, RuntimeError, OSError):
            pass  # the reader says better what is wrong
        blocks = stream_audio(
            self._path,
            rate,
            min_seconds=self._tagger.min_seconds,
            block=block,
            resampler=spec.resampler,
        )
        for samples in blocks:
            if not self._wanted():
                raise Abandoned
            self.samples += len(samples)
            if self.samples > (self._max_seconds + 1) * rate:
                raise self._too_long()
            yield samples

    def _too_long(self) -> UserError:
        return UserError(
            f"{self._path}: longer than the {self._max_seconds:g} s of sound that this server takes "
            "(whoever runs it can raise --max_seconds). Send a part of it."
        )


def _scores(
    tagger: Tagger, windows: Iterator[Window], counted: _Counted
) -> tuple[WindowScores, int]:
    """Returns what the network says of each window, and how many samples the file has."""
    firsts: list[int] = []
    lengths: list[int] = []
    outputs: list[tuple[np.ndarray, np.ndarray]] = []
    batch: list[np.ndarray] = []
    for window in windows:
        firsts.append(window.start)
        lengths.append(window.length)
        batch.append(window.inputs)
        if len(batch) == BATCH:
            outputs.append(tagger.network(np.stack(batch)))
            batch = []
    if batch:
        outputs.append(tagger.network(np.stack(batch)))
    spec = tagger.model.features
    first = np.array(firsts)
    end = np.minimum((first + np.array(lengths)) * spec.hop_length, counted.samples)
    probabilities, embeddings = (np.concatenate(column) for column in zip(*outputs, strict=True))
    scores = WindowScores(
        first * spec.hop_length / spec.sample_rate,
        end / spec.sample_rate,
        probabilities,
        embeddings,
    )
    return scores, counted.samples


def _mean(values: np.ndarray) -> np.ndarray:
    mean: np.ndarray = (values.sum(axis=0, dtype=np.float64) / len(values)).astype(np.float32)
    return mean


def _spectrogram(tagger: Tagger, path: Path) -> dict[str, Any]:
    """Returns the picture of a file's mel spectrogram.

    Returns:
      `columns` and `bands`; `levels`: a byte for each cell, column after column and the lowest band first, in base64, 0 for
      `floor` dB and 255 for the loudest cell; `start`: the left edge of the first column in seconds; `seconds` from one column
      to the next; `ticks`: pairs of a position (0 is the middle of the lowest band) and its frequency in Hz.
    """
    from musicgenre.studies.figures import mel_ticks  # brings matplotlib

    spec = overview_spec(tagger.model.features)
    power, seconds = overview(path, spec, COLUMNS, min_seconds=tagger.min_seconds)
    decibels = np.clip(to_db(power, spec), -spec.top_db, 0)
    levels = np.round(255 * (decibels / spec.top_db + 1)).astype(np.uint8)
    return {
        "columns": len(levels),
        "bands": spec.n_mels,
        "levels": base64.b64encode(levels.tobytes()).decode("ascii"),
        "floor": -spec.top_db,
        "start": -spec.hop_length / spec.sample_rate / 2,
        "seconds": seconds,
        "ticks": [[position, hertz] for position, hertz in mel_ticks(spec).items()],
    }
