r"""The report's Conv1D made two-dimensional, on the spectrograms and with the recipe of configs/gtzan_mels_conv1d.py.

    python experiments/prepare.py --config=configs/gtzan_mels_conv2d.py --config.data.root=<folder with train.npz, valid.npz>
    python experiments/train.py --config=configs/gtzan_mels_conv2d.py --config.data.root=<the same> --workdir=runs/mels_conv2d
    python experiments/evaluate.py --workdir=runs/mels_conv2d --split=valid

Filters, strides and pools are squares of Conv1D's lengths; it has 1,735,610 parameters (Conv1D: 1,727,242). No result yet.
"""

from ml_collections import ConfigDict

from configs import gtzan_mels_conv1d


def get_config() -> ConfigDict:
    """Returns the config, in which only the network differs."""
    config = gtzan_mels_conv1d.get_config()
    config.model = ConfigDict({"name": "conv2d", "module": "", "batch_norm": False})
    return config
