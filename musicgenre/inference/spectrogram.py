"""Spectrograms to draw: panels of a clip's features, and an overview of a file of any length."""

import dataclasses
import os
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from musicgenre.audio.decode import stream_audio
from musicgenre.audio.features import FeatureSpec, mel_frequencies
from musicgenre.evaluation.plots import TimePanel
from musicgenre.inference.windows import stream_power


def feature_panel(features: np.ndarray, spec: FeatureSpec) -> TimePanel:
    """Returns the panel of a clip's features, `[frames, bands]` and not normalised."""
    hop = spec.hop_length / spec.sample_rate
    features = features.astype(np.float32)
    if spec.kind == "waveform":
        samples = features.ravel()
        return TimePanel(samples, 1 / spec.sample_rate, name="waveform", ylabel="amplitude")
    if spec.kind == "mfcc":
        # The zeroth coefficient is the loudness, far larger than the others. The colours ignore it.
        shown = features[:, 1:] if features.shape[1] > 1 else features
        most = float(np.quantile(np.abs(shown), 0.995)) or 1.0
        names: dict[str, Any] = {"name": "MFCC", "ylabel": "coefficient", "unit": "value"}
        return TimePanel(features, hop, -hop / 2, limits=(-most, most), **names)
    name, ticks = "mel spectrogram", mel_ticks
    if spec.kind == "stft":
        name, ticks = "STFT, power", _stft_ticks
    # All clips share their colours if the front end fixes the scale.
    limits = (-spec.top_db, 0.0) if spec.db_ref == "max" else None
    if spec.compression == "log10000":
        unit, limits = "log10(10000 x + 1)", None
    else:
        name += " in dB"
        unit = "dB re the clip's maximum" if limits else f"dB (0 dB is a power of {spec.db_ref})"
    return TimePanel(features, hop, -hop / 2, name, "frequency (Hz)", ticks(spec), unit, limits)


def mel_ticks(spec: FeatureSpec) -> dict[float, str]:
    """Returns octaves in Hz by position on an axis of mel bands; the centre of the first is 0."""
    centres = mel_frequencies(spec.fmin, spec.top_frequency, spec.n_mels + 2)[1:-1]
    ticks: dict[float, str] = {}
    for hz in 1000.0 * 2.0 ** np.arange(5, -4, -1):
        position = float(np.interp(hz, centres, np.arange(spec.n_mels)))
        # The low octaves are close together.
        apart = not ticks or min(ticks) - position >= spec.n_mels / 18
        if centres[0] <= hz <= centres[-1] and apart:
            ticks[position] = f"{hz:g}"
    return ticks


def _stft_ticks(spec: FeatureSpec) -> dict[float, str]:
    """Returns round frequencies in Hz by bin."""
    step, top = spec.sample_rate / spec.n_fft, spec.sample_rate / 2
    return {hz / step: f"{hz:g}" for hz in MaxNLocator(6).tick_values(0, top) if hz <= top}


def overview_spec(spec: FeatureSpec) -> FeatureSpec:
    """Returns the front end of a file's picture: a mel spectrogram in dB for every network."""
    if spec.kind in ("waveform", "stft"):
        spec = FeatureSpec(sample_rate=spec.sample_rate)
    return dataclasses.replace(spec, kind="logmel", compression="db", db_ref="max", top_db=80.0)


def overview(
    path: str | os.PathLike[str], spec: FeatureSpec, most: int = 2000, *, min_seconds: float = 1.0
) -> tuple[np.ndarray, float]:
    """Returns the power spectrogram of a file of any length for a picture, in bounded memory.

    Pairs of neighbouring columns are averaged, as often as needed. The front end is of the type
    "logmel" or "stft". A file with enough frames has between half of `most` columns and all.

    Returns:
      Power, float32 `[columns, bands]`, and the seconds from one column to the next.

    Raises:
      UserError: the file cannot be used.
    """
    rest = columns = np.zeros((0, spec.bands), np.float32)
    rate, together = spec.sample_rate, 1
    blocks = stream_audio(path, rate, min_seconds=min_seconds, resampler=spec.resampler)
    for part in stream_power(blocks, spec):
        rest = np.concatenate([rest, part])
        whole = len(rest) // together
        means = rest[: whole * together].reshape(whole, together, spec.bands).mean(axis=1)
        columns, rest = np.concatenate([columns, means]), rest[whole * together :]
        while len(columns) > most:
            if len(columns) % 2:
                # The odd column is returned to the rest, as frames that equal its mean.
                rest = np.concatenate([np.repeat(columns[-1:], together, axis=0), rest])
                columns = columns[:-1]
            columns = columns.reshape(len(columns) // 2, 2, -1).mean(axis=1)
            together *= 2
    return columns, together * spec.hop_length / spec.sample_rate
