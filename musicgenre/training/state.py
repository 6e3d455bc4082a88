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
    """The full state after a step; a pytree.

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
        """Returns the model: its variables (averaged, if averaging is on) and normalisation."""
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
        ema = params if "params" in rest else None
        params = rest.get("params", params)
        norm = model["norm"]
        return TrainState(rest["step"], params, collections, rest["opt_state"], ema, norm)

    def following(
        self, params: Any, opt_state: Any, collections: Any, ema_decay: float = 0.0
    ) -> "TrainState":
        """Returns the state one step later; its average moves by `1 - ema_decay`."""
        ema = self.ema
        if ema is not None:
            ema = jax.tree.map(lambda a, p: ema_decay * a + (1.0 - ema_decay) * p, ema, params)
        return TrainState(self.step + 1, params, collections, opt_state, ema, self.norm)


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
    """Initialises a model's state for inputs `[frames, bands]` from the seed.

    `norm` has `mean` and `std`, broadcastable to the inputs; `ema` keeps a moving average.
    """
    key = jax.random.fold_in(jax.random.key(seed), 0x1217)
    x = (1, frames, bands)
    variables = dict(jax.jit(lambda: module.init(key, jnp.zeros(x), train=False))())
    params = variables.pop("params")
    variables.pop("intermediates", None)
    # The average has its own buffers, since each step donates those of the parameters.
    average = jax.tree.map(jnp.copy, params) if ema else None
    norm = {key: jnp.asarray(value) for key, value in norm.items()}
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, variables, optimizer.init(params), average, norm)
