import jax
import numpy as np
import pytest

from musicgenre import models

# Worked by hand: convolutions 4x128x256 + 256 and twice 4x256x256 + 256; two pools of 256 over 2
# (647 frames) or 1 (387) windows; dense 2048; head of 10.
CONVOLUTIONS = 4 * 128 * 256 + 256 + 2 * (4 * 256 * 256 + 256)


def build(frames=16, bands=3, classes=2, **fields):
    model = {"name": "conv1d", **fields}
    return models.build(model, num_classes=classes, frames=frames, bands=bands)


@pytest.mark.parametrize(("frames", "windows"), [(647, 2), (387, 1), (628, 2)])
def test_the_reports_sizes(frames, windows, variable_shapes, count):
    params = variable_shapes(build(frames, 128, 10), frames, 128)["params"]
    assert count(params) == CONVOLUTIONS + (2 * 256 * windows * 2048 + 2048) + 2048 * 10 + 10
    assert {k: v["kernel"].shape for k, v in params.items()} == {
        "conv1": (4, 128, 256),
        "conv2": (4, 256, 256),
        "conv3": (4, 256, 256),
        "dense1": (512 * windows, 2048),
        "head": (2048, 10),
    }


def test_glorot_normal_initialisation():
    x = np.zeros((1, 647, 128), np.float32)
    params = jax.jit(build(647, 128, 10).init)(jax.random.key(0), x)["params"]
    for name, fans in (("conv2", 4 * 256 + 4 * 256), ("dense1", 1024 + 2048)):
        assert abs(float(params[name]["kernel"].std()) / np.sqrt(2 / fans) - 1) < 0.02
        assert not params[name]["bias"].any()


def test_the_network_is_the_one_described(filled, apply):
    """One filter each, worked with NumPy."""
    module = build(bands=1, filters=(1,), dense=(1,), final_pool=2)
    x = np.random.default_rng(3).standard_normal((1, 16, 1), np.float32)
    variables = filled(module, 16, 1)
    p = variables["params"]
    padded = np.pad(x[0, :, 0], 1)
    conv = np.array([padded[2 * i : 2 * i + 4] @ p["conv1"]["kernel"][:, 0, 0] for i in range(8)])
    pooled = np.maximum(conv + p["conv1"]["bias"], 0).reshape(4, 2).max(axis=1).reshape(2, 2)
    both = np.stack([pooled.max(axis=1), pooled.mean(axis=1)], axis=1).ravel()
    hidden = np.maximum(both @ p["dense1"]["kernel"] + p["dense1"]["bias"], 0)
    expected = hidden @ p["head"]["kernel"] + p["head"]["bias"]
    np.testing.assert_allclose(apply(module, variables, x)[0][0], expected, atol=1e-5)


@pytest.mark.parametrize("output_dropout", [False, True])
def test_dropout_of_logits_as_the_authors_use_it_is_optional(output_dropout, filled):
    fields = {"filters": (4,), "dense": (4,), "final_pool": 0}
    module = build(classes=50, output_dropout=output_dropout, **fields)
    x = np.random.default_rng(0).standard_normal((4, 16, 3), np.float32)
    rngs = {"dropout": jax.random.key(1)}
    logits = module.apply(filled(module, 16, 3), x, train=True, rngs=rngs)
    assert abs(float((logits == 0).mean()) - (0.5 if output_dropout else 0.0)) < 0.15


@pytest.mark.parametrize(
    ("pooling", "features"), [("mean", 256), ("mean_max", 512), ("attention", 256)]
)
def test_a_global_pool_counts_its_channels_once(pooling, features, parameter_count):
    """For any number of frames; attention adds one weight per channel and no bias."""
    expected = CONVOLUTIONS + (features * 2048 + 2048) + 2048 * 10 + 10
    expected += 256 if pooling == "attention" else 0
    for frames in (387, 647):
        module = build(frames, 128, 10, pooling=pooling)
        assert parameter_count(module, frames, 128) == expected


# One layer of width 1, whose frames are independent; the head takes the pool's output.
PLAIN = {"filters": (4,), "width": 1, "stride": 1, "pool": 2, "dense": ()}


@pytest.mark.parametrize("pooling", ["mean", "mean_max", "attention"])
def test_global_pools_equal_numpy(pooling, filled, apply):
    module = build(pooling=pooling, **PLAIN)
    variables = filled(module, 16, 3)
    x = np.random.default_rng(1).standard_normal((2, 16, 3), np.float32)
    p = variables["params"]
    positive = np.maximum(x @ p["conv1"]["kernel"][0] + p["conv1"]["bias"], 0)
    pooled = positive.reshape(2, 8, 2, 4).max(axis=2)
    if pooling == "attention":
        score = np.exp(pooled @ p["attention"]["kernel"][:, 0])
        weights = score / score.sum(axis=1, keepdims=True)
        expected = np.einsum("bf,bfc->bc", weights, pooled)
        sown = module.apply(variables, x, mutable=["intermediates"])[1]["intermediates"]
        sown = sown["frame_weights"][0]
        np.testing.assert_allclose(sown, weights, rtol=1e-5)
        np.testing.assert_allclose(sown.sum(axis=1), 1.0, rtol=1e-6)
        assert np.ptp(weights, axis=1).min() > 0.05  # so that a mean would not pass
    else:
        expected = pooled.mean(axis=1)
        if pooling == "mean_max":
            expected = np.concatenate([pooled.max(axis=1), expected], axis=1)
    logits, embedding = apply(module, variables, x)
    np.testing.assert_allclose(embedding, expected, rtol=1e-5, atol=1e-6)
    expected = expected @ p["head"]["kernel"] + p["head"]["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    # A clip twice in a row is twice the same frames. With flatten it has other windows.
    twice, _ = apply(module, variables, np.concatenate([x, x], axis=1))
    np.testing.assert_allclose(twice, logits, rtol=1e-5, atol=1e-5)


def test_attention_starts_as_the_mean_and_learns_from_there(apply):
    module, mean = build(pooling="attention", **PLAIN), build(pooling="mean", **PLAIN)
    x = np.random.default_rng(1).standard_normal((2, 16, 3), np.float32)
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    assert not params["attention"]["kernel"].any()
    shared = {name: layer for name, layer in params.items() if name != "attention"}
    expected = apply(mean, {"params": shared}, x)[0]
    np.testing.assert_allclose(apply(module, {"params": params}, x)[0], expected, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda p: module.apply({"params": p}, x)[:, 0].sum()))(params)
    assert np.abs(gradient["attention"]["kernel"]).min() > 0


def test_one_flat_window_over_all_is_maximum_and_mean(filled, apply):
    module, flat = build(pooling="mean_max", **PLAIN), build(final_pool=0, **PLAIN)
    variables = filled(module, 16, 3)
    x = np.random.default_rng(1).standard_normal((2, 16, 3), np.float32)
    expected = apply(module, variables, x)[0]
    np.testing.assert_allclose(apply(flat, variables, x)[0], expected, rtol=1e-5)


def test_widths_divide_the_filters_and_are_concatenated(filled, apply, parameter_count):
    module = build(bands=1, widths=(1, 3), pooling="mean", filters=(2,), stride=2, pool=1, dense=())
    # One filter of width 1 and one of width 3 on one band, each with a bias; a head of 2 x 2 + 2.
    assert parameter_count(module, 16, 1) == (1 + 1) + (3 + 1) + 6
    variables = filled(module, 16, 1)
    p = variables["params"]
    x = np.random.default_rng(1).standard_normal((1, 16, 1), np.float32)
    # SAME at stride 2: a filter of 3 starts on the first frame, with one zero after the last.
    narrow = x[0, ::2, 0] * p["conv1_width1"]["kernel"][0, 0, 0] + p["conv1_width1"]["bias"]
    padded = np.append(x[0, :, 0], 0)
    wide = [padded[2 * i : 2 * i + 3] @ p["conv1_width3"]["kernel"][:, 0, 0] for i in range(8)]
    wide += p["conv1_width3"]["bias"]
    expected = np.maximum([narrow, wide], 0).mean(axis=1)
    np.testing.assert_allclose(apply(module, variables, x)[1][0], expected, rtol=1e-5, atol=1e-6)
    # The report's sizes: a quarter of 256 filters for each width, and one normalisation over all.
    module = build(387, 128, 10, widths=(2, 4, 8, 16), batch_norm=True)
    convolutions = 64 * (2 + 4 + 8 + 16) * (128 + 256 + 256)
    expected = convolutions + 3 * 512 + (512 * 2048 + 2048) + 2048 * 10 + 10
    assert parameter_count(module, 387, 128) == expected
