r"""The report's best network for MagnaTagATune (section 4): fully convolutional, on its own front end of 628 frames x 128 mels.

    python experiments/prepare.py --config=configs/mtat_fcn_report.py --config.data.root=<folder of MagnaTagATune>
    python experiments/train.py --config=configs/mtat_fcn_report.py --config.data.root=<the same> --workdir=runs/mtat_fcn_report
    python experiments/evaluate.py --workdir=runs/mtat_fcn_report --split=test

The recipe is that of the author's script: mean squared error of the sigmoid outputs, Adam with 1e-3 x .96 every 100,000
steps, batches of 32, 100 epochs. The report states no filters; these are FCN-4's (Choi et al. 2016), with pools that leave one
position of 628 x 128, for which FCN-4's own pools are too large.

Its random split leaks: most tracks have clips on both sides, so that its numbers are comparable with nothing but the report.
With `--config.data.protocol=clean` or `grouped` no track is on both sides.

No result yet: MagnaTagATune's audio was not at hand.
"""

from ml_collections import ConfigDict

from musicgenre.config import base_config
from musicgenre.models.fcn import FCN_SIZES


def get_config() -> ConfigDict:
    """Returns the config; the front end is the base's, which is the report's."""
    config = base_config()
    config.data.dataset = "mtat"
    config.data.protocol = "report"
    config.data.top_k = 50
    config.data.frames = 628
    config.model = ConfigDict({"name": "fcn", "module": ""} | FCN_SIZES["report"])
    config.batch_size = 32
    config.epochs = 100
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "exponential"
    config.optimizer.decay_rate = 0.96
    config.optimizer.decay_steps = 100_000
    config.loss.name = "mse"
    return config
