"""Helpers for the tests of the networks; each fixture is one of these functions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from musicgenre import models

# Compiling all of it is faster than each operation alone.
_apply = jax.jit(models.apply_model, static_argnums=0)


class Learned(NamedTuple):
    """A network after some steps: its variables, each step's loss, the first gradients."""

    variables: dict[str, Any]
    losses: list[float]
    first_gradients: dict[str, Any]


def variable_shapes(module, frames, bands):
    """The shapes of a network's variables."""
    x = jnp.zeros((1, frames, bands))
    return dict(jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False)))


def count(tree):
    """How many numbers a tree of arrays or of shapes holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def parameter_count(module, frames, bands):
    """How many parameters a network has."""
    return count(variable_shapes(module, frames, bands)["params"])


def layer_outputs(module, variables, x):
    """The outputs of every layer by name, and the embedding."""
    options = {"capture_intermediates": True, "mutable": ["intermediates"]}
    seen = module.apply(variables, x, train=False, **options)[1]["intermediates"]
    del seen["__call__"]  # the logits, which the head returns
    return {k: (v["__call__"] if isinstance(v, dict) else v)[0] for k, v in seen.items()}


def layer_shapes(module, frames, bands):
    """The shapes of every layer's output for two clips."""
    x, variables = jnp.zeros((2, frames, bands)), variable_shapes(module, frames, bands)
    outputs = jax.eval_shape(lambda v: layer_outputs(module, v, x), variables)
    return {name: output.shape for name, output in outputs.items()}


def _drawn(module, frames, bands, vector):
    """Random variables: kernels of unit gain, vectors by `vector(generator, name, shape)`."""
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.ndim == 1:
            return np.float32(vector(generator, path[-1].key, leaf.shape))
        return np.float32(generator.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])))

    return jax.tree_util.tree_map_with_path(draw, variable_shapes(module, frames, bands))


def filled(module, frames, bands):
    """Random variables that make every bias and norm count."""

    def vector(generator, name, shape):
        positive = name in ("scale", "var")
        return generator.uniform(0.5, 2, shape) if positive else generator.normal(0, 0.3, shape)

    return _drawn(module, frames, bands, vector)


def lively(module, frames, bands):
    """Random variables, vectors between 0.1 and 0.4."""
    return _drawn(
        module, frames, bands, lambda generator, _, shape: generator.uniform(0.1, 0.4, shape)
    )


def apply(module, variables, x):
    """Logits and embedding, compiled."""
    return _apply(module, variables, x)


def check_bfloat16(model, frames, bands):
    """Checks that bfloat16 keeps float32 variables and nearly the logits."""
    x = np.random.default_rng(1).standard_normal((2, frames, bands), np.float32)
    module, half = (
        models.build(model, num_classes=3, frames=frames, bands=bands, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    shapes = jax.tree.leaves(variable_shapes(half, frames, bands))
    assert {leaf.dtype for leaf in shapes} == {jnp.dtype("float32")}
    variables = lively(module, frames, bands)
    logits, low = _apply(module, variables, x)[0], _apply(half, variables, x)[0]
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, logits, atol=0.05 * float(jnp.abs(logits).max()))


def learn(module, variables, x, y, loss, rate, steps):
    """A network after steps of Adam on a batch, as `Learned`."""
    optimizer = optax.adam(rate)

    @jax.jit
    def step(variables, state):
        def mean_loss(params):
            given = variables | {"params": params}
            logits, new = module.apply(given, x, train=True, mutable=["batch_stats"])
            return loss(logits, y).mean(), new

        params = variables["params"]
        (value, new), gradients = jax.value_and_grad(mean_loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state)
        return {"params": optax.apply_updates(params, updates), **new}, state, value, gradients

    state = optimizer.init(variables["params"])
    losses, first = [], {}
    for _ in range(steps):
        variables, state, value, gradients = step(variables, state)
        first = first or gradients
        losses.append(float(value))
    return Learned(variables, losses, first)


def numpy_norm(y, variables, name, epsilon=1e-5):
    """A layer's batch normalisation with running statistics."""
    p = variables["params"].get(name, {"scale": 1, "bias": 0})
    s = variables["batch_stats"][name]
    return (y - s["mean"]) / np.sqrt(s["var"] + epsilon) * p["scale"] + p["bias"]


def numpy_conv(x, kernel, stride=1):
    """Padded convolution of `[frames, bands, in]` with an odd kernel."""
    size = kernel.shape[0]
    x = np.pad(x, ((size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(0, 1))
    return np.einsum("tbiuv,uvio->tbo", windows[::stride, ::stride], kernel)


def _shared(function):
    return pytest.fixture(name=function.__name__)(lambda: function)


fixture_apply = _shared(apply)
fixture_check_bfloat16 = _shared(check_bfloat16)
fixture_count = _shared(count)
fixture_filled = _shared(filled)
fixture_layer_outputs = _shared(layer_outputs)
fixture_layer_shapes = _shared(layer_shapes)
fixture_learn = _shared(learn)
fixture_lively = _shared(lively)
fixture_numpy_conv = _shared(numpy_conv)
fixture_numpy_norm = _shared(numpy_norm)
fixture_parameter_count = _shared(parameter_count)
fixture_variable_shapes = _shared(variable_shapes)
