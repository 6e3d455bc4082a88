"""The report's network for GTZAN (section 4, figure 5): convolutions over time."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.models.layers import (
    Network,
    avg_pool_time,
    batch_norm,
    check_field,
    global_max,
    max_pool,
)
from musicgenre.models.registry import InputLimits, register

_POOLINGS = ("flatten", "mean", "mean_max", "attention")


@register("conv1d")
class Conv1D(Network):
    """Three times [convolution, ReLU, max-pool], a pool over the remaining time, and dense layers.

    The defaults are the report's sizes, after Dieleman's network (Spotify, 2014). Its pool,
    `flatten`, ties the head to a number of frames; the other pools take inputs of any length.

    Attention weights frames by the softmax over time of one linear score (after Raffel and Ellis
    2015, arXiv:1512.08756, without its tanh). The score starts at 0, which makes it the mean; the
    weights are sown as `frame_weights`, float32 `[batch, frames]`.

    Attributes:
      filters: filters of each convolution; their number is the number of layers.
      width: frames that a filter covers.
      widths: if not empty, each layer has an equal number of filters of each of these widths.
      stride: frames from one position of a filter to the next.
      pool: frames of the max-pool after each convolution.
      pooling: how the remaining frames are pooled. "flatten": maxima and means of windows of
        `final_pool` frames, one window after the other; "mean", "mean_max" (the maxima, then the
        means) or "attention" over all frames.
      final_pool: frames of the last max-pool and mean-pool of `flatten`; 0 is all frames.
      dense: units of the hidden dense layers.
      dropout: rate after each hidden dense layer.
      batch_norm: normalise before each ReLU; the report found no gain, so it is off.
      output_dropout: also drop logits, as the author's code did.
    """

    filters: tuple[int, ...] = (256, 256, 256)
    width: int = 4
    widths: tuple[int, ...] = ()
    stride: int = 2
    pool: int = 2
    pooling: str = "flatten"
    final_pool: int = 4
    dense: tuple[int, ...] = (2048,)
    dropout: float = 0.5
    batch_norm: bool = False
    output_dropout: bool = False

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """The fewest frames that leave one for the last pool, or one window of `flatten`."""
        pooling, widths, filters = fields["pooling"], fields["widths"], fields["filters"]
        rule = f"be one of {', '.join(_POOLINGS)}"
        check_field("conv1d", fields, "pooling", pooling in _POOLINGS, rule)
        valid = [width for width in set(widths) if type(width) is int and width >= 1]
        rule = "be different numbers of frames, each at least 1"
        check_field("conv1d", fields, "widths", len(valid) == len(widths), rule)
        even = not any(count % len(widths) for count in filters) if widths else True
        rule = f"divide by the number of model.widths={widths}"
        check_field("conv1d", fields, "filters", even, rule)
        frames = (fields["final_pool"] or 1) if pooling == "flatten" else 1
        for _ in filters:
            # A SAME convolution leaves ceil(frames / stride); the pool keeps complete windows only.
            frames = (frames * fields["pool"] - 1) * fields["stride"] + 1
        return InputLimits(min_frames=frames)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        init = nn.initializers.glorot_normal()
        # Adam would amplify rounding noise in a bias before batch normalisation.
        options = {"use_bias": not self.batch_norm, "kernel_init": init, "dtype": self.dtype}
        x = x.astype(self.dtype)
        for i, filters in enumerate(self.filters, start=1):
            each = filters // max(len(self.widths), 1)
            scales = []
            for width in self.widths or (self.width,):
                name = f"conv{i}_width{width}" if self.widths else f"conv{i}"
                scales.append(nn.Conv(each, (width,), (self.stride,), name=name, **options)(x))
            x = jnp.concatenate(scales, axis=-1) if self.widths else scales[0]
            if self.batch_norm:
                x = batch_norm(train, self.dtype, f"norm{i}")(x)
            x = max_pool(nn.relu(x), (self.pool,))
        x = self.dense_layers(self._pooled(x), train, self.dense, init)
        return self.logits(x, init, self.dropout if self.output_dropout and train else 0.0)

    @nn.nowrap
    def _pooled(self, x: jax.Array) -> jax.Array:
        """Returns `[batch, features]` of `[batch, frames, channels]`."""
        if self.pooling == "mean":
            return x.mean(axis=1)
        if self.pooling == "mean_max":
            return jnp.concatenate([global_max(x), x.mean(axis=1)], axis=-1)
        if self.pooling == "attention":
            # The softmax would cancel a bias.
            options = {"kernel_init": nn.initializers.zeros, "dtype": self.dtype}
            score = nn.Dense(1, use_bias=False, name="attention", **options)(x)
            weights = nn.softmax(score.astype(jnp.float32), axis=1)
            self.sow("intermediates", "frame_weights", weights[:, :, 0])
            return (x * weights.astype(x.dtype)).sum(axis=1)
        window = self.final_pool or x.shape[1]
        x = jnp.concatenate([max_pool(x, (window,)), avg_pool_time(x, window)], axis=-1)
        return x.reshape(x.shape[0], -1)
