"""Augmentation on the device: pure functions of a batch, and the order in which a training step applies them.

Everything here runs inside the jitted step, on stored features as they are: log-mels in dB, before normalisation. The order is

    clips of the store -> window (the crop) -> time stretch -> time shuffle -> pitch shift -> gain -> equaliser -> noise
    -> low pass and high pass -> mixup or cutmix -> masks -> normalisation -> network

Each clip draws for itself: its key is `fold_in` of the step's key and its row in the whole batch, so a clip is treated alike
on one device or eight, under jit or pmap, with or without gradient accumulation, and again after a resume.
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

# Set apart from the step's other keys: dropout's and those of a batch's parts.
AUGMENT_KEY = 0xA116
# How fast a band limit falls beyond its edge, dB a band; drawn evenly on a logarithmic scale. Of 128 mel bands up to 11 kHz,
# a Butterworth filter of 48 dB an octave falls by 2 to 4 from 4 kHz up, and by 10 from 300 Hz down.
_LEAST_SLOPE, _GREATEST_SLOPE = 1.5, 12.0
# Points of the table of a beta distribution's quantiles.
_QUANTILES = 4096


class _Draw(enum.IntEnum):
    """What a clip's key is folded with for each drawing, so that switching one on leaves the others as they were."""

    STRETCH = 0
    SHUFFLE = 1
    PITCH = 2
    GAIN = 3
    EQ = 4
    NOISE = 5
    NOISE_CELLS = 6
    MIX = 7
    TIME_MASK = 8
    BAND_MASK = 9
    LOW_PASS = 10
    HIGH_PASS = 11
    CHANCE = 100  # plus the number of what the chance is of


def window_frames(frames: int, available: int, time_stretch: float) -> int:
    """Returns how many frames of a clip a step needs to make `frames` of them.

    Args:
      frames: frames of the network's input.
      available: frames of a clip in the store.
      time_stretch: see `Augmentation`.
    """
    if not time_stretch:
        return frames
    # The fastest clip spans this many; two more for the interpolation and for rounding of the rate.
    return min(available, math.ceil((1.0 + time_stretch) * (frames - 1)) + 2)


def gather_windows(clips: jax.Array, clip: jax.Array, start: jax.Array, frames: int) -> jax.Array:
    """Returns `frames` frames of each chosen clip from `start` on, `[batch, frames, bands]`.

    Args:
      clips: resident clips, `[clips, frames of the store, bands]`.
      clip: which, int32 `[batch]`.
      start: first frame of each, int32 `[batch]`.
      frames: frames of each window.
    """
    if frames == clips.shape[1]:
        return clips[clip]
    return clips[clip[:, None], start[:, None] + jnp.arange(frames)]


def time_stretch(
    x: jax.Array, rate: jax.Array, first: jax.Array, length: jax.Array, frames: int
) -> jax.Array:
    """Resamples frames by linear interpolation: a clip at `rate` 1.1 is 1.1 times as fast. Its pitch stays.

    The frames are taken from `first` on, or from earlier where the clip would end too soon. What a clip too short for the
    rate lacks is its end played backwards.

    Args:
      x: `[batch, window, bands]`.
      rate: source frames per frame, float32 `[batch]`.
      first: int32 `[batch]`.
      length: frames of the window that can be used, int32 `[batch]`.
      frames: frames to make.

    Returns:
      `[batch, frames, bands]`.
    """
    # Whole frames and fractions are kept apart, so that the result does not depend on where the window lies in its clip.
    steps = rate[:, None] * jnp.arange(frames, dtype=jnp.float32)
    whole = jnp.floor(steps)
    fraction = (steps - whole)[:, :, None]
    first = jnp.minimum(
        first, jnp.maximum(length - 1 - jnp.ceil(steps[:, -1]).astype(jnp.int32), 0)
    )
    lower = first[:, None] + whole.astype(jnp.int32)

    def at(index: jax.Array) -> jax.Array:
        period = jnp.maximum(2 * (length - 1), 1)[:, None]
        index = index % period
        return jnp.take_along_axis(x, jnp.minimum(index, period - index)[:, :, None], axis=1)

    return at(lower) * (1.0 - fraction) + at(lower + 1) * fraction


def time_shuffle(x: jax.Array, order: jax.Array) -> jax.Array:
    """Cuts each clip into equal segments (to a frame) and puts them into another order.

    Args:
      x: `[batch, frames, bands]`.
      order: the segments as they are to follow each other, int `[batch, segments]`.
    """
    frames, segments = x.shape[1], order.shape[1]
    bounds = jnp.asarray(np.round(np.linspace(0, frames, segments + 1)).astype(np.int32))
    ends = jnp.cumsum(jnp.diff(bounds)[order], axis=1)
    time = jnp.arange(frames)
    place = (time[None, :, None] >= ends[:, None, :]).sum(axis=2)
    before = jnp.concatenate([jnp.zeros_like(ends[:, :1]), ends], axis=1)
    source = (
        bounds[jnp.take_along_axis(order, place, axis=1)]
        + time
        - jnp.take_along_axis(before, place, axis=1)
    )
    return jnp.take_along_axis(x, source[:, :, None], axis=1)


def pitch_shift(x: jax.Array, shift: jax.Array) -> jax.Array:
    """Moves every clip up by `shift` bands (down where it is negative), by linear interpolation; the edge bands are repeated.

    Above 1 kHz, where mel bands are equally wide in octaves, this transposes; below it is an approximation.

    Args:
      x: `[batch, frames, bands]`.
      shift: bands, float32 `[batch]`.
    """
    bands = x.shape[2]
    source = jnp.clip(jnp.arange(bands, dtype=jnp.float32) - shift[:, None], 0.0, bands - 1.0)
    # One small matrix product a clip is faster than a gather of single cells. Its weights must not be rounded to 16 bits.
    weights = jnp.maximum(1.0 - jnp.abs(source[:, None, :] - jnp.arange(bands)[None, :, None]), 0.0)
    return jnp.einsum("btf,bfg->btg", x, weights, precision=jax.lax.Precision.HIGHEST)


def gain(x: jax.Array, level: jax.Array) -> jax.Array:
    """Makes each clip `[frames, bands]` louder by `level` dB `[batch]`."""
    return x + level[:, None, None]


def equalise(x: jax.Array, knots: jax.Array) -> jax.Array:
    """Adds a smooth curve over the bands: straight lines between `knots`, dB `[batch, points]`. Two points are a tilt."""
    place = np.linspace(0.0, knots.shape[1] - 1.0, x.shape[2], dtype=np.float32)
    lower = np.minimum(place.astype(np.int32), knots.shape[1] - 2)
    fraction = place - lower
    curve = knots[:, lower] * (1.0 - fraction) + knots[:, lower + 1] * fraction
    return x + curve[:, None, :]


def band_limit(
    x: jax.Array, lower: jax.Array, upper: jax.Array, slope: jax.Array, top_db: float
) -> jax.Array:
    """Takes away what lies outside of a range of bands, as an old recording or a telephone does.

    The level falls in a straight line beyond either edge, down to the front end's floor.

    Args:
      x: dB, `[batch, frames, bands]`.
      lower: the level falls below this band, float32 `[batch]`; 0 leaves all.
      upper: and above this one; the last band leaves all.
      slope: dB a band, below the range and above it, float32 `[batch, 2]`.
      top_db: of the front end: no cell lies so many dB under the loudest cell of its clip.
    """
    band = jnp.arange(x.shape[2], dtype=jnp.float32)
    below = jnp.maximum(lower[:, None] - band, 0.0) * slope[:, :1]
    above = jnp.maximum(band - upper[:, None], 0.0) * slope[:, 1:]
    x = x - (below + above)[:, None, :]
    return jnp.maximum(x, x.max(axis=(1, 2), keepdims=True) - top_db)


def mask(x: jax.Array, first: jax.Array, width: jax.Array, fill: jax.Array, axis: int) -> jax.Array:
    """Replaces `width` frames (axis 1) or bands (axis 2) from `first` on, both int `[batch]`, by `fill` (SpecAugment)."""
    place = jnp.arange(x.shape[axis]).reshape((1, -1, 1) if axis == 1 else (1, 1, -1))
    first, width = first[:, None, None], width[:, None, None]
    return jnp.where((place >= first) & (place < first + width), fill, x)


def mixup(x: jax.Array, other: jax.Array, share: jax.Array) -> jax.Array:
    """Returns `share * x + (1 - share) * other` of clips `[batch, frames, bands]`, with `share` `[batch]` (Zhang et al. 2018)."""
    share = share[:, None, None]
    return share * x + (1.0 - share) * other


def cutmix(
    x: jax.Array, other: jax.Array, first: jax.Array, width: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Replaces `width` frames from `first` on, both int `[batch]`, by the other clip's (Yun et al. 2019, in time alone).

    Returns:
      The clips, and the share of each that is still its own, float32 `[batch]`.
    """
    return mask(x, first, width, other, axis=1), 1.0 - width.astype(jnp.float32) / x.shape[1]


def following(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns, for each row of a batch, the next one (for the last row the first), over all devices.

    Batches are shuffled, so the next clip is any other; and a neighbour is all that devices have to exchange.
    """
    if axis_name is None:
        return jnp.roll(x, -1, axis=0)
    size = jax.lax.psum(1, axis_name)
    head = jax.lax.ppermute(
        x[:1], axis_name, [(device, (device - 1) % size) for device in range(size)]
    )
    return jnp.concatenate([x[1:], head])


def beta(uniform: jax.Array, alpha: float) -> jax.Array:
    """Turns uniform numbers from 0 to 1 into ones of Beta(alpha, alpha), by its quantiles: no loop that devices would wait in."""
    grid = np.linspace(0.0, 1.0, _QUANTILES + 1)
    return jnp.interp(
        uniform,
        grid.astype(np.float32),
        scipy.stats.beta.ppf(grid, alpha, alpha).astype(np.float32),
    )


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What a training step does to its batch; see `musicgenre.config.base_config`, section `augment`.

    Attributes:
      frames: frames of the network's input.
      clip_mean: masks are filled with the clip's own mean; else with the training split's, which normalisation makes 0.
      time_masks: masks over frames.
      time_mask_share: widest time mask, as a share of the frames; each mask's width is drawn evenly from 0 to it.
      band_masks: masks over bands.
      band_mask_share: widest band mask, as a share of the bands.
      mixup: alpha of the Beta(alpha, alpha) that the share of the clip itself is drawn from; 0 is off.
      cutmix: the same, of the share of frames.
      mix_share: chance of a clip to be mixed. Where both kinds are on, either has half of it.
      gain: largest change of level, dB; drawn evenly from -gain to gain.
      eq: largest change of a band, dB, by a curve through points drawn evenly from -eq to eq.
      eq_points: points of that curve; 2 are a tilt.
      noise: largest standard deviation of noise that is added to each cell, dB; drawn evenly from 0 to it.
      pitch_shift: largest shift, bands; drawn evenly from -pitch_shift to pitch_shift.
      time_stretch: rates lie between 1 / (1 + time_stretch) and 1 + time_stretch, drawn evenly on a logarithmic scale.
      time_shuffle: segments to put into another order; 0 is off.
      low_pass: most that is taken away at the top, as a share of the bands; drawn evenly from 0 to it. See `band_limit`.
      high_pass: the same at the bottom.
      pass_share: chance of a clip to undergo each of these two.
      top_db: of the front end; needed by them.
      probability: chance of a clip to undergo each of these but mixing and the passes, drawn for each of them.
    """

    frames: int
    clip_mean: bool = False
    time_masks: int = 0
    time_mask_share: float = 0.1
    band_masks: int = 0
    band_mask_share: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_share: float = 1.0
    gain: float = 0.0
    eq: float = 0.0
    eq_points: int = 4
    noise: float = 0.0
    pitch_shift: float = 0.0
    time_stretch: float = 0.0
    time_shuffle: int = 0
    low_pass: float = 0.0
    high_pass: float = 0.0
    pass_share: float = 1.0
    top_db: float = 80.0
    probability: float = 1.0

    @classmethod
    def from_config(cls, config: ConfigDict, frames: int) -> "Augmentation | None":
        """Returns the augmentation of a config for inputs of `frames` frames, or None where all of it is off."""
        augmentation = cls(
            frames,
            config.data.normalise == "none",
            top_db=config.features.top_db,
            **config.augment.to_dict(),
        )
        return None if augmentation.off else augmentation

    @property
    def off(self) -> bool:
        """True where nothing would be done."""
        return not any(
            (
                self.time_masks,
                self.band_masks,
                self.mixup,
                self.cutmix,
                self.gain,
                self.eq,
                self.noise,
                self.pitch_shift,
                self.time_stretch,
                self.time_shuffle,
                self.low_pass,
                self.high_pass,
            )
        )

    def __call__(self, batch: Any, key: jax.Array, norm: Any, axis_name: str | None = None) -> Any:
        """Augments a batch.

        Args:
          batch: `x` `[batch, window, bands]` with the window of `window_frames`, and `y`; for time stretch also `offset` and
            `length`, int32 `[batch]`: where in the window the clip is to begin, and how much of it can be used.
          key: the step's.
          norm: `mean` of the training split, broadcastable to `[frames, bands]`.
          axis_name: the device axis under pmap, where `batch` is one device's part.

        Returns:
          The batch with `x` float32 `[batch, frames, bands]`. Where clips are mixed, `y_other` (as `y`) holds the labels of
          each clip's partner and `share`, float32 `[batch]`, how much of the clip is its own.
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
            places = _uniform(keys, _Draw.SHUFFLE, self.time_shuffle)
            places = jnp.where(
                self._chosen(keys, _Draw.SHUFFLE)[:, None], places, jnp.arange(self.time_shuffle)
            )
            x = time_shuffle(x, jnp.argsort(places, axis=1))
        if self.pitch_shift:
            x = pitch_shift(x, self._amount(keys, _Draw.PITCH) * self.pitch_shift)
        if self.gain:
            x = gain(x, self._amount(keys, _Draw.GAIN) * self.gain)
        if self.eq:
            knots = 2.0 * _uniform(keys, _Draw.EQ, self.eq_points) - 1.0
            x = equalise(x, jnp.where(self._chosen(keys, _Draw.EQ)[:, None], knots, 0.0) * self.eq)
        if self.noise:
            deviation = (
                jnp.where(self._chosen(keys, _Draw.NOISE), _uniform(keys, _Draw.NOISE), 0.0)
                * self.noise
            )
            cells = jax.vmap(
                lambda k: jax.random.normal(jax.random.fold_in(k, _Draw.NOISE_CELLS), x.shape[1:])
            )(keys)
            x = x + deviation[:, None, None] * cells
        if self.low_pass or self.high_pass:
            x = self._limited(x, keys)
        if self.mixup or self.cutmix:
            x, batch["share"] = self._mixed(x, following(x, axis_name), keys)
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
        for share, draw in ((self.high_pass, _Draw.HIGH_PASS), (self.low_pass, _Draw.LOW_PASS)):
            here = (_uniform(keys, _Draw.CHANCE + draw) < self.pass_share) & (share > 0)
            cut, slope = jnp.moveaxis(_uniform(keys, draw, 2), 1, 0)
            cuts.append(jnp.where(here, cut, 0.0) * share * bands)
            slopes.append(_LEAST_SLOPE * (_GREATEST_SLOPE / _LEAST_SLOPE) ** slope)
            chosen.append(here)
        limited = band_limit(
            x, cuts[0], bands - 1 - cuts[1], jnp.stack(slopes, axis=1), self.top_db
        )
        # Clips that are left alone do not get the floor either.
        return jnp.where((chosen[0] | chosen[1])[:, None, None], limited, x)

    def _mixed(
        self, x: jax.Array, other: jax.Array, keys: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        chance, amount, place = jnp.moveaxis(_uniform(keys, _Draw.MIX, 3), 1, 0)
        chosen = chance < self.mix_share
        cut = chance < 0.5 * self.mix_share if self.mixup else chosen
        result, share = x, jnp.ones(x.shape[0])
        if self.mixup:
            own = jnp.where(chosen, beta(amount, self.mixup), 1.0)
            if self.cutmix:
                own = jnp.where(cut, 1.0, own)
            result, share = mixup(x, other, own), own
        if self.cutmix:
            width = jnp.where(
                cut, jnp.round((1.0 - beta(amount, self.cutmix)) * self.frames), 0.0
            ).astype(jnp.int32)
            # Over what mixup made: a clip that is cut was not mixed, and one that was mixed gets a cut of no width.
            result, own = cutmix(result, other, _first(place, width, self.frames), width)
            share = share * own
        return result, share

    def _masked(self, x: jax.Array, keys: jax.Array, fill: jax.Array) -> jax.Array:
        for axis, count, share, draw in (
            (1, self.time_masks, self.time_mask_share, _Draw.TIME_MASK),
            (2, self.band_masks, self.band_mask_share, _Draw.BAND_MASK),
        ):
            if not count:
                continue
            size = x.shape[axis]
            chosen = self._chosen(keys, draw)
            widths, places = jnp.moveaxis(_uniform(keys, draw, (2, count)), 1, 0)
            widths = jnp.where(
                chosen[:, None], jnp.floor(widths * (math.floor(share * size) + 1)), 0.0
            ).astype(jnp.int32)
            for number in range(count):
                width = widths[:, number]
                x = mask(x, _first(places[:, number], width, size), width, fill, axis)
        return x


def _uniform(keys: jax.Array, draw: int, shape: int | tuple[int, ...] = ()) -> jax.Array:
    """Numbers from 0 to 1, `[batch, *shape]`, from the keys of the clips."""
    shape = (shape,) if isinstance(shape, int) else shape
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, draw), shape))(keys)


def _first(place: jax.Array, width: jax.Array, size: int) -> jax.Array:
    """The first of `width` cells that lie anywhere in `size`, drawn evenly by `place` from 0 to 1; int32 `[batch]`."""
    return jnp.floor(place * (size - width + 1)).astype(jnp.int32)
