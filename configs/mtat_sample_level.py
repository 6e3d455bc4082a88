r"""The sample-level network (Lee 2017) on MagnaTagATune's waveforms: windows of 2.68 s.

    musicgenre download --dataset=mtat --root=/data/mtat
    musicgenre prepare --config=mtat_sample_level --config.data.root=/data/mtat
    musicgenre train --config=mtat_sample_level --config.data.root=/data/mtat --workdir=runs/samples
    musicgenre evaluate --workdir=runs/samples --split=test

The store holds the samples as frames of 729, 880 frames for 29.1 s: 1.3 MB per clip, 27 GB for the
21,111 clips of the protocol. Training draws random windows of 81 frames, which are 59,049 samples.
A clip's scores are the means over ten evenly spaced windows, as many as it holds without overlap.
Batches of 23 clips, Nesterov momentum and an initial rate of .01 are the paper's (the rate is
unverified). The paper lowers the rate whenever the validation loss stalls; this config uses a
cosine over the whole run. On this split Won (2020) reports ROC-AUC .9058 and PR-AUC .4422 for the
network, and .9103 and .4520 for one with squeeze-and-excitation and residual connections;
--config.model.squeeze_excite=True adds the former only.

No result: MTAT's audio was not available, so only the code path has been run, on synthetic clips.
"""

from ml_collections import ConfigDict

from musicgenre.config import base_config


def get_config() -> ConfigDict:
    """Returns the config."""
    config = base_config()
    config.data.dataset = "mtat"
    config.data.protocol = "clean"
    # 29.1 s x 22,050 Hz / 729, rounded down.
    config.data.frames = 880
    config.data.normalise = "global"
    config.data.crop_frames = 81
    config.data.eval_chunks = 10
    config.features.kind = "waveform"
    config.features.sample_rate = 22050
    config.features.hop_length = 729
    config.model.name = "sample_level"
    config.batch_size = 23
    config.optimizer.name = "momentum"
    config.optimizer.learning_rate = 0.01
    config.optimizer.momentum = 0.9
    config.optimizer.schedule = "cosine"
    config.select_metric = "macro_roc_auc"
    return config
