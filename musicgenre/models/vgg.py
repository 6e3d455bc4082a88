"""The VGG-like network that musicnn is compared with: five small convolutions over 3 s.

Source: the public code of J. Pons, X. Serra, "musicnn: pre-trained convolutional neural networks
for music audio tagging", arXiv:1909.06654 (jordipons/musicnn, `models.py`), which follows
K. Simonyan, A. Zisserman, arXiv:1409.1556, and K. Choi et al., arXiv:1606.00298. The computation is
exactly that code's, so that its weights fit: each ReLU comes before its batch normalisation, whose
epsilon is .001, and the first pool, of 4 frames x 1 band and stride 2 x 2, skips every second band.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from musicgenre.models.layers import Network, max_pool, musicnn_norm
from musicgenre.models.registry import InputLimits, register


@register("vgg")
class Vgg(Network):
    """Five times [3 x 3 convolution, ReLU, normalisation, max-pool, dropout], and the head.

    The pools take 4 x 1 (stride 2 x 2), 2 x 2 three times, and 4 x 4. Of the original's 187 frames
    x 96 bands they leave 2 x 1; with 50 outputs that makes 605,748 parameters. The head depends on
    the number of frames.
    The embedding is the original's "pool5" feature, its frames one after the other.

    Attributes:
      filters: filters of each layer.
      layer_dropout: rate after each pool but the last.
      dropout: rate before the head.
    """

    filters: int = 128
    layer_dropout: float = 0.25
    dropout: float = 0.5

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """The fewest frames and bands that leave one position."""
        # The last pool takes 4, so the first has to leave 32.
        return InputLimits(min_frames=66, min_bands=63)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        init = nn.initializers.glorot_uniform()
        options = {"padding": "SAME", "kernel_init": init, "dtype": self.dtype}
        x = musicnn_norm(x[..., None], train, self.dtype, "input_norm")
        for i in range(1, 6):
            x = nn.relu(nn.Conv(self.filters, (3, 3), name=f"conv{i}", **options)(x))
            x = musicnn_norm(x, train, self.dtype, f"conv{i}_norm")
            if i == 1:
                x = nn.max_pool(x, window_shape=(4, 1), strides=(2, 2))
            else:
                x = max_pool(x, (4, 4) if i == 5 else (2, 2))
            if i < 5:
                x = nn.Dropout(self.layer_dropout, deterministic=not train)(x)
        x = x.reshape(x.shape[0], -1)
        return self.logits(self.embed(x, train), init)
