import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicgenre import models
from musicgenre.errors import UserError

# Worked by hand: convolutions 4x128x256 + 256 and twice 4x256x256 + 256; two pools of 256 over 2 (647 frames) or 1 (387)
# windows; dense 2048; head of 10.
CONVOLUTIONS = 4 * 128 * 256 + 256 + 2 * (4 * 256 * 256 + 256)


@pytest.mark.parametrize(("frames", "windows"), [(647, 2), (387, 1), (628, 2)])
def test_the_reports_sizes(frames, windows):
    module = models.build({"name": "conv1d"}, num_classes=10, frames=frames, bands=128)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, frames, 128)), train=False))
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert count == CONVOLUTIONS + (2 * 256 * windows * 2048 + 2048) + 2048 * 10 + 10
    assert {k: v["kernel"].shape for k, v in variables["params"].items()} == {
        "conv1": (4, 128, 256),
        "conv2": (4, 256, 256),
        "conv3": (4, 256, 256),
        "dense1": (512 * windows, 2048),
        "head": (2048, 10),
    }


def test_647_frames_have_the_published_count():
    assert CONVOLUTIONS + 1024 * 2048 + 2048 + 20490 == 2_775_818


def test_glorot_normal_initialisation():
    module = models.build({"name": "conv1d"}, num_classes=10, frames=647, bands=128)
    params = module.init(jax.random.key(0), jnp.zeros((1, 647, 128)), train=False)["params"]
    for name, fans in (("conv2", 4 * 256 + 4 * 256), ("dense1", 1024 + 2048)):
        assert abs(float(params[name]["kernel"].std()) / np.sqrt(2 / fans) - 1) < 0.02
        assert not params[name]["bias"].any()


def test_the_network_is_the_one_described():
    """One filter each, worked with NumPy."""
    module = models.build({"name": "conv1d", "filters": (1,), "dense": (1,), "final_pool": 2}, num_classes=2, frames=16, bands=1)
    x = jax.random.normal(jax.random.key(3), (1, 16, 1))
    variables = module.init(jax.random.key(4), x, train=False)
    p = jax.tree.map(np.asarray, variables["params"])
    padded = np.pad(np.asarray(x)[0, :, 0], 1)
    conv = np.array([padded[2 * i : 2 * i + 4] @ p["conv1"]["kernel"][:, 0, 0] for i in range(8)])
    pooled = np.maximum(conv, 0).reshape(4, 2).max(axis=1)
    both = np.stack([pooled.reshape(2, 2).max(axis=1), pooled.reshape(2, 2).mean(axis=1)], axis=1).ravel()
    hidden = np.maximum(both @ p["dense1"]["kernel"], 0)
    expected = hidden @ p["head"]["kernel"]
    np.testing.assert_allclose(module.apply(variables, x)[0], expected, atol=1e-6)


@pytest.mark.parametrize("output_dropout", [False, True])
def test_the_authors_dropout_of_logits_is_a_flag(output_dropout):
    module = models.build({"name": "conv1d", "output_dropout": output_dropout}, num_classes=50, frames=387, bands=128)
    x = jax.random.normal(jax.random.key(0), (4, 387, 128))
    variables = module.init(jax.random.key(0), x, train=False)
    logits = module.apply(variables, x, train=True, rngs={"dropout": jax.random.key(1)})
    assert abs(float((logits == 0).mean()) - (0.5 if output_dropout else 0.0)) < 0.15


def test_too_few_frames_are_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"at least 235 frames.*234 frames x 128 bands"):
        models.build({"name": "conv1d"}, num_classes=10, frames=234, bands=128)
    module = models.build({"name": "conv1d"}, num_classes=10, frames=235, bands=128)
    module.init(jax.random.key(0), jnp.zeros((1, 235, 128)), train=False)


def test_batch_norm_convolutions_have_no_bias():
    module = models.build({"name": "conv1d", "batch_norm": True}, num_classes=10, frames=387, bands=128)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 387, 128)), train=False)
    assert "bias" not in variables["params"]["conv1"] and set(variables) == {"params", "batch_stats"}
