"""Convolution and batch normalisation as a CPU likes them: what `layers` trains with in float32 on a single CPU device.

XLA's gradients of convolutions run at a third of its matrix rate there, its convolutions of a few positions at a hundredth,
and every array that is kept for the gradients costs as much in new pages of memory as in work.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

# Fewest tiles of 2 x 2 of a batch for which the transformed kernel, 16 numbers for 9, is worth reading.
_LEAST_TILES = 64
# Positions of one turn: several small clips are taken together.
_POSITIONS = 512

# Winograd's transforms in one dimension: of four inputs, of a kernel of three, and of four products to two results.
_OF_INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_OF_KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OF_PRODUCTS = ((1, 1, 1, 0), (0, 1, -1, -1))

Parts = Sequence[jax.Array]


def lax_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """XLA's convolution of `x` `[batch, frames, bands, in]` and `kernel` `[size, size, in, out]`; `size - 1` zeros go around."""
    pad = ((kernel.shape[0] - 1) // 2, kernel.shape[0] // 2)
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fast_convs(x: jax.Array, kernels: tuple[jax.Array, ...], stride: int) -> tuple[jax.Array, ...]:
    """`lax_conv` of one input and each of several kernels of one shape, forward and backward.

    - 3 x 3 of stride 1: Winograd's F(2 x 2, 3 x 3), 16 products for 36. Its relative error in float32 is some 5e-7.
    - one input channel: XLA's convolution, and as the kernel's gradient one product with the shifted inputs.
    - the rest: what a filter sees side by side in a row, and one product with all kernels.

    Clip by clip, so that what is laid out anew stays in the cache, and with one pass over a clip for both gradients.

    It differentiates once, in reverse, which is what training does.

    Source: A. Lavin, S. Gray, "Fast algorithms for convolutional neural networks", 2015, arXiv:1509.09308.

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


def _forward(
    x: jax.Array, kernels: tuple[jax.Array, ...], stride: int
) -> tuple[tuple[jax.Array, ...], tuple]:
    return fast_convs(x, kernels, stride), (x, kernels)


def _backward(
    stride: int, saved: tuple, dys: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x, kernels = saved
    if _suits_winograd(x, kernels[0], stride):
        pairs = [
            _winograd_gradients(x, kernel, dy) for kernel, dy in zip(kernels, dys, strict=True)
        ]
    elif x.shape[3] == 1:
        pairs = [
            _one_channel_gradients(x, kernel, stride, dy)
            for kernel, dy in zip(kernels, dys, strict=True)
        ]
    else:
        return _rows_gradients(x, kernels, stride, dys)
    return sum((dx for dx, _ in pairs[1:]), pairs[0][0]), tuple(gradient for _, gradient in pairs)


fast_convs.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def fast_norm(
    x: jax.Array,
    scale: jax.Array,
    offset: jax.Array,
    plus: jax.Array | None,
    relu: bool,
    epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch normalisation over all axes but the last, and what follows it.

    No more is kept for the gradient than `x` and the result. Flax's keeps the differences from the mean as well, and ReLU which
    of its inputs are positive.

    Args:
      x: float32 `[..., channels]`.
      scale: `[channels]`.
      offset: `[channels]`.
      plus: what is added to the normalised, of `x`'s shape; None is nothing.
      relu: apply ReLU in the end.
      epsilon: is added to the variance.

    Returns:
      The result, and the mean and the variance, `[channels]`.
    """
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    variance = jnp.maximum(0.0, (x * x).mean(axes) - mean * mean)
    y = (x - mean) * (jax.lax.rsqrt(variance + epsilon) * scale) + offset
    y = y if plus is None else y + plus
    return jnp.maximum(y, 0.0) if relu else y, mean, variance


def _norm_forward(
    x: jax.Array,
    scale: jax.Array,
    offset: jax.Array,
    plus: jax.Array | None,
    relu: bool,
    epsilon: float,
) -> tuple:
    y, mean, variance = fast_norm(x, scale, offset, plus, relu, epsilon)
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
    # Of the mean and the variance as results, and as what the result depends on.
    of_mean = (dmean - inverse * scale * total) / count
    of_variance = (2 * dvariance - inverse**3 * scale * moment) / count
    dx = inverse * scale * dy + of_mean + (x - mean) * of_variance
    return dx, inverse * moment, total, None if alone else dy


fast_norm.defvjp(_norm_forward, _norm_backward)


def _suits_winograd(x: jax.Array, kernel: jax.Array, stride: int) -> bool:
    batch, frames, bands, _ = x.shape
    size, _, inputs, outputs = kernel.shape
    return (
        size == 3
        and stride == 1
        and min(inputs, outputs) >= 16
        and batch * frames * bands >= 4 * _LEAST_TILES
    )


def _by_turns(
    turn: Callable[[Parts, Parts], tuple[Parts, Parts]],
    arrays: Parts,
    positions: int,
    shapes: Sequence[tuple[int, ...]],
    sums: Parts,
) -> tuple[Parts, Parts]:
    """Takes some clips at a time, as many as `_POSITIONS` allows and at least one.

    Args:
      turn: takes the clips of each array, and the sums so far; returns the clips of each result, and the sums.
      arrays: `[batch, ...]` each.
      positions: of a clip.
      shapes: of each result, `[batch, ...]`.
      sums: what they begin with.

    Returns:
      The results and the sums.
    """
    batch = arrays[0].shape[0]
    fitting = [
        count
        for count in range(1, batch + 1)
        if batch % count == 0 and count * positions <= _POSITIONS
    ]
    clips = max(fitting, default=1)
    if clips == batch:
        return turn(arrays, sums)

    def body(number: jax.Array, carry: tuple[Parts, Parts]) -> tuple[Parts, Parts]:
        results, sums = carry
        parts = [jax.lax.dynamic_slice_in_dim(array, number * clips, clips) for array in arrays]
        news, sums = turn(parts, sums)
        pairs = zip(results, news, strict=True)
        return [
            jax.lax.dynamic_update_slice_in_dim(result, new, number * clips, 0)
            for result, new in pairs
        ], sums

    # XLA shares zeros between loops and then copies them for each; this is a number that no other loop begins with.
    empty = [jnp.broadcast_to(arrays[0].reshape(-1)[i], shape) for i, shape in enumerate(shapes)]
    return jax.lax.fori_loop(0, batch // clips, body, (empty, sums))


# Winograd


def _both_ways(
    matrix: Sequence[Sequence[float]], tile: list[list[jax.Array]]
) -> list[list[jax.Array]]:
    """Transforms the rows of a tile and then its columns by a matrix of few numbers."""

    def product(parts: Sequence[jax.Array]) -> list[jax.Array]:
        scaled = [
            [a if c == 1 else c * a for c, a in zip(line, parts, strict=True) if c]
            for line in matrix
        ]
        return [functools.reduce(jnp.add, line) for line in scaled]

    rows = [product(row) for row in tile]
    columns = [product(column) for column in zip(*rows, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def _transposed(matrix: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    return list(zip(*matrix, strict=True))


def _input_tiles(x: jax.Array) -> list[jax.Array]:
    """The transformed overlapping 4 x 4 tiles of `x`: 16 arrays `[tiles, channels]`."""
    clips, frames, bands, channels = x.shape
    rows, columns = -(-frames // 2), -(-bands // 2)
    x = jnp.pad(x, ((0, 0), (1, 2 * rows + 1 - frames), (1, 2 * columns + 1 - bands), (0, 0)))
    x = x.reshape(clips, rows + 1, 2, columns + 1, 2, channels)
    tile = [
        [x[:, i // 2 : i // 2 + rows, i % 2, j // 2 : j // 2 + columns, j % 2] for j in range(4)]
        for i in range(4)
    ]
    return [place.reshape(-1, channels) for row in _both_ways(_OF_INPUT, tile) for place in row]


def _winograd(x: jax.Array, kernel: jax.Array, *, turned: bool = False) -> jax.Array:
    """`lax_conv(x, kernel, 1)` of a kernel of 3 x 3; `turned` swaps its inputs and outputs."""
    batch, frames, bands, _ = x.shape
    outputs = kernel.shape[2 if turned else 3]
    # A kernel written anew with swapped axes would make its transform slow: XLA leaves it where it is and reads it across.
    product = _rows_product if turned else jnp.matmul
    rows, columns = -(-frames // 2), -(-bands // 2)
    weights = [
        place for row in _both_ways(_OF_KERNEL, [list(row) for row in kernel]) for place in row
    ]

    def turn(parts: Parts, sums: Parts) -> tuple[Parts, Parts]:
        pairs = zip(_input_tiles(parts[0]), weights, strict=True)
        products = [
            product(place, weight).reshape(-1, rows, columns, outputs) for place, weight in pairs
        ]
        tile = _both_ways(_OF_PRODUCTS, [products[i : i + 4] for i in range(0, 16, 4)])
        y = jnp.stack([jnp.stack(row, axis=3) for row in tile], axis=2)
        return [y.reshape(-1, 2 * rows, 2 * columns, outputs)[:, :frames, :bands]], sums

    results, _ = _by_turns(turn, [x], rows * columns, [(batch, frames, bands, outputs)], [])
    return results[0]


def _winograd_gradients(
    x: jax.Array, kernel: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `_winograd`: the input's is another, the kernel's goes by the transposed transforms."""
    frames, bands, inputs = x.shape[1:]
    outputs = dy.shape[3]
    rows, columns = -(-frames // 2), -(-bands // 2)

    def turn(parts: Parts, sums: Parts) -> tuple[Parts, Parts]:
        x, dy = parts
        dy = jnp.pad(dy, ((0, 0), (0, 2 * rows - frames), (0, 2 * columns - bands), (0, 0)))
        dy = dy.reshape(-1, rows, 2, columns, 2, outputs)
        tile = [[dy[:, :, i, :, j].reshape(-1, outputs) for j in range(2)] for i in range(2)]
        places = [place for row in _both_ways(_transposed(_OF_PRODUCTS), tile) for place in row]
        return [], [
            total + _columns_product(d, e)
            for total, d, e in zip(sums, _input_tiles(x), places, strict=True)
        ]

    _, sums = _by_turns(
        turn, [x, dy], rows * columns, [], [jnp.zeros((inputs, outputs), x.dtype)] * 16
    )
    tile = _both_ways(_transposed(_OF_KERNEL), [list(sums[i : i + 4]) for i in range(0, 16, 4)])
    gradient = jnp.stack([jnp.stack(row) for row in tile])
    # The kernel's first, after which the other may take dy's place.
    dy, gradient = jax.lax.optimization_barrier((dy, gradient))
    return _winograd(dy, kernel[::-1, ::-1], turned=True), gradient


def _rows_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b.T`."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())))


def _columns_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a.T @ b`."""
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())))


# Rows


def _shifted(x: jax.Array, size: int, stride: int) -> list[jax.Array]:
    """What each place of a kernel sees: `size` x `size` arrays `[clips, frames of the result, bands of the result, channels]`."""
    clips, frames, bands, channels = x.shape
    rows, columns = -(-frames // stride), -(-bands // stride)
    pad = ((size - 1) // 2, size // 2)
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))

    def place(i: int, j: int) -> jax.Array:
        ends = (clips, i + stride * (rows - 1) + 1, j + stride * (columns - 1) + 1, channels)
        return jax.lax.slice(x, (0, i, j, 0), ends, (1, stride, stride, 1))

    return [place(i, j) for i, j in itertools.product(range(size), repeat=2)]


def _rows(x: jax.Array, size: int, stride: int) -> jax.Array:
    """What a filter sees at each position, `[positions, size * size * channels]`."""
    rows = jnp.concatenate(_shifted(x, size, stride), axis=3)
    return rows.reshape(-1, rows.shape[3])


def _rows_conv(x: jax.Array, kernels: tuple[jax.Array, ...], stride: int) -> tuple[jax.Array, ...]:
    """`lax_conv` by one product."""
    batch, frames, bands, _ = x.shape
    size, outputs = kernels[0].shape[0], kernels[0].shape[3]
    rows, columns = -(-frames // stride), -(-bands // stride)

    def turn(parts: Parts, sums: Parts) -> tuple[Parts, Parts]:
        seen = _rows(parts[0], size, stride)
        return [
            (seen @ kernel.reshape(-1, outputs)).reshape(-1, rows, columns, outputs)
            for kernel in kernels
        ], sums

    shapes = [(batch, rows, columns, outputs)] * len(kernels)
    return tuple(_by_turns(turn, [x], rows * columns, shapes, [])[0])


def _rows_gradients(
    x: jax.Array, kernels: tuple[jax.Array, ...], stride: int, dys: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The gradients of `_rows_conv`, by one product each."""
    size, _, inputs, outputs = kernels[0].shape
    rows, columns = dys[0].shape[1:3]
    kernel = jnp.concatenate([kernel.reshape(-1, outputs) for kernel in kernels], axis=1)

    def turn(parts: Parts, sums: Parts) -> tuple[Parts, Parts]:
        x, *dys = parts
        dy = jnp.concatenate([dy.reshape(-1, outputs) for dy in dys], axis=1)
        places = _rows_product(dy, kernel).reshape(-1, rows, columns, size * size * inputs)
        return [_unshifted(places, stride, x.shape)], [
            sums[0] + jax.lax.optimization_barrier(dy.T) @ _rows(x, size, stride)
        ]

    zeros = [jnp.zeros((outputs * len(kernels), size * size * inputs), x.dtype)]
    (dx,), (total,) = _by_turns(turn, [x, *dys], rows * columns, [x.shape], zeros)
    gradients = total.T.reshape(size, size, inputs, len(kernels), outputs)
    return dx, tuple(gradients[:, :, :, i] for i in range(len(kernels)))


def _unshifted(places: jax.Array, stride: int, shape: tuple[int, ...]) -> jax.Array:
    """Adds what each place of a kernel gives back, `[clips, frames, bands, size * size * channels]`, up to the input, `shape`."""
    clips, frames, bands, channels = shape
    size = round((places.shape[3] // channels) ** 0.5)
    pad = (size - 1) // 2
    # Rows and columns of the padded input, in steps of the stride.
    rows, columns = -(-(frames + size - 1) // stride), -(-(bands + size - 1) // stride)
    phases = [[[] for _ in range(stride)] for _ in range(stride)]  # type: list[list[list[jax.Array]]]
    for number, (i, j) in enumerate(itertools.product(range(size), repeat=2)):
        part = places[..., number * channels : (number + 1) * channels]
        first, second = i // stride, j // stride
        ends = (rows - first - part.shape[1], columns - second - part.shape[2])
        phases[i % stride][j % stride].append(
            jnp.pad(part, ((0, 0), (first, ends[0]), (second, ends[1]), (0, 0)))
        )
    nothing = jnp.zeros((clips, rows, columns, channels), places.dtype)
    summed = [[sum(phase[1:], phase[0]) if phase else nothing for phase in row] for row in phases]
    dx = jnp.stack([jnp.stack(row, axis=3) for row in summed], axis=2)
    return dx.reshape(clips, rows * stride, columns * stride, channels)[
        :, pad : pad + frames, pad : pad + bands
    ]


# One channel


def _one_channel_gradients(
    x: jax.Array, kernel: jax.Array, stride: int, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `lax_conv` for one input channel, by one product each."""
    size, outputs = kernel.shape[0], kernel.shape[3]
    rows, columns = dy.shape[1:3]

    # Two loops, since the input's gradient is rarely asked for.
    def of_input(parts: Parts, sums: Parts) -> tuple[Parts, Parts]:
        places = kernel.reshape(-1, outputs) @ parts[0].reshape(-1, outputs).T
        places = jnp.moveaxis(places.reshape(size * size, -1, rows, columns), 0, 3)
        return [_unshifted(places, stride, (places.shape[0], *x.shape[1:]))], sums

    def of_kernel(parts: Parts, sums: Parts) -> tuple[Parts, Parts]:
        shifted = jnp.stack([place.reshape(-1) for place in _shifted(parts[0], size, stride)])
        return [], [sums[0] + shifted @ parts[1].reshape(-1, outputs)]

    results, _ = _by_turns(of_input, [dy], rows * columns, [x.shape], [])
    _, sums = _by_turns(
        of_kernel, [x, dy], rows * columns, [], [jnp.zeros((size * size, outputs), x.dtype)]
    )
    return results[0], sums[0].reshape(kernel.shape)
