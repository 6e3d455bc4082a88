"""Layers that several models share."""

import itertools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.errors import UserError


@jax.named_scope("max_pool")
def max_pool(x: jax.Array, window: tuple[int, ...]) -> jax.Array:
    """Maximum over windows that do not overlap; what is left over at the end of an axis is dropped.

    A tournament of `where(a >= b, a, b)`: the gradient goes to the first of equal maxima, as in `nn.max_pool`, whose
    backward pass (select-and-scatter) is 1.5-1.7 times slower on CPU. A reduction over a reshaped axis would be shorter
    and gives wrong gradients under jit after BatchNorm.

    Args:
      x: `[batch, a, ..., channels]`, such as `[batch, frames, bands, channels]`.
      window: the extent, and the stride, along each axis between the batch and the channels.

    Returns:
      `[batch, a // window[0], ..., channels]`.
    """
    batch, *extents, channels = x.shape
    lengths = [extent // size for extent, size in zip(extents, window, strict=True)]
    cut = tuple(slice(0, length * size) for length, size in zip(lengths, window, strict=True))
    split = [part for pair in zip(lengths, window, strict=True) for part in pair]
    windows = x[(slice(None), *cut)].reshape(batch, *split, channels)
    # Row by row through the window, so that the first of equal values wins.
    places = itertools.product(*(range(size) for size in window))
    return _tournament([windows[(slice(None), *(item for i in place for item in (slice(None), i)))] for place in places])


def max_pool_time(x: jax.Array, window: int) -> jax.Array:
    """Maximum over windows of frames that do not overlap: `[batch, frames, c]` to `[batch, frames // window, c]`."""
    return max_pool(x, (window,))


@jax.named_scope("global_max")
def global_max(x: jax.Array) -> jax.Array:
    """Maximum over all positions, `[batch, ..., channels]` to `[batch, channels]`, by the tournament of `max_pool`."""
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    while (length := x.shape[1]) > 1:
        half = length // 2
        first, second, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
        x = jnp.concatenate([jnp.where(first >= second, first, second), rest], axis=1)
    return x[:, 0]


def _tournament(contenders: list[jax.Array]) -> jax.Array:
    """The elementwise maximum of arrays of one shape; of equal values the first counts."""
    while len(contenders) > 1:
        pairs = [jnp.where(a >= b, a, b) for a, b in zip(contenders[::2], contenders[1::2], strict=False)]
        contenders = pairs + ([contenders[-1]] if len(contenders) % 2 else [])
    return contenders[0]


@jax.named_scope("avg_pool_time")
def avg_pool_time(x: jax.Array, window: int) -> jax.Array:
    """Mean over windows of frames that do not overlap: `[batch, frames, c]` to `[batch, frames // window, c]`."""
    batch, frames, channels = x.shape
    length = frames // window
    return x[:, : length * window].reshape(batch, length, window, channels).mean(axis=2)


def batch_norm(
    train: bool, axis_name: str | None, dtype: Any, name: str | None = None, axis: int = -1, affine: bool = True
) -> nn.BatchNorm:
    """Batch normalisation with statistics of the global batch: by sharding under jit, by `axis_name` under pmap.

    Each index of `axis` has its own mean and deviation, over all other axes, and its own scale and bias if `affine`.
    """
    return nn.BatchNorm(
        use_running_average=not train,
        axis=axis,
        momentum=0.9,
        epsilon=1e-5,
        use_scale=affine,
        use_bias=affine,
        axis_name=axis_name,
        dtype=dtype,
        name=name,
    )


def dense_head(module: Any, x: jax.Array, train: bool) -> jax.Array:
    """The dense layers at the end of Conv1D and Conv2D, with the embedding sown after the last hidden one.

    Args:
      module: the network that calls it from its compact method; its fields `num_classes`, `dense`, `dropout`, `output_dropout`
        and `dtype` say what is built.
      x: `[batch, features]`.
      train: drop units.

    Returns:
      Logits, float32 `[batch, num_classes]`.
    """
    init = nn.initializers.glorot_normal()
    for i, units in enumerate(module.dense, start=1):
        x = nn.relu(nn.Dense(units, kernel_init=init, dtype=module.dtype, name=f"dense{i}")(x))
        if i == len(module.dense):
            module.sow("intermediates", "embedding", x)
        x = nn.Dropout(module.dropout, deterministic=not train)(x)
    if not module.dense:
        module.sow("intermediates", "embedding", x)
    x = nn.Dense(module.num_classes, kernel_init=init, dtype=module.dtype, name="head")(x)
    if module.output_dropout:
        x = nn.Dropout(module.dropout, deterministic=not train)(x)
    return x.astype(jnp.float32)


def check_lengths(model: str, fields: Mapping[str, Any], *names: str) -> None:
    """Raises UserError where fields that have one value for each layer differ in length, or have none."""
    lengths = {len(fields[name]) for name in names}
    if len(lengths) > 1 or 0 in lengths:
        values = ", ".join(f"model.{name}={tuple(fields[name])}" for name in names)
        raise UserError(f"the model {model!r} takes one value for each layer: {values} must have one length.")
