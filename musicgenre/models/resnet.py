"""Residual networks: the report's for GTZAN, and the usual sizes.

Sources: K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image recognition", 2015,
arXiv:1512.03385 (the original units), and "Identity mappings in deep residual networks", 2016,
arXiv:1603.05027 (the identity units).

`RESNET_SIZES` holds the fields of each size: `config.model.update(RESNET_SIZES["resnet18"])`.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from musicgenre.models.layers import Conv, Network, batch_norm, check_field, max_pool_overlapping
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
class ResNet(Network):
    """A 7 x 7 convolution and a max-pool, stages of residual units, a global mean, and the head.

    The convolution and the max-pool have stride 2. A unit has two 3 x 3 convolutions, or as a
    bottleneck 1 x 1, 3 x 3 and 1 x 1 with four times the filters at the end. The first unit of each
    further stage has stride 2 (a bottleneck on its 3 x 3) and twice the filters. Where a unit
    changes the shape, its shortcut is a 1 x 1 convolution, otherwise the identity.

    The original units normalise after each convolution and apply ReLU after the sum. The identity
    units do both before each convolution and after the last unit; where the shape changes they come
    before the branch, and the shortcut has no normalisation. The defaults are those of the report's
    notebook: one unit in each of two stages, 308,426 parameters with 10 outputs.

    Attributes:
      blocks: residual units of each stage.
      bottleneck: bottleneck units.
      preactivation: identity units (He 2016) instead of the original ones (He 2015).
      filters: of the first convolution and the first stage; each further stage doubles them.
    """

    blocks: tuple[int, ...] = (1, 1)
    bottleneck: bool = False
    preactivation: bool = True
    filters: int = 64

    @staticmethod
    def input_limits(fields: Mapping[str, Any]) -> InputLimits:
        """Any input: padding keeps at least one position."""
        valid = min(fields["blocks"], default=0) >= 1
        check_field("resnet", fields, "blocks", valid, "have at least one unit for each stage")
        return InputLimits()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        options = {"kernel_init": nn.initializers.he_normal(), "dtype": self.dtype, "train": train}

        def conv(x: jax.Array, filters: int, size: int, stride: int, name: str) -> jax.Array:
            return Conv(filters, size, stride, name=name, **options)(x)

        def norm(
            x: jax.Array, name: str, plus: jax.Array | None = None, *, relu: bool = True
        ) -> jax.Array:
            return batch_norm(train, self.dtype, f"{name}_norm")(x, plus=plus, relu=relu)

        x = norm(conv(x.astype(self.dtype)[..., None], self.filters, 7, 2, "stem"), "stem")
        if train:
            x = max_pool_overlapping(x)
        else:
            x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, unit in [(s, u) for s, units in enumerate(self.blocks) for u in range(units)]:
            width, stride = self.filters * 2**stage, 2 if stage and not unit else 1
            # The convolutions of a unit: filters, size, stride.
            layers = [(width, 3, stride), (width, 3, 1)]
            if self.bottleneck:
                layers = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
            name = f"stage{stage + 1}_unit{unit + 1}"
            outputs, last = layers[-1][0], f"{name}_conv{len(layers)}"
            changes = stride > 1 or x.shape[-1] != outputs
            # The stem's output is normalised already.
            y = norm(x, f"{name}_in") if self.preactivation and (stage or unit) else x
            if changes:
                x = conv(y, outputs, 1, stride, f"{name}_shortcut")
            if changes and not self.preactivation:
                x = norm(x, f"{name}_shortcut", relu=False)
            for i, (filters, size, step) in enumerate(layers, start=1):
                y = conv(y, filters, size, step, f"{name}_conv{i}")
                if i < len(layers):
                    y = norm(y, f"{name}_conv{i}")
            x = x + y if self.preactivation else norm(y, last, plus=x)
        if self.preactivation:
            x = norm(x, "last")
        x = x.mean(axis=(1, 2))
        self.sow("intermediates", "embedding", x)
        return self.logits(x)
