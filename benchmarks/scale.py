r"""Bytes, time and cost of a store, and the start of training on one of up to a million clips.

    python -m benchmarks.scale --price_core_hour=0.05 --price_gb_month=0.02
    python -m benchmarks.scale --entries=1000,10000 --clips=5      # a first look in a minute

Prints what each step of preparing a clip costs, measured here on synthetic audio; what follows for
GTZAN, MTAT and a million tracks; and how growing stores behave. These stores are written by the
code that prepares any store, except for their shards: sparse files of the right size that take no
room on the disk. Each is planned and opened in a new process.
"""

import dataclasses
import functools
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from benchmarks._timing import TINY, alternate, flags, in_new_process, memory_mb, print_table
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
# Statistics per position read every training clip; they are measured on stores up to this size.
_STATISTICS_UP_TO = 1_000
LABELS = tuple(f"tag {number:02d}" for number in range(50))


@dataclasses.dataclass(frozen=True)
class Published:
    """A data set as it is published: clips of some seconds in files of a rate in Hz.

    `frames` are those of a clip in the store, at a hop of 1,024 samples at 22,050 Hz.
    """

    name: str
    clips: int
    seconds: float
    rate: int
    channels: int
    ending: str
    frames: int


DATASETS = (
    Published("GTZAN", 1_000, 30.013, 22_050, 1, "wav", 647),
    Published("MTAT", 25_863, 29.12, 16_000, 1, "mp3", 628),
    Published("a million tracks", 1_000_000, 30.0, 44_100, 2, "mp3", 647),
)


def project(
    published: Published,
    seconds_per_clip: float,
    bands: int,
    price_core_hour: float,
    price_gb_month: float,
) -> tuple[int, float, float, float]:
    """Returns what a data set's store takes.

    Args:
      published: the data set.
      seconds_per_clip: of one core.
      bands: values per frame, float16.
      price_core_hour: price of one core for one hour.
      price_gb_month: price of 10^9 bytes for one month.

    Returns:
      Bytes of its shards, core-hours, price of preparing it, and price per month.
    """
    # NumPy's header takes 128 bytes per shard.
    shards = -(-published.clips // CLIPS_PER_SHARD)
    size = 2 * published.clips * published.frames * bands + 128 * shards
    hours = published.clips * seconds_per_clip / 3600
    return size, hours, hours * price_core_hour, size / 1e9 * price_gb_month


def write_clip(published: Published, path: Path) -> Path:
    """Writes a clip of noise and tones in a data set's format, and returns its path."""
    generator = np.random.default_rng(0)
    t = np.arange(int(published.seconds * published.rate)) / published.rate
    pitches = np.array([110.0, 220.0, 331.0, 554.0, 1660.0])
    tones = np.sin(2 * np.pi * pitches[:, None] * t).sum(axis=0)
    noise = generator.standard_normal((len(t), published.channels))
    soundfile.write(path, 0.1 * tones[:, None] + 0.05 * noise, published.rate)
    return path


def measure_clip(
    published: Published, spec: FeatureSpec, clips: int, folder: Path
) -> dict[str, np.ndarray]:
    """Returns processor seconds on one core of each step of preparing a clip, `[clips]`.

    They do not count waiting for the disk or for a core that others use.
    """
    path, rate = write_clip(published, folder / f"clip.{published.ending}"), published.rate
    layout = ClipLayout(published.frames)
    recipe = Recipe(spec, layout)
    clip = Clip("clip", path, ("tag",), "train")
    task = ShardTask(0, (clip,) * CLIPS_PER_SHARD, (["", 0, 0, None],) * CLIPS_PER_SHARD)
    decoded = load_audio(path, rate).samples
    samples = layout.cut(resample(decoded, rate, spec.sample_rate), spec)
    row = layout.fit(compute_features(samples, spec))[0].astype(np.float16)
    made = [ClipFeatures(row, published.frames, sha256(path))] * CLIPS_PER_SHARD
    steps: dict[str, Callable[[], object]] = {
        "hash": functools.partial(sha256, path),
        "decode": functools.partial(load_audio, path, rate),
        "resample": functools.partial(resample, decoded, rate, spec.sample_rate),
        "mel": functools.partial(compute_features, samples, spec),
        "write": functools.partial(write_shard, folder / "shards", task, made, recipe.made_with),
        "process_clip": functools.partial(recipe, clip),
    }
    with one_thread():
        _, cpu = alternate(steps, rounds=clips)
    cpu["write"] /= CLIPS_PER_SHARD
    return cpu


def listed_dataset(entries: int) -> Dataset:
    """Returns clips without files: eight of ten for training, three tags each, ten per artist."""
    splits = ("train",) * 8 + ("valid", "test")
    clips = tuple(
        Clip(
            f"{i:07d}",
            Path(f"/music/{i % 1000:03d}/{i:07d}.mp3"),
            tuple(LABELS[(i + shift) % 50] for shift in (0, 7, 20)),
            splits[i % 10],
            f"artist {i // 10}",
        )
        for i in range(entries)
    )
    return Dataset("listed", Path("/music"), "tenths", "multi_label", LABELS, clips)


class Laps:
    """Seconds of consecutive parts by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Starts the next part now."""
        self._begin = time.perf_counter()

    def __call__(self, name: str) -> None:
        """Ends a part and starts the next one."""
        self.seconds[name] = time.perf_counter() - self._begin
        self.restart()


def build(folder: Path, entries: int, frames: int) -> dict[str, float]:
    """Makes a store of sparse shards and returns what listing its clips and planning it took."""
    lap = Laps()
    dataset = listed_dataset(entries)
    recipe = Recipe(FeatureSpec(), ClipLayout(frames))
    lap("list clips (s)")
    result = {"list clips, peak (GB)": memory_mb() / 1e3}
    same_size: dict[int, dict[str, Any]] = {}
    (folder / "shards").mkdir(parents=True)
    for number, first in enumerate(range(0, entries, CLIPS_PER_SHARD)):
        clips = dataset.clips[first : first + CLIPS_PER_SHARD]
        _sparse_shard(folder / "shards" / f"{number:05d}.npy", clips, frames, recipe, same_size)
    lap.restart()
    # The checksums are right, too, but reading 165 GB of zeros is not a part of planning.
    plan = StorePlan(dataset, recipe, folder, verify=False)
    lap("plan (s)")
    plan.finish()
    lap("write columns (s)")
    result |= {"plan, peak (GB)": memory_mb() / 1e3, "clips to do": float(len(plan.todo))}
    for name, files in (("columns", folder.iterdir()), ("records", folder.glob("shards/*.json"))):
        size = sum(file.stat().st_size for file in files if file.is_file())
        result[f"{name} (MB)"] = size / 1e6
    return lap.seconds | result


def _sparse_shard(
    file: Path,
    clips: Sequence[Clip],
    frames: int,
    recipe: Recipe,
    same_size: dict[int, dict[str, Any]],
) -> None:
    """Writes a sparse shard of zeros and its record; shards of one size share their checksum."""
    shape = (len(clips), frames, recipe.spec.bands)
    with open(file, "wb") as handle:
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(handle, header)
        handle.truncate(handle.tell() + 2 * int(np.prod(shape)))
    if len(clips) not in same_size:
        same_size[len(clips)] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
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
    record = recipe.made_with | {"file": file.name, "rows": len(clips)} | same_size[len(clips)]
    # As `write_json` writes it, but without waiting for the disk thousands of times.
    text = json.dumps(record | {"clips": entries}, indent=1, ensure_ascii=False) + "\n"
    file.with_suffix(".json").write_text(text, encoding="utf-8")


def start(folder: Path, batches: int) -> dict[str, float]:
    """Opens a store and takes batches as training does; returns what that took."""
    result = {"before, peak (GB)": memory_mb() / 1e3}
    lap = Laps()
    store = Store.open(folder)
    lap("open (s)")
    iterator = train_batches(store, batch_size=BATCH, steps=10 * batches, seed=0)
    lap("iterator (s)")
    next(iterator)
    lap("batch (s)")
    result |= lap.seconds | {"first batch (s)": sum(lap.seconds.values())}
    result["first batch, peak (GB)"] = memory_mb() / 1e3
    clips = store.indices("train")
    lap.restart()
    Store.open(folder, verify=False)
    lap("open without checksums (s)")
    np.random.default_rng(0).permutation(len(clips))
    lap("shuffle (s)")
    result |= _against_maps(store, batches)
    if len(store) <= _STATISTICS_UP_TO:
        lap.restart()
        normalisation(store, "position")
        lap("statistics (s)")
    lap.restart()
    record = {
        "clip_id": store.clip_ids[clips].tolist(),
        "sha256": store.hashes[clips].tolist(),
        "group": [store.groups[i] for i in clips],
    }
    write_text(folder / "train_clips.json", json.dumps(record, ensure_ascii=False) + "\n")
    lap("train_clips.json (s)")
    return result | lap.seconds | {"train_clips.json, peak (GB)": memory_mb() / 1e3}


def _against_maps(store: Store, batches: int) -> dict[str, float]:
    """Returns milliseconds per batch read by the store and by a loop over NumPy's memory maps."""
    files = sorted((store.path / "shards").glob("*.npy"))
    generator = np.random.default_rng(1)
    chosen = [generator.integers(0, len(store), BATCH) for _ in range(batches)]

    @functools.cache
    def mapped(shard: int) -> np.ndarray:
        return np.load(files[shard], mmap_mode="r", allow_pickle=False)

    def copy_from_maps(indices: np.ndarray) -> None:
        result = np.empty((BATCH, store.layout.frames, store.bands), np.float16)
        for position, i in enumerate(indices.tolist()):
            shard, row = divmod(i, CLIPS_PER_SHARD)
            result[position] = mapped(shard)[row]

    # Fills the page cache through other maps: in a large store a clip is read once per epoch.
    other = Store.open(store.path, verify=False)
    for indices in chosen:
        other.gather(indices)

    def each(function: Callable[[np.ndarray], object]) -> Callable[[], object]:
        batches = iter(chosen)
        return lambda: function(next(batches))

    functions = {"from the store": each(store.gather), "from maps": each(copy_from_maps)}
    wall, _ = alternate(functions, rounds=len(chosen), warmup=0)
    return {f"batch {way} (ms)": 1e3 * float(np.median(wall[way])) for way in wall}


def report_clips(clips: int, folder: Path) -> dict[str, float]:
    """Measures and prints what a clip costs; returns its seconds by data set."""
    rows, total, steps = [], {}, []
    for published in DATASETS:
        milliseconds = {
            step: 1e3 * np.quantile(seconds, (0.25, 0.5, 0.75))
            for step, seconds in measure_clip(published, FeatureSpec(), clips, folder).items()
        }
        steps = list(milliseconds)
        whole = milliseconds["process_clip"][1] + milliseconds["write"][1]
        of_steps = sum(q[1] for step, q in milliseconds.items() if step != "process_clip")
        cells = [f"{q[1]:.1f} ({q[0]:.1f}-{q[2]:.1f})" for q in milliseconds.values()]
        rows.append([published.name, *cells, f"{whole:.1f}", f"{whole / of_steps:.2f}"])
        total[published.name] = whole / 1e3
    print(f"\nprocessor ms per clip on one core, synthetic audio; median (quartiles) of {clips}")
    print_table(["", *steps, "process_clip + write", "over the steps"], rows)
    return total


def report_costs(total: dict[str, float], price_core_hour: float, price_gb_month: float) -> None:
    """Prints what the data sets take at these prices."""
    bands, rows = FeatureSpec().bands, []
    for published in DATASETS:
        seconds = total[published.name]
        size, *rest = project(published, seconds, bands, price_core_hour, price_gb_month)
        shape = f"{published.frames} x {bands}"
        numbers = [f"{size / 1e9:.3f}", *(f"{number:.4f}" for number in rest)]
        rows.append([published.name, f"{published.clips:,d}", shape, *numbers])
    print(f"\nassumed prices: {price_core_hour:g} per core-hour, {price_gb_month:g} per GB-month")
    header = ["", "clips", "frames x bands", "store GB", "core-hours", "once", "per month"]
    print_table(header, rows)


def report_growth(entries: Sequence[int], frames: int, batches: int, root: Path) -> None:
    """Makes and opens stores of these sizes and prints what that takes."""
    bands = FeatureSpec().bands
    print(f"\nstores of sparse shards, {frames} x {bands} float16, batches of {BATCH}")
    stores: list[dict[str, float]] = []
    for number in entries:
        folder = root / str(number)
        made, found = run_step("build", folder, number, frames), run_step("start", folder, batches)
        found["first batch over the first store's"] = found["first batch (s)"] / (
            stores[0]["first batch (s)"] if stores else found["first batch (s)"]
        )
        found["batch from the store over maps"] = (
            found["batch from the store (ms)"] / found["batch from maps (ms)"]
        )
        stores.append({"shards (GB)": 2 * number * frames * bands / 1e9} | made | found)
    rows = [
        [name, *(f"{store[name]:,.3f}" if name in store else "-" for store in stores)]
        for name in stores[0]
    ]
    print_table(["", *(f"{number:,d} clips" for number in entries)], rows)


def run_step(step: str, folder: Path, *numbers: int) -> dict[str, float]:
    """Returns `build` or `start` of a new process, whose memory counts nothing else."""
    of = ",".join(map(str, numbers))
    return in_new_process("scale", f"--step={step}", f"--folder={folder}", f"--numbers={of}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    given = flags(
        __doc__,
        ("clips", 25, "repetitions of each step; 0 leaves out the first two tables"),
        ("entries", "1000,10000,100000,1000000", "sizes of the stores; empty for none"),
        ("frames", 647, "frames per clip in these stores"),
        ("batches", 20, "batches to compare with memory maps"),
        ("price_core_hour", 0.05, "an assumption, in any currency"),
        ("price_gb_month", 0.02, "an assumption, in any currency"),
        ("step", "", None),
        ("folder", "", None),
        ("numbers", "", None),
        TINY,
    ).parse_args(arguments)
    if given.step:
        function = build if given.step == "build" else start
        print(json.dumps(function(Path(given.folder), *map(int, given.numbers.split(",")))))
        return 0
    if given.tiny:
        given.clips, given.entries, given.frames, given.batches = 2, "100,200", 8, 2
    with tempfile.TemporaryDirectory(prefix="musicgenre-scale-") as root:
        if given.clips:
            total = report_clips(given.clips, Path(root))
            report_costs(total, given.price_core_hour, given.price_gb_month)
        if given.entries:
            entries = [int(number) for number in given.entries.split(",")]
            report_growth(entries, given.frames, given.batches, Path(root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
