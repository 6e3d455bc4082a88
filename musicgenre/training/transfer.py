"""Transfer: a run that starts from another model's layers, with a learning rate per layer."""

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
    """Returns the names of a network's top-level layers with parameters, in order of their calls.

    Parameters of the module itself come first. The last layer is the head.
    """
    called: dict[str, None] = {}

    def note(
        function: Any, arguments: Any, keywords: Any, context: nn.module.InterceptorContext
    ) -> Any:
        if context.module.path:
            called.setdefault(context.module.path[0])
        return function(*arguments, **keywords)

    x = jax.ShapeDtypeStruct((1, frames, bands), jnp.float32)
    with nn.intercept_methods(note):
        params = jax.eval_shape(
            lambda key, x: module.init(key, x, train=False), jax.random.key(0), x
        )["params"]
    own = [name for name in params if name not in called]
    return own + [name for name in called if name in params]


def start_from(
    state: TrainState,
    layers: Sequence[str],
    source: str | Path,
    *,
    model: dict[str, Any],
    features: FeatureSpec,
) -> TrainState:
    """Returns a fresh state with all layers of another model except the head.

    Batch normalisation statistics are copied as well. The input normalisation stays that of the new
    training split. The other model's front end may differ, with a warning.

    `source` is a workdir, whose last checkpoint is used, a bundle, or the name of a packaged model.
    `layers` come from `layer_order`; the last one is the head. `model` is the config's resolved
    section `model`, and `features` the new run's front end.

    Raises:
      UserError: there is no such model, it has another network, or a layer has another shape.
    """
    there = load_model(source, field="config.init_from")
    if there.config.model.name != model["name"]:
        raise UserError(
            f"config.init_from={str(source)!r} holds the model {there.config.model.name!r}, "
            f"not {model['name']!r}."
        )
    if there.trained_on.unknown:
        logging.warning(
            "config.init_from: training clips unknown: %s; no audit can rule out leakage",
            there.trained_on.unknown,
        )
    if changed := differences(*map(dataclasses.asdict, (there.features, features))):
        logging.warning(
            "config.init_from was trained on other features (there -> here): %s", "; ".join(changed)
        )
    trees = {"params": state.params, **state.collections}
    for name, tree in trees.items():
        trees[name] = _replaced(tree, there.model["variables"].get(name, {}), layers[:-1], source)
    params = trees.pop("params")
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return dataclasses.replace(state, params=params, collections=trees, ema=ema)


def _replaced(tree: Any, variables: Any, layers: Sequence[str], source: str | Path) -> Any:
    """Returns a tree of variables with the named layers replaced by another model's."""

    def shapes(layer: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(layer)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)
            for path, leaf in leaves
        }

    new = {name: variables.get(name, {}) for name in layers if name in tree}
    here, there = shapes({name: tree[name] for name in new}), shapes(new)
    for path in sorted(here.keys() | there.keys()):
        if here.get(path) != there.get(path):
            raise UserError(
                f"config.init_from={str(source)!r}: its layer {path} has the shape "
                f"{there.get(path, 'none')} where {here.get(path, 'none')} is needed. "
                "Give the model the same fields, and the data the same frames and bands."
            )
    return {**tree, **jax.tree.map(jnp.asarray, new)}


def layer_rates(
    layers: Sequence[str], transferred: bool, transferred_rate: float, layer_decay: float
) -> dict[str, float]:
    """Returns the factor of each layer's learning rate, of `layers` from `layer_order`.

    From the head backwards, each layer's factor is `layer_decay` times the next layer's
    (discriminative fine-tuning, Howard and Ruder 2018, section 3.2, arXiv:1801.06146). Layers
    `transferred` from another model, all but the head, are also multiplied by `transferred_rate`; 0
    freezes them.
    """
    last = len(layers) - 1
    return {
        name: layer_decay ** (last - i) * (transferred_rate if transferred and i < last else 1.0)
        for i, name in enumerate(layers)
    }
