r"""Small networks distilled from the recipe of configs/gtzan_modulation.py without band limits.

    musicgenre ablate --config=ablations/gtzan_modulation:arrays \
      --config.data.root=/data/gtzan_mels --workdir=runs/gtzan_modulation --seeds=5 --only=no_limits
    musicgenre ablate --config=ablations/gtzan_modulation:arrays \
      --config.data.root=/data/gtzan_mels --config.data.files.valid= \
      --config.data.protocol=artist_kfold --workdir=runs/gtzan_distill_teachers --folds=5 \
      --seeds=1 --steps=301 --only=no_limits
    musicgenre ablate --config=ablations/gtzan_distill:arrays --config.data.root=/data/gtzan_mels \
      --workdir=runs/gtzan_distill --seeds=3

A student has 110,090 parameters, a teacher 2,630,666. Validation accuracy at the end of training,
seeds 0-2, mean +- standard deviation (95 % t interval of the mean; 442 training and 197 validation
clips; nothing selected; jax 0.10.2, one CPU core, one minute per run):

    plain       64.8 % +- 1.1 (62.2-67.4)
    five_seeds  65.0 % +- 1.8 (60.6-69.3)    five_seeds_most  64.8 % +- 1.5 (61.2-68.4)
    five_folds  64.3 % +- 0.3 (63.6-65.0)    five_folds_most  60.7 % +- 1.6 (56.9-64.6)

Distillation gains nothing here. The five seeds (no_limits, 66.4 % +- 0.8) have memorised the clips
they teach: they give the true genre 0.75 on average, where labels smoothed by 0.3 give it 0.73, so
they add little to the labels. Of the five folds by artist, the one teacher that did not train on a
clip is right on 75.6 % of them and gives the true genre 0.39. As half of the target that does no
harm that three seeds could show; as nine tenths it costs four points. A student without teachers
is within two points of them, so there is little to transfer.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from musicgenre.configs import gtzan_modulation

ALL = tuple(f"runs/gtzan_modulation/no_limits/seed{seed}" for seed in range(5))
FOLDS = tuple(f"runs/gtzan_distill_teachers/no_limits/fold{fold}/seed0" for fold in range(5))


def get_config(source: str = "audio") -> ConfigDict:
    """Returns a student: one view, half of the recipe's epochs, no band limits."""
    config = gtzan_modulation.get_config(source)
    config.augment.low_pass = 0.0
    config.augment.high_pass = 0.0
    config.model.floors = ()
    config.model.contrasts = ()
    config.model.hidden = (64,)
    config.epochs = 43
    config.eval_every = 43
    return config


def sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the variants."""
    yield "plain", {}
    yield "five_seeds", {"distill.teachers": ALL}
    yield "five_folds", {"distill.teachers": FOLDS}
    yield "five_seeds_most", {"distill.teachers": ALL, "distill.weight": 0.9}
    yield "five_folds_most", {"distill.teachers": FOLDS, "distill.weight": 0.9}
