"""Augmentation on the device, as pure functions of a batch.

It runs inside the jitted step on stored log-mels in dB, before normalisation. The order is

    clips of the store -> window -> time stretch -> time shuffle -> pitch shift -> gain -> equaliser
    -> noise -> low pass and high pass -> mixup or cutmix -> masks -> normalisation -> network

Each clip has its own key, `fold_in` of the step's key and its row in the global batch. The result
therefore depends neither on the number of devices nor on gradient accumulation.
"""

import dataclasses
import enum
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from ml_collections import ConfigDict

from musicgenre.config import sections

# Keeps the augmentation's keys apart from those of dropout and of a batch's parts.
AUGMENT_KEY = 0xA116
# Slope of a band limit, dB per band, uniform on a logarithmic scale. Of 128 mel bands up to 11 kHz,
# a Butterworth filter of 48 dB per octave falls by 2 to 4 above 4 kHz, and by 10 below 300 Hz.
_LEAST_SLOPE, _GREATEST_SLOPE = 1.5, 12.0
# Points in the table of a beta distribution's quantiles.
_QUANTILES = 4096


class _Draw(enum.IntEnum):
    """Folded into a clip's key for each draw, so that switching one on leaves the others alone."""

    STRETCH, SHUFFLE, PITCH, GAIN, EQ, NOISE, NOISE_CELLS, MIX = range(8)
    TIME_MASK, BAND_MASK, LOW_PASS, HIGH_PASS = range(8, 12)
    CHANCE = 100  # plus the draw that the chance decides on


def window_frames(frames: int, available: int, time_stretch: float) -> int:
    """Returns how many of a clip's `available` frames a step reads to make `frames` of them."""
    if not time_stretch:
        return frames
    # The fastest clip spans this many; two more for interpolation and rounding of the rate.
    return min(available, math.ceil((1.0 + time_stretch) * (frames - 1)) + 2)


def gather_windows(clips: jax.Array, clip: jax.Array, start: jax.Array, frames: int) -> jax.Array:
    """Returns windows `[batch, frames, bands]` of resident clips `[clips, frames, bands]`.

    `clip` and `start`, int32 `[batch]`, are each window's clip and first frame.
    """
    if frames == clips.shape[1]:
        return clips[clip]
    return clips[clip[:, None], start[:, None] + jnp.arange(frames)]


def time_stretch(
    x: jax.Array, rate: jax.Array, first: jax.Array, length: jax.Array, frames: int
) -> jax.Array:
    """Resamples frames of `x` `[batch, window, bands]` by linear interpolation to `frames` of them.

    A `rate`, float32 `[batch]`, of 1.1 is 1.1 times as fast, at the same pitch. `first`, int32
    `[batch]`, is the first frame to use, and `length` counts the window's usable frames. A clip
    that would pass its end starts earlier; one too short for its rate continues with its mirror
    image.
    """
    # Integers and fractions stay apart, so the result does not depend on the window's position.
    steps = rate[:, None] * jnp.arange(frames, dtype=jnp.float32)
    whole = jnp.floor(steps)
    fraction = (steps - whole)[:, :, None]
    last = jnp.ceil(steps[:, -1]).astype(jnp.int32)
    first = jnp.minimum(first, jnp.maximum(length - 1 - last, 0))
    lower = first[:, None] + whole.astype(jnp.int32)

    def at(index: jax.Array) -> jax.Array:
        period = jnp.maximum(2 * (length - 1), 1)[:, None]
        index = index % period
        return jnp.take_along_axis(x, jnp.minimum(index, period - index)[:, :, None], axis=1)

    return at(lower) * (1.0 - fraction) + at(lower + 1) * fraction


def time_shuffle(x: jax.Array, order: jax.Array) -> jax.Array:
    """Divides clips `[batch, frames, bands]` into equal parts and puts them into a new order.

    `order`, int `[batch, parts]`, lists the parts.
    """
    frames, parts = x.shape[1], order.shape[1]
    bounds = np.round(np.linspace(0, frames, parts + 1))
    part = np.searchsorted(bounds, np.arange(frames), side="right") - 1
    source = jnp.argsort(jnp.argsort(order, axis=1)[:, part], axis=1, stable=True)
    return jnp.take_along_axis(x, source[:, :, None], axis=1)


def pitch_shift(x: jax.Array, shift: jax.Array) -> jax.Array:
    """Moves clips `[batch, frames, bands]` up by `shift` bands `[batch]`, by linear interpolation.

    Edge bands are repeated. Below 1 kHz, where mel bands are not equally wide in octaves, this only
    approximates a transposition.
    """
    bands = x.shape[2]
    source = jnp.clip(jnp.arange(bands, dtype=jnp.float32) - shift[:, None], 0.0, bands - 1.0)
    # A small matrix product per clip is faster than gathering cells. It must not round to 16 bits.
    weights = jnp.maximum(1.0 - jnp.abs(source[:, None, :] - jnp.arange(bands)[None, :, None]), 0.0)
    return jnp.einsum("btf,bfg->btg", x, weights, precision=jax.lax.Precision.HIGHEST)


def equalise(x: jax.Array, knots: jax.Array) -> jax.Array:
    """Adds a piecewise linear curve over the bands through `knots`, dB `[batch, points]`."""
    position = np.linspace(0.0, knots.shape[1] - 1.0, x.shape[2], dtype=np.float32)
    lower = np.minimum(position.astype(np.int32), knots.shape[1] - 2)
    fraction = position - lower
    curve = knots[:, lower] * (1.0 - fraction) + knots[:, lower + 1] * fraction
    return x + curve[:, None, :]


def band_limit(
    x: jax.Array, lower: jax.Array, upper: jax.Array, slope: jax.Array, top_db: float
) -> jax.Array:
    """Attenuates the bands outside a range, as an old recording or a telephone does.

    Clips `x` are in dB, `[batch, frames, bands]`; `lower` and `upper`, float32 `[batch]`, are the
    edges of the range. Beyond them the level falls by `slope`, dB per band, float32 `[batch, 2]`,
    down to the front end's floor, `top_db` below the loudest cell of the clip.
    """
    band = jnp.arange(x.shape[2], dtype=jnp.float32)
    below = jnp.maximum(lower[:, None] - band, 0.0) * slope[:, :1]
    above = jnp.maximum(band - upper[:, None], 0.0) * slope[:, 1:]
    x = x - (below + above)[:, None, :]
    return jnp.maximum(x, x.max(axis=(1, 2), keepdims=True) - top_db)


def mask(x: jax.Array, first: jax.Array, width: jax.Array, fill: jax.Array, axis: int) -> jax.Array:
    """Replaces `width` frames (axis 1) or bands (axis 2) from `first` by `fill` (SpecAugment)."""
    index = jnp.arange(x.shape[axis]).reshape((1, -1, 1) if axis == 1 else (1, 1, -1))
    first, width = first[:, None, None], width[:, None, None]
    return jnp.where((index >= first) & (index < first + width), fill, x)


def cutmix(
    x: jax.Array, other: jax.Array, first: jax.Array, width: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Replaces `width` frames from `first`, both int `[batch]`, by the other clip's (Yun 2019).

    Returns the clips, and the fraction of each that is still its own, float32 `[batch]`.
    """
    return mask(x, first, width, other, axis=1), 1.0 - width.astype(jnp.float32) / x.shape[1]


def following(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns the next row of the global batch for each row; the first one for the last."""
    # Batches are shuffled, so the next clip is a random one, and devices exchange only a row.
    if axis_name is None:
        return jnp.roll(x, -1, axis=0)
    size = jax.lax.psum(1, axis_name)
    routes = [(device, (device - 1) % size) for device in range(size)]
    return jnp.concatenate([x[1:], jax.lax.ppermute(x[:1], axis_name, routes)])


def beta(uniform: jax.Array, alpha: float) -> jax.Array:
    """Maps uniform numbers to Beta(alpha, alpha) by its quantiles, without a loop on the device."""
    grid = np.linspace(0.0, 1.0, _QUANTILES + 1)
    quantiles = scipy.stats.beta.ppf(grid, alpha, alpha).astype(np.float32)
    return jnp.interp(uniform, grid.astype(np.float32), quantiles)


@dataclasses.dataclass(frozen=True)
class Augmentation(sections.Augment):
    """What a training step does to its batch: the config's section `augment`.

    Amounts are uniform: between 0 and the field, or between minus the field and the field where
    both directions exist; rates of the time stretch on a logarithmic scale. Where both mixup and
    cutmix are on, each has half of the mixed clips.

    Attributes:
      frames: frames of the network's input.
      clip_mean: masks are filled with the clip's own mean, else with the training split's.
      top_db: of the front end.
    """

    frames: int = dataclasses.field(kw_only=True)
    clip_mean: bool = False
    top_db: float = 80.0

    @classmethod
    def from_config(cls, config: ConfigDict, frames: int) -> "Augmentation | None":
        """Returns a config's augmentation of inputs of `frames` frames, or None if all is off."""
        fields, defaults = config.augment.to_dict(), vars(sections.Augment())
        # What is 0 by default is a switch.
        if not any(value for name, value in fields.items() if not defaults[name]):
            return None
        clip_mean, top_db = config.data.normalise == "none", config.features.top_db
        return cls(frames=frames, clip_mean=clip_mean, top_db=top_db, **fields)

    def __call__(self, batch: Any, key: jax.Array, norm: Any, axis_name: str | None = None) -> Any:
        """Augments a batch, under pmap one device's slice.

        It has `x` `[batch, window, bands]` (see `window_frames`) and `y`; for time stretch also
        int32 `[batch]` `offset`, the window's frame where the clip begins, and `length`, its usable
        frames. The `mean` of `norm` is broadcastable to `[frames, bands]`.

        In the result `x` is float32 `[batch, frames, bands]`. Where clips are mixed, `y_other` (as
        `y`) has the labels of each clip's partner and `mix`, float32 `[batch]`, its own fraction.
        """
        batch = dict(batch)
        x = batch["x"].astype(jnp.float32)
        rows = jnp.arange(x.shape[0])
        if axis_name is not None:
            rows += jax.lax.axis_index(axis_name) * x.shape[0]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, AUGMENT_KEY), rows)

        if self.time_stretch:
            rate = jnp.exp(self._amount(keys, _Draw.STRETCH) * math.log1p(self.time_stretch))
            x = time_stretch(x, rate, batch.pop("offset"), batch.pop("length"), self.frames)
        if self.time_shuffle:
            ranks = _uniform(keys, _Draw.SHUFFLE, self.time_shuffle)
            chosen = self._chosen(keys, _Draw.SHUFFLE)[:, None]
            ranks = jnp.where(chosen, ranks, jnp.arange(self.time_shuffle))
            x = time_shuffle(x, jnp.argsort(ranks, axis=1))
        if self.pitch_shift:
            x = pitch_shift(x, self._amount(keys, _Draw.PITCH) * self.pitch_shift)
        if self.gain:
            x = x + (self._amount(keys, _Draw.GAIN) * self.gain)[:, None, None]
        if self.eq:
            knots = 2.0 * _uniform(keys, _Draw.EQ, self.eq_points) - 1.0
            x = equalise(x, jnp.where(self._chosen(keys, _Draw.EQ)[:, None], knots, 0.0) * self.eq)
        if self.noise:
            std = jnp.where(self._chosen(keys, _Draw.NOISE), _uniform(keys, _Draw.NOISE), 0.0)
            cells = jax.vmap(
                lambda k: jax.random.normal(jax.random.fold_in(k, _Draw.NOISE_CELLS), x.shape[1:])
            )(keys)
            x = x + (std * self.noise)[:, None, None] * cells
        if self.low_pass or self.high_pass:
            x = self._limited(x, keys)
        if self.mixup or self.cutmix:
            x, batch["mix"] = self._mixed(x, following(x, axis_name), keys)
            batch["y_other"] = following(batch["y"], axis_name)
        if self.time_masks or self.band_masks:
            fill = x.mean(axis=(1, 2), keepdims=True) if self.clip_mean else norm["mean"]
            x = self._masked(x, keys, fill)
        return batch | {"x": x}

    def _chosen(self, keys: jax.Array, draw: _Draw) -> jax.Array:
        """Which clips undergo something, bool `[batch]`."""
        if self.probability >= 1.0:
            return jnp.ones(keys.shape[0], bool)
        return _uniform(keys, _Draw.CHANCE + draw) < self.probability

    def _amount(self, keys: jax.Array, draw: _Draw) -> jax.Array:
        """Numbers from -1 to 1, `[batch]`; 0 for the clips that are left alone."""
        return jnp.where(self._chosen(keys, draw), 2.0 * _uniform(keys, draw) - 1.0, 0.0)

    def _limited(self, x: jax.Array, keys: jax.Array) -> jax.Array:
        bands = x.shape[2]
        cuts, slopes, chosen = [], [], []
        for most, draw in ((self.high_pass, _Draw.HIGH_PASS), (self.low_pass, _Draw.LOW_PASS)):
            chosen.append((_uniform(keys, _Draw.CHANCE + draw) < self.pass_share) & (most > 0))
            cut, slope = jnp.moveaxis(_uniform(keys, draw, 2), 1, 0)
            cuts.append(jnp.where(chosen[-1], cut, 0.0) * most * bands)
            slopes.append(_LEAST_SLOPE * (_GREATEST_SLOPE / _LEAST_SLOPE) ** slope)
        slope = jnp.stack(slopes, axis=1)
        limited = band_limit(x, cuts[0], bands - 1 - cuts[1], slope, self.top_db)
        # Clips that are left alone do not get the floor either.
        return jnp.where((chosen[0] | chosen[1])[:, None, None], limited, x)

    def _mixed(
        self, x: jax.Array, other: jax.Array, keys: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        chance, amount, position = jnp.moveaxis(_uniform(keys, _Draw.MIX, 3), 1, 0)
        chosen = chance < self.mix_share
        cut = chance < 0.5 * self.mix_share if self.mixup else chosen
        result, mix = x, jnp.ones(x.shape[0])
        if self.mixup:  # Zhang et al. 2018
            mix = jnp.where(chosen, beta(amount, self.mixup), 1.0)
            if self.cutmix:
                mix = jnp.where(cut, 1.0, mix)
            result = mix[:, None, None] * x + (1.0 - mix[:, None, None]) * other
        if self.cutmix:
            width = jnp.round((1.0 - beta(amount, self.cutmix)) * self.frames)
            width = jnp.where(cut, width, 0.0).astype(jnp.int32)
            # A clip that is cut was not mixed above, and one that was mixed gets a cut of no width.
            result, own = cutmix(result, other, _first(position, width, self.frames), width)
            mix = mix * own
        return result, mix

    def _masked(self, x: jax.Array, keys: jax.Array, fill: jax.Array) -> jax.Array:
        for axis, count, widest, draw in (
            (1, self.time_masks, self.time_mask_share, _Draw.TIME_MASK),
            (2, self.band_masks, self.band_mask_share, _Draw.BAND_MASK),
        ):
            if not count:
                continue
            size, chosen = x.shape[axis], self._chosen(keys, draw)
            widths, positions = jnp.moveaxis(_uniform(keys, draw, (2, count)), (1, 2), (0, 1))
            for width, position in zip(widths, positions, strict=True):
                width = jnp.floor(width * (math.floor(widest * size) + 1))
                width = jnp.where(chosen, width, 0.0).astype(jnp.int32)
                x = mask(x, _first(position, width, size), width, fill, axis)
        return x


def _uniform(keys: jax.Array, draw: int, shape: int | tuple[int, ...] = ()) -> jax.Array:
    """Numbers from 0 to 1, `[batch, *shape]`, from the keys of the clips."""
    shape = (shape,) if isinstance(shape, int) else shape
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, draw), shape))(keys)


def _first(position: jax.Array, width: jax.Array, size: int) -> jax.Array:
    """The first of `width` cells of `size`, for a `position` from 0 to 1; int32 `[batch]`."""
    return jnp.floor(position * (size - width + 1)).astype(jnp.int32)
