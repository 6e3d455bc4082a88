"""Optimisers and learning-rate schedules by name, all of them Optax's."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from musicgenre.errors import UserError


def learning_rate_schedule(config: Any, total_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    Args:
      config: the `optimizer` section of a config.
      total_steps: steps of the whole run; the cosine ends there.
    """
    peak, decay, warmup = config.learning_rate, config.decay_rate, config.warmup_steps
    if warmup >= total_steps:
        raise UserError(
            f"config.optimizer.warmup_steps={warmup} is not below the run's {total_steps} steps."
        )
    if config.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(peak, total_steps - warmup)
    elif config.schedule == "exponential":
        schedule = optax.exponential_decay(peak, config.decay_steps, decay)
    elif config.schedule == "keras":

        def schedule(step: jax.Array) -> jax.Array:
            return peak / (1.0 + decay * step)

    else:
        schedule = optax.constant_schedule(peak)
    if warmup == 0:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), schedule], [warmup])


def make_optimizer(
    config: Any, total_steps: int, layer_rates: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """Returns the optimiser of a config's `optimizer` section; weight decay leaves biases and norms alone.

    Args:
      config: the `optimizer` section of a config.
      total_steps: steps of the whole run.
      layer_rates: factor of the learning rate for each top-level layer of the parameters; 1 for all if None.
    """
    rate = learning_rate_schedule(config, total_steps)

    def kernels(params: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim > 1, params)

    if config.name == "sgd":
        optimizer = optax.sgd(rate)
    elif config.name == "momentum":
        optimizer = optax.sgd(rate, momentum=config.momentum, nesterov=True)
    elif config.name == "adam":
        optimizer = optax.adam(rate, config.b1, config.b2, config.eps)
    elif config.name == "adamw":
        optimizer = optax.adamw(
            rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=kernels
        )
    else:
        optimizer = optax.lamb(
            rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=kernels
        )
    if config.weight_decay and config.name not in ("adamw", "lamb"):
        raise UserError(
            f"config.optimizer.weight_decay has no effect on {config.name}: use adamw or lamb."
        )
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if layer_rates is not None and any(factor != 1 for factor in layer_rates.values()):
        factors = dict(layer_rates)
        scale = optax.stateless(
            lambda updates, _: {
                name: jax.tree.map(lambda u, name=name: u * factors[name], update)
                for name, update in updates.items()
            }
        )
        optimizer = optax.chain(optimizer, scale)
    return optimizer
