import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicgenre import models
from musicgenre.models.spotify import l2_pool

FULL = models.build({"name": "spotify"}, num_classes=40, frames=599, bands=128)
NARROW = {"name": "spotify", "filters": (4, 4, 4, 6), "dense": (8, 8)}


def test_the_posts_sizes(layer_shapes, variable_shapes):
    """(599 - 3) // 4 = 149, (149 - 3) // 2 = 73, (73 - 3) // 2 = 35, 35 - 3 = 32."""
    layers, params = layer_shapes(FULL, 599, 128), variable_shapes(FULL, 599, 128)["params"]
    assert {name: layers[name] for name in params} == {
        "conv1": (2, 596, 256),
        "conv2": (2, 146, 256),
        "conv3": (2, 70, 256),
        "conv4": (2, 32, 512),
        "dense1": (2, 2048),
        "dense2": (2, 2048),
        "head": (2, 40),
    }
    assert params["dense1"]["kernel"].shape == (1536, 2048)
    assert layers["embedding"] == (2, 2048)


def test_parameters_counted_by_hand(parameter_count):
    dense = (1536 * 2048 + 2048) + (2048 * 2048 + 2048) + (2048 * 40 + 40)
    by_hand = 131_328 + 262_400 + 262_400 + 524_800 + dense
    assert parameter_count(FULL, 599, 128) == by_hand == 8_607_016


def test_the_network_is_the_one_described(lively, apply):
    """Worked with NumPy: convolution, ReLU and pool, twice, then mean, maximum and norm."""
    model = {"name": "spotify", "filters": (2, 3), "width": 2, "first_pool": 2, "dense": (4,)}
    module = models.build(model, num_classes=2, frames=9, bands=3)
    x = np.random.default_rng(0).standard_normal((1, 9, 3), np.float32)
    p = lively(module, 9, 3)["params"]

    def conv(x, layer):
        kernel, bias = p[layer]["kernel"], p[layer]["bias"]
        rows = [sum(x[t + i] @ kernel[i] for i in range(2)) + bias for t in range(len(x) - 1)]
        return np.maximum(np.array(rows), 0)

    first = conv(x[0], "conv1").reshape(4, 2, 2).max(axis=1)
    second = conv(first, "conv2")
    norm = np.sqrt((second**2).sum(axis=0))
    pooled = np.concatenate([second.mean(axis=0), second.max(axis=0), norm])
    hidden = np.maximum(pooled @ p["dense1"]["kernel"] + p["dense1"]["bias"], 0)
    logits, embedding = apply(module, {"params": p}, x)
    np.testing.assert_allclose(embedding[0], hidden, atol=1e-6)
    expected = hidden @ p["head"]["kernel"] + p["head"]["bias"]
    np.testing.assert_allclose(logits[0], expected, atol=1e-6)


def test_l2_pool_is_the_norm():
    x = np.random.default_rng(0).standard_normal((2, 5, 3), np.float32)
    np.testing.assert_allclose(l2_pool(x), np.linalg.norm(x, axis=1), rtol=1e-6)
    gradient = jax.grad(lambda x: l2_pool(x)[0, 1])(x)
    expected = x[0, :, 1] / np.linalg.norm(x[0, :, 1])
    np.testing.assert_allclose(gradient[0, :, 1], expected, rtol=1e-6)
    assert l2_pool(x.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_l2_pool_has_a_finite_gradient_where_nothing_fires(dtype):
    x = jnp.array([[[0.0, 3.0], [0.0, 4.0]]], dtype)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: l2_pool(x).sum()))(x)
    assert value == 5.0
    np.testing.assert_allclose(gradient.astype(jnp.float32), [[[0.0, 0.6], [0.0, 0.8]]], rtol=0.01)


def test_dead_filters_leave_every_gradient_finite(lively):
    module = models.build(NARROW, num_classes=3, frames=103, bands=5)
    params = lively(module, 103, 5)["params"]
    params["conv4"]["bias"][:] = -100.0
    x = np.random.default_rng(1).standard_normal((2, 103, 5), np.float32)
    gradients = jax.jit(jax.grad(lambda p: (module.apply({"params": p}, x) ** 2).sum()))(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))
