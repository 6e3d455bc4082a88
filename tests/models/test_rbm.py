import jax
import jax.numpy as jnp
import numpy as np

from musicgenre import models
from musicgenre.training.objectives.rbm import RBM, hidden_probabilities


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_fengs_sizes(variable_shapes, count):
    """32 frames of 20 coefficients into 512 and 256 units."""
    module = models.build({"name": "rbm"}, num_classes=10, frames=32, bands=20)
    params = variable_shapes(module, 32, 20)["params"]
    assert {name: layer["kernel"].shape for name, layer in params.items()} == {
        "layer1": (640, 512),
        "layer2": (512, 256),
        "head": (256, 10),
    }
    assert count(params) == 641 * 512 + 513 * 256 + 257 * 10 == 462_090


def test_the_network_is_the_one_described(filled, apply):
    """Worked with NumPy; its hidden layers are the machines' hidden probabilities."""
    module = models.build({"name": "rbm", "layers": (5, 3)}, num_classes=2, frames=4, bands=3)
    x = np.random.default_rng(3).standard_normal((6, 4, 3), np.float32)
    variables = filled(module, 4, 3)
    p = variables["params"]
    first = sigmoid(x.reshape(6, 12) @ p["layer1"]["kernel"] + p["layer1"]["bias"])
    second = sigmoid(first @ p["layer2"]["kernel"] + p["layer2"]["bias"])
    logits, embedding = apply(module, variables, x)
    np.testing.assert_allclose(embedding, second, atol=1e-6)
    np.testing.assert_allclose(logits, second @ p["head"]["kernel"] + p["head"]["bias"], atol=1e-6)
    rbm = RBM(p["layer2"]["kernel"], np.zeros(5), p["layer2"]["bias"])
    np.testing.assert_allclose(hidden_probabilities(rbm, first), embedding, atol=1e-6)


def test_dropout_acts_on_the_hidden_units_in_training_only():
    model = {"name": "rbm", "layers": (400,), "dropout": 0.25}
    module = models.build(model, num_classes=400, frames=2, bands=2)
    x = jnp.zeros((1, 2, 2))
    variables = module.init(jax.random.key(0), x, train=False)
    # With this head the logits are the hidden units themselves, sigmoid(0) where nothing is
    # dropped.
    params = variables["params"] | {"head": {"kernel": jnp.eye(400), "bias": jnp.zeros(400)}}
    np.testing.assert_allclose(module.apply({"params": params}, x), 0.5)
    dropped = module.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(1)})
    kept = np.asarray(dropped != 0)
    np.testing.assert_allclose(np.asarray(dropped)[kept], 0.5 / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 0.09  # four standard deviations of 400 draws
