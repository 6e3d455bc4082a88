r"""The report's Conv1D on GTZAN and the same in 2D, with and without batch normalisation.

    musicgenre ablate --config=ablations/gtzan_mels_seeds:arrays \
      --config.data.root=/data/gtzan_mels --workdir=runs/gtzan_mels_conv1d --seeds=5

Validation accuracy on the arrays at the end of training, seeds 0-4, mean +- standard deviation (95
% t interval of the mean; jax 0.10.2, one CPU core):

    report  43.7 % +- 1.9 (41.3-46.1)    batch_norm         45.7 % +- 1.6 (43.7-47.7)
    conv2d  51.2 % +- 1.9 (48.8-53.5)    conv2d_batch_norm  56.8 % +- 2.1 (54.1-59.4)
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
    yield "report", {}
    yield "batch_norm", {"model.batch_norm": True}
    yield "conv2d", {"model.name": "conv2d"}
    yield "conv2d_batch_norm", {"model.name": "conv2d", "model.batch_norm": True}
