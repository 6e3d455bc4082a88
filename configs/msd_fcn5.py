r"""FCN-5 (Choi 2016) on 30 s previews of Million Song Dataset songs, 1366 x 96 mels at 12 kHz.

    pip install 'musicgenre[msd]'
    export MUSICGENRE_7DIGITAL_KEY=... MUSICGENRE_7DIGITAL_SECRET=...
    musicgenre fetch_previews --root=/data/msd    # the folder with the .h5 files
    musicgenre prepare --config=msd_fcn5 --config.data.root=/data/msd
    musicgenre train --config=msd_fcn5 --config.data.root=/data/msd --workdir=runs/msd_fcn5
    musicgenre evaluate --workdir=runs/msd_fcn5 --split=test

Fetching ends with exit code 3 at 4,000 requests per day; run it again the next day. To train on
the previews fetched so far, add --config.data.allow_missing=True to the commands that follow it.

No result: no previews were available, and nothing has been trained with this config. The tags are
the 50 most frequent Echo Nest terms of the songs' artists, split by artist. Published figures
(such as Choi's corrected ROC-AUC .855 for FCN-5) are on Last.fm tags with another split and are
not comparable. In the report's trial 622 of 3,242 songs had a preview.
"""

from ml_collections import ConfigDict

from musicgenre.config import base_config
from musicgenre.models.fcn import FCN_SIZES


def get_config() -> ConfigDict:
    """Returns the config."""
    config = base_config()
    config.data.dataset = "msd"
    config.data.frames = 1366
    config.data.excerpt = "middle"
    config.data.normalise = "band"
    config.features.sample_rate = 12000
    config.features.n_fft = 512
    config.features.hop_length = 256
    config.features.n_mels = 96
    config.model = ConfigDict({"name": "fcn", "module": "", **FCN_SIZES["fcn5"]})
    config.batch_size = 16
    config.optimizer.schedule = "constant"
    config.select_metric = "macro_roc_auc"
    config.patience = 10
    return config
