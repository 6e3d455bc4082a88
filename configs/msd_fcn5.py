r"""FCN-5 (Choi 2016) on 30 s previews of Million Song Dataset songs, 96 bands x 1366 frames at 12 kHz.

    pip install 'musicgenre[msd]'
    export MUSICGENRE_7DIGITAL_KEY=... MUSICGENRE_7DIGITAL_SECRET=...
    python experiments/fetch_previews.py --root=<folder with the .h5 files>
    python experiments/prepare.py --config=configs/msd_fcn5.py --config.data.root=<the same>
    python experiments/train.py --config=configs/msd_fcn5.py --config.data.root=<the same> --workdir=runs/msd_fcn5
    python experiments/evaluate.py --workdir=runs/msd_fcn5 --split=test

Fetching ends at 4,000 requests a day with exit code 3; run it again the next day. To train on what is there until then, add
--config.data.allow_missing=True to the commands after it.

No result: no previews were at hand, and nothing has been trained with this. The tags are the 50 commonest Echo Nest terms of the
songs' artists, split by artist; published figures (Choi's corrected ROC-AUC .855 for FCN-5, say) are on Last.fm tags of another
split, so the two are not comparable. In the report's trial 622 of 3,242 songs had a preview.
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
