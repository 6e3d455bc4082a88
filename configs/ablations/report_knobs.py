"""The knobs that the report turned (section 4), one at a time, on the real GTZAN arrays: 442 clips to train on, 197 to validate.

python experiments/ablate.py --config=configs/ablations/report_knobs.py --workdir=runs/report_knobs --seeds=3
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
    yield "report", {}
    yield "filters128", {"model.filters": (128, 128, 128)}
    yield "filters512", {"model.filters": (512, 512, 512)}
    yield "width2", {"model.width": 2}
    yield "width8", {"model.width": 8}
    yield "layers2", {"model.filters": (256, 256)}
    # Four layers of stride 2 would leave nothing of 387 frames for the last pool, so here the stride is 1 and the pools shrink.
    yield "layers4", {"model.filters": (256, 256, 256, 256), "model.stride": 1}
    yield "batch_norm", {"model.batch_norm": True}
    yield "dropout0", {"model.dropout": 0.0}
    yield "dropout75", {"model.dropout": 0.75}
