import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicgenre import models
from musicgenre.models import fast_conv as fast
from musicgenre.models import layers
from musicgenre.models.fast_conv import fast_convs, lax_conv
from musicgenre.models.layers import (
    Conv,
    avg_pool_time,
    batch_norm,
    convolve_together,
    global_max,
    max_pool,
    max_pool_overlapping,
)


@pytest.fixture(autouse=True)
def switched_off_afterwards():
    yield
    fast.set_enabled(False)


@pytest.fixture
def enabled():
    fast.set_enabled(True)


def drawn(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def worst(found, expected):
    """Largest relative error of any of the arrays, in the norm."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b)) for a, b in pairs)


def product_and_gradients(conv, x, kernel, stride, dy):
    y, gradients = jax.vjp(functools.partial(conv, stride=stride), x, kernel)
    return y, *gradients(dy)


# Batch, frames, bands, channels, filters, size, stride: Winograd with one clip at a time, with
# several and with all; stride 2 at odd and at even sizes; too few positions for Winograd; one
# channel; 1 x 1; other sizes.
CASES = [
    (2, 47, 35, 128, 128, 3, 1),
    (6, 15, 18, 24, 16, 3, 1),
    (2, 47, 25, 16, 24, 3, 2),
    (2, 4, 3, 32, 16, 3, 1),
    (3, 17, 12, 8, 16, 3, 2),
    (2, 16, 13, 128, 24, 3, 2),
    (2, 21, 14, 1, 16, 3, 1),
    (2, 21, 14, 1, 16, 7, 2),
    (2, 47, 50, 1, 8, 3, 2),
    (2, 10, 9, 1, 8, 2, 1),
    (2, 13, 10, 16, 32, 1, 2),
    (2, 9, 10, 8, 4, 5, 3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fast_products_equal_the_plain_ones(case):
    """Float32 against XLA's convolution in float64."""
    batch, frames, bands, channels, filters, size, stride = case
    x = drawn(batch, frames, bands, channels)
    kernel = drawn(size, size, channels, filters) / np.sqrt(size * size * channels)
    dy = drawn(batch, -(-frames // stride), -(-bands // stride), filters)
    compare = jax.jit(product_and_gradients, static_argnums=(0, 3))
    with jax.enable_x64(True):
        expected = [np.asarray(a) for a in compare(lax_conv, x, kernel, stride, dy)]
    x, kernel, dy = map(np.float32, (x, kernel, dy))
    found = compare(lambda x, k, stride: fast_convs(x, (k,), stride)[0], x, kernel, stride, dy)
    assert [a.dtype for a in found] == [np.float32] * 3
    assert [worst(a, b) < 2e-6 for a, b in zip(found, expected, strict=True)] == [True] * 3


def test_several_kernels_give_the_outputs_of_each():
    """Kernels on one input, by rows and of one channel; the input's gradient is their sum."""
    for shape, stride, count in [((3, 31, 44, 16), 2, 2), ((2, 15, 18, 1), 2, 3)]:
        x = np.float32(drawn(*shape))
        kernels = tuple(np.float32(i + drawn(3, 3, shape[3], 16)) for i in range(count))
        dys = tuple((i + 1) * lax_conv(x, kernel, stride) for i, kernel in enumerate(kernels))
        ys, back = jax.vjp(
            lambda x, kernels, stride=stride: fast_convs(x, kernels, stride), x, kernels
        )
        dx, gradients = back(dys)
        expected = [
            product_and_gradients(lax_conv, x, kernel, stride, dy)
            for kernel, dy in zip(kernels, dys, strict=True)
        ]
        assert worst(ys, [y for y, _, _ in expected]) < 2e-6
        assert worst(gradients, [gradient for _, _, gradient in expected]) < 2e-6
        assert worst(dx, sum(dx for _, dx, _ in expected)) < 2e-6


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("plus", [True, False])
def test_the_fast_normalisation_equals_flax(enabled, relu, plus):
    """Values, statistics and gradients in float32 against nn.BatchNorm in float64."""
    x, added = drawn(2, 23, 15, 128) * 2 + 0.5, drawn(2, 23, 15, 128)[::-1]
    scale = np.linspace(-1, 2, 128)
    params = {"scale": scale, "bias": scale[::-1] / 3}
    stats = {"mean": np.zeros(128), "var": np.ones(128)}

    def plain(params, x, added):
        norm = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5, dtype=x.dtype)
        variables = {"params": params, "batch_stats": jax.tree.map(x.dtype.type, stats)}
        y, updated = norm.apply(variables, x, mutable=["batch_stats"])
        y = y + added if plus else y
        return nn.relu(y) if relu else y, updated["batch_stats"]

    def ours(params, x, added):
        variables = {"params": params, "batch_stats": jax.tree.map(np.float32, stats)}
        options = {"plus": added if plus else None, "relu": relu, "mutable": ["batch_stats"]}
        y, updated = batch_norm(True, jnp.float32).apply(variables, x, **options)
        return y, updated["batch_stats"]

    def with_gradients(function, params, x, added, dy):
        y, back = jax.vjp(function, params, x, added)
        return y, back((dy, jax.tree.map(lambda a: jnp.asarray(0.3 + a, dy.dtype), stats)))

    run = jax.jit(with_gradients, static_argnums=0)
    arguments = (params, x, added, 1 + drawn(*x.shape)[:, ::-1])
    with jax.enable_x64(True):
        expected = jax.tree.map(np.asarray, run(plain, *arguments))
    found = run(ours, *jax.tree.map(np.float32, arguments))
    assert expected[0][0].dtype == np.float64 and found[0][0].dtype == np.float32
    assert worst(found[0], expected[0]) < 1e-6
    assert worst(found[1][:2], expected[1][:2]) < 1e-5
    assert not plus or worst(found[1][2], expected[1][2]) < 1e-5


def test_which_products_are_winograd():
    def suits(shape, size=3, stride=1):
        kernel = jnp.zeros((size, size, shape[3], 32))
        return fast._suits_winograd(jnp.zeros(shape), kernel, stride)

    shapes = [(2, 16, 16, 128), (2, 8, 8, 128), (2, 16, 16, 1)]
    assert [suits(shape) for shape in shapes] == [True, False, False]  # 32 tiles, one channel
    assert not suits(shapes[0], stride=2) and not suits(shapes[0], size=5)


@pytest.mark.parametrize(("positions", "clips"), [(80, 6), (200, 2), (600, 1)])
def test_clips_are_computed_in_groups(positions, clips):
    seen = []

    def compute(parts, sums):
        seen.append(parts[0].shape[0])
        return [2 * parts[0]], [sums[0] + parts[0].sum()]

    x = jnp.arange(24.0).reshape(6, 4)
    arguments = (compute, [x], positions, [x.shape], [jnp.zeros(())])
    (doubled,), (total,) = fast._some_clips_at_a_time(*arguments)
    assert set(seen) == {clips}  # 512 positions at a time, and a divisor of the batch
    np.testing.assert_array_equal(doubled, 2 * x)
    assert total == 276


class Block(nn.Module):
    """Convolution, batch normalisation, ReLU and pool, twice, at a real width."""

    conv: type

    @nn.compact
    def __call__(self, x):
        for i, (features, stride) in enumerate([(128, 2), (128, 1)]):
            if self.conv is Conv:
                x = Conv(features, 3, stride, train=True, dtype=x.dtype, name=f"conv{i}")(x)
            else:
                options = {"padding": 1, "use_bias": False, "name": f"conv{i}"}
                x = nn.Conv(features, (3, 3), (stride, stride), **options)(x)
            x = nn.relu(batch_norm(True, x.dtype, name=f"norm{i}")(x))
        return layers.max_pool(x, (2, 2))


def test_a_layer_equals_nn_conv_with_batch_normalisation_under_jit(enabled):
    """Two layers of 128 channels at odd sizes in float32 against nn.Conv in float64."""
    x = drawn(2, 45, 29, 1)

    def loss(conv, params, x):
        y = Block(conv).apply({"params": params}, x, mutable=["batch_stats"])[0]
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape) % 977)).sum()

    variables = Block(Conv).init(jax.random.key(0), np.float32(x))
    plain = Block(nn.Conv).init(jax.random.key(0), np.float32(x))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, plain)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], plain["params"])
    gradient = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    found = gradient(Conv, variables["params"], np.float32(x))
    with jax.enable_x64(True):
        doubled = jax.tree.map(lambda a: np.float64(a), plain["params"])
        expected = jax.tree.map(np.asarray, gradient(nn.Conv, doubled, x))
    assert expected[0].dtype == np.float64
    assert worst(found, expected) < 1e-5


@pytest.fixture
def fast_calls(monkeypatch):
    """The strides of the fast convolutions' kernels, and "norm" for the normalisations."""
    calls = []

    def convs(x, kernels, stride):
        assert x.dtype == jnp.float32
        calls.extend([stride] * len(kernels))
        return tuple(lax_conv(x, kernel, stride) for kernel in kernels)

    def norm(*arguments, real=fast.fast_norm):
        calls.append("norm")
        return real(*arguments)

    monkeypatch.setattr(fast, "fast_convs", convs)
    monkeypatch.setattr(fast, "fast_norm", norm)
    return calls


def test_fast_products_are_off_until_training_in_float32_switches_them_on(fast_calls):
    x = jnp.zeros((1, 8, 8, 2))

    def used(train, dtype=jnp.float32, features=32, axis_name=None):
        def run():
            y, _ = Conv(features, train=train, dtype=dtype).init_with_output(jax.random.key(0), x)
            norm = batch_norm(train, dtype).clone(axis_name=axis_name)
            return norm.init_with_output(jax.random.key(0), y, plus=y, relu=True)

        fast_calls.clear()
        jax.eval_shape(run)
        return fast_calls.copy()

    assert not fast.is_enabled() and used(True) == []
    fast.set_enabled(True)
    assert used(True) == [1, "norm"]
    # Batch normalisation over devices stays Flax's.
    assert used(True, axis_name="devices") == [1]
    assert (used(False), used(True, jnp.bfloat16), used(True, features=31)) == ([], [], [])
    fast.set_enabled(False)
    assert used(True) == []


@pytest.mark.parametrize("train", [True, False])
def test_convolutions_of_one_input_equal_each_alone(enabled, train):
    class Pair(nn.Module):
        together: bool

        @nn.compact
        def __call__(self, x):
            convs = [Conv(32, stride=2, train=train, name=name) for name in ("one", "other")]
            return convolve_together(x, *convs) if self.together else [conv(x) for conv in convs]

    x = np.float32(drawn(2, 9, 7, 3))
    variables = Pair(True).init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, Pair(False).init(jax.random.key(0), x))
    found, expected = (Pair(together).apply(variables, x) for together in (True, False))
    assert worst(found, expected) < 1e-6
    assert not np.allclose(*found)


@pytest.mark.parametrize(
    ("model", "frames", "bands", "convs", "norms"),
    [
        ({"name": "short_chunk", "residual": True}, 231, 128, 21, 22),
        ({"name": "resnet", "blocks": (2, 2, 2, 2)}, 64, 32, 20, 17),
        ({"name": "fcn"}, 1366, 96, 4, 4),
        ({"name": "crnn"}, 1366, 96, 4, 4),
    ],
)
def test_the_2d_networks_train_with_it(enabled, fast_calls, model, frames, bands, convs, norms):
    """The input's normalisation stays Flax's."""
    module = models.build(model, num_classes=3, frames=frames, bands=bands)
    keys = dict.fromkeys(("params", "dropout"), jax.random.key(0))
    jax.eval_shape(lambda: module.init(keys, jnp.zeros((2, frames, bands)), train=True))
    assert fast_calls.count("norm") == norms and len(fast_calls) == convs + norms


@pytest.mark.parametrize("shape", [(2, 9, 6, 3), (1, 12, 7, 2), (2, 33, 17, 128)])
def test_the_overlapping_pool_and_its_gradient_equal_nn_max_pools(shape):
    """Values are rounded, so that many are equal: the first takes the gradient."""
    x = np.float32(np.maximum(np.round(drawn(*shape)), 0))

    def plain(x):
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

    expected, back = jax.vjp(plain, x)
    dy = np.float32(np.arange(expected.size).reshape(expected.shape) % 13 + 1)
    found = jax.jit(max_pool_overlapping)(x)
    gradients = jax.jit(lambda x, dy: jax.vjp(max_pool_overlapping, x)[1](dy))(x, dy)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(gradients[0], back(dy)[0])


@pytest.mark.parametrize("window", [(2,), (3,), (5,), (2, 2), (3, 4), (4, 1), (1, 5), (7, 11)])
def test_pools_equal_flax(window):
    x = jax.random.normal(jax.random.key(0), (*(2, 23, 11)[: len(window) + 1], 6))
    np.testing.assert_array_equal(max_pool(x, window), nn.max_pool(x, window, window))
    if len(window) == 1:
        expected = nn.avg_pool(x, window, window)
        np.testing.assert_allclose(avg_pool_time(x, *window), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("extent", [(1, 1), (2, 1), (5, 3), (8, 4), (13, 7)])
def test_the_global_maximum_equals_flax(extent):
    x = jax.random.normal(jax.random.key(0), (2, *extent, 6))
    np.testing.assert_array_equal(global_max(x), nn.max_pool(x, extent)[:, 0, 0])


@pytest.mark.parametrize("window", [(2, 2), (3, 4), (4, 1)])
def test_of_equal_maxima_the_first_gets_the_gradient(window):
    # Few different values, so that most windows hold their maximum more than once.
    x = jax.random.randint(jax.random.key(0), (2, 13, 9, 3), 0, 3).astype(jnp.float32)
    weights = jax.random.normal(jax.random.key(1), nn.max_pool(x, window, window).shape)
    ours, flax = (
        jax.jit(jax.grad(lambda x, pool=pool: (pool(x) * weights).sum()))(x)
        for pool in (lambda v: max_pool(v, window), lambda v: nn.max_pool(v, window, window))
    )
    np.testing.assert_array_equal(ours, flax)
    # In the global maximum exactly one of them gets the entire gradient.
    gradient = np.asarray(jax.jit(jax.grad(lambda x: global_max(x).sum()))(x)).reshape(2, -1, 3)
    assert (np.count_nonzero(gradient, axis=1) == 1).all() and gradient.sum() == 6


LARGE = [((97, 1), (2, 1)), ((24, 1), (4, 1)), ((33, 1), (3, 1)), ((23, 9), (2, 2))]
LARGE += [((20, 15), (4, 5)), ((17, 8), (8, 4)), ((15, 7), None), ((6, 4), None)]


@pytest.mark.parametrize(("extent", "window"), LARGE)
def test_gradients_of_pools_equal_flax_after_batch_norm_at_real_width(extent, window):
    """At 128 channels, where a reshaped reduction goes wrong; None is the global maximum."""

    def ours(v):
        return max_pool(v, window) if window else global_max(v)

    def flax(v):
        return nn.max_pool(v, window, window) if window else nn.max_pool(v, extent)[:, 0, 0]

    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), (4, *extent, 128), jnp.float64)
        scale = jnp.linspace(0.5, 2.0, 128)

        def loss(pool, x, scale):
            normal = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5) * scale
            return (pool(nn.relu(normal)) ** 2 * jnp.arange(128)).sum()

        def gradients(pool, *arguments):
            compute = jax.jit(jax.grad(lambda x, s: loss(pool, x, s), (0, 1)))
            return jax.tree.map(np.asarray, compute(*arguments))

        double, reference = gradients(ours, x, scale), gradients(flax, x, scale)
        single = gradients(ours, x.astype(jnp.float32), scale.astype(jnp.float32))
    for one, other, low in zip(double, reference, single, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9 * np.abs(other).max())
        assert np.linalg.norm(low - other) < 1e-4 * np.linalg.norm(other)
