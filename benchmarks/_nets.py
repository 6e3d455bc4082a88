"""The networks that are benchmarked, with the inputs they are meant for."""

import dataclasses
from typing import Any

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Net:
    """A network.

    Attributes:
      model: its section of a config.
      clip_frames: frames of a clip in the store.
      crop_frames: frames of a crop; 0 takes whole clips.
      bands: mel bands.
      cpu_batch: clips of a batch with which a round takes seconds on a CPU.
      bar: how many times PyTorch's time a training step may take on a CPU.
    """

    model: dict[str, Any]
    clip_frames: int
    crop_frames: int
    bands: int
    cpu_batch: int
    bar: float = 1.15

    @property
    def frames(self) -> int:
        """Frames of an input."""
        return self.crop_frames or self.clip_frames


NETS = {
    "conv1d": Net({"name": "conv1d"}, 647, 0, 128, 32, 1.0),
    "fcn4": Net({"name": "fcn"}, 1366, 0, 96, 4),
    "crnn": Net({"name": "crnn"}, 1366, 0, 96, 8),
    "short_chunk_res": Net({"name": "short_chunk", "residual": True}, 647, 231, 128, 16),
    "resnet18": Net({"name": "resnet", "blocks": (2, 2, 2, 2)}, 647, 0, 128, 8),
    "short_chunk": Net({"name": "short_chunk"}, 647, 231, 128, 8),
}
DEFAULT_NETS = tuple(NETS)[:5]
TINY = {"tiny": Net({"name": "conv1d", "filters": (4, 8), "dense": (8,)}, 100, 64, 16, 8, 1.0)}
