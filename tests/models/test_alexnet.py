import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicgenre import models
from musicgenre.models.alexnet import grouped_convolution, local_response_norm

NARROW = {"filters": (4, 6, 4, 4, 2), "dense": (8, 8)}


def build(frames, bands, classes=10, **fields):
    model = {"name": "alexnet", **fields}
    return models.build(model, num_classes=classes, frames=frames, bands=bands)


# Each axis: ceil(n / 4), then (n - 3) // 2 + 1 at each pool. 387: 97, 48, 23, 11; 647: 162, 80, 39,
# 19; 128: 32, 15, 7, 3.
@pytest.mark.parametrize(("frames", "sizes"), [(387, (97, 48, 23, 11)), (647, (162, 80, 39, 19))])
def test_sizes_of_real_inputs(frames, sizes, layer_shapes, variable_shapes, count):
    layers = layer_shapes(build(frames, 128), frames, 128)
    params = variable_shapes(build(frames, 128), frames, 128)["params"]
    assert {name: layers[name][1:] for name in params} == {
        "conv1": (sizes[0], 32, 96),
        "conv2": (sizes[1], 15, 256),
        "conv3": (sizes[2], 7, 384),
        "conv4": (sizes[2], 7, 384),
        "conv5": (sizes[2], 7, 256),
        "dense1": (4096,),
        "dense2": (4096,),
        "head": (10,),
    }
    assert layers["embedding"] == (2, 4096)
    convolutions = 11_712 + 307_456 + 885_120 + 663_936 + 442_624
    dense = (sizes[3] * 3 * 256 * 4096 + 4096) + (4096 * 4096 + 4096) + (4096 * 10 + 10)
    assert count(params) == convolutions + dense == {387: 53_740_234, 647: 78_906_058}[frames]


def test_the_published_count(variable_shapes, count):
    """The original's 60,965,224 for 1,000 classes, less the first filters of two colours."""
    params = variable_shapes(build(227, 227, 1000), 227, 227)["params"]
    assert params["dense1"]["kernel"].shape == (6 * 6 * 256, 4096)
    assert count(params) == 60_965_224 - 2 * 11 * 11 * 96


def test_local_response_normalisation_equals_a_loop():
    x = 30 * np.random.default_rng(0).standard_normal((2, 3, 7))
    expected = np.empty_like(x)
    for channel in range(7):
        energy = (x[..., max(0, channel - 2) : channel + 3] ** 2).sum(axis=-1)
        expected[..., channel] = x[..., channel] / (2.0 + 1e-4 * energy) ** 0.75
    np.testing.assert_allclose(local_response_norm(jnp.float32(x)), expected, rtol=1e-5)
    # The size, the constant, the factor and the exponent each count.
    one = jnp.array([[1.0, 2.0, 4.0]])
    found = local_response_norm(one, 3, 1.0, 1.0, 1.0)
    np.testing.assert_allclose(found, [[1 / 6, 2 / 22, 4 / 21]], rtol=1e-6)
    assert local_response_norm(one.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_convolution_equals_laxs(groups):
    x = np.random.default_rng(0).standard_normal((2, 6, 5, 8), np.float32)
    kernel = np.random.default_rng(1).standard_normal((3, 3, 8 // groups, 12), np.float32)
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
    expected = jax.lax.conv_general_dilated(x, kernel, (2, 1), "SAME", **options)
    found = grouped_convolution(x, kernel, (2, 1), "SAME", **options)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_order_is_relu_normalisation_pool(lively, apply):
    fields = dict(filters=(3,), widths=(1,), stride=1, grouped=(), dense=())
    module = build(5, 5, response_norm=(1,), pool_after=(1,), **fields)
    x = 100 * np.random.default_rng(0).standard_normal((1, 5, 5), np.float32)
    params = lively(module, 5, 5)["params"]
    conv = params["conv1"]
    positive = np.maximum(x[0, :, :, None] * conv["kernel"][0, 0, 0] + conv["bias"], 0)
    energy = (positive**2).sum(axis=-1, keepdims=True)
    normal = positive / (2 + 1e-4 * energy) ** 0.75
    pooled = [normal[i : i + 3, j : j + 3].max(axis=(0, 1)) for i in (0, 2) for j in (0, 2)]
    _, embedding = apply(module, {"params": params}, x)
    np.testing.assert_allclose(embedding[0], np.concatenate(pooled), rtol=1e-5)


def test_the_grouped_layers_are_halved(variable_shapes):
    module = build(57, 57, **NARROW)
    params = variable_shapes(module, 57, 57)["params"]
    inputs = [params[f"conv{i}"]["kernel"].shape[2] for i in range(1, 6)]
    assert inputs == [1, 2, 6, 2, 2]


def test_dropout_acts_on_the_dense_layers_in_training_only(lively, apply):
    fields = NARROW | {"dense": (64, 64)}
    module, without = build(57, 57, **fields), build(57, 57, **fields, dropout=0.0)
    x = np.random.default_rng(1).standard_normal((2, 57, 57), np.float32)
    params = lively(module, 57, 57)
    train = jax.jit(lambda key: module.apply(params, x, train=True, rngs={"dropout": key}))
    first, second = train(jax.random.key(0)), train(jax.random.key(1))
    assert float(jnp.abs(first - second).max()) > 1e-3
    expected = jax.jit(lambda: without.apply(params, x, train=True))()
    np.testing.assert_allclose(apply(module, params, x)[0], expected, rtol=1e-6)
