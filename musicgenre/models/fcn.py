"""Fully convolutional networks (Choi et al. 2016): 3 x 3 convolutions, and max-pools that leave one position.

Source: K. Choi, G. Fazekas, M. Sandler, "Automatic tagging using deep convolutional neural networks", 2016, arXiv:1606.00298.

`FCN_SIZES` holds the paper's other depths, as fields to change. In a config and in a sweep:

    config.model.update(FCN_SIZES["fcn5"])
    yield "fcn5", {f"model.{field}": value for field, value in FCN_SIZES["fcn5"].items()}
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.models.layers import Conv, batch_norm, check_lengths, global_max, max_pool
from musicgenre.models.registry import InputLimits, register

_FIVE = {
    "filters": (128, 256, 512, 1024, 2048),
    "time_pools": (4, 4, 4, 5, 4),
    "band_pools": (2, 2, 2, 3, 4),
}

# Fields of each size. All but the last leave 1 x 1 of 1366 frames x 96 bands. FCN-4 is published with the sizes below, and
# the five pools of FCN-5 to 7 are those of the author's public code. The rest, FCN-3 and the filters of FCN-5 to 7, is given
# from memory of the paper's tables (unverified). FCN-6 and 7 add convolutions of 1 x 1 to FCN-5.
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
    # For the report's own front end: 1 x 1 of 628 frames x 128 bands. Its filters are FCN-4's; the report does not state any.
    "report": {
        "filters": (128, 384, 768, 2048),
        "time_pools": (4, 5, 5, 6),
        "band_pools": (2, 4, 4, 4),
        "pointwise": (),
    },
}


@register("fcn")
class FCN(nn.Module):
    """Several times [convolution, normalisation, ReLU, max-pool, dropout], the maximum over what is left, and the head.

    The defaults are FCN-4 for 1366 frames x 96 bands (29.1 s at 12 kHz, hop 256), which leave 1 x 1. With 50 outputs it has
    17,362,610 parameters (the paper's 17.37 million count the convolutions' biases, idle before normalisation, too).

    A longer or higher input leaves more positions. The maximum over them is then taken, as if the last max-pool covered
    them all, so that the layers and their parameters are the same for every input.

    Attributes:
      num_classes: outputs.
      filters: filters of each convolution; their number is the number of layers.
      time_pools: frames of the max-pool after each convolution.
      band_pools: bands of the same.
      pointwise: filters of each convolution of 1 x 1 at the end (FCN-6 and FCN-7).
      width: frames and bands that a filter sees.
      dropout: rate after each max-pool and after each convolution of 1 x 1.
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
          UserError: the fields that describe the layers differ in length.
        """
        check_lengths("fcn", fields, "filters", "time_pools", "band_pools")
        return InputLimits(
            min_frames=math.prod(fields["time_pools"]), min_bands=math.prod(fields["band_pools"])
        )

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        init = nn.initializers.glorot_uniform()
        x = x.astype(self.dtype)[..., None]
        pools = zip(self.filters, self.time_pools, self.band_pools, strict=True)
        for i, (filters, frames, bands) in enumerate(pools, start=1):
            x = Conv(
                filters,
                self.width,
                train=train,
                kernel_init=init,
                dtype=self.dtype,
                name=f"conv{i}",
            )(x)
            x = batch_norm(train, self.dtype, name=f"norm{i}")(x, relu=True)
            x = max_pool(x, (frames, bands))
            if i == len(self.filters):
                x = global_max(x)
            x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{i}")(x)
        for i, filters in enumerate(self.pointwise, start=len(self.filters) + 1):
            x = nn.Dense(
                filters, use_bias=False, kernel_init=init, dtype=self.dtype, name=f"conv{i}"
            )(x)
            x = batch_norm(train, self.dtype, name=f"norm{i}")(x, relu=True)
            x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{i}")(x)
        self.sow("intermediates", "embedding", x)
        return nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="head")(
            x
        ).astype(jnp.float32)
