"""One step over many devices: jit with sharding by default, pmap by choice. Both give the single device's result."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from musicgenre.errors import UserError
from musicgenre.pipeline.loader import Batch
from musicgenre.training.step import StepFunction

AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a step is spread over devices: the state on each of them, the batch cut along its first axis.

    Attributes:
      kind: "jit" or "pmap".
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
        if kind not in ("jit", "pmap"):
            raise UserError(f"--parallel must be 'jit' or 'pmap', not {kind!r}.")
        devices = jax.devices() if devices is None else devices
        # Explicit axes, the default of make_mesh, make Linen's Dropout raise.
        return cls(kind, jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices))

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

    def place_state(self, state: Any) -> Any:
        """Copies a state to every device."""
        return jax.device_put(state, self.replicated)

    def place_batch(self, batch: Batch) -> dict[str, Any]:
        """Puts this process's slice of a batch onto its devices."""
        if self.kind == "pmap":
            local = len(self.mesh.local_devices)
            return {name: array.reshape(local, -1, *array.shape[1:]) for name, array in batch.items()}
        return {name: jax.make_array_from_process_local_data(self.sharded, array) for name, array in batch.items()}

    def train_step(self, step: StepFunction) -> Callable[..., Any]:
        """Compiles a train step; the state's buffers are given up to the new state."""
        if self.kind == "pmap":
            return jax.pmap(
                step,
                axis_name=AXIS,
                in_axes=(None, 0),
                out_axes=(None, None),
                donate_argnums=(0,),
                devices=list(self.mesh.devices.flat),
            )
        return jax.jit(
            step,
            in_shardings=(self.replicated, self.sharded),
            out_shardings=(self.replicated, self.replicated),
            donate_argnums=(0,),
        )

    def score_step(self, step: Callable[..., Any]) -> Callable[[Any, np.ndarray], np.ndarray]:
        """Compiles a scoring step that takes this process's rows `[b, ...]` and returns theirs, on the host."""
        compiled = jax.jit(step, in_shardings=(self.replicated, self.sharded), out_shardings=self.sharded)

        def score(model: Any, x: np.ndarray) -> np.ndarray:
            placed = jax.make_array_from_process_local_data(self.sharded, x)
            shards = sorted(compiled(model, placed).addressable_shards, key=lambda shard: shard.index[0].start or 0)
            return np.concatenate([np.asarray(shard.data) for shard in shards])

        return score
