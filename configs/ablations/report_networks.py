r"""1D against 2D convolutions and the report's ResNet on GTZAN (442 training clips).

    musicgenre ablate --config=ablations/report_networks:arrays \
      --config.data.root=/data/gtzan_mels --workdir=runs/report_networks --seeds=3

Validation accuracy on the arrays at the end of training, seeds 0-2, mean +- standard deviation (95
% t interval of the mean; fault-filtered lists, 50 epochs, nothing selected; jax 0.10.2, one CPU
core); the table and its plot are in docs/results/report_networks:

    conv1d  45.0 % +- 0.6 (43.6-46.5)    conv1d_batch_norm  46.0 % +- 2.1 (40.8-51.3)
    conv2d  51.1 % +- 0.8 (49.2-53.0)    conv2d_batch_norm  58.2 % +- 0.8 (56.3-60.1)
    resnet  57.0 % +- 2.8 (50.1-64.0)
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from musicgenre.configs import gtzan_mels_conv1d


def get_config(source: str = "audio") -> ConfigDict:
    """Returns the config of the experiment; `source` is "audio" or "arrays"."""
    return gtzan_mels_conv1d.get_config(source)


def sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the variants."""
    yield "conv1d", {}
    yield "conv1d_batch_norm", {"model.batch_norm": True}
    yield "conv2d", {"model.name": "conv2d"}
    yield "conv2d_batch_norm", {"model.name": "conv2d", "model.batch_norm": True}
    yield "resnet", {"model.name": "resnet"}
