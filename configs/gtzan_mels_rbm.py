r"""Stacked restricted Boltzmann machines on MFCCs of the precomputed GTZAN spectrograms, after Feng (2014).

    python experiments/prepare.py --config=configs/gtzan_mels_rbm.py --config.data.root=<folder with train.npz, valid.npz>
    python experiments/pretrain.py --config=configs/gtzan_mels_rbm.py --config.data.root=<the same> --workdir=runs/rbm_pretrained
    python experiments/train.py --config=configs/gtzan_mels_rbm.py --config.data.root=<the same> \
      --config.init_from=runs/rbm_pretrained --workdir=runs/rbm
    python experiments/evaluate.py --workdir=runs/rbm --split=valid

Result (442 clips of the fault-filtered train list to train on, the 197 of its valid list to evaluate on; seeds 0-2, 20 epochs of
each machine, then 50 epochs, last checkpoint; jax 0.10.2, 2 CPU cores):

    pretrained, fine-tuned      39.9 % +- 0.6 (95 % t interval of the mean over seeds 38.5-41.4)
    the same without init_from  40.1 % +- 0.5 (38.8-41.4)

So on this few clips pretraining does not help. A head alone over the pretrained layers, with
--config.optimizer.transferred_rate=0.0, gets 32.5 % +- 1.5. The sizes are the first that were tried. Three other settings,
pretrained against not, same seeds: --config.pretrain.epochs=100 38.2 / 40.1 %; --config.pretrain.epochs=50 --config.epochs=200
40.3 / 40.9 %; these with --config.model.dropout=0.5 37.9 / 39.1 %. The test list (290 clips) was not evaluated.
"""

from ml_collections import ConfigDict
from musicgenre.configs import gtzan_mels_conv1d


def get_config() -> ConfigDict:
    """Returns the config: random crops of 32 frames (2.5 s) make many inputs of one clip; Feng too made more of his clips."""
    config = gtzan_mels_conv1d.get_config()
    config.features.kind = "mfcc"
    config.features.n_mfcc = 20
    config.data.normalise = "band"
    config.data.crop_frames = 32
    config.data.eval_chunks = 10
    config.model = ConfigDict({"name": "rbm", "module": "", "layers": (512, 256)})
    return config
