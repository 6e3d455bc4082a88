"""Changes to sound that leave its genre as it is, to find out what a model listens to: functions of mono samples.

After B. L. Sturm, "A simple method to determine if a music information retrieval system is a 'horse'", IEEE Transactions on
Multimedia 16(6), 2014: a system that answers by what it should listen to keeps its answer where only other things change. Which
changes are tried here, and how far they go, is this project's choice.

`sound_transforms` lists them all. `musicgenre.audio.perturb_mels` has those that can be made of a spectrogram.
"""

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import scipy.signal
import soundfile

from musicgenre.audio.decode import load_audio
from musicgenre.audio.resample import resample
from musicgenre.errors import UserError

Apply = Callable[[np.ndarray, np.random.Generator], np.ndarray]

# Octave-spaced points of an equaliser's curve, Hz.
EQ_CENTRES = 62.5 * 2.0 ** np.arange(9)
# How far the random equalisers go, dB: as a tone control that is moved a little, and clearly heard.
GENTLE_EQ, STRONG_EQ = 3.0, 6.0
# A share of the tempo, and a quarter tone.
TEMPO, SEMITONES = 0.02, 0.5
# Zeros behind the samples while they are filtered in the frequency domain, seconds: longer than the filters ring.
_ROOM = 0.25
# Order of the filters that limit the band; each doubles the slope of 6 dB an octave.
_ORDER = 8
# By the lowest sample rate, Hz: highest and lowest kbit/s of an mp3 of constant bit rate (MPEG-1, 2 and 2.5).
_MP3_RATES = ((32000, 320, 32), (16000, 160, 8), (0, 64, 8))


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change to a clip.

    Attributes:
      name: such as "mp3, 64 kbit/s".
      irrelevant: a listener does not notice it, or it has nothing to do with the music: level, polarity, where the excerpt
        begins, a tone control that is moved a little. Otherwise it is heard, and the genre stays.
      what: one sentence on how it is made.
      apply: the clip and a random generator to the changed clip.
      encoder: it needs an encoder, which not every libsndfile brings.
    """

    name: str
    irrelevant: bool
    what: str
    apply: Apply
    encoder: bool = False


@dataclasses.dataclass(frozen=True)
class Missing:
    """A change that cannot be made here, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Equaliser:
    """A smooth curve over frequency: straight lines over octaves between points, level beyond them.

    Attributes:
      gains: dB at `EQ_CENTRES`, `[9]`.
    """

    gains: np.ndarray

    @classmethod
    def random(cls, generator: np.random.Generator, limit: float) -> "Equaliser":
        """Draws each gain evenly from -limit to limit, dB."""
        return cls(generator.uniform(-limit, limit, len(EQ_CENTRES)))

    @classmethod
    def tilt(cls, limit: float) -> "Equaliser":
        """Returns a line from -limit at the lowest point to limit at the highest, dB."""
        return cls(np.linspace(-limit, limit, len(EQ_CENTRES)))

    def response(self, frequencies: np.ndarray) -> np.ndarray:
        """Returns the gain in dB at frequencies in Hz, of the same shape."""
        octaves = np.log2(np.maximum(frequencies, EQ_CENTRES[0]))
        gains: np.ndarray = np.interp(octaves, np.log2(EQ_CENTRES), self.gains)
        return gains


def random_equalisers(count: int, limit: float, seed: int) -> list[Equaliser]:
    """Returns the same random equalisers for the same seed; the first few do not depend on how many follow."""
    return [
        Equaliser.random(np.random.default_rng([seed, number]), limit) for number in range(count)
    ]


def equalise(samples: np.ndarray, rate: int, equaliser: Equaliser) -> np.ndarray:
    """Returns the samples `[n]` through an equaliser that moves nothing in time (zero phase), float32 `[n]`."""
    size = scipy.fft.next_fast_len(len(samples) + int(_ROOM * rate), real=True)
    spectrum = scipy.fft.rfft(samples.astype(np.float64), size)
    spectrum *= 10 ** (equaliser.response(scipy.fft.rfftfreq(size, 1 / rate)) / 20)
    return scipy.fft.irfft(spectrum, size)[: len(samples)].astype(np.float32)


def band_filter(kind: str, frequency: float, rate: int) -> np.ndarray:
    """Returns a Butterworth filter of order 8 (48 dB an octave) as second-order sections.

    Args:
      kind: "lowpass" or "highpass".
      frequency: where it takes away 3 dB, Hz.
      rate: Hz.

    Raises:
      UserError: the frequency is not below half the rate.
    """
    if not 0 < frequency < rate / 2:
        raise UserError(f"a {kind} filter of {frequency:g} Hz is not possible at {rate} Hz.")
    sections: np.ndarray = scipy.signal.butter(_ORDER, frequency, kind, fs=rate, output="sos")
    return sections


def limit_band(samples: np.ndarray, rate: int, kind: str, frequency: float) -> np.ndarray:
    """Returns the samples `[n]` through `band_filter`, float32 `[n]`."""
    return scipy.signal.sosfilt(
        band_filter(kind, frequency, rate), samples.astype(np.float64)
    ).astype(np.float32)


def white_noise(samples: np.ndarray, generator: np.random.Generator, snr: float) -> np.ndarray:
    """Adds white noise that lies `snr` dB below the mean power of the samples."""
    level = math.sqrt(float(np.mean(np.square(samples, dtype=np.float64)))) * 10 ** (-snr / 20)
    return samples + (level * generator.standard_normal(len(samples))).astype(np.float32)


def quantise(samples: np.ndarray, generator: np.random.Generator, bits: int) -> np.ndarray:
    """Rounds to so many bits after adding triangular dither of one step to both sides."""
    steps = 2.0 ** (bits - 1)
    dither = generator.random(len(samples)) - generator.random(len(samples))
    return (np.clip(np.round(samples * steps + dither), -steps, steps - 1) / steps).astype(
        np.float32
    )


def silence_before(samples: np.ndarray, rate: int, seconds: float) -> np.ndarray:
    """Puts silence before the samples `[n]` and cuts what then lies beyond their length off, `[n]`."""
    return np.concatenate([np.zeros(round(seconds * rate), np.float32), samples])[: len(samples)]


def begin_later(samples: np.ndarray, rate: int, seconds: float) -> np.ndarray:
    """Leaves the first seconds out."""
    return samples[round(seconds * rate) :]


def change_tempo(samples: np.ndarray, factor: float) -> np.ndarray:
    """Plays `factor` times as fast at the same pitch (librosa's phase vocoder), `[at most n]`.

    What becomes longer is cut off at the old length.
    """
    from librosa.effects import time_stretch  # takes its time to load, as below

    stretched: np.ndarray = time_stretch(samples, rate=factor)
    return stretched[: len(samples)].astype(np.float32)


def change_speed(samples: np.ndarray, rate: int, factor: float) -> np.ndarray:
    """Plays `factor` times as fast as a tape would, so that the pitch goes along, `[at most n]`."""
    return resample(samples, round(factor * rate), rate)[: len(samples)]


def change_pitch(samples: np.ndarray, rate: int, semitones: float) -> np.ndarray:
    """Transposes at the same tempo (librosa's phase vocoder, then a resampling), `[n]`."""
    from librosa.effects import pitch_shift

    shifted: np.ndarray = pitch_shift(samples, sr=rate, n_steps=semitones)
    return shifted.astype(np.float32)


def through_file(
    samples: np.ndarray,
    rate: int,
    suffix: str,
    *,
    channels: int = 1,
    file_rate: int = 0,
    **how: Any,
) -> np.ndarray:
    """Writes the samples `[n]` to a file and decodes it as any other file, float32 `[n]`.

    Args:
      samples: mono.
      rate: Hz.
      suffix: such as ".mp3".
      channels: how many channels hold the same.
      file_rate: rate of the file in Hz; 0 is the same.
      how: to `soundfile.write`.

    Raises:
      UserError: libsndfile cannot write it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip{suffix}"
        written = resample(samples, rate, file_rate or rate)
        try:
            soundfile.write(
                path, np.repeat(written[:, None], channels, axis=1), file_rate or rate, **how
            )
        except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError) as error:
            reason = str(getattr(error, "error_string", error)).rstrip(".")
            raise UserError(
                f"this libsndfile ({soundfile.__libsndfile_version__}) cannot write it ({reason})."
            ) from error
        decoded = load_audio(path, rate, min_seconds=0.0).samples[: len(samples)]
    return np.pad(decoded, (0, len(samples) - len(decoded)))


def through_mp3(samples: np.ndarray, rate: int, kbits: int) -> np.ndarray:
    """Returns what is left after an mp3 of a constant bit rate, mono at `rate` Hz, float32 `[n]`.

    Raises:
      UserError: this libsndfile writes no mp3, or not of this bit rate at this sample rate.
    """
    highest, lowest = next((high, low) for start, high, low in _MP3_RATES if rate >= start)
    if not lowest < kbits <= highest:
        raise UserError(f"an mp3 of {rate} Hz has {lowest} to {highest} kbit/s.")
    # libsndfile maps its level from 0 to 1 onto these rates, evenly.
    level = (highest - kbits) / (highest - lowest)
    return through_file(
        samples,
        rate,
        ".mp3",
        format="MP3",
        subtype="MPEG_LAYER_III",
        bitrate_mode="CONSTANT",
        compression_level=level,
    )


def without_chance(function: Callable[..., np.ndarray], *arguments: Any, **named: Any) -> Apply:
    """Returns a function of the clip alone as an `apply`; the arguments follow the clip."""
    return lambda clip, generator: function(clip, *arguments, **named)


def equaliser_choices(seed: int) -> list[tuple[str, bool, str, Equaliser]]:
    """Returns the equalisers that are tried, for sound and spectrograms alike: name, irrelevant, what, and the curve."""
    chosen = []
    for name, limit, irrelevant, count in (
        ("gentle equaliser", GENTLE_EQ, True, 3),
        ("equaliser", STRONG_EQ, False, 2),
    ):
        what = f"Random gains of up to {limit:g} dB an octave band, the same for every clip."
        for number, equaliser in enumerate(random_equalisers(count, limit, seed), start=1):
            chosen.append((f"{name} {number}, ±{limit:g} dB", irrelevant, what, equaliser))
    for name, limit in (("brighter", GENTLE_EQ), ("darker", -GENTLE_EQ)):
        what = f"A tilt from {-limit:+g} dB at 62.5 Hz to {limit:+g} dB at 16 kHz."
        chosen.append((name, True, what, Equaliser.tilt(limit)))
    return chosen


def band_limits(rate: int) -> tuple[list[tuple[str, str, float]], list[Missing]]:
    """Returns the limits of the band that are tried at `rate` Hz (name, kind, Hz), and those that change nothing there."""
    limits, missing = [], []
    for kind, frequency in (
        ("lowpass", 8000.0),
        ("lowpass", 4000.0),
        ("highpass", 100.0),
        ("highpass", 300.0),
    ):
        name = f"nothing {'above' if kind == 'lowpass' else 'below'} {frequency:g} Hz"
        if frequency < rate / 2:
            limits.append((name, kind, frequency))
        else:
            missing.append(Missing(name, f"at {rate} Hz there is nothing above {rate / 2:g} Hz."))
    return limits, missing


def sound_transforms(rate: int, seed: int = 0) -> tuple[list[Transform], list[Missing]]:
    """Returns the changes that can be made to mono samples at `rate` Hz, and those that cannot.

    Their `apply` takes float32 `[n]` and returns at most as many.

    Args:
      rate: Hz.
      seed: of the random equalisers.
    """
    made, missing = every_transform(rate, seed)
    noise = np.random.default_rng(0)
    samples = (0.1 * noise.standard_normal(rate)).astype(np.float32)
    possible = []
    for transform in made:
        if transform.encoder:
            try:
                transform.apply(samples, noise)
            except UserError as error:
                missing.append(Missing(transform.name, str(error)))
                continue
        possible.append(transform)
    return possible, missing


def every_transform(rate: int, seed: int = 0) -> tuple[list[Transform], list[Missing]]:
    """Returns what `sound_transforms` returns where libsndfile writes everything; nothing is tried out."""
    found: list[Transform] = []

    def add(name: str, irrelevant: bool, what: str, apply: Apply, *, encoder: bool = False) -> None:
        found.append(Transform(name, irrelevant, what, apply, encoder))

    for gain in (-20, -6, 6):
        times = np.float32(10 ** (gain / 20))
        add(
            f"level {gain:+d} dB",
            True,
            "Every sample times the same, without clipping.",
            without_chance(np.multiply, times),
        )
    add("polarity", True, "Every sample with the other sign.", without_chance(np.negative))
    add(
        "offset 0.05",
        True,
        "0.05 of full scale added to every sample.",
        without_chance(np.add, np.float32(0.05)),
    )
    other = 44100 if rate != 44100 else 48000
    add(
        f"{other / 1000:g} kHz, two channels",
        True,
        "Written as a file of two equal channels at another rate and decoded.",
        without_chance(
            through_file, rate, ".wav", channels=2, file_rate=other, format="WAV", subtype="FLOAT"
        ),
    )
    add("16 bit", True, "Rounded with triangular dither.", functools.partial(quantise, bits=16))
    for name, irrelevant, what, equaliser in equaliser_choices(seed):
        add(name, irrelevant, what, without_chance(equalise, rate, equaliser))
    for seconds in (0.02, 0.5):
        add(
            f"begins {seconds:g} s later",
            True,
            "What came before is left out.",
            without_chance(begin_later, rate, seconds),
        )
    for seconds in (0.5, 2.0):
        what = "Silence before the clip, whose end is cut off."
        add(
            f"silence of {seconds:g} s first",
            True,
            what,
            without_chance(silence_before, rate, seconds),
        )
    mp3 = "Mono, constant bit rate, decoded again."
    add("mp3, 128 kbit/s", True, mp3, without_chance(through_mp3, rate, 128), encoder=True)
    vorbis = without_chance(through_file, rate, ".ogg", format="OGG", subtype="VORBIS")
    add(
        "Ogg Vorbis", True, "Mono, libsndfile's usual quality, decoded again.", vorbis, encoder=True
    )
    add("mp3, 64 kbit/s", False, mp3, without_chance(through_mp3, rate, 64), encoder=True)
    add(
        "8 bit",
        False,
        "Rounded with triangular dither: steady noise.",
        functools.partial(quantise, bits=8),
    )
    for factor in (1 - TEMPO, 1 + TEMPO):
        what = "Phase vocoder at the same pitch."
        add(f"tempo {100 * (factor - 1):+.0f} %", False, what, without_chance(change_tempo, factor))
    for factor in (1 - TEMPO, 1 + TEMPO):
        what = f"As of a tape: the pitch goes along, {12 * math.log2(factor):+.2f} semitones."
        add(
            f"speed {100 * (factor - 1):+.0f} %",
            False,
            what,
            without_chance(change_speed, rate, factor),
        )
    for semitones in (-SEMITONES, SEMITONES):
        what = "Phase vocoder at the same tempo."
        add(
            f"pitch {semitones:+g} semitone",
            False,
            what,
            without_chance(change_pitch, rate, semitones),
        )
    limits, missing = band_limits(rate)
    for name, kind, frequency in limits:
        add(
            name,
            False,
            "Butterworth filter, 48 dB an octave.",
            without_chance(limit_band, rate, kind, frequency),
        )
    for snr in (30, 20):
        what = f"White noise {snr} dB below the clip's mean power."
        add(f"noise at {snr} dB", False, what, functools.partial(white_noise, snr=snr))
    return found, missing
