r"""The CRNN (Choi et al. 2017) on MagnaTagATune's 50 top tags, 1366 x 96 mels at 12 kHz.

    musicgenre prepare --config=mtat_crnn --config.data.root=/data/mtat
    musicgenre train --config=mtat_crnn --config.data.root=/data/mtat --workdir=runs/mtat_crnn
    musicgenre evaluate --workdir=runs/mtat_crnn --split=test

The networks that the paper compares it with use the same store (as does mtat_fcn4). They and the
sizes of all four follow a colon: k1c2, k2c1 and k2c2, or crnn-0.5M, k2c2-3M and so on, as in
`CRNN_SIZES` and `CHOI_SIZES`:

    musicgenre train --config=mtat_crnn:k2c2-0.5M --config.data.root=/data/mtat --workdir=runs/k2c2

Adam and the binary cross-entropy are the paper's. One mean and standard deviation for all values
put the zeros of the network's padding at the mean; the network normalises each frame itself.

No result: MagnaTagATune's audio was not available. The paper's results are on the Million Song
Dataset.
"""

from ml_collections import ConfigDict

from musicgenre.config import base_config
from musicgenre.errors import UserError, did_you_mean
from musicgenre.models.choi_cnn import CHOI_SIZES
from musicgenre.models.crnn import CRNN_SIZES


def get_config(network: str = "crnn") -> ConfigDict:
    """Returns the config of a network.

    Args:
      network: crnn, k1c2, k2c1 or k2c2, and optionally a hyphen and a size.

    Raises:
      UserError: the network or its size is unknown.
    """
    sizes = {"crnn": CRNN_SIZES} | CHOI_SIZES
    known = {
        f"{name}-{size}": (name, fields) for name in sizes for size, fields in sizes[name].items()
    }
    known |= {name: (name, {}) for name in sizes}
    if network not in known:
        raise UserError(
            f"--config=configs/mtat_crnn.py:{network}: no network {network!r}."
            + did_you_mean(network, known)
        )
    name, fields = known[network]
    config = base_config()
    config.data.dataset = "mtat"
    config.data.protocol = "clean"
    config.data.top_k = 50
    config.data.frames = 1366
    config.data.normalise = "global"
    config.features.sample_rate = 12000
    config.features.n_fft = 512
    config.features.hop_length = 256
    config.features.n_mels = 96
    config.model = ConfigDict({"name": name, "module": ""} | fields)
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "constant"
    return config
