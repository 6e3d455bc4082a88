r"""How large it may become: bytes, time and cost of a store, and the start of training on one with up to a million clips.

python benchmarks/scale.py --price_core_hour=0.05 --price_gb_month=0.02
python benchmarks/scale.py --entries=1000,10000 --clips=5      # a first look in a minute

Three tables: what a clip costs in each step of preparing, measured here on made-up audio; what follows for GTZAN, MTAT and
a million tracks; and stores of more and more clips. Those are written by the code that prepares any store, but for their
shards, which are sparse files: they have their true size and take no room. Each is planned and opened in a process of its own.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from musicgenre.audio.decode import load_audio
from musicgenre.audio.features import FeatureSpec, compute_features
from musicgenre.audio.layout import ClipLayout
from musicgenre.audio.resample import resample
from musicgenre.datasets.base import Clip, Dataset
from musicgenre.files import sha256, write_text
from musicgenre.store.loader import normalisation, train_batches
from musicgenre.store.prepare import (
    CLIPS_PER_SHARD,
    ClipFeatures,
    Recipe,
    ShardTask,
    StorePlan,
    one_thread,
    write_shard,
)
from musicgenre.store.store import Store

BATCH = 32
# Mean and deviation of every position read all clips to train on: measured for each clip, on stores up to this size.
_STATISTICS_UP_TO = 1_000
LABELS = tuple(f"tag {number:02d}" for number in range(50))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A data set as it is published.

    Attributes:
      name: for the tables.
      clips: how many.
      seconds: of a clip.
      rate: of its files, Hz.
      channels: of its files.
      ending: of its files.
      frames: of a clip in the store, with 128 mel bands and a hop of 1,024 samples at 22,050 Hz.
    """

    name: str
    clips: int
    seconds: float
    rate: int
    channels: int
    ending: str
    frames: int


KINDS = (
    Kind("GTZAN", 1_000, 30.013, 22_050, 1, "wav", 647),
    Kind("MTAT", 25_863, 29.12, 16_000, 1, "mp3", 628),
    Kind("a million tracks", 1_000_000, 30.0, 44_100, 2, "mp3", 647),
)


@dataclasses.dataclass(frozen=True)
class Projection:
    """What a store of a data set takes: bytes of its shards, hours of one core, and money for them, once and a month."""

    shard_bytes: int
    core_hours: float
    price_once: float
    price_month: float


def project(
    kind: Kind, seconds_per_clip: float, bands: int, price_core_hour: float, price_gb_month: float
) -> Projection:
    """Returns what a data set's store takes.

    Args:
      kind: the data set.
      seconds_per_clip: of one core.
      bands: values of a frame, float16.
      price_core_hour: of one core for one hour.
      price_gb_month: of 10^9 bytes for one month.
    """
    # NumPy's header is 128 bytes a shard.
    size = kind.clips * kind.frames * bands * 2 + 128 * -(-kind.clips // CLIPS_PER_SHARD)
    hours = kind.clips * seconds_per_clip / 3600
    return Projection(size, hours, hours * price_core_hour, size / 1e9 * price_gb_month)


def made_up(kind: Kind, path: Path) -> Path:
    """Writes a clip of noise and tones in a data set's format, and returns its path."""
    generator = np.random.default_rng(0)
    t = np.arange(int(kind.seconds * kind.rate)) / kind.rate
    tones = np.sin(2 * np.pi * np.array([110.0, 220.0, 331.0, 554.0, 1660.0])[:, None] * t).sum(
        axis=0
    )
    samples = 0.1 * tones[:, None] + 0.05 * generator.standard_normal((len(t), kind.channels))
    soundfile.write(path, samples, kind.rate)
    return path


def measure_clip(kind: Kind, spec: FeatureSpec, clips: int, folder: Path) -> dict[str, list[float]]:
    """Returns the processor's seconds for each step of preparing a clip, `clips` values of each, in this process, on one core.

    They are what core-hours are made of: waiting for the disk, or for a core that others use, is not in them.
    """
    path = made_up(kind, folder / f"clip.{kind.ending}")
    layout = ClipLayout(kind.frames)
    recipe = Recipe(spec, layout)
    clip = Clip("clip", path, ("tag",), "train")
    seconds: dict[str, list[float]] = {}

    def timed(step: str, function: Callable[[], Any], share: int = 1) -> Any:
        start = time.process_time()
        result = function()
        seconds.setdefault(step, []).append((time.process_time() - start) / share)
        return result

    task = ShardTask(0, (clip,) * CLIPS_PER_SHARD, (["", 0, 0, None],) * CLIPS_PER_SHARD)
    with one_thread():
        recipe(clip)  # the first clip also makes the filters
        for _ in range(clips):
            digest = timed("hash", functools.partial(sha256, path))
            samples = timed("decode", functools.partial(load_audio, path, kind.rate)).samples
            samples = timed(
                "resample", functools.partial(resample, samples, kind.rate, spec.sample_rate)
            )
            features = timed(
                "mel", functools.partial(compute_features, layout.cut(samples, spec), spec)
            )
            fitted = layout.fit(features)[0].astype(np.float16)
            made = [ClipFeatures(fitted, kind.frames, digest)] * CLIPS_PER_SHARD
            writing = functools.partial(
                write_shard, folder / "shards", task, made, recipe.made_with
            )
            timed("write", writing, CLIPS_PER_SHARD)
            timed("process_clip", functools.partial(recipe, clip))
    return seconds


def made_up_dataset(entries: int) -> Dataset:
    """Returns a data set of clips whose files are nowhere: eight of ten to train on, three tags each, ten by an artist."""
    splits = ("train",) * 8 + ("valid", "test")
    clips = tuple(
        Clip(
            f"{i:07d}",
            Path(f"/music/{i % 1000:03d}/{i:07d}.mp3"),
            (LABELS[i % 50], LABELS[(i + 7) % 50], LABELS[(i + 20) % 50]),
            splits[i % 10],
            f"artist {i // 10}",
        )
        for i in range(entries)
    )
    return Dataset("made up", Path("/music"), "made up", "multi_label", LABELS, clips)


def build(folder: Path, entries: int, frames: int) -> dict[str, float]:
    """Makes a store of sparse shards and returns what its planning took: seconds, GB of memory, MB of what it wrote."""
    start = time.perf_counter()
    dataset = made_up_dataset(entries)
    recipe = Recipe(FeatureSpec(), ClipLayout(frames))
    result = {"dataset_s": time.perf_counter() - start, "dataset_GB": _peak_gb()}
    records: dict[int, dict[str, Any]] = {}
    (folder / "shards").mkdir(parents=True)
    for number, first in enumerate(range(0, entries, CLIPS_PER_SHARD)):
        clips = dataset.clips[first : first + CLIPS_PER_SHARD]
        _sparse_shard(folder / "shards" / f"{number:05d}.npy", clips, frames, recipe, records)
    start = time.perf_counter()
    # Their checksums are right, too; reading 165 GB of zeros would say nothing of planning.
    plan = StorePlan(dataset, recipe, folder, verify=False)
    result |= {"plan_s": time.perf_counter() - start, "todo": float(len(plan.todo))}
    start = time.perf_counter()
    plan.finish()
    result |= {"finish_s": time.perf_counter() - start, "plan_GB": _peak_gb()}
    columns = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    records_size = sum(file.stat().st_size for file in (folder / "shards").glob("*.json"))
    return result | {"columns_MB": columns / 1e6, "records_MB": records_size / 1e6}


def _sparse_shard(
    file: Path, clips: Sequence[Clip], frames: int, recipe: Recipe, known: dict[int, dict[str, Any]]
) -> None:
    """Writes a shard of silence without its bytes, and its record; `known` keeps what shards of one size share."""
    header = {
        "descr": "<f2",
        "fortran_order": False,
        "shape": (len(clips), frames, recipe.spec.bands),
    }
    with open(file, "wb") as handle:
        np.lib.format.write_array_header_1_0(handle, header)
        handle.truncate(handle.tell() + 2 * len(clips) * frames * recipe.spec.bands)
    if len(clips) not in known:
        known[len(clips)] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    entries = [
        {
            "clip_id": clip.clip_id,
            "path": str(clip.path),
            "source": [str(clip.path), 0, 0, None],
            "row": row,
            "length": frames,
            "sha256": hashlib.sha256(clip.clip_id.encode()).hexdigest(),
        }
        for row, clip in enumerate(clips)
    ]
    record = (
        recipe.made_with
        | {"file": file.name, "rows": len(clips)}
        | known[len(clips)]
        | {"clips": entries}
    )
    # As `write_json` does, but for waiting for the disk: there are thousands.
    file.with_suffix(".json").write_text(
        json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def start(folder: Path, batches: int) -> dict[str, float]:
    """Opens a store and takes batches as a training run does; returns seconds, and GB of memory at its peak."""
    result = {"before_GB": _peak_gb()}
    begin = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begin
        now = time.perf_counter()
        result[name] = now - begin
        begin = time.perf_counter()

    store = Store.open(folder)
    lap("open_s")
    iterator = train_batches(store, batch_size=BATCH, steps=10 * batches, seed=0)
    lap("iterator_s")
    next(iterator)
    lap("batch_s")
    result |= {
        "first_batch_s": sum(value for name, value in result.items() if name.endswith("_s")),
        "first_batch_GB": _peak_gb(),
    }
    begin = time.perf_counter()
    Store.open(folder, verify=False)
    lap("reopen_s")
    np.random.default_rng(0).permutation(len(store.indices("train")))
    lap("shuffle_s")
    result |= _against_maps(store, batches)
    result["statistics_ms"] = 0.0
    if len(store) <= _STATISTICS_UP_TO:
        begin = time.perf_counter()
        normalisation(store, "position")
        result["statistics_ms"] = 1e3 * (time.perf_counter() - begin) / len(store.indices("train"))
    begin = time.perf_counter()
    clips = store.indices("train")
    record = {
        "clip_id": store.clip_ids[clips].tolist(),
        "sha256": store.hashes[clips].tolist(),
        "group": [store.groups[i] for i in clips],
    }
    write_text(folder / "train_clips.json", json.dumps(record, ensure_ascii=False) + "\n")
    lap("train_clips_s")
    return result | {"train_clips_GB": _peak_gb()}


def _against_maps(store: Store, batches: int) -> dict[str, float]:
    """Returns milliseconds of a batch gathered by the store, and by a bare loop over NumPy's memory maps, alternating."""
    files = sorted((store.path / "shards").glob("*.npy"))
    maps: dict[int, np.ndarray] = {}
    generator = np.random.default_rng(1)
    chosen = [generator.integers(0, len(store), BATCH) for _ in range(batches)]

    def mapped(indices: np.ndarray) -> np.ndarray:
        result = np.empty((BATCH, store.layout.frames, store.bands), np.float16)
        for position, i in enumerate(indices.tolist()):
            shard, row = divmod(i, CLIPS_PER_SHARD)
            if shard not in maps:
                maps[shard] = np.load(files[shard], mmap_mode="r", allow_pickle=False)
            result[position] = maps[shard][row]
        return result

    seconds: dict[str, list[float]] = {"gather": [], "maps": []}
    ways: list[tuple[str, Callable[[np.ndarray], np.ndarray]]] = [
        ("gather", store.gather),
        ("maps", mapped),
    ]
    # Fills the page cache by maps of its own; of a large store a run comes back to a clip only an epoch later.
    other = Store.open(store.path, verify=False)
    for indices in chosen:
        other.gather(indices)
    for indices in chosen:
        ways.reverse()  # who comes second finds the clips in the processor's cache
        for name, function in ways:
            begin = time.perf_counter()
            function(indices)
            seconds[name].append(time.perf_counter() - begin)
    return {f"{name}_ms": 1e3 * float(np.median(values)) for name, values in seconds.items()}


def _peak_gb() -> float:
    """Returns the most memory that this process has held, in 10^9 bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux hands the other count down to a process from the one that started it.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def _in_own_process(step: str, folder: Path, *numbers: int) -> dict[str, float]:
    """Runs a step in a fresh process, whose memory is its own, and returns its result."""
    command = [
        sys.executable,
        os.path.abspath(__file__),
        f"--step={step}",
        str(folder),
        *map(str, numbers),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{step} of {folder} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _print_clip_costs(clips: int, folder: Path) -> dict[str, float]:
    """Measures and prints what a clip costs; returns the seconds of a clip for each data set."""
    spec = FeatureSpec()
    print(
        f"\nprocessor ms for a clip on one core, median (interquartile range) of {clips}, made-up audio"
    )
    total = {}
    for kind in KINDS:
        seconds = measure_clip(kind, spec, clips, folder)
        low, middle, high = (
            {step: 1e3 * float(np.quantile(values, q)) for step, values in seconds.items()}
            for q in (0.25, 0.5, 0.75)
        )
        parts = ", ".join(
            f"{step} {middle[step]:.1f} ({low[step]:.1f}-{high[step]:.1f})" for step in middle
        )
        whole = middle["process_clip"] + middle["write"]
        ratio = whole / sum(value for step, value in middle.items() if step != "process_clip")
        print(
            f"  {kind.name} ({kind.ending}, {kind.rate} Hz, {kind.channels} ch, {kind.seconds} s): {parts}; "
            f"in all {whole:.1f}, {ratio:.2f} times the sum of the steps"
        )
        total[kind.name] = whole / 1e3
    return total


def _print_projection(
    total: dict[str, float], price_core_hour: float, price_gb_month: float
) -> None:
    """Prints what the data sets take, at the prices that were given."""
    bands = FeatureSpec().bands
    print(
        f"\nassumed prices: {price_core_hour:g} for a core-hour, {price_gb_month:g} for a GB-month"
    )
    print(
        f"  {'':16s} {'clips':>9s} {'frames x bands':>14s} {'store GB':>9s} {'core-hours':>10s} {'once':>7s} {'a month':>8s}"
    )
    for kind in KINDS:
        made = project(kind, total[kind.name], bands, price_core_hour, price_gb_month)
        shape = f"{kind.frames} x {bands}"
        print(
            f"  {kind.name:16s} {kind.clips:9,d} {shape:>14s} {made.shard_bytes / 1e9:9.3f} {made.core_hours:10.4f} "
            f"{made.price_once:7.4f} {made.price_month:8.4f}"
        )


def _print_growth(entries: Sequence[int], frames: int, batches: int, root: Path) -> None:
    """Makes and opens stores of these sizes and prints what that takes."""
    bands = FeatureSpec().bands
    print(f"\nstores of sparse shards, {frames} x {bands} float16, batches of {BATCH}")
    first = 0.0
    for number in entries:
        folder = root / str(number)
        made = _in_own_process("build", folder, number, frames)
        found = _in_own_process("start", folder, batches)
        first = first or found["first_batch_s"]
        share = found["statistics_ms"]
        statistics = f"statistics {share:.2f} ms a clip to train on; " if share else ""
        print(
            f"  {number:9,d} clips, {number * frames * bands * 2 / 1e9:8.3f} GB: open {found['open_s']:.3f} s "
            f"({found['reopen_s']:.3f} s without the checksums of shards), iterator "
            f"{found['iterator_s']:.3f} s, batch {found['batch_s']:.3f} s: first batch after {found['first_batch_s']:.3f} s "
            f"({found['first_batch_s'] / first:.1f} times the first row's), peak {found['first_batch_GB']:.2f} GB "
            f"({found['before_GB']:.2f} before)\n"
            f"    {statistics}shuffle {1e3 * found['shuffle_s']:.1f} ms an epoch; batch {found['gather_ms']:.2f} ms, bare memory "
            f"maps {found['maps_ms']:.2f} ms ({found['gather_ms'] / found['maps_ms']:.2f} times); train_clips.json "
            f"{found['train_clips_s']:.2f} s, peak {found['train_clips_GB']:.2f} GB\n"
            f"    prepare again: clips listed {made['dataset_s']:.1f} s, {made['dataset_GB']:.2f} GB; planned "
            f"{made['plan_s']:.1f} s, written {made['finish_s']:.1f} s, peak {made['plan_GB']:.2f} GB, to do {made['todo']:.0f}; "
            f"columns {made['columns_MB']:.1f} MB, records of the shards {made['records_MB']:.1f} MB",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--clips",
        type=int,
        default=25,
        help="Repeats of each step; 0 leaves the first two tables out.",
    )
    parser.add_argument(
        "--entries",
        default="1000,10000,100000,1000000",
        help="Sizes of the stores; empty for none.",
    )
    parser.add_argument("--frames", type=int, default=647, help="Frames of a clip in those stores.")
    parser.add_argument(
        "--batches", type=int, default=20, help="Batches of the comparison with memory maps."
    )
    parser.add_argument(
        "--price_core_hour", type=float, default=0.05, help="An assumption, in any currency."
    )
    parser.add_argument(
        "--price_gb_month", type=float, default=0.02, help="An assumption, in any currency."
    )
    parser.add_argument("--step", choices=("build", "start"), help=argparse.SUPPRESS)
    parser.add_argument("of", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.step:
        folder, *numbers = given.of
        function = build if given.step == "build" else start
        print(json.dumps(function(Path(folder), *map(int, numbers))))
        return 0
    with tempfile.TemporaryDirectory(prefix="musicgenre-scale-") as root:
        if given.clips:
            total = _print_clip_costs(given.clips, Path(root))
            _print_projection(total, given.price_core_hour, given.price_gb_month)
        if given.entries:
            _print_growth(
                [int(number) for number in given.entries.split(",")],
                given.frames,
                given.batches,
                Path(root),
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
