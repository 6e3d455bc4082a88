"""Samples to log-mels, MFCCs, STFTs or framed waveforms, and their specification."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from musicgenre.audio.resample import RESAMPLERS
from musicgenre.errors import UserError, did_you_mean
from musicgenre.files import fingerprint

KINDS = ("logmel", "mfcc", "stft", "waveform")
COMPRESSIONS = ("db", "log10000")
# Frames transformed at a time (they fit the cache), frames per block, and mel bands per product.
_PART = 54
_BLOCK = 4 * _PART
_BANDS = 8


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """The front end. Two stores or models are compatible when their specs are equal.

    The defaults are the report's (section 3): librosa's `melspectrogram(n_mels=128, n_fft=2048,
    hop_length=1024)` at 22,050 Hz, then `power_to_db(ref=np.max)`, with centred frames.

    Attributes:
      kind: "logmel", "mfcc" (an orthonormal DCT-II of the log-mel bands), "stft" (without mel
        bands) or "waveform" (samples in frames of `hop_length`).
      sample_rate: Hz.
      n_fft: length of the Hann window and the transform, samples.
      hop_length: samples between frames.
      n_mels: mel bands (Slaney's scale and area normalisation).
      n_mfcc: cepstral coefficients, for "mfcc".
      fmin: lowest frequency of the bands, Hz.
      fmax: highest frequency, Hz; 0 means half the sample rate.
      db_ref: "max" (0 dB is the clip's loudest cell) or a power as a number, such as "1.0".
      top_db: dynamic range below the clip's maximum, dB.
      compression: "db", or "log10000": log10(10000 x + 1) of the power x, as in musicnn (Pons and
        Serra 2019), which ignores `db_ref` and `top_db`.
      resampler: filter for files of another rate: "soxr_hq", or "kaiser_best", which the original
        musicnn's scores were made with (see `musicgenre.audio.resample.resample`).
    """

    kind: str = "logmel"
    sample_rate: int = 22050
    n_fft: int = 2048
    hop_length: int = 1024
    n_mels: int = 128
    n_mfcc: int = 20
    fmin: float = 0.0
    fmax: float = 0.0
    db_ref: str = "max"
    top_db: float = 80.0
    compression: str = "db"
    resampler: str = "soxr_hq"

    def __post_init__(self) -> None:
        """Raises UserError for an invalid value, naming the field."""
        choices = {"kind": KINDS, "compression": COMPRESSIONS, "resampler": RESAMPLERS}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                hint = did_you_mean(value, allowed)
                raise UserError(f"features.{name}: {value!r} is not known.{hint}")
        for name in ("sample_rate", "n_fft", "hop_length", "n_mels", "n_mfcc"):
            if getattr(self, name) < 1:
                raise UserError(f"features.{name} must be at least 1, not {getattr(self, name)}.")
        try:
            reference = 1.0 if self.db_ref == "max" else float(self.db_ref)
        except ValueError:
            reference = 0.0
        top, half = self.top_frequency, self.sample_rate / 2
        rules = {
            f"fmin={self.fmin:g} and fmax={top:g} must be in order between 0 and half the sample "
            f"rate ({half:g} Hz)": 0 <= self.fmin < top <= half,
            f"top_db must be positive, not {self.top_db:g}": self.top_db > 0,
            f"db_ref must be 'max' or a positive number, not {self.db_ref!r}": reference > 0,
            f"n_mfcc={self.n_mfcc} exceeds features.n_mels={self.n_mels}": (
                self.kind != "mfcc" or self.n_mfcc <= self.n_mels
            ),
            f"compression={self.compression!r} is for log-mels and the STFT, not for "
            f"features.kind={self.kind!r}: leave it at 'db'": (
                self.compression == "db" or self.kind in ("logmel", "stft")
            ),
        }
        for rule, holds in rules.items():
            if not holds:
                raise UserError(f"features.{rule}.")

    @property
    def top_frequency(self) -> float:
        """Upper edge of the highest band in Hz."""
        return self.fmax or self.sample_rate / 2

    @property
    def bands(self) -> int:
        """Values per frame: mel bands, cepstral coefficients, STFT frequencies, or samples."""
        sizes = self.n_mels, self.n_mfcc, 1 + self.n_fft // 2, self.hop_length
        return sizes[KINDS.index(self.kind)]

    def frames(self, seconds: float) -> int:
        """Returns the frames of a clip: one per complete hop, and one more except for waveforms."""
        hops = int(seconds * self.sample_rate) // self.hop_length
        return max(hops, 1) if self.kind == "waveform" else 1 + hops

    def samples(self, frames: int) -> int:
        """Returns the smallest number of samples that gives at least `frames` frames."""
        return (frames if self.kind == "waveform" else frames - 1) * self.hop_length

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        values = dataclasses.asdict(self)
        if self.resampler == RESAMPLERS[0]:
            del values["resampler"]  # stores and models older than this field keep fingerprints
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FeatureSpec":
        """Builds a spec; raises UserError for an unknown field, naming the nearest known one."""
        known = cls.__dataclass_fields__.keys()
        for name in sorted(values.keys() - known):
            hint = did_you_mean(name, known)
            raise UserError(f"features.{name} is not a field of the front end.{hint}")
        return cls(**values)

    @property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits that identify the spec."""
        return fingerprint(self.to_dict())

    def describe(self) -> str:
        """Returns one line for people."""
        default = self.resampler == RESAMPLERS[0]
        rate = f"{self.sample_rate} Hz" + ("" if default else f" by {self.resampler}")
        if self.kind == "waveform":
            return f"waveform, {rate}, frames of {self.hop_length} samples"
        decibels = f"dB re {self.db_ref}, top {self.top_db:g} dB"
        scale = decibels if self.compression == "db" else "log10(10000 x + 1) of the power"
        return (
            f"{self.kind} {self.bands} bands, {rate}, n_fft {self.n_fft}, hop {self.hop_length}, "
            f"{self.fmin:g}-{self.top_frequency:g} Hz, {scale}"
        )


def mel_frequencies(low: float, high: float, count: int) -> np.ndarray:
    """Returns frequencies from `low` to `high` Hz, evenly spaced in mels, float64 `[count]`.

    Slaney's scale ("Auditory Toolbox", 1998) is linear to 1 kHz, 15 mels, and then logarithmic with
    27 mels per factor of 6.4.
    """
    linear, log = 15 / 1000, 27 / math.log(6.4)
    ends = [15 + log * math.log(hz / 1000) if hz >= 1000 else linear * hz for hz in (low, high)]
    mels = np.linspace(ends[0], ends[1], count)
    return np.where(mels < 15, mels / linear, 1000 * np.exp((mels - 15) / log))


@functools.lru_cache(maxsize=8)
def mel_filters(spec: FeatureSpec) -> np.ndarray:
    """Returns the transposed filter bank, float32 `[1 + n_fft // 2, n_mels]`.

    Equals `librosa.filters.mel`, whose import takes long: triangles of unit area over Hz.
    """
    frequencies = np.arange(1 + spec.n_fft // 2)[:, None] * (spec.sample_rate / spec.n_fft)
    edges = mel_frequencies(spec.fmin, spec.top_frequency, spec.n_mels + 2)
    below, centre, above = edges[:-2], edges[1:-1], edges[2:]
    rising = (frequencies - below) / (centre - below)
    falling = (above - frequencies) / (above - centre)
    triangles = np.maximum(np.minimum(rising, falling), 0)
    filters = (triangles * (2 / (above - below))).astype(np.float32)
    if empty := int((~filters.any(axis=0)).sum()):
        warnings.warn(
            f"{empty} of {spec.n_mels} mel bands contain no frequency of the transform and are "
            "always silent: lower features.n_mels or raise features.n_fft.",
            stacklevel=2,
        )
    return filters


@functools.lru_cache(maxsize=8)
def _mel_groups(spec: FeatureSpec) -> tuple[tuple[slice, slice, np.ndarray], ...]:
    """Returns (bands, frequencies, filters) for groups of neighbouring bands.

    Only 2 % of the weights are not zero; products of 8 bands each take a sixth of the time.
    """
    filters, groups = mel_filters(spec), []
    for first in range(0, spec.n_mels, _BANDS):
        bands = slice(first, first + _BANDS)
        used = np.flatnonzero(filters[:, bands].any(axis=1))
        bins = slice(used[0], used[-1] + 1) if len(used) else slice(0, 1)
        groups.append((bands, bins, np.ascontiguousarray(filters[bins, bands])))
    return tuple(groups)


def frame_count(samples: int, spec: FeatureSpec) -> int:
    """Returns the number of frames of so many samples."""
    if spec.kind == "waveform":
        return max(samples // spec.hop_length, 1)
    return max(1 + (samples + 2 * (spec.n_fft // 2) - spec.n_fft) // spec.hop_length, 0)


def _power_blocks(samples: np.ndarray, spec: FeatureSpec) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields slices of frames and their power, float32 `[any, 1 + n_fft // 2]`, reused after.

    The transform is in double precision like librosa's; single precision differs by more than 1e-4
    dB in quiet cells. Intermediate arrays stay in the cache.
    """
    n_fft, hop, count = spec.n_fft, spec.hop_length, frame_count(len(samples), spec)
    # Frame k is centred on sample k * hop; both ends are padded with zeros.
    samples = np.pad(np.asarray(samples, np.float32), n_fft // 2)
    if not count:
        return
    frames = np.lib.stride_tricks.sliding_window_view(samples, n_fft)[::hop]
    window, windowed = np.hanning(n_fft + 1)[:-1], np.empty((_PART, n_fft))  # periodic
    spectrum = np.empty((_PART, 1 + n_fft // 2), np.complex128)
    rounded = np.empty(spectrum.shape, np.complex64)
    power = np.empty((_BLOCK, 1 + n_fft // 2), np.float32)
    for start in range(0, count, _BLOCK):
        rows = min(_BLOCK, count - start)
        for row in range(0, rows, _PART):
            part = slice(0, min(_PART, rows - row))
            windowed[part] = frames[start + row :][part]
            windowed[part] *= window
            np.fft.rfft(windowed[part], out=spectrum[part])
            rounded[part] = spectrum[part]
            np.abs(rounded[part], out=power[row : row + part.stop])
        np.square(power[:rows], out=power[:rows])
        yield slice(start, start + rows), power[:rows]


def mel_power(samples: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns `librosa.feature.melspectrogram(samples)` transposed, float32 `[frames, mels]`."""
    result = np.empty((frame_count(len(samples), spec), spec.n_mels), np.float32)
    for frames, power in _power_blocks(samples, spec):
        for bands, bins, filters in _mel_groups(spec):
            np.matmul(power[:, bins], filters, out=result[frames, bands])
    return result


def stft_power(samples: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns `abs(librosa.stft(samples)) ** 2` transposed, float32 `[frames, 1 + n_fft // 2]`."""
    result = np.empty((frame_count(len(samples), spec), 1 + spec.n_fft // 2), np.float32)
    for frames, power in _power_blocks(samples, spec):
        result[frames] = power
    return result


def frame_waveform(samples: np.ndarray, hop_length: int) -> np.ndarray:
    """Returns complete frames of samples, at least one (zero-padded), `[frames, hop_length]`."""
    samples = np.pad(samples, (0, max(hop_length - len(samples), 0)))
    complete = samples[: len(samples) // hop_length * hop_length]
    return np.ascontiguousarray(complete.reshape(-1, hop_length), np.float32)


def to_db(power: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns one clip's power `[frames, bands]` in dB, at least its maximum minus `top_db`."""
    floor, ceiling = np.float32(1e-10), np.float32(np.inf)
    reference = power.max() if spec.db_ref == "max" else np.float32(spec.db_ref)
    # Clipping to two bounds takes a quarter of the time of NumPy's maximum with a number.
    db = np.log10(np.clip(power, floor, ceiling), dtype=np.float32)
    db *= 10
    db -= 10 * np.log10(np.maximum(floor, reference))
    return np.clip(db, db.max() - np.float32(spec.top_db), ceiling, out=db)


def compress(power: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns one clip's power `[frames, bands]` in dB (see `to_db`) or as log10(10000 x + 1).

    The original musicnn also rounds the power to float16, which changes a value by at most 2.2e-4.
    """
    if spec.compression == "db":
        return to_db(power, spec)
    return np.log10(np.float32(10000) * power + np.float32(1)).astype(np.float32)


def mfcc_from_db(db: np.ndarray, n_mfcc: int) -> np.ndarray:
    """Returns the cepstrum `[..., n_mfcc]` of dB log-mels `[..., mels]` (orthonormal DCT-II)."""
    import scipy.fft  # slow to import, and log-mels do not need it

    return scipy.fft.dct(db, axis=-1, type=2, norm="ortho")[..., :n_mfcc].astype(np.float32)


def compute_features(samples: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns the features, float32 `[frames, bands]`, of mono samples at the spec's rate.

    Log-mels equal librosa's `power_to_db(melspectrogram(...), ref=np.max)` to 1e-4 dB.
    """
    if spec.kind == "waveform":
        return frame_waveform(samples, spec.hop_length)
    power = (stft_power if spec.kind == "stft" else mel_power)(samples, spec)
    scaled = compress(power, spec)
    return mfcc_from_db(scaled, spec.n_mfcc) if spec.kind == "mfcc" else scaled
