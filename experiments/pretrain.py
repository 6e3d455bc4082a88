r"""Pretrains a network without labels. The same command goes on where it was stopped, to the bit.

By contrast of two views of each clip (SimCLR), any network:

python experiments/pretrain.py --config=configs/gtzan_mels_simclr.py --workdir=runs/simclr
python experiments/train.py --config=configs/ablations/gtzan_pretrained.py --config.init_from=runs/simclr --workdir=runs/tuned

By contrastive divergence, the stacked restricted Boltzmann machines of the model "rbm":

python experiments/pretrain.py --config=configs/gtzan_mels_rbm.py --workdir=runs/rbm_pretrained
python experiments/train.py --config=configs/gtzan_mels_rbm.py --config.init_from=runs/rbm_pretrained --workdir=runs/rbm

`--config.pretrain.method` says which, where it does not go by the model.
"""

from absl import flags

from musicgenre.cli import app
from musicgenre.runs.workdir import Interrupted
from musicgenre.training.fit import pretrain

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: config, metrics and checkpoints.", required=True
)
_PROGRESS = flags.DEFINE_bool("progress", True, "Draw a progress bar.")


def main() -> int:
    """Pretrains, prints how it ended, and returns the exit code."""
    config = app.get_config()
    try:
        result = pretrain(config, _WORKDIR.value, progress=_PROGRESS.value)
    except Interrupted as stop:
        print(stop)
        return 128 + stop.signal_number
    print(result.line())
    return 0


if __name__ == "__main__":
    app.define_config_flag()
    app.run(main)
