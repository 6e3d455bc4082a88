"""The report's Conv1D on MagnaTagATune, in the report's own protocol and front end: 628 frames x 128 mels, 50 tags, 100 epochs.

python experiments/download.py --dataset=mtat --root=/data/mtat
python experiments/prepare.py --config=configs/mtat_conv1d.py --config.data.root=/data/mtat
python experiments/train.py --config=configs/mtat_conv1d.py --config.data.root=/data/mtat --workdir=runs/mtat_conv1d
python experiments/evaluate.py --workdir=runs/mtat_conv1d --split=test

Loss, rate and its decay are those of the report's script for this data set. A result in this protocol is no headline: 3,796 of
its 4,223 test clips (89.9 %) come from a track that is also in the training set. What others report is
--config.data.protocol=clean, with no track and no album on two sides.

No result yet: MTAT's audio was not at hand when this was written, so only the code path has been run, on made-up clips.
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
