"""Layers that several models share."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def max_pool_time(x: jax.Array, window: int) -> jax.Array:
    """Maximum over windows of frames that do not overlap; frames left over at the end are dropped.

    A tournament of `where(a >= b, a, b)`: the gradient goes to the first of equal maxima, as in `nn.max_pool`, whose
    backward pass (select-and-scatter) is 1.5-1.7 times slower on CPU. A reduction over a reshaped axis would be shorter
    and gives wrong gradients under jit after BatchNorm.

    Args:
      x: `[batch, frames, channels]`.
      window: frames per window, and the stride.

    Returns:
      `[batch, frames // window, channels]`.
    """
    batch, frames, channels = x.shape
    length = frames // window
    windows = x[:, : length * window].reshape(batch, length, window, channels)
    contenders = [windows[:, :, i] for i in range(window)]
    while len(contenders) > 1:
        pairs = [jnp.where(a >= b, a, b) for a, b in zip(contenders[::2], contenders[1::2], strict=False)]
        contenders = pairs + ([contenders[-1]] if len(contenders) % 2 else [])
    return contenders[0]


def avg_pool_time(x: jax.Array, window: int) -> jax.Array:
    """Mean over windows of frames that do not overlap: `[batch, frames, c]` to `[batch, frames // window, c]`."""
    batch, frames, channels = x.shape
    length = frames // window
    return x[:, : length * window].reshape(batch, length, window, channels).mean(axis=2)


def batch_norm(train: bool, axis_name: str | None, dtype: Any, name: str | None = None) -> nn.BatchNorm:
    """Batch normalisation with statistics of the global batch: by sharding under jit, by `axis_name` under pmap."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, axis_name=axis_name, dtype=dtype, name=name)
