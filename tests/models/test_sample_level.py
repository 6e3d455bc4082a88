import numpy as np
import pytest

from musicgenre import models

# A 3^2 model: 27 samples leave one position.
TINY = dict(first_filters=2, filters=(3, 2), last_filters=4, excite_ratio=2)


def build(frames, bands, classes=2, **fields):
    model = {"name": "sample_level", **fields}
    return models.build(model, num_classes=classes, frames=frames, bands=bands)


def test_the_papers_sizes(layer_shapes, variable_shapes):
    """Lengths are 59,049 / 3 = 19,683, and a third after each pool."""
    module = build(81, 729, 50)
    layers, params = layer_shapes(module, 81, 729), variable_shapes(module, 81, 729)["params"]
    filters = (128, 128, 128, 256, 256, 256, 256, 256, 256, 512, 512)
    lengths = (19_683, 19_683, 6_561, 2_187, 729, 243, 81, 27, 9, 3, 1)
    found = [layers[f"conv{i + 1}"] for i in range(11)]
    assert found == [(2, *sizes) for sizes in zip(lengths, filters, strict=True)]
    assert layers["embedding"] == (2, 512)
    assert params["conv1"]["kernel"].shape == (3, 1, 128)
    assert params["conv11"]["kernel"].shape == (1, 512, 512)


def test_parameters_counted_by_hand(parameter_count):
    ours = parameter_count(build(81, 729, 50), 81, 729)
    # The authors' convolutions with their biases, layer by layer, and the dense layer.
    convolutions = 512 + 2 * 49_280 + 98_560 + 5 * 196_864 + 393_728 + 262_656
    assert convolutions + 512 * 50 + 50 == 1_863_986
    channels = 3 * 128 + 6 * 256 + 2 * 512
    theirs = 1_863_986 + 2 * channels
    assert ours == theirs - channels == 1_866_930
    assert abs(ours / theirs - 1) < 0.005


def test_squeeze_and_excitation_counted_by_hand(parameter_count):
    """For c channels c x 16c + 16c and 16c x c + c."""
    module = build(81, 729, 50, squeeze_excite=True)
    added = sum(32 * c * c + 17 * c for c in (128, 128, 256, 256, 256, 256, 256, 256, 512))
    assert parameter_count(module, 81, 729) == 1_866_930 + added == 23_926_194


@pytest.mark.parametrize("squeeze_excite", [False, True])
@pytest.mark.parametrize("samples", [27, 60])
def test_the_network_is_the_one_described(squeeze_excite, samples, lively, apply, numpy_norm):
    """Worked with NumPy; 60 samples leave the mean of two positions and drop six."""
    module = build(samples, 1, squeeze_excite=squeeze_excite, **TINY)
    x = np.random.default_rng(0).standard_normal((1, samples, 1), np.float32)
    variables = lively(module, samples, 1)
    p = variables["params"]

    def layer(x, name, stride=1):
        kernel = p[name]["kernel"]
        padded = np.pad(x, ((len(kernel) // 2,) * 2, (0, 0))) if stride == 1 else x
        starts = range(0, len(padded) - len(kernel) + 1, stride)
        out = [np.einsum("tc,tco->o", padded[t : t + len(kernel)], kernel) for t in starts]
        return np.maximum(numpy_norm(np.array(out), variables, f"{name}_norm"), 0)

    def pool(x):
        length = len(x) // 3
        return x[: length * 3].reshape(length, 3, -1).max(axis=1)

    def dense(x, name):
        return x @ p[name]["kernel"] + p[name]["bias"]

    y = layer(x[0], "conv1", stride=3)
    for number in (2, 3):
        y = pool(layer(y, f"conv{number}"))
        if squeeze_excite:
            hidden = np.maximum(dense(y.mean(axis=0), f"squeeze{number}"), 0)
            assert hidden.shape == (2 * y.shape[1],)
            y = y / (1 + np.exp(-dense(hidden, f"excite{number}")))
    assert len(y) == samples // 27
    expected = layer(y, "conv4").mean(axis=0)
    logits, embedding = apply(module, variables, x)
    np.testing.assert_allclose(embedding[0], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(logits[0], dense(expected, "head"), rtol=1e-4, atol=1e-6)


def test_frames_are_joined_to_the_waveform(lively, apply):
    module = build(9, 3, **TINY)
    x = np.random.default_rng(0).standard_normal((2, 27), np.float32)
    variables = lively(module, 9, 3)
    logits = [apply(module, variables, x.reshape(2, n, -1))[0] for n in (1, 3, 9, 27)]
    for other in logits[1:]:
        np.testing.assert_array_equal(other, logits[0])
    mixed, _ = apply(module, variables, x.reshape(2, 9, 3).swapaxes(1, 2))
    assert not np.allclose(logits[0], mixed)
