"""Fully convolutional networks (Choi et al. 2016): 3 x 3 convolutions and max-pools.

Source: K. Choi, G. Fazekas, M. Sandler, "Automatic tagging using deep convolutional neural networks",
2016, arXiv:1606.00298.

`FCN_SIZES` holds the fields of the paper's other depths. In a config and in a sweep:

    config.model.update(FCN_SIZES["fcn5"])
    yield "fcn5", {f"model.{field}": value for field, value in FCN_SIZES["fcn5"].items()}
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.models.layers import (
    Conv,
    batch_norm,
    check_lengths,
    global_max,
    max_pool,
    output_layer,
)
from musicgenre.models.registry import InputLimits, register

_FIVE = {
    "filters": (128, 256, 512, 1024, 2048),
    "time_pools": (4, 4, 4, 5, 4),
    "band_pools": (2, 2, 2, 3, 4),
}

# Fields of each size. All but the last leave 1 x 1 of 1366 frames x 96 bands. FCN-4 is published with
# the sizes below, and the five pools of FCN-5 to 7 are those of the author's public code. The rest,
# FCN-3 and the filters of FCN-5 to 7, is given from memory of the paper's tables (unverified). FCN-6
# and 7 add 1 x 1 convolutions to FCN-5.
FCN_SIZES: dict[str, dict[str, Any]] = {
    "fcn3": {
        "filters": (256, 768, 2048),
        "time_pools": (5, 16, 17),
        "band_pools": (3, 4, 8),
        "pointwise": (),
    },
    "fcn4": {
        "filters": (128, 384, 768, 2048),
        "time_pools": (4, 5, 8, 8),
        "band_pools": (2, 4, 3, 4),
        "pointwise": (),
    },
    "fcn5": _FIVE | {"pointwise": ()},
    "fcn6": _FIVE | {"pointwise": (1024,)},
    "fcn7": _FIVE | {"pointwise": (1024, 1024)},
    # For the report's own front end: 1 x 1 of 628 frames x 128 bands. Its filters are FCN-4's, since
    # the report does not state any.
    "report": {
        "filters": (128, 384, 768, 2048),
        "time_pools": (4, 5, 5, 6),
        "band_pools": (2, 4, 4, 4),
        "pointwise": (),
    },
}


@register("fcn")
class FCN(nn.Module):
    """Repeats [convolution, normalisation, ReLU, max-pool, dropout]; a global maximum and the head.

    The defaults are FCN-4 for 1366 frames x 96 bands (29.1 s at 12 kHz, hop 256), which leave 1 x 1.
    With 50 outputs it has 17,362,610 parameters (the paper's 17.37 million also count the biases of the
    convolutions, which normalisation cancels).

    A longer input or more bands leave more positions, and the maximum over them is taken, as if the
    last max-pool covered them all. The parameters are the same for every input.

    Attributes:
      num_classes: outputs.
      filters: filters of each convolution; their number is the number of layers.
      time_pools: frames of the max-pool after each convolution.
      band_pools: bands of the max-pool after each convolution.
      pointwise: filters of each 1 x 1 convolution at the end (FCN-6 and FCN-7).
      width: frames and bands that a filter covers.
      dropout: rate after each max-pool and after each 1 x 1 convolution.
      dtype: compute type.
    """

    num_classes: int
    filters: tuple[int, ...] = (128, 384, 768, 2048)
    time_pools: tuple[int, ...] = (4, 5, 8, 8)
    band_pools: tuple[int, ...] = (2, 4, 3, 4)
    pointwise: tuple[int, ...] = ()
    width: int = 3
    dropout: float = 0.5
    dtype: Any = jnp.float32

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """The fewest frames and bands that leave one position.

        Raises:
          UserError: the fields of the layers differ in length.
        """
        check_lengths("fcn", fields, "filters", "time_pools", "band_pools")
        return InputLimits(math.prod(fields["time_pools"]), math.prod(fields["band_pools"]))

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        options = {"kernel_init": nn.initializers.glorot_uniform(), "dtype": self.dtype}
        x = x.astype(self.dtype)[..., None]
        pools = zip(self.filters, self.time_pools, self.band_pools, strict=True)
        for i, (filters, frames, bands) in enumerate(pools, start=1):
            x = Conv(filters, self.width, train=train, name=f"conv{i}", **options)(x)
            x = batch_norm(train, self.dtype, name=f"norm{i}")(x, relu=True)
            x = max_pool(x, (frames, bands))
            if i == len(self.filters):
                x = global_max(x)
            x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{i}")(x)
        for i, filters in enumerate(self.pointwise, start=len(self.filters) + 1):
            x = nn.Dense(filters, use_bias=False, name=f"conv{i}", **options)(x)
            x = batch_norm(train, self.dtype, name=f"norm{i}")(x, relu=True)
            x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{i}")(x)
        self.sow("intermediates", "embedding", x)
        return output_layer(self, x, options["kernel_init"])
