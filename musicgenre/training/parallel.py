"""One step over many devices: jit over a mesh, pmap, or fsdp. All give one device's result.

"fsdp" (fully sharded data parallelism; Rajbhandari et al. 2020, "ZeRO", stage 3) shards each large
array of the state over the devices: parameters, their average and the optimiser's state. A step
gathers a layer's parameters where it uses them, and each device updates its own shard.

Networks know nothing of devices. Under jit, batch normalisation sees the global batch; under pmap
an interceptor gives every `nn.BatchNorm` that runs the name of the device axis.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from musicgenre.errors import UserError
from musicgenre.models import fast_conv
from musicgenre.models.nnx_network import NNXNetwork
from musicgenre.store.loader import Batch
from musicgenre.training.step import StepFunction

AXIS = "data"
# The largest fraction of a device's memory for resident clips; on CPU devices, of the machine's
# memory for all copies together.
DEVICE_FRACTION, HOST_FRACTION = 0.5, 0.25
KINDS = ("jit", "pmap", "fsdp")
# Size of the smallest array that "fsdp" shards: less is not worth a message to the other devices.
SHARD_FROM = 65_536


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a step runs on several devices: each has its rows of the batch.

    The kinds "jit" and "pmap" replicate the state, "fsdp" shards its large arrays. The `mesh` has
    all devices of all processes in one row.
    """

    kind: str
    mesh: Mesh

    @classmethod
    def create(cls, kind: str = "jit", devices: list[Any] | None = None) -> "Parallel":
        """Uses the given devices, or all. Raises UserError for an unknown kind."""
        if kind not in KINDS:
            raise UserError(f"--parallel must be one of {', '.join(KINDS)}, not {kind!r}.")
        devices = jax.devices() if devices is None else devices
        # Explicit axes, the default of make_mesh, make Linen's Dropout raise.
        auto = (AxisType.Auto,)
        return cls(kind, jax.make_mesh((len(devices),), (AXIS,), axis_types=auto, devices=devices))

    @property
    def axis_name(self) -> str | None:
        """The device axis inside a step: named under pmap only."""
        return AXIS if self.kind == "pmap" else None

    @property
    def replicated(self) -> NamedSharding:
        """A full copy on each device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def sharded(self) -> NamedSharding:
        """Sharded along the first axis."""
        return self._along(0)

    def _along(self, axis: int) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, AXIS))

    def check_batch_size(self, batch_size: int, accumulate: int = 1) -> None:
        """Raises UserError if a batch does not divide into equal parts."""
        parts = self.mesh.size * accumulate
        if batch_size % parts:
            raise UserError(
                f"config.batch_size={batch_size} is not divisible by {self.mesh.size} devices x "
                f"optimizer.accumulate={accumulate}; use a multiple of {parts}."
            )

    def round_up(self, batch_size: int) -> int:
        """Returns the next batch size that is a multiple of the devices."""
        return -(-batch_size // self.mesh.size) * self.mesh.size

    def state_shardings(self, state: Any) -> Any:
        """Returns the sharding of each array of a state.

        "fsdp" shards large arrays along the longest axis that the devices divide, and replicates
        all others, as the other kinds do with all.
        """

        def of(array: Any) -> NamedSharding:
            axes = [axis for axis in range(array.ndim) if array.shape[axis] % self.mesh.size == 0]
            if self.kind != "fsdp" or array.size < SHARD_FROM or not axes:
                return self.replicated
            return self._along(max(axes, key=lambda axis: array.shape[axis]))

        return jax.tree.map(of, state)

    def gather(self, tree: Any) -> Any:
        """Inside a compiled function, replicates sharded arrays, and so their gradients."""
        # XLA alone would gather some activations, so that each device computes a few channels.
        if self.kind != "fsdp":
            return tree
        return jax.lax.with_sharding_constraint(tree, self.replicated)

    def place_state(self, state: Any) -> Any:
        """Copies a state to the devices, see `state_shardings`."""
        return jax.device_put(state, self.state_shardings(state))

    def create_state(self, create: Callable[[], Any]) -> Any:
        """Returns the state that `create` makes, placed as by `place_state`.

        Under "fsdp" each device makes its own shards, so that none holds the full state.
        """
        if self.kind != "fsdp":
            return self.place_state(create())
        return jax.jit(create, out_shardings=self.state_shardings(jax.eval_shape(create)))()

    def place_batch(self, batch: Batch, axis: int = 0) -> dict[str, Any]:
        """Copies this process's slice of a batch to its devices, sharded along an axis."""
        if self.kind == "pmap":  # wants the devices as the first axis
            shape = (len(self.mesh.local_devices), -1)
            return {
                name: np.moveaxis(
                    array.reshape(*array.shape[:axis], *shape, *array.shape[axis + 1 :]), axis, 0
                )
                for name, array in batch.items()
            }
        place = functools.partial(jax.make_array_from_process_local_data, self._along(axis))
        return {name: place(array) for name, array in batch.items()}

    def place_batches(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Copies this process's slices of several batches, for a step of `make_many_steps`."""
        stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
        return self.place_batch(stacked, axis=1)

    def has_room(self, size: int) -> bool:
        """Returns whether `size` bytes of clips fit on every device of all processes."""
        local = self.mesh.local_devices
        if local[0].platform == "cpu":
            fits = size * len(local) <= HOST_FRACTION * _host_memory()
        else:
            free = min((device.memory_stats() or {}).get("bytes_limit", 0) for device in local)
            fits = size <= DEVICE_FRACTION * free
        if jax.process_count() > 1:
            # All must run the same program.
            fits = bool(multihost_utils.process_allgather(np.array(fits)).all())
        return fits

    def place_whole(self, array: np.ndarray) -> jax.Array:
        """Copies an array, equal on every process, to every device."""
        # device_put would send it from process to process to compare it.
        return jax.make_array_from_callback(array.shape, self.replicated, array.__getitem__)

    def train_step(
        self, step: StepFunction, *, resident: bool = False, stacked: bool = False
    ) -> Callable[..., Any]:
        """Compiles a train step, which donates the state's buffers to the new state.

        It takes a state and a batch; if `resident`, also clips, from `place_whole`; if `stacked`,
        batches from `place_batches`.
        """
        one_cpu = self.mesh.size == 1 and self.mesh.devices.flat[0].platform == "cpu"

        def traced_step(state: Any, *batch: Any) -> tuple[Any, Any]:
            fast_conv.set_enabled(one_cpu)
            pmaps = self.kind == "pmap"
            try:
                with nn.intercept_methods(_synchronise) if pmaps else contextlib.nullcontext():
                    state, metrics = step(state, *batch)
            finally:
                fast_conv.set_enabled(False)
            if self.kind == "fsdp":
                state = jax.lax.with_sharding_constraint(state, self.state_shardings(state))
            return state, metrics

        if self.kind == "pmap":
            axes = (None, 0, None) if resident else (None, 0)
            devices = list(self.mesh.devices.flat)
            return jax.pmap(
                traced_step,
                AXIS,
                in_axes=axes,
                out_axes=(None, None),
                devices=devices,
                donate_argnums=0,
            )
        # A sharded state brings its own shardings.
        placed = None if self.kind == "fsdp" else self.replicated
        given = (placed, self._along(1 if stacked else 0), self.replicated)
        return jax.jit(
            traced_step,
            in_shardings=given if resident else given[:2],
            out_shardings=(placed, self.replicated),
            donate_argnums=0,
        )

    def score_step(self, step: Callable[..., Any]) -> Callable[[Any, np.ndarray], np.ndarray]:
        """Compiles a scoring step. It takes and returns this process's rows, on the host."""
        compiled = jax.jit(
            lambda model, x: step(self.gather(model), x),
            in_shardings=(None if self.kind == "fsdp" else self.replicated, self.sharded),
            out_shardings=self.sharded,
        )

        def score(model: Any, x: np.ndarray) -> np.ndarray:
            placed = jax.make_array_from_process_local_data(self.sharded, x)
            shards = compiled(model, placed).addressable_shards
            shards = sorted(shards, key=lambda shard: shard.index[0].start or 0)
            return np.concatenate([np.asarray(shard.data) for shard in shards])

        return score


def _synchronise(
    function: Any, arguments: Any, keywords: Any, context: nn.module.InterceptorContext
) -> Any:
    """Averages the statistics of batch normalisation over the devices of a pmap."""
    if isinstance(context.module, nn.BatchNorm | NNXNetwork):
        # Linen modules are frozen dataclasses; this instance belongs to the trace alone.
        object.__setattr__(context.module, "axis_name", AXIS)
    return function(*arguments, **keywords)


def _host_memory() -> int:
    """Returns the bytes of memory of this machine, or of the container around the process."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = Path("/sys/fs/cgroup", name)
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            sizes.append(int(text))
    return min(sizes)
