"""Samples to log-mels, MFCCs, STFTs or framed waveforms, and the specification that travels with all that is made of them."""

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
# Frames that are transformed at a time: few enough for the cache, and enough to make the calls few.
_PART = 54
# Frames whose bands are summed at a time.
_BLOCK = 4 * _PART
# Mel bands of one product.
_BANDS = 8


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """How samples become features. Two stores or models are compatible when their specs are equal.

    The defaults are the report's front end (section 3): librosa's `melspectrogram(n_mels=128, n_fft=2048,
    hop_length=1024)` at 22,050 Hz, then `power_to_db(ref=np.max)`, of frames centred on multiples of the hop.

    Attributes:
      kind: "logmel", "mfcc" (an orthonormal DCT-II of the log-mel bands), "stft" (the power spectrogram in dB, without
        mel bands) or "waveform" (the samples themselves, cut into frames of `hop_length`).
      sample_rate: Hz.
      n_fft: window (Hann) and transform length, samples.
      hop_length: samples from one frame to the next.
      n_mels: mel bands (Slaney's scale and area normalisation).
      n_mfcc: cepstral coefficients kept when the kind is "mfcc".
      fmin: lowest frequency of the bands, Hz.
      fmax: highest frequency, Hz; 0 means half the sample rate.
      db_ref: "max" (0 dB is the clip's loudest cell) or a power as a number, such as "1.0".
      top_db: dynamic range kept below the clip's maximum, dB.
      compression: "db", or "log10000": log10(10000 x + 1) of the power x, as in musicnn (Pons and Serra 2019). It is a
        fixed function of each cell, so `db_ref` and `top_db` play no part.
      resampler: what brings sound files of another rate to `sample_rate`: "soxr_hq", or "kaiser_best", resampy's filter, which
        the scores of the original musicnn were made with (see `musicgenre.audio.resample.resample`).
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
        """Raises UserError for a value that cannot work, naming the field."""
        if self.kind not in KINDS:
            raise UserError(
                f"features.kind: {self.kind!r} is not known." + did_you_mean(self.kind, KINDS)
            )
        for name in ("sample_rate", "n_fft", "hop_length", "n_mels", "n_mfcc"):
            if getattr(self, name) < 1:
                raise UserError(f"features.{name} must be at least 1, not {getattr(self, name)}.")
        if not 0 <= self.fmin < self.top_frequency <= self.sample_rate / 2:
            raise UserError(
                f"features.fmin={self.fmin:g} and fmax={self.top_frequency:g} must lie between 0 and "
                f"half the sample rate ({self.sample_rate / 2:g} Hz), in that order."
            )
        if self.top_db <= 0:
            raise UserError(f"features.top_db must be positive, not {self.top_db:g}.")
        if self.db_ref != "max":
            try:
                valid = float(self.db_ref) > 0
            except ValueError:
                valid = False
            if not valid:
                raise UserError(
                    f"features.db_ref must be 'max' or a positive number, not {self.db_ref!r}."
                )
        if self.kind == "mfcc" and self.n_mfcc > self.n_mels:
            raise UserError(f"features.n_mfcc={self.n_mfcc} exceeds features.n_mels={self.n_mels}.")
        if self.compression not in COMPRESSIONS:
            raise UserError(
                f"features.compression: {self.compression!r} is not known."
                + did_you_mean(self.compression, COMPRESSIONS)
            )
        if self.compression != "db" and self.kind not in ("logmel", "stft"):
            raise UserError(
                f"features.compression={self.compression!r} is of log-mels and the STFT, not of features.kind={self.kind!r}: "
                "leave it at 'db'."
            )
        if self.resampler not in RESAMPLERS:
            raise UserError(
                f"features.resampler: {self.resampler!r} is not known."
                + did_you_mean(self.resampler, RESAMPLERS)
            )

    @property
    def top_frequency(self) -> float:
        """Upper edge of the highest band in Hz."""
        return self.fmax or self.sample_rate / 2

    @property
    def bands(self) -> int:
        """Values per frame: mel bands, cepstral coefficients, frequencies of the STFT, or samples."""
        return {
            "logmel": self.n_mels,
            "mfcc": self.n_mfcc,
            "stft": 1 + self.n_fft // 2,
            "waveform": self.hop_length,
        }[self.kind]

    def frames(self, seconds: float) -> int:
        """Frames of a clip of that length: one for each whole hop, plus the centred one at the end but for waveforms."""
        hops = int(seconds * self.sample_rate) // self.hop_length
        return max(hops, 1) if self.kind == "waveform" else 1 + hops

    def samples(self, frames: int) -> int:
        """The fewest samples that give at least `frames` frames."""
        return (frames if self.kind == "waveform" else frames - 1) * self.hop_length

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values.

        The resampler is left out at its default: stores and models that were made before there was a choice stay what they are.
        """
        values = dataclasses.asdict(self)
        if self.resampler == RESAMPLERS[0]:
            del values["resampler"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FeatureSpec":
        """Builds a spec from a mapping; an unknown field is a UserError that names the nearest known one."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise UserError(
                    f"features.{name} is not a field of the front end." + did_you_mean(name, known)
                )
        return cls(**values)

    @property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits that differ between different specs."""
        return fingerprint(self.to_dict())

    def describe(self) -> str:
        """One line for people."""
        rate = f"{self.sample_rate} Hz" + (
            f" by {self.resampler}" if self.resampler != RESAMPLERS[0] else ""
        )
        if self.kind == "waveform":
            return f"waveform, {rate}, frames of {self.hop_length} samples"
        scale = (
            f"dB re {self.db_ref}, top {self.top_db:g} dB"
            if self.compression == "db"
            else "log10(10000 x + 1) of the power"
        )
        return (
            f"{self.kind} {self.bands} bands, {rate}, n_fft {self.n_fft}, hop {self.hop_length}, "
            f"{self.fmin:g}-{self.top_frequency:g} Hz, {scale}"
        )


def mel_frequencies(low: float, high: float, count: int) -> np.ndarray:
    """Returns `count` frequencies from `low` to `high` Hz at equal distances on Slaney's mel scale, float64 `[count]`.

    The scale (M. Slaney, "Auditory Toolbox", 1998) has 15 mels to 1 kHz, evenly spaced, and from there 27 to each factor of 6.4.
    """
    to_mels, to_octaves = 15 / 1000, 27 / math.log(6.4)

    def mels(hertz: float) -> float:
        return 15 + to_octaves * math.log(hertz / 1000) if hertz >= 1000 else to_mels * hertz

    spaced = np.linspace(mels(low), mels(high), count)
    return np.where(spaced < 15, spaced / to_mels, 1000 * np.exp((spaced - 15) / to_octaves))


@functools.lru_cache(maxsize=8)
def mel_filters(spec: FeatureSpec) -> np.ndarray:
    """Returns the transposed filter bank, float32 `[1 + n_fft // 2, n_mels]`: `librosa.filters.mel`, which takes long to load.

    Each band is a triangle from the centre of the band below to that of the band above, of the area 1 where frequency is in Hz.
    """
    frequencies = np.arange(1 + spec.n_fft // 2)[:, None] * (spec.sample_rate / spec.n_fft)
    edges = mel_frequencies(spec.fmin, spec.top_frequency, spec.n_mels + 2)
    below, centre, above = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (
        (frequencies - below) / (centre - below),
        (above - frequencies) / (above - centre),
    )
    filters = (np.maximum(np.minimum(rising, falling), 0) * (2 / (above - below))).astype(
        np.float32
    )
    if deaf := int((~filters.any(axis=0)).sum()):
        warnings.warn(
            f"{deaf} of {spec.n_mels} mel bands lie between two frequencies of the transform and are always silent: "
            "lower features.n_mels or raise features.n_fft.",
            stacklevel=2,
        )
    return filters


@functools.lru_cache(maxsize=8)
def _mel_groups(spec: FeatureSpec) -> tuple[tuple[slice, slice, np.ndarray], ...]:
    """Returns the filter bank without most of its zeros: neighbouring bands, the frequencies that they hear, and their filters.

    Of the front end's 128 x 1025 weights two in a hundred are not zero. Small products of 8 bands each take a sixth of the
    time of the whole one.
    """
    filters = mel_filters(spec)
    groups = []
    for first in range(0, spec.n_mels, _BANDS):
        bands = slice(first, min(first + _BANDS, spec.n_mels))
        heard = np.flatnonzero(filters[:, bands].any(axis=1))
        bins = slice(heard[0], heard[-1] + 1) if len(heard) else slice(0, 1)
        groups.append((bands, bins, np.ascontiguousarray(filters[bins, bands])))
    return tuple(groups)


@functools.lru_cache(maxsize=8)
def _window(n_fft: int) -> np.ndarray:
    """Returns the periodic Hann window, float64 `[n_fft]`."""
    return np.hanning(n_fft + 1)[:-1]


def frame_count(samples: int, spec: FeatureSpec) -> int:
    """Returns how many frames so many samples make."""
    if spec.kind == "waveform":
        return max(samples // spec.hop_length, 1)
    return max(1 + (samples + 2 * (spec.n_fft // 2) - spec.n_fft) // spec.hop_length, 0)


def _power_blocks(samples: np.ndarray, spec: FeatureSpec) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields the power spectrogram of mono samples `[samples]` a block of frames at a time.

    The transform runs in double precision as librosa's does: single precision misses it by more than 1e-4 dB in quiet cells. All
    that is between the samples and the power stays in the cache and is used again for the next part of a block.

    Yields:
      Which frames these are, and their power, float32 `[any, 1 + n_fft // 2]`, which is valid until the next is asked for.
    """
    n_fft, hop, count = spec.n_fft, spec.hop_length, frame_count(len(samples), spec)
    samples = np.asarray(samples, np.float32)
    stretch = np.empty((_PART - 1) * hop + n_fft, np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(stretch, n_fft)[::hop]
    # The first frame is centred on the first sample; there are zeros beyond both ends. These frames need none of them:
    first_inside = math.ceil(n_fft // 2 / hop)
    inside = frames[:0]
    if len(samples) >= n_fft:
        inside = np.lib.stride_tricks.sliding_window_view(samples, n_fft)[
            first_inside * hop - n_fft // 2 :: hop
        ]
    windowed = np.empty((_PART, n_fft))
    spectrum = np.empty((_PART, 1 + n_fft // 2), np.complex128)
    rounded = np.empty(spectrum.shape, np.complex64)
    power = np.empty((_BLOCK, 1 + n_fft // 2), np.float32)
    for start in range(0, count, _BLOCK):
        rows = min(_BLOCK, count - start)
        for row in range(0, rows, _PART):
            number, part = start + row, slice(0, min(_PART, rows - row))
            if first_inside <= number and number + part.stop <= first_inside + len(inside):
                windowed[part] = inside[number - first_inside :][part]
            else:
                first = number * hop - n_fft // 2
                before = max(-first, 0)
                there = samples[first + before : first + len(stretch)]
                stretch[:before] = 0
                stretch[before : before + len(there)] = there
                stretch[before + len(there) :] = 0
                windowed[part] = frames[part]
            np.multiply(windowed[part], _window(n_fft), out=windowed[part])
            np.fft.rfft(windowed[part], out=spectrum[part])
            rounded[part] = spectrum[part]
            np.abs(rounded[part], out=power[row : row + part.stop])
        np.square(power[:rows], out=power[:rows])
        yield slice(start, start + rows), power[:rows]


def mel_power(samples: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns the mel power spectrogram, float32 `[frames, mels]`, of mono samples `[samples]`.

    Equals `librosa.feature.melspectrogram` transposed.
    """
    result = np.empty((frame_count(len(samples), spec), spec.n_mels), np.float32)
    for frames, power in _power_blocks(samples, spec):
        for bands, bins, filters in _mel_groups(spec):
            np.matmul(power[:, bins], filters, out=result[frames, bands])
    return result


def stft_power(samples: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns the power spectrogram, float32 `[frames, 1 + n_fft // 2]`: `abs(librosa.stft(samples)) ** 2` transposed."""
    result = np.empty((frame_count(len(samples), spec), 1 + spec.n_fft // 2), np.float32)
    for frames, power in _power_blocks(samples, spec):
        result[frames] = power
    return result


def frame_waveform(samples: np.ndarray, hop_length: int) -> np.ndarray:
    """Returns consecutive samples as float32 `[frames, hop_length]`; a last frame that is not whole is dropped.

    Fewer samples than one frame are filled up with zeros.
    """
    samples = np.pad(samples, (0, max(hop_length - len(samples), 0)))
    frames = len(samples) // hop_length
    return np.ascontiguousarray(
        samples[: frames * hop_length].reshape(frames, hop_length), np.float32
    )


def to_db(power: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns the power `[frames, bands]` of one clip in dB, limited to `top_db` below the clip's maximum."""
    floor, ceiling = np.float32(1e-10), np.float32(np.inf)
    reference = power.max() if spec.db_ref == "max" else np.float32(float(spec.db_ref))
    # NumPy clips to two bounds in a quarter of the time that its maximum with one number takes.
    db = np.log10(np.clip(power, floor, ceiling), dtype=np.float32)
    db *= 10
    db -= 10 * np.log10(np.maximum(floor, reference))
    return np.clip(db, db.max() - np.float32(spec.top_db), ceiling, out=db)


def compress(power: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns the power `[frames, bands]` of one clip on the spec's scale: dB (see `to_db`) or log10(10000 x + 1).

    The original musicnn rounds the power to float16 before its logarithm. That moves a value by at most 2.2e-4, and is
    left out here; the store, which keeps the logarithm in float16, moves a value by up to ten times that.
    """
    if spec.compression == "db":
        return to_db(power, spec)
    return np.log10(np.float32(10000) * power + np.float32(1)).astype(np.float32)


def mfcc_from_db(db: np.ndarray, n_mfcc: int) -> np.ndarray:
    """Returns the cepstrum `[..., n_mfcc]` of dB log-mels `[..., mels]`: orthonormal DCT-II, as librosa's."""
    import scipy.fft  # takes its time to load, and log-mels do not need it

    return scipy.fft.dct(db, axis=-1, type=2, norm="ortho")[..., :n_mfcc].astype(np.float32)


def compute_features(samples: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns the features of one clip, float32 `[frames, bands]`, of mono samples `[samples]` at the spec's rate.

    The log-mel kind equals `power_to_db(melspectrogram(...), ref=np.max)` of librosa 0.11 and 1.0 to 1e-4 dB.
    """
    if spec.kind == "waveform":
        return frame_waveform(samples, spec.hop_length)
    if spec.kind == "stft":
        return compress(stft_power(samples, spec), spec)
    if spec.kind == "logmel":
        return compress(mel_power(samples, spec), spec)
    return mfcc_from_db(to_db(mel_power(samples, spec), spec), spec.n_mfcc)
