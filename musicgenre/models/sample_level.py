"""The sample-level network (Lee et al. 2017): convolutions of three samples straight on the waveform.

Sources: J. Lee, J. Park, K. L. Kim, J. Nam, "Sample-level deep convolutional neural networks for music auto-tagging using raw
waveforms", arXiv:1703.01789, whose 3^9 model this is; T. Kim, J. Lee, J. Nam, "Sample-level CNN architectures for music
auto-tagging using raw waveforms", 2018, arXiv:1710.10451, for squeeze and excitation.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.models.layers import batch_norm, max_pool_time
from musicgenre.models.registry import InputLimits, register


@register("sample_level")
class SampleLevel(nn.Module):
    """A strided convolution, nine times [convolution, normalisation, ReLU, max-pool], a convolution of width 1, and the head.

    It takes features of the kind "waveform": frames of consecutive samples, which are joined again. Every layer divides the
    time by 3, so that 3^10 = 59,049 samples (2.68 s at 22,050 Hz) end as one position. A longer input leaves several, whose
    mean the head takes; samples that do not fill a position are dropped.

    With 50 outputs it has 1,866,930 parameters. The authors' has 2,944 more: biases of its convolutions, which the normalisation
    after them makes idle.

    Attributes:
      num_classes: outputs.
      first_filters: filters of the strided convolution.
      filters: filters of each convolution that a max-pool follows; their number is the n of an m^n model.
      last_filters: filters of the convolution of width 1.
      width: samples of a filter, of the first stride and of a max-pool: the m of an m^n model.
      squeeze_excite: after each max-pool, weight the channels by what is in all of them (Kim et al.'s SE block). The further
        changes of their best model, features from several levels and a dense layer, are not included.
      excite_ratio: hidden units of that weighting for each channel.
      dropout: rate before the head.
      dtype: compute type.
    """

    num_classes: int
    first_filters: int = 128
    filters: tuple[int, ...] = (128, 128, 256, 256, 256, 256, 256, 256, 512)
    last_filters: int = 512
    width: int = 3
    squeeze_excite: bool = False
    excite_ratio: int = 16
    dropout: float = 0.5
    dtype: Any = jnp.float32

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """A waveform of at least the samples that leave one position."""
        return InputLimits(
            min_values=fields["width"] ** (len(fields["filters"]) + 1), kinds=("waveform",)
        )

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of samples `x` `[batch, frames, samples of a frame]`."""
        init = nn.initializers.he_uniform()

        def layer(x: jax.Array, filters: int, width: int, name: str, stride: int = 1) -> jax.Array:
            conv = nn.Conv(
                filters,
                (width,),
                (stride,),
                padding="VALID" if stride > 1 else "SAME",
                use_bias=False,
                kernel_init=init,
                dtype=self.dtype,
                name=name,
            )
            return nn.relu(batch_norm(train, self.dtype, name=f"{name}_norm")(conv(x)))

        x = layer(
            x.astype(self.dtype).reshape(x.shape[0], -1, 1),
            self.first_filters,
            self.width,
            "conv1",
            stride=self.width,
        )
        for i, filters in enumerate(self.filters):
            x = max_pool_time(layer(x, filters, self.width, f"conv{i + 2}"), self.width)
            if self.squeeze_excite:
                excited = nn.relu(
                    nn.Dense(filters * self.excite_ratio, dtype=self.dtype, name=f"squeeze{i + 2}")(
                        x.mean(axis=1)
                    )
                )
                x = (
                    x
                    * nn.sigmoid(
                        nn.Dense(filters, dtype=self.dtype, name=f"excite{i + 2}")(excited)
                    )[:, None]
                )
        x = layer(x, self.last_filters, 1, f"conv{len(self.filters) + 2}").mean(axis=1)
        self.sow("intermediates", "embedding", x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
        return x.astype(jnp.float32)
