r"""Dieleman's network at Spotify (2014): 40 latent factors of a song from 599 x 128 mels.

    musicgenre prepare --config=spotify_factors --config.data.root=factors.csv
    musicgenre train --config=spotify_factors --config.data.root=factors.csv --workdir=runs/factors
    musicgenre evaluate --workdir=runs/factors --split=test

factors.csv is your own: one line per song with the columns `path` and `targets`, and optionally
`split`, `group` (the artist) and `clip_id`. Targets are numbers separated by "|", the same count
on each line. In the post there are 40, from collaborative filtering, and each song's are first
scaled to unit norm, so that popular songs do not dominate:

    path,targets,group
    audio/one.mp3,0.12|-0.31|0.08,some artist

The network, its input of 599 x 128 from the middle 30 s of a song as a random window in time, the
loss and Nesterov momentum are the post's. It does not state front end, learning rate or batch
size, and its 750,000 updates are for a million songs. Front end, batch size and epochs are the
base's (hop 1024 at 22,050 Hz, whose 647 frames of 30 s the window reduces to 599); the rate and
its schedule are a guess.

No result: no such factors were available, so only the code path has been run, on synthetic clips.
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
