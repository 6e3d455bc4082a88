"""The benchmarked networks in plain PyTorch, written as its users would: what the training step is measured against.

Each has the parameters of this project's network of the same name, no more and no fewer, and its layers carry the same names,
so that `load_flax` can copy the weights over. Inputs are `[batch, frames, bands]`, as here; images inside are
`[batch, channels, frames, bands]`, PyTorch's order.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def _conv(inputs: int, filters: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, filters, size, stride, padding=size // 2, bias=False)


class Conv1D(nn.Module):
    """`musicgenre.models.conv1d.Conv1D` with its default fields."""

    def __init__(
        self,
        num_classes: int,
        frames: int,
        bands: int,
        filters: tuple[int, ...] = (256, 256, 256),
        dense: int = 2048,
    ):
        super().__init__()
        self.depth = len(filters)
        inputs = bands
        for i, width in enumerate(filters, start=1):
            self.add_module(f"conv{i}", nn.Conv1d(inputs, width, 4, stride=2))
            inputs, frames = width, -(-frames // 2) // 2
        self.dense1 = nn.Linear(frames // 4 * 2 * inputs, dense)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(dense, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits, `[batch, num_classes]`."""
        x = x.transpose(1, 2)
        for i in range(1, self.depth + 1):
            # SAME padding of width 4 and stride 2: what is missing goes to the end first.
            missing = 3 if x.shape[-1] % 2 else 2
            x = F.pad(x, (missing // 2, missing - missing // 2))
            x = F.max_pool1d(F.relu(self.get_submodule(f"conv{i}")(x)), 2)
        x = torch.cat([F.max_pool1d(x, 4), F.avg_pool1d(x, 4)], dim=1).transpose(1, 2).flatten(1)
        return self.head(self.dropout(F.relu(self.dense1(x))))


class FCN(nn.Module):
    """`musicgenre.models.fcn.FCN` with its default fields, FCN-4."""

    def __init__(
        self,
        num_classes: int,
        filters: tuple[int, ...] = (128, 384, 768, 2048),
        pools: tuple[tuple[int, int], ...] = ((4, 2), (5, 4), (8, 3), (8, 4)),
    ):
        super().__init__()
        self.pools = pools
        inputs = 1
        for i, width in enumerate(filters, start=1):
            self.add_module(f"conv{i}", _conv(inputs, width))
            self.add_module(f"norm{i}", nn.BatchNorm2d(width))
            inputs = width
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits, `[batch, num_classes]`."""
        x = x[:, None]
        for i, pool in enumerate(self.pools, start=1):
            x = F.relu(self.get_submodule(f"norm{i}")(self.get_submodule(f"conv{i}")(x)))
            x = self.dropout(F.max_pool2d(x, pool))
        return self.head(x.amax(dim=(2, 3)))


class GRU(nn.Module):
    """`musicgenre.models.crnn.GRU`: Keras 1's, which differs from `torch.nn.GRU` in its biases and its sigmoid."""

    def __init__(self, inputs: int, units: int):
        super().__init__()
        self.units = units
        self.kernel = nn.Parameter(torch.empty(inputs, 3 * units))
        self.recurrent_kernel = nn.Parameter(torch.empty(units, 3 * units))
        self.bias = nn.Parameter(torch.zeros(3 * units))
        nn.init.xavier_uniform_(self.kernel)
        nn.init.orthogonal_(self.recurrent_kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the state after every frame, `[batch, frames, units]`."""
        gates, candidate = self.recurrent_kernel.split([2 * self.units, self.units], dim=1)
        h = x.new_zeros(x.shape[0], self.units)
        states = []
        for frame in (x @ self.kernel + self.bias).unbind(1):
            z, r = (
                (0.2 * (frame[:, : 2 * self.units] + h @ gates) + 0.5).clamp(0, 1).chunk(2, dim=1)
            )
            h = z * h + (1 - z) * torch.tanh(frame[:, 2 * self.units :] + (r * h) @ candidate)
            states.append(h)
        return torch.stack(states, dim=1)


class CRNN(nn.Module):
    """`musicgenre.models.crnn.CRNN` with its default fields."""

    def __init__(
        self,
        num_classes: int,
        frames: int,
        filters: tuple[int, ...] = (64, 128, 128, 128),
        units: int = 32,
    ):
        super().__init__()
        self.depth = len(filters)
        self.input_norm = nn.BatchNorm1d(frames + 74)
        inputs = 1
        for i, width in enumerate(filters, start=1):
            self.add_module(f"conv{i}", _conv(inputs, width))
            self.add_module(f"norm{i}", nn.BatchNorm2d(width))
            inputs = width
        self.gru1, self.gru2 = GRU(inputs, units), GRU(units, units)
        self.conv_dropout, self.dropout = nn.Dropout(0.1), nn.Dropout(0.3)
        self.head = nn.Linear(units, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits, `[batch, num_classes]`."""
        x = self.input_norm(F.pad(x, (0, 0, 37, 37)))[:, None]
        for i, pool in zip(range(1, self.depth + 1), (2, 3, 4, 4), strict=True):
            x = F.elu(self.get_submodule(f"norm{i}")(self.get_submodule(f"conv{i}")(x)))
            x = self.conv_dropout(F.max_pool2d(x, pool))
        # A frame holds its bands side by side, each with all filters.
        x = x.permute(0, 2, 3, 1).flatten(2)
        return self.head(self.dropout(self.gru2(self.gru1(x))[:, -1]))


class ShortChunk(nn.Module):
    """`musicgenre.models.short_chunk.ShortChunk` with its default fields, plain or residual."""

    def __init__(
        self,
        num_classes: int,
        residual: bool,
        filters: tuple[int, ...] = (128, 128, 256, 256, 256, 256, 512),
        dense: int = 512,
    ):
        super().__init__()
        self.residual, self.depth = residual, len(filters)
        self.input_norm = nn.BatchNorm2d(1, affine=False)
        inputs = 1
        for i, width in enumerate(filters, start=1):
            if residual:
                layers = {
                    f"conv{i}a": (inputs, 2),
                    f"conv{i}b": (width, 1),
                    f"conv{i}_shortcut": (inputs, 2),
                }
            else:
                layers = {f"conv{i}": (inputs, 1)}
            for name, (channels, stride) in layers.items():
                self.add_module(name, _conv(channels, width, stride=stride))
                self.add_module(f"{name}_norm", nn.BatchNorm2d(width))
            inputs = width
        self.dense = nn.Linear(inputs, dense, bias=False)
        self.dense_norm = nn.BatchNorm1d(dense)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(dense, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits, `[batch, num_classes]`."""

        def conv(x: torch.Tensor, name: str) -> torch.Tensor:
            return self.get_submodule(f"{name}_norm")(self.get_submodule(name)(x))

        x = self.input_norm(x[:, None])
        for i in range(1, self.depth + 1):
            if self.residual:
                x = F.relu(
                    conv(x, f"conv{i}_shortcut") + conv(F.relu(conv(x, f"conv{i}a")), f"conv{i}b")
                )
            else:
                x = F.max_pool2d(F.relu(conv(x, f"conv{i}")), 2)
        x = F.relu(self.dense_norm(self.dense(x.amax(dim=(2, 3)))))
        return self.head(self.dropout(x))


class ResNet(nn.Module):
    """`musicgenre.models.resnet.ResNet` with plain units of two convolutions and identity shortcuts."""

    def __init__(self, num_classes: int, blocks: tuple[int, ...], filters: int = 64):
        super().__init__()
        self.blocks = blocks
        self.stem = _conv(1, filters, 7, 2)
        self.stem_norm = nn.BatchNorm2d(filters)
        inputs = filters
        for name, width, stride in self._units():
            if name != "stage1_unit1":
                self.add_module(f"{name}_in_norm", nn.BatchNorm2d(inputs))
            if stride > 1 or inputs != width:
                self.add_module(f"{name}_shortcut", _conv(inputs, width, 1, stride))
            self.add_module(f"{name}_conv1", _conv(inputs, width, 3, stride))
            self.add_module(f"{name}_conv1_norm", nn.BatchNorm2d(width))
            self.add_module(f"{name}_conv2", _conv(width, width))
            inputs = width
        self.last_norm = nn.BatchNorm2d(inputs)
        self.head = nn.Linear(inputs, num_classes)

    def _units(self) -> list[tuple[str, int, int]]:
        """Name, filters and stride of each unit."""
        return [
            (
                f"stage{stage + 1}_unit{unit + 1}",
                self.stem.out_channels * 2**stage,
                2 if stage and not unit else 1,
            )
            for stage, units in enumerate(self.blocks)
            for unit in range(units)
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits, `[batch, num_classes]`."""
        layer = self.get_submodule
        x = F.max_pool2d(F.relu(self.stem_norm(self.stem(x[:, None]))), 3, stride=2, padding=1)
        for name, _, _ in self._units():
            y = x if name == "stage1_unit1" else F.relu(layer(f"{name}_in_norm")(x))
            if hasattr(self, f"{name}_shortcut"):
                x = layer(f"{name}_shortcut")(y)
            y = F.relu(layer(f"{name}_conv1_norm")(layer(f"{name}_conv1")(y)))
            x = x + layer(f"{name}_conv2")(y)
        return self.head(F.relu(self.last_norm(x)).mean(dim=(2, 3)))


def build(name: str, num_classes: int, frames: int, bands: int) -> nn.Module:
    """Returns a benchmarked network by its name in `benchmarks._nets.NETS`; "tiny" is that of the dry run."""
    if name == "conv1d":
        return Conv1D(num_classes, frames, bands)
    if name == "tiny":
        return Conv1D(num_classes, frames, bands, (4, 8), 8)
    if name == "fcn4":
        return FCN(num_classes)
    if name == "crnn":
        return CRNN(num_classes, frames)
    if name.startswith("short_chunk"):
        return ShortChunk(num_classes, residual=name == "short_chunk_res")
    return ResNet(num_classes, (2, 2, 2, 2))


def load_flax(module: nn.Module, variables: Mapping[str, Any]) -> None:
    """Copies a Flax network's variables into its counterpart.

    Args:
      module: of `build`; changed in place.
      variables: `params` and, where there is normalisation, `batch_stats`.

    Raises:
      RuntimeError: a parameter is missing on either side, or its shape differs.
    """
    names = {
        "kernel": "weight",
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
    }
    state = {
        key: value
        for key, value in module.state_dict().items()
        if key.endswith("num_batches_tracked")
    }
    for collection in ("params", "batch_stats"):
        for layer, leaves in variables.get(collection, {}).items():
            for leaf, value in leaves.items():
                array = np.asarray(value, np.float32)
                if isinstance(module.get_submodule(layer), GRU):
                    state[f"{layer}.{leaf}"] = torch.tensor(array)
                    continue
                if leaf == "kernel":
                    # [..., in, out] here, [out, in, ...] there.
                    array = np.moveaxis(array, (-1, -2), (0, 1))
                state[f"{layer}.{names[leaf]}"] = torch.tensor(array)
    module.load_state_dict(state)
