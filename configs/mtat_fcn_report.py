r"""The report's best network for MagnaTagATune (section 4), fully convolutional: 628 x 128 mels.

    musicgenre prepare --config=mtat_fcn_report --config.data.root=/data/mtat
    musicgenre train --config=mtat_fcn_report --config.data.root=/data/mtat --workdir=runs/fcn
    musicgenre evaluate --workdir=runs/fcn --split=test

The recipe is that of the author's script: mean squared error of the sigmoid outputs, Adam with
1e-3 x .96 every 100,000 steps, batches of 32, 100 epochs. The report states no filter counts;
these are FCN-4's (Choi et al. 2016). The pools reduce 628 x 128 to one position, for which FCN-4's
own pools are too large.

The report's random split leaks: most tracks have clips in several splits, so the numbers are
comparable with the report only. --config.data.protocol=clean or grouped keeps each track in one
split.

No result: MagnaTagATune's audio was not available.
"""

from ml_collections import ConfigDict

from musicgenre.config import base_config
from musicgenre.models.fcn import FCN_SIZES


def get_config() -> ConfigDict:
    """Returns the config; the front end is the base's, which is the report's."""
    config = base_config()
    config.data.dataset = "mtat"
    config.data.protocol = "report"
    config.data.top_k = 50
    config.data.frames = 628
    config.model = ConfigDict({"name": "fcn", "module": ""} | FCN_SIZES["report"])
    config.batch_size = 32
    config.epochs = 100
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "exponential"
    config.optimizer.decay_rate = 0.96
    config.optimizer.decay_steps = 100_000
    config.loss.name = "mse"
    return config
