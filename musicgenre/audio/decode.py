"""Sound files to mono samples at the rate that the features need, whole or as a stream of blocks."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from musicgenre.audio.resample import resample, resample_stream
from musicgenre.errors import UserError

# libsndfile's log notes a data chunk that is longer than the file, "data : 1323000 (should be 352844)".
_DECLARED_AND_PRESENT = re.compile(
    r"^\s*(?:data(?:\s*size)?|SSND)\s*:\s*(\d+)\s*\(should be (\d+)\)", re.I | re.M
)
# Programs that write to a pipe cannot go back to fill in the length and leave one of these.
_STREAMED_LENGTHS = (0, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF)
# An mp3's frame count takes in the encoder's delay and padding, which decoding removes.
_SLACK_SECONDS = 0.25
# Below this peak a 16-bit file holds nothing but its own rounding noise.
SILENCE_PEAK = 2.0**-14
# Samples of a channel that are decoded at a time: 12 seconds at 22,050 Hz.
BLOCK = 1 << 18


class Audio(NamedTuple):
    """Mono samples, float32 `[samples]` nominally in [-1, 1], and their rate in Hz."""

    samples: np.ndarray
    sample_rate: int


def load_audio(
    path: str | os.PathLike[str],
    sample_rate: int,
    *,
    min_seconds: float = 1.0,
    resampler: str = "soxr_hq",
) -> Audio:
    """Decodes a whole sound file, mixes it down and resamples it.

    The channels are averaged first and the mean resampled, by default with soxr's high quality, as `librosa.load` does.

    Args:
      path: a file in any format of libsndfile (wav, au, flac, ogg, mp3, aiff), any rate and channel count.
      sample_rate: rate of the result in Hz.
      min_seconds: files that are shorter are refused.
      resampler: see `musicgenre.audio.resample.resample`.

    Returns:
      The samples, float32 `[samples]`.

    Raises:
      UserError: the file is missing, empty, no sound, truncated, shorter than `min_seconds`, silent, or has
        samples that are not numbers. The message names the file.
    """
    sound = _Sound(Path(path), min_seconds, BLOCK)
    mono = np.concatenate(list(sound))
    return Audio(resample(mono, sound.rate, sample_rate, resampler), sample_rate)


def stream_audio(
    path: str | os.PathLike[str],
    sample_rate: int,
    *,
    min_seconds: float = 1.0,
    block: int = BLOCK,
    resampler: str = "soxr_hq",
) -> Iterator[np.ndarray]:
    """Yields what `load_audio` returns in blocks, the same to the bit, so that a file of any length takes the same memory.

    Args:
      path: see `load_audio`.
      sample_rate: rate of the result in Hz.
      min_seconds: files that are shorter are refused.
      block: samples of a channel that are decoded at a time.
      resampler: see `musicgenre.audio.resample.resample`.

    Yields:
      Mono samples, float32 `[any]`.

    Raises:
      UserError: see `load_audio`. That a file is cut short, say, is known at its end only: what came before the error must not
        be used.
    """
    sound = _Sound(Path(path), min_seconds, block)
    yield from resample_stream(sound, sound.rate, sample_rate, resampler)


class _Sequential(soundfile.SoundFile):
    """A file that is read from its start to its end; soundfile would otherwise seek after every block."""

    def seekable(self) -> bool:
        """Says no, whatever the file can do."""
        return False


class _Sound:
    """The mono samples of a file at its own rate, in blocks float32 `[any]`, and all that can be wrong with them.

    Attributes:
      rate: Hz.
      length: samples that have been decoded so far.
    """

    def __init__(self, path: Path, min_seconds: float, block: int) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file.")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: empty file (0 bytes).")
        self._path, self._min_seconds, self._block = path, min_seconds, block
        try:
            self._file = _Sequential(_name(path))
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise self._undecodable(error) from error
        self.rate = int(self._file.samplerate)
        self.length = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        """Decodes the file once; nothing more is given after a sample that is no number."""
        bad, peak = 0, 0.0
        with self._file as file:
            declared, log = file.frames, file.extra_info
            while len(samples := self._read(file)):
                self.length += len(samples)
                finite = np.isfinite(samples)
                bad += 0 if finite.all() else int(samples.size - finite.sum())
                if not bad:
                    mono = _mixed_down(samples)
                    peak = max(peak, float(np.abs(mono).max()))
                    yield mono
        self._check(declared, log, bad, peak)

    def _read(self, file: soundfile.SoundFile) -> np.ndarray:
        try:
            samples: np.ndarray = file.read(self._block, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise self._undecodable(error) from error
        return samples

    def _check(self, declared: int, log: str, bad: int, peak: float) -> None:
        """Raises UserError where the file that has been decoded cannot be used."""
        path, seconds = self._path, self.length / self.rate
        match = _DECLARED_AND_PRESENT.search(log)
        if match and int(match[1]) not in _STREAMED_LENGTHS and int(match[2]) < int(match[1]):
            raise UserError(
                f"{path}: truncated (its header promises {int(match[1])} bytes of sound, {int(match[2])} are there)."
            )
        if declared < 2**62 and declared - self.length > _SLACK_SECONDS * self.rate:
            raise UserError(
                f"{path}: truncated ({declared} frames promised, {self.length} could be decoded)."
            )
        if self.length == 0:
            raise UserError(f"{path}: holds no sound (0 samples).")
        if seconds < self._min_seconds:
            raise UserError(
                f"{path}: too short ({seconds:.2f} s; at least {self._min_seconds:g} s are needed)."
            )
        if bad:
            raise UserError(
                f"{path}: {bad} of its samples are not finite numbers (NaN or infinity)."
            )
        if peak < SILENCE_PEAK:
            raise UserError(f"{path}: silent (no sample above {SILENCE_PEAK:.1e} of full scale).")

    def _undecodable(self, error: Exception) -> UserError:
        reason = str(getattr(error, "error_string", error)).rstrip(".")
        return UserError(f"{self._path}: not a sound file that can be decoded ({reason}).")


def _mixed_down(samples: np.ndarray) -> np.ndarray:
    """Returns the mean of the channels, `[samples, channels]` to `[samples]`.

    NumPy's over an axis of two takes half as long as decoding an mp3; the sum of both is the same to the bit.
    """
    if samples.shape[1] == 1:
        return samples[:, 0]
    if samples.shape[1] == 2:
        return (samples[:, 0] + samples[:, 1]) * np.float32(0.5)
    mono: np.ndarray = samples.mean(axis=1, dtype=np.float32)
    return mono


def _name(path: Path) -> str | bytes:
    """Returns a file's name as soundfile takes it: in bytes where it is no text."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return str(path)
