import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from musicgenre import models
from musicgenre.models.musicnn import _max_over_bands

FULL = models.build({"name": "musicnn"}, num_classes=50, frames=187, bands=96)
SMALL = dict(timbral_filters=3, temporal_filters=2, temporal_widths=(6, 4), mid_filters=4, dense=5)


def test_the_originals_sizes(layer_shapes, variable_shapes):
    layers, params = layer_shapes(FULL, 187, 96), variable_shapes(FULL, 187, 96)["params"]
    assert {name: layers[name][1:] for name in params if "norm" not in name} == {
        "timbral1": (187, 96 - 38 + 1, 204),
        "timbral2": (187, 96 - 67 + 1, 204),
        "temporal1": (187, 96, 51),
        "temporal2": (187, 96, 51),
        "temporal3": (187, 96, 51),
        "mid1": (187, 64),
        "mid2": (187, 64),
        "mid3": (187, 64),
        "dense1": (200,),
        "head": (50,),
    }
    assert layers["input_norm"] == (2, 187, 96, 1)
    assert layers["pool_norm"] == (2, 2 * (561 + 3 * 64))
    assert layers["embedding"] == (2, 200)


def test_shapes_and_count_of_the_published_weights(variable_shapes, count):
    """Shapes of the public checkpoint MTT_musicnn; their sum is worked by hand."""
    variables = variable_shapes(FULL, 187, 96)
    params = variables["params"]
    assert {name: layer["kernel"].shape for name, layer in params.items() if "kernel" in layer} == {
        "timbral1": (7, 38, 1, 204),
        "timbral2": (7, 67, 1, 204),
        "temporal1": (128, 1, 1, 51),
        "temporal2": (64, 1, 1, 51),
        "temporal3": (32, 1, 1, 51),
        "mid1": (7, 561, 64),
        "mid2": (7, 64, 64),
        "mid3": (7, 64, 64),
        "dense1": (1506, 200),
        "head": (200, 50),
    }
    assert all(layer["bias"].shape for layer in params.values())
    front = 2 + 7 * (38 + 67) * 204 + 2 * 3 * 204 + (128 + 64 + 32) * 51 + 3 * 3 * 51
    middle = (7 * 561 * 64 + 3 * 64) + 2 * (7 * 64 * 64 + 3 * 64)
    back = 2 * 1506 + (1506 * 200 + 3 * 200) + (200 * 50 + 50)
    assert count(params) == front + middle + back == 787_159
    assert {name: stats["mean"].shape for name, stats in variables["batch_stats"].items()} == {
        name: layer["scale"].shape for name, layer in params.items() if "scale" in layer
    }


def test_the_network_is_the_originals(lively, apply, numpy_norm):
    """Worked with NumPy in double precision, from the description of the original code."""
    frames, bands = 9, 10
    module = models.build({"name": "musicnn"} | SMALL, num_classes=2, frames=frames, bands=bands)
    x = np.random.default_rng(0).standard_normal((1, frames, bands), np.float32)
    variables = lively(module, frames, bands)
    double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    p = double["params"]

    def norm(x, name):
        return numpy_norm(x, double, name, epsilon=1e-3)

    def convolve(x, name):
        """Convolves `[frames, bands, channels]`; time is padded, more at the end, bands are not."""
        kernel = p[name]["kernel"]
        width, height = kernel.shape[:2]
        x = np.pad(x, (((width - 1) // 2, width // 2), (0, 0), (0, 0)))
        rows = range(x.shape[1] - height + 1)
        out = [
            [np.einsum("tbc,tbco->o", x[t : t + width, b : b + height], kernel) for b in rows]
            for t in range(frames)
        ]
        return norm(np.maximum(np.array(out) + p[name]["bias"], 0), f"{name}_norm")

    normal = norm(x[0].astype(np.float64)[:, :, None], "input_norm")
    assert [p[f"timbral{i}"]["kernel"].shape for i in (1, 2)] == [(7, 4, 1, 3), (7, 7, 1, 3)]
    names = ("timbral1", "timbral2", "temporal1", "temporal2")
    front = np.concatenate([convolve(normal, name).max(axis=1) for name in names], axis=1)
    for name in ("mid1", "mid2", "mid3"):
        p[name]["kernel"] = p[name]["kernel"][:, None]
    first = convolve(front[:, None], "mid1")[:, 0]
    second = convolve(first[:, None], "mid2")[:, 0] + first
    third = convolve(second[:, None], "mid3")[:, 0] + second
    everything = np.concatenate([front, first, second, third], axis=1)
    both = np.stack([everything.max(axis=0), everything.mean(axis=0)], axis=1)
    pooled = norm(both.ravel(), "pool_norm")
    hidden = np.maximum(pooled @ p["dense1"]["kernel"] + p["dense1"]["bias"], 0)
    penultimate = norm(hidden, "dense1_norm")
    logits, embedding = apply(module, variables, x)
    np.testing.assert_allclose(embedding[0], penultimate, rtol=1e-4, atol=1e-5)
    expected = penultimate @ p["head"]["kernel"] + p["head"]["bias"]
    np.testing.assert_allclose(logits[0], expected, rtol=1e-4, atol=1e-5)


def test_the_maximum_over_bands_has_the_gradient_of_flax_after_batch_norm():
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 5, 13, 204), jnp.float64)
        weights = jax.random.normal(jax.random.key(1), (2, 5, 204), jnp.float64)

        def loss(pool, x):
            y = nn.relu(x)
            y = (y - y.mean((0, 1, 2))) / jnp.sqrt(y.var((0, 1, 2)) + 1e-3)
            return (pool(y) * weights).sum()

        def flax_pool(y):
            return nn.max_pool(y, (1, 13), (1, 13))[:, :, 0]

        gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
        ours, flax = gradient(_max_over_bands, x), gradient(flax_pool, x)
        assert float(jnp.abs(ours - flax).max()) < 1e-9 * float(jnp.abs(flax).max())
