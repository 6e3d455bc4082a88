import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicgenre import models
from musicgenre.errors import UserError

# Worked by hand: kernels of 4 x 4 and biases; two pools of 256 over 2 (647 frames) or 1 (387) windows; dense 2048; head of 10.
CONVOLUTIONS = 16 * (32 + 32 * 144 + 144 * 256) + 32 + 144 + 256


def build(frames=387, bands=128, num_classes=10, **fields):
    return models.build({"name": "conv2d", **fields}, num_classes=num_classes, frames=frames, bands=bands)


def filled(module, frames, bands, seed=0):
    """Variables of random numbers, so that every bias and normalisation does something; kernels are scaled by their inputs."""
    x = jnp.zeros((1, frames, bands))
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False))
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 2.0, leaf.shape).astype(np.float32)
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.3
        return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, variables)


@pytest.mark.parametrize(("frames", "windows", "count"), [(647, 2, 2_784_186), (387, 1, 1_735_610)])
def test_it_has_as_many_parameters_as_conv1d(frames, windows, count):
    sizes = {}
    for name in ("conv1d", "conv2d"):
        module = models.build({"name": name}, num_classes=10, frames=frames, bands=128)
        variables = jax.eval_shape(lambda module=module: module.init(jax.random.key(0), jnp.zeros((1, frames, 128)), train=False))
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert sizes["conv2d"] == CONVOLUTIONS + (512 * windows * 2048 + 2048) + 20_490 == count
    assert 0 < sizes["conv2d"] / sizes["conv1d"] - 1 < 0.005


def test_it_has_the_fields_of_conv1d_with_all_but_the_filters_alike():
    one, two = (models.resolve({"name": name}) for name in ("conv1d", "conv2d"))
    assert one.keys() == two.keys()
    assert {field for field in one if one[field] != two[field]} == {"name", "filters"}


def test_every_shape():
    module = build()
    x = jnp.zeros((2, 387, 128))
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False))
    seen = jax.eval_shape(
        lambda v: module.apply(v, x, train=False, capture_intermediates=True, mutable=["intermediates"])[1], variables
    )["intermediates"]
    assert [seen[f"conv{i}"]["__call__"][0].shape for i in (1, 2, 3)] == [
        (2, 194, 64, 32),
        (2, 49, 16, 144),
        (2, 12, 4, 256),
    ]
    assert seen["dense1"]["__call__"][0].shape == seen["embedding"][0].shape == (2, 2048)


def test_the_network_is_the_one_described():
    """One layer with two filters of 2 x 2, worked with NumPy: two windows of two frames are left, and both bands."""
    fields = {"filters": (2,), "width": 2, "stride": 1, "pool": 2, "final_pool": 2, "dense": (3,)}
    module = build(9, 4, 2, **fields)
    variables = filled(module, 9, 4)
    x = np.random.default_rng(1).standard_normal((1, 9, 4)).astype(np.float32)
    p = variables["params"]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x[0], ((0, 1), (0, 1))), (2, 2))
    y = np.maximum(np.einsum("tbuv,uvo->tbo", windows, p["conv1"]["kernel"][:, :, 0]) + p["conv1"]["bias"], 0)
    y = y[:8].reshape(4, 2, 2, 2, 2).max(axis=(1, 3)).reshape(2, 2, 2, 2)  # window, frame, band, filter
    both = np.concatenate([y.max(axis=(1, 2)), y.mean(axis=(1, 2))], axis=1).ravel()
    hidden = np.maximum(both @ p["dense1"]["kernel"] + p["dense1"]["bias"], 0)
    logits = jax.jit(lambda v, x: module.apply(v, x, train=False))(variables, x)
    np.testing.assert_allclose(logits[0], hidden @ p["head"]["kernel"] + p["head"]["bias"], atol=1e-6)


def test_too_small_an_input_is_refused_with_both_shapes():
    with pytest.raises(UserError, match=r"at least 235 frames.*234 frames x 43 bands"):
        build(234, 43)
    with pytest.raises(UserError, match=r"at least 43 bands.*235 frames x 42 bands"):
        build(235, 42)
    module = build(235, 43, filters=(2, 2, 2), dense=(4,))
    whole = build(43, 43, filters=(2, 2, 2), final_pool=0, dense=())
    for net, frames in ((module, 235), (whole, 43)):
        logits = jax.jit(lambda v, x, net=net: net.apply(v, x))(filled(net, frames, 43), jnp.ones((2, frames, 43)))
        assert logits.shape == (2, 10) and np.isfinite(logits).all()


def test_batch_norm_convolutions_have_no_bias():
    module = build(batch_norm=True)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 387, 128)), train=False))
    assert "bias" not in variables["params"]["conv1"] and set(variables) == {"params", "batch_stats"}
