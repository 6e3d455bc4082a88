import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicgenre import models
from musicgenre.models import layers
from musicgenre.models.layers import Conv, batch_norm, fast_conv, lax_conv, max_pool_overlapping


def drawn(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def worst(found, expected):
    """Largest relative error of any of the arrays, in the norm."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b)) for a, b in pairs)


def product_and_gradients(conv, x, kernel, stride, dy):
    y, gradients = jax.vjp(functools.partial(conv, stride=stride), x, kernel)
    return y, *gradients(dy)


# Batch, frames, bands, channels, filters, size, stride: Winograd with a clip a turn, and with several; both strides' gradients
# at odd and at even sizes; one channel; 1 x 1; sizes that XLA keeps.
CASES = [
    (2, 47, 35, 128, 128, 3, 1),
    (6, 15, 18, 24, 16, 3, 1),
    (3, 17, 12, 8, 16, 3, 2),
    (2, 16, 13, 128, 24, 3, 2),
    (2, 21, 14, 1, 16, 3, 1),
    (2, 21, 14, 1, 16, 7, 2),
    (2, 10, 9, 1, 8, 2, 1),
    (2, 13, 10, 16, 32, 1, 2),
    (2, 9, 10, 8, 4, 5, 3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fast_products_are_the_plain_ones(case):
    """Float32 against XLA's convolution in float64."""
    batch, frames, bands, channels, filters, size, stride = case
    x = drawn(batch, frames, bands, channels)
    kernel = drawn(size, size, channels, filters) / np.sqrt(size * size * channels)
    dy = drawn(batch, -(-frames // stride), -(-bands // stride), filters)
    compare = jax.jit(product_and_gradients, static_argnums=(0, 3))
    with jax.enable_x64(True):
        expected = [np.asarray(a) for a in compare(lax_conv, x, kernel, stride, dy)]
    found = compare(fast_conv, *(np.float32(a) for a in (x, kernel)), stride, np.float32(dy))
    assert [a.dtype for a in found] == [np.float32] * 3
    assert [worst(a, b) < 2e-6 for a, b in zip(found, expected, strict=True)] == [True] * 3


def test_which_products_are_winograd():
    shapes = [jnp.zeros(shape) for shape in ((2, 16, 16, 128), (2, 8, 8, 128), (2, 16, 16, 1))]
    kernels = [jnp.zeros((size, size, x.shape[3], 32)) for x, size in zip(shapes, (3, 3, 3), strict=True)]
    found = [layers._suits_winograd(x, kernel, 1) for x, kernel in zip(shapes, kernels, strict=True)]
    assert found == [True, False, False]  # 128 tiles, 32 tiles, one channel
    assert not layers._suits_winograd(shapes[0], kernels[0], 2)
    assert not layers._suits_winograd(shapes[0], jnp.zeros((5, 5, 128, 32)), 1)
    assert layers._turns(jnp.zeros((6, 4)), 200).shape == (3, 2, 4)
    assert layers._turns(jnp.zeros((6, 4)), 600).shape == (6, 1, 4)


class Block(nn.Module):
    """Convolution, batch normalisation, ReLU and pool, twice, at a real width."""

    conv: type

    @nn.compact
    def __call__(self, x):
        for i, (features, stride) in enumerate([(128, 2), (128, 1)]):
            if self.conv is Conv:
                x = Conv(features, 3, stride, train=True, dtype=x.dtype, name=f"conv{i}")(x)
            else:
                x = nn.Conv(features, (3, 3), (stride, stride), padding=1, use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(batch_norm(True, None, x.dtype, name=f"norm{i}")(x))
        return layers.max_pool(x, (2, 2))


def test_a_layer_is_nn_conv_with_batch_normalisation_under_jit():
    """The gradients of two layers of 128 channels at odd sizes, in float32, against nn.Conv in float64."""
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


def test_fast_products_are_for_training_on_one_cpu_in_float32(monkeypatch):
    calls = []
    monkeypatch.setattr(layers, "fast_conv", lambda x, kernel, stride: calls.append(x.dtype) or lax_conv(x, kernel, stride))
    x = jnp.zeros((1, 8, 8, 2))

    def used(train, dtype=jnp.float32, features=32):
        calls.clear()
        jax.eval_shape(lambda: Conv(features, train=train, dtype=dtype).init(jax.random.key(0), x))
        return len(calls)

    assert jax.device_count() == 1
    assert (used(True), used(False), used(True, jnp.bfloat16), used(True, features=31)) == (1, 0, 0, 0)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert used(True) == 0
    monkeypatch.undo()
    monkeypatch.setattr(layers, "fast_conv", lambda x, kernel, stride: calls.append(x.dtype) or lax_conv(x, kernel, stride))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert used(True) == 0


@pytest.mark.parametrize(
    ("model", "frames", "bands", "count"),
    [
        ({"name": "short_chunk", "residual": True}, 231, 128, 21),
        ({"name": "resnet", "blocks": (2, 2, 2, 2)}, 64, 32, 20),
        ({"name": "fcn"}, 1366, 96, 4),
        ({"name": "crnn"}, 1366, 96, 4),
    ],
)
def test_the_two_dimensional_networks_train_with_it(monkeypatch, model, frames, bands, count):
    calls = []
    monkeypatch.setattr(layers, "fast_conv", lambda x, kernel, stride: calls.append(stride) or lax_conv(x, kernel, stride))
    module = models.build(model, num_classes=3, frames=frames, bands=bands)
    key = jax.random.key(0)
    jax.eval_shape(lambda: module.init({"params": key, "dropout": key}, jnp.zeros((2, frames, bands)), train=True))
    assert len(calls) == count


@pytest.mark.parametrize("shape", [(2, 9, 6, 3), (1, 12, 7, 2), (2, 33, 17, 128)])
def test_the_overlapping_pool_is_nn_max_pool_and_so_is_its_gradient(shape):
    """Values are rounded, so that many are equal: the first takes the gradient."""
    x = np.float32(np.maximum(np.round(drawn(*shape)), 0))

    def plain(x):
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

    expected, back = jax.vjp(plain, x)
    dy = np.float32(np.arange(expected.size).reshape(expected.shape) % 13 + 1)
    found, gradients = jax.jit(lambda x, dy: (max_pool_overlapping(x), jax.vjp(max_pool_overlapping, x)[1](dy)))(x, dy)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(gradients[0], back(dy)[0])
