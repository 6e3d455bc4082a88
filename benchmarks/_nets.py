"""The benchmarked networks and the inputs that they are meant for."""

import argparse
import dataclasses
from typing import Any

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Net:
    """A network.

    Attributes:
      model: the `model` section of its config.
      clip_frames: frames per clip in the store.
      crop_frames: frames per random window; 0 takes the entire clip.
      bands: mel bands.
      cpu_batch: clips per batch for which a round takes seconds on a CPU.
      bar: upper limit of a training step's time over PyTorch's on a CPU.
    """

    model: dict[str, Any]
    clip_frames: int
    crop_frames: int
    bands: int
    cpu_batch: int
    bar: float = 1.15

    @property
    def frames(self) -> int:
        """Frames per input."""
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


def chosen_nets(parser: argparse.ArgumentParser, names: str, tiny: bool) -> dict[str, Net]:
    """Returns the networks that --nets names (comma-separated), or the default ones.

    Raises:
      SystemExit: a name is unknown.
    """
    nets = TINY if tiny else NETS
    chosen = [name for name in names.split(",") if name] or list(TINY if tiny else DEFAULT_NETS)
    check_choice(parser, "nets", chosen, nets)
    return {name: nets[name] for name in chosen}


def check_choice(parser: argparse.ArgumentParser, flag: str, values: Any, known: Any) -> None:
    """Ends with a usage error at the first value that is not known."""
    for value in values:
        if value not in known:
            parser.error(f"--{flag}: {value!r} is none of {', '.join(known)}")
