"""Fully convolutional networks (Choi et al. 2016): 3 x 3 convolutions and max-pools.

Source: K. Choi, G. Fazekas, M. Sandler, "Automatic tagging using deep convolutional neural
networks", 2016, arXiv:1606.00298.

`FCN_SIZES` holds the fields of the paper's other depths: `config.model.update(FCN_SIZES["fcn5"])`.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from musicgenre.models.layers import Conv, Network, batch_norm, check_lengths, global_max, max_pool
from musicgenre.models.registry import InputLimits, register


def _size(filters: tuple, time_pools: tuple, band_pools: tuple, pointwise: tuple = ()) -> dict:
    return {
        "filters": filters,
        "time_pools": time_pools,
        "band_pools": band_pools,
        "pointwise": pointwise,
    }


_FIVE = ((128, 256, 512, 1024, 2048), (4, 4, 4, 5, 4), (2, 2, 2, 3, 4))
# Fields of each size. All but the last leave 1 x 1 of 1366 frames x 96 bands. FCN-4 is published
# with the sizes below, and the five pools of FCN-5 to 7 are those of the author's public code. The
# rest, FCN-3 and the filters of FCN-5 to 7, is given from memory of the paper's tables
# (unverified). FCN-6 and 7 add 1 x 1 convolutions to FCN-5.
FCN_SIZES: dict[str, dict[str, Any]] = {
    "fcn3": _size((256, 768, 2048), (5, 16, 17), (3, 4, 8)),
    "fcn4": _size((128, 384, 768, 2048), (4, 5, 8, 8), (2, 4, 3, 4)),
    "fcn5": _size(*_FIVE),
    "fcn6": _size(*_FIVE, (1024,)),
    "fcn7": _size(*_FIVE, (1024, 1024)),
    # For the report's own front end: 1 x 1 of 628 frames x 128 bands. Its filters are FCN-4's,
    # since the report does not state any.
    "report": _size((128, 384, 768, 2048), (4, 5, 5, 6), (2, 4, 4, 4)),
}


@register("fcn")
class FCN(Network):
    """Repeats [convolution, normalisation, ReLU, max-pool, dropout]; a global maximum and the head.

    The defaults are FCN-4 for 1366 frames x 96 bands (29.1 s at 12 kHz, hop 256), which leave 1 x
    1. With 50 outputs it has 17,362,610 parameters (the paper's 17.37 million also count the biases
    of the convolutions, which normalisation cancels). More frames or bands leave more positions,
    and the maximum over them is taken, with the same parameters.

    Attributes:
      filters: filters of each convolution; their number is the number of layers.
      time_pools: frames of the max-pool after each convolution.
      band_pools: bands of the max-pool after each convolution.
      pointwise: filters of each 1 x 1 convolution at the end (FCN-6 and FCN-7).
      width: frames and bands that a filter covers.
      dropout: rate after each max-pool and after each 1 x 1 convolution.
    """

    filters: tuple[int, ...] = (128, 384, 768, 2048)
    time_pools: tuple[int, ...] = (4, 5, 8, 8)
    band_pools: tuple[int, ...] = (2, 4, 3, 4)
    pointwise: tuple[int, ...] = ()
    width: int = 3
    dropout: float = 0.5

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """The fewest frames and bands that leave one position."""
        check_lengths("fcn", fields, "filters", "time_pools", "band_pools")
        return InputLimits(math.prod(fields["time_pools"]), math.prod(fields["band_pools"]))

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        options = {"kernel_init": nn.initializers.glorot_uniform(), "dtype": self.dtype}
        x = x.astype(self.dtype)[..., None]
        pools = [*zip(self.time_pools, self.band_pools, strict=True)]
        for i, filters in enumerate((*self.filters, *self.pointwise), start=1):
            if i <= len(pools):
                x = Conv(filters, self.width, train=train, name=f"conv{i}", **options)(x)
            else:
                x = nn.Dense(filters, use_bias=False, name=f"conv{i}", **options)(x)
            x = batch_norm(train, self.dtype, f"norm{i}")(x, relu=True)
            if i <= len(pools):
                x = max_pool(x, pools[i - 1])
            if i == len(pools):
                x = global_max(x)
            x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{i}")(x)
        self.sow("intermediates", "embedding", x)
        return self.logits(x, options["kernel_init"])
