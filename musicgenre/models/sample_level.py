"""The sample-level network (Lee et al. 2017): convolutions of three samples on the waveform.

Sources: J. Lee, J. Park, K. L. Kim, J. Nam, "Sample-level deep convolutional neural networks for
music auto-tagging using raw waveforms", arXiv:1703.01789, whose 3^9 model this is; T. Kim, J. Lee,
J. Nam, "Sample-level CNN architectures for music auto-tagging using raw waveforms", 2018,
arXiv:1710.10451, for squeeze and excitation.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from musicgenre.models.layers import Network, batch_norm, max_pool
from musicgenre.models.registry import InputLimits, register


@register("sample_level")
class SampleLevel(Network):
    """A strided convolution, nine times [convolution, normalisation, ReLU, max-pool], and the head.

    It takes features of the type "waveform": frames of consecutive samples, which are joined. Every
    layer divides the time by 3, so that 3^10 = 59,049 samples (2.68 s at 22,050 Hz) end as one
    position. The head takes the mean of several. With 50 outputs it has 1,866,930 parameters. The
    authors' has 2,944 more: biases of its convolutions, which normalisation cancels.

    Attributes:
      first_filters: filters of the strided convolution.
      filters: of each convolution that a max-pool follows; their number is the n of an m^n model.
      last_filters: filters of the convolution of width 1 before the head.
      width: samples of a filter, of the first stride and of a max-pool: the m of an m^n model.
      squeeze_excite: weight the channels after each max-pool (Kim et al.'s SE block). The other
        changes of their best model are not included.
      excite_ratio: hidden units of that weighting per channel.
      dropout: rate before the head.
    """

    first_filters: int = 128
    filters: tuple[int, ...] = (128, 128, 256, 256, 256, 256, 256, 256, 512)
    last_filters: int = 512
    width: int = 3
    squeeze_excite: bool = False
    excite_ratio: int = 16
    dropout: float = 0.5

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """A waveform of at least the samples that leave one position."""
        samples = fields["width"] ** (len(fields["filters"]) + 1)
        return InputLimits(min_values=samples, kinds=("waveform",))

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of samples `x` `[batch, frames, hop]`."""
        init, dtype = nn.initializers.he_uniform(), self.dtype
        options: dict[str, Any] = {"use_bias": False, "kernel_init": init, "dtype": dtype}
        x = x.astype(self.dtype).reshape(x.shape[0], -1, 1)
        last = len(self.filters) + 2
        all_filters = (self.first_filters, *self.filters, self.last_filters)
        for i, filters in enumerate(all_filters, start=1):
            stride, name = self.width if i == 1 else 1, f"conv{i}"
            size = (1 if i == last else self.width,)
            padding = "VALID" if stride > 1 else "SAME"
            conv = nn.Conv(filters, size, stride, padding, name=name, **options)
            x = nn.relu(batch_norm(train, dtype, f"{name}_norm")(conv(x)))
            if i in (1, last):
                continue
            x = max_pool(x, (self.width,))
            if self.squeeze_excite:
                hidden = filters * self.excite_ratio
                squeeze = nn.Dense(hidden, dtype=dtype, name=f"squeeze{i}")
                excite = nn.Dense(filters, dtype=dtype, name=f"excite{i}")
                x = x * nn.sigmoid(excite(nn.relu(squeeze(x.mean(axis=1)))))[:, None]
        x = x.mean(axis=1)
        return self.logits(self.embed(x, train))
