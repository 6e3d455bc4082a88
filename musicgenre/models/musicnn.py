"""musicnn (Pons and Serra 2019): filters shaped after timbre and rhythm, then layers over time.

Source: J. Pons, X. Serra, "musicnn: pre-trained convolutional neural networks for music audio
tagging", arXiv:1909.06654, and its public code (jordipons/musicnn, `models.py`). The computation is
exactly that code's, so that its weights fit: each ReLU comes before its batch normalisation, whose
epsilon is .001, and convolutions and dense layers have a bias. The bias of mid3_norm has no effect,
since pool_norm cancels it, and is kept for the same reason.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.models.layers import Network, check_field, global_max, musicnn_norm
from musicgenre.models.registry import InputLimits, register


@register("musicnn")
class Musicnn(Network):
    """Parallel timbral and temporal filters, residual layers over time, pools, and dense layers.

    With 96 bands and 50 outputs it has 787,159 parameters for any number of frames. The original
    takes 187 frames (3 s at 16 kHz and a hop of 256) of `log10(1 + 10000 * mel power)`. Its big
    version is `mid_filters=512, dense=500`. The embedding is its "penultimate" feature: the dense
    layer after ReLU and batch normalisation.

    Attributes:
      timbral_filters: filters of each height, for a spectral shape at any position.
      timbral_heights: fraction of the bands that they cover, rounded down.
      timbral_width: frames that they cover.
      temporal_filters: filters of each length, which cover one band.
      temporal_widths: frames that they cover.
      mid_filters: filters of each layer over time.
      mid_width: frames that these cover.
      mid_layers: number of these layers; all but the first add their input.
      dense: units of the hidden dense layer.
      dropout: rate before the dense layer and before the head.
    """

    timbral_filters: int = 204
    timbral_heights: tuple[float, ...] = (0.4, 0.7)
    timbral_width: int = 7
    temporal_filters: int = 51
    temporal_widths: tuple[int, ...] = (128, 64, 32)
    mid_filters: int = 64
    mid_width: int = 7
    mid_layers: int = 3
    dense: int = 200
    dropout: float = 0.5

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """The fewest bands of which every timbral filter covers at least one."""
        bands = 1
        for height in fields["timbral_heights"]:
            rule = "be above 0 and at most 1"
            check_field("musicnn", fields, "timbral_heights", 0 < height <= 1, rule)
            while int(height * bands) < 1:
                bands += 1
        return InputLimits(min_bands=bands)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        init = nn.initializers.glorot_uniform()
        bands = x.shape[2]

        def norm(x: jax.Array, name: str) -> jax.Array:
            return musicnn_norm(x, train, self.dtype, f"{name}_norm")

        def layer(x: jax.Array, name: str, filters: int, size: Any, pad: Any = "SAME") -> jax.Array:
            conv = nn.Conv(filters, size, 1, pad, kernel_init=init, dtype=self.dtype, name=name)
            return norm(nn.relu(conv(x)), name)

        x = norm(x[..., None], "input")
        # Time is padded with zeros after the normalisation; the bands are not padded, since the
        # maximum over all of them follows.
        padding = (((self.timbral_width - 1) // 2, self.timbral_width // 2), (0, 0))
        maps = []
        for i, height in enumerate(self.timbral_heights, start=1):
            size = (self.timbral_width, int(height * bands))
            maps.append(layer(x, f"timbral{i}", self.timbral_filters, size, padding))
        for i, width in enumerate(self.temporal_widths, start=1):
            maps.append(layer(x, f"temporal{i}", self.temporal_filters, (width, 1)))
        # From here on each is [batch, frames, channels].
        features = [jnp.concatenate([_max_over_bands(y) for y in maps], axis=-1)]
        for i in range(self.mid_layers):
            deeper = layer(features[-1], f"mid{i + 1}", self.mid_filters, (self.mid_width,))
            features.append(deeper + features[-1] if i else deeper)
        x = jnp.concatenate(features, axis=-1)
        # Maximum and mean of a channel are next to each other, as in the original.
        x = jnp.stack([global_max(x), x.mean(axis=1)], axis=-1).reshape(x.shape[0], -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(norm(x, "pool"))
        x = nn.relu(nn.Dense(self.dense, kernel_init=init, dtype=self.dtype, name="dense1")(x))
        x = norm(x, "dense1")
        return self.logits(self.embed(x, train), init)


def _max_over_bands(x: jax.Array) -> jax.Array:
    """Maximum over bands, `[batch, frames, bands, channels]` to `[batch, frames, channels]`."""
    batch, frames, bands, channels = x.shape
    return global_max(x.reshape(batch * frames, bands, channels)).reshape(batch, frames, channels)
