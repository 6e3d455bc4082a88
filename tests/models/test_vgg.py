import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicgenre import models

NARROW = {"name": "vgg", "filters": 2}


def test_the_originals_sizes(layer_shapes, variable_shapes, count):
    """Shapes of the public checkpoint MTT_vgg; the number of parameters is worked by hand."""
    module = models.build({"name": "vgg"}, num_classes=50, frames=187, bands=96)
    layers, variables = layer_shapes(module, 187, 96), variable_shapes(module, 187, 96)
    # The first pool leaves (187 - 4) // 2 + 1 = 92 frames and every second band.
    extents = [(187, 96), (92, 48), (46, 24), (23, 12), (11, 6)]
    assert [layers[f"conv{i}"] for i in range(1, 6)] == [(2, *extent, 128) for extent in extents]
    assert layers["embedding"] == (2, 256) and layers["head"] == (2, 50)
    params = variables["params"]
    kernels = {name: layer["kernel"].shape for name, layer in params.items() if "kernel" in layer}
    deeper = {f"conv{i}": (3, 3, 128, 128) for i in range(2, 6)}
    assert kernels == {"conv1": (3, 3, 1, 128), **deeper, "head": (256, 50)}
    assert count(params) == 2 + (9 + 3) * 128 + 4 * (9 * 128 + 3) * 128 + (256 + 1) * 50 == 605_748


def test_the_network_is_the_originals(apply, filled, numpy_norm, numpy_conv):
    """Worked with NumPy in double precision, from the description of the original code."""
    frames, bands = 98, 65
    module = models.build(NARROW, num_classes=3, frames=frames, bands=bands)
    variables = filled(module, frames, bands)
    x = np.random.default_rng(0).standard_normal((1, frames, bands), np.float32)

    def pool(y, size, stride):
        windows = np.lib.stride_tricks.sliding_window_view(y, size, axis=(0, 1))
        return windows[:: stride[0], :: stride[1]].max(axis=(-2, -1))

    y = numpy_norm(x[0].astype(np.float64)[:, :, None], variables, "input_norm", 1e-3)
    pools = [((4, 1), (2, 2)), *[((2, 2), (2, 2))] * 3, ((4, 4), (4, 4))]
    for i, (size, stride) in enumerate(pools, start=1):
        layer = variables["params"][f"conv{i}"]
        y = np.maximum(numpy_conv(y, np.asarray(layer["kernel"], np.float64)) + layer["bias"], 0)
        y = pool(numpy_norm(y, variables, f"conv{i}_norm", 1e-3), size, stride)
    assert y.shape == (1, 1, 2)
    logits, embedding = apply(module, variables, x)
    head = variables["params"]["head"]
    np.testing.assert_allclose(embedding[0], y.ravel(), rtol=1e-4, atol=1e-5)
    expected = y.ravel() @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits[0], expected, rtol=1e-4, atol=1e-5)


def test_frames_of_the_embedding_follow_each_other(apply, filled):
    """The first half of the embedding is that of the first half of the clip."""
    module = models.build(NARROW, num_classes=3, frames=187, bands=96)
    variables = filled(module, 187, 96)
    x = np.random.default_rng(0).standard_normal((1, 187, 96), np.float32)
    later = x.copy()
    later[:, 150:] += 3
    one, other = (np.asarray(apply(module, variables, v)[1][0]) for v in (x, later))
    assert one.shape == (4,)
    np.testing.assert_array_equal(one[:2], other[:2])
    assert np.abs(one[2:] - other[2:]).max() > 0.1


def test_dropout_is_where_the_original_has_it(filled):
    """Dropping everything after each pool or before the head leaves biases only."""
    x = np.random.default_rng(0).standard_normal((2, 66, 63), np.float32)

    def run(layer_dropout, dropout):
        fields = {"layer_dropout": layer_dropout, "dropout": dropout}
        module = models.build(NARROW | fields, num_classes=3, frames=66, bands=63)
        variables = filled(module, 66, 63)
        options = {"mutable": ["intermediates", "batch_stats"], "train": True}
        rngs = {"dropout": jax.random.key(1)}
        logits, sown = jax.jit(lambda v: module.apply(v, x, rngs=rngs, **options))(variables)
        embedding = np.asarray(sown["intermediates"]["embedding"][0])
        return np.asarray(logits), embedding, variables["params"]

    logits, embedding, params = run(1.0, 0.0)
    np.testing.assert_allclose(embedding, np.tile(params["conv5_norm"]["bias"], (2, 1)), atol=1e-5)
    logits, embedding, params = run(0.0, 1.0)
    assert np.abs(embedding[0] - embedding[1]).max() > 0.1
    np.testing.assert_array_equal(logits, np.tile(params["head"]["bias"], (2, 1)))


def test_the_gradient_of_the_overlapping_pool_is_right_after_batch_norm():
    """At real width under jit, against differences in double precision."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 13, 6, 128), jnp.float64)
        weights = jax.random.normal(jax.random.key(1), (2, 5, 3, 128), jnp.float64)
        direction = jax.random.normal(jax.random.key(2), x.shape, jnp.float64)

        @jax.jit
        def loss(x):
            y = nn.relu(x)
            y = (y - y.mean((0, 1, 2))) / jnp.sqrt(y.var((0, 1, 2)) + 1e-3)
            return (nn.max_pool(y, window_shape=(4, 1), strides=(2, 2)) * weights).sum()

        slope = float((jax.jit(jax.grad(loss))(x) * direction).sum())
        step = 1e-7
        difference = float((loss(x + step * direction) - loss(x - step * direction)) / (2 * step))
    assert slope == pytest.approx(difference, rel=1e-5)
