import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicgenre import models
from musicgenre.models.crnn import CRNN_SIZES, GRU

SMALL = {"filters": (2, 3), "time_pools": (2, 2), "band_pools": (2, 2), "units": (3, 4)}


def build(frames=1366, bands=96, num_classes=50, **fields):
    return models.build(
        {"name": "crnn", **fields}, num_classes=num_classes, frames=frames, bands=bands
    )


def stats_after_a_step(module, variables, x):
    variables["batch_stats"]["input_norm"]["mean"][:] = 0

    options = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(2)}}
    apply = jax.jit(lambda variables, x: module.apply(variables, x, train=True, **options))
    return apply(variables, x)[1]["batch_stats"]


def test_the_public_codes_parameters_are_counted_one_by_one(
    variable_shapes, parameter_count, count
):
    params = variable_shapes(build(conv_bias=True), 1366, 96)["params"]
    assert sum(count(params[f"conv{i}"]) for i in range(1, 5)) == 369_664
    assert sum(count(params[f"norm{i}"]) for i in range(1, 5)) == 896
    assert count(params["input_norm"]) == 2 * (1366 + 2 * 37) == 2880
    assert count(params["gru1"]) == 3 * (128 * 32 + 32 * 32 + 32)
    assert count(params["gru2"]) == 3 * (32 * 32 + 32 * 32 + 32)
    assert count(params["head"]) == 1650
    assert count(params) == 369_664 + 896 + 2880 + 21_696 + 1650 == 396_786
    # Without the biases that normalisation makes idle.
    assert parameter_count(build(), 1366, 96) == 396_786 - (64 + 3 * 128)


@pytest.mark.parametrize("name", ["0.1M", "0.25M", "0.5M", "1M", "3M"])
def test_the_papers_sizes(name, parameter_count):
    expected = pytest.approx(float(name[:-1]) * 1e6, rel=0.01)
    assert parameter_count(build(**CRNN_SIZES[name]), 1366, 96) == expected


def test_every_shape(layer_shapes):
    seen = layer_shapes(build(), 1366, 96)
    names = ("input_norm", "dropout1", "dropout2", "dropout3", "dropout4", "gru1", "gru2", "head")
    assert [seen[name][1:] for name in names] == [
        (1440, 96),
        (720, 48, 64),
        (240, 16, 128),
        (60, 4, 128),
        (15, 1, 128),
        (15, 32),
        (15, 32),
        (50,),
    ]
    assert seen["embedding"] == (2, 32)


@pytest.mark.parametrize(
    "scale", [0.3, 5.0]
)  # the second drives the gates into the flat ends of the hard sigmoid
def test_the_recurrence_equals_a_loop_in_numpy(scale):
    module = GRU(3)
    x = scale * jax.random.normal(jax.random.key(0), (2, 7, 4))
    params = module.init(jax.random.key(1), x)["params"]
    params["bias"] = jax.random.normal(jax.random.key(2), (9,))
    names = ("kernel", "recurrent_kernel", "bias")
    w, u, b = (np.asarray(params[name], np.float64) for name in names)
    states = np.zeros((2, 7, 3))
    flat = 0
    for clip in range(2):
        h = np.zeros(3)
        for t in range(7):
            a = np.asarray(x[clip, t], np.float64) @ w + b
            z, r = (np.clip(0.2 * (a[k : k + 3] + h @ u[:, k : k + 3]) + 0.5, 0, 1) for k in (0, 3))
            flat += ((z == 0) | (z == 1)).sum()
            candidate = np.tanh(a[6:] + (r * h) @ u[:, 6:])
            h = z * h + (1 - z) * candidate
            states[clip, t] = h
    assert (flat > 5) == (scale > 1)
    np.testing.assert_allclose(module.apply({"params": params}, x), states, atol=2e-6)


def test_each_gate_is_initialised_separately():
    params = GRU(32).init(jax.random.key(0), jnp.zeros((1, 2, 128)))["params"]
    for gate in np.split(np.asarray(params["kernel"]), 3, axis=1):
        # Uniform up to sqrt(6 / (inputs + units)).
        assert 0.97 < np.abs(gate).max() / np.sqrt(6 / 160) <= 1
    for gate in np.split(np.asarray(params["recurrent_kernel"]), 3, axis=1):
        np.testing.assert_allclose(gate @ gate.T, np.eye(32), atol=1e-5)
    assert not params["bias"].any()


def test_the_input_is_normalised_frame_by_frame_after_padding(filled):
    module = build(**SMALL)
    x = 10 * jax.random.normal(jax.random.key(0), (2, 1366, 96)) - 40
    x += jnp.linspace(0, 20, 1366)[:, None]
    stats = stats_after_a_step(module, filled(module, 1366, 96), x)
    mean = np.asarray(stats["input_norm"]["mean"])
    assert mean.shape == (1440,) and not mean[:37].any() and not mean[-37:].any()
    # One step of a running mean with momentum 0.9.
    np.testing.assert_allclose(mean[37:-37], 0.1 * np.asarray(x).mean(axis=(0, 2)), rtol=1e-4)


def test_normalisation_of_bands_comes_before_padding(filled):
    module = build(40, 96, input_norm="band", **SMALL)
    x = -40 + jax.random.normal(jax.random.key(0), (4, 40, 96))
    stats = stats_after_a_step(module, filled(module, 40, 96), x)
    expected = 0.1 * np.asarray(x).mean(axis=(0, 1))
    np.testing.assert_allclose(stats["input_norm"]["mean"], expected, rtol=1e-4)
