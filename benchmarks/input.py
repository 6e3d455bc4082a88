r"""A training step fed by the real pipeline against the same step on one batch in memory.

    python -m benchmarks.input                          # five networks, resident clips; then Grain
    python -m benchmarks.input --nets=conv1d,crnn --feed=read   # batches read from the store
    python -m benchmarks.input --nets=conv1d --augment  # with SpecAugment, mixup and noise
    python -m benchmarks.input --nets=none              # Grain alone
    python -m benchmarks.input --tiny                   # a dry run of seconds

The fed step is the training loop's: Grain's iterator, the next batch placed while a step runs,
windows and normalisation inside the step. Targets: a fed step takes at most 1.03 times a step on a
batch in memory; Grain's random windows come at 0.8 or more of the rate of a loop over NumPy's
memory maps that copies each window into its row of the batch. Without a target: `np.stack` of
slices of the maps, and the loop over plain arrays that view the maps, which avoids np.memmap's
overhead per slice. The clips are noise in a store in a temporary folder.
"""

import collections
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _timing
from benchmarks._nets import CLASSES, NETS, TINY, Net, check_choice, chosen_nets
from benchmarks._timing import alternate, machine, print_timings, ratio
from musicgenre import models
from musicgenre.audio.features import FeatureSpec
from musicgenre.audio.layout import ClipLayout
from musicgenre.datasets.arrays import load_arrays
from musicgenre.store.loader import normalisation, train_batches
from musicgenre.store.prepare import CLIPS_PER_SHARD, prepare_store
from musicgenre.store.store import Store
from musicgenre.training.augment import Augmentation
from musicgenre.training.feed import Feed, resident_clips
from musicgenre.training.loop import MOST_STEPS_IN_FLIGHT
from musicgenre.training.parallel import Parallel
from musicgenre.training.state import create_state
from musicgenre.training.step import make_train_step

MOST_OF_READY, LEAST_OF_LOOP = 1.03, 0.8


def noise_store(folder: Path, clips: int, frames: int, bands: int) -> Store:
    """Prepares a store of training clips of noise, `[frames, bands]`, -80 to 0 dB, ten classes."""
    folder.mkdir(parents=True)
    np.savez(
        folder / "noise.npz",
        spectrogram=np.random.default_rng(0).integers(0, 256, (clips, bands, frames), np.uint8),
        db_min=np.full(clips, -80.0, np.float32),
        label=np.arange(clips) % CLASSES,
        genres=np.array([f"class{number}" for number in range(CLASSES)]),
        clip_id=np.array([f"{number:07d}" for number in range(clips)]),
    )
    dataset, store = load_arrays(folder, {"train": "noise.npz"}), folder / "store"
    spec, layout = FeatureSpec(n_mels=bands), ClipLayout(frames)
    prepare_store(dataset, spec, layout, store, workers=1, progress=False)
    return Store.open(store, verify=False)


def step_runners(
    store: Store, net: Net, *, feed: str, augment: bool, steps: int
) -> dict[str, Callable[[], None]]:
    """Returns functions, "fed" and "ready", that take training steps and wait for the last.

    Args:
      store: the clips.
      net: the network.
      feed: "resident" (the clips on the device) or "read" (batches read from the store).
      augment: the fed step also augments.
      steps: steps per call.
    """
    frames = net.frames
    spread = Parallel.create("jit", jax.devices()[:1])
    module = models.build(net.model, num_classes=CLASSES, frames=frames, bands=net.bands)
    optimizer = optax.adam(1e-4)
    on_device = "always" if feed == "resident" else "never"
    clips = resident_clips(spread, store, store.indices("train"), on_device)
    resident = clips is not None
    augmentation = None
    if augment:
        augmentation = Augmentation(frames=frames, time_masks=2, band_masks=2, mixup=0.4, noise=0.5)
    norm = normalisation(store, "band")
    shape: dict[str, Any] = {"seed": 0, "frames": frames, "bands": net.bands}

    def run(
        augmentation: Augmentation | None, resident: bool, batches: Callable[[], Iterator[Any]]
    ) -> Callable[[], None]:
        pure = make_train_step(
            module,
            optimizer,
            seed=0,
            class_weights=jnp.ones(CLASSES),
            augmentation=augmentation,
            window_frames=frames,
        )
        step: Callable[..., Any] = spread.train_step(pure, resident=resident)
        state = spread.place_state(create_state(module, optimizer, norm, ema=False, **shape))

        def take_steps() -> None:
            nonlocal state
            pending: collections.deque[Any] = collections.deque()
            for batch in batches():
                state, metrics = step(state, *batch)
                pending.append(metrics)
                if len(pending) >= MOST_STEPS_IN_FLIGHT:
                    jax.block_until_ready(pending.popleft())
            jax.block_until_ready(state)

        return take_steps

    settings: dict[str, Any] = {
        "batch_size": net.cpu_batch,
        "seed": 0,
        "crop_frames": net.crop_frames,
    }
    source = Feed(train_batches(store, steps=2**40, resident=resident, **settings), spread)

    def fed() -> Iterator[tuple[Any, ...]]:
        for _ in range(steps):
            batch = source.next()
            yield (batch, clips) if resident else (batch,)
            source.prepare()  # while the step runs

    ready = spread.place_batch(next(train_batches(store, steps=1, **settings)))
    return {
        "fed": run(augmentation, resident, fed),
        "ready": run(None, False, lambda: iter([(ready,)] * steps)),
    }


def window_readers(
    store: Store, frames: int, batch_size: int, batches: int
) -> dict[str, Callable[[], None]]:
    """Returns functions that read batches of random windows: "Grain", and three loops."""
    source = train_batches(store, batch_size=batch_size, steps=2**40, seed=0, crop_frames=frames)
    files = sorted((store.path / "shards").glob("*.npy"))
    maps: list[np.ndarray] = [np.load(file, mmap_mode="r") for file in files]
    arrays = [memory_map.view(np.ndarray) for memory_map in maps]
    generator = np.random.default_rng(0)

    def windows() -> Iterator[tuple[int, int, slice]]:
        """Yields shard, row and frames of each window of a batch."""
        clips = generator.integers(0, len(store), batch_size)
        starts = generator.integers(0, store.layout.frames - frames + 1, batch_size)
        for clip, start in zip(clips.tolist(), starts.tolist(), strict=True):
            yield *divmod(clip, CLIPS_PER_SHARD), slice(start, start + frames)

    def grain() -> None:
        for _ in range(batches):
            next(source)

    def loop(sources: list[np.ndarray]) -> None:
        for _ in range(batches):
            result = np.empty((batch_size, frames, store.bands), np.float16)
            for number, (shard, row, window) in enumerate(windows()):
                result[number] = sources[shard][row, window]

    def stack() -> None:
        for _ in range(batches):
            np.stack([maps[shard][row, window] for shard, row, window in windows()])

    return {
        "Grain": grain,
        "loop": functools.partial(loop, maps),
        "np.stack": stack,
        "loop over arrays": functools.partial(loop, arrays),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, and returns 0 whether or not the targets are met."""
    parser = _timing.flags(
        __doc__,
        ("nets", "", f"some of {','.join(NETS)}, or none for Grain alone; empty for the default"),
        ("feed", "resident", "resident or read"),
        ("augment", False, "the fed step also augments"),
        ("rounds", 9, "rounds per side"),
        ("steps", 20, "steps per round"),
        ("clips", 443, "clips in the store, by default as many as GTZAN's training split"),
        _timing.TINY,
    )
    given = parser.parse_args(arguments)
    check_choice(parser, "feed", [given.feed], ("resident", "read"))
    nets = {} if given.nets == "none" else chosen_nets(parser, given.nets, given.tiny)
    batches, batch_sizes, window_net = 200, [16, 32, 64], NETS["short_chunk_res"]
    if given.tiny:
        given.clips, given.rounds, given.steps, batches = 70, 2, 2, 3
        batch_sizes, window_net = [8], TINY["tiny"]

    print(machine(("jax", "jaxlib", "flax", "grain", "numpy")))
    with tempfile.TemporaryDirectory(prefix="musicgenre-input-") as folder:

        @functools.cache
        def store_of(frames: int, bands: int) -> Store:
            return noise_store(Path(folder) / f"{frames}x{bands}", given.clips, frames, bands)

        for name, net in nets.items():
            shape = f"batch {net.cpu_batch} x {net.frames} frames x {net.bands} bands"
            print(f"{name}, {shape}, {given.feed}")
            store = store_of(net.clip_frames, net.bands)
            runners = step_runners(
                store, net, feed=given.feed, augment=given.augment, steps=given.steps
            )
            wall, _ = alternate(runners, rounds=given.rounds, units=given.steps)
            print_timings(wall)
            print(ratio(wall["fed"], wall["ready"]).line("fed / ready", at_most=MOST_OF_READY))

        frames, bands = window_net.crop_frames, window_net.bands
        store = store_of(window_net.clip_frames, bands)
        for batch_size in batch_sizes:
            print(
                f"Grain: batches of {batch_size} random windows of {frames} frames x {bands} bands"
            )
            readers = window_readers(store, frames, batch_size, batches)
            wall, _ = alternate(readers, rounds=given.rounds, units=batches)
            print_timings(wall)
            for name in readers:
                if name != "Grain":
                    target = LEAST_OF_LOOP if name == "loop" else None
                    result = ratio(wall[name], wall["Grain"])
                    print(result.line(f"Grain's rate / {name}'s", at_least=target))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
