"""The demo: the report's Conv1D on synthetic music, from rendering to report in about a minute.

    musicgenre prepare --config=synthetic
    musicgenre train --config=synthetic --workdir=runs/demo
    musicgenre evaluate --workdir=runs/demo --split=test

On this SYNTHETIC audio it reached 60.0 % (Wilson 46.2-72.4, bootstrap by artist 46.0-73.1) of the
50 test clips, one seed. The number shows that the code works and says nothing about real music.
"""

from ml_collections import ConfigDict

from musicgenre.config import base_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = base_config()
    config.data.dataset = "synthetic"
    config.data.root = "stores/synthetic-audio"
    config.data.clips_per_style = 24
    config.data.seconds = 6.0
    config.data.frames = 258
    config.features.hop_length = 512
    config.epochs = 40
    return config
