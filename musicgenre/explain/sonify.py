"""Attributions and spectrograms as sound: masks, inversion, and reading and writing excerpts."""

import os
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import scipy.ndimage
import soundfile
from librosa.filters import mel as mel_filter_bank

from musicgenre.audio.features import FeatureSpec
from musicgenre.errors import UserError
from musicgenre.explain.attribution import silence, spectral_bands
from musicgenre.files import replacing


def attribution_mask(spectral: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns gains between 0 and 1 that keep the evidence for a unit, float32 `[frames, bands]`.

    The positive part of `Attribution.spectral` is smoothed, so that single cells do not ring, and
    scaled so that its 99th percentile is 1.
    """
    positive = np.maximum(spectral, 0).astype(np.float64)
    if spec.kind == "waveform":
        # Over 20 ms: the mask must not be audible itself.
        width = max(round(0.02 * spec.sample_rate), 1)
        smooth = scipy.ndimage.uniform_filter1d(positive.ravel(), width, mode="nearest")
        smooth = smooth.reshape(positive.shape)
    else:
        smooth = scipy.ndimage.gaussian_filter(positive, (1.0, 1.0), mode="nearest")
    most = float(np.quantile(smooth, 0.99)) or float(smooth.max()) or 1.0
    return np.clip(smooth / most, 0, 1).astype(np.float32)


def invert(
    features: np.ndarray, spec: FeatureSpec, mask: np.ndarray | None = None, *, iterations: int = 32
) -> np.ndarray:
    """Returns a sound with these features: what the network's input keeps of a sound.

    librosa maps mel bands to frequencies by least squares and finds phases by the Griffin-Lim
    algorithm. Frames too far apart for that are interpolated.

    Args:
      features: `[frames, bands]`, not normalised.
      spec: the front end.
      mask: gains between 0 and 1 of the amplitudes, in the shape of `spectral_bands`.
      iterations: of the Griffin-Lim algorithm.

    Returns:
      Samples, float32 `[samples]`; a waveform's own, others with a peak of 0.9.
    """
    features = features.astype(np.float32)
    if spec.kind == "waveform":
        return (features if mask is None else features * mask).ravel()
    amplitude = np.sqrt(_power(features, spec))
    amplitude = amplitude if mask is None else amplitude * mask
    # The least squares converge at any scale, but slowly at one far from 1.
    amplitude = amplitude / max(float(amplitude.max()), 1e-12)
    magnitude = amplitude.T
    if spec.kind != "stft":
        magnitude = librosa.feature.inverse.mel_to_stft(
            np.square(amplitude.T), power=2.0, **_mel_options(spec)
        )
    hop = _dense_hop(spec)
    length = max((len(features) - 1) * spec.hop_length, 1)
    samples = librosa.griffinlim(
        np.ascontiguousarray(_resampled_frames(magnitude.T, spec.hop_length, hop, length).T),
        n_iter=iterations,
        hop_length=hop,
        n_fft=spec.n_fft,
        random_state=0,
        length=length,
    )
    peak = float(np.abs(samples).max())
    return (0.9 * samples / peak if peak > 0 else samples).astype(np.float32)


def apply_mask(samples: np.ndarray, spec: FeatureSpec, mask: np.ndarray) -> np.ndarray:
    """Returns a sound whose short-time spectrum is multiplied by a mask, float32 `[samples]`.

    The sound is at the front end's rate; the mask has gains between 0 and 1 in the shape of
    `spectral_bands`.
    """
    if spec.kind == "waveform":
        return (samples * np.resize(mask.ravel(), len(samples))).astype(np.float32)
    if spec.kind != "stft":
        weights = mel_filter_bank(n_mels=spec.n_mels, norm=None, **_mel_options(spec))
        mask = mask @ (weights / np.maximum(weights.sum(axis=0, keepdims=True), 1e-6))
    hop = _dense_hop(spec)
    spectrum = librosa.stft(samples.astype(np.float32), n_fft=spec.n_fft, hop_length=hop)
    gains = _resampled_frames(mask, spec.hop_length, hop, len(samples))[: spectrum.shape[1]]
    spectrum *= np.pad(gains, ((0, spectrum.shape[1] - len(gains)), (0, 0)), mode="edge").T
    sound = librosa.istft(spectrum, hop_length=hop, n_fft=spec.n_fft, length=len(samples))
    return sound.astype(np.float32)


def _mel_options(spec: FeatureSpec) -> dict[str, Any]:
    edges = {"fmin": spec.fmin, "fmax": spec.top_frequency}
    return {"sr": spec.sample_rate, "n_fft": spec.n_fft} | edges


def _dense_hop(spec: FeatureSpec) -> int:
    """Returns the front end's hop, or a quarter of its window if that is shorter."""
    return min(spec.hop_length, max(spec.n_fft // 4, 1))


def _power(features: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns the power of features, `[frames, bands]`; values at the floor of the scale give 0."""
    if spec.compression == "log10000":
        return np.maximum(np.power(np.float32(10), features) - 1, 0) / np.float32(10000)
    floor = float(spectral_bands(silence(features, spec), spec)[0].max())
    db = spectral_bands(features, spec)
    power = np.power(np.float32(10), np.minimum(db, floor + spec.top_db + 20) / 10)
    return np.where(db > floor + 0.05, power, np.float32(0))


def _resampled_frames(values: np.ndarray, hop: int, wanted: int, length: int) -> np.ndarray:
    """Returns frames `[frames, any]` at another hop for `length` samples, interpolated linearly."""
    positions = np.arange(1 + length // wanted) * (wanted / hop)
    lower = np.minimum(positions.astype(int), len(values) - 1)
    upper = np.minimum(lower + 1, len(values) - 1)
    weight = np.clip(positions - lower, 0, 1)[:, None].astype(np.float32)
    return values[lower] * (1 - weight) + values[upper] * weight


def read_excerpt(path: str | os.PathLike[str], start: float, end: float) -> tuple[np.ndarray, int]:
    """Reads the seconds from `start` to `end` of a sound file without decoding the rest.

    Returns:
      All channels at the file's own rate, float32 `[samples, channels]`, and the rate in Hz. The
      file may end earlier.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:
            first = max(round(start * file.samplerate), 0)
            count = max(round(end * file.samplerate) - first, 0)
            file.seek(min(first, file.frames))
            return file.read(count, dtype="float32", always_2d=True), file.samplerate
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        name = os.fsdecode(path)
        raise UserError(f"{name}: cannot be read from {start:.1f} s on ({error}).") from error


def write_sound(path: str | os.PathLike[str], samples: np.ndarray, sample_rate: int) -> Path:
    """Writes samples, `[samples]` or `[samples, channels]`, as a 16-bit WAV file; returns its path.

    Raises:
      UserError: it cannot be written.
    """
    with replacing(path) as temporary:
        try:
            soundfile.write(temporary, np.clip(samples, -1, 1), sample_rate, "PCM_16", format="WAV")
        except soundfile.LibsndfileError as error:
            raise OSError(str(error)) from error
    return Path(path)
