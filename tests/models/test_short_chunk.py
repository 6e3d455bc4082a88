import itertools

import jax
import numpy as np
import pytest

from musicgenre import models

FILTERS = (1, 128, 128, 256, 256, 256, 256, 512)
PAIRS = list(itertools.pairwise(FILTERS))
# Dense 512 without a bias, its normalisation, and the head.
REST = 512 * 512 + 2 * 512 + 512 * 50 + 50


def build(frames=231, bands=128, **fields):
    model = {"name": "short_chunk", **fields}
    return models.build(model, num_classes=50, frames=frames, bands=bands)


def test_the_published_counts(parameter_count):
    plain, residual = (parameter_count(build(residual=r), 231, 128) for r in (False, True))
    assert plain == sum(9 * a * b + 2 * b for a, b in PAIRS) + REST == 3_685_042
    assert residual == sum(9 * (2 * a * b + b * b) + 6 * b for a, b in PAIRS) + REST == 12_098_354
    # The public code's: with idle biases of every convolution and of the dense layer, and the
    # input's scale and offset.
    biases = sum(FILTERS[1:])
    assert plain + biases + 512 + 2 == 3_687_348 and residual + 3 * biases + 512 + 2 == 12_104_244


@pytest.mark.parametrize(
    ("residual", "sizes"),
    [
        (False, [(231, 128), (115, 64), (57, 32), (28, 16), (14, 8), (7, 4), (3, 2)]),
        (True, [(116, 64), (58, 32), (29, 16), (15, 8), (8, 4), (4, 2), (2, 1)]),
    ],
)
def test_every_shape(residual, sizes, layer_shapes):
    seen = layer_shapes(build(residual=residual), 231, 128)
    names = [f"conv{i}{'_shortcut' if residual else ''}" for i in range(1, 8)]
    expected = [(2, *extent, filters) for extent, filters in zip(sizes, FILTERS[1:], strict=True)]
    assert [seen[name] for name in names] == expected
    assert seen["embedding"] == (2, 512)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("frames", "bands"), [(8, 6), (7, 5)])
def test_the_network_is_the_one_described(
    residual, frames, bands, filled, apply, numpy_conv, numpy_norm
):
    """A small one, worked with NumPy."""
    module = build(frames, bands, residual=residual, filters=(3, 2), dense=4)
    variables = filled(module, frames, bands)
    x = np.random.default_rng(1).standard_normal((1, frames, bands)).astype(np.float32)
    p = variables["params"]

    def layer(y, name, stride=1):
        return numpy_norm(numpy_conv(y, p[name]["kernel"], stride), variables, f"{name}_norm")

    y = numpy_norm(x[0][:, :, None], variables, "input_norm")
    for i in (1, 2):
        if residual:
            z = layer(np.maximum(layer(y, f"conv{i}a", 2), 0), f"conv{i}b")
            y = np.maximum(z + layer(y, f"conv{i}_shortcut", 2), 0)
        else:
            y = np.maximum(layer(y, f"conv{i}"), 0)
            rows, columns = y.shape[0] // 2, y.shape[1] // 2
            y = y[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2, -1).max(axis=(1, 3))
    y = y.max(axis=(0, 1)) @ p["dense"]["kernel"]
    y = np.maximum(numpy_norm(y, variables, "dense_norm"), 0)
    logits, _ = apply(module, variables, x)
    np.testing.assert_allclose(logits[0], y @ p["head"]["kernel"] + p["head"]["bias"], atol=1e-5)


def test_the_inputs_unit_and_offset_do_not_matter_in_training(filled):
    module = build(128, 128, filters=(2,) * 7, dropout=0.0)
    x = jax.random.normal(jax.random.key(0), (4, 128, 128))
    variables = filled(module, 128, 128)
    run = jax.jit(lambda x: module.apply(variables, x, train=True, mutable=["batch_stats"])[0])
    np.testing.assert_allclose(run(x), run(20 * x - 40), atol=1e-3)
    other = build(128, 128, filters=(2,) * 7, dropout=0.0, input_norm=False)
    plain = {"params": variables["params"]}
    plain["batch_stats"] = {k: v for k, v in variables["batch_stats"].items() if k != "input_norm"}
    run = jax.jit(lambda x: other.apply(plain, x, train=True, mutable=["batch_stats"])[0])
    assert np.abs(run(x) - run(20 * x - 40)).max() > 0.1
