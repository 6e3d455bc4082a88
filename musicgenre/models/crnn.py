"""The convolutional recurrent network (Choi et al. 2017): four convolutions, two recurrent layers.

Source: K. Choi, G. Fazekas, M. Sandler, K. Cho, "Convolutional recurrent neural networks for music
classification", 2017, arXiv:1609.04243, and the authors' public Keras 1 code, which settles what
the paper leaves open. See `choi_cnn` for the networks that the paper compares.

`CRNN_SIZES` holds the fields of each size: `config.model.update(CRNN_SIZES["0.5M"])`.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.models.layers import Conv, Network, batch_norm, check_field, check_lengths, max_pool
from musicgenre.models.registry import InputLimits, register

# Frames of the public code's input. Its input normalisation has a scale for each of them.
_FRAMES = 1366
_INPUT_NORMS = ("time", "band", "none")

# Filters of the first and of the other convolutions, from memory of the paper's table (unverified).
_SIZES = {"0.1M": (30, 60), "0.25M": (48, 96), "0.5M": (68, 137), "1M": (96, 195), "3M": (169, 339)}
# Fields for 1366 frames x 96 bands and 50 outputs. The counts are within 1 % of the sizes.
CRNN_SIZES: dict[str, dict[str, Any]] = {
    size: {"filters": (a, b, b, b), "units": (a, a)} for size, (a, b) in _SIZES.items()
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
        """Returns all states, `[batch, frames, units]`, of `x` `[batch, frames, inputs]`."""
        inputs, units = x.shape[-1], self.units
        glorot, orthogonal = nn.initializers.glorot_uniform(), nn.initializers.orthogonal()
        kernel = self.param("kernel", _by_gate(glorot), (inputs, 3 * units))
        recurrent = self.param("recurrent_kernel", _by_gate(orthogonal), (units, 3 * units))
        bias = self.param("bias", nn.initializers.zeros, (3 * units,))
        arrays = nn.dtypes.promote_dtype(x, kernel, recurrent, bias, dtype=self.dtype)
        x, kernel, recurrent, bias = arrays
        gates, candidate = recurrent[:, : 2 * units], recurrent[:, 2 * units :]

        def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            a = x[:, : 2 * units] + h @ gates
            z, r = jnp.split(jnp.clip(0.2 * a + 0.5, 0.0, 1.0), 2, axis=-1)
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


@register("crnn")
class CRNN(Network):
    """Four times [convolution, normalisation, ELU, max-pool, dropout], then recurrent layers.

    The pools leave 15 frames x 1 band x 128 filters of 1366 frames x 96 bands (29.1 s at 12 kHz,
    hop 256). Further bands are concatenated in each frame. With 50 outputs it has 396,338
    parameters, and with `conv_bias` the 396,786 of the public code.

    Attributes:
      pad: frames of zeros before and after the clip, each.
      input_norm: "time" normalises and scales each frame of the padded input, as the public code
        does, so it takes exactly 1366. "band" normalises each band before the padding, and "none"
        nothing; both take any number of frames.
      filters: filters of each convolution; their number is the number of layers.
      time_pools: frames of the max-pool after each convolution.
      band_pools: bands of the max-pool after each convolution.
      conv_bias: give the convolutions the public code's biases. Normalisation cancels them, and
        Adam amplifies their rounding noise.
      units: units of each recurrent layer; the last state of the last one is the embedding.
      conv_dropout: rate after each max-pool.
      dropout: rate before the head.
    """

    pad: int = 37
    input_norm: str = "time"
    filters: tuple[int, ...] = (64, 128, 128, 128)
    time_pools: tuple[int, ...] = (2, 3, 4, 4)
    band_pools: tuple[int, ...] = (2, 3, 4, 4)
    conv_bias: bool = False
    units: tuple[int, ...] = (32, 32)
    conv_dropout: float = 0.1
    dropout: float = 0.3

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """1366 frames, or the fewest that leave one; the fewest bands that leave one."""
        check_lengths("crnn", fields, "filters", "time_pools", "band_pools")
        norm, rule = fields["input_norm"], f"be one of {', '.join(_INPUT_NORMS)}"
        check_field("crnn", fields, "input_norm", norm in _INPUT_NORMS, rule)
        least = max(math.prod(fields["time_pools"]) - 2 * fields["pad"], 1)
        least, most = (_FRAMES, _FRAMES) if norm == "time" else (least, 0)
        return InputLimits(least, math.prod(fields["band_pools"]), max_frames=most)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        init = nn.initializers.glorot_uniform()
        options = {"use_bias": self.conv_bias, "kernel_init": init, "dtype": self.dtype}
        if self.input_norm == "band":
            x = batch_norm(train, jnp.float32, "input_norm")(x)
        x = jnp.pad(x, ((0, 0), (self.pad, self.pad), (0, 0)))
        if self.input_norm == "time":
            x = batch_norm(train, jnp.float32, "input_norm", axis=1)(x)
        x = x.astype(self.dtype)[..., None]
        pools = zip(self.filters, self.time_pools, self.band_pools, strict=True)
        for i, (filters, frames, bands) in enumerate(pools, start=1):
            x = Conv(filters, train=train, name=f"conv{i}", **options)(x)
            x = nn.elu(batch_norm(train, self.dtype, f"norm{i}")(x))
            x = max_pool(x, (frames, bands))
            x = nn.Dropout(self.conv_dropout, deterministic=not train, name=f"dropout{i}")(x)
        x = x.reshape(*x.shape[:2], -1)
        for i, units in enumerate(self.units, start=1):
            x = GRU(units, dtype=self.dtype, name=f"gru{i}")(x)
        return self.logits(self.embed(x[:, -1], train), init)
