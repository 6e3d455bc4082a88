"""The base of the networks, and layers that several of them share."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.errors import UserError
from musicgenre.models import fast_conv
from musicgenre.models.registry import InputLimits

# Fewest filters of a layer for which the fast products are worth compiling.
_LEAST_FEATURES = 32


class Network(nn.Module):
    """Base of this package's networks.

    Attributes:
      num_classes: outputs.
      dtype: compute type; parameters and logits are float32.
    """

    num_classes: int
    dtype: Any = jnp.float32

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """Returns the input that a network with these fields takes.

        Raises:
          UserError: the fields do not fit together.
        """
        return InputLimits()

    @nn.nowrap
    def embed(self: Any, x: jax.Array, train: bool) -> jax.Array:
        """Sows `x`, `[batch, d]`, as the embedding and returns it after dropout."""
        self.sow("intermediates", "embedding", x)
        return nn.Dropout(self.dropout, deterministic=not train)(x)

    @nn.nowrap
    def dense_layers(
        self: Any,
        x: jax.Array,
        train: bool,
        units: Sequence[int],
        init: Any,
        activation: Callable[[jax.Array], jax.Array] = nn.relu,
        name: str = "dense",
    ) -> jax.Array:
        """Hidden dense layers, each followed by dropout, of `x` `[batch, features]`.

        They have `units` each, kernels initialised by `init`, and a `name` that a number follows.
        The embedding is the output of the last one before dropout, or `x` if there are none.
        """
        embedding = x
        for i, count in enumerate(units, start=1):
            layer = nn.Dense(count, kernel_init=init, dtype=self.dtype, name=f"{name}{i}")
            embedding = activation(layer(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(embedding)
        self.sow("intermediates", "embedding", embedding)
        return x

    @nn.nowrap
    def logits(
        self, x: jax.Array, init: Any = nn.linear.default_kernel_init, dropout: float = 0.0
    ) -> jax.Array:
        """The last dense layer, "head": logits, float32 `[batch, num_classes]`, of `[batch, d]`.

        `init` is the kernel's initialiser, `dropout` the rate of logits to drop.
        """
        x = nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="head")(x)
        x = nn.Dropout(dropout, deterministic=False)(x) if dropout else x
        return x.astype(jnp.float32)


class Conv(nn.Module):
    """A convolution with `nn.Conv`'s parameters and a fast training step on CPU.

    `fast_conv.fast_convs` serves where it is switched on, for training in float32 with at least 32
    filters; compiling it takes half a second more per layer. Everything else is
    `fast_conv.lax_conv`, so that scores and exported models are the same everywhere.

    Attributes:
      features: filters.
      size: frames and bands that a filter covers; the input is padded by `size - 1` zeros.
      stride: from one position of a filter to the next.
      train: use the fast products where they are switched on.
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
        """Convolves `[batch, frames, bands, channels]`.

        Returns:
          `[batch, ceil(frames / stride), ceil(bands / stride), features]`, or the kernel only if
          not `product`.
        """
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel, bias = self.param("kernel", self.kernel_init, shape), None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        if not product:
            return kernel
        if self.train and _is_fast(self.dtype, self.features):
            y = fast_conv.fast_convs(x, (kernel,), self.stride)[0]
        else:
            y = fast_conv.lax_conv(x, kernel, self.stride)
        return y if bias is None else y + bias


def _is_fast(dtype: Any, features: int) -> bool:
    wide = features >= _LEAST_FEATURES
    return fast_conv.is_enabled() and wide and jnp.dtype(dtype) == jnp.float32


def convolve_together(x: jax.Array, *convs: Conv) -> tuple[jax.Array, ...]:
    """Applies convolutions without biases that differ in their names only; fast, by one product."""
    if not (convs[0].train and _is_fast(convs[0].dtype, convs[0].features)):
        return tuple(conv(x) for conv in convs)
    kernels = tuple(conv(x, product=False) for conv in convs)
    return fast_conv.fast_convs(x.astype(jnp.float32), kernels, convs[0].stride)


@jax.named_scope("max_pool")
def max_pool(x: jax.Array, window: tuple[int, ...]) -> jax.Array:
    """Maximum over windows that do not overlap; the remainder at the end of an axis is dropped.

    A tournament of `where(a >= b, a, b)`: the gradient goes to the first of equal maxima, as in
    `nn.max_pool`, whose backward pass (select-and-scatter) is 1.5-1.7 times slower on CPU. A
    reduction over a reshaped axis would be shorter and gives wrong gradients under jit after
    BatchNorm.

    Args:
      x: `[batch, a, ..., channels]`, such as `[batch, frames, bands, channels]`.
      window: the extent, and the stride, along each axis between the batch and the channels.

    Returns:
      `[batch, a // window[0], ..., channels]`.
    """
    batch, *extents, channels = x.shape
    pairs = [(extent // size, size) for extent, size in zip(extents, window, strict=True)]
    x = x[(slice(None), *(slice(length * size) for length, size in pairs))]
    x = x.reshape(batch, *itertools.chain(*pairs), channels)
    # Row by row through the window, so that the first of equal values wins.
    positions = itertools.product(*map(range, window))
    every = slice(None)
    return _tournament([x[(every, *(i for at in p for i in (every, at)))] for p in positions])


@jax.named_scope("max_pool")
def max_pool_overlapping(x: jax.Array) -> jax.Array:
    """`nn.max_pool` of 3 x 3 windows, stride 2 and padding 1, by the tournament of `max_pool`.

    `[batch, frames, bands, channels]` to `[batch, ceil(frames / 2), ceil(bands / 2), channels]`.
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


@jax.named_scope("global_max")
def global_max(x: jax.Array) -> jax.Array:
    """Tournament over all positions, `[batch, ..., channels]` to `[batch, channels]`."""
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
    def __call__(  # type: ignore[override]
        self, x: jax.Array, *, plus: jax.Array | None = None, relu: bool = False
    ) -> jax.Array:
        """Normalises `x`, then adds `plus`, of its shape, then applies ReLU, where given."""
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


def batch_norm(train: bool, dtype: Any, name: str | None = None, **fields: Any) -> BatchNorm:
    """Batch normalisation with a momentum of 0.9, or other `fields` of `nn.BatchNorm`.

    Its statistics are those of the global batch: by sharding under jit, by an interceptor under
    pmap.
    """
    return BatchNorm(not train, dtype=dtype, name=name, **{"momentum": 0.9} | fields)


def musicnn_norm(x: jax.Array, train: bool, dtype: Any, name: str) -> jax.Array:
    """The batch normalisation of musicnn's public code, whose epsilon is .001."""
    return nn.BatchNorm(not train, momentum=0.99, epsilon=1e-3, dtype=dtype, name=name)(x)


def check_field(model: str, fields: Mapping[str, Any], name: str, valid: bool, rule: str) -> None:
    """Raises UserError, "model.<name>=<value> of <model> must <rule>.", if not `valid`."""
    if not valid:
        raise UserError(f"model.{name}={fields[name]!r} of {model!r} must {rule}.")


def check_lengths(model: str, fields: Mapping[str, Any], *names: str) -> None:
    """Raises UserError where fields with one value per layer differ in length or are empty."""
    lengths = {len(fields[name]) for name in names}
    if len(lengths) > 1 or 0 in lengths:
        values = ", ".join(f"model.{name}={tuple(fields[name])}" for name in names)
        raise UserError(f"model {model!r}: {values} must have the same length, one per layer.")
