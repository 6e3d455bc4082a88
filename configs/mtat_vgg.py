r"""musicnn's VGG-like baseline (Pons and Serra 2019) on all of MagnaTagATune: 187 x 96 mels.

    musicgenre download --dataset=mtat --root=/data/mtat
    musicgenre prepare --config=mtat_vgg --config.data.root=/data/mtat
    musicgenre train --config=mtat_vgg --config.data.root=/data/mtat --workdir=runs/mtat_vgg
    musicgenre evaluate --workdir=runs/mtat_vgg --split=test

The front end is the original's, log10(10000 x + 1) of the mel power, without further
normalisation. Batch size, Adam, learning rate, number of epochs and early stopping after 75 epochs
without a better validation loss are the original's, too. Its weight decay of 1e-5 in the loss is
left out. A clip's scores are the means over ten windows that cover its 29 s. Published with the
original's weights (MTT_vgg, all clips): ROC-AUC .9030, PR-AUC .3823.

No result: MTAT's audio was not available.
"""

from ml_collections import ConfigDict

from musicgenre.configs import mtat_musicnn


def get_config() -> ConfigDict:
    """Returns the config."""
    config = mtat_musicnn.get_config()
    config.data.protocol = "all"
    config.model.name = "vgg"
    return config
