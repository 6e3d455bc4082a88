import itertools

import numpy as np
import pytest

from musicgenre import models
from musicgenre.errors import UserError
from musicgenre.models.fcn import FCN_SIZES


def build(frames=1366, bands=96, num_classes=50, **fields):
    return models.build(
        {"name": "fcn", **fields}, num_classes=num_classes, frames=frames, bands=bands
    )


def test_every_shape_of_fcn4(layer_shapes, variable_shapes, count):
    params = variable_shapes(build(), 1366, 96)["params"]
    assert layer_shapes(build(), 1366, 96) == {
        "conv1": (2, 1366, 96, 128),
        "norm1": (2, 1366, 96, 128),
        "dropout1": (2, 341, 48, 128),
        "conv2": (2, 341, 48, 384),
        "norm2": (2, 341, 48, 384),
        "dropout2": (2, 68, 12, 384),
        "conv3": (2, 68, 12, 768),
        "norm3": (2, 68, 12, 768),
        "dropout3": (2, 8, 4, 768),
        "conv4": (2, 8, 4, 2048),
        "norm4": (2, 8, 4, 2048),
        "dropout4": (2, 2048),
        "embedding": (2, 2048),
        "head": (2, 50),
    }
    assert FCN_SIZES["fcn4"] == {
        field: value
        for field, value in models.resolve({"name": "fcn"}).items()
        if field in FCN_SIZES["fcn4"]
    }
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
    # The last pool covers exactly what the one before it left.
    last = len(fields["filters"])
    assert layers[f"conv{last}"][1] // fields["time_pools"][-1] == 1
    assert layers[f"conv{last}"][2] == fields["band_pools"][-1]


def test_too_small_an_input_is_refused_with_both_shapes(check_runs):
    with pytest.raises(
        UserError, match=r"at least 1280 frames, but its input is 627 frames x 96 bands"
    ):
        build(627, 96)
    with pytest.raises(
        UserError, match=r"at least 1280 frames and at least 96 bands.*1279 frames x 95 bands"
    ):
        build(1279, 95)
    check_runs(build(1280, 96, filters=(2, 2, 2, 2)), (1, 1280, 96), (1, 50))
    with pytest.raises(UserError, match=r"at least 600 frames.*599 frames x 128 bands"):
        build(599, 128, **FCN_SIZES["report"])


def test_fields_of_the_layers_have_one_length():
    with pytest.raises(
        UserError,
        match=r"'fcn'.*model.filters=\(8, 8\), model.time_pools=\(4, 5, 8, 8\).*the same length",
    ):
        build(filters=(8, 8))


def test_the_network_is_the_one_described(filled, apply, numpy_conv, numpy_norm):
    """A small one, worked with NumPy; the maximum of its four positions counts."""
    module = build(
        14, 5, num_classes=2, filters=(3, 2), time_pools=(2, 3), band_pools=(2, 1), pointwise=(4,)
    )
    variables = filled(module, 14, 5)
    x = np.random.default_rng(1).standard_normal((1, 14, 5)).astype(np.float32)
    p = variables["params"]
    y = np.maximum(
        numpy_norm(numpy_conv(x[0][:, :, None], p["conv1"]["kernel"]), variables, "norm1"), 0
    )
    y = y[:, :4].reshape(7, 2, 2, 2, 3).max(axis=(1, 3))
    y = np.maximum(numpy_norm(numpy_conv(y, p["conv2"]["kernel"]), variables, "norm2"), 0)
    y = y[:6].reshape(2, 3, 2, 2).max(axis=1).max(axis=(0, 1))
    y = np.maximum(numpy_norm(y @ p["conv3"]["kernel"], variables, "norm3"), 0)
    logits, embedding = apply(module, variables, x)
    np.testing.assert_allclose(embedding[0], y, atol=1e-5)
    np.testing.assert_allclose(logits[0], y @ p["head"]["kernel"] + p["head"]["bias"], atol=1e-5)
