r"""The report's Conv1D on GTZAN spectrograms of 387 frames x 128 mels, hop about 1710 samples.

From GTZAN's audio, /data/gtzan/blues/blues.00000.wav (or .au) and so on:

    musicgenre prepare --config=gtzan_mels_conv1d --config.data.root=/data/gtzan
    musicgenre train --config=gtzan_mels_conv1d --config.data.root=/data/gtzan --workdir=runs/conv1d
    musicgenre evaluate --workdir=runs/conv1d --split=valid

From precomputed spectrograms, /data/gtzan_mels/train.npz and valid.npz, in all three commands:

    --config=gtzan_mels_conv1d:arrays --config.data.root=/data/gtzan_mels

Five seeds, with and without batch normalisation, and the same in 2D:

    musicgenre ablate --config=ablations/gtzan_mels_seeds:arrays \
      --config.data.root=/data/gtzan_mels --workdir=runs/gtzan_mels_conv1d --seeds=5

Result on the arrays (442 training clips of the fault-filtered train list, 197 evaluation clips of
its valid list; seeds 0-4, 50 epochs, last checkpoint, nothing selected on the evaluated clips
except the report's own recipe; jax 0.10.2, one CPU core):

    accuracy 43.7 % +- 1.9 (t interval over seeds 41.3-46.1; bootstrap by artist 33.9-53.6)
    with --config.model.batch_norm=True: 45.7 % +- 1.6 (43.7-47.7; bootstrap by artist 35.7-56.5)

The test list (290 clips) was not evaluated.
"""

from ml_collections import ConfigDict

from musicgenre.config import base_config
from musicgenre.errors import UserError, did_you_mean

SOURCES = ("audio", "arrays")


def get_config(source: str = "audio") -> ConfigDict:
    """Returns the config.

    Args:
      source: "audio" computes the features from GTZAN's sound files; "arrays" takes them from
        train.npz and valid.npz in the folder `data.root`.

    Raises:
      UserError: the source is unknown.
    """
    if source not in SOURCES:
        raise UserError(
            f"--config=...:{source}: no variant {source!r}." + did_you_mean(source, SOURCES)
        )
    config = base_config()
    if source == "arrays":
        config.data.dataset = "arrays"
        config.data.files.train = "train.npz"
        config.data.files.valid = "valid.npz"
    else:
        config.data.dataset = "gtzan"
        # The arrays keep every 3.34th frame of hop 512; this picks the same frames.
        config.data.excerpt = "spread"
    config.data.protocol = "fault_filtered"
    config.data.frames = 387
    config.features.hop_length = 1710
    config.epochs = 50
    config.eval_every = 5
    return config
