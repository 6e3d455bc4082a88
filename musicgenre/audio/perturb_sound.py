"""Changes to sound that preserve its genre, to find out what a model responds to.

After B. L. Sturm, "A simple method to determine if a music information retrieval system is a
'horse'", IEEE Transactions on Multimedia 16(6), 2014: a system that uses the music keeps its
decision when only other things change. The choice of changes is this project's.

`sound_transforms` lists them as functions of mono samples; `musicgenre.audio.perturb_mels` has
those that can be applied to a spectrogram.
"""

import functools
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.fft
import scipy.signal
import soundfile
from librosa.effects import pitch_shift, time_stretch

from musicgenre.audio.decode import load_audio
from musicgenre.audio.resample import resample
from musicgenre.errors import UserError

Apply = Callable[[np.ndarray, np.random.Generator], np.ndarray]

# Octave-spaced points of an equaliser's curve, Hz.
EQ_CENTRES = 62.5 * 2.0 ** np.arange(9)
# Ranges of the random equalisers, dB: a small turn of a tone control, and a clearly audible one.
GENTLE_EQ, STRONG_EQ = 3.0, 6.0
# Zero padding while filtering in the frequency domain, seconds: longer than the filters ring.
_ROOM = 0.25
# From this sample rate on, in Hz: highest and lowest constant kbit/s of an mp3 (MPEG-1, 2 and 2.5).
_MP3_RATES = ((32000, 320, 32), (16000, 160, 8), (0, 64, 8))
_FILTERS = {"above": "lowpass", "below": "highpass"}
# How each type of change is made to sound; v is its value.
_WHAT = {
    "level": "Every sample multiplied by a constant, without clipping.",
    "polarity": "Every sample with the other sign.",
    "offset": "{v:g} of full scale added to every sample.",
    "channels": "Written as a file of two equal channels at another rate and decoded.",
    "bits": "Rounded with triangular dither.",
    "eq": "{v.what}",
    "later": "The first seconds are dropped.",
    "silence": "Silence before the clip, whose end is cut off.",
    "mp3": "Mono, constant bit rate, decoded again.",
    "vorbis": "Mono, libsndfile's default quality, decoded again.",
    "tempo": "Phase vocoder at the same pitch.",
    "speed": "Like a tape: the pitch changes by {semitones:+.2f} semitones.",
    "pitch": "Phase vocoder at the same tempo.",
    "limit": "Butterworth filter, 48 dB per octave.",
    "noise": "White noise {v} dB below the clip's mean power.",
}


class Transform(NamedTuple):
    """A change to a clip.

    Attributes:
      name: such as "mp3, 64 kbit/s".
      irrelevant: inaudible or not about the music: level, polarity, start of the excerpt, slight
        equalisation. Other changes are audible but keep the genre.
      what: one sentence on how it is made.
      apply: the clip and a random generator to the changed clip.
    """

    name: str
    irrelevant: bool
    what: str
    apply: Apply


class Missing(NamedTuple):
    """A change that is not available here, and why."""

    name: str
    reason: str


class Change(NamedTuple):
    """A change before it is made for sound or spectrograms: `type` and `value` say how."""

    name: str
    irrelevant: bool
    type: str
    value: Any = None

    def made(self, apply: Apply, what: Mapping[str, str]) -> Transform:
        """Returns the transform by `apply`, described by a format string for each type."""
        semitones = 12 * math.log2(self.value) if self.type == "speed" else 0.0
        text = what[self.type].format(v=self.value, semitones=semitones)
        return Transform(self.name, self.irrelevant, text, apply)


@dataclass(frozen=True, eq=False)
class Equaliser:
    """A smooth curve over frequency: linear over octaves between points, constant beyond them.

    Attributes:
      gains: dB at `EQ_CENTRES`, `[9]`.
      what: one sentence on its origin.
    """

    gains: np.ndarray
    what: str = ""

    @classmethod
    def tilt(cls, limit: float) -> "Equaliser":
        """Returns a line from -limit at the lowest point to limit at the highest, dB."""
        what = f"A tilt from {-limit:+g} dB at 62.5 Hz to {limit:+g} dB at 16 kHz."
        return cls(np.linspace(-limit, limit, len(EQ_CENTRES)), what)

    def response(self, frequencies: np.ndarray) -> np.ndarray:
        """Returns the gain in dB at frequencies in Hz, of the same shape."""
        octaves = np.log2(np.maximum(frequencies, EQ_CENTRES[0]))
        return np.asarray(np.interp(octaves, np.log2(EQ_CENTRES), self.gains))


def random_equalisers(count: int, limit: float, seed: int) -> list[Equaliser]:
    """Returns equalisers with gains from -limit to limit, dB, whatever the count for one seed."""
    what = f"Random gains of up to {limit:g} dB per octave band, the same for every clip."
    generators = (np.random.default_rng([seed, number]) for number in range(count))
    return [Equaliser(each.uniform(-limit, limit, len(EQ_CENTRES)), what) for each in generators]


def equalise(samples: np.ndarray, rate: int, equaliser: Equaliser) -> np.ndarray:
    """Returns the samples `[n]` through a zero-phase equaliser, float32 `[n]`."""
    size = scipy.fft.next_fast_len(len(samples) + int(_ROOM * rate), real=True)
    spectrum = scipy.fft.rfft(samples.astype(np.float64), size)
    spectrum *= 10 ** (equaliser.response(scipy.fft.rfftfreq(size, 1 / rate)) / 20)
    return scipy.fft.irfft(spectrum, size)[: len(samples)].astype(np.float32)


def band_filter(kind: str, frequency: float, rate: int) -> np.ndarray:
    """Returns a Butterworth "lowpass" or "highpass" (48 dB per octave) as second-order sections."""
    return np.asarray(scipy.signal.butter(8, frequency, kind, fs=rate, output="sos"))


def limit_band(samples: np.ndarray, rate: int, kind: str, frequency: float) -> np.ndarray:
    """Returns the samples `[n]` through `band_filter`, float32 `[n]`."""
    sections = band_filter(kind, frequency, rate)
    return scipy.signal.sosfilt(sections, samples.astype(np.float64)).astype(np.float32)


def white_noise(samples: np.ndarray, generator: np.random.Generator, snr: float) -> np.ndarray:
    """Adds white noise, `snr` dB below the mean power of the samples."""
    level = math.sqrt(float(np.mean(np.square(samples, dtype=np.float64)))) * 10 ** (-snr / 20)
    return samples + (level * generator.standard_normal(len(samples))).astype(np.float32)


def quantise(samples: np.ndarray, generator: np.random.Generator, bits: int) -> np.ndarray:
    """Rounds to `bits` bits after adding triangular dither of one step to both sides."""
    steps = 2.0 ** (bits - 1)
    dither = generator.random(len(samples)) - generator.random(len(samples))
    rounded = np.clip(np.round(samples * steps + dither), -steps, steps - 1)
    return (rounded / steps).astype(np.float32)


def through_file(
    samples: np.ndarray,
    rate: int,
    suffix: str,
    *,
    channels: int = 1,
    file_rate: int = 0,
    **how: Any,
) -> np.ndarray:
    """Writes mono samples `[n]` to a file of equal channels and decodes it, float32 `[n]`.

    Args:
      samples: mono.
      rate: Hz.
      suffix: such as ".mp3".
      channels: of the file.
      file_rate: of the file in Hz; 0 is `rate`.
      how: arguments of `soundfile.write`.

    Raises:
      UserError: libsndfile cannot write the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, file_rate = Path(folder) / f"clip{suffix}", file_rate or rate
        written = np.repeat(resample(samples, rate, file_rate)[:, None], channels, axis=1)
        try:
            soundfile.write(path, written, file_rate, **how)
        except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError) as error:
            reason = str(getattr(error, "error_string", error)).rstrip(".")
            version = soundfile.__libsndfile_version__
            raise UserError(f"this libsndfile ({version}) cannot write it ({reason}).") from error
        decoded = load_audio(path, rate, min_seconds=0.0).samples[: len(samples)]
    return np.pad(decoded, (0, len(samples) - len(decoded)))


def through_mp3(samples: np.ndarray, rate: int, kbits: int) -> np.ndarray:
    """Encodes as mono mp3 of a constant bit rate at `rate` Hz and decodes, float32 `[n]`.

    Raises:
      UserError: this libsndfile writes no mp3, or not with this bit rate at this sample rate.
    """
    highest, lowest = next((high, low) for start, high, low in _MP3_RATES if rate >= start)
    if not lowest < kbits <= highest:
        raise UserError(f"an mp3 of {rate} Hz has {lowest} to {highest} kbit/s.")
    # libsndfile maps its level from 0 to 1 linearly onto these rates.
    level = (highest - kbits) / (highest - lowest)
    how: dict[str, Any] = {"bitrate_mode": "CONSTANT", "compression_level": level}
    return through_file(samples, rate, ".mp3", format="MP3", subtype="MPEG_LAYER_III", **how)


def fixed(function: Callable[..., np.ndarray], *arguments: Any, **named: Any) -> Apply:
    """Returns `function(clip, *arguments, **named)` as an `apply` that ignores its generator."""
    return lambda clip, generator: function(clip, *arguments, **named)


def all_changes(rate: int, seed: int) -> tuple[list[Change], list[Missing]]:
    """Returns all changes to sound at `rate` Hz in report order, and those without effect there."""
    other = 44100 if rate != 44100 else 48000
    gentle, strong = (
        enumerate(random_equalisers(count, limit, seed), start=1)
        for count, limit in ((3, GENTLE_EQ), (2, STRONG_EQ))
    )
    faster = (("-", 0.98), ("+", 1.02))
    sides = {8000.0: "above", 4000.0: "above", 100.0: "below", 300.0: "below"}
    limits = [
        Change(f"nothing {side} {hz:g} Hz", False, "limit", (_FILTERS[side], hz))
        for hz, side in sides.items()
    ]
    changes = [
        *(Change(f"level {gain:+d} dB", True, "level", gain) for gain in (-20, -6, 6)),
        Change("polarity", True, "polarity"),
        Change("offset 0.05", True, "offset", 0.05),
        Change(f"{other / 1000:g} kHz, two channels", True, "channels", other),
        Change("16 bit", True, "bits", 16),
        *(Change(f"gentle equaliser {i}, ±{GENTLE_EQ:g} dB", True, "eq", eq) for i, eq in gentle),
        *(Change(f"equaliser {i}, ±{STRONG_EQ:g} dB", False, "eq", eq) for i, eq in strong),
        Change("brighter", True, "eq", Equaliser.tilt(GENTLE_EQ)),
        Change("darker", True, "eq", Equaliser.tilt(-GENTLE_EQ)),
        *(Change(f"begins {s:g} s later", True, "later", s) for s in (0.02, 0.5)),
        *(Change(f"silence of {s:g} s first", True, "silence", s) for s in (0.5, 2.0)),
        Change("mp3, 128 kbit/s", True, "mp3", 128),
        Change("Ogg Vorbis", True, "vorbis"),
        Change("mp3, 64 kbit/s", False, "mp3", 64),
        Change("8 bit", False, "bits", 8),
        *(Change(f"tempo {sign}2 %", False, "tempo", f) for sign, f in faster),
        *(Change(f"speed {sign}2 %", False, "speed", f) for sign, f in faster),
        *(Change(f"pitch {s:+g} semitone", False, "pitch", s) for s in (-0.5, 0.5)),
        *(each for each in limits if each.value[1] < rate / 2),
        *(Change(f"noise at {snr} dB", False, "noise", snr) for snr in (30, 20)),
    ]
    reason = f"at {rate} Hz there is nothing above {rate / 2:g} Hz."
    return changes, [Missing(each.name, reason) for each in limits if each.value[1] >= rate / 2]


def sound_transforms(rate: int, seed: int = 0) -> tuple[list[Transform], list[Missing]]:
    """Returns the changes available for mono samples at `rate` Hz, and the others.

    Their `apply` takes float32 `[n]` and returns `[at most n]`. The seed is that of the random
    equalisers.
    """
    wav: dict[str, Any] = {"format": "WAV", "subtype": "FLOAT", "channels": 2}
    makers: dict[str, Callable[[Any], Apply]] = {
        "level": lambda gain: fixed(np.multiply, np.float32(10 ** (gain / 20))),
        "polarity": lambda _: fixed(np.negative),
        "offset": lambda offset: fixed(np.add, np.float32(offset)),
        "channels": lambda other: fixed(through_file, rate, ".wav", file_rate=other, **wav),
        "bits": lambda bits: functools.partial(quantise, bits=bits),
        "eq": lambda equaliser: fixed(equalise, rate, equaliser),
        "later": lambda v: lambda clip, _: clip[round(v * rate) :],
        "silence": lambda v: lambda clip, _: np.pad(clip, (round(v * rate), 0))[: len(clip)],
        "mp3": lambda kbits: fixed(through_mp3, rate, kbits),
        "vorbis": lambda _: fixed(through_file, rate, ".ogg", format="OGG", subtype="VORBIS"),
        "tempo": lambda v: lambda clip, _: time_stretch(clip, rate=v)[: len(clip)],
        "speed": lambda v: lambda clip, _: resample(clip, round(v * rate), rate)[: len(clip)],
        "pitch": lambda semitones: fixed(pitch_shift, sr=rate, n_steps=semitones),
        "limit": lambda limit: fixed(limit_band, rate, *limit),
        "noise": lambda snr: functools.partial(white_noise, snr=snr),
    }
    changes, missing = all_changes(rate, seed)
    noise = np.random.default_rng(0)
    samples = (0.1 * noise.standard_normal(rate)).astype(np.float32)
    possible = []
    for change in changes:
        apply = makers[change.type](change.value)
        try:
            if change.type in ("mp3", "vorbis"):  # which not every libsndfile can write
                apply(samples, noise)
            possible.append(change.made(apply, _WHAT))
        except UserError as error:
            missing.append(Missing(change.name, str(error)))
    return possible, missing
