r"""The short-chunk network (Won et al. 2020) on MagnaTagATune: the 50 most frequent tags, trained on crops of 3.69 s.

    python experiments/prepare.py --config=configs/mtat_short_chunk.py --config.data.root=<folder of MagnaTagATune>
    python experiments/train.py --config=configs/mtat_short_chunk.py --config.data.root=<the same> --workdir=runs/mtat_short_chunk
    python experiments/evaluate.py --workdir=runs/mtat_short_chunk --split=test

With residual layers, on the same store: `--config.model.residual=True --workdir=runs/mtat_short_chunk_res`.

A clip's score is the mean over 16 chunks, as in the authors' code. Nothing is normalised beforehand: the network normalises its
dB itself, with one running mean and deviation. They are not relative to the clip's maximum, so that loudness is kept as it is
there, and their range is not cut. The authors go from Adam (1e-4) on to SGD after some epochs; here Adam goes on.

They report .9126 ROC-AUC and .4590 PR-AUC, residual .9129 and .4614, on the same clean split.

No result yet: MagnaTagATune's audio was not at hand.
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
