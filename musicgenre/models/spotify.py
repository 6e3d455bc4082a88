"""Dieleman's network at Spotify (2014): convolutions over time, three global pools, dense layers.

Source: S. Dieleman, "Recommending music on Spotify with deep learning", blog post of 5 August 2014.
Its text gives the input (599 frames x 128 mel bands), the layers, pools and outputs. The post shows
the filters and the padding in a figure only: its text confirms 256 filters in the first layer; the
others and VALID padding (the default of Theano, in which it was written) are unverified.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.models.layers import Network, global_max, max_pool
from musicgenre.models.registry import InputLimits, register


@jax.named_scope("l2_pool")
def l2_pool(x: jax.Array) -> jax.Array:
    """Euclidean norm over time, `[batch, frames, channels]` to float32 `[batch, channels]`.

    The gradient is 0 where a channel is 0 in every frame, as after a ReLU that never fires; the
    derivative of the square root would make it NaN.
    """
    power = jnp.square(x.astype(jnp.float32)).sum(axis=1)
    active = power > 0
    # The inner `where` keeps the square root away from 0, where its infinite derivative would
    # survive the outer one.
    return jnp.where(active, jnp.sqrt(jnp.where(active, power, 1.0)), 0.0)


@register("spotify")
class Spotify(Network):
    """Convolutions and max-pools, then mean, maximum and L2 norm over time, and dense layers.

    With 599 frames x 128 bands and 40 outputs it has 8,607,016 parameters. It serves any task:
    latent factors by regression, as in the post, or classes or tags.

    Attributes:
      filters: filters of each convolution; their number is the number of layers.
      width: frames that a filter covers.
      first_pool: frames of the max-pool between the first and the second convolution.
      pool: frames of the max-pools between the others; none follows the last.
      dense: units of the hidden dense layers.
      dropout: rate after each hidden dense layer.
    """

    filters: tuple[int, ...] = (256, 256, 256, 512)
    width: int = 4
    first_pool: int = 4
    pool: int = 2
    dense: tuple[int, ...] = (2048, 2048)
    dropout: float = 0.5

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """The fewest frames that leave one position of the last filter."""
        frames = 1
        for i in reversed(range(len(fields["filters"]))):
            if i + 1 < len(fields["filters"]):
                frames *= fields["pool"] if i else fields["first_pool"]
            frames += fields["width"] - 1
        return InputLimits(min_frames=frames)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        init = nn.initializers.glorot_normal()
        options = {"padding": "VALID", "kernel_init": init, "dtype": self.dtype}
        x = x.astype(self.dtype)
        for i, filters in enumerate(self.filters):
            x = nn.relu(nn.Conv(filters, (self.width,), name=f"conv{i + 1}", **options)(x))
            if i + 1 < len(self.filters):
                x = max_pool(x, (self.pool if i else self.first_pool,))
        x = jnp.concatenate([x.mean(axis=1), global_max(x), l2_pool(x).astype(self.dtype)], axis=-1)
        x = self.dense_layers(x, train, self.dense, init)
        return self.logits(x, init)
