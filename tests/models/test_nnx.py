"""An NNX network is trained, saved and exported like a Linen one."""

import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from musicgenre import models
from musicgenre.models import registry
from musicgenre.models.describe import describe, total_parameters
from musicgenre.runs.bundle import save_bundle
from musicgenre.runs.model import load_model
from musicgenre.training.fit import train
from musicgenre.training.transfer import layer_order


class NNXNet(nnx.Module):
    """Its head is the first layer by the alphabet and the last in the constructor."""

    def __init__(self, num_classes, *, width=8, rate=0.0, dtype, frames, bands, rngs):
        self.filters = nnx.List([nnx.Conv(bands, width, (3,), dtype=dtype, rngs=rngs)])
        self.norm = nnx.BatchNorm(width, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.scale = jnp.ones(frames)  # a constant
        self.a_head = nnx.Linear(width, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x, train=False):
        x = self.filters[0](x)
        x = nnx.relu(self.norm(x, use_running_average=not train))
        x = (x * self.scale[:, None]).mean(axis=1)
        self.sow(nnx.Intermediate, "embedding", x)
        return self.a_head(self.dropout(x, deterministic=not train))


class LinenNet(nn.Module):
    num_classes: int
    width: int = 8

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.width, (3,), name="filters")(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name="norm")(x)).mean(axis=1)
        self.sow("intermediates", "embedding", x)
        return nn.Dense(self.num_classes, name="a_head")(x)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    models.registered()
    monkeypatch.setattr(registry._MODELS, "_items", dict(registry._MODELS._items))
    for name, cls in (("nnx_net", NNXNet), ("linen_net", LinenNet)):
        assert models.register(name)(cls) is cls


def build(name="nnx_net", **fields):
    return models.build({"name": name, **fields}, num_classes=3, frames=7, bands=5)


X = np.random.default_rng(0).standard_normal((4, 7, 5), np.float32)


def test_its_variables_have_plain_names_and_its_layers_keep_their_order():
    variables = build().init(jax.random.key(0), X, train=False)
    assert jax.tree.map(jnp.shape, variables) == {
        "params": {
            "filters": {"0": {"kernel": (3, 5, 8), "bias": (8,)}},
            "norm": {"scale": (8,), "bias": (8,)},
            "a_head": {"kernel": (8, 3), "bias": (3,)},
        },
        "batch_stats": {"norm": {"mean": (8,), "var": (8,)}},
    }
    assert layer_order(build(), 7, 5) == ["filters", "norm", "a_head"]
    fields = {"width": 8, "rate": 0.0}
    assert models.resolve({"name": "nnx_net"}) == {"name": "nnx_net", "module": "", **fields}
    layers = describe(build(), 7, 5)
    assert [layer.kind for layer in layers] == ["Input", "NNXNet", "Output"]
    assert total_parameters(layers) == 128 + 16 + 27
    # Layers differ, as do keys.
    other = build().init(jax.random.key(1), X, train=False)
    assert not np.allclose(*(v["params"]["a_head"]["kernel"] for v in (variables, other)))


def test_it_trains_like_the_same_linen_network(learn):
    """The same values, gradients, statistics and parameters after a few steps."""
    ours = jax.jit(build().init, static_argnames="train")(jax.random.key(0), X, train=False)
    params = ours["params"] | {"filters": ours["params"]["filters"]["0"]}
    results = []
    for name, variables in (("nnx_net", ours), ("linen_net", ours | {"params": params})):
        loss, labels = optax.softmax_cross_entropy_with_integer_labels, jnp.arange(4) % 3
        learned = learn(build(name), variables, X, labels, loss, rate=1e-2, steps=5)
        logits, embedding = models.apply_model(build(name), learned.variables, X)
        results.append((learned.losses, logits, embedding, learned.variables["batch_stats"]))
    assert results[0][0][-1] < results[0][0][0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)


def test_dropout_follows_the_key_in_training_only():
    module = build(rate=0.5)
    variables = module.init(jax.random.key(0), X, train=False)

    @jax.jit
    def run(key):
        rngs = {"dropout": key}
        return module.apply(variables, X, train=True, rngs=rngs, mutable=["batch_stats"])[0]

    keys = jax.random.split(jax.random.key(1))
    assert np.array_equal(run(keys[0]), run(keys[0])) and not np.allclose(*map(run, keys))
    plain = module.apply(variables, X, train=False)
    np.testing.assert_array_equal(plain, models.apply_model(module, variables, X)[0])


def test_bfloat16_keeps_float32_weights(check_bfloat16):
    check_bfloat16({"name": "nnx_net"}, 7, 5)


def test_batch_normalisation_synchronises_over_devices_by_an_interceptor():
    """Over a mapped axis, as in training under pmap."""
    module = build()
    variables = module.init(jax.random.key(0), X, train=False)

    def step(x):
        return module.apply(variables, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    def named(function, args, kwargs, context):
        if hasattr(context.module, "axis_name"):
            object.__setattr__(context.module, "axis_name", "devices")
        return function(*args, **kwargs)

    with nn.intercept_methods(named):
        parts = jax.vmap(step, axis_name="devices")(X.reshape(2, 2, 7, 5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-5), parts, step(X))


def test_a_run_resumes_and_its_model_loads_bit_exact(small_config, tmp_path):
    small_config.model = {"name": "nnx_net", "module": "", "rate": 0.3}
    small_config.epochs = 2
    train(small_config, tmp_path / "once", progress=False)
    # As if it had been stopped after the first epoch.
    shutil.copytree(tmp_path / "once", tmp_path / "twice")
    shutil.rmtree(tmp_path / "twice" / "checkpoints" / "6")
    train(small_config, tmp_path / "twice", progress=False)
    once, twice = (load_model(tmp_path / name) for name in ("once", "twice"))
    assert once.step == twice.step == 6
    jax.tree.map(np.testing.assert_array_equal, once.model, twice.model)
    x = np.random.default_rng(0).standard_normal((2, 64, 16), np.float32)
    logits, embedding = models.apply_model(once.module, once.model["variables"], x)
    assert logits.shape == (2, 3) and embedding.shape == (2, 8)
    save_bundle(once, tmp_path / "net.safetensors")
    loaded = load_model(tmp_path / "net.safetensors")
    jax.tree.map(np.testing.assert_array_equal, once.model, loaded.model)
