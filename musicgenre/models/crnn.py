"""The convolutional recurrent network (Choi et al. 2017): four convolutions, two recurrent layers.

Source: K. Choi, G. Fazekas, M. Sandler, K. Cho, "Convolutional recurrent neural networks for music
classification", 2017, arXiv:1609.04243, and the authors' public Keras 1 code, which settles what the
paper leaves open.

`CRNN_SIZES` holds the fields of each of the paper's sizes, named by its number of parameters; see
`choi_cnn` for the networks that the paper compares.

    config.model.update(CRNN_SIZES["0.5M"])
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.errors import UserError, did_you_mean
from musicgenre.models.layers import Conv, batch_norm, check_lengths, max_pool, output_layer
from musicgenre.models.registry import InputLimits, register

# Frames of the public code's input. Its input normalisation has a scale for each of them.
_FRAMES = 1366
_INPUT_NORMS = ("time", "band", "none")


def _size(first: int, width: int) -> dict[str, Any]:
    return {"filters": (first, width, width, width), "units": (first, first)}


# Fields for 1366 frames x 96 bands and 50 outputs, from memory of the paper's table (unverified).
# Their counts are within 1 % of its sizes.
CRNN_SIZES: dict[str, dict[str, Any]] = {
    "0.1M": _size(30, 60),
    "0.25M": _size(48, 96),
    "0.5M": _size(68, 137),
    "1M": _size(96, 195),
    "3M": _size(169, 339),
}


class GRU(nn.Module):
    """A gated recurrent layer as in Keras 1: one bias per gate, reset before the recurrent product.

    Of the input `x` and the state `h`: `z = s(x Wz + h Uz + bz)`, `r = s(x Wr + h Ur + br)`,
    `c = tanh(x Wh + (r h) Uh + bh)`, and the new state is `z h + (1 - z) c`. `s` is Keras's hard
    sigmoid, `0.2 a + 0.5` between 0 and 1. It has `3 (inputs units + units^2 + units)` parameters;
    `nn.GRUCell` has more biases and a smooth sigmoid.

    Attributes:
      units: size of the state.
      dtype: compute type.
    """

    units: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns every frame's state, `[batch, frames, units]`, of `x` `[batch, frames, inputs]`."""
        inputs, units = x.shape[-1], self.units
        glorot, orthogonal = nn.initializers.glorot_uniform(), nn.initializers.orthogonal()
        kernel = self.param("kernel", _by_gate(glorot), (inputs, 3 * units))
        recurrent = self.param("recurrent_kernel", _by_gate(orthogonal), (units, 3 * units))
        bias = self.param("bias", nn.initializers.zeros, (3 * units,))
        x, kernel, recurrent, bias = nn.dtypes.promote_dtype(
            x, kernel, recurrent, bias, dtype=self.dtype
        )
        gates, candidate = recurrent[:, : 2 * units], recurrent[:, 2 * units :]

        def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            z, r = jnp.split(_hard_sigmoid(x[:, : 2 * units] + h @ gates), 2, axis=-1)
            c = jnp.tanh(x[:, 2 * units :] + (r * h) @ candidate)
            h = z * h + (1 - z) * c
            return h, h

        start = jnp.zeros((x.shape[0], units), x.dtype)
        _, states = jax.lax.scan(step, start, (x @ kernel + bias).swapaxes(0, 1))
        return states.swapaxes(0, 1)


def _by_gate(init: Any) -> Any:
    """Returns an initialiser of three gates' kernels next to each other, drawn separately."""

    def draw(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
        shape = (shape[0], shape[1] // 3)
        return jnp.concatenate([init(k, shape, dtype) for k in jax.random.split(key, 3)], axis=1)

    return draw


def _hard_sigmoid(a: jax.Array) -> jax.Array:
    return jnp.clip(0.2 * a + 0.5, 0.0, 1.0)


@register("crnn")
class CRNN(nn.Module):
    """Four times [convolution, normalisation, ELU, max-pool, dropout], recurrent layers, and the head.

    The pools leave 15 frames x 1 band x 128 filters of 1366 frames x 96 bands (29.1 s at 12 kHz, hop
    256). Remaining bands are concatenated in each frame, so more bands can be used.

    With 50 outputs it has 396,338 parameters, and with `conv_bias` the 396,786 of the public code.

    Attributes:
      num_classes: outputs.
      pad: frames of zeros before and after the clip, each.
      input_norm: "time" normalises each frame of the padded input over clips and bands and then scales
        it, as the public code does; the scales belong to their frames, so it takes exactly 1366. "band"
        normalises each band before the padding, and "none" nothing; both take any number of frames.
      filters: filters of each convolution; their number is the number of layers.
      time_pools: frames of the max-pool after each convolution.
      band_pools: bands of the max-pool after each convolution.
      conv_bias: give the convolutions the public code's biases. Normalisation cancels them, and Adam
        amplifies their rounding noise.
      units: units of each recurrent layer; the last state of the last one is the embedding.
      conv_dropout: rate after each max-pool.
      dropout: rate before the head.
      dtype: compute type.
    """

    num_classes: int
    pad: int = 37
    input_norm: str = "time"
    filters: tuple[int, ...] = (64, 128, 128, 128)
    time_pools: tuple[int, ...] = (2, 3, 4, 4)
    band_pools: tuple[int, ...] = (2, 3, 4, 4)
    conv_bias: bool = False
    units: tuple[int, ...] = (32, 32)
    conv_dropout: float = 0.1
    dropout: float = 0.3
    dtype: Any = jnp.float32

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """1366 frames, or the fewest that leave one after padding; the fewest bands that leave one.

        Raises:
          UserError: `input_norm` is unknown, or the fields of the convolutions differ in length.
        """
        check_lengths("crnn", fields, "filters", "time_pools", "band_pools")
        if (norm := fields["input_norm"]) not in _INPUT_NORMS:
            raise UserError(
                f"model.input_norm: {norm!r} is not known." + did_you_mean(norm, _INPUT_NORMS)
            )
        frames = max(math.prod(fields["time_pools"]) - 2 * fields["pad"], 1)
        bands = math.prod(fields["band_pools"])
        if norm == "time":
            return InputLimits(min_frames=_FRAMES, max_frames=_FRAMES, min_bands=bands)
        return InputLimits(min_frames=frames, min_bands=bands)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        init = nn.initializers.glorot_uniform()
        if self.input_norm == "band":
            x = batch_norm(train, jnp.float32, name="input_norm")(x)
        x = jnp.pad(x, ((0, 0), (self.pad, self.pad), (0, 0)))
        if self.input_norm == "time":
            x = batch_norm(train, jnp.float32, name="input_norm", axis=1)(x)
        x = x.astype(self.dtype)[..., None]
        pools = zip(self.filters, self.time_pools, self.band_pools, strict=True)
        for i, (filters, frames, bands) in enumerate(pools, start=1):
            conv = Conv(
                filters,
                train=train,
                use_bias=self.conv_bias,
                kernel_init=init,
                dtype=self.dtype,
                name=f"conv{i}",
            )
            x = nn.elu(batch_norm(train, self.dtype, name=f"norm{i}")(conv(x)))
            x = max_pool(x, (frames, bands))
            x = nn.Dropout(self.conv_dropout, deterministic=not train, name=f"dropout{i}")(x)
        x = x.reshape(*x.shape[:2], -1)
        for i, units in enumerate(self.units, start=1):
            x = GRU(units, dtype=self.dtype, name=f"gru{i}")(x)
        x = x[:, -1]
        self.sow("intermediates", "embedding", x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return output_layer(self, x, init)
