r"""The hyperparameters that the report varied (section 4), one at a time, on GTZAN.

    musicgenre ablate --config=ablations/report_knobs:arrays \
      --config.data.root=/data/gtzan_mels --workdir=runs/report_knobs --seeds=3

Validation accuracy on the GTZAN arrays at the end of training, seeds 0-2, mean +- standard
deviation (95 % t interval of the mean; fault-filtered lists, 50 epochs, nothing selected; jax
0.10.2, one CPU core); the table and its plot are in docs/results/report_knobs:

    report      45.0 % +- 0.6 (43.6-46.5)        batch_norm        46.0 % +- 2.1 (40.8-51.3)
    filters128  43.5 % +- 1.6 (39.4-47.5)        dropout0          43.5 % +- 2.1 (38.2-48.7)
    filters512  42.0 % +- 2.8 (35.0-48.9)        dropout75         43.1 % +- 0.5 (41.9-44.4)
    width2      47.4 % +- 0.8 (45.5-49.3)        normalise_band    44.8 % +- 3.6 (36.0-53.7)
    width8      41.1 % +- 1.3 (37.8-44.5)        normalise_global  42.8 % +- 1.9 (38.0-47.6)
    layers2     43.5 % +- 1.1 (40.9-46.1)        mfcc20            40.1 % +- 0.5 (38.8-41.4)
    layers4     43.1 % +- 1.3 (39.8-46.5)        mfcc128           45.7 % +- 2.8 (38.7-52.7)
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
    yield "filters128", {"model.filters": (128, 128, 128)}
    yield "filters512", {"model.filters": (512, 512, 512)}
    yield "width2", {"model.width": 2}
    yield "width8", {"model.width": 8}
    yield "layers2", {"model.filters": (256, 256)}
    # Four layers of stride 2 would leave no frames for the last pool, so the stride is 1.
    yield "layers4", {"model.filters": (256, 256, 256, 256), "model.stride": 1}
    yield "batch_norm", {"model.batch_norm": True}
    yield "dropout0", {"model.dropout": 0.0}
    yield "dropout75", {"model.dropout": 0.75}
    yield "normalise_band", {"data.normalise": "band"}
    yield "normalise_global", {"data.normalise": "global"}
    # The usual 20 coefficients, and all 128, which are a rotation of the log-mels.
    yield "mfcc20", {"features.kind": "mfcc", "features.n_mfcc": 20}
    yield "mfcc128", {"features.kind": "mfcc", "features.n_mfcc": 128}
