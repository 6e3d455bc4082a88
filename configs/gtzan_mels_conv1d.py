r"""The report's Conv1D on precomputed GTZAN spectrograms, 387 frames x 128 mels at an effective hop of 1710.

    python experiments/prepare.py --config=configs/gtzan_mels_conv1d.py --config.data.root=<folder with train.npz, valid.npz>
    python experiments/train.py --config=configs/gtzan_mels_conv1d.py --config.data.root=<the same> --workdir=runs/mels/seed0
    python experiments/evaluate.py --workdir=runs/mels/seed0 --split=valid

Five seeds at once, without and with batch normalisation:

    python experiments/ablate.py --config=configs/ablations/gtzan_mels_seeds.py --workdir=runs/gtzan_mels_conv1d --seeds=5

Result (442 clips of the fault-filtered train list to train on, the 197 of its valid list to evaluate on; seeds 0-4, 50 epochs,
last checkpoint, nothing chosen on the evaluated clips but the report's own recipe; jax 0.10.2, 2 CPU cores):

    accuracy 43.4 % +- 2.0 (t interval of the mean over seeds 40.9-45.8; bootstrap by artist 33.1-53.6)
    with --config.model.batch_norm=True: 45.2 % +- 3.3 (41.1-49.3; bootstrap by artist 34.7-56.2)

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
