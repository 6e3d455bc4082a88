r"""A narrow residual network that learns the precomputed GTZAN spectrograms without labels, by two views of each clip (SimCLR).

python experiments/prepare.py --config=configs/gtzan_mels_simclr.py --config.data.root=<folder with train.npz, valid.npz>
python experiments/pretrain.py --config=configs/gtzan_mels_simclr.py --config.data.root=<the same> --workdir=runs/simclr

Result (442 training and 197 validation clips, seeds 0-2, 50 epochs; jax 0.10.2, one CPU core, 2 minutes a seed): a view's nearest
of a batch of 128 is the other one of its clip for 56 to 62 % of the training views (chance 0.8 %) and 39 to 51 % of the
validation clips' views. What it is worth with labels: configs/ablations/gtzan_pretrained.py.
"""

from ml_collections import ConfigDict
from musicgenre.configs import gtzan_mels_conv1d


def get_config() -> ConfigDict:
    """Returns the config: crops of 128 frames (9.9 s), and what does not change a genre."""
    config = gtzan_mels_conv1d.get_config()
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
