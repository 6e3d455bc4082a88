r"""A two-dimensional version of the report's Conv1D on the spectrograms of gtzan_mels_conv1d.

    musicgenre prepare --config=gtzan_mels_conv2d --config.data.root=/data/gtzan
    musicgenre train --config=gtzan_mels_conv2d --config.data.root=/data/gtzan --workdir=runs/conv2d
    musicgenre evaluate --workdir=runs/conv2d --split=valid

The variant gtzan_mels_conv2d:arrays is on precomputed spectrograms (see gtzan_mels_conv1d).

Filters, strides and pools are squares of Conv1D's lengths; it has 1,735,610 parameters (Conv1D:
1,727,242).

Result on the arrays, as in gtzan_mels_conv1d (442 training and 197 evaluation clips, seeds 0-4, 50
epochs, last checkpoint, nothing tuned; jax 0.10.2, one CPU core; the command is that of
configs/ablations/gtzan_mels_seeds.py):

    accuracy 51.2 % +- 1.9 (t interval over seeds 48.8-53.5; bootstrap by artist 38.9-62.9)
    with --config.model.batch_norm=True: 56.8 % +- 2.1 (54.1-59.4; bootstrap by artist 44.9-68.3)

The test list (290 clips) was not evaluated.
"""

from ml_collections import ConfigDict

from musicgenre.configs import gtzan_mels_conv1d


def get_config(source: str = "audio") -> ConfigDict:
    """Returns `gtzan_mels_conv1d.get_config(source)` with another network."""
    config = gtzan_mels_conv1d.get_config(source)
    config.model = ConfigDict({"name": "conv2d", "module": "", "batch_norm": False})
    return config
