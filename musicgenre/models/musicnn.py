"""musicnn (Pons and Serra 2019): filters shaped after timbre and rhythm, then layers over time that see all before them.

Source: J. Pons, X. Serra, "musicnn: pre-trained convolutional neural networks for music audio tagging", arXiv:1909.06654, and
its public code (jordipons/musicnn, `models.py`). The computation is that code's to the letter, so that its weights fit: each
ReLU comes before its batch normalisation, whose epsilon is .001, and convolutions and dense layers have a bias, which is not
idle as there is a ReLU between the two. The one idle parameter is the bias of mid3_norm, which pool_norm takes away again; it
stays, so that the weights fit.

The variables of its checkpoints (MTT_musicnn and MSD_musicnn) correspond thus:

    original (kernel, bias)     here                    original (gamma, beta, moving_*)    here
    -                           -                       batch_normalization                 input_norm
    conv2d                      timbral1                batch_normalization_1               timbral1_norm
    conv2d_1                    timbral2                batch_normalization_2               timbral2_norm
    conv2d_2                    temporal1               batch_normalization_3               temporal1_norm
    conv2d_3                    temporal2               batch_normalization_4               temporal2_norm
    conv2d_4                    temporal3               batch_normalization_5               temporal3_norm
    conv2d_5                    mid1                    batch_normalization_6               mid1_norm
    conv2d_6                    mid2                    batch_normalization_7               mid2_norm
    conv2d_7                    mid3                    batch_normalization_8               mid3_norm
    -                           -                       batch_normalization_9               pool_norm
    dense                       dense1                  batch_normalization_10              dense1_norm
    dense_1                     head                    -                                   -

`kernel` and `bias` keep their names; `gamma` is `scale` and `beta` is `bias` in `params`; `moving_mean` is `mean` and
`moving_variance` is `var` in `batch_stats`. All shapes are equal but for the kernels of mid1 to mid3, `[7, channels, 1, 64]`
in the original, which lack the axis of length 1 here: `[7, channels, 64]`.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.errors import UserError
from musicgenre.models.layers import global_max
from musicgenre.models.registry import InputLimits, register


@register("musicnn")
class Musicnn(nn.Module):
    """Timbral and temporal filters side by side, residual layers over time, global maximum and mean, and a dense head.

    With 96 bands and 50 outputs it has 787,159 parameters; the number of frames does not matter to them. The original takes
    187 frames (3 s at 16 kHz and a hop of 256) of `log10(1 + 10000 * mel power)`. `mid_filters=512, dense=500` is its big one.

    The embedding is the original's "penultimate" feature: the dense layer after its ReLU and batch normalisation.

    Attributes:
      num_classes: outputs.
      timbral_filters: filters of each height that listen to a spectral shape, wherever it lies.
      timbral_heights: share of the bands that they see, rounded down.
      timbral_width: frames that they see.
      temporal_filters: filters of each length that listen to one band at a time.
      temporal_widths: frames that they see.
      mid_filters: filters of each layer over time.
      mid_width: frames that these see.
      mid_layers: how many there are; all but the first add their input.
      dense: units of the hidden dense layer.
      dropout: rate before the dense layer and before the head.
      dtype: compute type.
    """

    num_classes: int
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
    dtype: Any = jnp.float32

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """The fewest bands of which every timbral filter sees at least one; any number of frames will do.

        Raises:
          UserError: a height that is not a share.
        """
        bands = 1
        for height in fields["timbral_heights"]:
            if not 0 < height <= 1:
                raise UserError(
                    f"model.timbral_heights of 'musicnn' must be above 0 and at most 1, not {height:g}."
                )
            while int(height * bands) < 1:
                bands += 1
        return InputLimits(min_bands=bands)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        init = nn.initializers.glorot_uniform()
        bands = x.shape[2]

        def norm(x: jax.Array, name: str) -> jax.Array:
            return nn.BatchNorm(
                use_running_average=not train,
                momentum=0.99,
                epsilon=1e-3,
                dtype=self.dtype,
                name=name,
            )(x)

        def layer(
            x: jax.Array, filters: int, size: tuple[int, ...], padding: Any, name: str
        ) -> jax.Array:
            conv = nn.Conv(
                filters, size, padding=padding, kernel_init=init, dtype=self.dtype, name=name
            )
            return norm(nn.relu(conv(x)), f"{name}_norm")

        x = norm(x[..., None], "input_norm")
        # Time is padded after the normalisation, with its zeros; the bands are not, as the maximum over all of them follows.
        before, after = (self.timbral_width - 1) // 2, self.timbral_width // 2
        features = []
        for i, height in enumerate(self.timbral_heights):
            size = (self.timbral_width, int(height * bands))
            shapes = layer(
                x, self.timbral_filters, size, ((before, after), (0, 0)), f"timbral{i + 1}"
            )
            features.append(_max_over_bands(shapes))
        for i, width in enumerate(self.temporal_widths):
            features.append(
                _max_over_bands(
                    layer(x, self.temporal_filters, (width, 1), "SAME", f"temporal{i + 1}")
                )
            )
        # From here on each is [batch, frames, channels].
        features = [jnp.concatenate(features, axis=-1)]
        for i in range(self.mid_layers):
            deeper = layer(features[-1], self.mid_filters, (self.mid_width,), "SAME", f"mid{i + 1}")
            features.append(deeper + features[-1] if i else deeper)
        x = jnp.concatenate(features, axis=-1)
        # Maximum and mean of a channel lie next to each other, as the original's flattening leaves them.
        x = jnp.stack([global_max(x), x.mean(axis=1)], axis=-1).reshape(x.shape[0], -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(norm(x, "pool_norm"))
        x = nn.relu(nn.Dense(self.dense, kernel_init=init, dtype=self.dtype, name="dense1")(x))
        x = norm(x, "dense1_norm")
        self.sow("intermediates", "embedding", x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="head")(x)
        return x.astype(jnp.float32)


def _max_over_bands(x: jax.Array) -> jax.Array:
    """Maximum over the bands of each frame, `[batch, frames, bands, channels]` to `[batch, frames, channels]`."""
    batch, frames, bands, channels = x.shape
    return global_max(x.reshape(batch * frames, bands, channels)).reshape(batch, frames, channels)
