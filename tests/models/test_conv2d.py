import numpy as np
import pytest

from musicgenre import models
from musicgenre.errors import UserError

# Worked by hand: kernels of 4 x 4 and biases; two pools of 256 over 2 (647 frames) or 1 (387)
# windows; dense 2048; head of 10.
CONVOLUTIONS = 16 * (32 + 32 * 144 + 144 * 256) + 32 + 144 + 256


def build(frames=387, bands=128, num_classes=10, **fields):
    return models.build(
        {"name": "conv2d", **fields}, num_classes=num_classes, frames=frames, bands=bands
    )


@pytest.mark.parametrize(
    ("frames", "windows", "expected"), [(647, 2, 2_784_186), (387, 1, 1_735_610)]
)
def test_it_has_as_many_parameters_as_conv1d(frames, windows, expected, parameter_count):
    sizes = {
        name: parameter_count(
            models.build({"name": name}, num_classes=10, frames=frames, bands=128), frames, 128
        )
        for name in ("conv1d", "conv2d")
    }
    assert sizes["conv2d"] == CONVOLUTIONS + (512 * windows * 2048 + 2048) + 20_490 == expected
    assert 0 < sizes["conv2d"] / sizes["conv1d"] - 1 < 0.005


def test_it_has_the_fields_of_conv1d_with_all_but_the_filters_alike():
    one, two = (models.resolve({"name": name}) for name in ("conv1d", "conv2d"))
    # Widths side by side and other ends are for the one dimension.
    assert two.keys() == one.keys() - {"pooling", "widths"}
    assert {field for field in two if one[field] != two[field]} == {"name", "filters"}


def test_every_shape(layer_shapes):
    seen = layer_shapes(build(), 387, 128)
    assert [seen[f"conv{i}"] for i in (1, 2, 3)] == [
        (2, 194, 64, 32),
        (2, 49, 16, 144),
        (2, 12, 4, 256),
    ]
    assert seen["dense1"] == seen["embedding"] == (2, 2048)


def test_the_network_is_the_one_described(filled, apply):
    """One layer of two 2 x 2 filters, worked with NumPy; it leaves two windows of two frames."""
    fields = {"filters": (2,), "width": 2, "stride": 1, "pool": 2, "final_pool": 2, "dense": (3,)}
    module = build(9, 4, 2, **fields)
    variables = filled(module, 9, 4)
    x = np.random.default_rng(1).standard_normal((1, 9, 4)).astype(np.float32)
    p = variables["params"]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x[0], ((0, 1), (0, 1))), (2, 2))
    y = np.maximum(
        np.einsum("tbuv,uvo->tbo", windows, p["conv1"]["kernel"][:, :, 0]) + p["conv1"]["bias"], 0
    )
    y = (
        y[:8].reshape(4, 2, 2, 2, 2).max(axis=(1, 3)).reshape(2, 2, 2, 2)
    )  # window, frame, band, filter
    both = np.concatenate([y.max(axis=(1, 2)), y.mean(axis=(1, 2))], axis=1).ravel()
    hidden = np.maximum(both @ p["dense1"]["kernel"] + p["dense1"]["bias"], 0)
    logits, _ = apply(module, variables, x)
    np.testing.assert_allclose(
        logits[0], hidden @ p["head"]["kernel"] + p["head"]["bias"], atol=1e-6
    )


def test_too_small_an_input_is_refused_with_both_shapes(check_runs):
    with pytest.raises(UserError, match=r"at least 235 frames.*234 frames x 43 bands"):
        build(234, 43)
    with pytest.raises(UserError, match=r"at least 43 bands.*235 frames x 42 bands"):
        build(235, 42)
    check_runs(build(235, 43, filters=(2, 2, 2), dense=(4,)), (2, 235, 43), (2, 10))
    check_runs(build(43, 43, filters=(2, 2, 2), final_pool=0, dense=()), (2, 43, 43), (2, 10))
