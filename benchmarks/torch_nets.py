"""The benchmarked networks in plain PyTorch, written as its users would write them.

Each has exactly the parameters of this project's network of the same name, in layers of the same
names, so that `load_flax` can copy weights. Inputs are `[batch, frames, bands]`, images inside
`[batch, channels, frames, bands]`, PyTorch's order.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def _conv(inputs: int, filters: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, filters, size, stride, padding=size // 2, bias=False)


class Conv1D(nn.Module):
    """`musicgenre.models.conv1d.Conv1D`."""

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
        for i, (inputs, width) in enumerate(itertools.pairwise((bands, *filters)), start=1):
            self.add_module(f"conv{i}", nn.Conv1d(inputs, width, 4, stride=2))
            frames = -(-frames // 2) // 2
        self.dense1 = nn.Linear(frames // 4 * 2 * filters[-1], dense)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(dense, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits, `[batch, num_classes]`."""
        x = x.transpose(1, 2)
        for i in range(1, self.depth + 1):
            # SAME padding of width 4 and stride 2; an odd frame goes to the end.
            x = F.pad(x, (1, 2) if x.shape[-1] % 2 else (1, 1))
            x = F.max_pool1d(F.relu(self.get_submodule(f"conv{i}")(x)), 2)
        x = torch.cat([F.max_pool1d(x, 4), F.avg_pool1d(x, 4)], dim=1).transpose(1, 2).flatten(1)
        return self.head(self.dropout(F.relu(self.dense1(x))))


class FCN(nn.Module):
    """`musicgenre.models.fcn.FCN`: FCN-4."""

    def __init__(self, num_classes: int):
        super().__init__()
        for i, (inputs, width) in enumerate(itertools.pairwise((1, 128, 384, 768, 2048)), start=1):
            self.add_module(f"conv{i}", _conv(inputs, width))
            self.add_module(f"norm{i}", nn.BatchNorm2d(width))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(2048, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits, `[batch, num_classes]`."""
        x = x[:, None]
        for i, pool in enumerate(((4, 2), (5, 4), (8, 3), (8, 4)), start=1):
            x = F.relu(self.get_submodule(f"norm{i}")(self.get_submodule(f"conv{i}")(x)))
            x = self.dropout(F.max_pool2d(x, pool))
        return self.head(x.amax(dim=(2, 3)))


class GRU(nn.Module):
    """Keras 1's GRU, as `musicgenre.models.crnn.GRU`.

    Its biases and its sigmoid differ from those of `torch.nn.GRU`.
    """

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
            inputs, new = frame.split([2 * self.units, self.units], dim=1)
            z, r = (0.2 * (inputs + h @ gates) + 0.5).clamp(0, 1).chunk(2, dim=1)
            h = z * h + (1 - z) * torch.tanh(new + (r * h) @ candidate)
            states.append(h)
        return torch.stack(states, dim=1)


class CRNN(nn.Module):
    """`musicgenre.models.crnn.CRNN`."""

    def __init__(self, num_classes: int, frames: int):
        super().__init__()
        self.input_norm = nn.BatchNorm1d(frames + 74)
        for i, (inputs, width) in enumerate(itertools.pairwise((1, 64, 128, 128, 128)), start=1):
            self.add_module(f"conv{i}", _conv(inputs, width))
            self.add_module(f"norm{i}", nn.BatchNorm2d(width))
        self.gru1, self.gru2 = GRU(128, 32), GRU(32, 32)
        self.conv_dropout, self.dropout = nn.Dropout(0.1), nn.Dropout(0.3)
        self.head = nn.Linear(32, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits, `[batch, num_classes]`."""
        x = self.input_norm(F.pad(x, (0, 0, 37, 37)))[:, None]
        for i, pool in enumerate((2, 3, 4, 4), start=1):
            x = F.elu(self.get_submodule(f"norm{i}")(self.get_submodule(f"conv{i}")(x)))
            x = self.conv_dropout(F.max_pool2d(x, pool))
        x = x.permute(0, 2, 3, 1).flatten(2)  # [batch, frames, bands * filters]
        return self.head(self.dropout(self.gru2(self.gru1(x))[:, -1]))


class ShortChunk(nn.Module):
    """`musicgenre.models.short_chunk.ShortChunk`, plain or residual."""

    def __init__(self, num_classes: int, residual: bool):
        super().__init__()
        self.residual = residual
        self.input_norm = nn.BatchNorm2d(1, affine=False)
        filters = (1, 128, 128, 256, 256, 256, 256, 512)
        for i, (inputs, width) in enumerate(itertools.pairwise(filters), start=1):
            layers = {"": (inputs, 1)}
            if residual:
                layers = {"a": (inputs, 2), "b": (width, 1), "_shortcut": (inputs, 2)}
            for suffix, (channels, stride) in layers.items():
                self.add_module(f"conv{i}{suffix}", _conv(channels, width, stride=stride))
                self.add_module(f"conv{i}{suffix}_norm", nn.BatchNorm2d(width))
        self.dense = nn.Linear(512, 512, bias=False)
        self.dense_norm = nn.BatchNorm1d(512)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(512, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits, `[batch, num_classes]`."""

        def conv(x: torch.Tensor, name: str) -> torch.Tensor:
            return self.get_submodule(f"{name}_norm")(self.get_submodule(name)(x))

        x = self.input_norm(x[:, None])
        for i in range(1, 8):
            if self.residual:
                y = conv(F.relu(conv(x, f"conv{i}a")), f"conv{i}b")
                x = F.relu(conv(x, f"conv{i}_shortcut") + y)
            else:
                x = F.max_pool2d(F.relu(conv(x, f"conv{i}")), 2)
        x = F.relu(self.dense_norm(self.dense(x.amax(dim=(2, 3)))))
        return self.head(self.dropout(x))


# Name, inputs, filters and stride of each unit of ResNet-18.
UNITS = [
    (f"stage{stage}_unit{unit}", filters // 2 if down else filters, filters, 2 if down else 1)
    for stage, filters in enumerate((64, 128, 256, 512), start=1)
    for unit, down in ((1, stage > 1), (2, False))
]


class ResNet(nn.Module):
    """`musicgenre.models.resnet.ResNet`: ResNet-18 with pre-activation and identity shortcuts."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.stem = _conv(1, 64, 7, 2)
        self.stem_norm = nn.BatchNorm2d(64)
        for name, inputs, width, stride in UNITS:
            if name != "stage1_unit1":
                self.add_module(f"{name}_in_norm", nn.BatchNorm2d(inputs))
            if stride > 1:
                self.add_module(f"{name}_shortcut", _conv(inputs, width, 1, stride))
            self.add_module(f"{name}_conv1", _conv(inputs, width, 3, stride))
            self.add_module(f"{name}_conv1_norm", nn.BatchNorm2d(width))
            self.add_module(f"{name}_conv2", _conv(width, width))
        self.last_norm = nn.BatchNorm2d(512)
        self.head = nn.Linear(512, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits, `[batch, num_classes]`."""
        layer = self.get_submodule
        x = F.max_pool2d(F.relu(self.stem_norm(self.stem(x[:, None]))), 3, stride=2, padding=1)
        for name, _, _, stride in UNITS:
            y = x if name == "stage1_unit1" else F.relu(layer(f"{name}_in_norm")(x))
            if stride > 1:
                x = layer(f"{name}_shortcut")(y)
            y = F.relu(layer(f"{name}_conv1_norm")(layer(f"{name}_conv1")(y)))
            x = x + layer(f"{name}_conv2")(y)
        return self.head(F.relu(self.last_norm(x)).mean(dim=(2, 3)))


def build(name: str, num_classes: int, frames: int, bands: int) -> nn.Module:
    """Returns a network by its name in `benchmarks._nets.NETS` or `TINY`."""
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
    return ResNet(num_classes)


# Of Flax, and of PyTorch.
LEAF_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def load_flax(module: nn.Module, variables: Mapping[str, Any]) -> None:
    """Copies a Flax network's variables into its PyTorch counterpart.

    Args:
      module: from `build`; changed in place.
      variables: `params` and, with batch normalisation, `batch_stats`.

    Raises:
      RuntimeError: a parameter is missing on either side, or its shape differs.
    """
    old = module.state_dict()
    state = {key: value for key, value in old.items() if key.endswith("num_batches_tracked")}
    for collection in ("params", "batch_stats"):
        for layer, leaves in variables.get(collection, {}).items():
            gru = isinstance(module.get_submodule(layer), GRU)
            for leaf, value in leaves.items():
                array = np.asarray(value, np.float32)
                if leaf == "kernel" and not gru:
                    # From [..., in, out] to [out, in, ...].
                    array = np.moveaxis(array, (-1, -2), (0, 1))
                state[f"{layer}.{leaf if gru else LEAF_NAMES[leaf]}"] = torch.tensor(array)
    module.load_state_dict(state)
