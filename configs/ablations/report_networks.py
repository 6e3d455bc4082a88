r"""1D against 2D, and the report's ResNet, on the real GTZAN arrays: 442 clips to train on, 197 to validate.

python experiments/ablate.py --config=configs/ablations/report_networks.py --workdir=runs/report_networks --seeds=3
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import gtzan_mels_conv1d


def get_config() -> ConfigDict:
    """Returns what the variants change: `configs/gtzan_mels_conv1d.py`."""
    return gtzan_mels_conv1d.get_config()


def sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the variants."""
    yield "conv1d", {}
    yield "conv1d_batch_norm", {"model.batch_norm": True}
    yield "conv2d", {"model.name": "conv2d"}
    yield "conv2d_batch_norm", {"model.name": "conv2d", "model.batch_norm": True}
    yield "resnet", {"model.name": "resnet"}
