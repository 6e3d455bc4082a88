"""The three convolutional networks that the CRNN was held against (Choi et al. 2017), each in the same sizes.

Their names say what the convolutions see: `k` one or two dimensions of the kernels, `c` one or two directions of movement.
They share one form, [convolution, normalisation, ELU, max-pool, dropout] several times, then dense layers on what is left.

Source: K. Choi, G. Fazekas, M. Sandler, K. Cho, "Convolutional recurrent neural networks for music classification", 2017,
arXiv:1609.04243. Its tables could not be opened. Kernels, pools and the widths of k2c1 and k2c2 are given from memory
(unverified); their counts come out at the paper's sizes. The widths of k1c2 are chosen so that its counts do.

`CHOI_SIZES` holds the paper's sizes, in parameters, as fields to change:

    config.model.update(CHOI_SIZES["k2c1"]["0.25M"])
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.errors import UserError
from musicgenre.models.layers import batch_norm, check_lengths, max_pool
from musicgenre.models.registry import InputLimits, register

_SIZES = ("0.1M", "0.25M", "0.5M", "1M", "3M")


def _k1c2(half: int, width: int) -> dict[str, Any]:
    return {"filters": (half, half, width, width), "dense": (width, width)}


def _k2c1(half: int, width: int) -> dict[str, Any]:
    return {"filters": (half, half, half, width, width), "dense": (width, width)}


def _k2c2(first: int, second: int, fourth: int, fifth: int) -> dict[str, Any]:
    return {"filters": (first, second, second, fourth, fifth)}


# Fields of each network in each size, for 1366 frames x 96 bands and 50 outputs. The sizes are met within 4 %.
CHOI_SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "k1c2": dict(
        zip(
            _SIZES,
            (_k1c2(15, 31), _k1c2(24, 49), _k1c2(35, 69), _k1c2(49, 98), _k1c2(85, 170)),
            strict=True,
        )
    ),
    "k2c1": dict(
        zip(
            _SIZES,
            (_k2c1(43, 87), _k2c1(72, 145), _k2c1(106, 212), _k2c1(152, 304), _k2c1(265, 535)),
            strict=True,
        )
    ),
    "k2c2": dict(
        zip(
            _SIZES,
            (
                _k2c2(20, 41, 62, 83),
                _k2c2(33, 66, 100, 133),
                _k2c2(47, 95, 142, 190),
                _k2c2(67, 135, 203, 271),
                _k2c2(118, 236, 355, 473),
            ),
            strict=True,
        )
    ),
}


class ChoiCNN(nn.Module):
    """The form that the three networks share; they differ in their fields' defaults.

    What the pools leave is laid out flat for the dense layers, so that the frames and bands of the first input hold for
    good, but any number above the least can be chosen.

    Attributes:
      num_classes: outputs.
      filters: filters of each convolution; their number is the number of layers.
      width: frames that a filter sees.
      kernel_bands: bands that a filter of each convolution sees; 0 is all there are, which leaves one.
      time_pools: frames of the max-pool after each convolution.
      band_pools: bands of the same.
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
          UserError: the fields that describe the convolutions differ in length, or one sees all bands and a later pool takes
            several.
        """
        check_lengths(
            cls.__name__.lower(), fields, "filters", "kernel_bands", "time_pools", "band_pools"
        )
        bands = 1
        for kernel, pool in zip(
            reversed(fields["kernel_bands"]), reversed(fields["band_pools"]), strict=True
        ):
            bands *= pool
            if kernel == 0:
                if bands > 1:
                    raise UserError(
                        "model.band_pools must be 1 from the convolution on that sees all bands (0 in model.kernel_bands): "
                        f"model.kernel_bands={tuple(fields['kernel_bands'])}, model.band_pools={tuple(fields['band_pools'])}."
                    )
                bands = 1
        return InputLimits(min_frames=math.prod(fields["time_pools"]), min_bands=bands)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        init = nn.initializers.glorot_uniform()
        x = x.astype(self.dtype)[..., None]
        layers = zip(self.filters, self.kernel_bands, self.time_pools, self.band_pools, strict=True)
        for i, (filters, kernel, frames, bands) in enumerate(layers, start=1):
            x = nn.Conv(
                filters,
                (self.width, kernel or x.shape[2]),
                padding="SAME" if kernel else (((self.width - 1) // 2, self.width // 2), (0, 0)),
                use_bias=False,
                kernel_init=init,
                dtype=self.dtype,
                name=f"conv{i}",
            )(x)
            x = nn.elu(batch_norm(train, self.dtype, name=f"norm{i}")(x))
            x = max_pool(x, (frames, bands))
            x = nn.Dropout(self.conv_dropout, deterministic=not train, name=f"dropout{i}")(x)
        x = x.reshape(x.shape[0], -1)
        for i, units in enumerate(self.dense, start=1):
            x = nn.elu(nn.Dense(units, kernel_init=init, dtype=self.dtype, name=f"dense{i}")(x))
            if i < len(self.dense):
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
        self.sow("intermediates", "embedding", x)
        if self.dense:
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="head")(
            x
        ).astype(jnp.float32)


@register("k1c2")
class K1C2(ChoiCNN):
    """One-dimensional kernels over time, which move over frames and bands; then two dense layers. 499,615 parameters.

    No pool goes over the bands, so each band has a feature of its own until the dense layers. Fields: see `ChoiCNN`.
    """

    filters: tuple[int, ...] = (35, 35, 69, 69)
    kernel_bands: tuple[int, ...] = (1, 1, 1, 1)
    time_pools: tuple[int, ...] = (4, 5, 8, 8)
    band_pools: tuple[int, ...] = (1, 1, 1, 1)
    dense: tuple[int, ...] = (69, 69)


@register("k2c1")
class K2C1(ChoiCNN):
    """A first kernel over all bands, which moves over time only; then one-dimensional ones, two dense layers. 502,702 parameters.

    Fields: see `ChoiCNN`.
    """

    filters: tuple[int, ...] = (106, 106, 106, 212, 212)
    kernel_bands: tuple[int, ...] = (0, 1, 1, 1, 1)
    time_pools: tuple[int, ...] = (4, 4, 4, 5, 4)
    band_pools: tuple[int, ...] = (1, 1, 1, 1, 1)
    dense: tuple[int, ...] = (212, 212)


@register("k2c2")
class K2C2(ChoiCNN):
    """Two-dimensional kernels that move over frames and bands, after FCN-5, without dense layers. 496,751 parameters.

    Fields: see `ChoiCNN`.
    """

    filters: tuple[int, ...] = (47, 95, 95, 142, 190)
    width: int = 3
    kernel_bands: tuple[int, ...] = (3, 3, 3, 3, 3)
    time_pools: tuple[int, ...] = (4, 4, 4, 5, 4)
    band_pools: tuple[int, ...] = (2, 2, 2, 3, 4)
    conv_dropout: float = 0.1
