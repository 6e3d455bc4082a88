r"""The short-chunk network (Won et al. 2020) on MagnaTagATune's 50 top tags, windows of 3.69 s.

    musicgenre prepare --config=mtat_short_chunk --config.data.root=/data/mtat
    musicgenre train --config=mtat_short_chunk --config.data.root=/data/mtat --workdir=runs/chunks
    musicgenre evaluate --workdir=runs/chunks --split=test

With residual layers, on the same store: --config.model.residual=True
--workdir=runs/chunks_res.

A clip's score is the mean over 16 windows, as in the authors' code. The data are not normalised:
the network normalises its dB itself, with one running mean and standard deviation. The dB are not
relative to the clip's maximum, which keeps the loudness, and their range is not limited. The
authors switch from Adam (1e-4) to SGD after some epochs; this config stays with Adam.

They report .9126 ROC-AUC and .4590 PR-AUC, residual .9129 and .4614, on the same clean split.

No result: MagnaTagATune's audio was not available.
"""

from ml_collections import ConfigDict

from musicgenre.config import base_config


def get_config() -> ConfigDict:
    """Returns the config: 29.1 s are 1821 frames, and a crop of 231 frames is 3.69 s."""
    config = base_config()
    config.data.dataset = "mtat"
    config.data.protocol = "clean"
    config.data.top_k = 50
    config.data.frames = 1821
    config.data.normalise = "none"
    config.data.crop_frames = 231
    config.data.eval_chunks = 16
    config.features.sample_rate = 16000
    config.features.n_fft = 512
    config.features.hop_length = 256
    config.features.n_mels = 128
    config.features.db_ref = "1.0"
    config.features.top_db = 200.0
    config.model = ConfigDict({"name": "short_chunk", "module": "", "residual": False})
    config.batch_size = 16
    config.epochs = 200
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "constant"
    return config
