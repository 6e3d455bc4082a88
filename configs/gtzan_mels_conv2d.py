r"""The report's Conv1D made two-dimensional, on the spectrograms and with the recipe of configs/gtzan_mels_conv1d.py.

    python experiments/prepare.py --config=configs/gtzan_mels_conv2d.py --config.data.root=<folder with train.npz, valid.npz>
    python experiments/train.py --config=configs/gtzan_mels_conv2d.py --config.data.root=<the same> --workdir=runs/mels_conv2d
    python experiments/evaluate.py --workdir=runs/mels_conv2d --split=valid

Filters, strides and pools are squares of Conv1D's lengths; it has 1,735,610 parameters (Conv1D: 1,727,242).

Result, as in configs/gtzan_mels_conv1d.py (442 clips to train on, 197 to evaluate on, seeds 0-4, 50 epochs, last checkpoint,
nothing tuned; jax 0.10.2, one CPU core; configs/ablations/gtzan_mels_seeds.py is the command):

    accuracy 51.2 % +- 1.9 (t interval of the mean over seeds 48.8-53.5; bootstrap by artist 38.9-62.9)
    with --config.model.batch_norm=True: 56.8 % +- 2.1 (54.1-59.4; bootstrap by artist 44.9-68.3)

The test list (290 clips) was not evaluated.
"""

from ml_collections import ConfigDict
from musicgenre.configs import gtzan_mels_conv1d


def get_config() -> ConfigDict:
    """Returns the config, in which only the network differs."""
    config = gtzan_mels_conv1d.get_config()
    config.model = ConfigDict({"name": "conv2d", "module": "", "batch_norm": False})
    return config
