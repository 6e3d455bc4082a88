r"""`musicgenre tag` on a folder: files a second, the real-time factor, what bounds them, and memory.

    python -m benchmarks.tag                            # 100 clips of 30 s, then one of 10 minutes and one of 3 hours
    python -m benchmarks.tag --model=runs/mine --files=20 --long=600,3600
    python -m benchmarks.tag --tiny                     # a dry run of seconds

Tagging takes turns with its two halves over the same files: the network alone on inputs that lie ready, and decoding with the
features alone, in one thread. Half the clips are wav (22,050 Hz, mono), half mp3 (44,100 Hz, stereo), all made up. Then the
command itself: one process for all files against one for each, of which a few are run and the rest extrapolated. Memory is the
most that a process of its own has held when it has tagged one long file.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile

from benchmarks._timing import Timing, alternate, machine, ratio
from musicgenre.audio.decode import stream_audio
from musicgenre.datasets.synthetic import STYLES, render_clip
from musicgenre.inference.windows import BATCH, Network, score_files, stream_windows
from musicgenre.runs.model import TrainedModel, load_model

# One call of musicnn's `extractor` on a 30 s clip, seconds: as noted when the reference scores of its published models were
# computed (TensorFlow 2.15, two cores). It is not run here: it needs a TensorFlow of its own.
MUSICNN_CALL = (2.5, 7.0)
_COMMAND = "import sys; from musicgenre.cli.main import main; sys.exit(main())"


def write_clips(folder: Path, count: int, seconds: float) -> list[Path]:
    """Writes made-up clips, wav and mp3 in turns, and returns their paths."""
    styles = list(STYLES)
    mono = [
        render_clip(styles[number % len(styles)], seed=0, seconds=seconds, index=number)
        for number in range(min(count, 4))
    ]
    stereo = [
        np.stack([samples.repeat(2), np.roll(samples, 220).repeat(2)], axis=1) for samples in mono
    ]
    paths = []
    for number in range(count):
        if number % 2:
            paths.append(folder / f"{number:04d}.mp3")
            soundfile.write(paths[-1], stereo[number // 2 % len(mono)], 44_100)
        else:
            paths.append(folder / f"{number:04d}.wav")
            soundfile.write(paths[-1], mono[number // 2 % len(mono)], 22_050)
    return paths


def contestants(model: TrainedModel, paths: Sequence[Path]) -> dict[str, Callable[[], None]]:
    """Returns functions that tag all files, run the network on their windows, or make these windows."""
    network = Network(model)
    spec = model.features

    def windows(path: Path) -> list[np.ndarray]:
        blocks = stream_audio(path, spec.sample_rate, resampler=spec.resampler)
        return [window.inputs for window in stream_windows(blocks, spec, model)]

    ready = [np.stack(windows(path)) for path in paths]

    def tag() -> None:
        for scores in score_files(model, paths, network=network):
            assert not scores.error, scores.error

    def network_alone() -> None:
        for inputs in ready:
            for first in range(0, len(inputs), BATCH):
                network(inputs[first : first + BATCH])

    def features_alone() -> None:
        for path in paths:
            windows(path)

    return {"tag": tag, "network alone": network_alone, "decode + features alone": features_alone}


def report_folder(
    model: TrainedModel, paths: Sequence[Path], seconds: float, rounds: int
) -> Timing:
    """Prints files a second and the real-time factor; returns the time of a file."""
    clock = alternate(contestants(model, paths), rounds=rounds, units=len(paths))
    print(
        f"\ntag, {len(paths)} clips of {seconds:g} s (half wav, half mp3), {rounds} rounds, by the clock; a file:"
    )
    for timing in clock.values():
        print(
            f"{timing.line()}   {1 / timing.median:7.1f} files/s, {seconds / timing.median:7.0f} times real time"
        )
    print(ratio(clock["tag"], clock["network alone"]).line("tag over the network alone"))
    print(
        ratio(clock["tag"], clock["decode + features alone"]).line(
            "tag over decode + features alone"
        )
    )
    halves = np.add(clock["network alone"].seconds, clock["decode + features alone"].seconds)
    print(
        ratio(clock["tag"], Timing("sum", tuple(halves.tolist()))).line(
            "tag over their sum (below 1: they overlap)"
        )
    )
    return clock["tag"]


def run_command(model: str, paths: Sequence[Path | str]) -> float:
    """Runs `musicgenre tag` in a process of its own and returns the seconds that it took."""
    start = time.perf_counter()
    command = [
        sys.executable,
        "-c",
        _COMMAND,
        "tag",
        f"--model={model}",
        "--format=csv",
        *map(str, paths),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def report_processes(model: str, paths: Sequence[Path], single: int) -> None:
    """Prints one process for all files against one for each."""
    together = run_command(model, paths)
    alone = [run_command(model, [path]) for path in paths[:single]]
    count, each = len(paths), float(np.median(alone))
    low, high = MUSICNN_CALL
    print(f"\nthe command `musicgenre tag`, {count} files:")
    print(f"  one process: {together:.1f} s, {count / together:.1f} files/s with its start")
    print(
        f"  a process for each: {each:.2f} s a file (median of {len(alone)}, {min(alone):.2f} to {max(alone):.2f}), so "
        f"{count * each:.0f} s for {count} (extrapolated): {count * each / together:.1f} times as long"
    )
    print(
        f"  the original musicnn, not run here: {low:g} to {high:g} s a call on a 30 s clip as noted with its reference scores "
        f"(two cores), so {low * count / together:.0f} to {high * count / together:.0f} times as long"
    )


def write_long(path: Path, seconds: float, rate: int = 22_050) -> Path:
    """Writes a wav of noise of any length, a minute at a time."""
    generator = np.random.default_rng(0)
    minute = (0.1 * generator.standard_normal(60 * rate)).astype(np.float32)
    with soundfile.SoundFile(path, "w", rate, 1) as file:
        left = int(seconds * rate)
        while left > 0:
            file.write(np.roll(minute, int(generator.integers(rate)))[:left])
            left -= len(minute)
    return path


def tag_long(model: str, path: Path) -> dict[str, float]:
    """Tags one file; returns the seconds it took, and the megabytes that this process has held at most, before and after."""
    trained = load_model(model)
    network = Network(trained)
    # What compiling takes belongs to no file.
    compiled = np.zeros((BATCH, trained.frames, trained.features.bands), np.float16)
    network(compiled)
    network(compiled[:1])
    before, start = peak_mb(), time.perf_counter()
    (scores,) = score_files(trained, [path], network=network)
    assert not scores.error, scores.error
    return {"seconds": time.perf_counter() - start, "before_MB": before, "after_MB": peak_mb()}


def peak_mb() -> float:
    """Returns the most memory that this process has held, in 10^6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def in_own_process(model: str, path: Path) -> dict[str, float]:
    """Returns `tag_long` of a fresh process, whose memory is its own."""
    command = [sys.executable, "-m", "benchmarks.tag", f"--model={model}", f"--of={path}"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def report_memory(
    model: str,
    lengths: Sequence[float],
    folder: Path,
    measure: Callable[[str, Path], dict[str, float]],
) -> None:
    """Prints memory over the length of a file."""
    print(
        "\nmemory of a process that tags one file: 10^6 bytes at most, before the file and after it"
    )
    peaks = []
    for seconds in lengths:
        path = write_long(folder / "long.wav", seconds)
        found = measure(model, path)
        path.unlink()
        peaks.append(found["after_MB"])
        print(
            f"  {seconds / 60:7.1f} min: {found['before_MB']:.0f}, {found['after_MB']:.0f} ({found['after_MB'] / peaks[0]:.3f} "
            f"times the first row's); {found['seconds']:.2f} s, {seconds / found['seconds']:.0f} times real time"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="gtzan", help="as of `musicgenre tag` (default: %(default)s)"
    )
    parser.add_argument("--files", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="of a file (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument(
        "--single", type=int, default=5, help="processes of one file each (default: %(default)s)"
    )
    parser.add_argument(
        "--long", default="600,10800", help="lengths of the long files, seconds; empty for none"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a dry run of seconds: its figures mean nothing"
    )
    parser.add_argument("--of", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.of:
        print(json.dumps(tag_long(given.model, given.of)))
        return 0
    if given.tiny:
        given.files, given.seconds, given.rounds, given.single, given.long = 4, 2.0, 1, 0, "10,20"
    lengths = [float(seconds) for seconds in given.long.split(",") if seconds]
    model = load_model(given.model)
    print(machine(("jax", "jaxlib", "numpy", "soundfile", "soxr")))
    with tempfile.TemporaryDirectory(prefix="musicgenre-tag-") as temporary:
        folder = Path(temporary)
        paths = write_clips(folder, given.files, given.seconds)
        report_folder(model, paths, given.seconds, given.rounds)
        if given.single:
            report_processes(given.model, paths, given.single)
        if lengths:
            report_memory(given.model, lengths, folder, tag_long if given.tiny else in_own_process)
    return 0


if __name__ == "__main__":
    sys.exit(main())
