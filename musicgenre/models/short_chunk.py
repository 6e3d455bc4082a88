"""The short-chunk networks (Won et al. 2020): seven small convolutions over 3.7 s.

Source: M. Won, A. Ferraro, D. Bogdanov, X. Serra, "Evaluation of CNN-based automatic music tagging
models", 2020, arXiv:2006.00751, and the authors' public code, which settles what the paper leaves
open.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.models.layers import (
    BatchNorm,
    Conv,
    Network,
    batch_norm,
    convolve_together,
    global_max,
    max_pool,
)
from musicgenre.models.registry import InputLimits, register


@register("short_chunk")
class ShortChunk(Network):
    """Seven layers that halve frames and bands, a global maximum, a dense layer, and the head.

    A plain layer is [convolution, normalisation, ReLU, max-pool 2]. A residual one is [convolution
    of stride 2, normalisation, ReLU, convolution, normalisation] plus [convolution of stride 2,
    normalisation], then ReLU. A pool drops an odd last frame, a stride keeps it.

    It leaves 1 x 1 (residual: 2 x 1) of 231 frames x 128 bands (3.69 s at 16 kHz, n_fft 512, hop
    256). With 50 outputs it has 3,685,042 parameters, residual 12,098,354; the public code's 3.69
    and 12.1 million also count biases and an input scale that normalisation cancels.

    Attributes:
      filters: filters of each layer; their number is the number of layers.
      residual: residual layers.
      dense: units of the hidden dense layer.
      dropout: rate before the head.
      input_norm: normalise the input with one mean and standard deviation.
    """

    filters: tuple[int, ...] = (128, 128, 256, 256, 256, 256, 512)
    residual: bool = False
    dense: int = 512
    dropout: float = 0.5
    input_norm: bool = True

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """A pool rounds frames and bands down, a stride rounds up."""
        least = 1 if fields["residual"] else 2 ** len(fields["filters"])
        return InputLimits(min_frames=least, min_bands=least)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        options = {"kernel_init": nn.initializers.he_normal(), "dtype": self.dtype, "train": train}

        def norm(name: str) -> BatchNorm:
            return batch_norm(train, self.dtype, f"{name}_norm")

        x = x[..., None]
        if self.input_norm:
            # In float32, since the input may be dB far from 0.
            x = batch_norm(train, jnp.float32, "input_norm", use_scale=False, use_bias=False)(x)
        x = x.astype(self.dtype)
        for i, filters in enumerate(self.filters, start=1):
            name = f"conv{i}"
            if self.residual:
                first = Conv(filters, stride=2, name=f"{name}a", **options)
                shortcut = Conv(filters, stride=2, name=f"{name}_shortcut", **options)
                y, x = convolve_together(x, first, shortcut)
                y = Conv(filters, name=f"{name}b", **options)(norm(f"{name}a")(y, relu=True))
                x = norm(f"{name}b")(y, plus=norm(f"{name}_shortcut")(x), relu=True)
            else:
                x = Conv(filters, name=name, **options)(x)
                x = max_pool(norm(name)(x, relu=True), (2, 2))
        x = nn.Dense(self.dense, use_bias=False, dtype=self.dtype, name="dense")(global_max(x))
        x = norm("dense")(x, relu=True)
        return self.logits(self.embed(x, train))
