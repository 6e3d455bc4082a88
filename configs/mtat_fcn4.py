r"""FCN-4 (Choi et al. 2016) on MagnaTagATune: the 50 most frequent tags of 29.1 s, 1366 frames x 96 mels at 12 kHz.

    python experiments/prepare.py --config=configs/mtat_fcn4.py --config.data.root=<folder of MagnaTagATune>
    python experiments/train.py --config=configs/mtat_fcn4.py --config.data.root=<the same> --workdir=runs/mtat_fcn4
    python experiments/evaluate.py --workdir=runs/mtat_fcn4 --split=test

The paper's other depths share the store; fcn3, fcn5, fcn6 and fcn7 are named after a colon:

    python experiments/train.py --config=configs/mtat_fcn4.py:fcn5 --config.data.root=<the same> --workdir=runs/mtat_fcn5

Front end, network, dropout .5, Adam and the binary cross entropy are the paper's; its learning rate is not known, and 1e-3 is
Adam's usual one. The protocol is the clean split of later work, and not comparable with the paper's own.

No result yet: MagnaTagATune's audio was not at hand.
"""

from ml_collections import ConfigDict

from musicgenre.config import base_config
from musicgenre.errors import UserError, did_you_mean
from musicgenre.models.fcn import FCN_SIZES


def get_config(size: str = "fcn4") -> ConfigDict:
    """Returns the config of a size.

    Args:
      size: one of `FCN_SIZES`.

    Raises:
      UserError: the size is unknown.
    """
    if size not in FCN_SIZES:
        raise UserError(
            f"--config=configs/mtat_fcn4.py:{size}: no size {size!r}."
            + did_you_mean(size, FCN_SIZES)
        )
    config = base_config()
    config.data.dataset = "mtat"
    config.data.protocol = "clean"
    config.data.top_k = 50
    config.data.frames = 1366
    config.data.normalise = "band"
    config.features.sample_rate = 12000
    config.features.n_fft = 512
    config.features.hop_length = 256
    config.features.n_mels = 96
    config.model = ConfigDict({"name": "fcn", "module": "", "dropout": 0.5} | FCN_SIZES[size])
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "constant"
    return config
