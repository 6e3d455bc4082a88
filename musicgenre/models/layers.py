"""Layers that several models share."""

import itertools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.errors import UserError
from musicgenre.models.fast_conv import fast_convs, fast_norm, lax_conv

# Fewest filters of a layer for which it is worth the compiling.
_LEAST_FEATURES = 32


class Conv(nn.Module):
    """A convolution over frames and bands, with `nn.Conv`'s parameters, whose training step is fast on a CPU.

    The products of `fast_convs` serve training alone, in float32, on a single CPU device, for 32 filters and more; compiling
    them takes half a second a layer longer. Everything else is `lax_conv`, so that what is scored or exported is the same
    everywhere.

    Attributes:
      features: filters.
      size: frames and bands that a filter sees. As many zeros as keep the extents at stride 1 go around the input.
      stride: from one position of a filter to the next.
      train: choose the fast training step where there is one.
      use_bias: add a bias.
      kernel_init: initialiser of the kernel.
      dtype: compute type.
    """

    features: int
    size: int = 3
    stride: int = 1
    train: bool = False
    use_bias: bool = False
    kernel_init: Any = nn.initializers.lecun_normal()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, product: bool = True) -> jax.Array:
        """Returns `[batch, ceil(frames / stride), ceil(bands / stride), features]` of `x` `[batch, frames, bands, channels]`.

        Without the product it returns the kernel, `[size, size, channels, features]`.
        """
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = (
            self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        )
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        if not product:
            return kernel
        y = (
            fast_convs(x, (kernel,), self.stride)[0]
            if self.is_fast()
            else lax_conv(x, kernel, self.stride)
        )
        return y if bias is None else y + bias

    @nn.nowrap
    def is_fast(self) -> bool:
        """Whether the fast products serve."""
        return self.train and _is_fast(self.dtype, self.features)


def _is_fast(dtype: Any, features: int) -> bool:
    return (
        jnp.dtype(dtype) == jnp.float32
        and features >= _LEAST_FEATURES
        and jax.default_backend() == "cpu"
        and jax.device_count() == 1
    )


def convolve_together(x: jax.Array, *convs: Conv) -> tuple[jax.Array, ...]:
    """The results of several convolutions of `x` that are alike but for their names, without biases: fast, by one product."""
    if not convs[0].is_fast():
        return tuple(conv(x) for conv in convs)
    kernels = tuple(conv(x, product=False) for conv in convs)
    return fast_convs(x.astype(jnp.float32), kernels, convs[0].stride)


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
    return _tournament(
        [
            windows[(slice(None), *(item for i in place for item in (slice(None), i)))]
            for place in places
        ]
    )


@jax.named_scope("max_pool")
def max_pool_overlapping(x: jax.Array) -> jax.Array:
    """Maximum over windows of 3 x 3 at every second position, one more position on every side: `nn.max_pool` by the tournament.

    Args:
      x: `[batch, frames, bands, channels]`.

    Returns:
      `[batch, ceil(frames / 2), ceil(bands / 2), channels]`.
    """
    for axis in (2, 1):  # within the rows first, so that the first of equal values wins row by row
        length = -(-x.shape[axis] // 2)
        shape = (*x.shape[:axis], length, 2, *x.shape[axis + 1 :])
        fill = [(0, 2 * length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
        even, odd = jnp.moveaxis(
            jnp.pad(x, fill, constant_values=-jnp.inf).reshape(shape), axis + 1, 0
        )
        shift = [(1, 0) if i == axis else (0, 0) for i in range(x.ndim)]
        before = jax.lax.slice_in_dim(
            jnp.pad(odd, shift, constant_values=-jnp.inf), 0, length, axis=axis
        )
        # In pairs from the left, the odd one last.
        x = _tournament([before, even, odd])
    return x


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
        pairs = [
            jnp.where(a >= b, a, b) for a, b in zip(contenders[::2], contenders[1::2], strict=False)
        ]
        contenders = pairs + ([contenders[-1]] if len(contenders) % 2 else [])
    return contenders[0]


@jax.named_scope("avg_pool_time")
def avg_pool_time(x: jax.Array, window: int) -> jax.Array:
    """Mean over windows of frames that do not overlap: `[batch, frames, c]` to `[batch, frames // window, c]`."""
    batch, frames, channels = x.shape
    length = frames // window
    return x[:, : length * window].reshape(batch, length, window, channels).mean(axis=2)


class BatchNorm(nn.BatchNorm):
    """`nn.BatchNorm`, and what follows it, whose training step takes less memory where that of `Conv` is fast."""

    @nn.compact
    def __call__(
        self, x: jax.Array, *, plus: jax.Array | None = None, relu: bool = False
    ) -> jax.Array:
        """Normalises.

        Args:
          x: `[..., channels]`, or as `axis` says.
          plus: is added to the normalised; of `x`'s shape.
          relu: apply ReLU in the end.

        Returns:
          An array of `x`'s shape.
        """
        channels = x.shape[-1]
        fast = (
            not self.use_running_average
            and self.axis in (-1, x.ndim - 1)
            and self.axis_name is None
            and self.use_scale
        )
        if fast and x.dtype == jnp.float32 and _is_fast(self.dtype, channels):
            scale = self.param("scale", self.scale_init, (channels,))
            offset = self.param("bias", self.bias_init, (channels,))
            average = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
            variance = self.variable("batch_stats", "var", jnp.ones, (channels,))
            y, *statistics = fast_norm(x, scale, offset, plus, relu, self.epsilon)
            if not self.is_initializing():
                for running, now in zip((average, variance), statistics, strict=True):
                    running.value = self.momentum * running.value + (1 - self.momentum) * now
            return y
        y = super().__call__(x)
        y = y if plus is None else y + plus
        return nn.relu(y) if relu else y


def batch_norm(
    train: bool, dtype: Any, name: str | None = None, axis: int = -1, affine: bool = True
) -> "BatchNorm":
    """Batch normalisation with statistics of the global batch: by sharding under jit.

    Each index of `axis` has its own mean and deviation, over all other axes, and its own scale and bias if `affine`.
    """
    return BatchNorm(
        use_running_average=not train,
        axis=axis,
        momentum=0.9,
        epsilon=1e-5,
        use_scale=affine,
        use_bias=affine,
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
        raise UserError(
            f"the model {model!r} takes one value for each layer: {values} must have one length."
        )
