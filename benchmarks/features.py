r"""Features against librosa's on 30 s clips, and preparing a store against the sum of its steps.

    python -m benchmarks.features                  # everything, about eight minutes on idle cores
    python -m benchmarks.features --clips=0        # the front end alone
    python -m benchmarks.features --rounds=0       # preparing alone
    python -m benchmarks.features --tiny           # a dry run of seconds

Both sides run in one thread and alternate. Ratios are of processor time, which hardly depends on
other work on the machine, unless "wall clock" is printed. Targets: log-mels within 1e-4 dB of
librosa's at twice its speed; preparing at 0.9 or more of the rate of its steps (decode, resample,
mel, write), each measured alone over the same clips; two processes 1.9 times as fast as one. That
needs two idle cores: how much of them is idle is printed. The processes prepare as many clips as
GTZAN has, from fewer files.

Besides, preparing computes the SHA-256 of each source, by which audits find copies, and of each
shard, and writes the manifest. The comparison is printed with and without the sources' hashes as a
step. Real clips are added from the folder `gtzan_audio` (one folder of .au files per genre) of the
folder that MUSICGENRE_REAL_DATA names, or from --real.
"""

import dataclasses
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import librosa
import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks._clips import MP3, RENDERED_STYLES, WAV, FileType, write_clips
from benchmarks._timing import (
    TINY,
    alternate,
    flags,
    machine,
    print_table,
    print_timings,
    ratio,
    verdict,
)
from musicgenre.audio.decode import load_audio
from musicgenre.audio.features import FeatureSpec, compute_features
from musicgenre.audio.layout import ClipLayout
from musicgenre.audio.resample import resample
from musicgenre.datasets.base import Clip, Dataset
from musicgenre.datasets.synthetic import render_clip
from musicgenre.files import sha256
from musicgenre.store.prepare import CLIPS_PER_SHARD, prepare_store

MOST_ERROR, LEAST_SPEED, LEAST_OF_STEPS, LEAST_OF_PROCESSES = 1e-4, 2.0, 0.9, 1.9
FILE_TYPES = (WAV, MP3)


def librosa_features(samples: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns "logmel", "mfcc" or "stft" features by librosa, `[frames, bands]`."""
    transform: dict[str, Any] = {"y": samples, "n_fft": spec.n_fft, "hop_length": spec.hop_length}
    if spec.kind == "stft":
        power = np.abs(librosa.stft(**transform)) ** 2
    else:
        power = librosa.feature.melspectrogram(**transform, sr=spec.sample_rate, n_mels=spec.n_mels)
    db: np.ndarray = librosa.power_to_db(power, ref=np.max, top_db=spec.top_db)
    if spec.kind == "mfcc":
        db = librosa.feature.mfcc(S=db, n_mfcc=spec.n_mfcc)
    return db.T


def synthetic_clips(seconds: float, rate: int) -> dict[str, np.ndarray]:
    """Returns music, noise, a decaying tone, and a loud tone with noise 70 dB below it."""
    t = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal(len(t))
    tone = np.sin(2 * np.pi * 440 * t)
    return {
        "synthetic music": render_clip(RENDERED_STYLES[0], 0, seconds, rate),
        "noise": (0.1 * noise).astype(np.float32),
        "decaying tone": (0.9 * tone * np.exp(-t)).astype(np.float32),
        "tone over noise": (0.9 * tone + 3e-4 * noise).astype(np.float32),
    }


def compare(
    clips: Mapping[str, np.ndarray], spec: FeatureSpec, rounds: int
) -> tuple[list[list[str]], float, float]:
    """Measures both sides on each clip in one thread.

    Returns:
      A row of `COMPARISON` per clip, the median over the clips of librosa's time over ours, and the
      largest difference.
    """
    rows, ratios, errors = [], [], []
    with threadpool_limits(1):
        for name, samples in clips.items():
            sides: dict[str, Callable[[], np.ndarray]] = {
                "librosa": functools.partial(librosa_features, samples, spec),
                "ours": functools.partial(compute_features, samples, spec),
            }
            errors.append(float(np.abs(sides["ours"]() - sides["librosa"]()).max()))
            wall, cpu = alternate(sides, rounds=rounds)
            speed = ratio(cpu["librosa"], cpu["ours"])
            ratios.append(speed.median)
            wall_speed = ratio(wall["librosa"], wall["ours"]).median
            times = [f"{1e3 * float(np.median(cpu[side])):.2f}" for side in sides]
            speeds = [f"{speed.median:.2f}", f"{speed.low:.2f} to {speed.high:.2f}"]
            rows.append([name, *times, *speeds, f"{wall_speed:.2f}", f"{errors[-1]:.1e}"])
    return rows, float(np.median(ratios)), max(errors)


COMPARISON = ("", "librosa ms", "ours ms", "ratio", "quartiles", "wall clock", "max difference")


def make_clips(folder: Path, file_type: FileType, count: int, seconds: float) -> Dataset:
    """Writes synthetic clips and returns them as a data set with one split."""
    paths = write_clips(folder, [file_type], count, seconds)
    clips = tuple(
        Clip(path.stem, path, (RENDERED_STYLES[number % len(RENDERED_STYLES)],), "train")
        for number, path in enumerate(paths)
    )
    labels = tuple(sorted(RENDERED_STYLES))
    return Dataset("synthetic", folder, "one split", "single_label", labels, clips)


class Preparing:
    """Prepares the clips of a data set at once and step by step.

    Args:
      dataset: clips of one length.
      rate: of the files, Hz.
      seconds: length of a clip.
      folder: where stores are written and removed again.
    """

    def __init__(self, dataset: Dataset, rate: int, seconds: float, folder: Path) -> None:
        self.dataset, self.rate, self.folder = dataset, rate, folder
        self.spec = FeatureSpec()
        self.layout = ClipLayout(self.spec.frames(seconds))
        self.decoded = [load_audio(clip.path, rate).samples for clip in dataset.clips[:4]]
        target = self.spec.sample_rate
        self.resampled = [resample(samples, rate, target) for samples in self.decoded]
        self.rows = [self._row(samples) for samples in self.resampled]

    def steps(self) -> dict[str, Callable[[], None]]:
        """Returns functions by name; each takes one step of preparing for all clips."""
        count = len(self.dataset.clips)

        def decode() -> None:
            for clip in self.dataset.clips:
                load_audio(clip.path, self.rate)

        def resample_all() -> None:
            for number in range(count):
                resample(self.decoded[number % 4], self.rate, self.spec.sample_rate)

        def mel() -> None:
            for number in range(count):
                self._row(self.resampled[number % 4])

        def write() -> None:
            for first in range(0, count, CLIPS_PER_SHARD):
                numbers = range(first, min(first + CLIPS_PER_SHARD, count))
                rows = np.stack([self.rows[number % 4] for number in numbers])
                np.save(self.folder / "rows.npy", rows, allow_pickle=False)

        def hash_sources() -> None:
            for clip in self.dataset.clips:
                sha256(clip.path)

        resampling = {"resample": resample_all} if self.rate != self.spec.sample_rate else {}
        return {"decode": decode, **resampling, "mel": mel, "write": write, "hash": hash_sources}

    def prepare(self, workers: int, clips: int = 0) -> None:
        """Prepares a new store of `clips` clips (0: all); files are used repeatedly if needed."""
        files = self.dataset.clips
        chosen = tuple(
            dataclasses.replace(files[number % len(files)], clip_id=f"{number:05d}")
            for number in range(clips or len(files))
        )
        dataset = dataclasses.replace(self.dataset, clips=chosen)
        store = self.folder / "store"
        prepare_store(dataset, self.spec, self.layout, store, workers=workers, progress=False)
        shutil.rmtree(store)

    def _row(self, samples: np.ndarray) -> np.ndarray:
        return self.layout.fit(compute_features(samples, self.spec))[0].astype(np.float16)


def report_front_end(real: str, rounds: int, seconds: float) -> None:
    """Prints the front end against librosa."""
    files = sorted(Path(real).glob("*/*.au")) if real else []
    for kind in ("logmel", "mfcc", "stft"):
        spec = FeatureSpec(kind=kind)
        print(f"\n{spec.describe()}: processor time per clip of {seconds:g} s, rounds: {rounds}")
        clips = synthetic_clips(seconds, spec.sample_rate)
        clips |= {file.stem: load_audio(file, spec.sample_rate).samples for file in files}
        rows, speed, error = compare(clips, spec, rounds)
        print_table(COMPARISON, rows)
        print(f"  median over the clips: {speed:.2f} times as fast; largest difference {error:.1e}")
        if kind == "logmel":
            print(
                f"  targets: at least {LEAST_SPEED:g} times, {verdict(speed >= LEAST_SPEED)}; "
                f"at most {MOST_ERROR:g} dB, {verdict(error <= MOST_ERROR)}"
            )


def report_steps(file_type: FileType, preparing: Preparing, rounds: int) -> None:
    """Prints preparing in one process against the sum of its steps."""
    count = len(preparing.dataset.clips)
    steps = preparing.steps()
    functions = steps | {"prepare": functools.partial(preparing.prepare, 1)}
    with threadpool_limits(1):
        wall, cpu = alternate(functions, rounds=rounds, units=count)
    print(f"\nprepare, {file_type}: one process, {count} clips, rounds: {rounds}")
    print("processor time per clip:")
    print_timings(cpu)
    for clock, times in (("processor time", cpu), ("wall clock", wall)):
        target = LEAST_OF_STEPS if times is cpu else None
        total = np.sum([times[step] for step in steps if step != "hash"], axis=0)
        for what, seconds in (("steps", total), ("steps and hashes", total + times["hash"])):
            result = ratio(seconds, times["prepare"])
            print(result.line(f"rate over that of the {what}, {clock}", at_least=target))


def report_processes(file_type: FileType, preparing: Preparing, clips: int, rounds: int) -> None:
    """Prints preparing in two processes against one, with and without their start-up."""
    half = clips // 2
    print(f"\nprepare, {file_type}: two processes against one, wall clock, rounds: {rounds}")
    runs = {
        f"{workers} x {count}": functools.partial(preparing.prepare, workers, count)
        for workers in (1, 2)
        for count in (half, clips)
    }
    wall, _ = alternate(runs, rounds=rounds, warmup=0)
    one, two = (wall[f"{workers} x {clips}"] - wall[f"{workers} x {half}"] for workers in (1, 2))
    for what, result in (
        (f"{clips} clips including start-up", ratio(wall[f"1 x {clips}"], wall[f"2 x {clips}"])),
        (f"{clips - half} further clips alone", ratio(one, two)),
    ):
        print(result.line(what, at_least=LEAST_OF_PROCESSES))
    start = 2 * np.median(wall[f"2 x {half}"]) - np.median(wall[f"2 x {clips}"])
    print(
        f"  one process takes {1e3 * np.median(one) / (clips - half):.2f} ms per clip; "
        f"starting two took {start:.2f} s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    given = flags(
        __doc__,
        ("real", "", "folder of real clips"),
        ("rounds", 21, "rounds of the front end; 0 for none"),
        ("clips", 256, "clips to prepare, at least 8; 0 for none"),
        ("process_clips", 1000, "clips for two processes; 0 for none"),
        ("prepare_rounds", 5, "rounds of preparing"),
        ("seconds", 30.0, "length of a synthetic clip"),
        TINY,
    ).parse_args(arguments)
    if not given.real and (data := os.environ.get("MUSICGENRE_REAL_DATA")):
        given.real = str(Path(data) / "gtzan_audio")
    if given.tiny:
        given.rounds, given.clips, given.process_clips = (
            min(given.rounds, 1),
            min(given.clips, 8),
            12,
        )
        given.prepare_rounds, given.seconds = 1, 2.0
    print(machine(("librosa", "numpy", "scipy", "soundfile", "soxr")))
    if given.rounds:
        report_front_end(given.real, given.rounds, given.seconds)
    for file_type in FILE_TYPES if given.clips else ():
        with tempfile.TemporaryDirectory(prefix="musicgenre-features-") as temporary:
            folder = Path(temporary)
            dataset = make_clips(folder / "clips", file_type, given.clips, given.seconds)
            preparing = Preparing(dataset, file_type.rate, given.seconds, folder)
            report_steps(file_type, preparing, given.prepare_rounds)
            if given.process_clips:
                report_processes(file_type, preparing, given.process_clips, given.prepare_rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
