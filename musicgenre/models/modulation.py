"""A small network on how a spectrogram moves: local 2-D modulation spectra, onsets and which bands move together.

The front has no parameters. It cuts a log-mel spectrogram into blocks of neighbouring bands and windows of frames, takes the
2-D spectrum of each block (how fine the pattern is over frequency, its scale; how fast it repeats, its rate) and averages the
magnitudes over time. It can do so for several views of one spectrogram that differ in how loudness counts. Few clips suffice
for what is left to learn: one hidden layer.

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
# A frame is silent whose loudest band is so many dB under the clip's maximum; the front end's floor lies at 80.
_SILENCE = 75.0
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
    return np.asarray(
        hann[:, None] * np.concatenate([np.cos(angle), np.sin(angle)], axis=1), np.float32
    )


def sounding(x: jax.Array) -> jax.Array:
    """Returns 1 for the frames from the first that is not silent to the last, and 0 for those around, float32 `[batch, frames]`.

    What is silent between them counts: a rest is music, the wait before a song and the padding after it are not.

    Args:
      x: dB, `[batch, frames, bands]`.
    """
    loudest = x.max(axis=2)
    heard = loudest > loudest.max(axis=1, keepdims=True) - _SILENCE
    frame = jnp.arange(x.shape[1], dtype=jnp.float32)
    first = jnp.where(heard, frame, jnp.inf).min(axis=1, keepdims=True)
    last = jnp.where(heard, frame, -jnp.inf).max(axis=1, keepdims=True)
    return ((frame >= first) & (frame <= last)).astype(jnp.float32)


def weighted_mean(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns the mean over frames, float32 `[batch, 1, n]`, of `x` `[batch, frames, n]` by `weight` `[batch, frames]`.

    Where all weights are 0 it is 0.
    """
    total = jnp.maximum(weight.sum(axis=1), _TINY_POWER)
    return (x * weight[:, :, None]).sum(axis=1, keepdims=True) / total[:, None, None]


def modulation_spectrum(
    x: jax.Array,
    weight: jax.Array,
    regions: int,
    window: int,
    scale_edges: Sequence[int],
    rate_edges: Sequence[int],
) -> jax.Array:
    """Returns the log mean magnitude of local 2-D spectra, float32 `[batch, regions, scales, rates]`.

    The bands are cut into `regions` blocks that do not overlap (bands left over at the top are not used), the frames into
    windows that overlap by half (frames left over at the end are not used). Over bands a DCT is taken, over frames a Fourier
    transform under a Hann window. Magnitudes are averaged over windows and within bins. Windows that reach into frames of weight
    0 are left out, unless all do.

    Args:
      x: dB, float32 `[batch, frames, bands]`, at least `window` frames and `regions` bands.
      weight: 0 or 1 for each frame, float32 `[batch, frames]`.
      regions: blocks of bands.
      window: frames, even.
      scale_edges: first DCT index of each bin; half as many cycles fit into a block.
      rate_edges: first Fourier index of each bin: cycles a window.
    """
    batch, frames, bands = x.shape
    width, hop = bands // regions, window // 2
    halves = frames // hop
    blocks = x[:, : halves * hop, : regions * width].reshape(batch, halves, hop, regions, width)
    blocks = jnp.einsum(
        "nhtrb,bk->nrkht", blocks, cosine_matrix(width), precision=jax.lax.Precision.HIGHEST
    )
    # Each half of a window is transformed once, as a first and as a second half, in one matrix product.
    fourier = fourier_matrix(window)
    fourier = np.concatenate([fourier[:hop], fourier[hop:]], axis=1)
    parts = jnp.einsum("nrkht,tf->nrkhf", blocks, fourier, precision=jax.lax.Precision.HIGHEST)
    first, second = jnp.split(parts, 2, axis=-1)
    real, imaginary = jnp.split(first[:, :, :, :-1] + second[:, :, :, 1:], 2, axis=-1)
    magnitude = jnp.sqrt(jnp.square(real) + jnp.square(imaginary) + _TINY_POWER)
    inside = weight[:, : halves * hop].reshape(batch, halves, hop).min(axis=2)
    inside = inside[:, :-1] * inside[:, 1:]
    total = inside.sum(axis=1, keepdims=True)
    inside = jnp.where(total > 0, inside / jnp.maximum(total, 1.0), 1.0 / (halves - 1))
    magnitude = jnp.einsum("nrkwf,nw->nrkf", magnitude, inside, precision=jax.lax.Precision.HIGHEST)
    pooled = jnp.einsum(
        "nrkf,ks,fq->nrsq",
        magnitude,
        bin_matrix(scale_edges, width),
        bin_matrix(rate_edges, hop + 1),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.log(pooled + _FLOOR)


def loudness_views(
    x: jax.Array, weight: jax.Array, floors: Sequence[float], contrasts: Sequence[float]
) -> list[jax.Array]:
    """Returns `x` under a maximum of 0 dB, and other views of it, float32 `[batch, frames, bands]` each.

    In dB what is hardly heard moves as much as what is loud. A floor takes the quiet out; a contrast keeps whether a band is
    louder or softer than it is on average, and forgets by how much and how loud the bands are.

    Args:
      x: dB, `[batch, frames, bands]`.
      weight: of each frame in the mean, float32 `[batch, frames]`.
      floors: dB below the maximum of a clip; a view has the power of a noise of this level added to every value.
      contrasts: dB; a view has the difference of each value from its band's mean over frames, bent to lie within this.
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


def deviation(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns the standard deviation over frames, `[batch, frames, n]` to `[batch, n]`, with a gradient where it is 0.

    Args:
      x: float32 `[batch, frames, n]`.
      weight: of each frame, float32 `[batch, frames]`.
    """
    variance = weighted_mean(jnp.square(x - weighted_mean(x, weight)), weight)
    return jnp.sqrt(variance[:, 0] + _TINY_POWER)


def band_correlations(x: jax.Array, weight: jax.Array, groups: int) -> jax.Array:
    """Returns how the levels of groups of bands move together, float32 `[batch, groups * (groups - 1) / 2]`.

    Args:
      x: dB, float32 `[batch, frames, bands]`, at least `groups` bands; those left over at the top are not used.
      weight: of each frame, float32 `[batch, frames]`.
      groups: groups of neighbouring bands, which are averaged.
    """
    batch, frames, bands = x.shape
    width = bands // groups
    level = x[:, :, : groups * width].reshape(batch, frames, groups, width).mean(axis=3)
    level -= weighted_mean(level, weight)
    level /= jnp.sqrt(weighted_mean(jnp.square(level), weight) + _CORRELATION_FLOOR)
    share = weight / weight.sum(axis=1, keepdims=True)
    matrix = jnp.einsum("nti,ntj,nt->nij", level, level, share, precision=jax.lax.Precision.HIGHEST)
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
    floors: Sequence[float] = (),
    contrasts: Sequence[float] = (),
) -> list[jax.Array]:
    """Returns the blocks of features of a clip, float32 `[batch, n]` each; none changes with its level or with silence around it.

    They are, for each view (`loudness_views`), the mean of each band, the log deviation of its frame-to-frame differences, the
    modulation spectra, the correlations of groups of bands, and the deviation of the differences of the first cepstral
    coefficients.

    Args:
      x: dB, `[batch, frames, bands]`.
      regions: blocks of bands of each modulation spectrum.
      windows: its frames.
      scale_edges: see `modulation_spectrum`.
      rate_edges: see `modulation_spectrum`.
      groups: groups of bands that are correlated; 0 leaves them out.
      cepstra: cepstral coefficients, at most as many as bands; 0 leaves them out.
      floors: see `loudness_views`.
      contrasts: see `loudness_views`.
    """
    weight = sounding(x)
    of_difference = weight[:, 1:] * weight[:, :-1]
    features = []
    for view in loudness_views(x, weight, floors, contrasts):
        difference = view[:, 1:] - view[:, :-1]
        features += [
            weighted_mean(view, weight)[:, 0],
            jnp.log(deviation(difference, of_difference) + _FLOOR),
        ]
        for count, window in zip(regions, windows, strict=True):
            spectrum = modulation_spectrum(view, weight, count, window, scale_edges, rate_edges)
            features.append(spectrum.reshape(view.shape[0], -1))
        if groups:
            features.append(band_correlations(view, weight, groups))
        if cepstra:
            matrix = cosine_matrix(view.shape[2])[:, :cepstra]
            cepstral = jnp.einsum(
                "ntb,bk->ntk", difference, matrix, precision=jax.lax.Precision.HIGHEST
            )
            features.append(deviation(cepstral, of_difference))
    return features


@register("modulation")
class Modulation(nn.Module):
    """Modulation features of the whole input, each normalised, a hidden layer or more, and a head.

    For 128 bands the defaults make 1,709 features; with 10 classes there are 440,330 parameters. The front takes dB (or any
    logarithmic unit near it), so `data.normalise` should be "none"; the level of the input as a whole does not matter. It is
    computed in float32 whatever `dtype`. Frames may be of any number from the longest window on. Each floor and each contrast
    adds as many features again; these two count in dB.

    Attributes:
      num_classes: outputs.
      regions: for each modulation spectrum, into how many blocks the bands are cut.
      windows: its frames, even; consecutive windows overlap by half.
      scale_edges: the first index of each bin over frequency; index i is i / 2 cycles a block.
      rate_edges: the first index of each bin over time, in cycles a window.
      groups: groups of bands whose correlations are features; 0 leaves them out.
      cepstra: cepstral coefficients whose movement is a feature; 0 leaves them out.
      floors: for each, a further view of the input whose quiet parts are filled up, so many dB below its maximum.
      contrasts: for each, a further view of the input relative to the mean of its bands, bent to lie within so many dB.
      momentum: of the running mean and variance of the features.
      hidden: units of the hidden layers.
      input_dropout: rate of the features.
      dropout: rate after each hidden layer.
      dtype: compute type of the layers after the front.
    """

    num_classes: int
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
    dtype: Any = jnp.float32

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
            raise UserError(
                f"model.windows={tuple(fields['windows'])} of 'modulation' must be even numbers from 2 on."
            )
        if min(fields["regions"]) < 1:
            raise UserError(
                f"model.regions={tuple(fields['regions'])} of 'modulation' must be at least 1."
            )
        for name in ("floors", "contrasts"):
            if any(value <= 0 for value in fields[name]):
                raise UserError(
                    f"model.{name}={tuple(fields[name])} of 'modulation' must be above 0 (dB)."
                )
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
                floors=self.floors,
                contrasts=self.contrasts,
            )

        def in_parts(x: jax.Array) -> list[jax.Array]:
            return jax.lax.map(
                lambda clip: [block[0] for block in front(clip[None])], x, batch_size=_CPU_CLIPS
            )

        with jax.named_scope("modulation_features"):
            blocks = (
                front(x)
                if not isinstance(x.shape[0], int) or x.shape[0] <= _CPU_CLIPS
                else jax.lax.platform_dependent(x, cpu=in_parts, default=front)
            )
        size = sum(block.shape[1] for block in blocks)
        # Each kind of feature has the same variance in all, whatever the number of its features.
        weight = np.concatenate(
            [
                np.full(
                    block.shape[1], math.sqrt(size / (len(blocks) * block.shape[1])), np.float32
                )
                for block in blocks
            ]
        )
        normal = nn.BatchNorm(
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=1e-5,
            use_scale=False,
            use_bias=False,
            dtype=jnp.float32,
            name="feature_norm",
        )
        x = (normal(jnp.concatenate(blocks, axis=1)) * weight).astype(self.dtype)
        x = nn.Dropout(self.input_dropout, deterministic=not train)(x)
        for i, units in enumerate(self.hidden, start=1):
            x = nn.relu(
                nn.Dense(
                    units,
                    kernel_init=nn.initializers.he_normal(),
                    dtype=self.dtype,
                    name=f"dense{i}",
                )(x)
            )
            if i == len(self.hidden):
                self.sow("intermediates", "embedding", x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        if not self.hidden:
            self.sow("intermediates", "embedding", x)
        # Small at first, so that training begins from equal probabilities.
        small = nn.initializers.variance_scaling(0.01, "fan_in", "normal")
        return nn.Dense(self.num_classes, kernel_init=small, dtype=self.dtype, name="head")(
            x
        ).astype(jnp.float32)
