r"""What learning without labels first is worth on the real GTZAN arrays: 442 clips to train on, 197 to validate.

for seed in 0 1 2; do
  python experiments/pretrain.py --config=configs/gtzan_mels_simclr.py --config.seed=$seed --workdir=runs/gtzan_simclr/seed$seed
done
python experiments/ablate.py --config=configs/ablations/gtzan_pretrained.py --workdir=runs/gtzan_pretrained --seeds=3

Validation accuracy at the end of training, seeds 0-2, mean +- deviation (95 % t interval of the mean; fault-filtered lists, last
checkpoint, nothing selected; jax 0.10.2, one CPU core); the table and its plot are in docs/results/gtzan_pretrained:

    scratch  42.6 % +- 0.5 (41.4-43.9)    tuned  45.9 % +- 0.8 (43.9-47.8)
                                          probe  46.4 % +- 1.9 (41.6-51.1)

Pretraining helps, and a head alone on what it has learnt is as good as tuning all of it. But it takes more than twice the time of
a training of 50 epochs, and from scratch for 100 epochs (scratch_longer, two seeds only) 49.7 and 44.7 % were reached: no less.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict
from musicgenre.configs import gtzan_mels_simclr


def get_config() -> ConfigDict:
    """Returns what the variants change: the network, crops and augmentation of the pretraining, with labels."""
    config = gtzan_mels_simclr.get_config()
    config.batch_size = 32
    config.data.eval_chunks = 5
    config.epochs = 50
    return config


def sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the variants; each seed starts from the pretraining of the same seed."""
    pretrained = {"init_from": "runs/gtzan_simclr/seed{seed}"}
    yield "scratch", {}
    yield "tuned", pretrained
    # All but the head stays as the pretraining left it; a head alone takes larger steps.
    yield "probe", pretrained | {"optimizer.transferred_rate": 0.0, "optimizer.learning_rate": 1e-2}
    # Twice as long with labels: the pretraining takes more than twice the time of a training of 50 epochs.
    yield "scratch_longer", {"epochs": 100}
