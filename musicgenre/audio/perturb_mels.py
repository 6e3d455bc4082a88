"""Changes to log-mel spectrograms in dB that preserve the genre, for data without sound.

They approximate those of the same names in `musicgenre.audio.perturb_sound`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import librosa
import numpy as np
import scipy.signal

from musicgenre.audio.features import FeatureSpec, mel_filters, mel_frequencies
from musicgenre.audio.perturb_sound import (
    Apply,
    Equaliser,
    Missing,
    Transform,
    all_changes,
    band_filter,
    fixed,
)

# Power in a band from which a filter removes everything.
_TINY = 1e-12
# How each type of change is made to a spectrogram; v is its value.
_WHAT = {
    "level": "The same number of dB in every cell, before reference and floor.",
    "eq": "{v.what}",
    "later": "The first {v:g} s are dropped, rounded to whole frames.",
    "silence": "Frames of silence first; as many are dropped at the end.",
    "tempo": "Some frames twice or left out.",
    "speed": "Tempo and pitch, {semitones:+.2f} semitones.",
    "pitch": "Along the mel bands, by each band's frequency.",
    "limit": "Butterworth filter, 48 dB per octave.",
    "noise": "The power of white noise {v} dB below the clip's mean power.",
}


def reference(db: np.ndarray, spec: FeatureSpec, top: float = 0.0) -> np.ndarray:
    """Returns a changed spectrogram in dB as the front end would give it, float32 `[frames, mels]`.

    `top` is the loudest cell if the reference is the clip's own; 8-bit arrays may miss 0 dB.
    """
    if spec.db_ref == "max":
        db = db - (db.max() - top)
    return np.maximum(db, db.max() - spec.top_db).astype(np.float32)


def band_gains(response: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns a filter's gain in each mel band for a flat spectrum within the band, dB `[mels]`.

    `response` is its power (not dB) at the frequencies of the transform, `[1 + n_fft // 2]`.
    """
    filters = mel_filters(spec).astype(np.float64)
    total = filters.sum(axis=0)
    # A band without any frequency is unchanged.
    power = np.where(total > 0, (response @ filters) / np.where(total > 0, total, 1.0), 1.0)
    return np.asarray(10 * np.log10(np.maximum(power, _TINY)))


def equaliser_gains(equaliser: Equaliser, spec: FeatureSpec) -> np.ndarray:
    """Returns `band_gains` of an equaliser, dB `[mels]`."""
    return band_gains(10 ** (equaliser.response(_frequencies(spec)) / 10), spec)


def _frequencies(spec: FeatureSpec) -> np.ndarray:
    return np.asarray(np.fft.rfftfreq(spec.n_fft, 1 / spec.sample_rate))


def _filter_gains(spec: FeatureSpec, kind: str, frequency: float) -> np.ndarray:
    sections = band_filter(kind, frequency, spec.sample_rate)
    response = scipy.signal.sosfreqz(sections, worN=_frequencies(spec), fs=spec.sample_rate)[1]
    return band_gains(np.square(np.abs(response)), spec)


def change_tempo(db: np.ndarray, factor: float) -> np.ndarray:
    """Plays `[frames, mels]` `factor` times as fast, `[at most frames, mels]`, by nearest frames.

    Interpolated frames would be smoother than real ones, which a network may respond to instead.
    """
    frames = min(int((len(db) - 1) / factor) + 1, len(db))
    return db[np.minimum(np.round(np.arange(frames) * factor).astype(int), len(db) - 1)]


def change_pitch(db: np.ndarray, spec: FeatureSpec, semitones: float) -> np.ndarray:
    """Transposes `[frames, mels]` by linear interpolation between bands, constant beyond them."""
    centres = mel_frequencies(spec.fmin, spec.top_frequency, spec.n_mels + 2)[1:-1]
    source = librosa.hz_to_mel(centres * 2 ** (-semitones / 12))
    positions = np.interp(source, librosa.hz_to_mel(centres), np.arange(spec.n_mels))
    lower = np.minimum(positions.astype(int), spec.n_mels - 2)
    fraction = positions - lower
    return db[:, lower] * (1 - fraction) + db[:, lower + 1] * fraction


def white_noise(
    db: np.ndarray, generator: np.random.Generator, spec: FeatureSpec, snr: float
) -> np.ndarray:
    """Adds the power of white noise, `snr` dB below the mean power of `[frames, mels]`.

    The filters have equal areas, so white noise has equal power in all bands, and the power of a
    sound is the sum of band powers times widths. Noise varies more in bands of few frequencies.
    """
    edges = mel_frequencies(spec.fmin, spec.top_frequency, spec.n_mels + 2)
    widths = (edges[2:] - edges[:-2]) / 2
    power = 10 ** (db.astype(np.float64) / 10)
    level = (power.mean(axis=0) @ widths) / widths.sum() * 10 ** (-snr / 10)
    count = _independent(spec)
    noise = level * generator.gamma(count, 1 / count, db.shape)
    return np.asarray(10 * np.log10(power + noise))


def silence_before(db: np.ndarray, frames: int, top_db: float) -> np.ndarray:
    """Puts frames of silence before `[frames, mels]` and drops as many at the end."""
    count = min(frames, len(db) - 1)
    silence = np.full((count, db.shape[1]), db.max() - top_db, db.dtype)
    return np.concatenate([silence, db[: len(db) - count]])


def begin_later(db: np.ndarray, frames: int) -> np.ndarray:
    """Drops the first frames; at least one remains."""
    return db[min(frames, len(db) - 1) :]


def mel_transforms(spec: FeatureSpec, seed: int = 0) -> tuple[list[Transform], list[Missing]]:
    """Returns the changes available for log-mel spectrograms in dB, and those that need the sound.

    Their `apply` takes `[frames, mels]` and returns `[at most frames, mels]` as the front end would
    give them (`reference`). The random equalisers are those of `sound_transforms`.
    """

    def referenced(change: Apply) -> Apply:
        return lambda db, generator: reference(change(db, generator), spec, float(db.max()))

    def frames(seconds: float) -> int:
        return round(seconds * spec.sample_rate / spec.hop_length)

    def speed(db: np.ndarray, factor: float) -> np.ndarray:
        return change_pitch(change_tempo(db, factor), spec, 12 * math.log2(factor))

    makers: dict[str, Callable[[Any], Apply]] = {
        "level": lambda gain: fixed(np.add, np.float32(gain)),
        "eq": lambda equaliser: fixed(np.add, equaliser_gains(equaliser, spec)),
        "later": lambda seconds: fixed(begin_later, frames(seconds)),
        "silence": lambda seconds: fixed(silence_before, frames(seconds), spec.top_db),
        "tempo": lambda factor: fixed(change_tempo, factor),
        "speed": lambda factor: fixed(speed, factor),
        "pitch": lambda semitones: fixed(change_pitch, spec, semitones),
        "limit": lambda limit: fixed(np.add, _filter_gains(spec, *limit)),
        "noise": lambda snr: functools.partial(white_noise, spec=spec, snr=snr),
    }
    changes, missing = all_changes(spec.sample_rate, seed)
    made = []
    for change in changes:
        # Frames are too coarse for the shortest of the delays.
        if change.type in makers and change.name != "begins 0.02 s later":
            made.append(change.made(referenced(makers[change.type](change.value)), _WHAT))
        else:
            missing.append(Missing(change.name, "it needs the sound, not a spectrogram."))
    return made, missing


def _independent(spec: FeatureSpec) -> np.ndarray:
    """Returns the effective number of independent frequencies in each band, `[mels]`.

    Under a Hann window, amplitudes of neighbouring frequencies are correlated by 2/3 and of the
    next but one by 1/6, and powers by the squares of these.
    """
    filters = mel_filters(spec).astype(np.float64)
    variance = np.square(filters).sum(axis=0)
    for distance, correlation in ((1, 2 / 3), (2, 1 / 6)):
        variance += 2 * correlation**2 * (filters[distance:] * filters[:-distance]).sum(axis=0)
    squared = np.square(filters.sum(axis=0))
    return np.asarray(np.maximum(squared / np.maximum(variance, _TINY), 1.0))
