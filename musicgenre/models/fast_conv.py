"""Convolution and batch normalisation for training on a single CPU device in float32.

On a CPU, XLA's gradients of convolutions run at a third of its matrix rate and its convolutions of
a few positions at a hundredth, and every array kept for the gradients costs new pages of memory.
The layers of `musicgenre.models.layers` use this module where it is switched on by `set_enabled`.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# Fewest 2 x 2 tiles of a batch for which the transformed kernel, 16 numbers for 9, pays.
_LEAST_TILES = 64
# Positions computed at a time: several small clips are taken together.
_POSITIONS = 512

# Winograd's transforms in one dimension: of four inputs, of a kernel of three, and of four products
# to two results.
_OF_INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_OF_KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OF_PRODUCTS = ((1, 1, 1, 0), (0, 1, -1, -1))

Arrays = Sequence[Array]

_enabled = False

# a @ b.T and a.T @ b
_rows_product = functools.partial(jax.lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())))
_columns_product = functools.partial(
    jax.lax.dot_general, dimension_numbers=(((0,), (0,)), ((), ()))
)


def set_enabled(enabled: bool) -> None:
    """Switches the fast products on or off for what is traced from now on; they are off at first.

    Training switches them on where it runs on exactly one CPU device.
    """
    global _enabled
    _enabled = enabled


def is_enabled() -> bool:
    """Returns whether the fast products are on."""
    return _enabled


def lax_conv(x: Array, kernel: Array, stride: int) -> Array:
    """XLA's convolution of `x` `[batch, frames, bands, in]` and `kernel` `[size, size, in, out]`.

    The input is padded by `size - 1` zeros in each direction.
    """
    pad = ((kernel.shape[0] - 1) // 2, kernel.shape[0] // 2)
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fast_convs(x: Array, kernels: tuple[Array, ...], stride: int) -> tuple[Array, ...]:
    """`lax_conv` of one input and each of several kernels of one shape, forward and backward.

    - 3 x 3 of stride 1: Winograd's F(2 x 2, 3 x 3), 16 products instead of 36. Its relative error
      in float32 is about 5e-7.
    - One input channel: XLA's convolution; one product with the shifted inputs for the gradient.
    - Otherwise one product of all kernels with the input patches, which are laid out in rows.

    A few clips are computed at a time, so that intermediate arrays stay in the cache. It can be
    differentiated once, in reverse.

    Source: A. Lavin, S. Gray, "Fast algorithms for convolutional neural networks", 2015,
    arXiv:1509.09308.

    Args:
      x: float32 `[batch, frames, bands, in]`.
      kernels: `[size, size, in, out]` each.
      stride: 1 or more.

    Returns:
      `[batch, ceil(frames / stride), ceil(bands / stride), out]` for each kernel.
    """
    if _suits_winograd(x, kernels[0], stride):
        return tuple(_winograd(x, kernel) for kernel in kernels)
    if x.shape[3] == 1:
        return tuple(lax_conv(x, kernel, stride) for kernel in kernels)
    return _rows_conv(x, kernels, stride)


def _forward(x: Array, kernels: tuple[Array, ...], stride: int) -> tuple:
    return fast_convs(x, kernels, stride), (x, kernels)


def _backward(stride: int, saved: tuple, dys: tuple[Array, ...]) -> tuple:
    x, kernels = saved
    if _suits_winograd(x, kernels[0], stride):
        pairs = [_winograd_gradients(x, *pair) for pair in zip(kernels, dys, strict=True)]
    elif x.shape[3] == 1:
        pairs = [_one_channel_gradients(x, *p, stride) for p in zip(kernels, dys, strict=True)]
    else:
        return _rows_gradients(x, kernels, stride, dys)
    return sum((dx for dx, _ in pairs[1:]), pairs[0][0]), tuple(gradient for _, gradient in pairs)


fast_convs.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def fast_norm(
    x: Array, scale: Array, offset: Array, plus: Array | None, relu: bool, epsilon: float
) -> tuple[Array, Array, Array]:
    """Batch normalisation of `[..., channels]` over all axes but the last, and what follows it.

    Adds `plus`, of the shape of `x`, where given, and then applies ReLU if `relu`. Only `x` and the
    result are kept for the gradient. Flax's also keeps the differences from the mean and the signs
    of ReLU's inputs.

    Returns:
      The result, and the mean and the variance, `[channels]`.
    """
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    variance = jnp.maximum(0.0, (x * x).mean(axes) - mean * mean)
    y = (x - mean) * (jax.lax.rsqrt(variance + epsilon) * scale) + offset
    y = y if plus is None else y + plus
    return jnp.maximum(y, 0.0) if relu else y, mean, variance


def _norm_forward(x: Array, scale: Array, offset: Array, plus: Array | None, *rest: Any) -> tuple:
    y, mean, variance = fast_norm(x, scale, offset, plus, *rest)
    relu = rest[0]
    return (y, mean, variance), (x, scale, mean, variance, y if relu else None, plus is None)


def _norm_backward(relu: bool, epsilon: float, saved: tuple, cotangents: tuple) -> tuple:
    x, scale, mean, variance, y, alone = saved
    dy, dmean, dvariance = cotangents
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    if relu:
        dy = jnp.where(y > 0, dy, 0.0)
    inverse = jax.lax.rsqrt(variance + epsilon)
    total, moment = dy.sum(axes), (dy * (x - mean)).sum(axes)
    # The mean and the variance are results, and the first result depends on them.
    of_mean = (dmean - inverse * scale * total) / count
    of_variance = (2 * dvariance - inverse**3 * scale * moment) / count
    dx = inverse * scale * dy + of_mean + (x - mean) * of_variance
    return dx, inverse * moment, total, None if alone else dy


fast_norm.defvjp(_norm_forward, _norm_backward)


def _suits_winograd(x: Array, kernel: Array, stride: int) -> bool:
    batch, frames, bands, _ = x.shape
    size, _, inputs, outputs = kernel.shape
    enough = min(inputs, outputs) >= 16 and batch * frames * bands >= 4 * _LEAST_TILES
    return size == 3 and stride == 1 and enough


def _some_clips_at_a_time(
    compute: Callable[[Arrays, Arrays], tuple[Arrays, Arrays]],
    arrays: Arrays,
    positions: int,
    shapes: Sequence[tuple[int, ...]] = (),
    sums: Arrays = (),
) -> tuple[Arrays, Arrays]:
    """Computes results of `shapes` and sums over a batch, about `_POSITIONS` at a time.

    `compute` takes some clips of each array and the sums so far, and returns the same clips of each
    result and the new sums. A clip has `positions`.
    """
    batch = arrays[0].shape[0]
    divisors = [count for count in range(1, batch + 1) if batch % count == 0]
    clips = max((count for count in divisors if count * positions <= _POSITIONS), default=1)
    if clips == batch:
        return compute(arrays, sums)

    def body(number: Array, carry: tuple[Arrays, Arrays]) -> tuple[Arrays, Arrays]:
        results, sums = carry
        start = number * clips
        parts = [jax.lax.dynamic_slice_in_dim(array, start, clips) for array in arrays]
        new, sums = compute(parts, sums)
        update = jax.lax.dynamic_update_slice_in_dim
        return [update(*pair, start, 0) for pair in zip(results, new, strict=True)], sums

    # XLA shares zeros between loops and then copies them for each, so each loop begins with a
    # number that no other does.
    empty = [jnp.broadcast_to(arrays[0].reshape(-1)[i], shape) for i, shape in enumerate(shapes)]
    return jax.lax.fori_loop(0, batch // clips, body, (empty, sums))


def _transform(matrix: Iterable[Sequence[float]], tile: Iterable[Arrays]) -> list[Array]:
    """Transforms the rows of a tile and then its columns by a matrix; returns them row by row."""
    matrix = list(matrix)

    def product(parts: Arrays) -> list[Array]:
        scaled = (
            [a if c == 1 else c * a for c, a in zip(line, parts, strict=True) if c]
            for line in matrix
        )
        return [functools.reduce(jnp.add, line) for line in scaled]

    rows = [product(row) for row in tile]
    columns = [product(column) for column in zip(*rows, strict=True)]
    return [array for row in zip(*columns, strict=True) for array in row]


def _input_tiles(x: Array) -> list[Array]:
    """Returns the transformed overlapping 4 x 4 tiles of `x`: 16 arrays `[tiles, channels]`."""
    clips, frames, bands, channels = x.shape
    rows, columns = -(-frames // 2), -(-bands // 2)
    x = jnp.pad(x, ((0, 0), (1, 2 * rows + 1 - frames), (1, 2 * columns + 1 - bands), (0, 0)))
    x = x.reshape(clips, rows + 1, 2, columns + 1, 2, channels)
    tile = [
        [x[:, i // 2 : i // 2 + rows, i % 2, j // 2 : j // 2 + columns, j % 2] for j in range(4)]
        for i in range(4)
    ]
    return [array.reshape(-1, channels) for array in _transform(_OF_INPUT, tile)]


def _winograd(x: Array, kernel: Array, *, swapped: bool = False) -> Array:
    """`lax_conv(x, kernel, 1)` of a 3 x 3 kernel; `swapped` exchanges its inputs and outputs."""
    batch, frames, bands, _ = x.shape
    outputs = kernel.shape[2 if swapped else 3]
    # Swapping the kernel's axes would slow its transform: XLA keeps the layout and reads across it.
    product = _rows_product if swapped else jnp.matmul
    rows, columns = -(-frames // 2), -(-bands // 2)
    weights = _transform(_OF_KERNEL, [list(row) for row in kernel])

    def compute(parts: Arrays, sums: Arrays) -> tuple[Arrays, Arrays]:
        pairs = zip(_input_tiles(parts[0]), weights, strict=True)
        products = [product(*pair).reshape(-1, rows, columns, outputs) for pair in pairs]
        tile = _transform(_OF_PRODUCTS, [products[i : i + 4] for i in range(0, 16, 4)])
        y = jnp.stack([jnp.stack(tile[i : i + 2], axis=3) for i in (0, 2)], axis=2)
        return [y.reshape(-1, 2 * rows, 2 * columns, outputs)[:, :frames, :bands]], sums

    shape = (batch, frames, bands, outputs)
    return _some_clips_at_a_time(compute, [x], rows * columns, [shape])[0][0]


def _winograd_gradients(x: Array, kernel: Array, dy: Array) -> tuple:
    """The gradients of `_winograd`: the input's is another, the kernel's uses the transposes."""
    frames, bands, inputs = x.shape[1:]
    outputs = dy.shape[3]
    rows, columns = -(-frames // 2), -(-bands // 2)

    def compute(parts: Arrays, sums: Arrays) -> tuple[Arrays, Arrays]:
        x, dy = parts
        dy = jnp.pad(dy, ((0, 0), (0, 2 * rows - frames), (0, 2 * columns - bands), (0, 0)))
        dy = dy.reshape(-1, rows, 2, columns, 2, outputs)
        tile = [[dy[:, :, i, :, j].reshape(-1, outputs) for j in range(2)] for i in range(2)]
        products = _transform(zip(*_OF_PRODUCTS, strict=True), tile)
        triples = zip(sums, _input_tiles(x), products, strict=True)
        return [], [total + _columns_product(d, e) for total, d, e in triples]

    zeros = [jnp.zeros((inputs, outputs), x.dtype)] * 16
    _, sums = _some_clips_at_a_time(compute, [x, dy], rows * columns, sums=zeros)
    rows_of_four = [sums[i : i + 4] for i in range(0, 16, 4)]
    gradient = jnp.stack(_transform(zip(*_OF_KERNEL, strict=True), rows_of_four))
    # The kernel's gradient first, after which the input's may reuse dy's memory.
    dy, gradient = jax.lax.optimization_barrier((dy, gradient.reshape(kernel.shape)))
    return _winograd(dy, kernel[::-1, ::-1], swapped=True), gradient


def _shifted(x: Array, size: int, stride: int) -> list[Array]:
    """Returns `x` under each of the kernel's positions, `[clips, rows, columns, channels]` each."""
    rows, columns = (stride * (-(-extent // stride) - 1) + 1 for extent in x.shape[1:3])
    pad = ((size - 1) // 2, size // 2)
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
    positions = itertools.product(range(size), repeat=2)
    return [x[:, i : i + rows : stride, j : j + columns : stride] for i, j in positions]


def _patches(x: Array, size: int, stride: int) -> Array:
    """Returns the input of a filter at each position, `[positions, size * size * channels]`."""
    rows = jnp.concatenate(_shifted(x, size, stride), axis=3)
    return rows.reshape(-1, rows.shape[3])


def _rows_conv(x: Array, kernels: tuple[Array, ...], stride: int) -> tuple[Array, ...]:
    """`lax_conv` by one product."""
    batch, frames, bands, _ = x.shape
    size, outputs = kernels[0].shape[0], kernels[0].shape[3]
    rows, columns = -(-frames // stride), -(-bands // stride)

    def compute(parts: Arrays, sums: Arrays) -> tuple[Arrays, Arrays]:
        patches = _patches(parts[0], size, stride)
        products = [patches @ kernel.reshape(-1, outputs) for kernel in kernels]
        return [product.reshape(-1, rows, columns, outputs) for product in products], sums

    shapes = [(batch, rows, columns, outputs)] * len(kernels)
    return tuple(_some_clips_at_a_time(compute, [x], rows * columns, shapes)[0])


def _rows_gradients(x: Array, kernels: Arrays, stride: int, dys: Arrays) -> tuple:
    """The gradients of `_rows_conv`, by one product each."""
    size, _, inputs, outputs = kernels[0].shape
    rows, columns = dys[0].shape[1:3]
    kernel = jnp.concatenate([kernel.reshape(-1, outputs) for kernel in kernels], axis=1)

    def compute(parts: Arrays, sums: Arrays) -> tuple[Arrays, Arrays]:
        x, *dys = parts
        dy = jnp.concatenate([dy.reshape(-1, outputs) for dy in dys], axis=1)
        patches = _rows_product(dy, kernel).reshape(-1, rows, columns, size * size * inputs)
        total = sums[0] + jax.lax.optimization_barrier(dy.T) @ _patches(x, size, stride)
        return [_unshifted(patches, stride, x.shape)], [total]

    zeros = [jnp.zeros((outputs * len(kernels), size * size * inputs), x.dtype)]
    (dx,), (total,) = _some_clips_at_a_time(compute, [x, *dys], rows * columns, [x.shape], zeros)
    gradients = total.T.reshape(size, size, inputs, len(kernels), outputs)
    return dx, tuple(gradients[:, :, :, i] for i in range(len(kernels)))


def _unshifted(patches: Array, stride: int, shape: tuple[int, ...]) -> Array:
    """Sums patches, `[clips, rows, columns, size * size * channels]`, into an input of `shape`."""
    clips, frames, bands, channels = shape
    size = round((patches.shape[3] // channels) ** 0.5)
    pad = (size - 1) // 2
    # Rows and columns of the padded input, in steps of the stride.
    rows, columns = -(-(frames + size - 1) // stride), -(-(bands + size - 1) // stride)
    nothing = jnp.zeros((clips, rows, columns, channels), patches.dtype)

    def phase(*start: int) -> Array:
        """Sums the patches of the kernel's positions from `start` in steps of the stride."""
        padded = []
        for i, j in itertools.product(*(range(at, size, stride) for at in start)):
            part = patches[..., (i * size + j) * channels : (i * size + j + 1) * channels]
            first, second = i // stride, j // stride
            ends = (rows - first - part.shape[1], columns - second - part.shape[2])
            pads = ((0, 0), (first, ends[0]), (second, ends[1]), (0, 0))
            padded.append(jnp.pad(part, pads))
        return functools.reduce(jnp.add, padded) if padded else nothing

    steps = range(stride)
    dx = jnp.stack([jnp.stack([phase(i, j) for j in steps], axis=3) for i in steps], axis=2)
    dx = dx.reshape(clips, rows * stride, columns * stride, channels)
    return dx[:, pad : pad + frames, pad : pad + bands]


def _one_channel_gradients(x: Array, kernel: Array, dy: Array, stride: int) -> tuple:
    """The gradients of `lax_conv` for one input channel, by one product each."""
    size, outputs = kernel.shape[0], kernel.shape[3]
    rows, columns = dy.shape[1:3]

    # Two loops, since the input's gradient is rarely used.
    def of_input(parts: Arrays, sums: Arrays) -> tuple[Arrays, Arrays]:
        patches = kernel.reshape(-1, outputs) @ parts[0].reshape(-1, outputs).T
        patches = jnp.moveaxis(patches.reshape(size * size, -1, rows, columns), 0, 3)
        return [_unshifted(patches, stride, (patches.shape[0], *x.shape[1:]))], sums

    def of_kernel(parts: Arrays, sums: Arrays) -> tuple[Arrays, Arrays]:
        shifted = jnp.stack([part.reshape(-1) for part in _shifted(parts[0], size, stride)])
        return [], [sums[0] + shifted @ parts[1].reshape(-1, outputs)]

    results, _ = _some_clips_at_a_time(of_input, [dy], rows * columns, [x.shape])
    zeros = [jnp.zeros((size * size, outputs), x.dtype)]
    _, sums = _some_clips_at_a_time(of_kernel, [x, dy], rows * columns, sums=zeros)
    return results[0], sums[0].reshape(kernel.shape)
