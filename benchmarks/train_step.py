r"""How fast is a training step? This project's networks against the same networks in plain PyTorch, forward, backward, Adam.

    pip install "musicgenre[peers]"                                # PyTorch
    python -m benchmarks.train_step                                # the five networks, float32 and bfloat16, on what there is
    taskset -c 0 python -m benchmarks.train_step --dtypes=float32  # on one core
    python -m benchmarks.train_step --nets=conv1d --batch=64 --no_compile
    python -m benchmarks.train_step --tiny                         # a dry run of seconds

One process, in turns: a call of some steps on this side, one on each of the other. Both libraries have as many threads as the
process has cores (narrow it with taskset). One batch of noise lies ready on the device. This side is the training loop's own
step, which also normalises the batch and measures accuracy and the gradient's norm; PyTorch's does nothing besides. PyTorch runs
eagerly, eagerly with channels last, and compiled (channels last); bfloat16 there is autocast.

Memory is each side's in a process of its own, as the process grows from when all libraries are imported: while it takes steps,
after the free memory that compiling and the first steps have left is handed back; and in all, which is mostly compiling for JAX.

Bars on CPU, in float32, against the fastest of PyTorch's: Conv1D takes at most its time, the others 1.15 times that, and no
more memory. On a GPU: 1.2 times the throughput of PyTorch compiled, in bfloat16; the shares of the card's rates are printed.
A CPU's batch is smaller for the larger networks, so that a turn takes seconds; `--batch=32` takes the GPU's.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._nets import CLASSES, DEFAULT_NETS, NETS, TINY, Net
from benchmarks._timing import alternate, machine, ratio

GPU_BATCH = 32
GPU_BAR = 1.2
DTYPES = ("float32", "bfloat16")


def batch_of(net: Net, batch: int) -> dict[str, np.ndarray]:
    """Returns noise, `x` `[batch, frames, bands]` float32, and labels `y` `[batch]` int32; no clip is padding."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((batch, net.frames, net.bands), np.float32)
    return {
        "x": x,
        "y": np.arange(batch, dtype=np.int32) % CLASSES,
        "mask": np.ones(batch, np.float32),
    }


class Jax:
    """This project's training step on one batch that lies ready.

    Args:
      net: the network.
      batch: clips.
      dtype: compute type.

    Attributes:
      flops: floating-point operations of a step as its compiler counts them, 0 where it does not.
      moved: bytes that a step reads and writes, by the same.
    """

    def __init__(self, net: Net, batch: int, dtype: str):
        import jax
        import jax.numpy as jnp
        import optax

        from musicgenre import models
        from musicgenre.training.parallel import Parallel
        from musicgenre.training.state import create_state
        from musicgenre.training.step import make_train_step

        module = models.build(
            net.model, num_classes=CLASSES, frames=net.frames, bands=net.bands, dtype=dtype
        )
        optimizer = optax.adam(1e-4)
        norm = {"mean": np.zeros(net.bands, np.float32), "std": np.ones(net.bands, np.float32)}
        spread = Parallel.create("jit", jax.devices()[:1])
        step: Any = spread.train_step(
            make_train_step(module, optimizer, seed=0, class_weights=jnp.ones(CLASSES))
        )
        state = create_state(
            module, optimizer, norm, seed=0, frames=net.frames, bands=net.bands, ema=False
        )
        self._state, self._batch = (
            spread.place_state(state),
            spread.place_batch(batch_of(net, batch)),
        )
        self._step = step.lower(self._state, self._batch).compile()
        cost = self._step.cost_analysis() or {}
        self.flops, self.moved = (
            float(cost.get("flops", 0.0)),
            float(cost.get("bytes accessed", 0.0)),
        )

    def run(self, steps: int) -> float:
        """Takes steps, waits for the last, and returns its loss."""
        for _ in range(steps):
            self._state, metrics = self._step(self._state, self._batch)
        return float(metrics["loss"])


class Torch:
    """The same network's training step in plain PyTorch.

    Args:
      name: of the network, see `torch_nets.build`.
      net: the network.
      batch: clips.
      dtype: compute type.
      channels_last: the layout of images that PyTorch's convolutions prefer.
      compiled: through torch.compile.
    """

    def __init__(
        self,
        name: str,
        net: Net,
        batch: int,
        dtype: str,
        *,
        channels_last: bool = False,
        compiled: bool = False,
    ):
        import torch

        from benchmarks import torch_nets

        self._torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.module = torch_nets.build(name, CLASSES, net.frames, net.bands).to(self.device)
        if channels_last:
            self.module = self.module.to(memory_format=torch.channels_last)
        self._forward = torch.compile(self.module) if compiled else self.module
        self._optimizer = torch.optim.Adam(self.module.parameters(), lr=1e-4, fused=True)
        arrays = batch_of(net, batch)
        self._x = torch.from_numpy(arrays["x"]).to(self.device)
        self._y = torch.from_numpy(arrays["y"]).long().to(self.device)
        self._half = dtype == "bfloat16"

    def run(self, steps: int) -> float:
        """Takes steps, waits for the last, and returns its loss."""
        torch = self._torch
        for _ in range(steps):
            self._optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device, torch.bfloat16, enabled=self._half):
                logits = self._forward(self._x)
            loss = torch.nn.functional.cross_entropy(logits.float(), self._y)
            loss.backward()
            self._optimizer.step()
        return float(loss.detach())


def contestants(name: str, net: Net, batch: int, dtype: str, *, compiled: bool) -> dict[str, Any]:
    """Builds a network's step on both sides: "jax", "torch eager", "torch channels last" (of images), and "torch compiled"."""
    images = net.model["name"] != "conv1d"
    sides: dict[str, Any] = {
        "jax": Jax(net, batch, dtype),
        "torch eager": Torch(name, net, batch, dtype),
    }
    if images:
        sides["torch channels last"] = Torch(name, net, batch, dtype, channels_last=True)
    if compiled:
        sides["torch compiled"] = Torch(
            name, net, batch, dtype, channels_last=images, compiled=True
        )
    return sides


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of a process, MB, beyond what its library takes when imported; or all that is allocated on a GPU.

    Attributes:
      steps: peak while it takes steps, once the program is compiled.
      peak: peak of all, with compiling.
    """

    steps: float
    peak: float


def measure_memory(side: str, name: str, batch: int, dtype: str, *, tiny: bool = False) -> Memory:
    """Returns what a side takes in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.train_step",
        f"--memory_of={side}",
        f"--nets={name}",
        f"--batch={batch}",
    ]
    command += [f"--dtypes={dtype}"] + ["--tiny"] * tiny
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[1]
    )
    return Memory(**json.loads(result.stdout.splitlines()[-1]))


def _memory(side: str, name: str, net: Net, batch: int, dtype: str) -> Memory:
    """Takes five steps in this process and returns its memory."""
    import jax

    # All that either side imports, so that no library counts for a side.
    for module in (
        "benchmarks.torch_nets",
        "optax",
        "musicgenre.models",
        "musicgenre.training.parallel",
        "musicgenre.training.step",
    ):
        importlib.import_module(module)
    jax.devices()
    start = _status("VmRSS")
    if side == "jax":
        one: Any = Jax(net, batch, dtype)
    else:
        one = Torch(
            name,
            net,
            batch,
            dtype,
            channels_last=side == "torch channels last",
            compiled=side == "torch compiled",
        )
    one.run(3)
    peak = _status("VmHWM")
    if side == "jax" and (stats := jax.devices()[0].memory_stats()):
        allocated = float(stats["peak_bytes_in_use"]) / 1e6
        return Memory(allocated, allocated)
    if side != "jax" and one.device == "cuda":
        import torch

        allocated = float(torch.cuda.max_memory_allocated()) / 1e6
        return Memory(allocated, allocated)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # of glibc
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    one.run(2)
    return Memory(_status("VmHWM") - start, peak - start)


def _status(field: str) -> float:
    """Of this process, MB. getrusage's high-water mark begins at that of the process that started it."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return float(line.split()[1]) * 1024 / 1e6


def device_rates(dtype: str, size: int, megabytes: int) -> tuple[float, float]:
    """Measures what the device can do: a matrix product's rate, FLOP/s, and a copy's, bytes/s read and written.

    Args:
      dtype: of the product.
      size: rows and columns of its matrices.
      megabytes: size of the array that is copied.
    """
    import jax
    import jax.numpy as jnp

    def fastest(function: Callable[..., Any], *arguments: Any) -> float:
        jax.block_until_ready(function(*arguments))
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    matrix = jnp.ones((size, size), dtype)
    array = jnp.ones(megabytes * 250_000, jnp.float32)
    product = fastest(jax.jit(lambda a: a @ a), matrix)
    copy = fastest(jax.jit(lambda a: a + 1.0), array)
    return 2.0 * size**3 / product, 2.0 * array.nbytes / copy


def compare(
    name: str, net: Net, batch: int, dtype: str, options: argparse.Namespace, *, gpu: bool
) -> None:
    """Times one network in one type, and prints times, ratios and memory."""
    print(f"{name}, {dtype}, batch {batch} x {net.frames} frames x {net.bands} bands")
    sides = contestants(name, net, batch, dtype, compiled=not options.no_compile)
    jax_side = sides["jax"]
    losses = {side: one.run(1) for side, one in sides.items()}
    print(
        "  loss of the first step: "
        + ", ".join(f"{side} {loss:.3f}" for side, loss in losses.items())
    )
    runs = {side: (lambda one=one: one.run(options.steps)) for side, one in sides.items()}
    timings = alternate(runs, rounds=options.rounds, units=options.steps)
    for timing in timings.values():
        print(timing.line())
    best = min((side for side in timings if side != "jax"), key=lambda side: timings[side].median)
    for side in timings:
        if side == "jax":
            continue
        bar = net.bar if side == best and dtype == "float32" and not gpu else None
        print(ratio(timings["jax"], timings[side]).line(f"jax / {side}", at_most=bar))
    if gpu and "torch compiled" in timings:
        least = GPU_BAR if dtype == "bfloat16" else None
        print(
            ratio(timings["torch compiled"], timings["jax"]).line(
                "jax's throughput / torch compiled's", at_least=least
            )
        )
    seconds = timings["jax"].median
    if options.rates or gpu:
        size, megabytes = (8192, 1000) if gpu else (1024, 100)
        product, copy = device_rates(dtype, size, megabytes)
        print(
            f"  the device: {product / 1e12:.3f} TFLOP/s in products of {size}^3, {copy / 1e9:.1f} GB/s in copies\n"
            f"  jax reaches {jax_side.flops / seconds / product:.3f} and {jax_side.moved / seconds / copy:.3f} of them "
            f"({jax_side.flops / 1e9:.1f} GFLOP and {jax_side.moved / 1e9:.2f} GB a step, as XLA counts)"
        )
    # Gone before the processes that measure memory need it.
    del jax_side, sides, runs
    gc.collect()
    if not options.no_memory:
        peaks = {
            side: measure_memory(side, name, batch, dtype, tiny=options.tiny) for side in timings
        }
        for what in ("steps", "peak"):
            values = {side: getattr(memory, what) for side, memory in peaks.items()}
            text = ", ".join(f"{side} {value:.0f}" for side, value in values.items())
            print(f"  memory, {'steps' if what == 'steps' else 'with compiling'}, MB: {text}")
            print(
                f"    jax / {best}: {values['jax'] / values[best]:.3f}; bar: at most 1", flush=True
            )


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, and returns 0 whether or not the bars are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--nets", default="", help=f"of {','.join(NETS)}; default: {','.join(DEFAULT_NETS)}"
    )
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="default: %(default)s")
    parser.add_argument(
        "--batch", type=int, default=0, help=f"clips; default: {GPU_BATCH}, on CPU by network"
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="turns of each side (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=1, help="steps of a turn (default: %(default)s)"
    )
    parser.add_argument(
        "--no_compile",
        action="store_true",
        help="leave out PyTorch compiled, which needs a C++ compiler",
    )
    parser.add_argument(
        "--no_memory", action="store_true", help="leave out the processes that measure memory"
    )
    parser.add_argument(
        "--rates", action="store_true", help="the shares of the device's rates also on CPU"
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a small network and few rounds: whether it runs, not how fast",
    )
    parser.add_argument("--memory_of", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    nets = TINY if options.tiny else NETS
    chosen = [name for name in options.nets.split(",") if name] or list(
        TINY if options.tiny else DEFAULT_NETS
    )
    dtypes = [name for name in options.dtypes.split(",") if name]
    for flag, values, known in (("nets", chosen, nets), ("dtypes", dtypes, DTYPES)):
        if unknown := [value for value in values if value not in known]:
            parser.error(f"--{flag}: {unknown[0]!r} is none of {', '.join(known)}")
    if options.tiny:
        options.rounds, options.rates = 2, True

    # Both libraries share the card.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import torch

    torch.set_num_threads(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if options.memory_of:
        net = nets[chosen[0]]
        memory = _memory(
            options.memory_of, chosen[0], net, options.batch or net.cpu_batch, dtypes[0]
        )
        print(json.dumps(dataclasses.asdict(memory)))
        return 0

    import jax

    gpu = jax.default_backend() == "gpu"
    if gpu:
        # JAX's float32 products use TF32, so PyTorch's do, too.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    print(machine(("jax", "jaxlib", "flax", "optax", "torch", "numpy")))
    print(
        f"PyTorch: {torch.get_num_threads()} threads, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}"
    )
    print(
        f"float32 products: JAX precision {jax.config.jax_default_matmul_precision or 'default'}, "
        f"PyTorch {torch.get_float32_matmul_precision()}; TF32 in cuDNN {torch.backends.cudnn.allow_tf32}; bfloat16: "
        "parameters, sums of batch normalisation and the loss stay float32"
    )
    for name in chosen:
        for dtype in dtypes:
            batch = options.batch or (GPU_BATCH if gpu else nets[name].cpu_batch)
            compare(name, nets[name], batch, dtype, options, gpu=gpu)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
