import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicgenre import models
from musicgenre.errors import UserError

# Worked by hand: convolutions 4x128x256 + 256 and twice 4x256x256 + 256; two pools of 256 over 2
# (647 frames) or 1 (387) windows; dense 2048; head of 10.
CONVOLUTIONS = 4 * 128 * 256 + 256 + 2 * (4 * 256 * 256 + 256)


@pytest.mark.parametrize(("frames", "windows"), [(647, 2), (387, 1), (628, 2)])
def test_the_reports_sizes(frames, windows):
    module = models.build({"name": "conv1d"}, num_classes=10, frames=frames, bands=128)
    variables = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, frames, 128)), train=False)
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert count == CONVOLUTIONS + (2 * 256 * windows * 2048 + 2048) + 2048 * 10 + 10
    assert {k: v["kernel"].shape for k, v in variables["params"].items()} == {
        "conv1": (4, 128, 256),
        "conv2": (4, 256, 256),
        "conv3": (4, 256, 256),
        "dense1": (512 * windows, 2048),
        "head": (2048, 10),
    }


def test_glorot_normal_initialisation():
    module = models.build({"name": "conv1d"}, num_classes=10, frames=647, bands=128)
    params = module.init(jax.random.key(0), jnp.zeros((1, 647, 128)), train=False)["params"]
    for name, fans in (("conv2", 4 * 256 + 4 * 256), ("dense1", 1024 + 2048)):
        assert abs(float(params[name]["kernel"].std()) / np.sqrt(2 / fans) - 1) < 0.02
        assert not params[name]["bias"].any()


def test_the_network_is_the_one_described():
    """One filter each, worked with NumPy."""
    module = models.build(
        {"name": "conv1d", "filters": (1,), "dense": (1,), "final_pool": 2},
        num_classes=2,
        frames=16,
        bands=1,
    )
    x = jax.random.normal(jax.random.key(3), (1, 16, 1))
    variables = module.init(jax.random.key(4), x, train=False)
    p = jax.tree.map(np.asarray, variables["params"])
    padded = np.pad(np.asarray(x)[0, :, 0], 1)
    conv = np.array([padded[2 * i : 2 * i + 4] @ p["conv1"]["kernel"][:, 0, 0] for i in range(8)])
    pooled = np.maximum(conv, 0).reshape(4, 2).max(axis=1)
    both = np.stack(
        [pooled.reshape(2, 2).max(axis=1), pooled.reshape(2, 2).mean(axis=1)], axis=1
    ).ravel()
    hidden = np.maximum(both @ p["dense1"]["kernel"], 0)
    expected = hidden @ p["head"]["kernel"]
    np.testing.assert_allclose(module.apply(variables, x)[0], expected, atol=1e-6)


@pytest.mark.parametrize("output_dropout", [False, True])
def test_the_authors_dropout_of_logits_is_a_flag(output_dropout):
    module = models.build(
        {"name": "conv1d", "output_dropout": output_dropout}, num_classes=50, frames=387, bands=128
    )
    x = jax.random.normal(jax.random.key(0), (4, 387, 128))
    variables = module.init(jax.random.key(0), x, train=False)
    logits = module.apply(variables, x, train=True, rngs={"dropout": jax.random.key(1)})
    assert abs(float((logits == 0).mean()) - (0.5 if output_dropout else 0.0)) < 0.15


def test_too_few_frames_are_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"at least 235 frames.*234 frames x 128 bands"):
        models.build({"name": "conv1d"}, num_classes=10, frames=234, bands=128)
    module = models.build({"name": "conv1d"}, num_classes=10, frames=235, bands=128)
    module.init(jax.random.key(0), jnp.zeros((1, 235, 128)), train=False)


def built(frames=16, bands=3, **fields):
    return models.build({"name": "conv1d", **fields}, num_classes=2, frames=frames, bands=bands)


@pytest.mark.parametrize(
    ("pooling", "features"), [("mean", 256), ("mean_max", 512), ("attention", 256)]
)
def test_a_global_pool_counts_its_channels_once(pooling, features, parameter_count):
    """Whatever the frames; attention adds one weight a channel and no bias."""
    expected = (
        CONVOLUTIONS
        + (features * 2048 + 2048)
        + 2048 * 10
        + 10
        + (256 if pooling == "attention" else 0)
    )
    for frames in (387, 647):
        module = models.build(
            {"name": "conv1d", "pooling": pooling}, num_classes=10, frames=frames, bands=128
        )
        assert parameter_count(module, frames, 128) == expected


# One layer of width 1, whose frames are independent; the head takes the pool's output.
PLAIN = {"filters": (4,), "width": 1, "stride": 1, "pool": 2, "dense": ()}


@pytest.mark.parametrize("pooling", ["mean", "mean_max", "attention"])
def test_global_pools_equal_numpy(pooling, filled, apply):
    module = built(pooling=pooling, **PLAIN)
    variables = filled(module, 16, 3)
    x = np.random.default_rng(1).standard_normal((2, 16, 3), np.float32)
    p = variables["params"]
    pooled = (
        np.maximum(x @ p["conv1"]["kernel"][0] + p["conv1"]["bias"], 0)
        .reshape(2, 8, 2, 4)
        .max(axis=2)
    )
    if pooling == "attention":
        score = np.exp(pooled @ p["attention"]["kernel"][:, 0])
        weights = score / score.sum(axis=1, keepdims=True)
        expected = np.einsum("bf,bfc->bc", weights, pooled)
        sown = module.apply(variables, x, train=False, mutable=["intermediates"])[1][
            "intermediates"
        ]["frame_weights"][0]
        np.testing.assert_allclose(sown, weights, rtol=1e-5)
        np.testing.assert_allclose(sown.sum(axis=1), 1.0, rtol=1e-6)
        assert np.ptp(weights, axis=1).min() > 0.05  # so that a mean would not pass
    else:
        expected = pooled.mean(axis=1)
        if pooling == "mean_max":
            expected = np.concatenate([pooled.max(axis=1), expected], axis=1)
    logits, embedding = apply(module, variables, x)
    np.testing.assert_allclose(embedding, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        logits, expected @ p["head"]["kernel"] + p["head"]["bias"], rtol=1e-5, atol=1e-5
    )
    # A clip twice in a row is twice the same frames. With flatten it has other windows.
    twice, _ = apply(module, variables, np.concatenate([x, x], axis=1))
    np.testing.assert_allclose(twice, logits, rtol=1e-5, atol=1e-5)


def test_attention_starts_as_the_mean_and_learns_from_there(apply):
    module, mean = built(pooling="attention", **PLAIN), built(pooling="mean", **PLAIN)
    x = np.random.default_rng(1).standard_normal((2, 16, 3), np.float32)
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    assert not params["attention"]["kernel"].any()
    shared = {name: layer for name, layer in params.items() if name != "attention"}
    np.testing.assert_allclose(
        apply(module, {"params": params}, x)[0], apply(mean, {"params": shared}, x)[0], atol=1e-6
    )
    gradient = jax.jit(jax.grad(lambda p: module.apply({"params": p}, x)[:, 0].sum()))(params)
    assert np.abs(gradient["attention"]["kernel"]).min() > 0


def test_one_flat_window_over_all_is_maximum_and_mean(filled, apply):
    module, flat = (
        built(pooling="mean_max", **PLAIN),
        built(pooling="flatten", final_pool=0, **PLAIN),
    )
    variables = filled(module, 16, 3)
    x = np.random.default_rng(1).standard_normal((2, 16, 3), np.float32)
    np.testing.assert_allclose(
        apply(flat, variables, x)[0], apply(module, variables, x)[0], rtol=1e-5
    )


def test_widths_share_the_filters_and_lie_side_by_side(filled, apply, parameter_count):
    module = built(bands=1, widths=(1, 3), pooling="mean", filters=(2,), stride=2, pool=1, dense=())
    # One filter of width 1 and one of width 3 on one band, each with a bias; a head of 2 x 2 + 2.
    assert parameter_count(module, 16, 1) == (1 + 1) + (3 + 1) + 6
    variables = filled(module, 16, 1)
    p = variables["params"]
    x = np.random.default_rng(1).standard_normal((1, 16, 1), np.float32)
    # SAME at stride 2: a filter of 3 starts on the first frame, with one zero after the last.
    narrow = x[0, ::2, 0] * p["conv1_width1"]["kernel"][0, 0, 0] + p["conv1_width1"]["bias"]
    padded = np.append(x[0, :, 0], 0)
    wide = [padded[2 * i : 2 * i + 3] @ p["conv1_width3"]["kernel"][:, 0, 0] for i in range(8)] + p[
        "conv1_width3"
    ]["bias"]
    expected = np.maximum([narrow, wide], 0).mean(axis=1)
    np.testing.assert_allclose(apply(module, variables, x)[1][0], expected, rtol=1e-5, atol=1e-6)
    # The report's sizes: a quarter of 256 filters for each width, and one normalisation over all.
    module = models.build(
        {"name": "conv1d", "widths": (2, 4, 8, 16), "batch_norm": True},
        num_classes=10,
        frames=387,
        bands=128,
    )
    convolutions = 64 * (2 + 4 + 8 + 16) * (128 + 256 + 256)
    assert (
        parameter_count(module, 387, 128)
        == convolutions + 3 * 512 + (512 * 2048 + 2048) + 2048 * 10 + 10
    )


def test_a_global_pool_needs_fewer_frames(layer_shapes):
    """43 frames leave 22, 11, 6, 3, 2 and 1; 42 leave 21, 10, 5, 2, 1 and none."""
    for pooling in ("mean", "mean_max", "attention"):
        with pytest.raises(UserError, match="at least 43 frames"):
            built(frames=42, pooling=pooling)
        shapes = layer_shapes(built(frames=43, pooling=pooling), 43, 3)
        assert [shapes[name] for name in ("conv1", "conv2", "conv3")] == [
            (2, 22, 256),
            (2, 6, 256),
            (2, 2, 256),
        ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"pooling": "maen"},
            r"model.pooling of 'conv1d': 'maen' is not known. Did you mean 'mean'",
        ),
        (
            {"widths": (2, 2)},
            r"model.widths of 'conv1d' takes different numbers .* at least 1, not \(2, 2\)",
        ),
        ({"widths": (0,)}, r"each at least 1, not \(0,\)"),
        ({"widths": (2.5,)}, r"each at least 1, not \(2.5,\)"),
        (
            {"widths": (2, 4, 8)},
            r"must divide by the number of model.widths=\(2, 4, 8\): 256 filters do not",
        ),
    ],
)
def test_ends_and_widths_that_do_not_fit_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        built(frames=647, **fields)
