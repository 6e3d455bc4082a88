"""The embedded data set: ten made-up styles of rendered music, so that everything runs without a download.

A style is a table of tempo, patterns, harmony and timbres. Its clips are by ten made-up artists who each have their
own instruments, mix, room and recording, and no artist is in two splits: as with real music, what is to be learned is
the style and what must be ignored is the artist. Styles share instruments and tempos, and some differ in little but
their rhythm. The audio says nothing about real genres, and every report on it says that it is synthetic.
"""

import dataclasses
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

from musicgenre.datasets.base import Clip, Dataset, make_dataset
from musicgenre.datasets.registry import register
from musicgenre.errors import UserError, did_you_mean
from musicgenre.files import read_json, replacing, write_json

# Raised when the same parameters give other sound, so that one folder never holds clips of two renderers.
RENDERER_VERSION = 1
RECORD_NAME = "synthetic.json"
# The artist of clip i is number i % 10. All three splits come first, so that three clips a style are enough.
ARTIST_SPLITS = (
    "train",
    "valid",
    "test",
    "train",
    "train",
    "train",
    "valid",
    "test",
    "train",
    "train",
)
MIN_CLIPS, MAX_CLIPS = len(set(ARTIST_SPLITS)), 100_000
MIN_SECONDS, MAX_SECONDS = 1.0, 600.0
# Lower rates have no room for the cymbal.
MIN_SAMPLE_RATE = 16000


class FileKind(NamedTuple):
    """How a clip is written: file suffix, soundfile's format and subtype, rate in Hz, channels."""

    suffix: str
    format: str
    subtype: str
    sample_rate: int
    channels: int


_WAV = FileKind("wav", "WAV", "PCM_16", 22050, 1)
# Clip i is of kind i % 9: the same for every style, or the format would betray the style; and 9 has no factor in common
# with the number of artists, or it would betray the artist.
FILE_KINDS = (
    _WAV,
    FileKind("flac", "FLAC", "PCM_16", 44100, 2),
    _WAV,
    FileKind("ogg", "OGG", "VORBIS", 22050, 1),
    _WAV,
    FileKind("wav", "WAV", "PCM_16", 44100, 2),
    _WAV,
    FileKind("mp3", "MP3", "MPEG_LAYER_III", 16000, 1),
    _WAV,
)


@dataclasses.dataclass(frozen=True)
class Timbre:
    """An instrument: harmonics with frequency modulation, damping and some breath noise.

    Attributes:
      harmonics: amplitude of the 1st, 2nd, ... harmonic.
      damping: harmonic h decays as exp(-h * damping * t), t in seconds; a plucked string's highs die first.
      fm_ratio: frequency of the modulator over that of the note.
      fm_index: the modulator's initial depth in radians; it decays with a time constant of 0.25 s.
      attack: seconds from 0 to full level.
      release: seconds that the sound lasts after the note's end.
      breath: level of noise in the sound.
      vibrato: depth in semitones, at 5.5 Hz.
    """

    harmonics: tuple[float, ...]
    damping: float = 0.0
    fm_ratio: float = 1.0
    fm_index: float = 0.0
    attack: float = 0.005
    release: float = 0.06
    breath: float = 0.0
    vibrato: float = 0.0


TIMBRES = {
    "string": Timbre(tuple(h**-1.0 for h in range(1, 13)), damping=1.3, release=0.15),
    "nylon": Timbre(tuple(h**-1.6 for h in range(1, 9)), damping=2.2, release=0.12),
    "rubber": Timbre((1.0, 0.7, 0.35, 0.2), damping=3.0, release=0.05),
    "sub": Timbre((1.0, 0.15, 0.05), attack=0.01, release=0.05),
    "saw": Timbre(tuple(h**-1.0 for h in range(1, 17)), attack=0.008, release=0.08),
    "hollow": Timbre(tuple(float(h % 2) / h for h in range(1, 14)), attack=0.03, vibrato=0.12),
    "organ": Timbre(
        (1.0, 0.8, 0.5, 0.5, 0.0, 0.3, 0.0, 0.35), attack=0.01, release=0.05, vibrato=0.06
    ),
    "horn": Timbre(
        (1.0, 0.4), fm_ratio=1.0, fm_index=1.8, attack=0.045, release=0.09, vibrato=0.08
    ),
    "tine": Timbre((1.0, 0.2), damping=1.2, fm_ratio=7.0, fm_index=0.6, release=0.2),
    "bell": Timbre((1.0, 0.25), damping=1.6, fm_ratio=3.47, fm_index=1.4, release=0.4),
    "mallet": Timbre((1.0, 0.0, 0.0, 0.35), damping=4.0, fm_ratio=2.0, fm_index=0.3, release=0.15),
    "flute": Timbre((1.0, 0.35, 0.1), attack=0.06, breath=0.10, vibrato=0.2),
    "haze": Timbre((1.0, 0.6, 0.4, 0.25, 0.15), attack=0.5, release=0.6, breath=0.05),
}


@dataclasses.dataclass(frozen=True)
class Voice:
    """One part of the arrangement.

    Attributes:
      pattern: what happens at each step of the bar: X a strong hit, x a weak one, o perhaps a weak one, . nothing.
      timbres: names of the instruments that may play it; an artist has one of them.
      low: lowest MIDI note of the part.
      gate: length of a note in steps.
    """

    pattern: str
    timbres: tuple[str, ...]
    low: int
    gate: float


@dataclasses.dataclass(frozen=True)
class Style:
    """A style of music.

    Attributes:
      description: one line for people.
      tempo: slowest and fastest tempo in beats per minute.
      steps_per_beat: steps of the patterns in a beat.
      swing: delay of the middle of a beat as a fraction of a beat; 1/6 is a triplet feel.
      scale: semitones above the tonic.
      progressions: for each, the scale degrees of the chords' roots, one a bar.
      chord_tones: scale degrees above the root that make a chord.
      kick: pattern of the low drum, of the same length as all the others.
      snare: pattern of the middle drum.
      hat: pattern of the cymbal.
      bass: the bass part, which moves between a chord's root and fifth, or along the scale.
      chords: the accompaniment.
      lead: the melody, a random walk on the scale.
      walking: chance that a bass note is a step of the scale and not a tone of the chord.
      levels: drums, bass, chords and lead in dB.
    """

    description: str
    tempo: tuple[float, float]
    scale: tuple[int, ...]
    progressions: tuple[tuple[int, ...], ...]
    kick: str
    snare: str
    hat: str
    bass: Voice
    chords: Voice
    lead: Voice
    steps_per_beat: int = 4
    swing: float = 0.0
    chord_tones: tuple[int, ...] = (0, 2, 4)
    walking: float = 0.0
    levels: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


_MAJOR = (0, 2, 4, 5, 7, 9, 11)
_MINOR = (0, 2, 3, 5, 7, 8, 10)
_DORIAN = (0, 2, 3, 5, 7, 9, 10)
_PENTATONIC = (0, 2, 4, 7, 9)

STYLES = {
    "pulsar": Style(
        "even kicks on every beat, bass and cymbal between them, minor",
        tempo=(112, 136),
        scale=_MINOR,
        progressions=((0, 5, 2, 6), (0, 0, 3, 4)),
        kick="X...X...X...X...",
        snare="....x.......x...",
        hat="..X...X...X.o.X.",
        bass=Voice("..X...X...X...X.", ("sub", "saw", "rubber"), 33, 1.5),
        chords=Voice("X..x..x...o...o.", ("saw", "organ", "string"), 55, 1.5),
        lead=Voice("x..o..x..o..x.o.", ("saw", "bell", "hollow"), 67, 1.2),
    ),
    "quartz": Style(
        "pulsar's instruments at its tempo with broken kicks and hurried cymbals",
        tempo=(112, 136),
        scale=_MINOR,
        progressions=((0, 5, 2, 6), (0, 0, 3, 4)),
        kick="X.....X...X..o..",
        snare="....X..o.o..X...",
        hat="x.xxx.x.x.xxx.xo",
        bass=Voice("X..x......X..x..", ("sub", "saw", "rubber"), 33, 2.0),
        chords=Voice("X.......o.....x.", ("saw", "organ", "string"), 55, 3.0),
        lead=Voice("x..o..x..o..x.o.", ("saw", "bell", "hollow"), 67, 1.2),
    ),
    "lantern": Style(
        "slow plucked strings over a soft hand drum, pentatonic",
        tempo=(66, 92),
        scale=_PENTATONIC,
        progressions=((0, 3, 0, 1), (0, 1, 3, 3)),
        kick="X.........x.....",
        snare="......o.....o...",
        hat="....o.......o...",
        bass=Voice("X.......x.......", ("nylon", "rubber", "string"), 40, 6.0),
        chords=Voice("x.x.x.x.x.x.x.x.", ("string", "nylon", "tine"), 52, 3.0),
        lead=Voice("X...o.x.....x.o.", ("flute", "hollow", "string"), 67, 3.0),
        levels=(-7, 0, 0, 0),
    ),
    "thicket": Style(
        "lantern's strings in a quick roll of triplets",
        tempo=(84, 112),
        steps_per_beat=3,
        scale=_MAJOR,
        progressions=((0, 3, 4, 0), (0, 4, 3, 4)),
        kick="X.....X.....",
        snare="...x.o...x.x",
        hat="x.xx.xx.xx.x",
        bass=Voice("X.....x.....", ("nylon", "rubber", "string"), 40, 3.0),
        chords=Voice("XxxXxxXxxXxx", ("string", "nylon", "tine"), 52, 1.5),
        lead=Voice("X.xo..x.xo..", ("flute", "hollow", "string"), 67, 1.5),
        levels=(-6, 0, 0, 0),
    ),
    "harbour": Style(
        "short chords off the beat, a heavy bass and the kick on the third beat",
        tempo=(68, 92),
        scale=_MINOR,
        progressions=((0, 3, 0, 4), (0, 6, 0, 6)),
        kick="........X.......",
        snare="........x.....o.",
        hat="x.x.x.x.x.x.x.xx",
        bass=Voice("X..x..x...x.o...", ("sub", "rubber"), 31, 2.5),
        chords=Voice("....X.......X..o", ("organ", "string", "nylon"), 57, 1.0),
        lead=Voice("o.....x...o.....", ("horn", "flute", "hollow"), 65, 3.0),
        levels=(-2, 2, 0, -2),
    ),
    "ferrous": Style(
        "fast driving eighths of sawtooth chords, kick and snare by turns",
        tempo=(136, 176),
        scale=_MINOR,
        progressions=((0, 0, 5, 6), (0, 2, 6, 3)),
        chord_tones=(0, 4, 7),
        kick="X...o.X.X..oX...",
        snare="....X.......X...",
        hat="X.x.X.x.X.x.X.x.",
        bass=Voice("X.x.x.x.X.x.x.x.", ("saw", "string"), 31, 1.8),
        chords=Voice("X.x.x.x.X.x.x.x.", ("saw", "horn"), 45, 1.8),
        lead=Voice("o...x...o.o.x...", ("saw", "hollow"), 64, 2.0),
        levels=(0, 0, 2, -3),
    ),
    "velvet": Style(
        "swung cymbal, walking bass and four-note chords",
        tempo=(104, 152),
        scale=_DORIAN,
        progressions=((1, 4, 0, 0), (0, 5, 1, 4)),
        chord_tones=(0, 2, 4, 6),
        swing=1 / 6,
        walking=0.6,
        kick="o.......o.......",
        snare="......o.......o.",
        hat="X...X.x.X...X.x.",
        bass=Voice("X...X...X...X...", ("nylon", "rubber", "sub"), 36, 3.5),
        chords=Voice("....x.o....ox...", ("tine", "organ", "nylon"), 55, 2.0),
        lead=Voice("x.o.x.x.o.x.x.o.", ("horn", "hollow", "tine"), 62, 1.8),
        levels=(-5, 0, 0, 0),
    ),
    "tundra": Style(
        "long chords of haze and single bells, hardly a drum",
        tempo=(56, 84),
        scale=_PENTATONIC,
        progressions=((0, 3, 1, 3), (0, 0, 3, 3)),
        chord_tones=(0, 1, 3),
        kick="o...............",
        snare="................",
        hat="....o.......o...",
        bass=Voice("X...............", ("sub", "haze", "organ"), 36, 14.0),
        chords=Voice("X...............", ("haze", "organ", "hollow"), 52, 15.0),
        lead=Voice("o...x.....o...o.", ("bell", "tine", "flute"), 67, 5.0),
        levels=(-9, -2, 0, 0),
    ),
    "carousel": Style(
        "three beats to the bar, bass on the first and chords on the others",
        tempo=(136, 184),
        scale=_MAJOR,
        progressions=((0, 0, 4, 4, 4, 4, 0, 0), (0, 3, 4, 0)),
        kick="X...........",
        snare="....x...x...",
        hat="....o...o.o.",
        bass=Voice("X...........", ("horn", "rubber", "organ"), 38, 3.0),
        chords=Voice("....X...X...", ("organ", "hollow", "string"), 55, 1.6),
        lead=Voice("X...x.o.x...", ("hollow", "flute", "mallet"), 67, 2.8),
        levels=(-7, 0, 0, 0),
    ),
    "cascade": Style(
        "mallets in groups of three across four even beats, with a shaker",
        tempo=(100, 132),
        scale=_PENTATONIC,
        progressions=((0, 0, 3, 3), (0, 1, 0, 4)),
        kick="X.......X..o....",
        snare="......o.....x...",
        hat="xxXxxxXxxxXxxxXx",
        bass=Voice("X.....x.....x...", ("nylon", "rubber", "sub"), 38, 2.5),
        chords=Voice("X..X..X..X..X.x.", ("mallet", "tine", "nylon"), 60, 1.6),
        lead=Voice("x.x..x.x.x..x.x.", ("mallet", "bell", "string"), 69, 1.4),
        levels=(-4, 0, 0, 0),
    ),
}


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What the draws for one clip came to.

    Attributes:
      artist: number of the artist.
      tempo: beats per minute.
      tonic: pitch class, 0 is C.
      progression: index into the style's progressions.
      start: beats of the first bar that have passed when the clip begins.
      timbres: instruments of bass, chords and lead.
      levels: drums, bass, chords and lead in dB.
      detune: semitones off concert pitch.
      softness: harmonic h of every instrument is weakened to h ** -softness.
      tilt: slope of the recording's spectrum in dB an octave.
      cutoff: frequency in Hz above which the recording fades.
      reverb: seconds in which the room's echo falls by 60 dB.
      wet: share of echo in the mix.
      noise: level of the background noise in dB relative to the music.
      peak: largest absolute sample.
    """

    artist: int
    tempo: float
    tonic: int
    progression: int
    start: float
    timbres: tuple[str, str, str]
    levels: tuple[float, float, float, float]
    detune: float
    softness: float
    tilt: float
    cutoff: float
    reverb: float
    wet: float
    noise: float
    peak: float


def clip_parameters(style: str, seed: int, index: int = 0) -> Parameters:
    """Draws what is particular to a clip: its artist's habits, which all clips of the artist share, and its own.

    Args:
      style: a key of `STYLES`.
      seed: seed of the data set.
      index: number of the clip in its style.

    Raises:
      UserError: no such style, or a negative seed or index.
    """
    table = _style(style)
    artist = index % len(ARTIST_SPLITS)
    habit, own = _generator(style, seed, "artist", artist), _generator(style, seed, "clip", index)

    slow, fast = table.tempo
    usual_tempo = habit.uniform(slow, fast)
    spread = 0.25 * (fast - slow)
    keys = habit.permutation(12)[:5]
    voices = (table.bass, table.chords, table.lead)
    usual_timbres = [str(habit.choice(voice.timbres)) for voice in voices]
    usual_levels = np.asarray(table.levels) + habit.uniform(-5, 5, 4)
    detune, softness = habit.uniform(-0.4, 0.4), habit.uniform(-0.3, 0.7)
    tilt, cutoff = habit.uniform(-3.0, 3.0), np.exp(habit.uniform(np.log(3000), np.log(10000)))
    reverb, wet, noise = habit.uniform(0.15, 1.5), habit.uniform(0.0, 0.4), habit.uniform(-60, -25)

    # Now and then a guest plays: an instrument alone never gives the style away.
    guests = [str(guest) for guest in own.choice(list(TIMBRES), 3)]
    is_guest = own.uniform(size=3) < (0.25, 0.35, 0.5)
    timbres = [
        guest if swap else usual
        for guest, swap, usual in zip(guests, is_guest, usual_timbres, strict=True)
    ]
    levels = usual_levels + own.uniform(-4, 4, 4)
    return Parameters(
        artist=artist,
        tempo=float(np.clip(usual_tempo + own.uniform(-spread, spread), slow, fast)),
        tonic=int(own.choice(keys)),
        progression=int(own.integers(len(table.progressions))),
        start=float(own.uniform(0, len(table.kick) / table.steps_per_beat)),
        timbres=(timbres[0], timbres[1], timbres[2]),
        levels=(float(levels[0]), float(levels[1]), float(levels[2]), float(levels[3])),
        detune=float(detune + own.uniform(-0.05, 0.05)),
        softness=float(softness + own.uniform(-0.2, 0.2)),
        tilt=float(tilt + own.uniform(-0.7, 0.7)),
        cutoff=float(cutoff),
        reverb=float(reverb),
        wet=float(wet),
        noise=float(noise + own.uniform(-3, 3)),
        peak=float(10 ** (own.uniform(-14, -1.5) / 20)),
    )


def render_clip(
    style: str, seed: int, seconds: float = 6.0, sample_rate: int = 22050, index: int = 0
) -> np.ndarray:
    """Renders one clip.

    The result depends on the arguments alone. At another rate the music is the same and its noises are others.

    Args:
      style: a key of `STYLES`.
      seed: seed of the data set.
      seconds: length of the clip.
      sample_rate: in Hz, at least 16,000.
      index: number of the clip in its style.

    Returns:
      Mono samples, float32 `[round(seconds * sample_rate)]`, with a peak between 0.19 and 0.85.

    Raises:
      UserError: no such style, a negative seed or index, or too low a sample rate.
    """
    if sample_rate < MIN_SAMPLE_RATE:
        raise UserError(f"sample_rate must be at least {MIN_SAMPLE_RATE} Hz, not {sample_rate}.")
    table, parameters = _style(style), clip_parameters(style, seed, index)
    composing, noise = (
        _generator(style, seed, "score", index),
        _generator(style, seed, "noise", index),
    )
    samples = round(seconds * sample_rate)
    notes, hits = _compose(table, parameters, seconds, composing)
    mix = np.zeros(samples, np.float32)
    sounds: dict[tuple[str, float, float], np.ndarray] = {}
    for note in notes:
        key = (note.timbre, note.pitch, note.seconds)
        if key not in sounds:
            sounds[key] = _note(
                TIMBRES[note.timbre],
                note.pitch,
                note.seconds,
                parameters.softness,
                sample_rate,
                noise,
            )
        _add(mix, sounds[key], note.time, note.gain, sample_rate)
    drums = {name: _drum(name, parameters, sample_rate, noise) for name in ("kick", "snare", "hat")}
    for hit in hits:
        _add(mix, drums[hit.drum], hit.time, hit.gain, sample_rate)
    mix = _record(mix, parameters, sample_rate, noise)
    return (mix * (parameters.peak / np.abs(mix).max())).astype(np.float32)


@register("synthetic")
def load_synthetic(
    root: str | os.PathLike[str], seed: int = 0, clips_per_style: int = 24, seconds: float = 6.0
) -> Dataset:
    """Renders the clips that are missing below `root` and returns all of them.

    Files are `<root>/<style>/<style>.NNNNN.<suffix>`: most of them 16-bit mono WAV at 22,050 Hz, and for every style
    alike some FLAC, OGG, MP3, stereo, 16,000 and 44,100 Hz. More clips can be asked for later: those that are there stay as
    they are, in the splits in which they are. A clip's group is its artist, and the splits are by artist, about
    60/20/20.

    Args:
      root: a folder of its own; made where it does not exist.
      seed: another seed makes other artists and other clips of the same styles.
      clips_per_style: at least 3.
      seconds: length of a clip, 1 to 600.

    Returns:
      The data set, single-label with the styles as labels.

    Raises:
      UserError: a parameter is out of range, `root` is not a folder, holds other things, was made with another
        seed, length or version of the renderer, or cannot be written.
    """
    root = Path(root)
    if not MIN_CLIPS <= clips_per_style <= MAX_CLIPS:
        raise UserError(
            f"clips_per_style must be {MIN_CLIPS} to {MAX_CLIPS}, not {clips_per_style}."
        )
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise UserError(f"seconds must be {MIN_SECONDS:g} to {MAX_SECONDS:g}, not {seconds:g}.")
    if seed < 0:
        raise UserError(f"The seed must not be negative; it is {seed}.")
    _claim(root, seed, clips_per_style, float(seconds))

    clips = []
    for style in STYLES:
        for index in range(clips_per_style):
            artist = index % len(ARTIST_SPLITS)
            clip_id = f"{style}.{index:05d}"
            path = root / style / f"{clip_id}.{FILE_KINDS[index % len(FILE_KINDS)].suffix}"
            clips.append(
                Clip(clip_id, path, (style,), ARTIST_SPLITS[artist], f"{style} artist {artist}")
            )
    missing = [clip for clip in clips if not clip.path.exists()]
    # None: no bar where the output is not a terminal.
    hidden = True if os.environ.get("TQDM_DISABLE") or not missing else None
    for clip in tqdm(missing, desc="render synthetic music", unit="clip", disable=hidden):
        style, number = clip.clip_id.split(".")
        _write_clip(clip.path, style, seed, int(number), seconds)
    return make_dataset(
        Dataset(
            name="synthetic",
            root=root,
            protocol=f"synthetic seed {seed}",
            task="single_label",
            label_names=tuple(sorted(STYLES)),
            clips=tuple(clips),
            synthetic=True,
        )
    )


def _claim(root: Path, seed: int, clips_per_style: int, seconds: float) -> None:
    """Records the parameters in `root`, or raises if the folder belongs to something else."""
    record = root / RECORD_NAME
    wanted = {"renderer": RENDERER_VERSION, "seed": seed, "seconds": seconds}
    clips_there = 0
    if record.exists():
        found = read_json(record, "record of the synthetic data set")
        if not isinstance(found, dict) or not isinstance(found.get("clips_per_style"), int):
            raise UserError(
                f"{record}: not a record of the synthetic data set. Choose another root."
            )
        for name, value in wanted.items():
            if found.get(name) != value:
                raise UserError(
                    f"{root}: was rendered with {name} {found.get(name)}, not {value}. Choose another "
                    "root for the new clips, or delete this one."
                )
        clips_there = found["clips_per_style"]
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(
            f"{root}: is not an empty folder and holds no {RECORD_NAME}. Choose another root for the "
            "synthetic data set; nothing was changed."
        )
    if clips_per_style > clips_there:
        write_json(record, {**wanted, "clips_per_style": clips_per_style})


def _write_clip(path: Path, style: str, seed: int, index: int, seconds: float) -> None:
    """Renders a clip to a file of the kind that its index stands for."""
    kind = FILE_KINDS[index % len(FILE_KINDS)]
    samples = render_clip(style, seed, seconds, kind.sample_rate, index)
    if kind.channels == 2:
        # Off centre by up to a third. The mean of the channels is the mono signal, somewhat softer.
        pan = float(_generator(style, seed, "pan", index).uniform(-1 / 3, 1 / 3))
        samples = np.stack([samples * (1 + pan), samples * (1 - pan)], axis=1) / (1 + abs(pan))
    with (
        replacing(path) as temporary,
        soundfile.SoundFile(
            temporary, "w", kind.sample_rate, kind.channels, kind.subtype, format=kind.format
        ) as out,
    ):
        # libsndfile's Vorbis encoder keeps a whole write on the stack, which a long clip overflows.
        for begin in range(0, len(samples), kind.sample_rate):
            out.write(samples[begin : begin + kind.sample_rate])


def _style(name: str) -> Style:
    if name not in STYLES:
        raise UserError(f"No synthetic style {name!r}.{did_you_mean(name, STYLES)}")
    return STYLES[name]


def _generator(style: str, seed: int, purpose: str, number: int) -> np.random.Generator:
    """Returns a generator of its own for every purpose, so that no draw depends on what was drawn elsewhere."""
    if seed < 0 or number < 0:
        raise UserError(
            f"The seed and the clip's index must not be negative; they are {seed} and {number}."
        )
    return np.random.default_rng(
        [seed, zlib.crc32(style.encode()), zlib.crc32(purpose.encode()), number]
    )


class _Note(NamedTuple):
    """A note: start in seconds from the clip's beginning, instrument, MIDI pitch, length in seconds, linear gain."""

    time: float
    timbre: str
    pitch: float
    seconds: float
    gain: float


class _Hit(NamedTuple):
    """A stroke of a drum: start in seconds from the clip's beginning, which drum, linear gain."""

    time: float
    drum: str
    gain: float


def _compose(
    style: Style, parameters: Parameters, seconds: float, generator: np.random.Generator
) -> tuple[list[_Note], list[_Hit]]:
    """Writes the score: bars of patterns from before the clip's beginning to its end."""
    beat = 60 / parameters.tempo
    step = beat / style.steps_per_beat
    steps = len(style.kick)
    bar_seconds = steps * step
    # Swing stretches the first half of a beat and shrinks the second.
    beats = np.arange(steps) / style.steps_per_beat
    onsets = (np.floor(beats) + np.interp(beats % 1, (0, 0.5, 1), (0, 0.5 + style.swing, 1))) * beat
    drum_gain, bass_gain, chord_gain, lead_gain = 10 ** (np.asarray(parameters.levels) / 20)
    bass, chords, lead = parameters.timbres
    progression = style.progressions[parameters.progression]

    def pitch(degree: int) -> int:
        octave, place = divmod(degree, len(style.scale))
        return parameters.tonic + 12 * octave + style.scale[place]

    def fold(note: int, low: int) -> float:
        return low + (note - low) % 12 + parameters.detune

    notes: list[_Note] = []
    hits: list[_Hit] = []
    melody = 3
    for bar in range(math.ceil(seconds / bar_seconds) + 1):
        begin = bar * bar_seconds - parameters.start * beat
        root = progression[bar % len(progression)]
        for drum, pattern in (("kick", style.kick), ("snare", style.snare), ("hat", style.hat)):
            hits += [
                _Hit(begin + onsets[place], drum, drum_gain * velocity)
                for place, velocity in _strokes(pattern, generator)
            ]
        for place, velocity in _strokes(style.bass.pattern, generator):
            if generator.uniform() < style.walking:
                degree = root + int(generator.integers(-2, 3))
            else:
                degree = root + int(generator.choice((0, 0, 0, style.chord_tones[-1])))
            notes.append(
                _Note(
                    begin + onsets[place],
                    bass,
                    fold(pitch(degree), style.bass.low),
                    style.bass.gate * step,
                    0.5 * bass_gain * velocity,
                )
            )
        for place, velocity in _strokes(style.chords.pattern, generator):
            notes += [
                _Note(
                    begin + onsets[place],
                    chords,
                    fold(pitch(root + tone), style.chords.low),
                    style.chords.gate * step,
                    0.2 * chord_gain * velocity,
                )
                for tone in style.chord_tones
            ]
        for place, velocity in _strokes(style.lead.pattern, generator):
            melody = min(max(melody + int(generator.integers(-2, 3)), 0), 8)
            octave, degree = divmod(melody, len(style.scale))
            notes.append(
                _Note(
                    begin + onsets[place],
                    lead,
                    fold(pitch(degree), style.lead.low) + 12 * octave,
                    style.lead.gate * step,
                    0.3 * lead_gain * velocity,
                )
            )
    return (
        [note for note in notes if note.time < seconds],
        [hit for hit in hits if hit.time < seconds],
    )


def _strokes(pattern: str, generator: np.random.Generator) -> list[tuple[int, float]]:
    """Returns the steps of a bar at which something sounds, with their velocities."""
    chance, loud = generator.uniform(size=(2, len(pattern)))
    strokes = []
    for place, mark in enumerate(pattern):
        if mark != "." and (mark != "o" or chance[place] < 0.5):
            strokes.append((place, (1.0 if mark == "X" else 0.6) * (0.8 + 0.2 * loud[place])))
    return strokes


def _note(
    timbre: Timbre,
    pitch: float,
    seconds: float,
    softness: float,
    sample_rate: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Returns the sound of one note, float32 `[samples]`.

    Harmonic h is the h-th power of one damped rotation, so that a single exponential and a polynomial make them all.
    """
    frequency = 440 * 2 ** ((pitch - 69) / 12)
    time = np.arange(round((seconds + timbre.release) * sample_rate)) / sample_rate
    phase = 2 * np.pi * frequency * time
    if timbre.vibrato:
        phase += frequency * timbre.vibrato * np.log(2) / 12 / 5.5 * np.sin(2 * np.pi * 5.5 * time)
    if timbre.fm_index:
        phase += timbre.fm_index * np.exp(-time / 0.25) * np.sin(timbre.fm_ratio * phase)
    rotation = np.exp(1j * phase - timbre.damping * time).astype(np.complex64)
    # Those above the Nyquist frequency would fold back.
    audible = max(1, min(len(timbre.harmonics), int(0.45 * sample_rate / frequency)))
    weights = [
        amplitude * (rank + 1) ** -softness
        for rank, amplitude in enumerate(timbre.harmonics[:audible])
    ]
    wave = np.full_like(rotation, weights[-1])
    for weight in reversed([0.0, *weights[:-1]]):
        wave *= rotation
        wave += np.float32(weight)
    sound = wave.imag / np.float32(np.sqrt(np.square(weights).sum()))
    if timbre.breath:
        sound = sound + np.float32(timbre.breath) * generator.standard_normal(len(time), np.float32)
    envelope = np.minimum(time / timbre.attack, 1.0) * np.clip(
        (time[-1] - time) / timbre.release, 0.0, 1.0
    )
    return sound * envelope.astype(np.float32)


def _drum(
    name: str, parameters: Parameters, sample_rate: int, generator: np.random.Generator
) -> np.ndarray:
    """Returns one stroke of a drum, float64 `[samples]`; the kit is tuned with the instruments."""
    import scipy.signal  # takes half a second to load

    time = np.arange(round(0.3 * sample_rate)) / sample_rate
    pitch = 2 ** (parameters.detune / 2)
    if name == "kick":
        # The pitch falls from 170 to 50 Hz.
        return (
            0.9
            * np.sin(2 * np.pi * pitch * (50 * time - 120 * 0.03 * np.exp(-time / 0.03)))
            * np.exp(-time / 0.09)
        )
    low, high, decay, level = (
        (900.0, 6000.0, 0.06, 0.8) if name == "snare" else (5500.0, 10000.0, 0.03, 0.5)
    )
    band = scipy.signal.butter(
        2, (low, min(high, 0.45 * sample_rate)), "bandpass", fs=sample_rate, output="sos"
    )
    sound = (
        level
        * scipy.signal.sosfilt(band, generator.standard_normal(len(time)))
        * np.exp(-time / decay)
    )
    if name == "snare":
        sound += 0.4 * np.sin(2 * np.pi * 190 * pitch * time) * np.exp(-time / 0.05)
    return sound


def _add(mix: np.ndarray, sound: np.ndarray, time: float, gain: float, sample_rate: int) -> None:
    """Adds `sound` to `mix` in place, cut where it begins before the mix or ends after it."""
    begin = round(time * sample_rate)
    first, last = max(begin, 0), min(begin + len(sound), len(mix))
    if first < last:
        mix[first:last] += np.float32(gain) * sound[first - begin : last - begin]


def _record(
    mix: np.ndarray, parameters: Parameters, sample_rate: int, generator: np.random.Generator
) -> np.ndarray:
    """Puts the mix into the artist's room and onto the artist's tape: echo, spectral tilt, cutoff and noise."""
    import scipy.fft

    echo_time = np.arange(1, round(parameters.reverb * sample_rate), dtype=np.float32) / np.float32(
        sample_rate
    )
    echo = generator.standard_normal(len(echo_time), np.float32) * np.exp(
        echo_time * (math.log(1e-3) / parameters.reverb)
    )
    room = np.concatenate(
        [[1 - parameters.wet], parameters.wet * echo / np.linalg.norm(echo)]
    ).astype(np.float32)
    length = int(scipy.fft.next_fast_len(len(mix) + len(room), real=True))
    frequency = np.maximum(scipy.fft.rfftfreq(length, 1 / sample_rate), 30.0)
    # Tilts turn about 1 kHz.
    tape = (frequency / 1000) ** (parameters.tilt / (20 * math.log10(2))) / (
        1 + (frequency / parameters.cutoff) ** 4
    )
    spectrum = scipy.fft.rfft(mix, length) * scipy.fft.rfft(room, length) * tape.astype(np.float32)
    wet = scipy.fft.irfft(spectrum, length)[: len(mix)]
    level = np.sqrt(np.mean(wet**2)) * np.float32(10 ** (parameters.noise / 20))
    return wet + level * generator.standard_normal(len(mix), np.float32)
