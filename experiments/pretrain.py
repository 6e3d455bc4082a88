r"""Pretrains the model "rbm" without labels. The same command goes on where it was stopped, to the bit.

python experiments/pretrain.py --config=configs/gtzan_mels_rbm.py --workdir=runs/rbm_pretrained
python experiments/train.py --config=configs/gtzan_mels_rbm.py --config.init_from=runs/rbm_pretrained --workdir=runs/rbm
"""

from absl import flags

from musicgenre import app
from musicgenre.training.contrastive import pretrain
from musicgenre.training.loop import Interrupted

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: config, metrics and checkpoints.", required=True)
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
