r"""Dieleman's network at Spotify (2014): 40 latent factors of a song from its sound, 599 frames x 128 mels, by MSE.

    python experiments/prepare.py --config=configs/spotify_factors.py --config.data.root=factors.csv
    python experiments/train.py --config=configs/spotify_factors.py --config.data.root=factors.csv --workdir=runs/spotify_factors
    python experiments/evaluate.py --workdir=runs/spotify_factors --split=test

factors.csv is one's own: a line a song, the columns `path` and `targets`, and optionally `split`, `group` (the artist) and
`clip_id`. Targets are numbers separated by "|", as many on each line; 40 in the post, where they come from collaborative
filtering and each song's are scaled to unit norm first, so that popular songs do not dominate:

    path,targets,group
    audio/one.mp3,0.12|-0.31|0.08,some artist

The network, its input of 599 x 128 from the middle 30 s of a song, cropped at random in time, the loss and momentum with
Nesterov's step are the post's. It does not say the front end, the rate or the batch, and its 750,000 updates are for a million
songs: front end, batch and epochs are the base's (hop 1024 at 22,050 Hz, whose 647 frames of 30 s the crop cuts to 599), the rate
and its schedule are a guess.

No result yet: no such factors were at hand, so only the code path has been run, on made-up clips.
"""

from ml_collections import ConfigDict

from musicgenre.config import base_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = base_config()
    config.data.dataset = "csv"
    config.data.task = "regression"
    config.data.frames = 647
    config.data.excerpt = "middle"
    config.data.normalise = "band"
    config.data.crop_frames = 599
    config.model.name = "spotify"
    config.loss.name = "mse"
    config.optimizer.name = "momentum"
    config.optimizer.learning_rate = 0.01
    config.optimizer.momentum = 0.9
    config.optimizer.schedule = "cosine"
    config.select_metric = "r2"
    return config
