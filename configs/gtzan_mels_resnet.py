r"""The report's residual network on the precomputed GTZAN spectrograms of configs/gtzan_mels_conv1d.py, with its recipe.

    python experiments/prepare.py --config=configs/gtzan_mels_resnet.py --config.data.root=<folder with train.npz, valid.npz>
    python experiments/train.py --config=configs/gtzan_mels_resnet.py --config.data.root=<the same> --workdir=runs/mels_resnet
    python experiments/evaluate.py --workdir=runs/mels_resnet --split=valid

The defaults are the notebook's two identity units. The usual sizes are named after a colon, such as resnet18 or resnet50:

    python experiments/train.py --config=configs/gtzan_mels_resnet.py:resnet18 --config.data.root=<the same> --workdir=runs/rn18

The original units: `--config.model.preactivation=False`.

Result of the defaults (442 clips of the fault-filtered train list to train on, the 197 of its valid list to evaluate on; seeds
0-2, 50 epochs, last checkpoint, nothing tuned; jax 0.10.2, one CPU core; configs/ablations/report_networks.py is the command):

    accuracy 57.0 % +- 2.8 (t interval of the mean over seeds 50.1-64.0)

The report says around 20 %; its notebook reached 58.8 % of its random split's validation clips, which share artists with the
training clips, and 98 % of those. The other sizes have not been trained, and the test list (290 clips) was not evaluated.
"""

from ml_collections import ConfigDict
from musicgenre.configs import gtzan_mels_conv1d

from musicgenre.errors import UserError, did_you_mean
from musicgenre.models.resnet import RESNET_SIZES


def get_config(size: str = "report") -> ConfigDict:
    """Returns the config of a size.

    Args:
      size: one of `RESNET_SIZES`.

    Raises:
      UserError: the size is unknown.
    """
    if size not in RESNET_SIZES:
        raise UserError(
            f"--config=configs/gtzan_mels_resnet.py:{size}: no size {size!r}."
            + did_you_mean(size, RESNET_SIZES)
        )
    config = gtzan_mels_conv1d.get_config()
    config.model = ConfigDict(
        {"name": "resnet", "module": "", "preactivation": True} | RESNET_SIZES[size]
    )
    return config
