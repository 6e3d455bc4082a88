"""A trained network as pure functions: normalisation, logits and embedding, probabilities."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def normalise(x: jax.Array, norm: Any) -> jax.Array:
    """Returns `(x - mean) / std`, float32, of stored features `[batch, frames, bands]`."""
    return (x.astype(jnp.float32) - norm["mean"]) / norm["std"]


def apply_model(
    module: nn.Module, variables: Mapping[str, Any], x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Runs a trained model, a pure function, on normalised features `[batch, frames, bands]`.

    Returns:
      Logits, float32 `[batch, classes]`, and the embedding, float32 `[batch, d]`.
    """
    logits, sown = module.apply(variables, x, train=False, mutable=["intermediates"])
    return logits, sown["intermediates"]["embedding"][0].astype(jnp.float32)


def probabilities(logits: jax.Array, task: str) -> jax.Array:
    """Returns the scores of logits: softmax, sigmoid, or the logits themselves in regression.

    `task` is "single_label", "multi_label" or "regression"; both are float32 `[batch, classes]`.
    """
    if task == "regression":
        return logits
    return jax.nn.softmax(logits) if task == "single_label" else jax.nn.sigmoid(logits)
