"""The network of unrolled restricted Boltzmann machines (Feng 2014, after Hinton 2006)."""

import flax.linen as nn
import jax

from musicgenre.models.layers import Network
from musicgenre.models.registry import register


@register("rbm")
class UnrolledRBMs(Network):
    """Sigmoid layers on the flattened input; each outputs the hidden probabilities of one machine.

    `musicgenre.training.objectives.rbm` pretrains the layers without labels; otherwise this is a
    plain sigmoid network.

    Attributes:
      layers: hidden units of each machine, the lowest first.
      dropout: rate after each layer.
    """

    layers: tuple[int, ...] = (512, 256)
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        init = nn.initializers.glorot_normal()
        x = x.reshape(x.shape[0], -1).astype(self.dtype)
        x = self.dense_layers(x, train, self.layers, init, nn.sigmoid, "layer")
        return self.logits(x, init)
