import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from sklearn.utils.class_weight import compute_class_weight

from musicgenre import models
from musicgenre.config import base_config
from musicgenre.errors import UserError
from musicgenre.training.losses import balanced_weights, clip_losses
from musicgenre.training.optimisers import learning_rate_schedule, make_optimizer
from musicgenre.training.state import create_state
from musicgenre.training.step import make_train_step

NORM = {"mean": np.full((1, 8), -40.0, np.float32), "std": np.full((1, 8), 10.0, np.float32)}


def small(optimizer, **options):
    module = models.build(
        {"name": "conv1d", "filters": (8,), "dense": (16,), "dropout": options.pop("dropout", 0.0)},
        num_classes=3,
        frames=32,
        bands=8,
    )
    state = create_state(
        module, optimizer, NORM, seed=0, frames=32, bands=8, ema=options.get("ema_decay", 0) > 0
    )
    step = make_train_step(module, optimizer, seed=0, class_weights=jnp.ones(3), **options)
    return state, jax.jit(step)


def batch(size=12, tags=False):
    generator = np.random.default_rng(0)
    y = generator.integers(0, 3, size)
    return {
        "x": (-40 + 10 * generator.standard_normal((size, 32, 8))).astype(np.float16),
        "y": np.eye(3, dtype=np.float32)[y] if tags else y.astype(np.int32),
        "mask": np.ones(size, np.float32),
    }


@pytest.mark.parametrize("tags", [False, True])
def test_the_loss_of_one_batch_falls(tags):
    state, step = small(optax.sgd(0.01), task="multi_label" if tags else "single_label")
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch(tags=tags))
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert ("accuracy" in metrics) == (not tags)


def test_parts_of_a_batch_give_the_gradient_of_the_full_batch():
    full, step = small(optax.sgd(0.1))
    parts, part_step = small(optax.sgd(0.1), accumulate=3)
    for _ in range(3):
        full, one = step(full, batch())
        parts, other = part_step(parts, batch())
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), full.params, parts.params
    )


def test_dropout_differs_by_step_and_is_reproducible():
    state, step = small(optax.sgd(0.0), dropout=0.5)
    first, a = step(state, batch())
    _, b = step(first, batch())
    _, again = step(state, batch())
    assert a["loss"] != b["loss"]
    assert a["loss"] == again["loss"]


def test_the_moving_average_follows_its_formula():
    state, step = small(optax.sgd(0.1), ema_decay=0.9)
    start = np.asarray(state.params["head"]["kernel"])
    new, _ = step(state, batch())
    np.testing.assert_allclose(
        new.ema["head"]["kernel"],
        0.9 * start + 0.1 * np.asarray(new.params["head"]["kernel"]),
        rtol=1e-6,
    )
    assert new.model()["variables"]["params"] is new.ema


def test_masked_clips_do_not_count():
    state, step = small(optax.sgd(0.1))
    full = batch()
    masked = {**full, "mask": np.r_[np.ones(8), np.zeros(4)].astype(np.float32)}
    short = {name: values[:8] for name, values in full.items()}
    one, _ = step(state, masked)
    other, _ = step(state, short)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.params, other.params)


def test_losses_by_hand():
    logits = jnp.array([[2.0, 0.0, -1.0]])
    log_p = np.log(np.exp([2.0, 0, -1]) / np.exp([2.0, 0, -1]).sum())
    ones = jnp.ones(3)
    np.testing.assert_allclose(
        clip_losses(logits, jnp.array([1]), ones, 0.0, task="single_label"), [-log_p[1]], rtol=1e-6
    )
    np.testing.assert_allclose(
        clip_losses(logits, jnp.array([1]), 5 * ones, 0.0, task="single_label"),
        [-5 * log_p[1]],
        rtol=1e-6,
    )
    smooth = np.array([0.1, 0.8, 0.1])
    np.testing.assert_allclose(
        clip_losses(logits, jnp.array([1]), ones, 0.3, task="single_label"),
        [-(smooth * log_p).sum()],
        rtol=1e-6,
    )
    tags = jnp.array([[1.0, 0.0, 1.0]])
    p = 1 / (1 + np.exp(-np.array([2.0, 0, -1])))
    each = np.array([-3 * np.log(p[0]), -np.log(1 - p[1]), -3 * np.log(p[2])])
    np.testing.assert_allclose(
        clip_losses(logits, tags, 3 * ones, 0.0, task="multi_label"), [each.mean()], rtol=1e-6
    )
    # The squared errors of the report's own script, and of a regression.
    squares = np.array([3 * (1 - p[0]) ** 2, p[1] ** 2, 3 * (1 - p[2]) ** 2])
    np.testing.assert_allclose(
        clip_losses(logits, tags, 3 * ones, 0.0, task="multi_label", name="mse"),
        [squares.mean()],
        rtol=1e-6,
    )
    brier = ((np.exp(log_p) - [0, 1, 0]) ** 2).mean()
    got = clip_losses(logits, jnp.array([1]), 2 * ones, 0.0, task="single_label", name="mse")
    np.testing.assert_allclose(got, [2 * brier], rtol=1e-6)
    np.testing.assert_allclose(
        clip_losses(logits, tags, ones, 0.0, task="regression"), [(1 + 0 + 4) / 3], rtol=1e-6
    )


def test_balanced_weights_equal_scikit_learns():
    y = np.array([0, 0, 0, 1, 2, 2])
    np.testing.assert_allclose(
        balanced_weights(y, 4), [*compute_class_weight("balanced", classes=np.arange(3), y=y), 1.0]
    )
    assert balanced_weights(np.array([[1.0, 0], [0, 0], [0, 0]]), 2).tolist() == [2.0, 1.0]


def test_schedules():
    def rates(steps, **fields):
        config = ConfigDict(base_config().optimizer.to_dict() | {"learning_rate": 0.1} | fields)
        schedule = learning_rate_schedule(config, 100)
        return [float(schedule(step)) for step in steps]

    np.testing.assert_allclose(
        rates([0, 1, 100], schedule="keras", decay_rate=0.01), [0.1, 0.1 / 1.01, 0.05], rtol=1e-6
    )
    np.testing.assert_allclose(rates([0, 50, 100], schedule="cosine"), [0.1, 0.05, 0.0], atol=1e-8)
    np.testing.assert_allclose(
        rates([0, 20], schedule="exponential", decay_steps=10, decay_rate=0.5),
        [0.1, 0.025],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        rates([0, 5, 10, 90], schedule="constant", warmup_steps=10), [0, 0.05, 0.1, 0.1], rtol=1e-6
    )
    with pytest.raises(UserError, match="warmup_steps=100 is not below the run's 100 steps"):
        rates([0], warmup_steps=100)


def test_weight_decay_leaves_biases_alone_and_is_refused_where_it_has_no_effect():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    config = ConfigDict(
        base_config().optimizer.to_dict()
        | {"name": "adamw", "weight_decay": 0.1, "schedule": "constant"}
    )
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    np.testing.assert_allclose(updates["kernel"], -1e-3 * 0.1 * np.ones((2, 2)), rtol=1e-5)
    assert not updates["bias"].any()
    with pytest.raises(UserError, match="weight_decay has no effect on adam"):
        make_optimizer(ConfigDict({**config.to_dict(), "name": "adam"}), 10)
