"""One step over many devices: jit with sharding by default, pmap or a cut-up state by choice. All give one device's result.

The cut-up state ("fsdp", as in fully sharded data parallelism; Rajbhandari et al. 2020, "ZeRO", stage 3) keeps one part of each
large array on each device: parameters, their average and the optimiser's state. A step puts a layer's parameters together where
it uses them, and each device updates its own part.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from musicgenre.errors import UserError
from musicgenre.store.loader import Batch
from musicgenre.training.step import StepFunction

AXIS = "data"
# The largest share of a device's memory that resident clips may take; on CPU devices, of the machine's, by all copies together.
DEVICE_SHARE, HOST_SHARE = 0.5, 0.25
KINDS = ("jit", "pmap", "fsdp")
# Numbers in the smallest array that "fsdp" cuts up: less is not worth a message to the other devices.
CUT_FROM = 65_536


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a step is spread over devices: the state on each of them, or cut up, and the batch cut along its first axis.

    Attributes:
      kind: of KINDS: "jit" and "pmap" have the state on every device, "fsdp" has its large arrays cut up.
      mesh: all devices of all processes in one row.
    """

    kind: str
    mesh: Mesh

    @classmethod
    def create(cls, kind: str = "jit", devices: list[Any] | None = None) -> "Parallel":
        """Takes the given devices, or all there are.

        Raises:
          UserError: the kind is unknown.
        """
        if kind not in KINDS:
            raise UserError(f"--parallel must be one of {', '.join(KINDS)}, not {kind!r}.")
        devices = jax.devices() if devices is None else devices
        # Explicit axes, the default of make_mesh, make Linen's Dropout raise.
        return cls(
            kind,
            jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices),
        )

    @property
    def axis_name(self) -> str | None:
        """The device axis inside a step: named under pmap only."""
        return AXIS if self.kind == "pmap" else None

    @property
    def replicated(self) -> NamedSharding:
        """A whole copy on each device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def sharded(self) -> NamedSharding:
        """Cut along the first axis."""
        return NamedSharding(self.mesh, PartitionSpec(AXIS))

    def check_batch_size(self, batch_size: int, accumulate: int = 1) -> None:
        """Raises UserError where a batch cannot be cut into equal parts."""
        parts = self.mesh.size * accumulate
        if batch_size % parts:
            raise UserError(
                f"config.batch_size={batch_size} does not divide by {self.mesh.size} devices x "
                f"optimizer.accumulate={accumulate}; use a multiple of {parts}."
            )

    def round_up(self, batch_size: int) -> int:
        """Returns the next batch size that divides by the devices."""
        return -(-batch_size // self.mesh.size) * self.mesh.size

    def state_shardings(self, state: Any) -> Any:
        """Returns where each array of a state lies: on every device or, of "fsdp"'s large ones, a part on each.

        They are cut along the longest axis that divides by the devices; where none does, each device has the whole.
        """

        def of(array: Any) -> NamedSharding:
            axes = [axis for axis in range(array.ndim) if array.shape[axis] % self.mesh.size == 0]
            if self.kind != "fsdp" or array.size < CUT_FROM or not axes:
                return self.replicated
            longest = max(axes, key=lambda axis: array.shape[axis])
            return NamedSharding(self.mesh, PartitionSpec(*[None] * longest, AXIS))

        return jax.tree.map(of, state)

    def gather(self, tree: Any) -> Any:
        """Inside a compiled function, has each device hold whole arrays; their gradients are whole, too.

        Left to itself, XLA gathers some activations instead, and each device then computes some channels of the whole batch.
        """
        return (
            jax.lax.with_sharding_constraint(tree, self.replicated) if self.kind == "fsdp" else tree
        )

    def place_state(self, state: Any) -> Any:
        """Puts a state onto the devices, see `state_shardings`."""
        return jax.device_put(state, self.state_shardings(state))

    def create_state(self, create: Callable[[], Any]) -> Any:
        """Has `create` make a state, and returns it placed as by `place_state`.

        Each device makes its own parts of "fsdp"'s, so that none has to hold the whole.
        """
        if self.kind != "fsdp":
            return self.place_state(create())
        return jax.jit(create, out_shardings=self.state_shardings(jax.eval_shape(create)))()

    def place_batch(self, batch: Batch) -> dict[str, Any]:
        """Puts this process's slice of a batch onto its devices."""
        if self.kind == "pmap":
            local = len(self.mesh.local_devices)
            return {
                name: array.reshape(local, -1, *array.shape[1:]) for name, array in batch.items()
            }
        return {
            name: jax.make_array_from_process_local_data(self.sharded, array)
            for name, array in batch.items()
        }

    def place_batches(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Puts this process's slices of several batches onto its devices, for a step of `make_many_steps`."""
        stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
        if self.kind == "pmap":
            local = len(self.mesh.local_devices)
            return {
                name: array.reshape(len(batches), local, -1, *array.shape[2:]).swapaxes(0, 1)
                for name, array in stacked.items()
            }
        sharding = NamedSharding(self.mesh, PartitionSpec(None, AXIS))
        return {
            name: jax.make_array_from_process_local_data(sharding, array)
            for name, array in stacked.items()
        }

    def has_room(self, size: int) -> bool:
        """Returns whether every device, of all processes, can hold `size` bytes within its share of memory."""
        local = self.mesh.local_devices
        if local[0].platform == "cpu":
            fits = size * len(local) <= HOST_SHARE * _host_memory()
        else:
            limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in local]
            fits = size <= DEVICE_SHARE * min(limits)
        if jax.process_count() > 1:
            # All must run the same program.
            fits = bool(multihost_utils.process_allgather(np.array(fits)).all())
        return fits

    def place_whole(self, array: np.ndarray) -> jax.Array:
        """Copies an array, the same on every process, to every device."""
        # device_put would send it from process to process to compare it.
        return jax.make_array_from_callback(
            array.shape, self.replicated, lambda index: array[index]
        )

    def train_step(
        self, step: StepFunction, *, resident: bool = False, stacked: bool = False
    ) -> Callable[..., Any]:
        """Compiles a train step; the state's buffers are given up to the new state.

        Args:
          step: takes a state and a batch.
          resident: it also takes clips, from `place_whole`.
          stacked: it takes batches from `place_batches`.
        """
        if self.kind == "pmap":
            return jax.pmap(
                step,
                axis_name=AXIS,
                in_axes=(None, 0, None) if resident else (None, 0),
                out_axes=(None, None),
                donate_argnums=(0,),
                devices=list(self.mesh.devices.flat),
            )

        def placed_step(state: Any, *batch: Any) -> tuple[Any, Any]:
            state, metrics = step(state, *batch)
            return jax.lax.with_sharding_constraint(state, self.state_shardings(state)), metrics

        batch = NamedSharding(self.mesh, PartitionSpec(None, AXIS)) if stacked else self.sharded
        # A cut-up state says itself where it lies.
        before, after = (None, None) if self.kind == "fsdp" else (self.replicated, self.replicated)
        return jax.jit(
            placed_step if self.kind == "fsdp" else step,
            in_shardings=(before, batch, self.replicated) if resident else (before, batch),
            out_shardings=(after, self.replicated),
            donate_argnums=(0,),
        )

    def score_step(self, step: Callable[..., Any]) -> Callable[[Any, np.ndarray], np.ndarray]:
        """Compiles a scoring step that takes this process's rows `[b, ...]` and returns theirs, on the host."""
        compiled = jax.jit(
            lambda model, x: step(self.gather(model), x),
            in_shardings=(None if self.kind == "fsdp" else self.replicated, self.sharded),
            out_shardings=self.sharded,
        )

        def score(model: Any, x: np.ndarray) -> np.ndarray:
            placed = jax.make_array_from_process_local_data(self.sharded, x)
            shards = sorted(
                compiled(model, placed).addressable_shards,
                key=lambda shard: shard.index[0].start or 0,
            )
            return np.concatenate([np.asarray(shard.data) for shard in shards])

        return score


class Feed:
    """Training batches on the devices, the next ones placed while the step before them runs.

    Its state, for the checkpoint, is the Grain iterator's as if nothing had been read ahead.

    Args:
      iterator: Grain's, from `train_batches`.
      spread: places the batches.
      stacked: batches are placed together, for a step of `make_many_steps`.
    """

    def __init__(
        self, iterator: Iterator[Batch], spread: Parallel, *, stacked: bool = False
    ) -> None:
        self._iterator: Any = iterator
        self._spread = spread
        self._stacked = stacked
        self._ahead: Any = None
        self._ahead_count = 0
        self._state_before: Any = None

    def next(self, count: int = 1) -> dict[str, Any]:
        """Returns the next batch, or with `stacked` the next `count` of them."""
        if self._ahead_count not in (0, count):
            self._iterator.set_state(self._state_before)
            self._ahead_count = 0
        if self._ahead_count == 0:
            return self._place(count)
        batch: dict[str, Any] = self._ahead
        self._ahead, self._ahead_count = None, 0
        return batch

    def prepare(self, count: int = 1) -> None:
        """Reads what the next call of `next` returns, and sends it on its way to the devices."""
        self._state_before = self._iterator.get_state()
        self._ahead, self._ahead_count = self._place(count), count

    def _place(self, count: int) -> dict[str, Any]:
        if self._stacked:
            return self._spread.place_batches([next(self._iterator) for _ in range(count)])
        return self._spread.place_batch(next(self._iterator))

    def get_state(self) -> bytes:
        """Returns the place in the data as JSON; Grain's checkpoints call this."""
        return json.dumps(
            self._state_before if self._ahead_count else self._iterator.get_state(), indent=4
        ).encode()

    def set_state(self, state: bytes) -> None:
        """Goes to the place of `get_state`; Grain's checkpoints call this."""
        self._ahead, self._ahead_count = None, 0
        self._iterator.set_state(json.loads(state))

    def start_prefetch(self) -> None:
        """Has the iterator read ahead on the host; Grain's checkpoints call this."""
        self._iterator.start_prefetch()


def _host_memory() -> int:
    """Bytes of memory that this machine, or the container around the process, has."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in (
        Path("/sys/fs/cgroup/memory.max"),
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ):
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            sizes.append(int(text))
    return min(sizes)
