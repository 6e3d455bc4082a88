"""The feed-forward network of unrolled restricted Boltzmann machines (Feng 2014, after Hinton 2006)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.models.layers import dense_layers, output_layer
from musicgenre.models.registry import register


@register("rbm")
class UnrolledRBMs(nn.Module):
    """Sigmoid layers on the flattened input; each outputs the hidden probabilities of one machine.

    `musicgenre.training.objectives.rbm` pretrains the layers without labels; otherwise this is a plain
    sigmoid network.

    Attributes:
      num_classes: outputs.
      layers: hidden units of each machine, the lowest first.
      dropout: rate after each layer.
      dtype: compute type.
    """

    num_classes: int
    layers: tuple[int, ...] = (512, 256)
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        init = nn.initializers.glorot_normal()
        x = x.reshape(x.shape[0], -1).astype(self.dtype)
        x = dense_layers(self, x, train, self.layers, init, activation=nn.sigmoid, name="layer")
        return output_layer(self, x, init)
