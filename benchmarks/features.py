r"""Features: ours against librosa's on 30 s clips, and preparing a store against the sum of its parts.

    python -m benchmarks.features                       # all of it, about eight minutes on free cores
    python -m benchmarks.features --clips=0             # the front end alone
    python -m benchmarks.features --rounds=0            # preparing alone
    python -m benchmarks.features --tiny                # a dry run of seconds

Both sides run in one thread and take turns. A ratio is of processor time, of which other work on the machine takes nothing
away, though it makes caches cold; the ratio of the clock's time stands beside it. Bars: log-mels within 1e-4 dB of librosa's at
twice its speed; preparing at 0.9 or more of the rate of its parts (decode, resample, mel, write), each measured alone over the
same clips; 1.9 times as fast on two processes, for which two cores must be free: how much of them is free is printed, too. The
processes prepare as many clips as GTZAN has; files are used more than once.

What preparing does besides is the SHA-256 of each source, by which audits find copies, that of each shard, and the manifest. The
first costs as much as the processor's SHA instructions take for the file: with and without it as a part, both are printed.
"""

import argparse
import dataclasses
import functools
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import soundfile
from threadpoolctl import threadpool_limits

from benchmarks._timing import Timing, alternate, machine, ratio
from musicgenre.audio.decode import load_audio
from musicgenre.audio.features import FeatureSpec, compute_features
from musicgenre.audio.layout import ClipLayout
from musicgenre.audio.resample import resample
from musicgenre.datasets.base import Clip, Dataset
from musicgenre.datasets.synthetic import STYLES, render_clip
from musicgenre.files import sha256
from musicgenre.store.prepare import CLIPS_PER_SHARD, prepare_store

ERROR_BAR, SPEED_BAR, PARTS_BAR, PROCESSES_BAR = 1e-4, 2.0, 0.9, 1.9
REAL_CLIPS = Path(__file__).resolve().parents[2] / "shared" / "data" / "gtzan_audio"
# Keeps a core busy for so many seconds and says what share of it there was.
_SPIN = "import sys,time\nend=time.time()+float(sys.argv[1])\nwhile time.time()<end: pass\nprint(time.process_time())"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of sound file: its ending, rate in Hz and channels."""

    ending: str
    rate: int
    channels: int

    def __str__(self) -> str:
        return f"{self.ending}, {self.rate} Hz, {self.channels} ch"


KINDS = (Kind("wav", 22_050, 1), Kind("mp3", 44_100, 2))


def in_turns(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int, units: int = 1
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Times functions in turns, as `alternate` does; returns the clock's time and this process's processor time of each."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}

    def timed(name: str) -> None:
        start = time.process_time()
        contestants[name]()
        seconds[name].append((time.process_time() - start) / units)

    clock = alternate(
        {name: functools.partial(timed, name) for name in contestants}, rounds=rounds, units=units
    )
    return clock, {name: Timing(name, tuple(values[-rounds:])) for name, values in seconds.items()}


def librosa_features(samples: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns what a user of librosa computes of the kinds "logmel", "mfcc" and "stft" re the maximum, `[frames, bands]`."""
    transform: dict[str, Any] = {"y": samples, "n_fft": spec.n_fft, "hop_length": spec.hop_length}
    if spec.kind == "stft":
        power = np.abs(librosa.stft(**transform)) ** 2
    else:
        power = librosa.feature.melspectrogram(**transform, sr=spec.sample_rate, n_mels=spec.n_mels)
    db: np.ndarray = librosa.power_to_db(power, ref=np.max, top_db=spec.top_db)
    if spec.kind == "mfcc":
        db = librosa.feature.mfcc(S=db, n_mfcc=spec.n_mfcc)
    return db.T


def made_up_clips(seconds: float, rate: int) -> dict[str, np.ndarray]:
    """Returns clips by name: rendered music, noise, a tone that dies away, and a loud tone over noise 70 dB below."""
    t = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal(len(t))
    tone = np.sin(2 * np.pi * 440 * t)
    return {
        "made-up music": render_clip(next(iter(STYLES)), seed=0, seconds=seconds, sample_rate=rate),
        "noise": (0.1 * noise).astype(np.float32),
        "dying tone": (0.9 * tone * np.exp(-t)).astype(np.float32),
        "tone over noise": (0.9 * tone + 3e-4 * noise).astype(np.float32),
    }


def compare(
    clips: Mapping[str, np.ndarray], spec: FeatureSpec, rounds: int
) -> tuple[list[str], float, float]:
    """Measures both sides on each clip, one thread each.

    Returns:
      A line for each clip, the median over the clips of librosa's processor time over ours, and the largest difference.
    """
    lines, ratios, errors = [], [], []
    with threadpool_limits(1):
        for name, samples in clips.items():
            contestants: dict[str, Callable[[], np.ndarray]] = {
                "librosa": functools.partial(librosa_features, samples, spec),
                "ours": functools.partial(compute_features, samples, spec),
            }
            errors.append(float(np.abs(contestants["ours"]() - contestants["librosa"]()).max()))
            clock, processor = in_turns(contestants, rounds=rounds)
            ours = ratio(processor["librosa"], processor["ours"])
            ratios.append(ours.median)
            by_the_clock = ratio(clock["librosa"], clock["ours"]).median
            lines.append(
                f"  {name:<20} librosa {1e3 * processor['librosa'].median:7.2f} ms, ours "
                f"{1e3 * processor['ours'].median:7.2f} ms: {ours.median:.2f} times as fast (quartiles {ours.low:.2f} to "
                f"{ours.high:.2f}; by the clock {by_the_clock:.2f}), largest difference {errors[-1]:.1e}"
            )
    return lines, float(np.median(ratios)), max(errors)


def write_clips(folder: Path, kind: Kind, count: int, seconds: float) -> Dataset:
    """Writes made-up clips in all styles, some of them several times, and returns them as a data set of one split."""
    folder.mkdir(parents=True)
    styles = list(STYLES)[:4]
    for number, style in enumerate(styles):
        mono = render_clip(style, seed=0, seconds=seconds, sample_rate=kind.rate)
        sides = [mono, np.roll(mono, 441)][: kind.channels]
        soundfile.write(folder / f"{number:05d}.{kind.ending}", np.stack(sides, axis=1), kind.rate)
    for number in range(len(styles), count):
        shutil.copy(
            folder / f"{number % len(styles):05d}.{kind.ending}",
            folder / f"{number:05d}.{kind.ending}",
        )
    clips = tuple(
        Clip(
            f"{number:05d}",
            folder / f"{number:05d}.{kind.ending}",
            (styles[number % len(styles)],),
            "train",
        )
        for number in range(count)
    )
    return Dataset("made up", folder, "made up", "single_label", tuple(sorted(styles)), clips)


class Preparing:
    """The clips of a data set prepared as a whole, and step by step.

    Args:
      dataset: the clips, all of one length.
      rate: of the files, Hz.
      seconds: of a clip.
      folder: for stores, each of which is removed again.
    """

    def __init__(self, dataset: Dataset, rate: int, seconds: float, folder: Path) -> None:
        self.dataset, self.rate, self.folder = dataset, rate, folder
        self.spec = FeatureSpec()
        self.layout = ClipLayout(self.spec.frames(seconds))
        self.decoded = [load_audio(clip.path, rate).samples for clip in dataset.clips[:4]]
        self.resampled = [
            resample(samples, rate, self.spec.sample_rate) for samples in self.decoded
        ]
        self.rows = [self._row(samples) for samples in self.resampled]

    def parts(self) -> dict[str, Callable[[], None]]:
        """Returns functions that take each one step with all clips; the steps in between are not part of their time."""
        count = len(self.dataset.clips)

        def decode() -> None:
            for clip in self.dataset.clips:
                load_audio(clip.path, self.rate)

        def resampling() -> None:
            for number in range(count):
                resample(self.decoded[number % 4], self.rate, self.spec.sample_rate)

        def mel() -> None:
            for number in range(count):
                self._row(self.resampled[number % 4])

        def write() -> None:
            for first in range(0, count, CLIPS_PER_SHARD):
                rows = np.stack(
                    [
                        self.rows[number % 4]
                        for number in range(first, min(first + CLIPS_PER_SHARD, count))
                    ]
                )
                np.save(self.folder / "rows.npy", rows, allow_pickle=False)

        def hashing() -> None:
            for clip in self.dataset.clips:
                sha256(clip.path)

        resampling_steps = {"resample": resampling} if self.rate != self.spec.sample_rate else {}
        return {"decode": decode} | resampling_steps | {"mel": mel, "write": write, "hash": hashing}

    def prepare(self, workers: int, clips: int = 0) -> None:
        """Prepares a fresh store of so many clips, which may be more than there are files, or of all."""
        files = self.dataset.clips
        numbers = range(clips or len(files))
        chosen = tuple(
            dataclasses.replace(files[number % len(files)], clip_id=f"{number:05d}")
            for number in numbers
        )
        dataset = dataclasses.replace(self.dataset, clips=chosen)
        store = self.folder / "store"
        prepare_store(dataset, self.spec, self.layout, store, workers=workers, progress=False)
        shutil.rmtree(store)

    def _row(self, samples: np.ndarray) -> np.ndarray:
        row: np.ndarray = self.layout.fit(compute_features(samples, self.spec))[0].astype(
            np.float16
        )
        return row


def free_cores(processes: int, seconds: float = 1.0) -> float:
    """Returns how many cores that many busy processes get at this moment."""
    spinning = [
        subprocess.Popen(
            [sys.executable, "-c", _SPIN, str(seconds)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(processes)
    ]
    return sum(float(process.communicate()[0]) for process in spinning) / seconds


def report_front_end(real: Path, rounds: int, seconds: float) -> None:
    """Prints the front end against librosa."""
    made_up = made_up_clips(seconds, FeatureSpec().sample_rate)
    files = sorted(real.glob("*/*.au"))
    for kind in ("logmel", "mfcc", "stft"):
        spec = FeatureSpec(kind=kind)
        print(f"\n{spec.describe()}: one clip of {seconds:g} s, {rounds} rounds")
        clips = made_up | {file.stem: load_audio(file, spec.sample_rate).samples for file in files}
        lines, speed, error = compare(clips, spec, rounds)
        print("\n".join(lines))
        print(f"  median over the clips: {speed:.2f} times as fast; largest difference {error:.1e}")
        if kind == "logmel":
            fast, equal = (
                "met" if met else "NOT met" for met in (speed >= SPEED_BAR, error <= ERROR_BAR)
            )
            print(
                f"  bars: at least {SPEED_BAR:g} times, {fast}; at most {ERROR_BAR:g} dB, {equal}"
            )


def report_parts(kind: Kind, preparing: Preparing, rounds: int) -> None:
    """Prints preparing in one process against the sum of its parts."""
    count = len(preparing.dataset.clips)
    parts = preparing.parts()
    with threadpool_limits(1):
        clock, processor = in_turns(
            parts | {"prepare": functools.partial(preparing.prepare, 1)}, rounds=rounds, units=count
        )
    print(f"\nprepare, {kind}: one process, {count} clips, {rounds} rounds; processor time a clip")
    for timing in processor.values():
        print(timing.line())
    without = [part for part in parts if part != "hash"]
    for name, timings in (("processor time", processor), ("clock", clock)):
        bar = PARTS_BAR if name == "processor time" else None
        for what, steps in (
            ("the parts", without),
            ("the parts and the sources' checksums", list(parts)),
        ):
            total = Timing(
                what, tuple(np.sum([timings[step].seconds for step in steps], axis=0).tolist())
            )
            print(
                ratio(total, timings["prepare"]).line(
                    f"rate over that of {what}, {name}", at_least=bar
                )
            )


def report_processes(kind: Kind, preparing: Preparing, clips: int, rounds: int) -> None:
    """Prints preparing in two processes against one, with and without what it takes to start them."""
    half = clips // 2
    print(f"\nprepare, {kind}: two processes against one, by the clock, {rounds} rounds")
    print(f"  before, two busy loops get {free_cores(2):.2f} cores")
    clock = alternate(
        {
            f"{workers} x {count}": functools.partial(preparing.prepare, workers, count)
            for workers in (1, 2)
            for count in (half, clips)
        },
        rounds=rounds,
        warmup=0,
    )
    one, two = (
        Timing(
            "",
            tuple(
                np.subtract(
                    clock[f"{workers} x {clips}"].seconds, clock[f"{workers} x {half}"].seconds
                ).tolist()
            ),
        )
        for workers in (1, 2)
    )
    start = 2 * clock[f"2 x {half}"].median - clock[f"2 x {clips}"].median
    print(
        ratio(one, two).line(
            f"the second {clips - half} clips alone, without the start", at_least=PROCESSES_BAR
        )
    )
    print(
        ratio(clock[f"1 x {clips}"], clock[f"2 x {clips}"]).line(
            f"{clips} clips with the start", at_least=PROCESSES_BAR
        )
    )
    print(
        f"  one process takes {1e3 * one.median / (clips - half):.2f} ms a clip; starting two took {start:.2f} s"
    )
    print(f"  afterwards, two busy loops get {free_cores(2):.2f} cores")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--real",
        type=Path,
        default=REAL_CLIPS,
        help="folder with GTZAN's folders of .au files; may be missing",
    )
    parser.add_argument(
        "--rounds", type=int, default=21, help="of the front end, 0 for none (default: %(default)s)"
    )
    parser.add_argument(
        "--clips",
        type=int,
        default=256,
        help="to prepare, at least 8; 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--process_clips",
        type=int,
        default=1000,
        help="for two processes, 0 for none (default: %(default)s)",
    )
    parser.add_argument("--prepare_rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="of a made-up clip (default: %(default)s)"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a dry run of seconds: its figures mean nothing"
    )
    given = parser.parse_args(arguments)
    rounds, clips, prepare_rounds, seconds = (
        given.rounds,
        given.clips,
        given.prepare_rounds,
        given.seconds,
    )
    if given.tiny:
        rounds, clips, prepare_rounds, seconds, given.process_clips = (
            min(rounds, 1),
            min(clips, 8),
            1,
            2.0,
            12,
        )
    print(machine(("librosa", "numpy", "scipy", "soundfile", "soxr")))
    if rounds:
        report_front_end(given.real, rounds, seconds)
    for kind in KINDS if clips else ():
        with tempfile.TemporaryDirectory(prefix="musicgenre-features-") as temporary:
            folder = Path(temporary)
            preparing = Preparing(
                write_clips(folder / "clips", kind, clips, seconds), kind.rate, seconds, folder
            )
            report_parts(kind, preparing, prepare_rounds)
            if given.process_clips:
                report_processes(kind, preparing, given.process_clips, prepare_rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
