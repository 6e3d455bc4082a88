r"""AlexNet (after Gwardys and Grzywczak 2014) on GTZAN spectrograms, 387 frames x 128 mels.

    musicgenre prepare --config=gtzan_mels_alexnet --config.data.root=/data/gtzan
    musicgenre train --config=gtzan_mels_alexnet --config.data.root=/data/gtzan --workdir=runs/alex
    musicgenre evaluate --workdir=runs/alex --split=valid

The variant gtzan_mels_alexnet:arrays is on precomputed spectrograms (see gtzan_mels_conv1d).

With 53.7 million parameters it has more than 100,000 for each of the 442 training clips. It is
meant for transfer, as its authors did: train it on another data set first and start from that run
with --config.init_from=<its workdir>. All layers except the head are transferred, so both runs
need the same number of frames and bands. A checkpoint takes 0.53 GB.

No result: only one epoch was run, to show that it works.
"""

from ml_collections import ConfigDict

from musicgenre.configs import gtzan_mels_conv1d


def get_config(source: str = "audio") -> ConfigDict:
    """Returns the config: data, front end and epochs of `gtzan_mels_conv1d.get_config(source)`."""
    config = gtzan_mels_conv1d.get_config(source)
    config.model.name = "alexnet"
    # Chosen, not tuned.
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "constant"
    return config
