r"""The report's residual network with the data and the recipe of gtzan_mels_conv1d.

    musicgenre prepare --config=gtzan_mels_resnet --config.data.root=/data/gtzan
    musicgenre train --config=gtzan_mels_resnet --config.data.root=/data/gtzan --workdir=runs/resnet
    musicgenre evaluate --workdir=runs/resnet --split=valid

The default is the notebook's two identity units. The usual sizes follow a colon (resnet18,
resnet50 and so on), and so does the variant on precomputed spectrograms (see gtzan_mels_conv1d):

    --config=gtzan_mels_resnet:resnet18
    --config=gtzan_mels_resnet:arrays
    --config=gtzan_mels_resnet:resnet18-arrays

The original units: --config.model.preactivation=False.

Result of the default size on the arrays (442 training clips of the fault-filtered train list, 197
evaluation clips of its valid list; seeds 0-2, 50 epochs, last checkpoint, nothing tuned; jax
0.10.2, one CPU core; the command is that of configs/ablations/report_networks.py):

    accuracy 57.0 % +- 2.8 (t interval of the mean over seeds 50.1-64.0)

The report states about 20 %. Its notebook reached 58.8 % on the validation clips of a random
split, which share artists with the training clips, and 98 % on the training clips. The other sizes
have not been trained, and the test list (290 clips) was not evaluated.
"""

from ml_collections import ConfigDict

from musicgenre.configs import gtzan_mels_conv1d
from musicgenre.errors import UserError, did_you_mean
from musicgenre.models.resnet import RESNET_SIZES


def get_config(variant: str = "report-audio") -> ConfigDict:
    """Returns the config of a size and a source.

    Args:
      variant: one of `RESNET_SIZES`, one of `gtzan_mels_conv1d.SOURCES`, or both joined by
        a hyphen.

    Raises:
      UserError: the size or the source is unknown.
    """
    size, _, source = variant.rpartition("-")
    if not size:
        size, source = (
            ("report", variant) if variant in gtzan_mels_conv1d.SOURCES else (variant, "audio")
        )
    if size not in RESNET_SIZES:
        raise UserError(
            f"--config=gtzan_mels_resnet:{variant}: no size {size!r}."
            + did_you_mean(size, (*RESNET_SIZES, *gtzan_mels_conv1d.SOURCES))
        )
    config = gtzan_mels_conv1d.get_config(source)
    config.model = ConfigDict(
        {"name": "resnet", "module": "", "preactivation": True} | RESNET_SIZES[size]
    )
    return config
