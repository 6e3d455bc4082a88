"""Transfer: a run that starts from the layers of another model, with a new head and a learning rate of its own for each layer."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from musicgenre.audio.features import FeatureSpec
from musicgenre.config import differences
from musicgenre.errors import UserError
from musicgenre.runs.model import load_model
from musicgenre.training.state import TrainState


def layer_order(module: nn.Module, frames: int, bands: int) -> list[str]:
    """Returns the names of a network's top-level layers that have parameters, in the order in which they are called.

    Parameters of the module itself come first. The last layer is the head.

    Args:
      module: the Linen module.
      frames: frames of its input.
      bands: bands of its input.
    """
    called: dict[str, None] = {}

    def note(
        function: Any, arguments: Any, keywords: Any, context: nn.module.InterceptorContext
    ) -> Any:
        if context.module.path:
            called.setdefault(context.module.path[0])
        return function(*arguments, **keywords)

    def init(key: jax.Array, x: jax.Array) -> Any:
        with nn.intercept_methods(note):
            return module.init(key, x, train=False)

    x = jax.ShapeDtypeStruct((1, frames, bands), jnp.float32)
    params = jax.eval_shape(init, jax.random.key(0), x)["params"]
    return [name for name in params if name not in called] + [
        name for name in called if name in params
    ]


def start_from(
    state: TrainState,
    layers: Sequence[str],
    source: str | Path,
    *,
    model: dict[str, Any],
    features: FeatureSpec,
) -> TrainState:
    """Returns a new run's state with the layers of another model, all but the head.

    The statistics of batch normalisation come along. The normalisation of the input stays the new training split's.

    Args:
      state: a fresh state.
      layers: from `layer_order`; the last one is the head.
      source: the other run's folder, of which the last checkpoint is taken; a bundle; or the name of a model that comes with this
        package.
      model: the config's resolved `model` section.
      features: the new run's front end. Another one there is allowed, with a warning.

    Raises:
      UserError: no model is there, it is of another network, or a layer has another shape.
    """
    there = load_model(source, field="config.init_from")
    if there.config.model.name != model["name"]:
        raise UserError(
            f"config.init_from={str(source)!r} holds the model {there.config.model.name!r}, "
            f"not {model['name']!r}."
        )
    if there.trained_on.unknown:
        logging.warning(
            "config.init_from: training clips unknown: %s, so no audit can rule out leakage",
            there.trained_on.unknown,
        )
    before = dataclasses.asdict(there.features)
    if changed := differences(before, dataclasses.asdict(features)):
        logging.warning(
            "config.init_from was trained on other features (there -> here): %s", "; ".join(changed)
        )
    variables = dict(there.model["variables"])
    body = layers[:-1]
    params = _taken(state.params, variables.pop("params"), body, source)
    collections = {
        name: _taken(tree, variables.get(name, {}), body, source)
        for name, tree in state.collections.items()
    }
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return dataclasses.replace(state, params=params, collections=collections, ema=ema)


def layer_rates(
    layers: Sequence[str], *, transferred: bool, transferred_rate: float, layer_decay: float
) -> dict[str, float]:
    """Returns the factor of the learning rate of each layer.

    From the head backwards each layer's is `layer_decay` times that of the one after it (discriminative fine-tuning, Howard and
    Ruder 2018, section 3.2, arXiv:1801.06146). Where layers were transferred, all but the head also take
    `transferred_rate`; 0 freezes them.

    Args:
      layers: from `layer_order`.
      transferred: the layers before the head come from another model.
      transferred_rate: their factor.
      layer_decay: factor from one layer to the one before it.
    """
    last = len(layers) - 1
    return {
        name: layer_decay ** (last - i) * (transferred_rate if transferred and i < last else 1.0)
        for i, name in enumerate(layers)
    }


def _taken(tree: Any, variables: Any, layers: Sequence[str], source: str | Path) -> Any:
    """Returns a tree of variables with those of the named layers replaced by another model's."""
    result = dict(tree)
    for name in layers:
        if name not in tree:
            continue
        here, there = (
            {
                jax.tree_util.keystr(path): np.shape(leaf)
                for path, leaf in jax.tree_util.tree_leaves_with_path(t)
            }
            for t in (tree[name], variables.get(name, {}))
        )
        if here != there:
            path = next(
                path
                for path in sorted(here.keys() | there.keys())
                if here.get(path) != there.get(path)
            )
            raise UserError(
                f"config.init_from={str(source)!r}: its layer {name}{path} has the shape {there.get(path, 'none')} where "
                f"{here.get(path, 'none')} is needed. Give the model the same fields, and the data the same frames and bands."
            )
        result[name] = jax.tree.map(jnp.asarray, variables[name])
    return result
