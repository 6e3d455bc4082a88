"""Layers that several models share."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.errors import UserError
from musicgenre.models import fast_conv

# Fewest filters of a layer for which the fast products are worth compiling.
_LEAST_FEATURES = 32


class Conv(nn.Module):
    """A convolution over frames and bands with `nn.Conv`'s parameters and a fast training step on CPU.

    `fast_conv.fast_convs` serves where it is switched on, for training in float32 with at least 32
    filters; compiling it takes half a second more per layer. Everything else is `fast_conv.lax_conv`,
    so that scores and exported models are the same everywhere.

    Attributes:
      features: filters.
      size: frames and bands that a filter covers; the input is padded by `size - 1` zeros.
      stride: from one position of a filter to the next.
      train: use the fast products where they are switched on.
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
        """Convolves.

        Args:
          x: `[batch, frames, bands, channels]`.
          product: if False, only return the kernel, `[size, size, channels, features]`.

        Returns:
          `[batch, ceil(frames / stride), ceil(bands / stride), features]`.
        """
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel, bias = self.param("kernel", self.kernel_init, shape), None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        if not product:
            return kernel
        if self.is_fast():
            y = fast_conv.fast_convs(x, (kernel,), self.stride)[0]
        else:
            y = fast_conv.lax_conv(x, kernel, self.stride)
        return y if bias is None else y + bias

    @nn.nowrap
    def is_fast(self) -> bool:
        """Returns whether the fast products serve."""
        return self.train and _is_fast(self.dtype, self.features)


def _is_fast(dtype: Any, features: int) -> bool:
    wide = features >= _LEAST_FEATURES
    return fast_conv.is_enabled() and wide and jnp.dtype(dtype) == jnp.float32


def convolve_together(x: jax.Array, *convs: Conv) -> tuple[jax.Array, ...]:
    """Applies convolutions without biases that differ in their names only; fast, by one product."""
    if not convs[0].is_fast():
        return tuple(conv(x) for conv in convs)
    kernels = tuple(conv(x, product=False) for conv in convs)
    return fast_conv.fast_convs(x.astype(jnp.float32), kernels, convs[0].stride)


@jax.named_scope("max_pool")
def max_pool(x: jax.Array, window: tuple[int, ...]) -> jax.Array:
    """Maximum over windows that do not overlap; the remainder at the end of an axis is dropped.

    A tournament of `where(a >= b, a, b)`: the gradient goes to the first of equal maxima, as in
    `nn.max_pool`, whose backward pass (select-and-scatter) is 1.5-1.7 times slower on CPU. A reduction
    over a reshaped axis would be shorter and gives wrong gradients under jit after BatchNorm.

    Args:
      x: `[batch, a, ..., channels]`, such as `[batch, frames, bands, channels]`.
      window: the extent, and the stride, along each axis between the batch and the channels.

    Returns:
      `[batch, a // window[0], ..., channels]`.
    """
    batch, *extents, channels = x.shape
    lengths = [extent // size for extent, size in zip(extents, window, strict=True)]
    pairs = list(zip(lengths, window, strict=True))
    cut = tuple(slice(0, length * size) for length, size in pairs)
    windows = x[(slice(None), *cut)].reshape(batch, *itertools.chain(*pairs), channels)
    # Row by row through the window, so that the first of equal values wins.
    positions = itertools.product(*map(range, window))
    return _tournament(
        [
            windows[(slice(None), *(item for i in position for item in (slice(None), i)))]
            for position in positions
        ]
    )


@jax.named_scope("max_pool")
def max_pool_overlapping(x: jax.Array) -> jax.Array:
    """`nn.max_pool` of 3 x 3 windows, stride 2 and padding 1, by the tournament of `max_pool`.

    Args:
      x: `[batch, frames, bands, channels]`.

    Returns:
      `[batch, ceil(frames / 2), ceil(bands / 2), channels]`.
    """
    for axis in (2, 1):  # within the rows first, so that the first of equal values wins row by row
        length = -(-x.shape[axis] // 2)
        shape = (*x.shape[:axis], length, 2, *x.shape[axis + 1 :])
        fill = [(0, 2 * length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
        padded = jnp.pad(x, fill, constant_values=-jnp.inf).reshape(shape)
        even, odd = jnp.moveaxis(padded, axis + 1, 0)
        shift = [(1, 0) if i == axis else (0, 0) for i in range(x.ndim)]
        before = jnp.pad(odd, shift, constant_values=-jnp.inf)
        # In pairs from the left, the odd one last.
        x = _tournament([jax.lax.slice_in_dim(before, 0, length, axis=axis), even, odd])
    return x


def max_pool_time(x: jax.Array, window: int) -> jax.Array:
    """`max_pool` over frames: `[batch, frames, c]` to `[batch, frames // window, c]`."""
    return max_pool(x, (window,))


@jax.named_scope("global_max")
def global_max(x: jax.Array) -> jax.Array:
    """Maximum over all positions, `[batch, ..., channels]` to `[batch, channels]`, by a tournament."""
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    while (length := x.shape[1]) > 1:
        half = length // 2
        first, second, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
        x = jnp.concatenate([jnp.where(first >= second, first, second), rest], axis=1)
    return x[:, 0]


def _tournament(arrays: list[jax.Array]) -> jax.Array:
    """Returns the elementwise maximum; of equal values the first counts."""
    while len(arrays) > 1:
        pairs = zip(arrays[::2], arrays[1::2], strict=False)
        odd = arrays[-1:] if len(arrays) % 2 else []
        arrays = [jnp.where(a >= b, a, b) for a, b in pairs] + odd
    return arrays[0]


@jax.named_scope("avg_pool_time")
def avg_pool_time(x: jax.Array, window: int) -> jax.Array:
    """Mean over windows of frames: `[batch, frames, c]` to `[batch, frames // window, c]`."""
    batch, frames, channels = x.shape
    length = frames // window
    return x[:, : length * window].reshape(batch, length, window, channels).mean(axis=2)


class BatchNorm(nn.BatchNorm):
    """`nn.BatchNorm`, and what follows it; training takes less memory where `Conv` is fast."""

    @nn.compact
    def __call__(
        self, x: jax.Array, *, plus: jax.Array | None = None, relu: bool = False
    ) -> jax.Array:
        """Normalises.

        Args:
          x: `[..., channels]`, or as `axis` says.
          plus: is added to the normalised `x`, of the same shape.
          relu: apply ReLU at the end.

        Returns:
          An array of `x`'s shape.
        """
        channels = x.shape[-1]
        training = not self.use_running_average and self.axis_name is None
        plain = self.use_scale and self.axis in (-1, x.ndim - 1) and x.dtype == jnp.float32
        if training and plain and _is_fast(self.dtype, channels):
            scale = self.param("scale", self.scale_init, (channels,))
            offset = self.param("bias", self.bias_init, (channels,))
            average = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
            variance = self.variable("batch_stats", "var", jnp.ones, (channels,))
            y, *statistics = fast_conv.fast_norm(x, scale, offset, plus, relu, self.epsilon)
            if not self.is_initializing():
                for running, now in zip((average, variance), statistics, strict=True):
                    running.value = self.momentum * running.value + (1 - self.momentum) * now
            return y
        y = super().__call__(x)
        y = y if plus is None else y + plus
        return nn.relu(y) if relu else y


def batch_norm(
    train: bool, dtype: Any, name: str | None = None, *, axis: int = -1, affine: bool = True
) -> BatchNorm:
    """Batch normalisation over all axes but `axis`, with scale and bias if `affine`.

    Its statistics are those of the global batch: by sharding under jit, by an interceptor under pmap.
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


def musicnn_norm(x: jax.Array, train: bool, dtype: Any, name: str) -> jax.Array:
    """The batch normalisation of musicnn's public code, whose epsilon is .001."""
    norm = nn.BatchNorm(not train, momentum=0.99, epsilon=1e-3, dtype=dtype, name=name)
    return norm(x)


def output_layer(
    module: Any, x: jax.Array, init: Any = nn.linear.default_kernel_init, dropout: float = 0.0
) -> jax.Array:
    """The last dense layer, "head", of a network that calls this from its compact method.

    Args:
      module: the network; its fields `num_classes` and `dtype` are used.
      x: `[batch, features]`.
      init: initialiser of the kernel.
      dropout: rate of logits to drop.

    Returns:
      Logits, float32 `[batch, num_classes]`.
    """
    layer = nn.Dense(module.num_classes, kernel_init=init, dtype=module.dtype, name="head")
    x = layer(x)
    if dropout:
        x = nn.Dropout(dropout, deterministic=False)(x)
    return x.astype(jnp.float32)


def dense_layers(
    module: Any,
    x: jax.Array,
    train: bool,
    units: Sequence[int],
    init: Any,
    *,
    activation: Callable[[jax.Array], jax.Array] = nn.relu,
    name: str = "dense",
) -> jax.Array:
    """Hidden dense layers, each followed by dropout; sows the last one's output as the embedding.

    Args:
      module: the network; its fields `dropout` and `dtype` are used.
      x: `[batch, features]`; the embedding if there are no layers.
      train: drop units.
      units: of each layer.
      init: initialiser of the kernels.
      activation: of each layer.
      name: of the layers, which a number follows.

    Returns:
      `[batch, units of the last layer]`.
    """
    embedding = x
    for i, count in enumerate(units, start=1):
        layer = nn.Dense(count, kernel_init=init, dtype=module.dtype, name=f"{name}{i}")
        embedding = activation(layer(x))
        x = nn.Dropout(module.dropout, deterministic=not train)(embedding)
    module.sow("intermediates", "embedding", embedding)
    return x


def check_lengths(model: str, fields: Mapping[str, Any], *names: str) -> None:
    """Raises UserError where fields with one value per layer differ in length or are empty."""
    lengths = {len(fields[name]) for name in names}
    if len(lengths) > 1 or 0 in lengths:
        values = ", ".join(f"model.{name}={tuple(fields[name])}" for name in names)
        raise UserError(
            f"the model {model!r} takes one value per layer: {values} must have the same length."
        )
