"""The embedded data set: ten invented styles of rendered music, so that everything runs offline.

A style is a row of a table: tempo, drum patterns, harmony and timbres. Its clips are by ten
invented artists with their own instruments, mix, room and recording, and no artist is in two
splits: as with real music, a model must learn the style and ignore the artist. Styles share
instruments and tempos, and some differ in little but their rhythm. The audio says nothing about
real genres, and every report on it says that it is synthetic.
"""

import functools
import math
import tomllib
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import soundfile
from numpy.random import Generator
from tqdm import tqdm

from musicgenre.datasets.base import Clip, Dataset, packaged
from musicgenre.datasets.registry import register
from musicgenre.errors import UserError, did_you_mean
from musicgenre.files import read_json, replacing, write_json

# Raised when the same parameters give another sound: no folder holds clips of two renderers.
RENDERER_VERSION = 1
RECORD_NAME = "synthetic.json"
# The artist of clip i is number i % 10. All three splits come first: three clips per style suffice.
ARTIST_SPLITS = ("train", "valid", "test", *["train"] * 3, "valid", "test", *["train"] * 2)
# Lower rates have no room for the cymbal.
MIN_SAMPLE_RATE = 16000
# How clip i is written, by i % 9: suffix, soundfile's format and subtype, rate in Hz, channels. It
# is the same for every style, or the format would reveal the style, and 9 has no factor in common
# with the number of artists, or it would reveal the artist.
_WAV = ("wav", "WAV", "PCM_16", 22050, 1)
_FORMATS = {
    1: ("flac", "FLAC", "PCM_16", 44100, 2),
    3: ("ogg", "OGG", "VORBIS", 22050, 1),
    5: ("wav", "WAV", "PCM_16", 44100, 2),
    7: ("mp3", "MP3", "MPEG_LAYER_III", 16000, 1),
}


class Timbre(NamedTuple):
    """An instrument: harmonics with frequency modulation, damping and breath noise."""

    harmonics: tuple[float, ...]  # amplitude of the 1st, 2nd, ... harmonic
    damping: float = 0.0  # harmonic h decays as exp(-h * damping * t), t in seconds
    fm_ratio: float = 1.0  # frequency of the modulator over that of the note
    fm_index: float = 0.0  # initial depth of the modulator in radians; its time constant is 0.25 s
    attack: float = 0.005  # seconds from silence to full level
    release: float = 0.06  # seconds that the sound lasts after the end of the note
    breath: float = 0.0  # level of the noise
    vibrato: float = 0.0  # depth in semitones, at 5.5 Hz


TIMBRES = {
    "string": Timbre(tuple(h**-1.0 for h in range(1, 13)), damping=1.3, release=0.15),
    "nylon": Timbre(tuple(h**-1.6 for h in range(1, 9)), damping=2.2, release=0.12),
    "rubber": Timbre((1.0, 0.7, 0.35, 0.2), damping=3.0, release=0.05),
    "sub": Timbre((1.0, 0.15, 0.05), attack=0.01, release=0.05),
    "saw": Timbre(tuple(h**-1.0 for h in range(1, 17)), attack=0.008, release=0.08),
    "hollow": Timbre(tuple(float(h % 2) / h for h in range(1, 14)), attack=0.03, vibrato=0.12),
    "organ": Timbre((1, 0.8, 0.5, 0.5, 0, 0.3, 0, 0.35), attack=0.01, release=0.05, vibrato=0.06),
    "horn": Timbre((1, 0.4), fm_index=1.8, attack=0.045, release=0.09, vibrato=0.08),
    "tine": Timbre((1, 0.2), damping=1.2, fm_ratio=7.0, fm_index=0.6, release=0.2),
    "bell": Timbre((1, 0.25), damping=1.6, fm_ratio=3.47, fm_index=1.4, release=0.4),
    "mallet": Timbre((1, 0, 0, 0.35), damping=4.0, fm_ratio=2.0, fm_index=0.3, release=0.15),
    "flute": Timbre((1, 0.35, 0.1), attack=0.06, breath=0.10, vibrato=0.2),
    "haze": Timbre((1, 0.6, 0.4, 0.25, 0.15), attack=0.5, release=0.6, breath=0.05),
}


class Voice(NamedTuple):
    """One part of the arrangement."""

    pattern: str  # one mark per step of a bar, as the table explains
    timbres: Sequence[str]  # the instruments that may play it; an artist has one of them
    low: int  # lowest MIDI note
    gate: float  # length of a note in steps


class Style(NamedTuple):
    """A style of music, a section of `data/synthetic_styles.toml`."""

    tempo: Sequence[float]  # slowest and fastest, in beats per minute
    scale: Sequence[int]  # semitones above the tonic
    progressions: Sequence[Sequence[int]]  # scale degrees of the chord roots, one per bar
    drums: Sequence[str]  # patterns of kick, snare and cymbal
    bass: Voice
    chords: Voice
    lead: Voice
    steps_per_beat: int = 4
    swing: float = 0.0  # delay of the middle of a beat, in beats; 1/6 is a triplet feel
    chord_tones: Sequence[int] = (0, 2, 4)  # scale degrees above the root
    walking: float = 0.0  # chance that a bass note is a step of the scale, not a chord tone
    levels: Sequence[float] = (0, 0, 0, 0)  # drums, bass, chords and lead in dB


PARTS = ("bass", "chords", "lead")
STYLES = {
    name: Style(**fields | {part: Voice(**fields[part]) for part in PARTS})
    for name, fields in tomllib.loads(packaged("synthetic_styles.toml")).items()
}


def _draw(style: Style, habit: Generator, own: Generator) -> SimpleNamespace:
    """Draws a clip's parameters: the habits of its artist and the clip's own. The order matters."""
    slow, fast = style.tempo
    tempo, keys = habit.uniform(slow, fast), habit.permutation(12)[:5]
    timbres = [str(habit.choice(getattr(style, part).timbres)) for part in PARTS]
    levels = np.asarray(style.levels) + habit.uniform(-5, 5, 4)
    detune, softness = habit.uniform(-0.4, 0.4), habit.uniform(-0.3, 0.7)
    tilt, cutoff = habit.uniform(-3.0, 3.0), np.exp(habit.uniform(np.log(3000), np.log(10000)))
    reverb, wet, noise = habit.uniform(0.15, 1.5), habit.uniform(0.0, 0.4), habit.uniform(-60, -25)
    # Now and then a guest plays: an instrument alone never reveals the style.
    guests = own.choice(list(TIMBRES), 3).tolist()
    is_guest = own.uniform(size=3) < (0.25, 0.35, 0.5)
    levels += own.uniform(-4, 4, 4)
    spread = 0.25 * (fast - slow)
    return SimpleNamespace(
        tempo=float(np.clip(tempo + own.uniform(-spread, spread), slow, fast)),
        tonic=int(own.choice(keys)),  # pitch class, 0 is C
        progression=style.progressions[int(own.integers(len(style.progressions)))],
        # Beats of the first bar that have passed when the clip begins.
        start=own.uniform(0, len(style.drums[0]) / style.steps_per_beat),
        timbres=np.where(is_guest, guests, timbres).tolist(),  # of bass, chords and lead
        gains=10 ** (levels / 20),  # of drums, bass, chords and lead
        detune=detune + own.uniform(-0.05, 0.05),  # semitones off concert pitch
        softness=softness + own.uniform(-0.2, 0.2),  # harmonic h is weakened by h ** -softness
        tilt=tilt + own.uniform(-0.7, 0.7),  # slope of the recording's spectrum, dB per octave
        cutoff=float(cutoff),  # frequency in Hz above which the recording fades
        reverb=reverb,  # seconds in which the room's echo falls by 60 dB
        wet=wet,  # fraction of echo in the mix
        noise=noise + own.uniform(-3, 3),  # dB relative to the music
        peak=10 ** (own.uniform(-14, -1.5) / 20),  # largest absolute sample
    )


def render_clip(
    style: str, seed: int, seconds: float = 6.0, sample_rate: int = 22050, index: int = 0
) -> np.ndarray:
    """Renders one clip, which depends on the arguments alone.

    At another rate the music is the same and its noises differ.

    Args:
      style: a key of `STYLES`.
      seed: seed of the data set.
      seconds: length of the clip.
      sample_rate: in Hz, at least 16,000.
      index: number of the clip in its style.

    Returns:
      Mono samples, float32 `[round(seconds * sample_rate)]`, with a peak between 0.19 and 0.85.

    Raises:
      UserError: no such style, or too low a sample rate.
    """
    if sample_rate < MIN_SAMPLE_RATE:
        raise UserError(f"sample_rate must be at least {MIN_SAMPLE_RATE} Hz, not {sample_rate}.")
    if style not in STYLES:
        raise UserError(f"No synthetic style {style!r}.{did_you_mean(style, STYLES)}")
    artist = _generator(style, seed, "artist", index % len(ARTIST_SPLITS))
    drawn = _draw(STYLES[style], artist, _generator(style, seed, "clip", index))
    notes, hits = _compose(STYLES[style], drawn, seconds, _generator(style, seed, "score", index))
    noise = _generator(style, seed, "noise", index)
    mix = np.zeros(round(seconds * sample_rate), np.float32)

    @functools.cache
    def sound_of(timbre: str, pitch: float, length: float) -> np.ndarray:
        return _note_sound(TIMBRES[timbre], pitch, length, drawn.softness, sample_rate, noise)

    for time, gain, *note in notes:
        _add(mix, sound_of(*note), round(time * sample_rate), gain)
    kit = [_drum_sound(number, drawn.detune, sample_rate, noise) for number in range(3)]
    for time, gain, drum in hits:
        _add(mix, kit[drum], round(time * sample_rate), gain)
    mix = _record(mix, drawn, sample_rate, noise)
    return (mix * (drawn.peak / np.abs(mix).max())).astype(np.float32)


def _generator(style: str, seed: int, purpose: str, number: int) -> Generator:
    """Returns a generator per purpose, so that no draw depends on what was drawn elsewhere."""
    key = [seed, zlib.crc32(style.encode()), zlib.crc32(purpose.encode()), number]
    return np.random.default_rng(key)


def _compose(
    style: Style, drawn: SimpleNamespace, seconds: float, rng: Generator
) -> tuple[list[tuple[float, float, str, float, float]], list[tuple[float, float, int]]]:
    """Writes the score: bars of patterns from before the clip's beginning to its end.

    Returns:
      The notes as (time in s, gain, timbre, MIDI pitch, length in s) and the strokes of drums as
      (time in s, gain, number of the drum).
    """
    beat = 60 / drawn.tempo
    step, steps = beat / style.steps_per_beat, len(style.drums[0])
    # Swing stretches the first half of a beat and shrinks the second.
    beats = np.arange(steps) / style.steps_per_beat
    onsets = (np.floor(beats) + np.interp(beats % 1, (0, 0.5, 1), (0, 0.5 + style.swing, 1))) * beat
    notes, hits, melody = [], [], 3
    for bar in range(math.ceil(seconds / (steps * step)) + 1):
        begin = bar * (steps * step) - drawn.start * beat
        root = drawn.progression[bar % len(drawn.progression)]
        for drum, pattern in enumerate(style.drums):
            for position, velocity in _strokes(pattern, rng):
                hits.append((begin + onsets[position], drawn.gains[0] * velocity, drum))
        for part, voice in enumerate((style.bass, style.chords, style.lead)):
            for position, velocity in _strokes(voice.pattern, rng):
                octave = 0
                if part == 1:
                    degrees = [root + tone for tone in style.chord_tones]
                elif part == 2:
                    melody = min(max(melody + int(rng.integers(-2, 3)), 0), 8)
                    octave, degree = divmod(melody, len(style.scale))
                    degrees = [degree]
                elif rng.uniform() < style.walking:
                    degrees = [root + int(rng.integers(-2, 3))]
                else:
                    degrees = [root + int(rng.choice((0, 0, 0, style.chord_tones[-1])))]
                time = begin + onsets[position]
                gain = (0.5, 0.2, 0.3)[part] * drawn.gains[1 + part] * velocity
                for degree in degrees:
                    above_low = drawn.tonic + style.scale[degree % len(style.scale)] - voice.low
                    pitch = voice.low + above_low % 12 + drawn.detune + 12 * octave
                    notes.append((time, gain, drawn.timbres[part], pitch, voice.gate * step))
    return [n for n in notes if n[0] < seconds], [h for h in hits if h[0] < seconds]


def _strokes(pattern: str, rng: Generator) -> list[tuple[int, float]]:
    """Returns the steps of a bar at which something sounds, with their velocities."""
    chance, loud = rng.uniform(size=(2, len(pattern)))
    return [
        (position, (1.0 if mark == "X" else 0.6) * (0.8 + 0.2 * loud[position]))
        for position, mark in enumerate(pattern)
        if mark in "Xx" or (mark == "o" and chance[position] < 0.5)
    ]


def _note_sound(
    timbre: Timbre, pitch: float, seconds: float, softness: float, rate: int, rng: Generator
) -> np.ndarray:
    """Returns the sound of one note, float32 `[samples]`.

    Harmonic h is the h-th power of one damped rotation: a single exponential and a polynomial make
    them all.
    """
    frequency = 440 * 2 ** ((pitch - 69) / 12)
    time = np.arange(round((seconds + timbre.release) * rate)) / rate
    phase = 2 * np.pi * frequency * time
    if timbre.vibrato:
        phase += frequency * timbre.vibrato * np.log(2) / 12 / 5.5 * np.sin(2 * np.pi * 5.5 * time)
    if timbre.fm_index:
        phase += timbre.fm_index * np.exp(-time / 0.25) * np.sin(timbre.fm_ratio * phase)
    rotation = np.exp(1j * phase - timbre.damping * time).astype(np.complex64)
    # Harmonics above the Nyquist frequency would alias.
    audible = max(1, min(len(timbre.harmonics), int(0.45 * rate / frequency)))
    weights = [
        amplitude * rank**-softness
        for rank, amplitude in enumerate(timbre.harmonics[:audible], start=1)
    ]
    wave = np.full_like(rotation, weights[-1])
    for weight in reversed([0.0, *weights[:-1]]):
        wave *= rotation
        wave += np.float32(weight)
    sound = wave.imag / np.float32(np.sqrt(np.square(weights).sum()))
    if timbre.breath:
        sound = sound + np.float32(timbre.breath) * rng.standard_normal(len(time), np.float32)
    fade = np.clip((time[-1] - time) / timbre.release, 0.0, 1.0)
    return sound * (np.minimum(time / timbre.attack, 1.0) * fade).astype(np.float32)


def _drum_sound(drum: int, detune: float, rate: int, rng: Generator) -> np.ndarray:
    """Returns one stroke of a drum, float64 `[samples]`; the kit is tuned with the instruments."""
    import scipy.signal  # slow to import

    time = np.arange(round(0.3 * rate)) / rate
    pitch = 2 ** (detune / 2)
    if drum == 0:
        # The pitch falls from 170 to 50 Hz.
        phase = 2 * np.pi * pitch * (50 * time - 120 * 0.03 * np.exp(-time / 0.03))
        return 0.9 * np.sin(phase) * np.exp(-time / 0.09)
    low, high, decay, level = ((900, 6000, 0.06, 0.8), (5500, 10000, 0.03, 0.5))[drum - 1]
    edges = (low, min(high, 0.45 * rate))
    band = scipy.signal.butter(2, edges, "bandpass", fs=rate, output="sos")
    noise = scipy.signal.sosfilt(band, rng.standard_normal(len(time)))
    sound: np.ndarray = level * noise * np.exp(-time / decay)
    if drum == 1:
        sound += 0.4 * np.sin(2 * np.pi * 190 * pitch * time) * np.exp(-time / 0.05)
    return sound


def _add(mix: np.ndarray, sound: np.ndarray, begin: int, gain: float) -> None:
    """Adds `sound` to `mix` in place, cut where it begins before the mix or ends after it."""
    first, last = max(begin, 0), min(begin + len(sound), len(mix))
    if first < last:
        mix[first:last] += np.float32(gain) * sound[first - begin : last - begin]


def _record(mix: np.ndarray, drawn: SimpleNamespace, rate: int, rng: Generator) -> np.ndarray:
    """Applies the artist's room and recording: echo, spectral tilt, cutoff and noise."""
    import scipy.fft

    times = np.arange(1, round(drawn.reverb * rate), dtype=np.float32)
    decay = np.exp(times / np.float32(rate) * (math.log(1e-3) / drawn.reverb))
    echo = rng.standard_normal(len(times), np.float32) * decay
    room = np.concatenate([[1 - drawn.wet], drawn.wet * echo / np.linalg.norm(echo)])
    length = int(scipy.fft.next_fast_len(len(mix) + len(room), real=True))
    frequency = np.maximum(scipy.fft.rfftfreq(length, 1 / rate), 30.0)
    # The tilt pivots at 1 kHz.
    tape = (frequency / 1000) ** (drawn.tilt / (20 * math.log10(2)))
    tape /= 1 + (frequency / drawn.cutoff) ** 4
    spectrum = scipy.fft.rfft(mix, length) * scipy.fft.rfft(room.astype(np.float32), length)
    wet = scipy.fft.irfft(spectrum * tape.astype(np.float32), length)[: len(mix)]
    level = np.sqrt(np.mean(wet**2)) * np.float32(10 ** (drawn.noise / 20))
    return wet + level * rng.standard_normal(len(mix), np.float32)


@register("synthetic")
def load_synthetic(
    root: str | Path, seed: int = 0, clips_per_style: int = 24, seconds: float = 6.0
) -> Dataset:
    """Renders the clips that are missing below `root` and returns all of them.

    Files are `<root>/<style>/<style>.NNNNN.<suffix>`: most are 16-bit mono WAV at 22,050 Hz, and
    for every style alike some are FLAC, OGG, MP3, stereo, 16,000 and 44,100 Hz. A later call with
    more clips keeps those that exist and their splits. A clip's group is its artist, and the splits
    are by artist, about 60/20/20.

    Args:
      root: a folder for this data set alone; created if needed.
      seed: another seed makes other artists and other clips of the same styles.
      clips_per_style: 3 to 100,000.
      seconds: length of a clip, 1 to 600.

    Raises:
      UserError: a parameter is out of range, `root` is not a folder, holds other files, was made
        with another seed, length or version of the renderer, or cannot be written.
    """
    root = Path(root)
    limits = {"clips_per_style": (3, 100_000), "seconds": (1, 600), "seed": (0, 2**64)}
    values = {"clips_per_style": clips_per_style, "seconds": seconds, "seed": seed}
    for name, (low, high) in limits.items():
        if not low <= values[name] <= high:
            raise UserError(f"{name} must be {low} to {high}, not {values[name]:g}.")
    _claim(root, seed, clips_per_style, float(seconds))
    clips, missing = [], []
    for style in STYLES:
        for index in range(clips_per_style):
            artist = index % len(ARTIST_SPLITS)
            clip_id = f"{style}.{index:05d}"
            path = root / style / f"{clip_id}.{_FORMATS.get(index % 9, _WAV)[0]}"
            group = f"{style} artist {artist}"
            clips.append(Clip(clip_id, path, (style,), ARTIST_SPLITS[artist], group))
            if not path.exists():
                missing.append((path, style, seed, index, seconds))
    # None: no bar where the output is not a terminal.
    disable = None if missing else True
    for clip in tqdm(missing, "render synthetic music", unit="clip", disable=disable):
        _write_clip(*clip)
    names, described = tuple(sorted(STYLES)), f"synthetic seed {seed}"
    return Dataset("synthetic", root, described, "single_label", names, clips, synthetic=True)


def _claim(root: Path, seed: int, clips_per_style: int, seconds: float) -> None:
    """Records the parameters in `root`, or raises if the folder belongs to something else."""
    record = root / RECORD_NAME
    wanted = {"renderer": RENDERER_VERSION, "seed": seed, "seconds": seconds}
    found = read_json(record, "record of the synthetic data set") if record.exists() else {}
    if not found and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root}: holds other files and no {RECORD_NAME}. Choose another root.")
    for name, value in wanted.items():
        if found and found.get(name) != value:
            other = f"was rendered with {name} {found.get(name)}, not {value}"
            raise UserError(f"{root}: {other}. Choose another root, or delete this one.")
    if clips_per_style > found.get("clips_per_style", 0):
        write_json(record, {**wanted, "clips_per_style": clips_per_style})


def _write_clip(path: Path, style: str, seed: int, index: int, seconds: float) -> None:
    """Renders a clip to a file in the format that belongs to its index."""
    _, container, subtype, rate, channels = _FORMATS.get(index % 9, _WAV)
    samples = render_clip(style, seed, seconds, rate, index)
    if channels == 2:
        # Off centre by up to a third. The mean of the channels is the mono signal, slightly softer.
        pan = float(_generator(style, seed, "pan", index).uniform(-1 / 3, 1 / 3))
        samples = np.stack([samples * (1 + pan), samples * (1 - pan)], axis=1) / (1 + abs(pan))
    with (
        replacing(path) as temporary,
        soundfile.SoundFile(temporary, "w", rate, channels, subtype, format=container) as out,
    ):
        # libsndfile's Vorbis encoder keeps a whole write on the stack, which a long clip overflows.
        for begin in range(0, len(samples), rate):
            out.write(samples[begin : begin + rate])
