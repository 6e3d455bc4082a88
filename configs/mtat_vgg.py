r"""musicnn's VGG-like baseline (Pons and Serra 2019) on MagnaTagATune, all clips: 187 frames x 96 mels at 16 kHz, 50 tags.

    python experiments/download.py --dataset=mtat --root=/data/mtat
    python experiments/prepare.py --config=configs/mtat_vgg.py --config.data.root=/data/mtat
    python experiments/train.py --config=configs/mtat_vgg.py --config.data.root=/data/mtat --workdir=runs/mtat_vgg
    python experiments/evaluate.py --workdir=runs/mtat_vgg --split=test

The front end is the original's, log10(10000 x + 1) of the mel power, without a normalisation of its own. So are the batch, Adam,
its rate, the number of epochs and the end of training after 75 epochs without a better validation loss. Its weight decay of 1e-5
in the loss is left out. A clip's scores are the means over ten windows that cover its 29 s. Published with the original's weights
(MTT_vgg, all clips): ROC-AUC .9030, PR-AUC .3823.

No result yet: MTAT's audio was not at hand when this was written.
"""

from ml_collections import ConfigDict
from musicgenre.configs import mtat_musicnn


def get_config() -> ConfigDict:
    """Returns the config."""
    config = mtat_musicnn.get_config()
    config.data.protocol = "all"
    config.model.name = "vgg"
    return config
