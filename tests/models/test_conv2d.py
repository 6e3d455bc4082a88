import numpy as np
import pytest

from musicgenre import models

# Worked by hand: kernels of 4 x 4 and biases; two pools of 256 over 2 (647 frames) or 1 (387)
# windows; dense 2048; head of 10.
CONVOLUTIONS = 16 * (32 + 32 * 144 + 144 * 256) + 32 + 144 + 256


def build(frames=387, bands=128, classes=10, name="conv2d", **fields):
    model = {"name": name, **fields}
    return models.build(model, num_classes=classes, frames=frames, bands=bands)


@pytest.mark.parametrize(("frames", "windows", "total"), [(647, 2, 2_784_186), (387, 1, 1_735_610)])
def test_it_has_as_many_parameters_as_conv1d(frames, windows, total, parameter_count):
    one, two = (parameter_count(build(frames, name=f"conv{n}d"), frames, 128) for n in (1, 2))
    assert two == CONVOLUTIONS + (512 * windows * 2048 + 2048) + 20_490 == total
    assert 0 < two / one - 1 < 0.005


def test_it_has_the_fields_of_conv1d_and_equal_defaults_except_the_filters():
    one, two = (models.resolve({"name": name}) for name in ("conv1d", "conv2d"))
    assert two.keys() == one.keys() - {"pooling", "widths"}
    assert {field for field in two if one[field] != two[field]} == {"name", "filters"}


def test_every_shape(layer_shapes):
    seen = layer_shapes(build(), 387, 128)
    expected = [(2, 194, 64, 32), (2, 49, 16, 144), (2, 12, 4, 256)]
    assert [seen[f"conv{i}"] for i in (1, 2, 3)] == expected
    assert seen["dense1"] == seen["embedding"] == (2, 2048)


def test_the_network_is_the_one_described(filled, apply):
    """One layer of two 2 x 2 filters, worked with NumPy; it leaves two windows of two frames."""
    fields = {"filters": (2,), "width": 2, "stride": 1, "pool": 2, "final_pool": 2, "dense": (3,)}
    module = build(9, 4, 2, **fields)
    variables = filled(module, 9, 4)
    x = np.random.default_rng(1).standard_normal((1, 9, 4)).astype(np.float32)
    p = variables["params"]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x[0], ((0, 1), (0, 1))), (2, 2))
    y = np.einsum("tbuv,uvo->tbo", windows, p["conv1"]["kernel"][:, :, 0]) + p["conv1"]["bias"]
    y = np.maximum(y, 0)[:8].reshape(4, 2, 2, 2, 2).max(axis=(1, 3))
    y = y.reshape(2, 2, 2, 2)  # window, frame, band, filter
    both = np.concatenate([y.max(axis=(1, 2)), y.mean(axis=(1, 2))], axis=1).ravel()
    hidden = np.maximum(both @ p["dense1"]["kernel"] + p["dense1"]["bias"], 0)
    logits, _ = apply(module, variables, x)
    expected = hidden @ p["head"]["kernel"] + p["head"]["bias"]
    np.testing.assert_allclose(logits[0], expected, atol=1e-6)
