"""The report's Conv1D on GTZAN's audio with the report's front end (section 3, figure 3): 647 frames x 128 mels.

python experiments/prepare.py --config=configs/gtzan_conv1d.py --config.data.root=<folder with genres>
python experiments/train.py --config=configs/gtzan_conv1d.py --config.data.root=<the same> --workdir=runs/gtzan_conv1d

No result yet: GTZAN's audio was not at hand when this was written, so only the code path has been run, on a few clips.
"""

from ml_collections import ConfigDict

from musicgenre.config import base_config


def get_config() -> ConfigDict:
    """Returns the config; every value is the base's, which is the report's."""
    config = base_config()
    config.data.dataset = "gtzan"
    config.data.protocol = "fault_filtered"
    config.data.frames = 647
    return config
