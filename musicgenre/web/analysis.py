"""Analyses one sound file for the page, as plain JSON values."""

import base64
import contextlib
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
from musicgenre.inference.windows import FileScores, FileWindows, score_file

if TYPE_CHECKING:
    from musicgenre.inference.index import EmbeddingIndex

# Most columns of the spectrogram: the pixels of a wide screen.
COLUMNS = 1500
# Windows of the labels over time: this many per window length, and at most `_WINDOWS` per file.
_OVERLAP = 8
_WINDOWS = 240
# Most seconds of a file that are decoded at once, at any sample rate.
_BLOCK_SECONDS = 30.0
NEIGHBOURS = 8


class Abandoned(Exception):
    """The client no longer waits for the result."""


def analyse(
    tagger: Tagger,
    path: str | os.PathLike[str],
    name: str,
    *,
    max_seconds: float,
    index: "EmbeddingIndex | None" = None,
    wanted: Callable[[], bool] = lambda: True,
) -> dict[str, Any]:
    """Returns labels, labels over time, spectrogram and nearest files, in bounded memory.

    Longer files than `max_seconds` are refused. `wanted` is called from time to time; the work ends
    when it returns False.

    Returns:
      `file`; `seconds`; `labels`: `label` and `probability` of each, equal to those of `Tagger.tag`
      bit for bit and in its order; `taggram`: `starts` and `ends` in seconds `[windows]`, `labels`,
      and `probabilities` `[windows, labels]`; `spectrogram`: see `_spectrogram`; `neighbours`:
      `file` (its name and its folder's name only) and `similarity` of each, or None without an
      index.

    Raises:
      UserError: the file cannot be used or is too long; the message begins with `path`.
      Abandoned: `wanted` returned False.
    """
    model, spec = tagger.model, tagger.model.features
    path = Path(path)

    def scores(step: int) -> tuple[FileScores, int]:
        blocks = _blocks(path, tagger, max_seconds, wanted)
        windows = FileWindows(path, model, step=step, blocks=blocks)
        return score_file(windows, tagger.network, keep_windows=True), windows.samples

    whole, samples = scores(0)
    total = samples // spec.hop_length
    # Consecutive windows are few and coarse; overlapping ones follow the music.
    step = min(max(model.frames // _OVERLAP, -(-total // _WINDOWS), 1), model.frames)
    taggram = scores(step)[0].windows
    assert taggram is not None
    neighbours = None
    if index is not None:
        # For a model of crops, `Tagger.embed` and the index use other windows than an evaluation.
        consecutive = whole if model.frames == model.layout.frames else scores(model.frames)[0]
        assert consecutive.embedding is not None
        neighbours = [
            {"file": "/".join(PurePath(near).parts[-2:]), "similarity": float(similarity)}
            for near, similarity in index.search(consecutive.embedding, NEIGHBOURS)
        ]
    return {
        "file": name,
        "seconds": samples / spec.sample_rate,
        "labels": [tag._asdict() for tag in tagger.tags(whole)],
        "taggram": {
            "starts": taggram.starts.round(4).tolist(),
            "ends": taggram.ends.round(4).tolist(),
            "labels": list(tagger.labels),
            "probabilities": taggram.probabilities.astype(np.float64).round(5).tolist(),
        },
        "spectrogram": _spectrogram(tagger, path),
        "neighbours": neighbours,
    }


def _blocks(
    path: Path, tagger: Tagger, max_seconds: float, wanted: Callable[[], bool]
) -> Iterator[np.ndarray]:
    """Yields a file's samples at the model's rate; decodes no more of a file that is too long."""
    spec = tagger.model.features
    limit = f"longer than the {max_seconds:g} s of sound that this server accepts"
    too_long = UserError(f"{path}: {limit}. Send a part of it, or raise --max_seconds.")
    samples, block = 0, BLOCK
    # `stream_audio` reports unreadable files.
    with (
        contextlib.suppress(soundfile.LibsndfileError, RuntimeError, OSError),
        soundfile.SoundFile(path) as file,
    ):
        if file.frames < 2**62 and file.frames > max_seconds * file.samplerate:
            raise too_long
        # At a rate of 1 Hz a block of the usual size would be three days of sound.
        block = min(BLOCK, max(int(_BLOCK_SECONDS * file.samplerate), 1))
    options: dict[str, Any] = {"min_seconds": tagger.min_seconds, "resampler": spec.resampler}
    for part in stream_audio(path, spec.sample_rate, block=block, **options):
        if not wanted():
            raise Abandoned
        samples += len(part)
        if samples > (max_seconds + 1) * spec.sample_rate:
            raise too_long
        yield part


def _spectrogram(tagger: Tagger, path: Path) -> dict[str, Any]:
    """Returns the picture of a file's mel spectrogram.

    Returns:
      `columns` and `bands`; `levels`: one byte per cell in base64, column by column with the lowest
      band first, 0 for `floor` dB and 255 for the loudest cell; `start`: the left edge of the first
      column in seconds; `seconds` from one column to the next; `ticks`: pairs of a position (0 is
      the middle of the lowest band) and its frequency in Hz.
    """
    from musicgenre.inference.spectrogram import mel_ticks, overview, overview_spec  # matplotlib

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
