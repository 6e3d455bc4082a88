"""The three convolutional networks that the CRNN was compared with (Choi et al. 2017).

In their names, `k` counts the dimensions of the kernels and `c` the directions in which they move.
All repeat [convolution, normalisation, ELU, max-pool, dropout] and end in dense layers.

Source: K. Choi, G. Fazekas, M. Sandler, K. Cho, "Convolutional recurrent neural networks for music
classification", 2017, arXiv:1609.04243. Its tables could not be opened. Kernels, pools and the widths
of k2c1 and k2c2 are given from memory (unverified); their parameter counts match the paper's sizes.
The widths of k1c2 are chosen so that its counts do.

`CHOI_SIZES` holds the fields of each size, named by its number of parameters:

    config.model.update(CHOI_SIZES["k2c1"]["0.25M"])
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.errors import UserError
from musicgenre.models.layers import batch_norm, check_lengths, dense_layers, max_pool, output_layer
from musicgenre.models.registry import InputLimits, register


def _k1c2(half: int, width: int) -> dict[str, Any]:
    return {"filters": (half, half, width, width), "dense": (width, width)}


def _k2c1(half: int, width: int) -> dict[str, Any]:
    return {"filters": (half, half, half, width, width), "dense": (width, width)}


# Fields for 1366 frames x 96 bands and 50 outputs. The counts are within 4 % of the sizes.
CHOI_SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "k1c2": {
        "0.1M": _k1c2(15, 31),
        "0.25M": _k1c2(24, 49),
        "0.5M": _k1c2(35, 69),
        "1M": _k1c2(49, 98),
        "3M": _k1c2(85, 170),
    },
    "k2c1": {
        "0.1M": _k2c1(43, 87),
        "0.25M": _k2c1(72, 145),
        "0.5M": _k2c1(106, 212),
        "1M": _k2c1(152, 304),
        "3M": _k2c1(265, 535),
    },
    "k2c2": {
        "0.1M": {"filters": (20, 41, 41, 62, 83)},
        "0.25M": {"filters": (33, 66, 66, 100, 133)},
        "0.5M": {"filters": (47, 95, 95, 142, 190)},
        "1M": {"filters": (67, 135, 135, 203, 271)},
        "3M": {"filters": (118, 236, 236, 355, 473)},
    },
}


class ChoiCNN(nn.Module):
    """The form of the three networks, which differ in their fields' defaults.

    The dense layers take what the pools leave, so a trained network keeps its frames and bands.

    Attributes:
      num_classes: outputs.
      filters: filters of each convolution; their number is the number of layers.
      width: frames that a filter covers.
      kernel_bands: bands that a filter of each convolution covers; 0 is all, which leaves one.
      time_pools: frames of the max-pool after each convolution.
      band_pools: bands of the max-pool after each convolution.
      dense: units of the hidden dense layers.
      conv_dropout: rate after each max-pool.
      dropout: rate after each hidden dense layer.
      dtype: compute type.
    """

    num_classes: int
    filters: tuple[int, ...] = ()
    width: int = 4
    kernel_bands: tuple[int, ...] = ()
    time_pools: tuple[int, ...] = ()
    band_pools: tuple[int, ...] = ()
    dense: tuple[int, ...] = ()
    conv_dropout: float = 0.0
    dropout: float = 0.5
    dtype: Any = jnp.float32

    @classmethod
    def input_limits(cls, fields: Mapping[str, Any]) -> InputLimits:
        """The fewest frames and bands that leave one position.

        Raises:
          UserError: the fields of the convolutions differ in length, or a pool takes several bands
            after a filter that covers all.
        """
        layers = ("filters", "kernel_bands", "time_pools", "band_pools")
        check_lengths(cls.__name__.lower(), fields, *layers)
        kernels, pools = tuple(fields["kernel_bands"]), tuple(fields["band_pools"])
        bands = 1
        for kernel, pool in zip(reversed(kernels), reversed(pools), strict=True):
            bands *= pool
            if kernel == 0 and bands > 1:
                raise UserError(
                    "model.band_pools must be 1 from the convolution on that covers all bands (0 in "
                    f"model.kernel_bands): model.kernel_bands={kernels}, model.band_pools={pools}."
                )
        return InputLimits(min_frames=math.prod(fields["time_pools"]), min_bands=bands)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        init = nn.initializers.glorot_uniform()
        x = x.astype(self.dtype)[..., None]
        layers = zip(self.filters, self.kernel_bands, self.time_pools, self.band_pools, strict=True)
        for i, (filters, kernel, frames, bands) in enumerate(layers, start=1):
            conv = nn.Conv(
                filters,
                (self.width, kernel or x.shape[2]),
                padding="SAME" if kernel else (((self.width - 1) // 2, self.width // 2), (0, 0)),
                use_bias=False,
                kernel_init=init,
                dtype=self.dtype,
                name=f"conv{i}",
            )
            x = nn.elu(batch_norm(train, self.dtype, name=f"norm{i}")(conv(x)))
            x = max_pool(x, (frames, bands))
            x = nn.Dropout(self.conv_dropout, deterministic=not train, name=f"dropout{i}")(x)
        x = x.reshape(x.shape[0], -1)
        x = dense_layers(self, x, train, self.dense, init, activation=nn.elu)
        return output_layer(self, x, init)


@register("k1c2")
class K1C2(ChoiCNN):
    """One-dimensional kernels over time that move over frames and bands; 499,615 parameters.

    No pool goes over the bands, so each band keeps its own features until the dense layers. Fields:
    see `ChoiCNN`.
    """

    filters: tuple[int, ...] = (35, 35, 69, 69)
    kernel_bands: tuple[int, ...] = (1, 1, 1, 1)
    time_pools: tuple[int, ...] = (4, 5, 8, 8)
    band_pools: tuple[int, ...] = (1, 1, 1, 1)
    dense: tuple[int, ...] = (69, 69)


@register("k2c1")
class K2C1(ChoiCNN):
    """A first kernel over all bands that moves over time, then one-dimensional ones.

    It has 502,702 parameters. Fields: see `ChoiCNN`.
    """

    filters: tuple[int, ...] = (106, 106, 106, 212, 212)
    kernel_bands: tuple[int, ...] = (0, 1, 1, 1, 1)
    time_pools: tuple[int, ...] = (4, 4, 4, 5, 4)
    band_pools: tuple[int, ...] = (1, 1, 1, 1, 1)
    dense: tuple[int, ...] = (212, 212)


@register("k2c2")
class K2C2(ChoiCNN):
    """Two-dimensional kernels over frames and bands, after FCN-5, without dense layers.

    It has 496,751 parameters. Fields: see `ChoiCNN`.
    """

    filters: tuple[int, ...] = (47, 95, 95, 142, 190)
    width: int = 3
    kernel_bands: tuple[int, ...] = (3, 3, 3, 3, 3)
    time_pools: tuple[int, ...] = (4, 4, 4, 5, 4)
    band_pools: tuple[int, ...] = (2, 2, 2, 3, 4)
    conv_dropout: float = 0.1
