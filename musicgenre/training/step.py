"""One training step and one scoring step, as pure functions of state and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from musicgenre.models.apply import normalise, probabilities
from musicgenre.training.augment import Augmentation, following, gather_windows
from musicgenre.training.losses import clip_losses, soft_losses
from musicgenre.training.state import TrainState, average

Metrics = dict[str, jax.Array]
# (state, batch) or, where clips are resident, (state, batch, clips) -> (state, metrics).
StepFunction = Callable[..., tuple[TrainState, Metrics]]


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
    gather: Callable[[Any], Any] | None = None,
) -> StepFunction:
    """Returns `train_step(state, batch, clips=None) -> (state, metrics)`, to be jitted or pmapped.

    Args:
      module: the Linen module.
      optimizer: its optimiser.
      seed: dropout's key at a step is `fold_in(key(seed), step)`.
      class_weights: `[classes]`, see `losses.clip_losses`.
      task: "single_label", "multi_label" or "regression".
      loss: see `losses.clip_losses`.
      label_smoothing: see `losses.clip_losses`.
      teachers_weight: share of the teachers in the targets, where batches have them.
      ema_decay: of the parameters' moving average; 0 when there is none.
      accumulate: parts of the batch whose gradients are averaged before the one update.
      axis_name: the device axis when the step runs under pmap.
      augmentation: what is done to the batch first; its key at a step is derived from dropout's.
      window_frames: with resident clips, frames to take of each; 0 takes whole clips.
      gather: puts parameters together that are cut up over the devices: `Parallel.gather`.

    The step takes `x` `[batch, frames, bands]`, `y` and `mask` `[batch]`, and what the augmentation needs. With resident
    `clips` `[clips, frames of the store, bands]`, it takes `clip` and `start` `[batch]` instead of `x`. What teachers say of the
    clips, probabilities `[batch, classes]`, comes as `teacher`; of a mixed clip, both clips' is mixed. Its metrics are
    scalars: `loss`, `accuracy` (share of clips whose best class is right; single-label only; a mixed clip counts by the
    shares of its two) and `grad_norm`.
    """

    def loss_function(
        params: Any, collections: Any, norm: Any, key: jax.Array, batch: Any
    ) -> tuple[jax.Array, Any]:
        logits, updated = module.apply(
            {"params": params if gather is None else gather(params), **collections},
            normalise(batch["x"], norm),
            train=True,
            rngs={"dropout": key},
            mutable=[*collections, "intermediates"],
        )
        updated = {name: updated[name] for name in collections}

        def of_labels(measure: Callable[[jax.Array], jax.Array]) -> jax.Array:
            """A measure `[batch]` of each clip's labels; of a mixed clip, of both clips' by their shares."""
            if "share" not in batch:
                return measure(batch["y"])
            if task == "regression":
                share = batch["share"][:, None]
                return measure(share * batch["y"] + (1.0 - share) * batch["y_other"])
            # A cross entropy is linear in its targets: this is the one of the soft labels, each class with its own weight.
            return batch["share"] * measure(batch["y"]) + (1.0 - batch["share"]) * measure(
                batch["y_other"]
            )

        losses = of_labels(
            lambda y: clip_losses(logits, y, class_weights, label_smoothing, task=task, name=loss)
        )
        if "teacher" in batch:
            # A cross entropy is linear in its targets, so this is the one against labels and teachers mixed.
            taught = soft_losses(logits, batch["teacher"], class_weights, task=task)
            losses = (1.0 - teachers_weight) * losses + teachers_weight * taught
        mean = (losses * batch["mask"]).sum() / batch["mask"].sum()
        metrics = {"loss": mean}
        if batch["y"].ndim == 1:
            right = of_labels(lambda y: logits.argmax(axis=-1) == y) * batch["mask"]
            metrics["accuracy"] = right.sum() / batch["mask"].sum()
        return mean, (updated, metrics)

    def part_step(
        state: TrainState, key: jax.Array, collections: Any, batch: Any
    ) -> tuple[Any, Any, Metrics]:
        gradient = jax.grad(loss_function, has_aux=True)
        grads, (collections, metrics) = gradient(state.params, collections, state.norm, key, batch)
        return grads, collections, metrics

    def train_step(
        state: TrainState, batch: Any, clips: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        # The clips' way: gathered, augmented, normalised (in loss_function), through the network.
        if clips is not None:
            batch = dict(batch)
            clip, start = batch.pop("clip"), batch.pop("start")
            batch["x"] = gather_windows(clips, clip, start, window_frames or clips.shape[1])
        if augmentation is not None:
            batch = augmentation(batch, key, state.norm, axis_name)
            if "teacher" in batch and "share" in batch:
                share, own = batch["share"][:, None], batch["teacher"]
                batch = batch | {"teacher": share * own + (1.0 - share) * following(own, axis_name)}
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        if accumulate == 1:
            grads, collections, metrics = part_step(state, key, state.collections, batch)
        else:
            # Part i takes every accumulate-th clip, so that no clip changes its device.
            parts = jax.tree.map(
                lambda a: a.reshape(-1, accumulate, *a.shape[1:]).swapaxes(0, 1), batch
            )

            def body(carry: Any, numbered: Any) -> tuple[Any, Metrics]:
                total, collections = carry
                number, part = numbered
                grads, collections, metrics = part_step(
                    state, jax.random.fold_in(key, number), collections, part
                )
                return (jax.tree.map(jnp.add, total, grads), collections), metrics

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            (grads, collections), stacked = jax.lax.scan(
                body, (zeros, state.collections), (jnp.arange(accumulate), parts)
            )
            grads = jax.tree.map(lambda g: g / accumulate, grads)
            metrics = jax.tree.map(lambda m: m.mean(), stacked)
        if axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            collections=collections,
            opt_state=opt_state,
            ema=average(state.ema, params, ema_decay),
        )
        return new, metrics

    return train_step


def make_many_steps(step: StepFunction) -> StepFunction:
    """Returns a function that takes several steps in one call, which saves small networks the way back to the host.

    It takes a step's arguments, with batches `[steps, batch, ...]`, and returns metrics `[steps]`.
    """

    def many_steps(
        state: TrainState, batches: Any, *clips: jax.Array
    ) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda state, batch: step(state, batch, *clips), state, batches)

    return many_steps


def make_score_step(
    module: nn.Module, task: str, temperature: float = 1.0
) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns `score_step(model, x) -> probabilities (or a regression's numbers) [batch, classes]` for `TrainState.model()`.

    Args:
      module: the Linen module.
      task: see `losses.probabilities`.
      temperature: the logits are divided by it.
    """

    def score_step(model: Any, x: jax.Array) -> jax.Array:
        logits = module.apply(model["variables"], normalise(x, model["norm"]), train=False)
        return probabilities(logits if temperature == 1 else logits / temperature, task)

    return score_step
