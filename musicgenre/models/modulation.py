"""A small network on local 2-D modulation spectra, onsets and correlations between bands.

The front end has no parameters. It divides a log-mel spectrogram into blocks of neighbouring bands
and windows of frames, takes the 2-D spectrum of each block (its scale is how fine the pattern is
over frequency, its rate how fast it repeats) and averages the magnitudes over time. It can do so
for several views of a spectrogram that weight loudness differently. Few clips suffice to train the
rest, one hidden layer.

The idea is that of spectro-temporal modulation filters (T. Chi, P. Ru, S. Shamma, "Multiresolution
spectrotemporal analysis of complex sounds", JASA 2005), of the joint time-frequency scattering
transform (J. Andén, S. Mallat, "Deep scattering spectrum", IEEE TSP 2014, and their later work with
V. Lostanlen), and of auditory modulations for genres (Y. Panagakis, C. Kotropoulos, G. Arce, "Music
genre classification via sparse representations of auditory temporal modulations", EUSIPCO 2009).
The papers are cited from memory; the blocks, the bins and the other features are this project's
own.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft

from musicgenre.models.layers import Network, batch_norm, check_field, check_lengths
from musicgenre.models.registry import InputLimits, register

# Added before a root, a division or a logarithm of what may be 0, in the input's unit (dB):
# inaudible.
_TINY_POWER = 1e-6
_FLOOR = 0.1
_CORRELATION_FLOOR = 0.05
# A frame is silent if its loudest band is this many dB below the clip's maximum. The front end's
# floor is at 80.
_SILENCE = 75.0
# Clips that a CPU computes at a time, so that intermediate arrays stay in its cache: 3.5 times as
# fast as 64.
_CPU_CLIPS = 4


def _einsum(subscripts: str, *arrays: Any) -> jax.Array:
    product: jax.Array = jnp.einsum(subscripts, *arrays, precision=jax.lax.Precision.HIGHEST)
    return product


def bin_matrix(edges: Sequence[int], size: int) -> np.ndarray:
    """Returns the matrix that averages neighbours, float32 `[size, bins]`.

    `edges` are the first index of each bin, rising from 0; the last bin ends at `size`, and bins
    beyond it are left out.
    """
    starts = [edge for edge in edges if edge < size]
    matrix = np.zeros((size, len(starts)), np.float32)
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], size], strict=True)):
        matrix[start:end, number] = 1.0 / (end - start)
    return matrix


def cosine_matrix(size: int) -> np.ndarray:
    """Returns the orthonormal DCT-II, float32 `[size, size]`, to multiply from the right."""
    return np.asarray(scipy.fft.dct(np.eye(size), norm="ortho", axis=1), np.float32)


def fourier_matrix(window: int) -> np.ndarray:
    """Returns the real Fourier transform under a periodic Hann window.

    It is float32 `[window, 2 * (window // 2 + 1)]`, cosines and then sines.
    """
    time = np.arange(window)
    angle = 2.0 * np.pi * np.outer(time, np.arange(window // 2 + 1)) / window
    hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * time / window)
    waves = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    return np.asarray(hann[:, None] * waves, np.float32)


def sounding(x: jax.Array) -> jax.Array:
    """Returns 1 from the first to the last frame that is not silent and else 0, `[batch, frames]`.

    `x` is dB, `[batch, frames, bands]`. A rest is music, silence before and after a song is not.
    """
    loudest = x.max(axis=2)
    audible = loudest > loudest.max(axis=1, keepdims=True) - _SILENCE
    frame = jnp.arange(x.shape[1], dtype=jnp.float32)
    first = jnp.where(audible, frame, jnp.inf).min(axis=1, keepdims=True)
    last = jnp.where(audible, frame, -jnp.inf).max(axis=1, keepdims=True)
    return ((frame >= first) & (frame <= last)).astype(jnp.float32)


def weighted_mean(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns the mean over frames, float32 `[batch, 1, n]`, of `x` `[batch, frames, n]`.

    The weights are `[batch, frames]`; where all are 0 the mean is 0.
    """
    total = jnp.maximum(weight.sum(axis=1), _TINY_POWER)
    return (x * weight[:, :, None]).sum(axis=1, keepdims=True) / total[:, None, None]


def standard_deviation(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns the standard deviation over frames, `[batch, frames, n]` to `[batch, n]`.

    It has a gradient where it is 0. The weights are `[batch, frames]`.
    """
    variance = weighted_mean(jnp.square(x - weighted_mean(x, weight)), weight)
    return jnp.sqrt(variance[:, 0] + _TINY_POWER)


def modulation_spectrum(
    x: jax.Array,
    weight: jax.Array,
    regions: int,
    window: int,
    scale_edges: Sequence[int],
    rate_edges: Sequence[int],
) -> jax.Array:
    """Returns log mean magnitudes of local 2-D spectra, `[batch, regions, scales, rates]`.

    A DCT over each block of bands and a Fourier transform over each window of frames, half of which
    overlap; remaining bands at the top and frames at the end are not used. Magnitudes are averaged
    over windows and within bins. Windows that contain frames of weight 0 are left out, unless all
    do.

    Args:
      x: dB, float32 `[batch, frames, bands]`, at least `window` frames and `regions` bands.
      weight: 0 or 1 for each frame, float32 `[batch, frames]`.
      regions: number of blocks of bands.
      window: frames, even.
      scale_edges: first DCT index of each bin, in half cycles per block.
      rate_edges: first Fourier index of each bin, in cycles per window.
    """
    batch, frames, bands = x.shape
    width, hop = bands // regions, window // 2
    halves = frames // hop
    blocks = x[:, : halves * hop, : regions * width].reshape(batch, halves, hop, regions, width)
    blocks = _einsum("nhtrb,bk->nrkht", blocks, cosine_matrix(width))
    # One product transforms each half of a window as a first and as a second half.
    fourier = fourier_matrix(window)
    fourier = np.concatenate([fourier[:hop], fourier[hop:]], axis=1)
    first, second = jnp.split(_einsum("nrkht,tf->nrkhf", blocks, fourier), 2, axis=-1)
    real, imaginary = jnp.split(first[:, :, :, :-1] + second[:, :, :, 1:], 2, axis=-1)
    magnitude = jnp.sqrt(jnp.square(real) + jnp.square(imaginary) + _TINY_POWER)
    inside = weight[:, : halves * hop].reshape(batch, halves, hop).min(axis=2)
    inside = inside[:, :-1] * inside[:, 1:]
    total = inside.sum(axis=1, keepdims=True)
    inside = jnp.where(total > 0, inside / jnp.maximum(total, 1.0), 1.0 / (halves - 1))
    magnitude = _einsum("nrkwf,nw->nrkf", magnitude, inside)
    bins = bin_matrix(scale_edges, width), bin_matrix(rate_edges, hop + 1)
    return jnp.log(_einsum("nrkf,ks,fq->nrsq", magnitude, *bins) + _FLOOR)


def loudness_views(
    x: jax.Array, weight: jax.Array, floors: Sequence[float], contrasts: Sequence[float]
) -> list[jax.Array]:
    """Returns `x` relative to its maximum, and other views, float32 `[batch, frames, bands]` each.

    In dB, quiet parts vary as much as loud ones. A floor removes quiet parts: it adds noise power,
    so many dB below the maximum of a clip. A contrast keeps whether a band is louder or softer than
    on average, its mean by `weight` `[batch, frames]`, and compresses by how much to a range in dB.
    """
    x = x.astype(jnp.float32)
    x -= x.max(axis=(1, 2), keepdims=True)
    level = x - weighted_mean(x, weight)
    nepers = math.log(10.0) / 10.0
    return [
        x,
        *(jnp.log(jnp.exp(nepers * x) + math.exp(-nepers * floor)) / nepers for floor in floors),
        *(contrast * jnp.tanh(level / contrast) for contrast in contrasts),
    ]


def band_correlations(x: jax.Array, weight: jax.Array, groups: int) -> jax.Array:
    """Returns correlations of the levels of groups of bands, `[batch, groups * (groups - 1) / 2]`.

    `x` is dB, float32 `[batch, frames, bands]`, and `weight` that of each frame, float32
    `[batch, frames]`. Neighbouring bands are averaged; remaining ones at the top are not used.
    """
    batch, frames, bands = x.shape
    width = bands // groups
    level = x[:, :, : groups * width].reshape(batch, frames, groups, width).mean(axis=3)
    level -= weighted_mean(level, weight)
    level /= jnp.sqrt(weighted_mean(jnp.square(level), weight) + _CORRELATION_FLOOR)
    fraction = weight / weight.sum(axis=1, keepdims=True)
    matrix = _einsum("nti,ntj,nt->nij", level, level, fraction)
    rows, columns = np.triu_indices(groups, 1)
    return matrix[:, rows, columns]


@register("modulation")
class Modulation(Network):
    """Normalised modulation features of the input, hidden layers, and a head.

    For 128 bands the defaults make 1,709 features; with 10 classes there are 440,330 parameters.
    The front end takes dB (or a similar logarithmic unit), so `data.normalise` should be "none";
    the level of the input does not matter. It is computed in float32 for any `dtype`. Each floor
    and each contrast adds as many features again.

    Attributes:
      regions: number of blocks of bands of each modulation spectrum.
      windows: frames, even, of each modulation spectrum's windows, which overlap by half.
      scale_edges: first index of each bin over frequency, in half cycles per block.
      rate_edges: first index of each bin over time, in cycles per window.
      groups: groups of bands whose correlations are features; 0 leaves them out.
      cepstra: cepstral coefficients whose movement is a feature; 0 leaves them out.
      floors: dB below the maximum; each adds a view of the input with its quiet parts filled.
      contrasts: dB; each adds a view relative to the mean of the bands, compressed to this range.
      momentum: of the running mean and variance of the features.
      hidden: units of the hidden layers.
      input_dropout: rate of the features.
      dropout: rate after each hidden layer.
    """

    regions: tuple[int, ...] = (4, 4, 1)
    windows: tuple[int, ...] = (64, 32, 32)
    scale_edges: tuple[int, ...] = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
    rate_edges: tuple[int, ...] = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    groups: int = 32
    cepstra: int = 40
    floors: tuple[float, ...] = ()
    contrasts: tuple[float, ...] = ()
    momentum: float = 0.99
    hidden: tuple[int, ...] = (256,)
    input_dropout: float = 0.2
    dropout: float = 0.6

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """One of the longest windows, and a band for each block and group."""
        check_lengths("modulation", fields, "regions", "windows")
        check = functools.partial(check_field, "modulation", fields)
        for name in ("scale_edges", "rate_edges"):
            rising = all(a < b for a, b in itertools.pairwise(fields[name]))
            check(name, fields[name][:1] == (0,) and rising, "rise from 0")
        even = all(window >= 2 and window % 2 == 0 for window in fields["windows"])
        check("windows", even, "be even numbers from 2 on")
        check("regions", min(fields["regions"]) >= 1, "be at least 1")
        for name in ("floors", "contrasts"):
            check(name, all(value > 0 for value in fields[name]), "be above 0 (dB)")
        return InputLimits(
            min_frames=max(fields["windows"]),
            min_bands=max(*fields["regions"], fields["groups"]),
            kinds=("logmel", "stft", "mfcc"),
        )

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        with jax.named_scope("modulation_features"):
            if not isinstance(x.shape[0], int) or x.shape[0] <= _CPU_CLIPS:
                blocks = self.features(x)
            else:
                some = functools.partial(jax.lax.map, self._of_one, batch_size=_CPU_CLIPS)
                blocks = jax.lax.platform_dependent(x, cpu=some, default=self.features)
        counts = [block.shape[1] for block in blocks]
        # Each type of feature has the same total variance, whatever its number of features.
        weights = [math.sqrt(sum(counts) / (len(counts) * count)) for count in counts]
        weight = np.repeat(np.asarray(weights, np.float32), counts)
        options = {"momentum": self.momentum, "use_scale": False, "use_bias": False}
        norm = batch_norm(train, jnp.float32, "feature_norm", **options)
        x = (norm(jnp.concatenate(blocks, axis=1)) * weight).astype(self.dtype)
        x = nn.Dropout(self.input_dropout, deterministic=not train)(x)
        x = self.dense_layers(x, train, self.hidden, nn.initializers.he_normal())
        # Small at first, so that training begins from equal probabilities.
        return self.logits(x, nn.initializers.variance_scaling(0.01, "fan_in", "normal"))

    @nn.nowrap
    def features(self, x: jax.Array) -> list[jax.Array]:
        """Returns types of features, float32 `[batch, n]` each, of `x` `[batch, frames, bands]`.

        For each view (`loudness_views`) they are the mean of each band, the log standard deviation
        of its frame-to-frame differences, the modulation spectra, the correlations of groups of
        bands, and the standard deviation of the differences of the first cepstral coefficients. A
        clip's level and silence around it have no effect.
        """
        weight = sounding(x)
        of_difference = weight[:, 1:] * weight[:, :-1]
        edges = self.scale_edges, self.rate_edges
        features = []
        for view in loudness_views(x, weight, self.floors, self.contrasts):
            difference = view[:, 1:] - view[:, :-1]
            features.append(weighted_mean(view, weight)[:, 0])
            features.append(jnp.log(standard_deviation(difference, of_difference) + _FLOOR))
            for sizes in zip(self.regions, self.windows, strict=True):
                spectrum = modulation_spectrum(view, weight, *sizes, *edges)
                features.append(spectrum.reshape(view.shape[0], -1))
            if self.groups:
                features.append(band_correlations(view, weight, self.groups))
            if self.cepstra:
                matrix = cosine_matrix(view.shape[2])[:, : self.cepstra]
                cepstra = _einsum("ntb,bk->ntk", difference, matrix)
                features.append(standard_deviation(cepstra, of_difference))
        return features

    @nn.nowrap
    def _of_one(self, clip: jax.Array) -> list[jax.Array]:
        return [block[0] for block in self.features(clip[None])]
