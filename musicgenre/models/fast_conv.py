"""Convolution and batch normalisation as a CPU likes them: what `layers` trains with in float32 on a single CPU device.

XLA's gradients of convolutions run at a third of its matrix rate there, its convolutions of a few positions at a hundredth,
and every array that is kept for the gradients costs as much in new pages of memory as in work.
"""

import dataclasses
import functools
import itertools
import math
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
Terms = tuple[tuple[jax.Array, ...], ...]
Activation = Callable[[jax.Array], jax.Array] | None


def lax_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """XLA's convolution of `x` `[batch, frames, bands, in]` and `kernel` `[size, size, in, out]`; `size - 1` zeros go around."""
    pad = ((kernel.shape[0] - 1) // 2, kernel.shape[0] // 2)
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normed:
    """Normalised arrays, their sum and an activation, which what takes them computes, clip by clip.

    Neither the way forward nor the gradient has the result as a whole. The result is
    `activation(sum((x - mean) * factor + offset))` over the terms; a term that is an array alone counts as it is.

    Attributes:
      terms: `(x, mean, factor, offset)` or `(x,)` each: `x` float32 `[batch, ..., channels]`, all of one shape, the rest
        `[channels]`.
      activation: is applied to the sum; None is none.
    """

    terms: tuple[tuple[jax.Array, ...], ...]
    activation: Callable[[jax.Array], jax.Array] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        return self.terms[0][0].shape

    def compute(self, then: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """Returns the result, or what `then` makes of it: a function of some clips, which keeps their number and order."""
        return _computed(self.terms, self.activation, then)


def fast_convs(x: "jax.Array | Normed", kernels: tuple[jax.Array, ...], stride: int) -> tuple[jax.Array, ...]:
    """`lax_conv` of one input and each of several kernels of one shape, forward and backward.

    - 3 x 3 of stride 1: Winograd's F(2 x 2, 3 x 3), 16 products for 36. Its relative error in float32 is some 5e-7.
    - one input channel: XLA's convolution, and as the kernel's gradient one product with the shifted inputs.
    - the rest: what a filter sees side by side in a row, and one product with all kernels.

    Clip by clip, so that what is laid out anew stays in the cache. Of an input that is `Normed`, only what it is computed from is
    kept for the gradient.

    It differentiates once, in reverse, which is what training does.

    Source: A. Lavin, S. Gray, "Fast algorithms for convolutional neural networks", 2015, arXiv:1509.09308.

    Args:
      x: float32 `[batch, frames, bands, in]`.
      kernels: `[size, size, in, out]` each.
      stride: 1 or more.

    Returns:
      `[batch, ceil(frames / stride), ceil(bands / stride), out]` for each kernel.
    """
    if not isinstance(x, Normed):
        x = Normed(((x,),))
    elif x.shape[3] == 1:
        x = Normed(((x.compute(),),))
    return _convs(x.terms, kernels, x.activation, stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convs(terms: Terms, kernels: tuple[jax.Array, ...], activation: Activation, stride: int) -> tuple[jax.Array, ...]:
    x = _Input(terms, activation)
    if _suits_winograd(x.shape, kernels[0].shape, stride):
        return tuple(_winograd(x, kernel) for kernel in kernels)
    if x.shape[3] == 1:
        return tuple(lax_conv(terms[0][0], kernel, stride) for kernel in kernels)
    return _rows_conv(x, kernels, stride)


def _convs_forward(terms: Terms, kernels: tuple[jax.Array, ...], activation: Activation, stride: int) -> tuple:
    return _convs(terms, kernels, activation, stride), (terms, kernels)


def _convs_backward(activation: Activation, stride: int, saved: tuple, dys: tuple[jax.Array, ...]) -> tuple:
    terms, kernels = saved
    x = _Input(terms, activation)
    if _suits_winograd(x.shape, kernels[0].shape, stride):
        parts = [_winograd_gradients(x, kernel, dy) for kernel, dy in zip(kernels, dys, strict=True)]
    elif x.shape[3] == 1:
        parts = [_one_channel_gradients(terms[0][0], kernel, stride, dy) for kernel, dy in zip(kernels, dys, strict=True)]
    else:
        *of_input, gradients = _rows_gradients(x, kernels, stride, dys)
        return x.gradients(*of_input), gradients
    (dx, sums), *others = [part[:2] for part in parts]
    for other, more in others:
        dx, sums = dx + other, [one + two for one, two in zip(sums, more, strict=True)]
    return x.gradients(dx, sums), tuple(part[2] for part in parts)


_convs.defvjp(_convs_forward, _convs_backward)


@dataclasses.dataclass(frozen=True)
class _Input:
    """The terms of a `Normed`, as turns over the clips take them."""

    terms: Terms
    activation: Activation

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0][0].shape

    @property
    def arrays(self) -> list[jax.Array]:
        """What a turn takes its clips of."""
        return [term[0] for term in self.terms]

    def clips(self, parts: Parts) -> jax.Array:
        """The result for some clips of `arrays`."""
        total = self._sum(parts)
        return total if self.activation is None else self.activation(total)

    def _sum(self, parts: Parts) -> jax.Array:
        pairs = zip(parts, self.terms, strict=True)
        values = [(x - term[1]) * term[2] + term[3] if len(term) > 1 else x for x, term in pairs]
        return sum(values[1:], values[0])

    def zeros(self) -> list[jax.Array]:
        """What the sums of `back` begin with."""
        normed = sum(len(term) > 1 for term in self.terms)
        return [jnp.zeros(self.shape[-1:], jnp.float32)] * (normed + 1 if normed else 0)

    def back(self, parts: Parts, dy: jax.Array, sums: Parts) -> tuple[jax.Array, list[jax.Array]]:
        """From the gradient of some clips' result to that of the sum of the terms; and adds to what `gradients` needs."""
        if self.activation is not None:
            dy = jax.vjp(self.activation, self._sum(parts))[1](dy)[0]
        axes = tuple(range(dy.ndim - 1))
        normed = [(x, term[1]) for x, term in zip(parts, self.terms, strict=True) if len(term) > 1]
        news = [(dy * (x - mean)).sum(axes) for x, mean in normed] + [dy.sum(axes)] * bool(normed)
        return dy, [total + new for total, new in zip(sums, news, strict=True)]

    def gradients(self, dy: jax.Array, sums: Parts) -> Terms:
        """The terms' gradients."""
        moments = iter(sums)
        return tuple(
            (dy * term[2], -term[2] * sums[-1], next(moments), sums[-1]) if len(term) > 1 else (dy,) for term in self.terms
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _computed(terms: Terms, activation: Activation, then: Activation) -> jax.Array:
    x = _Input(terms, activation)

    def turn(parts: Parts, sums: Parts) -> tuple[Parts, Parts]:
        y = x.clips(parts)
        return [y if then is None else then(y)], sums

    shape = jax.eval_shape(turn, x.arrays, [])[0][0].shape
    return _by_turns(turn, x.arrays, _positions(x.shape), [shape], [])[0][0]


def _computed_forward(terms: Terms, activation: Activation, then: Activation) -> tuple:
    return _computed(terms, activation, then), terms


def _computed_backward(activation: Activation, then: Activation, terms: Terms, dy: jax.Array) -> tuple:
    x = _Input(terms, activation)

    def turn(parts: Parts, sums: Parts) -> tuple[Parts, Parts]:
        *parts, dy = parts
        if then is not None:
            dy = jax.vjp(then, x.clips(parts))[1](dy)[0]
        dy, sums = x.back(parts, dy, sums)
        return [dy], sums

    (dx,), sums = _by_turns(turn, [*x.arrays, dy], _positions(x.shape), [x.shape], x.zeros())
    return (x.gradients(dx, sums),)


_computed.defvjp(_computed_forward, _computed_backward)


def _positions(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:-1]) // 4


@jax.custom_vjp
def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean and the variance, `[channels]`, over all axes but the last of `x`, float32 `[batch, ..., channels]`."""
    axes = tuple(range(x.ndim - 1))

    def turn(parts: Parts, sums: Parts) -> tuple[Parts, Parts]:
        return [], [sums[0] + parts[0].sum(axes), sums[1] + (parts[0] * parts[0]).sum(axes)]

    _, (total, squares) = _by_turns(turn, [x], _positions(x.shape), [], [jnp.zeros(x.shape[-1:], x.dtype)] * 2)
    count = x.size // x.shape[-1]
    mean = total / count
    return mean, jnp.maximum(0.0, squares / count - mean * mean)


def _moments_forward(x: jax.Array) -> tuple:
    mean, variance = moments(x)
    return (mean, variance), (x, mean)


def _moments_backward(saved: tuple, cotangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array]:
    (x, mean), (of_mean, of_variance) = saved, cotangents
    count = x.size // x.shape[-1]
    return (of_mean / count + (x - mean) * (2 * of_variance / count),)


moments.defvjp(_moments_forward, _moments_backward)


def _suits_winograd(shape: tuple[int, ...], kernel: tuple[int, ...], stride: int) -> bool:
    size, _, inputs, outputs = kernel
    return size == 3 and stride == 1 and min(inputs, outputs) >= 16 and math.prod(shape[:3]) >= 4 * _LEAST_TILES


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
    fitting = [count for count in range(1, batch + 1) if batch % count == 0 and count * positions <= _POSITIONS]
    clips = max(fitting, default=1)
    if clips == batch:
        return turn(arrays, sums)

    def body(number: jax.Array, carry: tuple[Parts, Parts]) -> tuple[Parts, Parts]:
        results, sums = carry
        parts = [jax.lax.dynamic_slice_in_dim(array, number * clips, clips) for array in arrays]
        news, sums = turn(parts, sums)
        pairs = zip(results, news, strict=True)
        return [jax.lax.dynamic_update_slice_in_dim(result, new, number * clips, 0) for result, new in pairs], sums

    # XLA shares zeros between loops and then copies them for each; this is a number that no other loop begins with.
    empty = [jnp.broadcast_to(arrays[0].reshape(-1)[i], shape) for i, shape in enumerate(shapes)]
    return jax.lax.fori_loop(0, batch // clips, body, (empty, sums))


# Winograd


def _both_ways(matrix: Sequence[Sequence[float]], tile: list[list[jax.Array]]) -> list[list[jax.Array]]:
    """Transforms the rows of a tile and then its columns by a matrix of few numbers."""

    def product(parts: Sequence[jax.Array]) -> list[jax.Array]:
        scaled = [[a if c == 1 else c * a for c, a in zip(line, parts, strict=True) if c] for line in matrix]
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
    tile = [[x[:, i // 2 : i // 2 + rows, i % 2, j // 2 : j // 2 + columns, j % 2] for j in range(4)] for i in range(4)]
    return [place.reshape(-1, channels) for row in _both_ways(_OF_INPUT, tile) for place in row]


def _winograd(x: _Input, kernel: jax.Array) -> jax.Array:
    """`lax_conv(x, kernel, 1)` of a kernel of 3 x 3."""
    batch, frames, bands, _ = x.shape
    convolve = _winograd_turn(x.shape, kernel)

    def turn(parts: Parts, sums: Parts) -> tuple[Parts, Parts]:
        return [convolve(x.clips(parts))], sums

    results, _ = _by_turns(turn, x.arrays, _tiles(x.shape), [(batch, frames, bands, kernel.shape[3])], [])
    return results[0]


def _tiles(shape: tuple[int, ...]) -> int:
    """Of a clip."""
    return -(-shape[1] // 2) * -(-shape[2] // 2)


def _winograd_turn(shape: tuple[int, ...], kernel: jax.Array, *, turned: bool = False) -> Callable[[jax.Array], jax.Array]:
    """Returns what convolves some clips, `[clips, frames, bands, in]` as `shape` has them.

    `turned` swaps the kernel's inputs and outputs.
    """
    _, frames, bands, _ = shape
    outputs = kernel.shape[2 if turned else 3]
    # A kernel written anew with swapped axes would make its transform slow: XLA leaves it where it is and reads it across.
    product = _rows_product if turned else jnp.matmul
    rows, columns = -(-frames // 2), -(-bands // 2)
    weights = [place for row in _both_ways(_OF_KERNEL, [list(row) for row in kernel]) for place in row]

    def convolve(x: jax.Array) -> jax.Array:
        pairs = zip(_input_tiles(x), weights, strict=True)
        products = [product(place, weight).reshape(-1, rows, columns, outputs) for place, weight in pairs]
        tile = _both_ways(_OF_PRODUCTS, [products[i : i + 4] for i in range(0, 16, 4)])
        y = jnp.stack([jnp.stack(row, axis=3) for row in tile], axis=2)
        return y.reshape(-1, 2 * rows, 2 * columns, outputs)[:, :frames, :bands]

    return convolve


def _winograd_gradients(x: _Input, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, Parts, jax.Array]:
    """The gradients of `_winograd`: the input's is another, the kernel's goes by the transposed transforms.

    Returns:
      The first two are what `_Input.gradients` takes, the third is the kernel's.
    """
    frames, bands, inputs = x.shape[1:]
    outputs = dy.shape[3]
    rows, columns = -(-frames // 2), -(-bands // 2)

    def of_kernel(parts: Parts, sums: Parts) -> tuple[Parts, Parts]:
        *parts, dy = parts
        dy = jnp.pad(dy, ((0, 0), (0, 2 * rows - frames), (0, 2 * columns - bands), (0, 0)))
        dy = dy.reshape(-1, rows, 2, columns, 2, outputs)
        tile = [[dy[:, :, i, :, j].reshape(-1, outputs) for j in range(2)] for i in range(2)]
        places = [place for row in _both_ways(_transposed(_OF_PRODUCTS), tile) for place in row]
        tiles = _input_tiles(x.clips(parts))
        return [], [total + _columns_product(d, e) for total, d, e in zip(sums, tiles, places, strict=True)]

    zeros = [jnp.zeros((inputs, outputs), jnp.float32)] * 16
    _, sums = _by_turns(of_kernel, [*x.arrays, dy], rows * columns, [], zeros)
    tile = _both_ways(_transposed(_OF_KERNEL), [list(sums[i : i + 4]) for i in range(0, 16, 4)])
    gradient = jnp.stack([jnp.stack(row) for row in tile])
    # The kernel's first, after which the other may take dy's place.
    dy, gradient = jax.lax.optimization_barrier((dy, gradient))
    convolve = _winograd_turn(dy.shape, kernel[::-1, ::-1], turned=True)

    def of_input(parts: Parts, sums: Parts) -> tuple[Parts, Parts]:
        *parts, dy = parts
        dx, sums = x.back(parts, convolve(dy), sums)
        return [dx], sums

    (dx,), sums = _by_turns(of_input, [*x.arrays, dy], rows * columns, [x.shape], x.zeros())
    return dx, sums, gradient


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


def _rows_conv(x: _Input, kernels: tuple[jax.Array, ...], stride: int) -> tuple[jax.Array, ...]:
    """`lax_conv` by one product."""
    batch, frames, bands, _ = x.shape
    size, outputs = kernels[0].shape[0], kernels[0].shape[3]
    rows, columns = -(-frames // stride), -(-bands // stride)

    def turn(parts: Parts, sums: Parts) -> tuple[Parts, Parts]:
        seen = _rows(x.clips(parts), size, stride)
        return [(seen @ kernel.reshape(-1, outputs)).reshape(-1, rows, columns, outputs) for kernel in kernels], sums

    shapes = [(batch, rows, columns, outputs)] * len(kernels)
    return tuple(_by_turns(turn, x.arrays, rows * columns, shapes, [])[0])


def _rows_gradients(
    x: _Input, kernels: tuple[jax.Array, ...], stride: int, dys: tuple[jax.Array, ...]
) -> tuple[jax.Array, Parts, tuple[jax.Array, ...]]:
    """The gradients of `_rows_conv`, by one product each; the input's see `_Input.back`."""
    size, _, inputs, outputs = kernels[0].shape
    rows, columns = dys[0].shape[1:3]
    kernel = jnp.concatenate([kernel.reshape(-1, outputs) for kernel in kernels], axis=1)
    count = len(x.terms)

    def turn(parts: Parts, sums: Parts) -> tuple[Parts, Parts]:
        parts, dys = parts[:count], parts[count:]
        dy = jnp.concatenate([dy.reshape(-1, outputs) for dy in dys], axis=1)
        places = _rows_product(dy, kernel).reshape(-1, rows, columns, size * size * inputs)
        y = x.clips(parts)
        dx, rest = x.back(parts, _unshifted(places, stride, y.shape), sums[1:])
        return [dx], [sums[0] + jax.lax.optimization_barrier(dy.T) @ _rows(y, size, stride), *rest]

    zeros = jnp.zeros((outputs * len(kernels), size * size * inputs), jnp.float32)
    (dx,), (total, *sums) = _by_turns(turn, [*x.arrays, *dys], rows * columns, [x.shape], [zeros, *x.zeros()])
    gradients = total.T.reshape(size, size, inputs, len(kernels), outputs)
    return dx, sums, tuple(gradients[:, :, :, i] for i in range(len(kernels)))


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
        phases[i % stride][j % stride].append(jnp.pad(part, ((0, 0), (first, ends[0]), (second, ends[1]), (0, 0))))
    nothing = jnp.zeros((clips, rows, columns, channels), places.dtype)
    summed = [[sum(phase[1:], phase[0]) if phase else nothing for phase in row] for row in phases]
    dx = jnp.stack([jnp.stack(row, axis=3) for row in summed], axis=2)
    return dx.reshape(clips, rows * stride, columns * stride, channels)[:, pad : pad + frames, pad : pad + bands]


# One channel


def _one_channel_gradients(x: jax.Array, kernel: jax.Array, stride: int, dy: jax.Array) -> tuple[jax.Array, Parts, jax.Array]:
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
    _, sums = _by_turns(of_kernel, [x, dy], rows * columns, [], [jnp.zeros((size * size, outputs), x.dtype)])
    return results[0], [], sums[0].reshape(kernel.shape)
