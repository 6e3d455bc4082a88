"""The report's Conv1D on MagnaTagATune with the report's protocol: 628 x 128 mels, 50 tags.

musicgenre download --dataset=mtat --root=/data/mtat
musicgenre prepare --config=mtat_conv1d --config.data.root=/data/mtat
musicgenre train --config=mtat_conv1d --config.data.root=/data/mtat --workdir=runs/mtat_conv1d
musicgenre evaluate --workdir=runs/mtat_conv1d --split=test

Loss, learning rate, decay and the 100 epochs are those of the report's script for this data set.
Do not quote a result of this protocol: 3,796 of its 4,223 test clips (89.9 %) come from a track
that is also in the training set. Most published numbers are on --config.data.protocol=clean, which
keeps each track and album in one split.

No result: MTAT's audio was not available, so only the code path has been run, on synthetic clips.
"""

from ml_collections import ConfigDict

from musicgenre.config import base_config


def get_config() -> ConfigDict:
    """Returns the config; the network and the front end are the base's."""
    config = base_config()
    config.data.dataset = "mtat"
    config.data.protocol = "report"
    config.data.top_k = 50
    config.data.frames = 628
    config.loss.name = "mse"
    config.optimizer.schedule = "exponential"
    config.optimizer.decay_rate = 0.96
    config.optimizer.decay_steps = 100_000
    return config
