"""What training changes, and what a trained model consists of."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """One step's whole state; a pytree.

    Attributes:
      step: steps done, int32 scalar.
      params: trained parameters.
      collections: the module's other variables, such as `batch_stats`.
      opt_state: the optimiser's state.
      ema: moving average of `params`, or None when it is off.
      norm: `mean` and `std` of the training split, constant.
    """

    step: jax.Array
    params: Any
    collections: Any
    opt_state: Any
    ema: Any
    norm: Any

    def model(self) -> dict[str, Any]:
        """What is needed to use the model: its variables (averaged, where averaging is on) and normalisation."""
        params = self.params if self.ema is None else self.ema
        return {"variables": {"params": params, **self.collections}, "norm": self.norm}

    def rest(self) -> dict[str, Any]:
        """Returns what resuming needs besides the model: with an average, the parameters too."""
        rest = {"step": self.step, "opt_state": self.opt_state}
        return rest if self.ema is None else rest | {"params": self.params}

    def joined(self, model: dict[str, Any], rest: dict[str, Any]) -> "TrainState":
        """Returns the state whose `model()` and `rest()` these are."""
        collections = dict(model["variables"])
        params = collections.pop("params")
        averaged = "params" in rest
        return TrainState(
            step=rest["step"],
            params=rest["params"] if averaged else params,
            collections=collections,
            opt_state=rest["opt_state"],
            ema=params if averaged else None,
            norm=model["norm"],
        )


def create_state(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    norm: dict[str, Any],
    *,
    seed: int,
    frames: int,
    bands: int,
    ema: bool,
) -> TrainState:
    """Initialises a model's state from the seed.

    Args:
      module: the Linen module.
      optimizer: its optimiser.
      norm: `mean` and `std`, broadcastable to `[frames, bands]`.
      seed: of the parameters.
      frames: frames of the input.
      bands: bands of the input.
      ema: keep a moving average of the parameters.
    """
    key = jax.random.fold_in(jax.random.key(seed), 0x1217)
    variables = dict(
        jax.jit(lambda: module.init(key, jnp.zeros((1, frames, bands)), train=False))()
    )
    params = variables.pop("params")
    variables.pop("intermediates", None)
    # The copy keeps the average's buffers apart from the parameters', which each step donates.
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(
        jnp.zeros((), jnp.int32),
        params,
        variables,
        optimizer.init(params),
        average,
        {key: jnp.asarray(value) for key, value in norm.items()},
    )


def average(ema: Any, params: Any, decay: float) -> Any:
    """Returns the moving average `ema` after one more step, or None where there is none."""
    if ema is None:
        return None
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, params)
