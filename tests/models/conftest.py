"""What the tests of the networks share; each fixture returns a function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from musicgenre import models

# Compiling everything at once is faster than each operation alone.
_apply = jax.jit(models.apply_model, static_argnums=0)


class Learned(NamedTuple):
    """A network after some steps: its variables, each step's loss, the first gradients."""

    variables: dict[str, Any]
    losses: list[float]
    first_gradients: dict[str, Any]


def _variable_shapes(module: nn.Module, frames: int, bands: int) -> dict[str, Any]:
    return dict(
        jax.eval_shape(
            lambda: module.init(jax.random.key(0), jnp.zeros((1, frames, bands)), train=False)
        )
    )


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _layer_outputs(
    module: nn.Module, variables: dict[str, Any], x: jax.Array
) -> dict[str, jax.Array]:
    seen = module.apply(
        variables, x, train=False, capture_intermediates=True, mutable=["intermediates"]
    )[1]["intermediates"]
    del seen["__call__"]  # the logits, which the head returns
    return {
        name: (value["__call__"] if isinstance(value, dict) else value)[0]
        for name, value in seen.items()
    }


def _drawn(
    module: nn.Module, frames: int, bands: int, vector: Callable[..., np.ndarray]
) -> dict[str, Any]:
    """Random variables: kernels of unit gain, vectors by `vector(generator, name, shape)`."""
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.ndim > 1:
            return np.float32(
                generator.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
            )
        return np.float32(vector(generator, path[-1].key, leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, _variable_shapes(module, frames, bands))


def _filled(module: nn.Module, frames: int, bands: int) -> dict[str, Any]:
    def vector(generator, name, shape):
        return (
            generator.uniform(0.5, 2.0, shape)
            if name in ("scale", "var")
            else 0.3 * generator.standard_normal(shape)
        )

    return _drawn(module, frames, bands, vector)


def _lively(module: nn.Module, frames: int, bands: int) -> dict[str, Any]:
    return _drawn(
        module, frames, bands, lambda generator, name, shape: generator.uniform(0.1, 0.4, shape)
    )


@pytest.fixture
def variable_shapes() -> Callable[[nn.Module, int, int], dict[str, Any]]:
    """`(module, frames, bands)`: the shapes of a network's variables."""
    return _variable_shapes


@pytest.fixture
def count() -> Callable[[Any], int]:
    """`(tree)`: how many numbers a tree of arrays or of shapes holds."""
    return _count


@pytest.fixture
def parameter_count() -> Callable[[nn.Module, int, int], int]:
    """`(module, frames, bands)`: how many parameters a network has."""
    return lambda module, frames, bands: _count(_variable_shapes(module, frames, bands)["params"])


@pytest.fixture
def layer_outputs() -> Callable[[nn.Module, dict[str, Any], jax.Array], dict[str, jax.Array]]:
    """`(module, variables, x)`: the outputs of every layer by name, and the embedding."""
    return _layer_outputs


@pytest.fixture
def layer_shapes() -> Callable[[nn.Module, int, int], dict[str, tuple[int, ...]]]:
    """`(module, frames, bands)`: the shapes of every layer's output for two clips."""

    def shapes(module, frames, bands):
        variables = _variable_shapes(module, frames, bands)
        outputs = jax.eval_shape(
            lambda v: _layer_outputs(module, v, jnp.zeros((2, frames, bands))), variables
        )
        return {name: output.shape for name, output in outputs.items()}

    return shapes


@pytest.fixture
def filled() -> Callable[[nn.Module, int, int], dict[str, Any]]:
    """`(module, frames, bands)`: random variables that make every bias and norm count."""
    return _filled


@pytest.fixture
def lively() -> Callable[[nn.Module, int, int], dict[str, Any]]:
    """`(module, frames, bands)`: random variables, vectors between 0.1 and 0.4."""
    return _lively


@pytest.fixture
def apply() -> Callable[[nn.Module, dict[str, Any], Any], tuple[jax.Array, jax.Array]]:
    """`(module, variables, x)`: logits and embedding, compiled."""
    return _apply


@pytest.fixture
def check_runs() -> Callable[[nn.Module, tuple[int, int, int], tuple[int, int]], None]:
    """`(module, shape, expected)`: ones of this shape give finite logits of that shape."""

    def check(module, shape, expected):
        logits, _ = _apply(module, _filled(module, *shape[1:]), np.ones(shape, np.float32))
        assert logits.shape == expected
        assert np.isfinite(logits).all()

    return check


@pytest.fixture
def check_bfloat16() -> Callable[[dict[str, Any], int, int], None]:
    """`(model, frames, bands)`: bfloat16 keeps float32 variables and nearly the logits."""

    def check(model, frames, bands):
        x = np.random.default_rng(1).standard_normal((2, frames, bands), np.float32)
        module = models.build(model, num_classes=3, frames=frames, bands=bands)
        half = models.build(model, num_classes=3, frames=frames, bands=bands, dtype="bfloat16")
        assert all(
            leaf.dtype == jnp.float32
            for leaf in jax.tree.leaves(_variable_shapes(half, frames, bands))
        )
        variables = _lively(module, frames, bands)
        logits, low = _apply(module, variables, x)[0], _apply(half, variables, x)[0]
        assert low.dtype == jnp.float32
        np.testing.assert_allclose(low, logits, atol=0.05 * float(jnp.abs(logits).max()))

    return check


@pytest.fixture
def learn() -> Callable[..., Learned]:
    """`(module, variables, x, y, loss, rate, steps)`: a network after steps of Adam on a batch."""

    def train(module, variables, x, y, loss, rate, steps):
        optimizer = optax.adam(rate)

        @jax.jit
        def step(variables, state):
            def mean_loss(params):
                logits, new = module.apply(
                    variables | {"params": params}, x, train=True, mutable=["batch_stats"]
                )
                return loss(logits, y).mean(), new

            (value, new), gradients = jax.value_and_grad(mean_loss, has_aux=True)(
                variables["params"]
            )
            updates, state = optimizer.update(gradients, state)
            params = optax.apply_updates(variables["params"], updates)
            return {"params": params, **new}, state, value, gradients

        state = optimizer.init(variables["params"])
        losses, first = [], {}
        for _ in range(steps):
            variables, state, value, gradients = step(variables, state)
            first = first or gradients
            losses.append(float(value))
        return Learned(variables, losses, first)

    return train


@pytest.fixture
def numpy_norm() -> Callable[..., np.ndarray]:
    """`(y, variables, name, epsilon)`: a layer's batch normalisation with running statistics."""

    def norm(y, variables, name, epsilon=1e-5):
        p, s = (
            variables["params"].get(name, {"scale": 1, "bias": 0}),
            variables["batch_stats"][name],
        )
        return (y - s["mean"]) / np.sqrt(s["var"] + epsilon) * p["scale"] + p["bias"]

    return norm


@pytest.fixture
def numpy_conv() -> Callable[..., np.ndarray]:
    """`(x, kernel, stride)`: padded convolution of `[frames, bands, in]` with an odd kernel."""

    def conv(x, kernel, stride=1):
        size = kernel.shape[0]
        pad = (size // 2, size // 2)
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(x, (pad, pad, (0, 0))), (size, size), axis=(0, 1)
        )
        return np.einsum("tbiuv,uvio->tbo", windows[::stride, ::stride], kernel)

    return conv
