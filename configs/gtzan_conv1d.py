"""The report's Conv1D on GTZAN's audio with the report's front end (section 3): 647 x 128 mels.

musicgenre prepare --config=gtzan_conv1d --config.data.root=/data/gtzan
musicgenre train --config=gtzan_conv1d --config.data.root=/data/gtzan --workdir=runs/gtzan_conv1d
musicgenre evaluate --workdir=runs/gtzan_conv1d --split=valid

No result: GTZAN's audio was not available, so only the code path has been run, on a few clips.
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
