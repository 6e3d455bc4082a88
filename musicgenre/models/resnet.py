"""Residual networks: the report's for GTZAN, and the usual sizes.

Sources: K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image recognition", 2015, arXiv:1512.03385 (the original
units), and "Identity mappings in deep residual networks", 2016, arXiv:1603.05027 (the identity units).

`RESNET_SIZES` holds the usual sizes, as fields to change. In a config and in a sweep:

    config.model.update(RESNET_SIZES["resnet18"])
    yield "resnet18", {f"model.{field}": value for field, value in RESNET_SIZES["resnet18"].items()}
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicgenre.errors import UserError
from musicgenre.models.layers import Conv, batch_norm, max_pool_overlapping
from musicgenre.models.registry import InputLimits, register

RESNET_SIZES: dict[str, dict[str, Any]] = {
    "report": {"blocks": (1, 1), "bottleneck": False},
    "resnet18": {"blocks": (2, 2, 2, 2), "bottleneck": False},
    "resnet34": {"blocks": (3, 4, 6, 3), "bottleneck": False},
    "resnet50": {"blocks": (3, 4, 6, 3), "bottleneck": True},
    "resnet101": {"blocks": (3, 4, 23, 3), "bottleneck": True},
    "resnet152": {"blocks": (3, 8, 36, 3), "bottleneck": True},
}


@register("resnet")
class ResNet(nn.Module):
    """A 7 x 7 convolution and a max-pool, both of stride 2, stages of residual units, the mean over all positions, and the head.

    A unit has two convolutions of 3 x 3, or as a bottleneck 1 x 1, 3 x 3 and 1 x 1 with four times the filters at the end. The
    first unit of each further stage has stride 2 (a bottleneck on its 3 x 3) and twice the filters. Where a unit changes the
    shape, its shortcut is a convolution of 1 x 1; elsewhere it is the input as it is.

    The original units normalise after each convolution and apply ReLU after the sum. The identity units normalise and apply
    ReLU before each convolution, so that nothing but sums lies on the way through a stage; one more normalisation and ReLU
    follow the last unit. Where the shape changes they come before the fork, and the shortcut has no normalisation.

    The defaults are those of the report's notebook: one unit in each of two stages, 308,426 parameters with 10 outputs.

    Attributes:
      num_classes: outputs.
      blocks: residual units of each stage.
      bottleneck: bottleneck units.
      preactivation: identity units (He 2016), or else the original ones (He 2015).
      filters: filters of the first convolution and the first stage; each further stage doubles them.
      dtype: compute type.
    """

    num_classes: int
    blocks: tuple[int, ...] = (1, 1)
    bottleneck: bool = False
    preactivation: bool = True
    filters: int = 64
    dtype: Any = jnp.float32

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """Any input: padding keeps at least one position.

        Raises:
          UserError: a stage has no units.
        """
        if not fields["blocks"] or min(fields["blocks"]) < 1:
            raise UserError(
                f"model.blocks of 'resnet' takes at least one unit for each stage, not {tuple(fields['blocks'])}."
            )
        return InputLimits()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""

        def conv(x: jax.Array, filters: int, size: int, stride: int, name: str) -> jax.Array:
            init = nn.initializers.he_normal()
            return Conv(
                filters, size, stride, train=train, kernel_init=init, dtype=self.dtype, name=name
            )(x)

        def norm(
            x: jax.Array, name: str, plus: jax.Array | None = None, *, relu: bool = True
        ) -> jax.Array:
            return batch_norm(train, self.dtype, name=f"{name}_norm")(x, plus=plus, relu=relu)

        x = conv(x.astype(self.dtype)[..., None], self.filters, 7, 2, "stem")
        x = norm(x, "stem")
        if train:
            x = max_pool_overlapping(x)
        else:
            x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, units in enumerate(self.blocks):
            width = self.filters * 2**stage
            for unit in range(units):
                stride = 2 if stage and not unit else 1
                # The convolutions of a unit: filters, size, stride.
                if self.bottleneck:
                    layers = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
                else:
                    layers = [(width, 3, stride), (width, 3, 1)]
                name = f"stage{stage + 1}_unit{unit + 1}"
                changes = stride > 1 or x.shape[-1] != layers[-1][0]
                y = x
                if self.preactivation:
                    # What comes from the stem is normalised already.
                    if stage or unit:
                        y = norm(x, f"{name}_in")
                    if changes:
                        x = conv(y, layers[-1][0], 1, stride, f"{name}_shortcut")
                elif changes:
                    x = norm(
                        conv(x, layers[-1][0], 1, stride, f"{name}_shortcut"),
                        f"{name}_shortcut",
                        relu=False,
                    )
                for i, (filters, size, step) in enumerate(layers, start=1):
                    y = conv(y, filters, size, step, f"{name}_conv{i}")
                    if i < len(layers):
                        y = norm(y, f"{name}_conv{i}")
                x = x + y if self.preactivation else norm(y, f"{name}_conv{len(layers)}", plus=x)
        if self.preactivation:
            x = norm(x, "last")
        x = x.mean(axis=(1, 2))
        self.sow("intermediates", "embedding", x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)
