"""Changes to log-mel spectrograms in dB that leave the genre as it is, where there is no sound to change.

They are named as those of `musicgenre.audio.perturb_sound` and do to a spectrogram what these do to the sound, as near as it can
tell: what lies below its floor is lost, and of the phase it knows nothing.
"""

import functools
import math

import librosa
import numpy as np
import scipy.signal

from musicgenre.audio.features import FeatureSpec, mel_filters, mel_frequencies
from musicgenre.audio.perturb_sound import (
    SEMITONES,
    TEMPO,
    Apply,
    Equaliser,
    Missing,
    Transform,
    band_filter,
    band_limits,
    equaliser_choices,
    every_transform,
    without_chance,
)

# Power where a filter takes everything away.
_TINY = 1e-12


def reference(db: np.ndarray, spec: FeatureSpec, top: float = 0.0) -> np.ndarray:
    """Returns a changed spectrogram in dB as the front end would give it, float32 `[frames, mels]`.

    Args:
      db: `[frames, mels]`.
      spec: the front end.
      top: the loudest cell where the reference is the clip's own; a stored spectrogram of few bits may miss 0 dB.
    """
    if spec.db_ref == "max":
        db = db - (db.max() - top)
    return np.maximum(db, db.max() - spec.top_db).astype(np.float32)


def band_gains(response: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns what a filter does to each mel band of a sound whose spectrum is level within the band, dB `[mels]`.

    Args:
      response: the filter's power (not dB) at the frequencies of the transform, `[1 + n_fft // 2]`.
      spec: the front end.
    """
    filters = mel_filters(spec).astype(np.float64)
    total = filters.sum(axis=0)
    # A band that hears no frequency at all stays as it is.
    heard = np.where(total > 0, (response @ filters) / np.where(total > 0, total, 1.0), 1.0)
    gains: np.ndarray = 10 * np.log10(np.maximum(heard, _TINY))
    return gains


def equaliser_gains(equaliser: Equaliser, spec: FeatureSpec) -> np.ndarray:
    """Returns `band_gains` of an equaliser, dB `[mels]`."""
    return band_gains(10 ** (equaliser.response(_frequencies(spec)) / 10), spec)


def filter_gains(kind: str, frequency: float, spec: FeatureSpec) -> np.ndarray:
    """Returns `band_gains` of `musicgenre.audio.perturb_sound.band_filter`, dB `[mels]`."""
    sections = band_filter(kind, frequency, spec.sample_rate)
    _, response = scipy.signal.sosfreqz(sections, worN=_frequencies(spec), fs=spec.sample_rate)
    return band_gains(np.square(np.abs(response)), spec)


def change_tempo(db: np.ndarray, factor: float) -> np.ndarray:
    """Plays `[frames, mels]` `factor` times as fast, `[at most frames, mels]`: the nearest frame of each new moment.

    A mean of two neighbours would be smoother than any real frame, and a network that listens to how bands move would hear that
    instead of the tempo.
    """
    frames = min(int((len(db) - 1) / factor) + 1, len(db))
    return db[np.minimum(np.round(np.arange(frames) * factor).astype(int), len(db) - 1)]


def change_pitch(db: np.ndarray, spec: FeatureSpec, semitones: float) -> np.ndarray:
    """Transposes `[frames, mels]`: each band takes what lay a factor of 2^(-semitones / 12) away in frequency.

    Straight lines between bands; beyond the outermost ones their values.

    Args:
      db: `[frames, mels]`.
      spec: the front end.
      semitones: upwards.
    """
    centres = mel_frequencies(spec.fmin, spec.top_frequency, spec.n_mels + 2)[1:-1]
    source = centres * 2 ** (-semitones / 12)
    places = np.interp(
        librosa.hz_to_mel(source), librosa.hz_to_mel(centres), np.arange(spec.n_mels)
    )
    lower = np.minimum(places.astype(int), spec.n_mels - 2)
    fraction = places - lower
    return db[:, lower] * (1 - fraction) + db[:, lower + 1] * fraction


def change_speed(db: np.ndarray, spec: FeatureSpec, factor: float) -> np.ndarray:
    """Plays `[frames, mels]` `factor` times as fast as a tape would, `[at most frames, mels]`."""
    return change_pitch(change_tempo(db, factor), spec, 12 * math.log2(factor))


def white_noise(
    db: np.ndarray, generator: np.random.Generator, spec: FeatureSpec, snr: float
) -> np.ndarray:
    """Adds the power of white noise that lies `snr` dB below the mean power of `[frames, mels]`.

    The filters have equal areas, so that level noise is as strong in all bands, and a sound's power is the sum over bands of
    what they hear times their width. In a band of few frequencies the noise varies more, as it does in a real spectrogram.
    """
    edges = mel_frequencies(spec.fmin, spec.top_frequency, spec.n_mels + 2)
    widths = (edges[2:] - edges[:-2]) / 2
    power = 10 ** (db.astype(np.float64) / 10)
    level = (power.mean(axis=0) @ widths) / widths.sum() * 10 ** (-snr / 10)
    count = _independent(spec)
    noise = level * generator.gamma(count, 1 / count, db.shape)
    changed: np.ndarray = 10 * np.log10(power + noise)
    return changed


def silence_before(db: np.ndarray, spec: FeatureSpec, seconds: float) -> np.ndarray:
    """Puts frames of silence before `[frames, mels]` and cuts as many off at the end."""
    count = min(frame_number(seconds, spec), len(db) - 1)
    return np.concatenate(
        [np.full((count, db.shape[1]), db.max() - spec.top_db, db.dtype), db[: len(db) - count]]
    )


def begin_later(db: np.ndarray, spec: FeatureSpec, seconds: float) -> np.ndarray:
    """Leaves the first seconds out, rounded to whole frames; one frame is left at least."""
    return db[min(frame_number(seconds, spec), len(db) - 1) :]


def frame_number(seconds: float, spec: FeatureSpec) -> int:
    """Returns the frame that is centred nearest to a time."""
    return round(seconds * spec.sample_rate / spec.hop_length)


def mel_transforms(spec: FeatureSpec, seed: int = 0) -> tuple[list[Transform], list[Missing]]:
    """Returns the changes that can be made to log-mel spectrograms in dB, and those that need the sound.

    Their `apply` takes `[frames, mels]` and returns at most as many frames, as the front end would give them (`reference`).

    Args:
      spec: the front end.
      seed: of the random equalisers, which are those of `sound_transforms`.
    """
    found: list[Transform] = []

    def add(name: str, irrelevant: bool, what: str, change: Apply) -> None:
        def apply(db: np.ndarray, generator: np.random.Generator) -> np.ndarray:
            return reference(change(db, generator), spec, float(db.max()))

        found.append(Transform(name, irrelevant, what, apply))

    for gain in (-20, -6, 6):
        what = "The same number of dB in every cell, before reference and floor."
        add(f"level {gain:+d} dB", True, what, without_chance(np.add, np.float32(gain)))
    for name, irrelevant, what, equaliser in equaliser_choices(seed):
        add(name, irrelevant, what, without_chance(np.add, equaliser_gains(equaliser, spec)))
    what = f"What came before is left out, to whole frames: {frame_number(0.5, spec)}."
    add("begins 0.5 s later", True, what, without_chance(begin_later, spec, 0.5))
    for seconds in (0.5, 2.0):
        what = f"Frames of silence first, {frame_number(seconds, spec)}; as many are cut off at the end."
        add(
            f"silence of {seconds:g} s first",
            True,
            what,
            without_chance(silence_before, spec, seconds),
        )
    for factor in (1 - TEMPO, 1 + TEMPO):
        what = "Some frames twice." if factor < 1 else "Some frames left out."
        add(f"tempo {100 * (factor - 1):+.0f} %", False, what, without_chance(change_tempo, factor))
    for factor in (1 - TEMPO, 1 + TEMPO):
        what = f"Tempo and pitch, {12 * math.log2(factor):+.2f} semitones."
        add(
            f"speed {100 * (factor - 1):+.0f} %",
            False,
            what,
            without_chance(change_speed, spec, factor),
        )
    for semitones in (-SEMITONES, SEMITONES):
        what = "Along the mel bands, by each band's own frequency."
        add(
            f"pitch {semitones:+g} semitone",
            False,
            what,
            without_chance(change_pitch, spec, semitones),
        )
    limits, missing = band_limits(spec.sample_rate)
    for name, kind, frequency in limits:
        gains = filter_gains(kind, frequency, spec)
        add(name, False, "Butterworth filter, 48 dB an octave.", without_chance(np.add, gains))
    for snr in (30, 20):
        what = f"The power of white noise {snr} dB below the clip's mean power."
        add(f"noise at {snr} dB", False, what, functools.partial(white_noise, spec=spec, snr=snr))
    here = {transform.name for transform in found}
    for transform in every_transform(spec.sample_rate, seed)[0]:
        if transform.name not in here:
            missing.append(Missing(transform.name, "it needs the sound, not a spectrogram."))
    return found, missing


def _independent(spec: FeatureSpec) -> np.ndarray:
    """Returns how many independent powers of noise would vary as much together as each band's weighted sum does, `[mels]`.

    Under a Hann window the amplitudes of neighbouring frequencies are correlated by 2/3, of the next but one by 1/6, and so
    their powers by the squares of these.
    """
    filters = mel_filters(spec).astype(np.float64)
    variance = np.square(filters).sum(axis=0)
    for distance, correlation in ((1, 2 / 3), (2, 1 / 6)):
        variance += 2 * correlation**2 * (filters[distance:] * filters[:-distance]).sum(axis=0)
    count: np.ndarray = np.maximum(
        np.square(filters.sum(axis=0)) / np.maximum(variance, _TINY), 1.0
    )
    return count


def _frequencies(spec: FeatureSpec) -> np.ndarray:
    frequencies: np.ndarray = np.fft.rfftfreq(spec.n_fft, 1 / spec.sample_rate)
    return frequencies
