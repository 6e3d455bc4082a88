"""Sound files to mono samples at a given rate, at once or as a stream of blocks."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from musicgenre.audio.resample import resample, resample_stream
from musicgenre.errors import UserError

# libsndfile's log of a data chunk longer than the file: "data : 1323000 (should be 352844)".
_DECLARED_AND_PRESENT = re.compile(
    r"^\s*(?:data(?:\s*size)?|SSND)\s*:\s*(\d+)\s*\(should be (\d+)\)", re.I | re.M
)
# Programs that write to a pipe cannot fill in the length afterwards and leave one of these.
_STREAMED_LENGTHS = (0, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF)
# The frame count of an mp3 includes the encoder's delay and padding, which decoding removes.
_SLACK_SECONDS = 0.25
# Below this peak a 16-bit file holds only rounding noise.
SILENCE_PEAK = 2.0**-14
# Samples per channel decoded at a time: 12 seconds at 22,050 Hz.
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
    """Decodes a sound file, mixes it down to mono and resamples it.

    As in `librosa.load`, the mean of the channels is resampled, by default with soxr's "HQ".

    Args:
      path: a file in any format of libsndfile (wav, au, flac, ogg, mp3, aiff).
      sample_rate: rate of the result in Hz.
      min_seconds: shorter files are refused.
      resampler: see `musicgenre.audio.resample.resample`.

    Returns:
      The samples, float32 `[samples]`, and their rate.

    Raises:
      UserError: the file is missing, empty, not audio, truncated, shorter than `min_seconds`,
        silent, or has samples that are not finite. The message names the file.
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
    """Yields the samples of `load_audio`, bit for bit, in blocks and so in bounded memory.

    Args:
      path: see `load_audio`.
      sample_rate: rate of the result in Hz.
      min_seconds: shorter files are refused.
      block: samples per channel decoded at a time.
      resampler: see `musicgenre.audio.resample.resample`.

    Yields:
      Mono samples, float32 `[any]`.

    Raises:
      UserError: see `load_audio`. Some errors, such as truncation, are detected only at the end:
        discard the blocks that came before.
    """
    sound = _Sound(Path(path), min_seconds, block)
    yield from resample_stream(sound, sound.rate, sample_rate, resampler)


class _Sequential(soundfile.SoundFile):
    """A file read from start to end; soundfile would otherwise seek after every block."""

    def seekable(self) -> bool:
        """Returns False for any file."""
        return False


class _Sound:
    """The checked mono samples of a file, at the file's `rate` in Hz, in blocks float32 `[any]`."""

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

    def __iter__(self) -> Iterator[np.ndarray]:
        """Decodes the file; yields nothing after a sample that is not finite."""
        length, bad, peak = 0, 0, 0.0
        with self._file as file:
            declared, log = file.frames, file.extra_info
            while len(samples := self._read(file)):
                length += len(samples)
                bad += samples.size - int(np.isfinite(samples).sum())
                if not bad:
                    mono = _mixed_down(samples)
                    peak = max(peak, float(np.abs(mono).max()))
                    yield mono
        self._check(declared, length, log, bad, peak)

    def _read(self, file: soundfile.SoundFile) -> np.ndarray:
        try:
            samples: np.ndarray = file.read(self._block, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise self._undecodable(error) from error
        return samples

    def _check(self, declared: int, length: int, log: str, bad: int, peak: float) -> None:
        """Raises UserError if the decoded file cannot be used."""
        seconds = length / self.rate
        match = _DECLARED_AND_PRESENT.search(log)
        promised, present = (int(match[1]), int(match[2])) if match else (0, 0)
        problem = ""
        if promised not in _STREAMED_LENGTHS and present < promised:
            problem = (
                f"truncated (its header promises {promised} bytes of sound, {present} are there)"
            )
        elif declared < 2**62 and declared - length > _SLACK_SECONDS * self.rate:
            problem = f"truncated ({declared} frames promised, {length} could be decoded)"
        elif length == 0:
            problem = "holds no sound (0 samples)"
        elif seconds < self._min_seconds:
            problem = f"too short ({seconds:.2f} s; at least {self._min_seconds:g} s are needed)"
        elif bad:
            problem = f"{bad} of its samples are not finite numbers (NaN or infinity)"
        elif peak < SILENCE_PEAK:
            problem = f"silent (no sample above {SILENCE_PEAK:.1e} of full scale)"
        if problem:
            raise UserError(f"{self._path}: {problem}.")

    def _undecodable(self, error: Exception) -> UserError:
        reason = str(getattr(error, "error_string", error)).rstrip(".")
        return UserError(f"{self._path}: not a sound file that can be decoded ({reason}).")


def _mixed_down(samples: np.ndarray) -> np.ndarray:
    """Returns the mean of the channels, `[samples, channels]` to `[samples]`."""
    if samples.shape[1] == 1:
        return samples[:, 0]
    if samples.shape[1] == 2:
        # Bit-identical to NumPy's mean over two channels, which takes half as long as decoding.
        return (samples[:, 0] + samples[:, 1]) * np.float32(0.5)
    mono: np.ndarray = samples.mean(axis=1, dtype=np.float32)
    return mono


def _name(path: Path) -> str | bytes:
    """Returns a path for soundfile, which needs bytes where the path is not valid text."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return str(path)
