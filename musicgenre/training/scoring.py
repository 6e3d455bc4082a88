"""One score per clip of a split."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from musicgenre.evaluation.metrics import average_by_clip
from musicgenre.store.loader import eval_batches
from musicgenre.store.store import Store


def score_clips(
    score: Callable[[Any, np.ndarray], np.ndarray],
    model: Any,
    store: Store,
    indices: np.ndarray,
    *,
    batch_size: int,
    crop_frames: int = 0,
    chunks: int = 1,
) -> np.ndarray:
    """Returns each clip's mean scores over its windows, `[n, classes]`, equal on every process.

    The function `score` is from `Parallel.score_step`, and `model` its first argument. `indices`,
    `[n]`, are the clips. Over all processes a step takes `batch_size` windows, a multiple of the
    devices, of `crop_frames` frames (0: complete clips); each clip has `chunks` of them.
    """
    own = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    window = {"crop_frames": crop_frames, "chunks": chunks}
    batches = eval_batches(store, indices, batch_size=batch_size, **window, **own)
    parts = [(score(model, batch["x"]), batch["clip"], batch["mask"]) for batch in batches]
    scores, clip, mask = (np.concatenate(column) for column in zip(*parts, strict=True))
    if jax.process_count() > 1:
        scores, clip, mask = multihost_utils.process_allgather((scores, clip, mask), tiled=True)
    real = mask > 0
    return average_by_clip(scores[real], clip[real], len(indices))
