import itertools

import numpy as np
import pytest

from musicgenre import models
from musicgenre.models.fcn import FCN_SIZES


def build(frames=1366, bands=96, classes=50, **fields):
    model = {"name": "fcn", **fields}
    return models.build(model, num_classes=classes, frames=frames, bands=bands)


def test_every_shape_of_fcn4(layer_shapes, variable_shapes, count):
    params = variable_shapes(build(), 1366, 96)["params"]
    extents = [(1366, 96), (341, 48), (68, 12), (8, 4), ()]
    expected = {"embedding": (2, 2048), "head": (2, 50)}
    for i, filters in enumerate((128, 384, 768, 2048)):
        expected[f"conv{i + 1}"] = expected[f"norm{i + 1}"] = (2, *extents[i], filters)
        expected[f"dropout{i + 1}"] = (2, *extents[i + 1], filters)
    assert layer_shapes(build(), 1366, 96) == expected
    assert FCN_SIZES["fcn4"].items() <= models.resolve({"name": "fcn"}).items()
    # Kernels of 3 x 3, a scale and a bias for each filter, and the head.
    filters = (1, 128, 384, 768, 2048)
    kernels = sum(9 * a * b + 2 * b for a, b in itertools.pairwise(filters))
    assert count(params) == kernels + 2048 * 50 + 50 == 17_362_610
    # The published 17.37 million count the idle biases of the convolutions as well.
    assert round((count(params) + sum(filters[1:])) / 1e6, 2) == 17.37


@pytest.mark.parametrize(
    ("name", "pooled"),
    [
        ("fcn3", [(273, 32), (17, 8), ()]),
        ("fcn5", [(341, 48), (85, 24), (21, 12), (4, 4), ()]),
        ("fcn6", [(341, 48), (85, 24), (21, 12), (4, 4), (), ()]),
        ("fcn7", [(341, 48), (85, 24), (21, 12), (4, 4), (), (), ()]),
        ("report", [(157, 64), (31, 16), (6, 4), ()]),
    ],
)
def test_every_size_ends_in_one_position(name, pooled, layer_shapes):
    frames, bands = (628, 128) if name == "report" else (1366, 96)
    fields = FCN_SIZES[name]
    layers = layer_shapes(build(frames, bands, **fields), frames, bands)
    filters = (*fields["filters"], *fields["pointwise"])
    assert [layers[f"dropout{i}"] for i in range(1, len(filters) + 1)] == [
        (2, *positions, channels) for positions, channels in zip(pooled, filters, strict=True)
    ]
    # The last pool covers exactly the output of the previous one.
    last = len(fields["filters"])
    assert layers[f"conv{last}"][1] // fields["time_pools"][-1] == 1
    assert layers[f"conv{last}"][2] == fields["band_pools"][-1]


def test_the_network_is_the_one_described(filled, apply, numpy_conv, numpy_norm):
    """A small one, worked with NumPy; the maximum of its four positions counts."""
    pools = {"time_pools": (2, 3), "band_pools": (2, 1)}
    module = build(14, 5, 2, filters=(3, 2), pointwise=(4,), **pools)
    variables = filled(module, 14, 5)
    x = np.random.default_rng(1).standard_normal((1, 14, 5)).astype(np.float32)
    p = variables["params"]
    y = numpy_conv(x[0][:, :, None], p["conv1"]["kernel"])
    y = np.maximum(numpy_norm(y, variables, "norm1"), 0)
    y = y[:, :4].reshape(7, 2, 2, 2, 3).max(axis=(1, 3))
    y = np.maximum(numpy_norm(numpy_conv(y, p["conv2"]["kernel"]), variables, "norm2"), 0)
    y = y[:6].reshape(2, 3, 2, 2).max(axis=1).max(axis=(0, 1))
    y = np.maximum(numpy_norm(y @ p["conv3"]["kernel"], variables, "norm3"), 0)
    logits, embedding = apply(module, variables, x)
    np.testing.assert_allclose(embedding[0], y, atol=1e-5)
    np.testing.assert_allclose(logits[0], y @ p["head"]["kernel"] + p["head"]["bias"], atol=1e-5)
