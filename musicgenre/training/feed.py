"""Training data on the devices: resident clips, and batches placed ahead of their step."""

import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from musicgenre.errors import UserError
from musicgenre.store.loader import Batch
from musicgenre.store.store import Store
from musicgenre.training.parallel import Parallel


def resident_clips(
    spread: Parallel, store: Store, clips: np.ndarray, mode: str
) -> jax.Array | None:
    """Copies clips, indices `[n]`, to every device as stored, float16 `[n, frames, bands]`.

    The mode is "auto" (where they fit, see `Parallel.has_room`), "always" or "never". Returns None
    where they stay on disk.

    Raises:
      UserError: the mode is "always" and the memory does not suffice.
    """
    size = 2 * len(clips) * store.layout.frames * store.bands
    if mode == "never" or (mode == "auto" and not spread.has_room(size)):
        return None
    try:
        return jax.block_until_ready(spread.place_whole(store.gather(clips)))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        raise UserError(
            f"config.data.on_device={mode!r}: the {len(clips)} training clips "
            f"({size / 2**30:.1f} GiB) do not fit on each device. "
            "Set --config.data.on_device=never."
        ) from error


class Feed:
    """Training batches of Grain's iterator on the devices, the next ones placed while a step runs.

    Its state, for the checkpoint, is the iterator's as if nothing had been read ahead. `stacked`
    batches are placed several at once, for a step of `make_many_steps`.
    """

    def __init__(
        self, iterator: Iterator[Batch], spread: Parallel, *, stacked: bool = False
    ) -> None:
        self._iterator: Any = iterator
        self._spread = spread
        self._stacked = stacked
        # What has been read ahead: number of batches, these on the devices, the state before them.
        self._ahead: tuple[int, Any, Any] | None = None

    def next(self, count: int = 1) -> dict[str, Any]:
        """Returns the next batch, or with `stacked` the next `count` of them."""
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[0] != count:
            self._iterator.set_state(ahead[2])
            ahead = None
        batch: dict[str, Any] = ahead[1] if ahead else self._place(count)
        return batch

    def prepare(self, count: int = 1) -> None:
        """Reads what the next call of `next` returns, and begins to copy it to the devices."""
        state = self._iterator.get_state()
        self._ahead = count, self._place(count), state

    def _place(self, count: int) -> dict[str, Any]:
        if self._stacked:
            return self._spread.place_batches([next(self._iterator) for _ in range(count)])
        return self._spread.place_batch(next(self._iterator))

    # Grain's checkpoints call these.
    def get_state(self) -> bytes:
        """Returns the position in the data as JSON."""
        state = self._ahead[2] if self._ahead else self._iterator.get_state()
        return json.dumps(state, indent=4).encode()

    def set_state(self, state: bytes) -> None:
        """Returns to the position of `get_state`."""
        self._ahead = None
        self._iterator.set_state(json.loads(state))

    def start_prefetch(self) -> None:
        """Lets the iterator read ahead on the host."""
        self._iterator.start_prefetch()
