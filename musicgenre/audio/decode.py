"""Sound files to mono samples at the rate that the features need."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import librosa
import numpy as np
import soundfile

from musicgenre.errors import UserError

# libsndfile's log notes a data chunk that is longer than the file, "data : 1323000 (should be 352844)".
_DECLARED_AND_PRESENT = re.compile(r"^\s*(?:data(?:\s*size)?|SSND)\s*:\s*(\d+)\s*\(should be (\d+)\)", re.I | re.M)
# Programs that write to a pipe cannot go back to fill in the length and leave one of these.
_STREAMED_LENGTHS = (0, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF)
# An mp3's frame count takes in the encoder's delay and padding, which decoding removes.
_SLACK_SECONDS = 0.25
# Below this peak a 16-bit file holds nothing but its own rounding noise.
SILENCE_PEAK = 2.0**-14


class Audio(NamedTuple):
    """Mono samples, float32 `[samples]` nominally in [-1, 1], and their rate in Hz."""

    samples: np.ndarray
    sample_rate: int


def load_audio(path: str | os.PathLike[str], sample_rate: int, *, min_seconds: float = 1.0) -> Audio:
    """Decodes a whole sound file, mixes it down and resamples it.

    The channels are averaged first and the mean resampled with soxr's high quality, as `librosa.load` does.

    Args:
      path: a file in any format of libsndfile (wav, au, flac, ogg, mp3, aiff), any rate and channel count.
      sample_rate: rate of the result in Hz.
      min_seconds: files that are shorter are refused.

    Returns:
      The samples, float32 `[samples]`.

    Raises:
      UserError: the file is missing, empty, no sound, truncated, shorter than `min_seconds`, silent, or has
        samples that are not numbers. The message names the file.
    """
    path = Path(path)
    samples, native_rate = _read(path)
    seconds = len(samples) / native_rate
    if seconds < min_seconds:
        raise UserError(f"{path}: too short ({seconds:.2f} s; at least {min_seconds:g} s are needed).")
    if not np.isfinite(samples).all():
        bad = int(np.size(samples) - np.isfinite(samples).sum())
        raise UserError(f"{path}: {bad} of its samples are not finite numbers (NaN or infinity).")
    mono = np.asfortranarray(samples.mean(axis=1, dtype=np.float32))
    if np.abs(mono).max() < SILENCE_PEAK:
        raise UserError(f"{path}: silent (no sample above {SILENCE_PEAK:.1e} of full scale).")
    if native_rate != sample_rate:
        mono = librosa.resample(mono, orig_sr=native_rate, target_sr=sample_rate, res_type="soxr_hq")
    return Audio(np.ascontiguousarray(mono, np.float32), sample_rate)


def _read(path: Path) -> tuple[np.ndarray, int]:
    """Returns float32 samples `[samples, channels]` and their rate, or says why the file cannot be decoded."""
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: empty file (0 bytes).")
    try:
        with soundfile.SoundFile(path) as file:
            declared = file.frames
            log = file.extra_info
            samples = file.read(dtype="float32", always_2d=True)
            native_rate = file.samplerate
    except (soundfile.LibsndfileError, RuntimeError) as error:
        reason = str(getattr(error, "error_string", error)).rstrip(".")
        raise UserError(f"{path}: not a sound file that can be decoded ({reason}).") from error
    match = _DECLARED_AND_PRESENT.search(log)
    if match and int(match[1]) not in _STREAMED_LENGTHS and int(match[2]) < int(match[1]):
        raise UserError(f"{path}: truncated (its header promises {int(match[1])} bytes of sound, {int(match[2])} are there).")
    if declared < 2**62 and declared - len(samples) > _SLACK_SECONDS * native_rate:
        raise UserError(f"{path}: truncated ({declared} frames promised, {len(samples)} could be decoded).")
    if len(samples) == 0:
        raise UserError(f"{path}: holds no sound (0 samples).")
    return samples, native_rate
