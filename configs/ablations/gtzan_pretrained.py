r"""The gain of pretraining without labels on GTZAN: 442 training and 197 validation clips.

    for seed in 0 1 2; do
      musicgenre pretrain --config=gtzan_mels_simclr:arrays --config.data.root=/data/gtzan_mels \
        --config.seed=$seed --workdir=runs/gtzan_simclr/seed$seed
    done
    musicgenre ablate --config=ablations/gtzan_pretrained:arrays \
      --config.data.root=/data/gtzan_mels --workdir=runs/gtzan_pretrained --seeds=3

Validation accuracy on the arrays at the end of training, seeds 0-2, mean +- standard deviation (95
% t interval of the mean; fault-filtered lists, last checkpoint, nothing selected; jax 0.10.2, one
CPU core); the table and its plot are in docs/results/gtzan_pretrained:

    scratch  42.6 % +- 0.5 (41.4-43.9)    tuned  45.9 % +- 0.8 (43.9-47.8)
                                          probe  46.4 % +- 1.9 (41.6-51.1)

Pretraining helps, and a head alone on the pretrained layers is as good as fine-tuning all of them.
But pretraining takes more than twice the time of a training of 50 epochs, and training from
scratch for 100 epochs (scratch_longer, two seeds only) reached 49.7 and 44.7 %, which is no worse.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from musicgenre.configs import gtzan_mels_simclr


def get_config(source: str = "audio") -> ConfigDict:
    """Returns the pretraining's network and data; `source` is "audio" or "arrays"."""
    config = gtzan_mels_simclr.get_config(source)
    config.batch_size = 32
    config.data.eval_chunks = 5
    config.epochs = 50
    return config


def sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the variants; each seed starts from the pretraining of the same seed."""
    pretrained = {"init_from": "runs/gtzan_simclr/seed{seed}"}
    yield "scratch", {}
    yield "tuned", pretrained
    # Only the head is trained, at a higher rate.
    yield "probe", pretrained | {"optimizer.transferred_rate": 0.0, "optimizer.learning_rate": 1e-2}
    # Twice as many epochs, for comparison at about the same total time.
    yield "scratch_longer", {"epochs": 100}
