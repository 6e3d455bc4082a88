"""A small network on how a spectrogram moves: local 2-D modulation spectra, onsets and which bands move together.

The front has no parameters. It cuts a log-mel spectrogram into blocks of neighbouring bands and windows of frames, takes the
2-D spectrum of each block (how fine the pattern is over frequency, its scale; how fast it repeats, its rate) and averages the
magnitudes over time. Few clips suffice for what is left to learn: one hidden layer.

The idea is that of spectro-temporal modulation filters (T. Chi, P. Ru, S. Shamma, "Multiresolution spectrotemporal analysis of
complex sounds", JASA 2005), of the joint time-frequency scattering transform (J. Andén, S. Mallat, "Deep scattering spectrum",
IEEE TSP 2014, and their later work with V. Lostanlen), and of auditory modulations for genres (Y. Panagakis, C. Kotropoulos,
G. Arce, "Music genre classification via sparse representations of auditory temporal modulations", EUSIPCO 2009). The papers
are cited from memory; the blocks, the bins and the other features are this project's own.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft

from musicgenre.errors import UserError
from musicgenre.models.layers import check_lengths
from musicgenre.models.registry import InputLimits, register

# Added where a magnitude, a variance or a logarithm would be taken of 0, in the input's unit (dB): below what can be heard.
_TINY_POWER = 1e-6
_FLOOR = 0.1
_CORRELATION_FLOOR = 0.05
# Clips that a CPU takes at once: what lies between two operations on them stays in its cache, 3.5 times as fast as 64.
_CPU_CLIPS = 4


def bin_matrix(edges: Sequence[int], size: int) -> np.ndarray:
    """Returns the matrix that averages neighbours, float32 `[size, bins]`.

    Args:
      edges: the first index of each bin, rising from 0; the last bin ends at `size`, and what begins beyond it is left out.
      size: what there is to average.
    """
    starts = [edge for edge in edges if edge < size]
    matrix = np.zeros((size, len(starts)), np.float32)
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], size], strict=True)):
        matrix[start:end, number] = 1.0 / (end - start)
    return matrix


def cosine_matrix(size: int) -> np.ndarray:
    """Returns the orthonormal DCT-II as a matrix, float32 `[size, size]`: `x @ matrix` transforms the last axis of `x`."""
    return np.asarray(scipy.fft.dct(np.eye(size), norm="ortho", axis=1), np.float32)


def fourier_matrix(window: int) -> np.ndarray:
    """Returns a windowed real Fourier transform (periodic Hann), float32 `[window, 2 * (window // 2 + 1)]`: cosines, sines."""
    time = np.arange(window)
    angle = 2.0 * np.pi * np.outer(time, np.arange(window // 2 + 1)) / window
    hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * time / window)
    return np.asarray(hann[:, None] * np.concatenate([np.cos(angle), np.sin(angle)], axis=1), np.float32)


def modulation_spectrum(
    x: jax.Array, regions: int, window: int, scale_edges: Sequence[int], rate_edges: Sequence[int]
) -> jax.Array:
    """Returns the log mean magnitude of local 2-D spectra, float32 `[batch, regions, scales, rates]`.

    The bands are cut into `regions` blocks that do not overlap (bands left over at the top are not used), the frames into
    windows that overlap by half (frames left over at the end are not used). Over bands a DCT is taken, over frames a Fourier
    transform under a Hann window. Magnitudes are averaged over windows and within bins.

    Args:
      x: dB, float32 `[batch, frames, bands]`, at least `window` frames and `regions` bands.
      regions: blocks of bands.
      window: frames, even.
      scale_edges: first DCT index of each bin; half as many cycles fit into a block.
      rate_edges: first Fourier index of each bin: cycles a window.
    """
    batch, frames, bands = x.shape
    width, hop = bands // regions, window // 2
    halves = frames // hop
    blocks = x[:, : halves * hop, : regions * width].reshape(batch, halves, hop, regions, width)
    blocks = jnp.einsum("nhtrb,bk->nrkht", blocks, cosine_matrix(width), precision=jax.lax.Precision.HIGHEST)
    # Each half of a window is transformed once, as a first and as a second half, in one matrix product.
    fourier = fourier_matrix(window)
    fourier = np.concatenate([fourier[:hop], fourier[hop:]], axis=1)
    parts = jnp.einsum("nrkht,tf->nrkhf", blocks, fourier, precision=jax.lax.Precision.HIGHEST)
    first, second = jnp.split(parts, 2, axis=-1)
    real, imaginary = jnp.split(first[:, :, :, :-1] + second[:, :, :, 1:], 2, axis=-1)
    magnitude = jnp.sqrt(jnp.square(real) + jnp.square(imaginary) + _TINY_POWER).mean(axis=3)
    pooled = jnp.einsum(
        "nrkf,ks,fq->nrsq",
        magnitude,
        bin_matrix(scale_edges, width),
        bin_matrix(rate_edges, hop + 1),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.log(pooled + _FLOOR)


def deviation(x: jax.Array) -> jax.Array:
    """Returns the standard deviation over frames, `[batch, frames, n]` to `[batch, n]`, with a gradient where it is 0."""
    return jnp.sqrt(jnp.square(x - x.mean(axis=1, keepdims=True)).mean(axis=1) + _TINY_POWER)


def band_correlations(x: jax.Array, groups: int) -> jax.Array:
    """Returns how the levels of groups of bands move together, float32 `[batch, groups * (groups - 1) / 2]`.

    Args:
      x: dB, float32 `[batch, frames, bands]`, at least `groups` bands; those left over at the top are not used.
      groups: groups of neighbouring bands, which are averaged.
    """
    batch, frames, bands = x.shape
    width = bands // groups
    level = x[:, :, : groups * width].reshape(batch, frames, groups, width).mean(axis=3)
    level -= level.mean(axis=1, keepdims=True)
    level /= jnp.sqrt(jnp.square(level).mean(axis=1, keepdims=True) + _CORRELATION_FLOOR)
    matrix = jnp.einsum("nti,ntj->nij", level, level, precision=jax.lax.Precision.HIGHEST) / frames
    rows, columns = np.triu_indices(groups, 1)
    return matrix[:, rows, columns]


def modulation_features(
    x: jax.Array,
    *,
    regions: Sequence[int],
    windows: Sequence[int],
    scale_edges: Sequence[int],
    rate_edges: Sequence[int],
    groups: int,
    cepstra: int,
) -> list[jax.Array]:
    """Returns the blocks of features of a clip, float32 `[batch, n]` each; none changes with the level of the clip.

    They are the mean of each band, the log deviation of its frame-to-frame differences, the modulation spectra, the
    correlations of groups of bands, and the deviation of the differences of the first cepstral coefficients.

    Args:
      x: dB, `[batch, frames, bands]`.
      regions: blocks of bands of each modulation spectrum.
      windows: its frames.
      scale_edges: see `modulation_spectrum`.
      rate_edges: see `modulation_spectrum`.
      groups: groups of bands that are correlated; 0 leaves them out.
      cepstra: cepstral coefficients, at most as many as bands; 0 leaves them out.
    """
    x = x.astype(jnp.float32)
    x -= x.max(axis=(1, 2), keepdims=True)
    difference = x[:, 1:] - x[:, :-1]
    features = [x.mean(axis=1), jnp.log(deviation(difference) + _FLOOR)]
    for count, window in zip(regions, windows, strict=True):
        spectrum = modulation_spectrum(x, count, window, scale_edges, rate_edges)
        features.append(spectrum.reshape(x.shape[0], -1))
    if groups:
        features.append(band_correlations(x, groups))
    if cepstra:
        matrix = cosine_matrix(x.shape[2])[:, :cepstra]
        features.append(deviation(jnp.einsum("ntb,bk->ntk", difference, matrix, precision=jax.lax.Precision.HIGHEST)))
    return features


@register("modulation")
class Modulation(nn.Module):
    """Modulation features of the whole input, each normalised, a hidden layer or more, and a head.

    For 128 bands the defaults make 1,709 features; with 10 classes there are 440,330 parameters. The front takes dB (or any
    logarithmic unit near it), so `data.normalise` should be "none"; the level of the input as a whole does not matter. It is
    computed in float32 whatever `dtype`. Frames may be of any number from the longest window on.

    Attributes:
      num_classes: outputs.
      regions: for each modulation spectrum, into how many blocks the bands are cut.
      windows: its frames, even; consecutive windows overlap by half.
      scale_edges: the first index of each bin over frequency; index i is i / 2 cycles a block.
      rate_edges: the first index of each bin over time, in cycles a window.
      groups: groups of bands whose correlations are features; 0 leaves them out.
      cepstra: cepstral coefficients whose movement is a feature; 0 leaves them out.
      momentum: of the running mean and variance of the features.
      hidden: units of the hidden layers.
      input_dropout: rate of the features.
      dropout: rate after each hidden layer.
      dtype: compute type of the layers after the front.
      axis_name: device axis for the normalisation under pmap.
    """

    num_classes: int
    regions: tuple[int, ...] = (4, 4, 1)
    windows: tuple[int, ...] = (64, 32, 32)
    scale_edges: tuple[int, ...] = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
    rate_edges: tuple[int, ...] = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    groups: int = 32
    cepstra: int = 40
    momentum: float = 0.99
    hidden: tuple[int, ...] = (256,)
    input_dropout: float = 0.2
    dropout: float = 0.6
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """One window of the longest kind, and a band for each block and group.

        Raises:
          UserError: the fields do not fit together.
        """
        check_lengths("modulation", fields, "regions", "windows")
        for name in ("scale_edges", "rate_edges"):
            edges = fields[name]
            if not edges or edges[0] != 0 or any(a >= b for a, b in itertools.pairwise(edges)):
                raise UserError(f"model.{name}={tuple(edges)} of 'modulation' must rise from 0.")
        if any(window < 2 or window % 2 for window in fields["windows"]):
            raise UserError(f"model.windows={tuple(fields['windows'])} of 'modulation' must be even numbers from 2 on.")
        if min(fields["regions"]) < 1:
            raise UserError(f"model.regions={tuple(fields['regions'])} of 'modulation' must be at least 1.")
        return InputLimits(
            min_frames=max(fields["windows"]),
            min_bands=max(*fields["regions"], fields["groups"]),
            kinds=("logmel", "stft", "mfcc"),
        )

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""

        def front(x: jax.Array) -> list[jax.Array]:
            return modulation_features(
                x,
                regions=self.regions,
                windows=self.windows,
                scale_edges=self.scale_edges,
                rate_edges=self.rate_edges,
                groups=self.groups,
                cepstra=self.cepstra,
            )

        def in_parts(x: jax.Array) -> list[jax.Array]:
            return jax.lax.map(lambda clip: [block[0] for block in front(clip[None])], x, batch_size=_CPU_CLIPS)

        with jax.named_scope("modulation_features"):
            blocks = (
                front(x)
                if not isinstance(x.shape[0], int) or x.shape[0] <= _CPU_CLIPS
                else jax.lax.platform_dependent(x, cpu=in_parts, default=front)
            )
        size = sum(block.shape[1] for block in blocks)
        # Each kind of feature has the same variance in all, whatever the number of its features.
        weight = np.concatenate(
            [np.full(block.shape[1], math.sqrt(size / (len(blocks) * block.shape[1])), np.float32) for block in blocks]
        )
        normal = nn.BatchNorm(
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=1e-5,
            use_scale=False,
            use_bias=False,
            axis_name=self.axis_name,
            dtype=jnp.float32,
            name="feature_norm",
        )
        x = (normal(jnp.concatenate(blocks, axis=1)) * weight).astype(self.dtype)
        x = nn.Dropout(self.input_dropout, deterministic=not train)(x)
        for i, units in enumerate(self.hidden, start=1):
            x = nn.relu(nn.Dense(units, kernel_init=nn.initializers.he_normal(), dtype=self.dtype, name=f"dense{i}")(x))
            if i == len(self.hidden):
                self.sow("intermediates", "embedding", x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        if not self.hidden:
            self.sow("intermediates", "embedding", x)
        # Small at first, so that training begins from equal probabilities.
        small = nn.initializers.variance_scaling(0.01, "fan_in", "normal")
        return nn.Dense(self.num_classes, kernel_init=small, dtype=self.dtype, name="head")(x).astype(jnp.float32)
