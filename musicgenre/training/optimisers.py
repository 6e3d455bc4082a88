"""Optax's optimisers and learning-rate schedules by name."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from musicgenre.errors import UserError


def learning_rate_schedule(config: Any, total_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    `config` is the section `optimizer`; the cosine ends at `total_steps`.

    Raises:
      UserError: the warm-up is as long as the run.
    """
    peak, decay, warmup = config.learning_rate, config.decay_rate, config.warmup_steps
    if warmup >= total_steps:
        raise UserError(
            f"config.optimizer.warmup_steps={warmup} is not below the run's {total_steps} steps."
        )
    schedule: optax.Schedule = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, total_steps - warmup),
        "exponential": lambda: optax.exponential_decay(peak, config.decay_steps, decay),
        "keras": lambda: lambda step: peak / (1.0 + decay * step),
    }[config.schedule]()
    if warmup == 0:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), schedule], [warmup])


def kernels(params: Any) -> Any:
    """Returns which parameters weight decay applies to: all but biases and norms."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def make_optimizer(
    config: Any, total_steps: int, layer_rates: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """Returns the optimiser of the section `optimizer`.

    `layer_rates` are factors of the learning rate for each top-level layer; None is 1 for all.

    Raises:
      UserError: weight decay with an optimiser that has none.
    """
    if config.weight_decay and config.name not in ("adamw", "lamb"):
        raise UserError(
            f"config.optimizer.weight_decay has no effect on {config.name}: use adamw or lamb."
        )
    rate = learning_rate_schedule(config, total_steps)
    adam = (rate, config.b1, config.b2, config.eps)
    decay: Any = {"weight_decay": config.weight_decay, "mask": kernels}
    optimizer: optax.GradientTransformation = {
        "sgd": lambda: optax.sgd(rate),
        "momentum": lambda: optax.sgd(rate, momentum=config.momentum, nesterov=True),
        "adam": lambda: optax.adam(*adam),
        "adamw": lambda: optax.adamw(*adam, **decay),
        "lamb": lambda: optax.lamb(*adam, **decay),
    }[config.name]()
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if layer_rates is None or all(factor == 1 for factor in layer_rates.values()):
        return optimizer
    factors = dict(layer_rates)

    def scaled(updates: Any, _: Any) -> Any:
        return {
            name: jax.tree.map(lambda u, name=name: u * factors[name], update)
            for name, update in updates.items()
        }

    return optax.chain(optimizer, optax.stateless(scaled))
