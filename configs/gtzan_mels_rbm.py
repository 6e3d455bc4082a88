r"""Stacked restricted Boltzmann machines on MFCCs of GTZAN, after Feng (2014).

    musicgenre prepare --config=gtzan_mels_rbm --config.data.root=/data/gtzan
    musicgenre pretrain --config=gtzan_mels_rbm --config.data.root=/data/gtzan \
      --workdir=runs/boltzmann
    musicgenre train --config=gtzan_mels_rbm --config.data.root=/data/gtzan \
      --config.init_from=runs/boltzmann --workdir=runs/rbm
    musicgenre evaluate --workdir=runs/rbm --split=valid

The variant gtzan_mels_rbm:arrays is on precomputed spectrograms (see gtzan_mels_conv1d).

Result on the arrays (442 training clips of the fault-filtered train list, 197 evaluation clips of
its valid list; seeds 0-2, 20 epochs per machine, then 50 epochs, last checkpoint; jax 0.10.2, 2
CPU cores):

    pretrained, fine-tuned      39.9 % +- 0.6 (95 % t interval of the mean over seeds 38.5-41.4)
    the same without init_from  40.1 % +- 0.5 (38.8-41.4)

Pretraining does not help with so few clips. A head alone over the pretrained layers, with
--config.optimizer.transferred_rate=0.0, reaches 32.5 % +- 1.5. The layer sizes are the first that
were tried. Three other settings, pretrained against not, same seeds: --config.pretrain.epochs=100
38.2 / 40.1 %; --config.pretrain.epochs=50 --config.epochs=200 40.3 / 40.9 %; the latter with
--config.model.dropout=0.5 37.9 / 39.1 %. The test list (290 clips) was not evaluated.
"""

from ml_collections import ConfigDict

from musicgenre.configs import gtzan_mels_conv1d


def get_config(source: str = "audio") -> ConfigDict:
    """Returns the config; random windows of 32 frames (2.5 s) give many inputs per clip."""
    config = gtzan_mels_conv1d.get_config(source)
    config.features.kind = "mfcc"
    config.features.n_mfcc = 20
    config.data.normalise = "band"
    config.data.crop_frames = 32
    config.data.eval_chunks = 10
    config.model = ConfigDict({"name": "rbm", "module": "", "layers": (512, 256)})
    return config
