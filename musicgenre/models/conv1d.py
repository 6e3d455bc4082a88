"""The report's network for GTZAN (section 4, figure 5): convolutions over time with the mel bands as channels."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.models.layers import avg_pool_time, batch_norm, dense_head, max_pool_time
from musicgenre.models.registry import InputLimits, register


@register("conv1d")
class Conv1D(nn.Module):
    """Three times [convolution, ReLU, max-pool], then maximum and mean side by side, and a dense head.

    The defaults are the report's sizes, after Dieleman's network (Spotify, 2014).

    Attributes:
      num_classes: outputs.
      filters: filters of each convolution; their number is the number of layers.
      width: frames that a filter sees.
      stride: frames from one position of a filter to the next.
      pool: frames of the max-pool after each convolution.
      final_pool: frames of the last max-pool and mean-pool, which lie side by side; 0 pools over all that is left.
      dense: units of the hidden dense layers.
      dropout: rate after each hidden dense layer.
      batch_norm: normalise before each ReLU; the report found no gain, so it is off.
      output_dropout: also drop logits, as the author's code did.
      dtype: compute type.
      axis_name: device axis for batch normalisation under pmap.
    """

    num_classes: int
    filters: tuple[int, ...] = (256, 256, 256)
    width: int = 4
    stride: int = 2
    pool: int = 2
    final_pool: int = 4
    dense: tuple[int, ...] = (2048,)
    dropout: float = 0.5
    batch_norm: bool = False
    output_dropout: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """The fewest frames that leave one window for the last pool."""
        frames = fields["final_pool"] or 1
        for _ in fields["filters"]:
            # SAME convolution: ceil(frames / stride) positions; the pool keeps whole windows only.
            frames = (frames * fields["pool"] - 1) * fields["stride"] + 1
        return InputLimits(min_frames=frames)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        init = nn.initializers.glorot_normal()
        x = x.astype(self.dtype)
        for i, filters in enumerate(self.filters):
            # A bias before batch normalisation has no effect but to collect Adam's rounding noise.
            x = nn.Conv(
                filters,
                (self.width,),
                (self.stride,),
                padding="SAME",
                use_bias=not self.batch_norm,
                kernel_init=init,
                dtype=self.dtype,
                name=f"conv{i + 1}",
            )(x)
            if self.batch_norm:
                x = batch_norm(train, self.axis_name, self.dtype, name=f"norm{i + 1}")(x)
            x = max_pool_time(nn.relu(x), self.pool)
        window = self.final_pool or x.shape[1]
        x = jnp.concatenate([max_pool_time(x, window), avg_pool_time(x, window)], axis=-1)
        x = x.reshape(x.shape[0], -1)
        return dense_head(self, x, train)
