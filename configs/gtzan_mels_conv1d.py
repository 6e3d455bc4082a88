"""The report's Conv1D on precomputed GTZAN spectrograms, 387 frames x 128 mels at an effective hop of 1710."""

from ml_collections import ConfigDict

from musicgenre.config import base_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = base_config()
    config.data.dataset = "arrays"
    config.data.root = "../shared/data/gtzan_mels"
    config.data.files.train = "train.npz"
    config.data.files.valid = "valid.npz"
    config.data.frames = 387
    config.features.hop_length = 1710
    config.epochs = 50
    config.eval_every = 5
    return config
