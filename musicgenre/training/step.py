"""The supervised step and the scoring step, as pure functions of state and batch."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from musicgenre.models.apply import normalise, probabilities
from musicgenre.training.augment import Augmentation, following, gather_windows
from musicgenre.training.losses import clip_losses, soft_losses
from musicgenre.training.state import TrainState

Metrics = dict[str, jax.Array]
# (state, batch) or, where clips are resident, (state, batch, clips) -> (state, metrics).
StepFunction = Callable[..., tuple[TrainState, Metrics]]


def run_network(
    module: nn.Module, params: Any, collections: Any, norm: Any, x: jax.Array, key: jax.Array
) -> tuple[jax.Array, Any, Any]:
    """Runs a network in training on `x` `[batch, frames, bands]`; `key` is dropout's.

    Returns its logits, its updated `collections`, and what it has sown.
    """
    logits, updated = module.apply(
        {"params": params, **collections},
        normalise(x, norm),
        train=True,
        rngs={"dropout": key},
        mutable=[*collections, "intermediates"],
    )
    return logits, {name: updated[name] for name in collections}, updated.get("intermediates")


def make_train_step(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    class_weights: jax.Array,
    task: str = "single_label",
    loss: str = "",
    label_smoothing: float = 0.0,
    teachers_weight: float = 0.0,
    ema_decay: float = 0.0,
    accumulate: int = 1,
    axis_name: str | None = None,
    augmentation: Augmentation | None = None,
    window_frames: int = 0,
    gather: Callable[[Any], Any] = lambda params: params,
) -> StepFunction:
    """Returns `train_step(state, batch, clips=None) -> (state, metrics)`, to be jitted or pmapped.

    The step takes `x` `[batch, frames, bands]`, `y` and `mask` `[batch]`, and what the augmentation
    needs; with resident `clips` `[clips, frames, bands]`, `clip` and `start` `[batch]` instead of
    `x`. `teacher` holds the teachers' probabilities `[batch, classes]`; mixed clips mix them, too.
    Its metrics are scalars: `loss`, `accuracy` (single-label only; a mixed clip counts by the
    fractions of its two) and `grad_norm`.

    `class_weights`, `task`, `loss` and `label_smoothing` are those of `losses.clip_losses`. The key
    of augmentation and dropout at a step is `fold_in(key(seed), step)`. `teachers_weight` is the
    teachers' fraction of the targets. The gradients of `accumulate` parts of a batch are averaged.
    `axis_name` is the device axis under pmap. Of resident clips, a step takes `window_frames`, or
    all of them if 0. `gather` is `Parallel.gather`.
    """

    def loss_function(
        params: Any, collections: Any, norm: Any, key: jax.Array, batch: Any
    ) -> tuple[jax.Array, Any]:
        logits, updated, _ = run_network(module, gather(params), collections, norm, batch["x"], key)

        def of_labels(measure: Callable[[jax.Array], jax.Array]) -> jax.Array:
            own = measure(batch["y"])
            if "mix" not in batch:
                return own
            # Cross entropy is linear in its targets: this is that of the mixed labels.
            return batch["mix"] * own + (1.0 - batch["mix"]) * measure(batch["y_other"])

        losses = of_labels(
            lambda y: clip_losses(logits, y, class_weights, label_smoothing, task=task, name=loss)
        )
        if "teacher" in batch:
            taught = soft_losses(logits, batch["teacher"], class_weights, task=task)
            losses = (1.0 - teachers_weight) * losses + teachers_weight * taught
        mean = (losses * batch["mask"]).sum() / batch["mask"].sum()
        metrics = {"loss": mean}
        if batch["y"].ndim == 1:
            right = of_labels(lambda y: logits.argmax(axis=-1) == y) * batch["mask"]
            metrics["accuracy"] = right.sum() / batch["mask"].sum()
        return mean, (updated, metrics)

    gradient = jax.grad(loss_function, has_aux=True)

    def train_step(
        state: TrainState, batch: Any, clips: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if clips is not None:
            batch = dict(batch)
            clip, start = batch.pop("clip"), batch.pop("start")
            batch["x"] = gather_windows(clips, clip, start, window_frames or clips.shape[1])
        if augmentation is not None:
            batch = augmentation(batch, key, state.norm, axis_name)
        if "mix" in batch:
            mix = batch["mix"][:, None]
            if "teacher" in batch:
                own = batch["teacher"]
                batch["teacher"] = mix * own + (1.0 - mix) * following(own, axis_name)
            if task == "regression":
                batch["y"] = mix * batch["y"] + (1.0 - mix) * batch.pop("y_other")
                del batch["mix"]
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        if accumulate > 1:
            grads, (collections, metrics) = _accumulated(gradient, accumulate, state, key, batch)
        else:
            grads, (collections, metrics) = gradient(
                state.params, state.collections, state.norm, key, batch
            )
        if axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.following(params, opt_state, collections, ema_decay), metrics

    return train_step


def _accumulated(
    gradient: Callable[..., Any], accumulate: int, state: TrainState, key: jax.Array, batch: Any
) -> tuple[Any, Any]:
    """Returns the mean gradient of a batch's parts, their last collections and mean metrics."""
    # Part i takes every accumulate-th clip, so no clip changes its device.
    parts = jax.tree.map(lambda a: a.reshape(-1, accumulate, *a.shape[1:]).swapaxes(0, 1), batch)

    def body(carry: Any, numbered: Any) -> tuple[Any, Metrics]:
        total, collections = carry
        number, part = numbered
        part_key = jax.random.fold_in(key, number)
        grads, aux = gradient(state.params, collections, state.norm, part_key, part)
        return (jax.tree.map(jnp.add, total, grads), aux[0]), aux[1]

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (grads, collections), stacked = jax.lax.scan(
        body, (zeros, state.collections), (jnp.arange(accumulate), parts)
    )
    grads = jax.tree.map(lambda g: g / accumulate, grads)
    return grads, (collections, jax.tree.map(lambda m: m.mean(), stacked))


def make_many_steps(step: StepFunction) -> StepFunction:
    """Returns a function that takes several steps in one call, without returning to the host.

    It takes a step's arguments, with batches `[steps, batch, ...]`, and returns metrics `[steps]`.
    """
    return lambda state, batches, *clips: jax.lax.scan(
        lambda state, batch: step(state, batch, *clips), state, batches
    )


def make_score_step(
    module: nn.Module, task: str, temperature: float = 1.0
) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns `score_step(model, x) -> probabilities [batch, classes]` for `TrainState.model()`.

    They are those of `musicgenre.models.apply.probabilities`, with logits over the temperature.
    """

    def score_step(model: Any, x: jax.Array) -> jax.Array:
        logits: Any = module.apply(model["variables"], normalise(x, model["norm"]), train=False)
        return probabilities(logits if temperature == 1 else logits / temperature, task)

    return score_step
