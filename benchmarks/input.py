r"""Does the device wait for data? A training step fed by the real pipeline against the same step on one batch that lies ready.

    python -m benchmarks.input                                  # the five networks, clips on the device; then Grain alone
    python -m benchmarks.input --nets=conv1d,crnn --feed=read   # batches read from the store and sent over
    python -m benchmarks.input --nets=conv1d --augment          # with SpecAugment, mixup and noise in the fed step
    python -m benchmarks.input --nets=none                      # Grain alone
    python -m benchmarks.input --tiny                           # a dry run of seconds

The fed step is the training loop's: Grain's iterator, the next batch placed while a step runs, crops and normalisation inside the
step. Bars: a fed step takes at most 1.03 times a step on the batch that lies ready; Grain's random crops come at 0.8 or more
of the rate of a bare loop over NumPy's memory maps, which copies each crop into its row of the batch. Beside it, without a bar:
`np.stack` of slices of the maps, and the bare loop over plain arrays that view the maps, which spares np.memmap's bookkeeping
of each slice. The clips are noise, in a store of its own in a temporary folder.
"""

import argparse
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

from benchmarks._nets import CLASSES, DEFAULT_NETS, NETS, TINY, Net
from benchmarks._timing import alternate, machine, ratio
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

FED_BAR, GRAIN_BAR = 1.03, 0.8


def noise_store(folder: Path, clips: int, frames: int, bands: int) -> Store:
    """Prepares a store of noise with a training split alone: `clips` of `[frames, bands]`, -80 to 0 dB, in ten classes."""
    folder.mkdir(parents=True)
    np.savez(
        folder / "noise.npz",
        spectrogram=np.random.default_rng(0).integers(0, 256, (clips, bands, frames), np.uint8),
        db_min=np.full(clips, -80.0, np.float32),
        label=np.arange(clips) % CLASSES,
        genres=np.array([f"class{number}" for number in range(CLASSES)]),
        clip_id=np.array([f"{number:07d}" for number in range(clips)]),
    )
    dataset = load_arrays(folder, {"train": "noise.npz"})
    prepare_store(
        dataset,
        FeatureSpec(n_mels=bands),
        ClipLayout(frames),
        folder / "store",
        workers=1,
        progress=False,
    )
    return Store.open(folder / "store", verify=False)


def step_runners(
    store: Store, net: Net, *, feed: str, augment: bool, steps: int
) -> dict[str, Callable[[], None]]:
    """Returns two functions, "fed" and "ready", that each take `steps` training steps and wait for the last.

    Args:
      store: the clips.
      net: the network.
      feed: "resident" (the clips on the device) or "read" (batches read from the store and sent over).
      augment: the fed step also augments.
      steps: of one call.
    """
    frames = net.frames
    spread = Parallel.create("jit", jax.devices()[:1])
    module = models.build(net.model, num_classes=CLASSES, frames=frames, bands=net.bands)
    optimizer = optax.adam(1e-4)
    clips = resident_clips(
        spread, store, store.indices("train"), "always" if feed == "resident" else "never"
    )
    augmentation = (
        Augmentation(frames=frames, time_masks=2, band_masks=2, mixup=0.4, noise=0.5)
        if augment
        else None
    )
    norm = normalisation(store, "band")

    def make(
        augmentation: Augmentation | None, resident: bool
    ) -> tuple[Callable[..., Any], list[Any]]:
        step = make_train_step(
            module,
            optimizer,
            seed=0,
            class_weights=jnp.ones(CLASSES),
            augmentation=augmentation,
            window_frames=frames,
        )
        state = create_state(
            module, optimizer, norm, seed=0, frames=frames, bands=net.bands, ema=False
        )
        # In a list, since each step gives its state up to the next.
        return spread.train_step(step, resident=resident), [spread.place_state(state)]

    def run(
        compiled: Callable[..., Any], state: list[Any], batches: Iterator[tuple[Any, ...]]
    ) -> None:
        flying: collections.deque[Any] = collections.deque()
        for batch in batches:
            state[0], metrics = compiled(state[0], *batch)
            flying.append(metrics)
            if len(flying) >= MOST_STEPS_IN_FLIGHT:
                jax.block_until_ready(flying.popleft())
        jax.block_until_ready(state[0])

    settings: dict[str, Any] = {
        "batch_size": net.cpu_batch,
        "seed": 0,
        "crop_frames": net.crop_frames,
    }
    fed_step, fed_state = make(augmentation, clips is not None)
    source = Feed(train_batches(store, steps=2**40, resident=clips is not None, **settings), spread)

    def fed_batches() -> Iterator[tuple[Any, ...]]:
        for _ in range(steps):
            batch = source.next()
            yield (batch,) if clips is None else (batch, clips)
            source.prepare()  # the step is on its way

    ready_step, ready_state = make(None, False)
    ready = spread.place_batch(next(train_batches(store, steps=1, **settings)))
    return {
        "fed": lambda: run(fed_step, fed_state, fed_batches()),
        "ready": lambda: run(ready_step, ready_state, iter([(ready,)] * steps)),
    }


def crop_readers(
    store: Store, crop_frames: int, batch_size: int, batches: int
) -> dict[str, Callable[[], None]]:
    """Returns functions that each read `batches` batches of random crops of the store: "Grain", and three loops without it."""
    source = train_batches(
        store, batch_size=batch_size, steps=2**40, seed=0, crop_frames=crop_frames
    )
    files = sorted((store.path / "shards").glob("*.npy"))
    maps: list[np.ndarray] = [np.load(file, mmap_mode="r") for file in files]
    arrays = [memory_map.view(np.ndarray) for memory_map in maps]
    generator = np.random.default_rng(0)

    def crops() -> Iterator[tuple[int, int, int]]:
        """Yields shard, row and first frame of each crop of a batch."""
        clips = generator.integers(0, len(store), batch_size)
        starts = generator.integers(0, store.layout.frames - crop_frames + 1, batch_size)
        for clip, start in zip(clips.tolist(), starts.tolist(), strict=True):
            yield clip // CLIPS_PER_SHARD, clip % CLIPS_PER_SHARD, start

    def grain() -> None:
        for _ in range(batches):
            next(source)

    def loop(sources: list[np.ndarray]) -> None:
        for _ in range(batches):
            result = np.empty((batch_size, crop_frames, store.bands), np.float16)
            for number, (shard, row, start) in enumerate(crops()):
                result[number] = sources[shard][row, start : start + crop_frames]

    def stack() -> None:
        for _ in range(batches):
            np.stack(
                [maps[shard][row, start : start + crop_frames] for shard, row, start in crops()]
            )

    return {
        "Grain": grain,
        "bare loop": functools.partial(loop, maps),
        "np.stack": stack,
        "loop over arrays": functools.partial(loop, arrays),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, and returns 0 whether or not the bars are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--nets", default="", help=f"of {','.join(NETS)}, or none, for Grain alone; default: all"
    )
    parser.add_argument(
        "--feed", choices=["resident", "read"], default="resident", help="default: %(default)s"
    )
    parser.add_argument("--augment", action="store_true", help="the fed step also augments")
    parser.add_argument(
        "--rounds", type=int, default=9, help="turns of each side (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="steps of a turn (default: %(default)s)"
    )
    parser.add_argument(
        "--clips", type=int, default=443, help="clips in the store, GTZAN's by default"
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a small network and few rounds: whether it runs, not how fast",
    )
    options = parser.parse_args(arguments)
    nets = TINY if options.tiny else NETS
    chosen = (
        []
        if options.nets == "none"
        else [name for name in options.nets.split(",") if name]
        or list(TINY if options.tiny else DEFAULT_NETS)
    )
    if unknown := [name for name in chosen if name not in nets]:
        parser.error(f"--nets: {unknown[0]!r} is none of {', '.join(nets)}")
    clips, rounds, steps, batches = options.clips, options.rounds, options.steps, 200
    if options.tiny:
        clips, rounds, steps, batches = 70, 2, 2, 3

    print(machine(("jax", "jaxlib", "flax", "grain", "numpy")))
    with tempfile.TemporaryDirectory(prefix="musicgenre-input-") as folder:
        stores: dict[tuple[int, int], Store] = {}

        def store_of(net: Net) -> Store:
            shape = (net.clip_frames, net.bands)
            if shape not in stores:
                stores[shape] = noise_store(
                    Path(folder) / f"{net.clip_frames}x{net.bands}", clips, *shape
                )
            return stores[shape]

        for name in chosen:
            net = nets[name]
            print(
                f"{name}, batch {net.cpu_batch} x {net.frames} frames x {net.bands} bands, {options.feed}"
            )
            runners = step_runners(
                store_of(net), net, feed=options.feed, augment=options.augment, steps=steps
            )
            timings = alternate(runners, rounds=rounds, units=steps)
            for timing in timings.values():
                print(timing.line())
            print(
                ratio(timings["fed"], timings["ready"]).line("fed / ready", at_most=FED_BAR),
                flush=True,
            )

        net = TINY["tiny"] if options.tiny else NETS["short_chunk_res"]
        for batch_size in (8,) if options.tiny else (16, 32, 64):
            print(
                f"Grain: random crops of {net.crop_frames} frames x {net.bands} bands, batches of {batch_size}"
            )
            readers = crop_readers(store_of(net), net.crop_frames, batch_size, batches)
            timings = alternate(readers, rounds=rounds, units=batches)
            for timing in timings.values():
                print(timing.line())
            print(
                ratio(timings["bare loop"], timings["Grain"]).line(
                    "Grain's rate / bare loop's", at_least=GRAIN_BAR
                )
            )
            for name in ("np.stack", "loop over arrays"):
                print(ratio(timings[name], timings["Grain"]).line(f"Grain's rate / {name}'s"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
