r"""The CRNN (Choi et al. 2017) on MagnaTagATune: the 50 most frequent tags of 29.1 s, 1366 frames x 96 mels at 12 kHz.

    python experiments/prepare.py --config=configs/mtat_crnn.py --config.data.root=<folder of MagnaTagATune>
    python experiments/train.py --config=configs/mtat_crnn.py --config.data.root=<the same> --workdir=runs/mtat_crnn
    python experiments/evaluate.py --workdir=runs/mtat_crnn --split=test

The networks that the paper holds against it share the store (and that of configs/mtat_fcn4.py). They, and sizes of all four,
are named after a colon: k1c2, k2c1 and k2c2, or crnn-0.5M, k2c2-3M and so on, as in `CRNN_SIZES` and `CHOI_SIZES`:

    python experiments/train.py --config=configs/mtat_crnn.py:k2c2-0.5M --config.data.root=<the same> --workdir=runs/mtat_k2c2

Adam and the binary cross entropy are the paper's. One mean and deviation for all values puts the zeros that the
network pads with at the mean; it normalises each frame itself.

No result yet: MagnaTagATune's audio was not at hand. The paper's are of the Million Song Dataset.
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
