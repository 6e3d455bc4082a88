"""Losses as pure functions of logits and targets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def clip_losses(logits: jax.Array, targets: jax.Array, weights: jax.Array, label_smoothing: float) -> jax.Array:
    """Returns one loss per clip, float32 `[batch]`.

    Args:
      logits: `[batch, classes]`.
      targets: class numbers, int `[batch]`: softmax cross entropy; or 0/1 tags, float `[batch, classes]`: the mean
        over tags of sigmoid cross entropies.
      weights: `[classes]`: of the true class, or of a tag where it is present.
      label_smoothing: the share of the target that is spread over all classes; for tags, taken towards 0.5.
    """
    classes = logits.shape[-1]
    if targets.ndim == 1:
        smooth = optax.smooth_labels(jax.nn.one_hot(targets, classes), label_smoothing)
        return optax.softmax_cross_entropy(logits, smooth) * weights[targets]
    smooth = targets * (1.0 - label_smoothing) + 0.5 * label_smoothing
    losses = optax.sigmoid_binary_cross_entropy(logits, smooth)
    return (losses * jnp.where(targets > 0, weights, 1.0)).mean(axis=-1)


def probabilities(logits: jax.Array, task: str) -> jax.Array:
    """Returns softmax (single_label) or sigmoid (multi_label) scores, float32 `[batch, classes]`."""
    return jax.nn.softmax(logits) if task == "single_label" else jax.nn.sigmoid(logits)


def balanced_weights(targets: np.ndarray, classes: int) -> np.ndarray:
    """Returns class weights, float32 `[classes]`.

    For class numbers, inverse to their frequency and 1 on average over the clips (scikit-learn's "balanced"); for
    tags, the ratio of absences to presences, so that both weigh the same. A class that never occurs gets 1.
    """
    if targets.ndim == 1:
        counts = np.bincount(targets, minlength=classes)
        present = max(int((counts > 0).sum()), 1)
        weights = len(targets) / (present * np.maximum(counts, 1))
    else:
        counts = targets.sum(axis=0)
        weights = (len(targets) - counts) / np.maximum(counts, 1)
    return np.where(counts > 0, weights, 1.0).astype(np.float32)
