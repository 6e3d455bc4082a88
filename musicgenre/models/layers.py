"""Layers that several models share."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.errors import UserError


class Conv(nn.Module):
    """A convolution over frames and bands, with `nn.Conv`'s parameters, whose training step is fast on a CPU.

    The fast products of `fast_conv` serve training alone, in float32, on a single CPU device, for 32 filters and more; compiling
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
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `[batch, ceil(frames / stride), ceil(bands / stride), features]` of `x` `[batch, frames, bands, channels]`."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        fast = (
            self.train
            and x.dtype == jnp.float32
            and self.features >= _LEAST_FEATURES
            and jax.default_backend() == "cpu"
            and jax.device_count() == 1
        )
        y = (fast_conv if fast else lax_conv)(x, kernel, self.stride)
        return y if bias is None else y + bias


def lax_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """XLA's convolution of `x` `[batch, frames, bands, in]` and `kernel` `[size, size, in, out]`; `size - 1` zeros go around."""
    pad = ((kernel.shape[0] - 1) // 2, kernel.shape[0] // 2)
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fast_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`lax_conv` with products that suit a CPU, where XLA's gradients of convolutions run at a third of its matrix rate.

    - 3 x 3 of stride 1: Winograd's F(2 x 2, 3 x 3), 16 products for 36, forward and for both gradients. Clip by clip, so that
      the transformed tiles stay in the cache. Its relative error in float32 is some 5e-7.
    - gradients of stride 2 and of 1 x 1: a matrix product for each place of the kernel.
    - gradients of a single channel: one product with the shifted inputs.

    It differentiates once, in reverse, which is what training does.

    Source: A. Lavin, S. Gray, "Fast algorithms for convolutional neural networks", 2015, arXiv:1509.09308.

    Args:
      x: float32 `[batch, frames, bands, in]`.
      kernel: `[size, size, in, out]`.
      stride: 1 or more.
    """
    return _winograd(x, kernel) if _suits_winograd(x, kernel, stride) else lax_conv(x, kernel, stride)


def _fast_conv_forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return fast_conv(x, kernel, stride), (x, kernel)


def _fast_conv_backward(stride: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    size = kernel.shape[0]
    if _suits_winograd(x, kernel, stride):
        dx = _winograd(dy, kernel[::-1, ::-1].swapaxes(2, 3))
        gradient = _winograd_kernel_gradient(x, dy)
    elif kernel.shape[2] == 1 or size == 1 or stride == 2:
        dx = _input_gradient(dy, kernel, stride, x.shape)
        of_kernel = _one_channel_kernel_gradient if kernel.shape[2] == 1 else _kernel_gradient
        gradient = of_kernel(x, dy, size, stride)
    else:
        dx, gradient = jax.vjp(functools.partial(lax_conv, stride=stride), x, kernel)[1](dy)
    return dx, gradient


fast_conv.defvjp(_fast_conv_forward, _fast_conv_backward)

# Fewest filters of a layer for which it is worth the compiling.
_LEAST_FEATURES = 32
# Fewest tiles of 2 x 2 of a batch for which the transformed kernel, 16 numbers for 9, is worth reading.
_LEAST_TILES = 64
# Tiles of one turn: several small clips are taken together.
_TILES = 512


def _suits_winograd(x: jax.Array, kernel: jax.Array, stride: int) -> bool:
    batch, frames, bands, _ = x.shape
    size, _, inputs, outputs = kernel.shape
    return size == 3 and stride == 1 and min(inputs, outputs) >= 16 and batch * frames * bands >= 4 * _LEAST_TILES


def _turns(x: jax.Array, positions: int) -> jax.Array:
    """Cuts `[batch, ...]` into `[turns, clips, ...]`: as many clips of `positions` each as `_TILES` allows, and at least one."""
    batch = x.shape[0]
    fitting = [count for count in range(1, batch + 1) if batch % count == 0 and count * positions <= _TILES]
    return x.reshape(-1, max(fitting, default=1), *x.shape[1:])


def _both_ways(function: Callable[[list[jax.Array]], list[jax.Array]], tile: list[list[jax.Array]]) -> list[list[jax.Array]]:
    """Applies a linear function to the rows of a tile and then to its columns."""
    rows = [function(row) for row in tile]
    columns = [function(list(column)) for column in zip(*rows, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def _input_tiles(x: jax.Array) -> list[list[jax.Array]]:
    """Winograd's transform of the overlapping 4 x 4 tiles of `x`: 4 x 4 arrays `[tiles, channels]`."""
    clips, frames, bands, channels = x.shape
    rows, columns = -(-frames // 2), -(-bands // 2)
    x = jnp.pad(x, ((0, 0), (1, 2 * rows + 1 - frames), (1, 2 * columns + 1 - bands), (0, 0)))
    x = x.reshape(clips, rows + 1, 2, columns + 1, 2, channels)
    tile = [[x[:, i // 2 : i // 2 + rows, i % 2, j // 2 : j // 2 + columns, j % 2] for j in range(4)] for i in range(4)]
    tile = _both_ways(lambda d: [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]], tile)
    return [[place.reshape(-1, channels) for place in row] for row in tile]


def _winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`lax_conv(x, kernel, 1)` of a kernel of 3 x 3."""
    batch, frames, bands, _ = x.shape
    outputs = kernel.shape[3]
    rows, columns = -(-frames // 2), -(-bands // 2)
    weights = _both_ways(
        lambda g: [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]],
        [[kernel[i, j] for j in range(3)] for i in range(3)],
    )

    def turn(x: jax.Array) -> jax.Array:
        tile = [[d @ g for d, g in zip(*pair, strict=True)] for pair in zip(_input_tiles(x), weights, strict=True)]
        tile = _both_ways(lambda m: [m[0] + m[1] + m[2], m[1] - m[2] - m[3]], tile)
        tile = [[place.reshape(-1, rows, columns, outputs) for place in row] for row in tile]
        y = jnp.stack([jnp.stack(row, axis=3) for row in tile], axis=2)
        return y.reshape(-1, 2 * rows, 2 * columns, outputs)[:, :frames, :bands]

    return jax.lax.map(turn, _turns(x, rows * columns)).reshape(batch, frames, bands, outputs)


def _winograd_kernel_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The kernel's gradient of `_winograd`: its transposed transforms, so as many products."""
    _, frames, bands, inputs = x.shape
    outputs = dy.shape[3]
    rows, columns = -(-frames // 2), -(-bands // 2)

    def turn(total: list[list[jax.Array]], both: tuple[jax.Array, jax.Array]) -> tuple[list[list[jax.Array]], None]:
        x, dy = both
        dy = jnp.pad(dy, ((0, 0), (0, 2 * rows - frames), (0, 2 * columns - bands), (0, 0)))
        dy = dy.reshape(-1, rows, 2, columns, 2, outputs)
        tile = [[dy[:, :, i, :, j].reshape(-1, outputs) for j in range(2)] for i in range(2)]
        tile = _both_ways(lambda y: [y[0], y[0] + y[1], y[0] - y[1], -y[1]], tile)
        triples = [list(zip(*row, strict=True)) for row in zip(total, _input_tiles(x), tile, strict=True)]
        return [[t + _rows_product(d, e) for t, d, e in row] for row in triples], None

    zero = jnp.zeros((inputs, outputs), x.dtype)
    turns = (_turns(x, rows * columns), _turns(dy, rows * columns))
    total, _ = jax.lax.scan(turn, [[zero] * 4 for _ in range(4)], turns)
    kernel = _both_ways(lambda u: [u[0] + (u[1] + u[2]) / 2, (u[1] - u[2]) / 2, (u[1] + u[2]) / 2 + u[3]], total)
    return jnp.stack([jnp.stack(row) for row in kernel])


def _rows_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a.T @ b`, the sum over the rows of both."""
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())))


def _shifted(x: jax.Array, size: int, stride: int) -> list[list[jax.Array]]:
    """What each place of a kernel sees: `size` x `size` arrays `[clips, frames of the result, bands of the result, channels]`."""
    clips, frames, bands, channels = x.shape
    rows, columns = -(-frames // stride), -(-bands // stride)
    pad = ((size - 1) // 2, size // 2)
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))

    def place(i: int, j: int) -> jax.Array:
        ends = (clips, i + stride * (rows - 1) + 1, j + stride * (columns - 1) + 1, channels)
        return jax.lax.slice(x, (0, i, j, 0), ends, (1, stride, stride, 1))

    return [[place(i, j) for j in range(size)] for i in range(size)]


def _kernel_gradient(x: jax.Array, dy: jax.Array, size: int, stride: int) -> jax.Array:
    """The kernel's gradient of `lax_conv`, by a product for each place of the kernel."""
    inputs, outputs = x.shape[3], dy.shape[3]

    def turn(total: list[list[jax.Array]], both: tuple[jax.Array, jax.Array]) -> tuple[list[list[jax.Array]], None]:
        x, dy = both
        pairs = [list(zip(*row, strict=True)) for row in zip(total, _shifted(x, size, stride), strict=True)]
        dy = dy.reshape(-1, outputs)
        return [[t + _rows_product(s.reshape(-1, inputs), dy) for t, s in row] for row in pairs], None

    zero = jnp.zeros((inputs, outputs), x.dtype)
    positions = dy.shape[1] * dy.shape[2]
    total, _ = jax.lax.scan(turn, [[zero] * size for _ in range(size)], (_turns(x, positions), _turns(dy, positions)))
    return jnp.stack([jnp.stack(row) for row in total])


def _one_channel_kernel_gradient(x: jax.Array, dy: jax.Array, size: int, stride: int) -> jax.Array:
    """The kernel's gradient of `lax_conv` for one input channel, by one product over all positions."""
    shifted = jnp.stack([place.reshape(-1) for row in _shifted(x, size, stride) for place in row])
    return (shifted @ dy.reshape(-1, dy.shape[3])).reshape(size, size, 1, dy.shape[3])


def _input_gradient(dy: jax.Array, kernel: jax.Array, stride: int, shape: tuple[int, ...]) -> jax.Array:
    """The gradient of `lax_conv`'s input, `shape`, by a product for each place of the kernel."""
    _, frames, bands, channels = shape
    size = kernel.shape[0]
    pad = (size - 1) // 2
    # Rows and columns of the padded input, in steps of the stride.
    rows, columns = -(-(frames + size - 1) // stride), -(-(bands + size - 1) // stride)

    def turn(dy: jax.Array) -> jax.Array:
        phases = [[[] for _ in range(stride)] for _ in range(stride)]  # type: list[list[list[jax.Array]]]
        if channels == 1:
            # One product reads dy once.
            flat = kernel.reshape(size * size, -1) @ dy.reshape(-1, dy.shape[3]).T
            parts = list(flat.reshape(size * size, *dy.shape[:3], 1))
        else:
            parts = [dy @ kernel[i, j].T for i in range(size) for j in range(size)]
        for (i, j), part in zip(itertools.product(range(size), repeat=2), parts, strict=True):
            first, second = i // stride, j // stride
            ends = (rows - first - dy.shape[1], columns - second - dy.shape[2])
            phases[i % stride][j % stride].append(jnp.pad(part, ((0, 0), (first, ends[0]), (second, ends[1]), (0, 0))))
        nothing = jnp.zeros((dy.shape[0], rows, columns, channels), dy.dtype)
        summed = [[sum(phase[1:], phase[0]) if phase else nothing for phase in row] for row in phases]
        dx = jnp.stack([jnp.stack(row, axis=3) for row in summed], axis=2)
        return dx.reshape(-1, rows * stride, columns * stride, channels)[:, pad : pad + frames, pad : pad + bands]

    return jax.lax.map(turn, _turns(dy, dy.shape[1] * dy.shape[2])).reshape(shape)


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
        even, odd = jnp.moveaxis(jnp.pad(x, fill, constant_values=-jnp.inf).reshape(shape), axis + 1, 0)
        shift = [(1, 0) if i == axis else (0, 0) for i in range(x.ndim)]
        before = jax.lax.slice_in_dim(jnp.pad(odd, shift, constant_values=-jnp.inf), 0, length, axis=axis)
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
