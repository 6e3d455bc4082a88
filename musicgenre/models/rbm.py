"""The feed-forward network that a stack of restricted Boltzmann machines unrolls into (Feng 2014, after Hinton 2006)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.models.registry import register


@register("rbm")
class UnrolledRBMs(nn.Module):
    """Sigmoid layers over the flattened input; each one's output is the hidden probabilities of one machine.

    `musicgenre.training.objectives.rbm` learns the layers without labels; without that this is a plain sigmoid network.

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
        hidden = x
        for i, units in enumerate(self.layers):
            hidden = nn.sigmoid(
                nn.Dense(units, kernel_init=init, dtype=self.dtype, name=f"layer{i + 1}")(x)
            )
            x = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        self.sow("intermediates", "embedding", hidden)
        return nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="head")(
            x
        ).astype(jnp.float32)
