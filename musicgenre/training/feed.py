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
    """Copies clips to every device as they are stored, float16 `[clips, frames, bands]`.

    Args:
      spread: the devices.
      store: where the clips are.
      clips: their indices, `[n]`.
      mode: "auto" (where they fit, see `Parallel.has_room`), "always" or "never".

    Returns:
      The clips, or None where they stay on disk.

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
    """Training batches on the devices. The next ones are placed while a step runs.

    Its state, for the checkpoint, is the Grain iterator's as if nothing had been read ahead.

    Args:
      iterator: Grain's, from `train_batches`.
      spread: places the batches.
      stacked: place several batches together, for a step of `make_many_steps`.
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
        """Reads what the next call of `next` returns, and begins to copy it to the devices."""
        self._state_before = self._iterator.get_state()
        self._ahead, self._ahead_count = self._place(count), count

    def _place(self, count: int) -> dict[str, Any]:
        if self._stacked:
            return self._spread.place_batches([next(self._iterator) for _ in range(count)])
        return self._spread.place_batch(next(self._iterator))

    def get_state(self) -> bytes:
        """Returns the position in the data as JSON; Grain's checkpoints call this."""
        state = self._state_before if self._ahead_count else self._iterator.get_state()
        return json.dumps(state, indent=4).encode()

    def set_state(self, state: bytes) -> None:
        """Returns to the position of `get_state`; Grain's checkpoints call this."""
        self._ahead, self._ahead_count = None, 0
        self._iterator.set_state(json.loads(state))

    def start_prefetch(self) -> None:
        """Lets the iterator read ahead on the host; Grain's checkpoints call this."""
        self._iterator.start_prefetch()
