r"""What learning without labels first is worth on the real GTZAN arrays: 442 clips to train on, 197 to validate.

for seed in 0 1 2; do
  python experiments/pretrain.py --config=configs/gtzan_mels_simclr.py --config.seed=$seed --workdir=runs/gtzan_simclr/seed$seed
done
python experiments/ablate.py --config=configs/ablations/gtzan_pretrained.py --workdir=runs/gtzan_pretrained --seeds=3
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import gtzan_mels_simclr


def get_config() -> ConfigDict:
    """Returns what the variants change: the network, crops and augmentation of the pretraining, with labels."""
    config = gtzan_mels_simclr.get_config()
    config.batch_size = 32
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
