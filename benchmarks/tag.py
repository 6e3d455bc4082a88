r"""Speed of `musicgenre tag` on a folder, what limits it, and memory.

    python -m benchmarks.tag              # 100 clips of 30 s, then files of 10 minutes and 3 hours
    python -m benchmarks.tag --model=runs/mine --files=20 --long=600,3600
    python -m benchmarks.tag --tiny       # a dry run of seconds

Tagging alternates with its two halves over the same files: the network alone on inputs in memory,
and decoding with the features alone in one thread. Half of the synthetic clips are wav (22,050 Hz,
mono), half mp3 (44,100 Hz, stereo). Then the command itself: one process for all files against one
process per file, of which a few are run and the rest extrapolated. Memory is the peak of a new
process that tags one long file.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile

from benchmarks._clips import MP3, WAV, write_clips
from benchmarks._timing import (
    TINY,
    alternate,
    flags,
    in_new_process,
    machine,
    memory_mb,
    print_table,
    print_timings,
    ratio,
)
from musicgenre.audio.decode import stream_audio
from musicgenre.inference.windows import BATCH, Network, score_files, stream_windows
from musicgenre.runs.model import TrainedModel, load_model

# One call of musicnn's `extractor` on a 30 s clip, seconds, as noted when the reference scores of
# its published models were computed (TensorFlow 2.15, two cores). It needs an old TensorFlow.
MUSICNN_CALL = (2.5, 7.0)
_COMMAND = "import sys; from musicgenre.cli.main import main; sys.exit(main())"


def contestants(model: TrainedModel, paths: Sequence[Path]) -> dict[str, Callable[[], None]]:
    """Returns functions that tag all files, run the network on their windows, or make these."""
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


def report_folder(model: TrainedModel, paths: Sequence[Path], seconds: float, rounds: int) -> None:
    """Prints files per second and the real-time factor."""
    wall, _ = alternate(contestants(model, paths), rounds=rounds, units=len(paths))
    print(f"\ntag, {len(paths)} clips of {seconds:g} s (half wav, half mp3), rounds: {rounds}")
    print("wall clock per file:")
    print_timings(
        wall,
        **{
            "files per second": lambda median: f"{1 / median:.1f}",
            "times real time": lambda median: f"{seconds / median:.0f}",
        },
    )
    network, features = wall["network alone"], wall["decode + features alone"]
    print(ratio(wall["tag"], network).line("tag over the network alone"))
    print(ratio(wall["tag"], features).line("tag over decode + features alone"))
    both = ratio(wall["tag"], network + features)
    print(both.line("tag over their sum (below 1: they overlap)"))


def run_command(model: str, paths: Sequence[Path | str]) -> float:
    """Runs `musicgenre tag` in a new process and returns the seconds that it took."""
    start = time.perf_counter()
    command = [sys.executable, "-c", _COMMAND, "tag", f"--model={model}", "--format=csv"]
    subprocess.run([*command, *map(str, paths)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def report_processes(model: str, paths: Sequence[Path], single: int) -> None:
    """Prints one process for all files against one process per file."""
    together = run_command(model, paths)
    alone = [run_command(model, [path]) for path in paths[:single]]
    count, each = len(paths), float(np.median(alone))
    low, high = MUSICNN_CALL
    print(f"\nthe command `musicgenre tag`, {count} files:")
    print(f"  one process: {together:.1f} s, {count / together:.1f} files/s including start-up")
    print(
        f"  one process per file: {each:.2f} s per file (median of {len(alone)}, {min(alone):.2f} "
        f"to {max(alone):.2f}), {count * each:.0f} s for {count} (extrapolated): "
        f"{count * each / together:.1f} times as long"
    )
    print(
        f"  the original musicnn (not run; {low:g} to {high:g} s per call): "
        f"{low * count / together:.0f} to {high * count / together:.0f} times as long"
    )


def write_long(path: Path, seconds: float, rate: int = 22_050) -> Path:
    """Writes a wav of noise of any length, minute by minute."""
    generator = np.random.default_rng(0)
    minute = (0.1 * generator.standard_normal(60 * rate)).astype(np.float32)
    with soundfile.SoundFile(path, "w", rate, 1) as file:
        for left in range(int(seconds * rate), 0, -len(minute)):
            file.write(np.roll(minute, int(generator.integers(rate)))[:left])
    return path


def tag_long(model: str, path: Path) -> dict[str, float]:
    """Tags one file; returns its seconds, and this process's peak memory in MB before and after."""
    trained = load_model(model)
    network = Network(trained)
    # Compilation does not count for the file.
    inputs = np.zeros((BATCH, trained.frames, trained.features.bands), np.float16)
    network(inputs)
    network(inputs[:1])
    before, start = memory_mb(), time.perf_counter()
    (scores,) = score_files(trained, [path], network=network)
    assert not scores.error, scores.error
    return {"seconds": time.perf_counter() - start, "before_MB": before, "after_MB": memory_mb()}


def report_memory(model: str, lengths: Sequence[float], folder: Path, new_process: bool) -> None:
    """Prints memory over the length of a file, which a new process tags."""
    print("\npeak memory of a process that tags one file")
    rows, first = [], 0.0
    for seconds in lengths:
        path = write_long(folder / "long.wav", seconds)
        if new_process:
            found = in_new_process("tag", f"--model={model}", f"--of={path}")
        else:
            found = tag_long(model, path)
        path.unlink()
        after = found["after_MB"]
        first = first or after
        row = [f"{seconds / 60:.1f} min", f"{found['before_MB']:.0f}", f"{after:.0f}"]
        speed = [f"{found['seconds']:.2f}", f"{seconds / found['seconds']:.0f}"]
        rows.append([*row, f"{after / first:.3f}", *speed])
    print_table(["", "MB before", "MB after", "over the first", "s", "times real time"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    given = flags(
        __doc__,
        ("model", "gtzan", "the model, as in `musicgenre tag`"),
        ("files", 100, "number of files"),
        ("seconds", 30.0, "length of a file"),
        ("rounds", 5, "rounds per side"),
        ("single", 5, "processes that tag one file each"),
        ("long", "600,10800", "lengths of the long files in seconds; empty for none"),
        ("of", "", None),
        TINY,
    ).parse_args(arguments)
    if given.of:
        print(json.dumps(tag_long(given.model, Path(given.of))))
        return 0
    if given.tiny:
        given.files, given.seconds, given.rounds, given.single, given.long = 4, 2.0, 1, 0, "10,20"
    print(machine(("jax", "jaxlib", "numpy", "soundfile", "soxr")))
    with tempfile.TemporaryDirectory(prefix="musicgenre-tag-") as temporary:
        folder = Path(temporary)
        paths = write_clips(folder, (WAV, MP3), given.files, given.seconds)
        report_folder(load_model(given.model), paths, given.seconds, given.rounds)
        if given.single:
            report_processes(given.model, paths, given.single)
        if lengths := [float(seconds) for seconds in given.long.split(",") if seconds]:
            report_memory(given.model, lengths, folder, new_process=not given.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
