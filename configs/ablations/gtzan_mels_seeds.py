"""The report's Conv1D on the real GTZAN arrays without and with batch normalisation, for several seeds.

python experiments/ablate.py --config=configs/ablations/gtzan_mels_seeds.py --workdir=runs/gtzan_mels_conv1d --seeds=5
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import gtzan_mels_conv1d


def get_config() -> ConfigDict:
    """Returns the config of the experiment itself."""
    return gtzan_mels_conv1d.get_config()


def sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the variants."""
    yield "report", {}
    yield "batch_norm", {"model.batch_norm": True}
