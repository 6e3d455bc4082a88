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

from absl import flags

from musicgenre.cli import app
from musicgenre.experiments.train import define_flags, run

FLAGS = flags.FlagValues()
define_flags(FLAGS)


def main() -> int:
    """Pretrains, prints the result, and returns the exit code."""
    return run("pretrain", FLAGS)


if __name__ == "__main__":
    app.run(__name__)
