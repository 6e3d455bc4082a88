r"""Pretrain a network without labels; the same command resumes a stopped run, bit-exactly.

By contrasting two views of each clip (SimCLR), any network:

musicgenre pretrain --config=gtzan_mels_simclr --workdir=runs/simclr
musicgenre train --config=ablations/gtzan_pretrained --config.init_from=runs/simclr \
    --workdir=runs/tuned

By contrastive divergence, the stacked restricted Boltzmann machines of the model "rbm":

musicgenre pretrain --config=gtzan_mels_rbm --workdir=runs/rbm_pretrained
musicgenre train --config=gtzan_mels_rbm --config.init_from=runs/rbm_pretrained --workdir=runs/rbm

`--config.pretrain.method` names the method; by default it follows from the model.
"""

from typing import Any

from absl import flags
from tqdm import tqdm

from musicgenre.cli import app

FLAGS = flags.FlagValues()
app.define_config(FLAGS)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: config, metrics, checkpoints.", FLAGS, required=True
)
_PROGRESS = flags.DEFINE_bool("progress", True, "Draw a progress bar.", FLAGS)


def main() -> int:
    """Pretrains, prints the result, and returns the exit code."""
    from musicgenre.runs.workdir import Interrupted
    from musicgenre.training.objectives import rbm, simclr

    config = app.get_config(FLAGS)
    divergence = config.pretrain.method == "contrastive_divergence" or (
        config.pretrain.method == "" and config.model.name == "rbm"
    )
    result: Any
    try:
        if divergence:
            result = rbm.pretrain(config, _WORKDIR.value, progress=_PROGRESS.value)
        else:
            result = simclr.pretrain(
                config, _WORKDIR.value, progress=_PROGRESS.value, say=tqdm.write
            )
    except Interrupted as stop:
        print(stop)
        return 128 + stop.signal_number
    print(result.line())
    return 0


if __name__ == "__main__":
    app.run(__name__)
