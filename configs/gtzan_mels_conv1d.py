r"""The report's Conv1D on precomputed GTZAN spectrograms, 387 frames x 128 mels at an effective hop of 1710.

    python experiments/prepare.py --config=configs/gtzan_mels_conv1d.py --config.data.root=<folder with train.npz, valid.npz>
    python experiments/train.py --config=configs/gtzan_mels_conv1d.py --config.data.root=<the same> --workdir=runs/mels/seed0
    python experiments/evaluate.py --workdir=runs/mels/seed0 --split=valid

Five seeds at once, without and with batch normalisation, and the same in 2D:

    python experiments/ablate.py --config=configs/ablations/gtzan_mels_seeds.py --workdir=runs/gtzan_mels_conv1d --seeds=5

Result (442 clips of the fault-filtered train list to train on, the 197 of its valid list to evaluate on; seeds 0-4, 50 epochs,
last checkpoint, nothing chosen on the evaluated clips but the report's own recipe; jax 0.10.2, one CPU core):

    accuracy 43.7 % +- 1.9 (t interval of the mean over seeds 41.3-46.1; bootstrap by artist 33.9-53.6)
    with --config.model.batch_norm=True: 45.7 % +- 1.6 (43.7-47.7; bootstrap by artist 35.7-56.5)

The test list (290 clips) was not evaluated.
"""

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
