r"""AlexNet (after Gwardys and Grzywczak 2014) on precomputed GTZAN spectrograms, 387 frames x 128 mels, 53.7 million parameters.

    python experiments/prepare.py --config=configs/gtzan_mels_alexnet.py --config.data.root=<folder with train.npz, valid.npz>
    python experiments/train.py --config=configs/gtzan_mels_alexnet.py --config.data.root=<the same> --workdir=runs/alexnet/seed0
    python experiments/evaluate.py --workdir=runs/alexnet/seed0 --split=valid

From scratch a network of this size has more than 100,000 parameters for each of the 442 training clips. It is here to be
transferred, as its authors did: train it on another data set first and start from that run with --config.init_from=<its workdir>.
All layers but the head are taken over, so both runs need the same number of frames and bands. A checkpoint takes 0.53 GB.

No result yet: beyond one epoch that shows that it runs, nothing has been trained with this.
"""

from ml_collections import ConfigDict
from musicgenre.configs import gtzan_mels_conv1d


def get_config() -> ConfigDict:
    """Returns the config: the data, the front end and the epochs of `configs/gtzan_mels_conv1d.py`."""
    config = gtzan_mels_conv1d.get_config()
    config.model.name = "alexnet"
    # Chosen, not tuned.
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "constant"
    return config
