r"""The training step against the same networks in plain PyTorch: forward, backward, Adam.

    pip install "musicgenre[peers]"                                # PyTorch
    python -m benchmarks.train_step                                # five networks, both types
    taskset -c 0 python -m benchmarks.train_step --dtypes=float32  # on one core
    python -m benchmarks.train_step --nets=conv1d --batch=64 --no_compile
    python -m benchmarks.train_step --tiny                         # a dry run of seconds

Both libraries alternate in one process, with as many threads as it may use cores (narrow it with
taskset), on one batch of noise on the device. Our side is the training loop's step, which also
normalises the batch and measures accuracy and the gradient's norm. PyTorch runs eagerly, eagerly
with channels last, and compiled (channels last); its bfloat16 is autocast.

Memory is measured in a new process per side, from when all libraries are imported: while stepping,
after free memory was returned to the system, and including compilation.

Targets on a CPU in float32, against the fastest of PyTorch's: Conv1D takes at most its time, the
others 1.15 times that, and no more memory. On a GPU: 1.2 times the throughput of compiled PyTorch
in bfloat16; the fractions of the device's rates are printed, too. On a CPU the larger networks have
smaller batches, so that a round takes seconds; `--batch=32` is a GPU's default.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _timing
from benchmarks._nets import CLASSES, NETS, Net, check_choice, chosen_nets
from benchmarks._timing import (
    alternate,
    in_new_process,
    machine,
    memory_mb,
    print_timings,
    ratio,
    usable_cores,
)

GPU_BATCH = 32
GPU_TARGET = 1.2
DTYPES = ("float32", "bfloat16")


def batch_of(net: Net, batch: int) -> dict[str, np.ndarray]:
    """Returns noise, `x` `[batch, frames, bands]` float32, and labels, `y` `[batch]` int32."""
    generator = np.random.default_rng(0)
    return {
        "x": generator.standard_normal((batch, net.frames, net.bands), np.float32),
        "y": np.arange(batch, dtype=np.int32) % CLASSES,
        "mask": np.ones(batch, np.float32),
    }


class Jax:
    """This project's training step on one batch in memory.

    Args:
      net: the network.
      batch: clips.
      dtype: compute type.

    Attributes:
      flops: floating-point operations per step as XLA counts them; 0 if it does not.
      moved: bytes that a step reads and writes, as XLA counts them.
    """

    def __init__(self, net: Net, batch: int, dtype: str):
        import jax
        import jax.numpy as jnp
        import optax

        from musicgenre import models
        from musicgenre.training.parallel import Parallel
        from musicgenre.training.state import create_state
        from musicgenre.training.step import make_train_step

        shape: dict[str, Any] = {"frames": net.frames, "bands": net.bands}
        module = models.build(net.model, num_classes=CLASSES, dtype=dtype, **shape)
        optimizer = optax.adam(1e-4)
        norm = {"mean": np.zeros(net.bands, np.float32), "std": np.ones(net.bands, np.float32)}
        spread = Parallel.create("jit", jax.devices()[:1])
        pure = make_train_step(module, optimizer, seed=0, class_weights=jnp.ones(CLASSES))
        step: Any = spread.train_step(pure)
        state = create_state(module, optimizer, norm, seed=0, ema=False, **shape)
        self._state = spread.place_state(state)
        self._batch = spread.place_batch(batch_of(net, batch))
        self._step = step.lower(self._state, self._batch).compile()
        cost = self._step.cost_analysis() or {}
        self.flops = float(cost.get("flops", 0.0))
        self.moved = float(cost.get("bytes accessed", 0.0))

    def run(self, steps: int) -> float:
        """Takes steps, waits for the last, and returns its loss."""
        for _ in range(steps):
            self._state, metrics = self._step(self._state, self._batch)
        return float(metrics["loss"])


class Torch:
    """The same network's training step in plain PyTorch.

    Args:
      name: the network's name, see `torch_nets.build`.
      net: the network.
      batch: clips.
      dtype: compute type.
      side: "torch eager", "torch channels last" (the layout that PyTorch's convolutions prefer) or
        "torch compiled", where images have channels last, too.
    """

    def __init__(self, name: str, net: Net, batch: int, dtype: str, side: str):
        import torch

        from benchmarks import torch_nets

        self._torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.module = torch_nets.build(name, CLASSES, net.frames, net.bands).to(self.device)
        compiled = side == "torch compiled"
        if side == "torch channels last" or (compiled and is_2d(net)):
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


def is_2d(net: Net) -> bool:
    """Returns whether a network convolves over frames and bands."""
    return net.model["name"] != "conv1d"


def make_side(side: str, name: str, net: Net, batch: int, dtype: str) -> Any:
    """Builds a network's training step: "jax", or a side of `Torch`."""
    return Jax(net, batch, dtype) if side == "jax" else Torch(name, net, batch, dtype, side)


def measure_memory(
    side: str, name: str, batch: int, dtype: str, *, tiny: bool = False
) -> dict[str, float]:
    """Returns `memory_of_five_steps` of a new process."""
    flags = [f"--memory_of={side}", f"--nets={name}", f"--batch={batch}", f"--dtypes={dtype}"]
    return in_new_process("train_step", *flags, *["--tiny"] * tiny)


def memory_of_five_steps(
    side: str, name: str, net: Net, batch: int, dtype: str
) -> dict[str, float]:
    """Takes five steps in this process, which must be new.

    Returns:
      Peak memory in MB beyond imports, on a GPU all that was allocated: "steps", while stepping
      after compilation, and "peak", with compilation.
    """
    import jax
    import torch

    # What either side imports, so that imports count for neither.
    for module in ("models", "training.parallel", "training.state", "training.step"):
        importlib.import_module(f"musicgenre.{module}")
    for module in ("optax", "benchmarks.torch_nets"):
        importlib.import_module(module)
    jax.devices()
    start = memory_mb("VmRSS")
    step = make_side(side, name, net, batch, dtype)
    step.run(3)
    peak = memory_mb()
    if side == "jax" and (stats := jax.devices()[0].memory_stats()):
        return dict.fromkeys(("steps", "peak"), stats["peak_bytes_in_use"] / 1e6)
    if side != "jax" and step.device == "cuda":
        return dict.fromkeys(("steps", "peak"), torch.cuda.max_memory_allocated() / 1e6)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: returns free memory to the system
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    step.run(2)
    return {"steps": memory_mb() - start, "peak": peak - start}


def device_rates(dtype: str, size: int, megabytes: int) -> tuple[float, float]:
    """Measures a matrix product's rate, FLOP/s, and a copy's, bytes/s read and written.

    Args:
      dtype: of the product.
      size: rows and columns of its matrices.
      megabytes: size of the copied array.
    """
    import jax
    import jax.numpy as jnp

    matrix, array = jnp.ones((size, size), dtype), jnp.ones(megabytes * 250_000, jnp.float32)
    product, copy = jax.jit(lambda a: a @ a), jax.jit(lambda a: a + 1.0)
    wall, _ = alternate(
        {
            "product": lambda: jax.block_until_ready(product(matrix)),
            "copy": lambda: jax.block_until_ready(copy(array)),
        },
        rounds=5,
    )
    return 2.0 * size**3 / wall["product"].min(), 2.0 * array.nbytes / wall["copy"].min()


def compare(
    name: str, net: Net, batch: int, dtype: str, options: argparse.Namespace, *, gpu: bool
) -> None:
    """Times one network in one compute type, and prints times, ratios and memory."""
    print(f"{name}, {dtype}, batch {batch} x {net.frames} frames x {net.bands} bands")
    peers = ["torch eager", *["torch channels last"] * is_2d(net)]
    peers += ["torch compiled"] * (not options.no_compile)
    sides = {side: make_side(side, name, net, batch, dtype) for side in ("jax", *peers)}
    losses = ", ".join(f"{side} {step.run(1):.3f}" for side, step in sides.items())
    print(f"  loss of the first step: {losses}")
    runs = {side: (lambda step=step: step.run(options.steps)) for side, step in sides.items()}
    wall, _ = alternate(runs, rounds=options.rounds, units=options.steps)
    print_timings(wall)
    fastest = min(peers, key=lambda side: np.median(wall[side]))
    for side in peers:
        target = net.bar if side == fastest and dtype == "float32" and not gpu else None
        print(ratio(wall["jax"], wall[side]).line(f"jax / {side}", at_most=target))
    if gpu and "torch compiled" in wall:
        throughput = ratio(wall["torch compiled"], wall["jax"])
        target = GPU_TARGET if dtype == "bfloat16" else None
        print(throughput.line("throughput of jax / torch compiled", at_least=target))
    if options.rates or gpu:
        flops, moved = sides["jax"].flops, sides["jax"].moved
        size, megabytes = (8192, 1000) if gpu else (1024, 100)
        product, copy = device_rates(dtype, size, megabytes)
        seconds = float(np.median(wall["jax"]))
        print(
            f"  the device: {product / 1e12:.3f} TFLOP/s in products of {size}^3, "
            f"{copy / 1e9:.1f} GB/s in copies\n"
            f"  jax reaches {flops / seconds / product:.3f} and {moved / seconds / copy:.3f} of it "
            f"({flops / 1e9:.1f} GFLOP and {moved / 1e9:.2f} GB per step, as XLA counts)"
        )
    if options.no_memory:
        return
    # Frees the memory that the new processes need.
    del sides, runs
    gc.collect()
    memory = {side: measure_memory(side, name, batch, dtype, tiny=options.tiny) for side in wall}
    for field, what in (("steps", "stepping"), ("peak", "with compilation")):
        values = {side: memory[side][field] for side in wall}
        text = ", ".join(f"{side} {value:.0f}" for side, value in values.items())
        print(f"  memory, {what}, MB: {text}")
        print(f"    jax / {fastest}: {values['jax'] / values[fastest]:.3f}; target: at most 1")


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, and returns 0 whether or not the targets are met."""
    parser = _timing.flags(
        __doc__,
        ("nets", "", f"some of {','.join(NETS)}; empty for the first five"),
        ("dtypes", ",".join(DTYPES), "compute types"),
        ("batch", 0, f"clips per batch; 0 for {GPU_BATCH}, on a CPU the network's own"),
        ("rounds", 7, "rounds per side"),
        ("steps", 1, "steps per round"),
        ("no_compile", False, "leave out compiled PyTorch, which needs a C++ compiler"),
        ("no_memory", False, "leave out the processes that measure memory"),
        ("rates", False, "print the fractions of the device's rates on a CPU, too"),
        ("memory_of", "", None),
        _timing.TINY,
    )
    options = parser.parse_args(arguments)
    nets = chosen_nets(parser, options.nets, options.tiny)
    dtypes = [name for name in options.dtypes.split(",") if name]
    check_choice(parser, "dtypes", dtypes, DTYPES)
    if options.tiny:
        options.rounds, options.rates = 2, True

    # Both libraries share the GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import torch

    torch.set_num_threads(usable_cores())
    if options.memory_of:
        ((name, net),) = nets.items()
        batch = options.batch or net.cpu_batch
        memory = memory_of_five_steps(options.memory_of, name, net, batch, dtypes[0])
        print(json.dumps(memory))
        return 0

    import jax

    gpu = jax.default_backend() == "gpu"
    if gpu:
        # JAX's float32 products use TF32, so PyTorch's do, too.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    print(machine(("jax", "jaxlib", "flax", "optax", "torch", "numpy")))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"PyTorch: {torch.get_num_threads()} threads, {device}\n"
        f"float32 products: JAX precision {jax.config.values['jax_default_matmul_precision']}, "
        f"PyTorch {torch.get_float32_matmul_precision()}, TF32 in cuDNN "
        f"{torch.backends.cudnn.allow_tf32}\n"
        "bfloat16: parameters, sums of batch normalisation and the loss stay float32"
    )
    for name, net in nets.items():
        for dtype in dtypes:
            batch = options.batch or (GPU_BATCH if gpu else net.cpu_batch)
            compare(name, net, batch, dtype, options, gpu=gpu)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
