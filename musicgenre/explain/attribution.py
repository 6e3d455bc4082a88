"""How much each part of an input contributes to a unit's activation.

Sources: K. Simonyan, A. Vedaldi, A. Zisserman, "Deep inside convolutional networks",
arXiv:1312.6034, for saliency; A. Shrikumar et al., "Not just a black box", arXiv:1605.01713, for
gradient x input; M. Sundararajan, A. Taly, Q. Yan, "Axiomatic attribution for deep networks",
arXiv:1703.01365, for integrated gradients; R. Selvaraju et al., "Grad-CAM", arXiv:1610.02391.

In all functions, `features` is one window, `[frames, bands]`, and `layer` and `unit` name the
explained unit.
"""

from typing import NamedTuple

import numpy as np
import scipy.fft

from musicgenre.audio.features import FeatureSpec
from musicgenre.explain.taps import EMBEDDING, Explainer
from musicgenre.inference.windows import BATCH


class Attribution(NamedTuple):
    """How much each part of an input contributes to a unit's activation.

    Attributes:
      values: one per feature, float32 `[frames, bands]`.
      spectral: one per band of the spectrogram. MFCCs are mapped back to the mel bands that they
        summarise, float32 `[frames, mels]`; otherwise it is `values`. Both have the same sum.
      score: the activation.
      reference: the activation of the input's baseline; 0 for gradient x input.
    """

    values: np.ndarray
    spectral: np.ndarray
    score: float
    reference: float = 0.0


def spectral_bands(values: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns features, or derivatives with respect to them, `[..., bands]`, on spectral bands.

    MFCCs are an orthonormal transform of the mel bands in dB, so its transpose maps them back,
    without what the transform leaves out. Other features are returned unchanged.
    """
    return values @ _cepstrum(spec) if spec.kind == "mfcc" else values


def _cepstrum(spec: FeatureSpec) -> np.ndarray:
    """Returns the transform from mel bands in dB to MFCCs, float32 `[n_mfcc, n_mels]`."""
    transform: np.ndarray = scipy.fft.dct(np.eye(spec.n_mels), axis=0, type=2, norm="ortho")
    return transform[: spec.n_mfcc].astype(np.float32)


def silence(features: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns the features of silence at the same scale, float32 `[frames, bands]`."""
    features = features.astype(np.float32)
    if spec.kind == "waveform" or spec.compression == "log10000":
        return np.zeros_like(features)
    loudest = 0.0 if spec.db_ref == "max" else float(spectral_bands(features, spec).max())
    row = np.float32(loudest - spec.top_db)
    if spec.kind == "mfcc":
        row = (loudest - spec.top_db) * _cepstrum(spec).sum(axis=1)
    return np.broadcast_to(row, features.shape).astype(np.float32)


def gradient_times_input(
    explainer: Explainer, features: np.ndarray, layer: str, unit: int
) -> Attribution:
    """Returns the derivative with respect to each normalised value, times that value.

    For a linear network this is each value's contribution. Zero is the mean of the training clips.
    """
    # The batch size of `integrated_gradients`: cheaper than compiling the network for another.
    found = explainer.gradients(np.broadcast_to(features, (BATCH, *features.shape)), layer, unit)
    change = features - np.asarray(explainer.model.model["norm"]["mean"], np.float32)
    return _attribution(found.inputs[0], change, explainer.model.features, float(found.scores[0]))


def integrated_gradients(
    explainer: Explainer, features: np.ndarray, layer: str, unit: int, *, steps: int = 64
) -> Attribution:
    """Returns integrated gradients along the straight path from silence to the input.

    They sum to the difference of the two activations, up to the error of the midpoint rule, which
    more steps reduce.
    """
    spec = explainer.model.features
    features, start = features.astype(np.float32), silence(features, spec)
    # Both ends first, then the midpoints. The last batch is filled, so that one size is compiled.
    positions = np.concatenate([[0, 1], (np.arange(steps) + 0.5) / steps]).astype(np.float32)
    total = np.zeros(features.shape, np.float64)
    ends: list[float] = []
    for first in range(0, len(positions), BATCH):
        some = np.resize(positions[first : first + BATCH], BATCH)[:, None, None]
        found = explainer.gradients(start + some * (features - start), layer, unit)
        ends = ends or found.scores[:2].tolist()
        midpoints = found.inputs[0 if first else 2 : len(positions) - first]
        total += midpoints.sum(axis=0, dtype=np.float64)
    mean = (total / steps).astype(np.float32)
    return _attribution(mean, features - start, spec, ends[1], ends[0])


def _attribution(
    gradient: np.ndarray,
    change: np.ndarray,
    spec: FeatureSpec,
    score: float,
    reference: float = 0.0,
) -> Attribution:
    values = (gradient * change).astype(np.float32)
    spectral = spectral_bands(gradient, spec) * spectral_bands(change, spec)
    return Attribution(values, spectral.astype(np.float32), score, reference)


def grad_cam(values: np.ndarray, by_values: np.ndarray) -> np.ndarray:
    """Returns Grad-CAM's map: the positive part of a layer's units weighted by mean derivative.

    The values of the layer for one input, and the derivatives of the explained activation with
    respect to them, are `[..., units]`; the map is float32 `[...]`.
    """
    weights = by_values.reshape(-1, by_values.shape[-1]).mean(axis=0)
    return np.maximum(values @ weights, 0).astype(np.float32)


def class_map(
    explainer: Explainer, features: np.ndarray, layer: str, unit: int, over: str = ""
) -> np.ndarray:
    """Returns Grad-CAM for a unit, float32 `[steps]` or `[steps, heights]`.

    `over` is the layer whose positions the map has; "" for the last convolution.

    Raises:
      UserError: that layer has no positions.
    """
    found = explainer.gradients(features[None], layer, unit, over or explainer.last_convolution)
    assert found.values is not None and found.by_values is not None
    image = grad_cam(found.values[0], found.by_values[0])
    return image if image.ndim < 3 else image.reshape(*image.shape[:2], -1).mean(axis=2)


def stretched(positions: np.ndarray, frames: int, bands: int) -> np.ndarray:
    """Returns a map `[steps]` or `[steps, heights]` as float32 `[frames, bands]`, interpolated.

    Positions are taken to be evenly spaced over the input. Padding, and pooling that drops a
    remainder, shift them a little.
    """
    grid = positions.reshape(len(positions), -1)
    for extent in (bands, frames):
        # Along the last axis, which then becomes the first.
        count = grid.shape[1]
        centres = (np.arange(count) + 0.5) * extent / count - 0.5
        grid = np.stack([np.interp(np.arange(extent), centres, line) for line in grid], axis=1)
    return grid.astype(np.float32)


def strongest_units(
    explainer: Explainer, features: np.ndarray, label: int, count: int = 3
) -> list[int]:
    """Returns the units of the embedding that contribute most to a label, the strongest first.

    A unit's contribution is its activation times its weight in the layer "head"; without such a
    layer, its activation. Without an embedding there are no units.
    """
    if EMBEDDING not in explainer.taps:
        return []
    # The values of all layers, which `activations` compiles for the page in any case.
    embedding = explainer.activations(features[None])[EMBEDDING][0]
    head = explainer.model.model["variables"]["params"].get("head", {})
    kernel = np.asarray(head.get("kernel", 0.0))
    if embedding.ndim == 1 and kernel.ndim == 2 and len(kernel) == len(embedding):
        embedding = embedding * kernel[:, label]
    strength = embedding.reshape(-1, embedding.shape[-1]).max(axis=0)
    return np.argsort(-strength, kind="stable")[:count].tolist()
