"""AlexNet on spectrograms, after Gwardys and Grzywczak (2014).

Sources: A. Krizhevsky, I. Sutskever, G. Hinton, "ImageNet classification with deep convolutional
neural networks", 2012; G. Gwardys, D. Grzywczak, "Deep image features in music information
retrieval", 2014, who fed spectrograms as images to such a network, trained on ImageNet, and
classified its features. Here the image is the spectrogram itself, with one channel and at least 57
x 57, so a transferred network is one trained on other music.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.models.layers import Network, check_field
from musicgenre.models.registry import InputLimits, register


def local_response_norm(
    x: jax.Array, size: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75
) -> jax.Array:
    """Divides activations by a power of the neighbouring channels' energy (Krizhevsky 2012, 3.3).

    Returns `x / (k + alpha * sum of squares) ** beta` for `x` `[..., channels]`, in its type. The
    sum is taken in float32 over the channel and `size // 2` on each side, fewer at the ends.
    """
    half = size // 2
    squares = jnp.square(x.astype(jnp.float32))
    padded = jnp.pad(squares, [(0, 0)] * (x.ndim - 1) + [(half, half)])
    energy = sum(padded[..., i : i + x.shape[-1]] for i in range(2 * half + 1))
    return (x * (k + alpha * energy) ** -beta).astype(x.dtype)


def grouped_convolution(
    x: jax.Array, kernel: jax.Array, *window: Any, feature_group_count: int = 1, **options: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated` by one call per group, about ten times faster on CPU.

    `x` is `[batch, ..., channels]` and `kernel` `[..., channels / groups, filters]`.
    """
    parts = (jnp.split(part, feature_group_count, axis=-1) for part in (x, kernel))
    convolve = jax.lax.conv_general_dilated
    groups = [convolve(*pair, *window, **options) for pair in zip(*parts, strict=True)]
    return jnp.concatenate(groups, axis=-1)


@register("alexnet")
class AlexNet(Network):
    """Five convolutions, overlapping max-pools after the first, second and fifth, and dense layers.

    Convolutions are padded (SAME) and pools are not, so an axis of n becomes ceil(n / 4), and
    (n - 3) // 2 + 1 at each of the three pools: 387 frames x 128 bands leave 11 x 3 x 256 values
    and 647 x 128 leave 19 x 3 x 256. With 10 classes that is 53,740,234 and 78,906,058 parameters,
    nearly all of them in dense1.

    Attributes:
      filters: filters of each convolution.
      widths: frames and bands that a filter of each convolution covers.
      stride: of the first convolution.
      grouped: convolutions, counted from 1, in two separate halves, as on the original's two GPUs.
      response_norm: convolutions that local response normalisation follows.
      pool_after: convolutions that a max-pool follows.
      pool: frames and bands of a max-pool.
      pool_stride: frames and bands from one pool to the next; below `pool` they overlap.
      dense: units of the hidden dense layers.
      dropout: rate after each hidden dense layer.
    """

    filters: tuple[int, ...] = (96, 256, 384, 384, 256)
    widths: tuple[int, ...] = (11, 5, 3, 3, 3)
    stride: int = 4
    grouped: tuple[int, ...] = (2, 4, 5)
    response_norm: tuple[int, ...] = (1, 2)
    pool_after: tuple[int, ...] = (1, 2, 5)
    pool: int = 3
    pool_stride: int = 2
    dense: tuple[int, ...] = (4096, 4096)
    dropout: float = 0.5

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """The fewest frames and bands that leave one window for the last pool."""
        filters = fields["filters"]
        layers = range(1, len(filters) + 1)
        rule = f"have a width for each of the {len(filters)} filters"
        check_field("alexnet", fields, "widths", len(fields["widths"]) == len(filters), rule)
        for name in ("grouped", "response_norm", "pool_after"):
            rule = f"name convolutions from 1 to {len(filters)}"
            check_field("alexnet", fields, name, all(n in layers for n in fields[name]), rule)
        halves = all(
            n > 1 and not any(f % 2 for f in filters[n - 2 : n]) for n in fields["grouped"]
        )
        rule = "name later convolutions that have, as the one before, an even number of filters"
        check_field("alexnet", fields, "grouped", halves, rule)
        size = 1
        for number in reversed(layers):
            if number in fields["pool_after"]:
                size = (size - 1) * fields["pool_stride"] + fields["pool"]
        size = (size - 1) * fields["stride"] + 1
        return InputLimits(min_frames=size, min_bands=size)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        init = nn.initializers.he_normal()
        pool, strides = (self.pool, self.pool), (self.pool_stride, self.pool_stride)
        x = x.astype(self.dtype)[..., None]
        for i, (filters, width) in enumerate(zip(self.filters, self.widths, strict=True), start=1):
            stride = self.stride if i == 1 else 1
            conv = nn.Conv(
                filters,
                (width, width),
                (stride, stride),
                feature_group_count=2 if i in self.grouped else 1,
                conv_general_dilated=grouped_convolution,
                kernel_init=init,
                dtype=self.dtype,
                name=f"conv{i}",
            )
            x = nn.relu(conv(x))
            if i in self.response_norm:
                x = local_response_norm(x)
            if i in self.pool_after:
                x = nn.max_pool(x, window_shape=pool, strides=strides)
        x = x.reshape(x.shape[0], -1)
        x = self.dense_layers(x, train, self.dense, init)
        # As in the original; the other layers' larger values would start far from equal scores.
        return self.logits(x, nn.initializers.normal(0.01))
