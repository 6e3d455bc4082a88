r"""FCN-4 (Choi et al. 2016) on MagnaTagATune's 50 top tags, 1366 x 96 mels at 12 kHz.

    musicgenre prepare --config=mtat_fcn4 --config.data.root=/data/mtat
    musicgenre train --config=mtat_fcn4 --config.data.root=/data/mtat --workdir=runs/mtat_fcn4
    musicgenre evaluate --workdir=runs/mtat_fcn4 --split=test

The paper's other depths use the same store; fcn3, fcn5, fcn6 and fcn7 follow a colon:

    musicgenre train --config=mtat_fcn4:fcn5 --config.data.root=/data/mtat --workdir=runs/mtat_fcn5

Front end, network, dropout .5, Adam and the binary cross-entropy are the paper's. Its learning
rate is unknown, so 1e-3, the usual one for Adam, is used. The protocol is the clean split of later
work and is not comparable with the paper's.

No result: MagnaTagATune's audio was not available.
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
