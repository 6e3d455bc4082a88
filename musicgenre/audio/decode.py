"""Sound files to mono samples at a given rate, at once or as a stream of blocks."""

import os
import re
from collections.abc import Iterator
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
    """Decodes a sound file, mixes it down to mono and resamples it, by default as `librosa.load`.

    Args:
      path: a file in any format of libsndfile (wav, au, flac, ogg, mp3, aiff).
      sample_rate: rate of the result in Hz.
      min_seconds: shorter files are refused.
      resampler: see `musicgenre.audio.resample.resample`.

    Raises:
      UserError: the file is missing, empty, not audio, truncated, shorter than `min_seconds`,
        silent, or has samples that are not finite. The message names the file.
    """
    file = _open(path)
    mono = np.concatenate(list(_blocks(file, path, min_seconds, BLOCK)))
    return Audio(resample(mono, file.samplerate, sample_rate, resampler), sample_rate)


def stream_audio(
    path: str | os.PathLike[str],
    sample_rate: int,
    *,
    min_seconds: float = 1.0,
    block: int = BLOCK,
    resampler: str = "soxr_hq",
) -> Iterator[np.ndarray]:
    """Yields the samples of `load_audio`, bit for bit, in blocks and so in bounded memory.

    `block` is the number of samples per channel decoded at a time. Some errors, such as truncation,
    are raised only at the end: discard the blocks that came before.
    """
    file = _open(path)
    blocks = _blocks(file, path, min_seconds, block)
    yield from resample_stream(blocks, file.samplerate, sample_rate, resampler)


class _Sequential(soundfile.SoundFile):
    """A file read from start to end; soundfile would otherwise seek after every block."""

    def seekable(self) -> bool:
        """Returns False for any file."""
        return False


def _open(path: str | os.PathLike[str]) -> soundfile.SoundFile:
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file.")
    if os.path.getsize(path) == 0:
        raise UserError(f"{path}: empty file (0 bytes).")
    try:
        return _Sequential(os.fsencode(path))  # bytes, since a path may not be valid text
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise _undecodable(path, error) from error


def _blocks(
    file: soundfile.SoundFile, path: str | os.PathLike[str], min_seconds: float, size: int
) -> Iterator[np.ndarray]:
    """Yields checked mono samples, float32 `[any]`, and none after one that is not finite."""
    length, bad, peak = 0, 0, 0.0
    with file:
        declared, rate, log = file.frames, file.samplerate, file.extra_info
        while True:
            try:
                samples = file.read(size, dtype="float32", always_2d=True)
            except (soundfile.LibsndfileError, RuntimeError) as error:
                raise _undecodable(path, error) from error
            if not len(samples):
                break
            length += len(samples)
            bad += samples.size - int(np.isfinite(samples).sum())
            if not bad:
                mono = _mixed_down(samples)
                peak = max(peak, float(np.abs(mono).max()))
                yield mono
    match = _DECLARED_AND_PRESENT.search(log)
    promised, present = map(int, match.groups()) if match else (0, 0)
    problems = {
        f"truncated (its header promises {promised} bytes of sound, {present} are present)": (
            promised not in _STREAMED_LENGTHS and present < promised
        ),
        f"truncated ({declared} frames promised, {length} could be decoded)": (
            declared < 2**62 and declared - length > _SLACK_SECONDS * rate
        ),
        "holds no sound (0 samples)": length == 0,
        f"too short ({length / rate:.2f} s; at least {min_seconds:g} s are needed)": (
            length / rate < min_seconds
        ),
        f"{bad} of its samples are not finite numbers (NaN or infinity)": bad > 0,
        f"silent (no sample above {SILENCE_PEAK:.1e} of full scale)": peak < SILENCE_PEAK,
    }
    for problem in (text for text, found in problems.items() if found):
        raise UserError(f"{path}: {problem}.")


def _undecodable(path: str | os.PathLike[str], error: Exception) -> UserError:
    reason = str(getattr(error, "error_string", error)).rstrip(".")
    return UserError(f"{path}: not a sound file that can be decoded ({reason}).")


def _mixed_down(samples: np.ndarray) -> np.ndarray:
    """Returns the mean of the channels, `[samples, channels]` to `[samples]`."""
    if samples.shape[1] == 1:
        return samples[:, 0]
    if samples.shape[1] == 2:
        # Bit-identical to NumPy's mean over two channels, which takes half as long as decoding.
        return np.asarray((samples[:, 0] + samples[:, 1]) * np.float32(0.5))
    return np.asarray(samples.mean(axis=1, dtype=np.float32))
