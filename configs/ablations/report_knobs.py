r"""The knobs that the report turned (section 4), one at a time, on the real GTZAN arrays: 442 clips to train on, 197 to validate.

python experiments/ablate.py --config=configs/ablations/report_knobs.py --workdir=runs/report_knobs --seeds=3

Validation accuracy at the end of training, seeds 0-2, mean +- deviation (95 % t interval of the mean), of the variants run so
far (--only=report,filters128,filters512,width2,width8,layers2,batch_norm; jax 0.10.2, 2 CPU cores):

    report      44.2 % +- 2.3 (38.4-49.9)        width8      41.5 % +- 1.6 (37.6-45.3)
    filters128  42.0 % +- 2.8 (35.0-48.9)        layers2     42.8 % +- 2.1 (37.6-48.1)
    filters512  44.0 % +- 1.6 (39.9-48.0)        batch_norm  46.7 % +- 3.5 (38.0-55.4)
    width2      47.2 % +- 0.5 (45.9-48.5)

All intervals but width8's and width2's overlap; layers4 and the two dropout rates have not been run.
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
    yield "normalise_band", {"data.normalise": "band"}
    yield "normalise_global", {"data.normalise": "global"}
    # From the dB log-mels by DCT: the 20 coefficients that are usual, and all 128, which are a rotation of the log-mels.
    yield "mfcc20", {"features.kind": "mfcc", "features.n_mfcc": 20}
    yield "mfcc128", {"features.kind": "mfcc", "features.n_mfcc": 128}
