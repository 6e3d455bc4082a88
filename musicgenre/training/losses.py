"""Losses as pure functions of logits and targets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from musicgenre.models.apply import probabilities


def clip_losses(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    label_smoothing: float,
    *,
    task: str,
    name: str = "",
) -> jax.Array:
    """Returns one loss per clip, float32 `[batch]`.

    Args:
      logits: `[batch, classes]`.
      targets: class numbers, int `[batch]` (single_label); 0/1 tags (multi_label) or numbers
        (regression), float `[batch, classes]`.
      weights: `[classes]`, of the true class, of a tag where it is present, or of a number.
      label_smoothing: fraction of the target spread over all classes; tags move towards 0.5.
      task: "single_label", "multi_label" or "regression".
      name: "cross_entropy" of the softmax or, averaged over tags, of the sigmoid; "mse" of the
        probabilities, or of a regression's outputs; "" is "mse" for a regression only.
    """
    if task == "regression":
        return (jnp.square(logits - targets) * weights).mean(axis=-1)
    if task == "single_label":
        smooth = optax.smooth_labels(jax.nn.one_hot(targets, logits.shape[-1]), label_smoothing)
        if name == "mse":
            losses = jnp.square(probabilities(logits, task) - smooth).mean(axis=-1)
        else:
            losses = optax.softmax_cross_entropy(logits, smooth)
        return losses * weights[targets]
    smooth = targets * (1.0 - label_smoothing) + 0.5 * label_smoothing
    if name == "mse":
        losses = jnp.square(probabilities(logits, task) - smooth)
    else:
        losses = optax.sigmoid_binary_cross_entropy(logits, smooth)
    return (losses * jnp.where(targets > 0, weights, 1.0)).mean(axis=-1)


def soft_losses(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, *, task: str
) -> jax.Array:
    """Returns each clip's cross entropy against probabilities, float32 `[batch]`.

    `targets` are float `[batch, classes]`; with 0 and 1 the result is that of `clip_losses`.
    """
    if task == "single_label":
        return optax.softmax_cross_entropy(logits, targets * weights)
    absent = (1.0 - targets) * jax.nn.log_sigmoid(-logits)
    return -(weights * targets * jax.nn.log_sigmoid(logits) + absent).mean(axis=-1)


def balanced_weights(targets: np.ndarray, classes: int) -> np.ndarray:
    """Returns class weights, float32 `[classes]`.

    For class numbers they are inverse to the class frequency and 1 on average over the clips
    (scikit-learn's "balanced"); for tags, the ratio of absences to presences. A class that never
    occurs gets 1.
    """
    if targets.ndim == 1:
        counts = np.bincount(targets, minlength=classes)
        weights = len(targets) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    else:
        counts = targets.sum(axis=0)
        weights = (len(targets) - counts) / np.maximum(counts, 1)
    return np.where(counts > 0, weights, 1.0).astype(np.float32)
