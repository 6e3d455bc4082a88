"""AlexNet over spectrograms, after Gwardys and Grzywczak (2014), who reused a network of that kind for music genre.

Sources: A. Krizhevsky, I. Sutskever, G. Hinton, "ImageNet classification with deep convolutional neural networks", 2012;
G. Gwardys, D. Grzywczak, "Deep image features in music information retrieval", 2014, who fed spectrograms as pictures to such a
network trained on ImageNet and classified its features. Here the picture is the spectrogram itself, with one channel and of
any size from 57 x 57 on, so what is transferred is a network trained on other music. Layer names are stable, so that weights
can be carried over by name: conv1 to conv5, dense1, dense2 and head.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.errors import UserError
from musicgenre.models.registry import InputLimits, register


def local_response_norm(
    x: jax.Array, size: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75
) -> jax.Array:
    """Divides each activation by a power of the energy in the channels beside it (Krizhevsky 2012, section 3.3).

    Args:
      x: `[..., channels]`.
      size: the paper's n: `size // 2` channels on each side count, fewer at the first and last channel.
      k: constant under the power.
      alpha: factor of the sum of squares; not divided by `size`, as some libraries do.
      beta: exponent.

    Returns:
      `x / (k + alpha * sum of squares) ** beta` in the type of `x`; the sum is taken in float32.
    """
    half = size // 2
    squares = jnp.square(x.astype(jnp.float32))
    padded = jnp.pad(squares, [(0, 0)] * (x.ndim - 1) + [(half, half)])
    energy = sum(padded[..., i : i + x.shape[-1]] for i in range(2 * half + 1))
    return (x * (k + alpha * energy) ** -beta).astype(x.dtype)


def grouped_convolution(
    x: jax.Array, kernel: jax.Array, *window: Any, feature_group_count: int = 1, **options: Any
) -> jax.Array:
    """Equals `jax.lax.conv_general_dilated`, whose groups are about ten times slower on CPU than one call for each group.

    Args:
      x: `[batch, ..., channels]`.
      kernel: `[..., channels / groups, filters]`.
      *window: strides and padding.
      feature_group_count: groups of channels and filters that do not see each other.
      **options: the others of `jax.lax.conv_general_dilated`.
    """
    pairs = zip(
        *(jnp.split(part, feature_group_count, axis=-1) for part in (x, kernel)), strict=True
    )
    groups = [
        jax.lax.conv_general_dilated(part, filters, *window, **options) for part, filters in pairs
    ]
    return jnp.concatenate(groups, axis=-1)


@register("alexnet")
class AlexNet(nn.Module):
    """Five convolutions, overlapping max-pools after the first, second and fifth, and three dense layers.

    Convolutions are padded (SAME) and pools are not, so an axis of n becomes ceil(n / 4), and (n - 3) // 2 + 1 at each of the
    three pools. Flattened, 387 frames x 128 bands leave 11 x 3 x 256 values and 647 x 128 leave 19 x 3 x 256. For 10 classes
    that is 53,740,234 and 78,906,058 parameters, nearly all of them in dense1.

    Attributes:
      num_classes: outputs.
      filters: filters of each convolution; their number is the number of layers.
      widths: frames and bands that a filter of each layer sees.
      stride: frames and bands from one position of a first filter to the next.
      grouped: convolutions, counted from 1, in two halves that do not see each other, as on the original's two GPUs.
      response_norm: convolutions that local response normalisation follows; empty for none.
      pool_after: convolutions that a max-pool follows.
      pool: frames and bands of a max-pool.
      pool_stride: frames and bands from one pool to the next; below `pool` they overlap.
      dense: units of the hidden dense layers.
      dropout: rate after each hidden dense layer.
      dtype: compute type.
    """

    num_classes: int
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
    dtype: Any = jnp.float32

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """The fewest frames and bands that leave one window for the last pool.

        Raises:
          UserError: fields that do not belong together.
        """
        layers = len(fields["filters"])
        if len(fields["widths"]) != layers:
            raise UserError(
                f"model.widths of 'alexnet' needs a width for each of the {layers} filters, not {fields['widths']}."
            )
        for name in ("grouped", "response_norm", "pool_after"):
            if wrong := [number for number in fields[name] if not 1 <= number <= layers]:
                raise UserError(
                    f"model.{name} of 'alexnet' names convolution {wrong[0]}; they are 1 to {layers}."
                )
        for number in fields["grouped"]:
            if number == 1 or any(
                filters % 2 for filters in fields["filters"][number - 2 : number]
            ):
                raise UserError(
                    f"model.grouped of 'alexnet': convolution {number} cannot be halved. It needs an even number of filters, and "
                    "so does the one before it."
                )
        size = 1
        for number in range(layers, 0, -1):
            if number in fields["pool_after"]:
                size = (size - 1) * fields["pool_stride"] + fields["pool"]
            if number == 1:
                size = (size - 1) * fields["stride"] + 1
        return InputLimits(min_frames=size, min_bands=size)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        init = nn.initializers.he_normal()
        x = x.astype(self.dtype)[..., None]
        for number, (filters, width) in enumerate(
            zip(self.filters, self.widths, strict=True), start=1
        ):
            stride = self.stride if number == 1 else 1
            x = nn.Conv(
                filters,
                (width, width),
                (stride, stride),
                padding="SAME",
                feature_group_count=2 if number in self.grouped else 1,
                conv_general_dilated=grouped_convolution,
                kernel_init=init,
                dtype=self.dtype,
                name=f"conv{number}",
            )(x)
            x = nn.relu(x)
            if number in self.response_norm:
                x = local_response_norm(x)
            if number in self.pool_after:
                x = nn.max_pool(
                    x,
                    window_shape=(self.pool, self.pool),
                    strides=(self.pool_stride, self.pool_stride),
                )
        x = x.reshape(x.shape[0], -1)
        embedding = x
        for i, units in enumerate(self.dense):
            embedding = nn.relu(
                nn.Dense(units, kernel_init=init, dtype=self.dtype, name=f"dense{i + 1}")(x)
            )
            x = nn.Dropout(self.dropout, deterministic=not train)(embedding)
        self.sow("intermediates", "embedding", embedding)
        # As in the original; the larger spread of the other layers would start far from equal scores.
        small = nn.initializers.normal(0.01)
        x = nn.Dense(self.num_classes, kernel_init=small, dtype=self.dtype, name="head")(x)
        return x.astype(jnp.float32)
