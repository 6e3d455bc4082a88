"""The embedded default: the report's Conv1D on made-up music, from rendering to report in a few minutes."""

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
    config.model.batch_norm = True
    return config
