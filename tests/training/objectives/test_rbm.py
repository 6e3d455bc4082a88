import itertools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from scipy.special import logsumexp

from musicgenre import models
from musicgenre.errors import UserError
from musicgenre.runs import workdir
from musicgenre.runs.model import load_model
from musicgenre.training import fit as loop
from musicgenre.training.fit import pretrain
from musicgenre.training.objectives.rbm import (
    RBM,
    cd_gradient,
    cd_optimizer,
    cd_update,
    free_energy,
    gibbs_step,
    hidden_probabilities,
    init_rbm,
    visible_means,
)
from musicgenre.training.parallel import Parallel
from musicgenre.training.telemetry import read_rows


def states(units):
    """Every 0/1 vector of that many units, float64 `[2 ** units, units]`."""
    return np.array(list(itertools.product((0.0, 1.0), repeat=units)))


def some_rbm(visible, hidden, gaussian=False, scale=0.7):
    keys = jax.random.split(jax.random.key(7), 3)
    shapes = ((visible, hidden), (visible,), (hidden,))
    return RBM(
        *(scale * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)),
        gaussian,
    )


def energies(rbm, v, h):
    """E(v, h) by its definition, `[rows of v, rows of h]`."""
    w, a, b = (np.asarray(x, np.float64) for x in (rbm.weights, rbm.visible_bias, rbm.hidden_bias))
    alone = 0.5 * ((v - a) ** 2).sum(axis=1) if rbm.gaussian else -v @ a
    return alone[:, None] - (h @ b)[None, :] - v @ w @ h.T


def log_likelihood(rbm, v):
    """Mean exact log p(v) of a binary machine: every state of v and h is added up."""
    h = states(len(rbm.hidden_bias))
    log_z = logsumexp(-energies(rbm, states(len(rbm.visible_bias)), h))
    return (logsumexp(-energies(rbm, v, h), axis=1) - log_z).mean()


@pytest.mark.parametrize("gaussian", [False, True])
def test_free_energy_is_the_sum_over_all_hidden_states(gaussian):
    rbm = some_rbm(4, 3, gaussian)
    v = np.random.default_rng(0).standard_normal((5, 4)) if gaussian else states(4)
    np.testing.assert_allclose(
        free_energy(rbm, v), -logsumexp(-energies(rbm, v, states(3)), axis=1), rtol=1e-5
    )


def test_free_energy_has_the_partition_function_of_the_joint_states():
    rbm = some_rbm(5, 4)
    log_z = logsumexp(-energies(rbm, states(5), states(4)))
    np.testing.assert_allclose(
        logsumexp(-np.asarray(free_energy(rbm, states(5)))), log_z, rtol=1e-6
    )


@pytest.mark.parametrize("gaussian", [False, True])
def test_hidden_conditionals_are_those_of_the_energy(gaussian):
    rbm = some_rbm(4, 3, gaussian)
    v = np.random.default_rng(0).standard_normal((5, 4)) if gaussian else states(4)
    joint = np.exp(-energies(rbm, v, states(3)))
    np.testing.assert_allclose(
        hidden_probabilities(rbm, v),
        joint @ states(3) / joint.sum(axis=1, keepdims=True),
        rtol=1e-5,
    )


def test_visible_conditionals_are_those_of_the_energy():
    rbm = some_rbm(4, 3)
    joint = np.exp(-energies(rbm, states(4), states(3)))
    np.testing.assert_allclose(
        visible_means(rbm, states(3)), joint.T @ states(4) / joint.sum(axis=0)[:, None], rtol=1e-5
    )
    # A Gaussian visible unit, on a grid of its values: the mean, and the unit variance of samples.
    rbm = some_rbm(1, 3, gaussian=True)
    grid = np.linspace(-12, 12, 4001)[:, None]
    joint = np.exp(-energies(rbm, grid, states(3)))
    mean = (joint * grid).sum(axis=0) / joint.sum(axis=0)
    np.testing.assert_allclose(visible_means(rbm, states(3))[:, 0], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        (joint * (grid - mean) ** 2).sum(axis=0) / joint.sum(axis=0), 1.0, rtol=1e-4
    )


@pytest.mark.parametrize("gaussian", [False, True])
def test_gradient_equals_numpys_with_the_same_samples(gaussian):
    rbm = some_rbm(6, 4, gaussian)
    data = (
        jax.random.normal(jax.random.key(1), (8, 6))
        if gaussian
        else jax.random.bernoulli(jax.random.key(1), 0.4, (8, 6))
    )
    data = data.astype(jnp.float32)
    key = jax.random.key(5)
    gradient = cd_gradient(rbm, data, key, 3)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    w, a, b = (np.asarray(x) for x in (rbm.weights, rbm.visible_bias, rbm.hidden_bias))
    v0 = v = np.asarray(data)
    for i in range(3):
        hidden_key, visible_key = jax.random.split(jax.random.fold_in(key, i))
        h = (np.asarray(jax.random.uniform(hidden_key, (8, 4))) < sigmoid(v @ w + b)).astype(
            np.float32
        )
        mean = h @ w.T + a
        if gaussian:
            v = mean + np.asarray(jax.random.normal(visible_key, (8, 6)))
        else:
            v = (np.asarray(jax.random.uniform(visible_key, (8, 6))) < sigmoid(mean)).astype(
                np.float32
            )
    h0, hk = sigmoid(v0 @ w + b), sigmoid(v @ w + b)
    # Descended, this is Hinton's rule: <v h> of the data minus <v h> of the reconstructions.
    np.testing.assert_allclose(gradient.weights, -(v0.T @ h0 - v.T @ hk) / 8, atol=1e-6)
    np.testing.assert_allclose(gradient.visible_bias, -(v0 - v).mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(gradient.hidden_bias, -(h0 - hk).mean(axis=0), atol=1e-6)


def test_long_chains_give_the_gradient_of_the_likelihood():
    rbm = some_rbm(4, 3)
    rows = 10_000
    data = jax.random.bernoulli(
        jax.random.key(2), jnp.array([0.8, 0.3, 0.5, 0.9]), (rows, 4)
    ).astype(jnp.float32)
    gradient = jax.jit(cd_gradient, static_argnums=3)(rbm, data, jax.random.key(3), 60)
    every = jnp.asarray(states(4), jnp.float32)

    def loss(rbm):  # exact
        return free_energy(rbm, data).mean() + jax.nn.logsumexp(-free_energy(rbm, every))

    exact = jax.grad(loss)(rbm)
    # A mean of 10,000 values between 0 and 1 deviates by at most 0.005.
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=0.02), gradient, exact)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(exact)) > 0.1
    # One step does not: it is biased.
    short = jax.jit(cd_gradient, static_argnums=3)(rbm, data, jax.random.key(3), 1)
    assert float(jnp.abs(short.weights - exact.weights).max()) > 0.03


def test_long_gaussian_chains_give_the_gradient_of_the_likelihood():
    rbm = some_rbm(2, 3, gaussian=True, scale=0.5)
    rows = 10_000
    data = 0.5 + jax.random.normal(jax.random.key(2), (rows, 2))
    gradient = jax.jit(cd_gradient, static_argnums=3)(rbm, data, jax.random.key(3), 60)
    h = jnp.asarray(states(3), jnp.float32)

    def loss(rbm):  # Z with v integrated out: a Gaussian integral for each h
        wh = h @ rbm.weights.T
        log_z = jax.nn.logsumexp(
            h @ rbm.hidden_bias + wh @ rbm.visible_bias + 0.5 * jnp.square(wh).sum(axis=1)
        )
        return free_energy(rbm, data).mean() + log_z

    exact = jax.grad(loss)(rbm)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=0.06), gradient, exact)
    assert float(jnp.abs(exact.weights).max()) > 0.1


def test_gibbs_steps_preserve_the_machines_distribution():
    rbm = some_rbm(3, 2)
    p = np.exp(-np.asarray(free_energy(rbm, states(3)), np.float64))
    p /= p.sum()
    rows = np.random.default_rng(0).choice(8, 50_000, p=p)
    v = gibbs_step(rbm, jnp.asarray(states(3)[rows], jnp.float32), jax.random.key(0))
    counts = np.bincount(np.asarray(v @ jnp.array([4, 2, 1]), int), minlength=8) / len(rows)
    np.testing.assert_allclose(counts, p, atol=0.009)  # four standard deviations


def bars_and_stripes(size):
    rows = np.array(list(itertools.product((0.0, 1.0), repeat=size)))
    bars = np.repeat(rows[:, None, :], size, axis=1).reshape(-1, size**2)
    stripes = np.repeat(rows[:, :, None], size, axis=2).reshape(-1, size**2)
    return np.unique(np.concatenate([bars, stripes]), axis=0)


def test_bars_and_stripes_become_likely():
    data = bars_and_stripes(3)
    assert len(data) == 14
    optimizer = cd_optimizer(learning_rate=0.1, momentum=0.5, weight_decay=0.0)
    rbm = init_rbm(jax.random.key(0), 9, 12)
    before = log_likelihood(rbm, data)
    np.testing.assert_allclose(before, -9 * np.log(2), atol=0.02)
    batch = jnp.asarray(np.tile(data, (8, 1)), jnp.float32)

    def step(state, key):
        *state, metrics = cd_update(*state, batch, key, optimizer, steps=5)
        return tuple(state), metrics["reconstruction_error"]

    keys = jax.random.split(jax.random.key(0), 400)
    (trained, _), errors = jax.jit(lambda state: jax.lax.scan(step, state, keys))(
        (rbm, optimizer.init(rbm))
    )
    # The optimum is the distribution of the data.
    assert before < log_likelihood(trained, data) < -np.log(14)
    assert errors[-1] < errors[0]


def test_momentum_and_weight_decay_as_hinton_writes_them():
    """v <- m v + (gradient + decay w); w <- w - rate v, for the weights; no decay on biases."""
    optimizer = cd_optimizer(learning_rate=0.1, momentum=0.5, weight_decay=0.2)
    rbm = RBM(jnp.ones((2, 1)), jnp.ones(2), jnp.ones(1))
    gradient = RBM(jnp.full((2, 1), 3.0), jnp.zeros(2), jnp.ones(1))
    opt_state = optimizer.init(rbm)
    for _ in range(2):
        updates, opt_state = optimizer.update(gradient, opt_state, rbm)
        rbm = optax.apply_updates(rbm, updates)
    # 1 - .1 x 3.2 = .68; then v = 1.6 + 3 + .2 x .68 = 4.736, w = .68 - .4736.
    np.testing.assert_allclose(rbm.weights, 0.2064, rtol=1e-5)
    np.testing.assert_allclose(rbm.visible_bias, 1.0)
    np.testing.assert_allclose(rbm.hidden_bias, 1.0 - 0.1 - 0.15, rtol=1e-6)


@pytest.fixture
def rbm_config(small_config):
    small_config.model = ConfigDict({"name": "rbm", "module": "", "layers": (24, 10)})
    small_config.data.crop_frames = 8
    small_config.data.eval_chunks = 3
    small_config.pretrain.epochs = 4
    small_config.pretrain.learning_rate = 0.05
    return small_config


def parameters(workdir):
    return jax.tree.map(np.asarray, load_model(workdir).model)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_pretraining_makes_a_workdir_of_a_model(rbm_config, tmp_path):
    rbm_config.pretrain.epochs = 9
    rbm_config.eval_every = 3
    result = pretrain(rbm_config, tmp_path / "run", progress=False)
    assert result.step == 2 * 9 * 3 and len(result.measures) == 2
    rows = [row for row in read_rows(tmp_path / "run") if "valid_free_energy" in row]
    assert [(row["step"], row["layer"]) for row in rows] == [
        (9, 1),
        (18, 1),
        (27, 1),
        (36, 2),
        (45, 2),
        (54, 2),
    ]
    for measures in rows:
        gap = measures["valid_free_energy"] - measures["train_free_energy"]
        assert measures["free_energy_gap"] == pytest.approx(gap, abs=1e-9)
    batches = [row for row in read_rows(tmp_path / "run") if "batch_reconstruction_error" in row]
    errors = [
        [row["batch_reconstruction_error"] for row in batches if row["layer"] == layer]
        for layer in (1, 2)
    ]
    # Small weights reconstruct the mean, so the error begins at the variance of normalised bands.
    assert errors[0][0] == pytest.approx(1.0, abs=0.05)
    assert errors[0][-1] < errors[0][0] and len(errors[1]) == len(errors[0])
    assert {
        name: result.measures[1][name] for name in rows[-1] if name in result.measures[1]
    } == result.measures[1]
    assert "layer1" in result.line() and "--config.init_from" in result.line()

    model = load_model(tmp_path / "run")
    assert (model.step, model.config.model.name) == (54, "rbm")
    assert model.label_names == ("low", "middle", "high")
    params = model.model["variables"]["params"]
    assert {name: layer["kernel"].shape for name, layer in params.items()} == {
        "layer1": (8 * 16, 24),
        "layer2": (24, 10),
        "head": (10, 3),
    }
    assert all(layer["bias"].any() for name, layer in params.items() if name != "head")
    assert params["head"]["kernel"].any() and not params["head"]["bias"].any()

    # The network's layers are the machines: its embedding is the second one's hidden probabilities.
    x = np.random.default_rng(0).standard_normal((6, 8, 16)).astype(np.float32)
    _, embedding = models.apply_model(model.module, model.model["variables"], jnp.asarray(x))
    first = hidden_probabilities(
        RBM(params["layer1"]["kernel"], jnp.zeros(128), params["layer1"]["bias"], True),
        x.reshape(6, -1),
    )
    second = hidden_probabilities(
        RBM(params["layer2"]["kernel"], jnp.zeros(24), params["layer2"]["bias"]), first
    )
    np.testing.assert_allclose(embedding, second, atol=1e-6)

    # Fine-tuning starts from them: with a rate of zero the layers stay, and only the head learns.
    rbm_config.epochs = 1
    rbm_config.init_from = str(tmp_path / "run")
    rbm_config.optimizer.transferred_rate = 0.0
    loop.train(rbm_config, tmp_path / "tuned", progress=False)
    before, after = parameters(tmp_path / "run"), parameters(tmp_path / "tuned")
    assert_same(before["norm"], after["norm"])
    for layer in ("layer1", "layer2"):
        assert_same(before["variables"]["params"][layer], after["variables"]["params"][layer])
    assert after["variables"]["params"]["head"]["bias"].any()


def test_a_pretraining_stopped_three_times_ends_up_bit_identical(rbm_config, tmp_path, monkeypatch):
    """Within the first machine, at its end, and within the second."""
    full = pretrain(rbm_config, tmp_path / "full", progress=False)
    place_batch, done = Parallel.place_batch, 0
    for stop, number in ((5, signal.SIGTERM), (12, signal.SIGINT), (17, signal.SIGTERM)):
        # A batch is placed while the step before its own runs.
        numbers = itertools.count(done + 1)

        def placed(self, batch, stop=stop, number=number, numbers=numbers):
            if next(numbers) == stop + 1:
                os.kill(os.getpid(), number)
            return place_batch(self, batch)

        monkeypatch.setattr(Parallel, "place_batch", placed)
        name = signal.Signals(number).name
        with pytest.raises(workdir.Interrupted, match=f"stopped by {name} after step {stop};"):
            pretrain(rbm_config, tmp_path / "cut", progress=False)
        assert load_model(tmp_path / "cut").step == stop
        done = stop
    monkeypatch.undo()
    resumed = pretrain(rbm_config, tmp_path / "cut", progress=False)
    said = "pretrained 2 layers in 24 steps; reconstruction error on valid: layer1 "
    assert resumed.summary.startswith(said) and resumed.measures == full.measures
    assert_same(parameters(tmp_path / "full"), parameters(tmp_path / "cut"))
    # Calling it again does nothing.
    rows = read_rows(tmp_path / "cut")
    again = pretrain(rbm_config, tmp_path / "cut", progress=False)
    assert again.measures == full.measures and read_rows(tmp_path / "cut") == rows


def test_resident_clips_and_several_steps_per_call_change_nothing(rbm_config, tmp_path):
    rbm_config.pretrain.epochs = 1
    rbm_config.data.on_device = "always"
    pretrain(rbm_config, tmp_path / "resident", progress=False)
    rbm_config.data.on_device = "never"
    pretrain(rbm_config, tmp_path / "read", progress=False)
    assert_same(parameters(tmp_path / "resident"), parameters(tmp_path / "read"))
    rbm_config.steps_per_call = 2
    pretrain(rbm_config, tmp_path / "calls", progress=False)
    one, other = parameters(tmp_path / "read"), parameters(tmp_path / "calls")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, other)


def test_training_and_pretraining_do_not_share_a_workdir(rbm_config, tmp_path):
    rbm_config.epochs = rbm_config.pretrain.epochs = 1
    pretrain(rbm_config, tmp_path / "pre", progress=False)
    with pytest.raises(UserError, match=r"stage: pretrain -> \(absent\). Choose another --workdir"):
        loop.train(rbm_config, tmp_path / "pre", progress=False)
    loop.train(rbm_config, tmp_path / "run", progress=False)
    with pytest.raises(UserError, match=r"stage: \(absent\) -> pretrain"):
        pretrain(rbm_config, tmp_path / "run", progress=False)
    assert load_model(tmp_path / "pre").step == 6 and load_model(tmp_path / "run").step == 3


def test_without_a_validation_split_the_training_clips_are_measured(rbm_config, tmp_path, prepared):
    rbm_config.data.files.valid = ""
    rbm_config.pretrain.epochs = 1
    prepared(rbm_config)
    result = pretrain(rbm_config, tmp_path / "run", progress=False)
    assert set(result.measures[0]) == {"train_free_energy", "train_reconstruction_error"}
    assert "reconstruction error on train: layer1 " in result.line()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model": {"name": "conv1d", "module": ""}},
            "model.name='conv1d' has no restricted Boltzmann",
        ),
        (
            {"model": {"name": "rbm", "module": "", "layers": ()}},
            "at least one number of units in --config.model.layers",
        ),
        ({"init_from": "elsewhere"}, "config.init_from='elsewhere' has no effect on the objective"),
        ({"augment.noise": 0.5}, "config.augment.noise=0.5 has no effect .*: leave it at 0.0"),
        ({"pretrain.temperature": 0.1}, "config.pretrain.temperature=0.1 has no effect"),
        ({"patience": 3}, "config.patience=3 has no effect"),
        ({"loss.label_smoothing": 0.1}, "config.loss.label_smoothing=0.1 has no effect"),
        ({"dtype": "bfloat16"}, "config.dtype='bfloat16' has no effect"),
        ({"data.crop_frames": 65}, "crop_frames=65 is not between 1 and the store's 64"),
        (
            {"pretrain.learning_rate": 1e30},
            r"reconstruction error became (nan|inf) at step \d+.*pretrain.learning_rate",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_mistakes_are_named(rbm_config, tmp_path, fields, message):
    rbm_config.pretrain.method = "contrastive_divergence"
    for name, value in fields.items():
        if isinstance(value, dict):
            rbm_config[name] = ConfigDict(value)
        else:
            rbm_config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=message):
        pretrain(rbm_config, tmp_path / "run", progress=False)
