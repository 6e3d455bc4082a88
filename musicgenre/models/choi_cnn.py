"""The three convolutional networks that the CRNN was compared with (Choi et al. 2017).

In their names, `k` counts the dimensions of the kernels and `c` the directions in which they move.
All repeat [convolution, normalisation, ELU, max-pool, dropout] and end in dense layers.

Source: K. Choi, G. Fazekas, M. Sandler, K. Cho, "Convolutional recurrent neural networks for music
classification", 2017, arXiv:1609.04243. Its tables could not be opened. Kernels, pools and the
widths of k2c1 and k2c2 are given from memory (unverified); their parameter counts match the paper's
sizes. The widths of k1c2 are chosen so that its counts do.

`CHOI_SIZES` holds the fields of each size: `config.model.update(CHOI_SIZES["k2c1"]["0.25M"])`.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from musicgenre.models.layers import Network, batch_norm, check_field, check_lengths, max_pool
from musicgenre.models.registry import InputLimits, register

_SIZES = ("0.1M", "0.25M", "0.5M", "1M", "3M")
_K1C2 = ((15, 31), (24, 49), (35, 69), (49, 98), (85, 170))
_K2C1 = ((43, 87), (72, 145), (106, 212), (152, 304), (265, 535))
_K2C2 = (
    (20, 41, 41, 62, 83),
    (33, 66, 66, 100, 133),
    (47, 95, 95, 142, 190),
    (67, 135, 135, 203, 271),
    (118, 236, 236, 355, 473),
)
# Fields for 1366 frames x 96 bands and 50 outputs. The counts are within 4 % of the sizes.
CHOI_SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "k1c2": {
        size: {"filters": (a, a, b, b), "dense": (b, b)}
        for size, (a, b) in zip(_SIZES, _K1C2, strict=True)
    },
    "k2c1": {
        size: {"filters": (a, a, a, b, b), "dense": (b, b)}
        for size, (a, b) in zip(_SIZES, _K2C1, strict=True)
    },
    "k2c2": {size: {"filters": filters} for size, filters in zip(_SIZES, _K2C2, strict=True)},
}


class ChoiCNN(Network):
    """The form of the three networks, which differ in their fields' defaults.

    The dense layers take what the pools leave, so a trained network keeps its frames and bands.

    Attributes:
      filters: filters of each convolution; their number is the number of layers.
      width: frames that a filter covers.
      kernel_bands: bands that a filter of each convolution covers; 0 is all, which leaves one.
      time_pools: frames of the max-pool after each convolution.
      band_pools: bands of the max-pool after each convolution.
      dense: units of the hidden dense layers.
      conv_dropout: rate after each max-pool.
      dropout: rate after each hidden dense layer.
    """

    filters: tuple[int, ...] = ()
    width: int = 4
    kernel_bands: tuple[int, ...] = ()
    time_pools: tuple[int, ...] = ()
    band_pools: tuple[int, ...] = ()
    dense: tuple[int, ...] = ()
    conv_dropout: float = 0.0
    dropout: float = 0.5

    @classmethod
    def input_limits(cls, fields: Mapping[str, Any]) -> InputLimits:
        """The fewest frames and bands that leave one position."""
        name, layers = cls.__name__.lower(), ("filters", "kernel_bands", "time_pools", "band_pools")
        check_lengths(name, fields, *layers)
        kernels, pools = tuple(fields["kernel_bands"]), tuple(fields["band_pools"])
        first = kernels.index(0) if 0 in kernels else len(kernels)
        rule = f"be 1 from the convolution on that covers all bands: model.kernel_bands={kernels}"
        check_field(name, fields, "band_pools", math.prod(pools[first:]) == 1, rule)
        return InputLimits(math.prod(fields["time_pools"]), math.prod(pools))

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        init = nn.initializers.glorot_uniform()
        options = {"use_bias": False, "kernel_init": init, "dtype": self.dtype}
        x = x.astype(self.dtype)[..., None]
        layers = zip(self.filters, self.kernel_bands, self.time_pools, self.band_pools, strict=True)
        for i, (filters, kernel, frames, bands) in enumerate(layers, start=1):
            size = (self.width, kernel or x.shape[2])
            padding = "SAME" if kernel else (((self.width - 1) // 2, self.width // 2), (0, 0))
            x = nn.Conv(filters, size, padding=padding, name=f"conv{i}", **options)(x)
            x = nn.elu(batch_norm(train, self.dtype, f"norm{i}")(x))
            x = max_pool(x, (frames, bands))
            x = nn.Dropout(self.conv_dropout, deterministic=not train, name=f"dropout{i}")(x)
        x = self.dense_layers(x.reshape(x.shape[0], -1), train, self.dense, init, nn.elu)
        return self.logits(x, init)


@register("k1c2")
class K1C2(ChoiCNN):
    """One-dimensional kernels over time that move over frames and bands; 499,615 parameters.

    No pool goes over the bands, so each band keeps its own features until the dense layers.
    """

    filters: tuple[int, ...] = (35, 35, 69, 69)
    kernel_bands: tuple[int, ...] = (1, 1, 1, 1)
    time_pools: tuple[int, ...] = (4, 5, 8, 8)
    band_pools: tuple[int, ...] = (1, 1, 1, 1)
    dense: tuple[int, ...] = (69, 69)


@register("k2c1")
class K2C1(ChoiCNN):
    """A first kernel over all bands that moves over time, then 1-D ones; 502,702 parameters."""

    filters: tuple[int, ...] = (106, 106, 106, 212, 212)
    kernel_bands: tuple[int, ...] = (0, 1, 1, 1, 1)
    time_pools: tuple[int, ...] = (4, 4, 4, 5, 4)
    band_pools: tuple[int, ...] = (1, 1, 1, 1, 1)
    dense: tuple[int, ...] = (212, 212)


@register("k2c2")
class K2C2(ChoiCNN):
    """Two-dimensional kernels, after FCN-5, without dense layers; 496,751 parameters."""

    filters: tuple[int, ...] = (47, 95, 95, 142, 190)
    width: int = 3
    kernel_bands: tuple[int, ...] = (3, 3, 3, 3, 3)
    time_pools: tuple[int, ...] = (4, 4, 4, 5, 4)
    band_pools: tuple[int, ...] = (2, 2, 2, 3, 4)
    conv_dropout: float = 0.1
