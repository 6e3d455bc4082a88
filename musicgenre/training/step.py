"""One training step and one scoring step, as pure functions of state and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from musicgenre.training.losses import clip_losses, probabilities
from musicgenre.training.state import TrainState

Metrics = dict[str, jax.Array]
StepFunction = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def normalise(x: jax.Array, norm: Any) -> jax.Array:
    """Returns `(x - mean) / std`, float32, of stored features `[batch, frames, bands]`."""
    return (x.astype(jnp.float32) - norm["mean"]) / norm["std"]


def make_train_step(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    class_weights: jax.Array,
    task: str = "single_label",
    loss: str = "",
    label_smoothing: float = 0.0,
    ema_decay: float = 0.0,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> StepFunction:
    """Returns `train_step(state, batch) -> (state, metrics)`, to be jitted or pmapped.

    Args:
      module: the Linen module.
      optimizer: its optimiser.
      seed: dropout's key at a step is `fold_in(key(seed), step)`.
      class_weights: `[classes]`, see `losses.clip_losses`.
      task: "single_label", "multi_label" or "regression".
      loss: see `losses.clip_losses`.
      label_smoothing: see `losses.clip_losses`.
      ema_decay: of the parameters' moving average; 0 when there is none.
      accumulate: parts of the batch whose gradients are averaged before the one update.
      axis_name: the device axis when the step runs under pmap.

    The step takes `x` `[batch, frames, bands]`, `y` and `mask` `[batch]`. Its metrics are scalars: `loss`, `accuracy`
    (share of clips whose best class is right; single-label only) and `grad_norm`.
    """

    def loss_function(params: Any, collections: Any, norm: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, Any]:
        logits, updated = module.apply(
            {"params": params, **collections},
            normalise(batch["x"], norm),
            train=True,
            rngs={"dropout": key},
            mutable=[*collections, "intermediates"],
        )
        updated = {name: updated[name] for name in collections}
        losses = clip_losses(logits, batch["y"], class_weights, label_smoothing, task=task, name=loss)
        mean = (losses * batch["mask"]).sum() / batch["mask"].sum()
        metrics = {"loss": mean}
        if batch["y"].ndim == 1:
            right = (logits.argmax(axis=-1) == batch["y"]) * batch["mask"]
            metrics["accuracy"] = right.sum() / batch["mask"].sum()
        return mean, (updated, metrics)

    def part_step(state: TrainState, key: jax.Array, collections: Any, batch: Any) -> tuple[Any, Any, Metrics]:
        gradient = jax.grad(loss_function, has_aux=True)
        grads, (collections, metrics) = gradient(state.params, collections, state.norm, key, batch)
        return grads, collections, metrics

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        if accumulate == 1:
            grads, collections, metrics = part_step(state, key, state.collections, batch)
        else:
            # Part i takes every accumulate-th clip, so that no clip changes its device.
            parts = jax.tree.map(lambda a: a.reshape(-1, accumulate, *a.shape[1:]).swapaxes(0, 1), batch)

            def body(carry: Any, numbered: Any) -> tuple[Any, Metrics]:
                total, collections = carry
                number, part = numbered
                grads, collections, metrics = part_step(state, jax.random.fold_in(key, number), collections, part)
                return (jax.tree.map(jnp.add, total, grads), collections), metrics

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            (grads, collections), stacked = jax.lax.scan(body, (zeros, state.collections), (jnp.arange(accumulate), parts))
            grads = jax.tree.map(lambda g: g / accumulate, grads)
            metrics = jax.tree.map(lambda m: m.mean(), stacked)
        if axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda old, new: ema_decay * old + (1.0 - ema_decay) * new, ema, params)
        new = dataclasses.replace(
            state, step=state.step + 1, params=params, collections=collections, opt_state=opt_state, ema=ema
        )
        return new, metrics

    return train_step


def make_score_step(module: nn.Module, task: str) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns `score_step(model, x) -> probabilities (or a regression's numbers) [batch, classes]` for `TrainState.model()`."""

    def score_step(model: Any, x: jax.Array) -> jax.Array:
        logits = module.apply(model["variables"], normalise(x, model["norm"]), train=False)
        return probabilities(logits, task)

    return score_step
