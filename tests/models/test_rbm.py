import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicgenre import models
from musicgenre.training.objectives.rbm import RBM, hidden_probabilities


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_fengs_sizes():
    """32 frames of 20 coefficients into 512 and 256 units."""
    module = models.build({"name": "rbm"}, num_classes=10, frames=32, bands=20)
    variables = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, 32, 20)), train=False)
    )
    assert {name: layer["kernel"].shape for name, layer in variables["params"].items()} == {
        "layer1": (640, 512),
        "layer2": (512, 256),
        "head": (256, 10),
    }
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert count == 641 * 512 + 513 * 256 + 257 * 10 == 462_090


def test_the_network_is_the_one_described():
    """Worked with NumPy; its hidden layers are the machines' hidden probabilities."""
    module = models.build({"name": "rbm", "layers": (5, 3)}, num_classes=2, frames=4, bands=3)
    x = jax.random.normal(jax.random.key(3), (6, 4, 3))
    variables = module.init(jax.random.key(4), x, train=False)
    params = jax.tree.map(lambda p: p + 0.1, variables["params"])  # biases that are not zero
    p = jax.tree.map(np.asarray, params)
    first = sigmoid(np.asarray(x).reshape(6, 12) @ p["layer1"]["kernel"] + p["layer1"]["bias"])
    second = sigmoid(first @ p["layer2"]["kernel"] + p["layer2"]["bias"])
    logits, embedding = models.apply_model(module, {"params": params}, x)
    np.testing.assert_allclose(embedding, second, atol=1e-6)
    np.testing.assert_allclose(logits, second @ p["head"]["kernel"] + p["head"]["bias"], atol=1e-6)
    rbm = RBM(p["layer2"]["kernel"], np.zeros(5), p["layer2"]["bias"])
    np.testing.assert_allclose(hidden_probabilities(rbm, first), embedding, atol=1e-6)


@pytest.mark.parametrize(
    ("frames", "bands", "layers"), [(1, 1, (4,)), (1, 1, ()), (7, 3, (2, 2, 2))]
)
def test_any_input_and_depth_will_do(frames, bands, layers):
    module = models.build(
        {"name": "rbm", "layers": layers}, num_classes=3, frames=frames, bands=bands
    )
    variables = module.init(jax.random.key(0), jnp.zeros((2, frames, bands)), train=False)
    logits, embedding = models.apply_model(
        module, {"params": variables["params"]}, jnp.ones((2, frames, bands))
    )
    assert logits.shape == (2, 3)
    assert embedding.shape == (2, layers[-1] if layers else frames * bands)


def test_dropout_falls_on_the_hidden_units_in_training_only():
    module = models.build(
        {"name": "rbm", "layers": (400,), "dropout": 0.25}, num_classes=400, frames=2, bands=2
    )
    x = jnp.zeros((1, 2, 2))
    variables = module.init(jax.random.key(0), x, train=False)
    # With this head the logits are the hidden units themselves, sigmoid(0) where nothing is
    # dropped.
    params = variables["params"] | {"head": {"kernel": jnp.eye(400), "bias": jnp.zeros(400)}}
    np.testing.assert_allclose(module.apply({"params": params}, x), 0.5)
    dropped = module.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(1)})
    kept = np.asarray(dropped != 0)
    np.testing.assert_allclose(np.asarray(dropped)[kept], 0.5 / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 0.09  # four deviations of 400 draws
