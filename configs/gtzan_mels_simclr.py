"""A narrow residual network pretrained on GTZAN without labels, on two views of each clip (SimCLR).

musicgenre prepare --config=gtzan_mels_simclr --config.data.root=/data/gtzan
musicgenre pretrain --config=gtzan_mels_simclr --config.data.root=/data/gtzan --workdir=runs/simclr

The variant gtzan_mels_simclr:arrays is on precomputed spectrograms (see gtzan_mels_conv1d).

Result on the arrays (442 training and 197 validation clips, seeds 0-2, 50 epochs; jax 0.10.2, one
CPU core, 2 minutes per seed): for 56 to 62 % of the training views (chance 0.8 %) and 39 to 51 %
of the validation views, the nearest view in a batch of 128 is the other view of the same clip.
What this is worth with labels: configs/ablations/gtzan_pretrained.py.
"""

from ml_collections import ConfigDict

from musicgenre.configs import gtzan_mels_conv1d


def get_config(source: str = "audio") -> ConfigDict:
    """Returns the config: windows of 128 frames (9.9 s) and changes that keep the genre."""
    config = gtzan_mels_conv1d.get_config(source)
    config.data.normalise = "band"
    config.data.crop_frames = 128
    config.model = ConfigDict({"name": "resnet", "module": "", "filters": 16})
    config.augment.time_stretch = 0.1
    config.augment.pitch_shift = 3.0
    config.augment.gain = 6.0
    config.augment.eq = 6.0
    config.augment.noise = 2.0
    config.batch_size = 64
    config.optimizer.schedule = "cosine"
    config.pretrain.epochs = 50
    config.pretrain.temperature = 0.2
    config.eval_every = 10
    return config
