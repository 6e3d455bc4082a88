r"""The sample-level network (Lee 2017) on MagnaTagATune's waveforms at 22,050 Hz: 59,049 samples (2.68 s) at a time, 50 tags.

    python experiments/download.py --dataset=mtat --root=/data/mtat
    python experiments/prepare.py --config=configs/mtat_sample_level.py --config.data.root=/data/mtat
    python experiments/train.py --config=configs/mtat_sample_level.py --config.data.root=/data/mtat --workdir=runs/sample_level
    python experiments/evaluate.py --workdir=runs/sample_level --split=test

The store holds the samples themselves as frames of 729, 880 of them for 29.1 s: 1.3 MB a clip, 27 GB for the 21,111 clips of the
protocol. Training takes random crops of 81 frames, which are 59,049 samples; a clip's scores are the means over ten evenly
spaced ones, as many as it holds without overlap. A batch of 23 clips, Nesterov's momentum and a first rate of .01 are the
paper's (the rate is unverified); it lowers the rate whenever the validation loss stalls, for which a cosine over the whole run
stands here. On this split Won (2020) reports ROC-AUC .9058 and PR-AUC .4422 for the network, and .9103 and .4520 for one with
squeeze, excitation and residual connections; --config.model.squeeze_excite=True adds squeeze and excitation only.

No result yet: MTAT's audio was not at hand when this was written, so only the code path has been run, on made-up clips.
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
