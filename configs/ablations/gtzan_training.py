r"""How a small 2-D network is trained, one change each, on the real GTZAN arrays: 442 clips to train on, 197 to validate.

python experiments/ablate.py --config=configs/ablations/gtzan_training.py --workdir=runs/gtzan_training --seeds=3

RESULTS
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs.ablations import gtzan_networks


def get_config() -> ConfigDict:
    """Returns what the variants change: `conv2d` of `configs/ablations/gtzan_networks.py`, trained as there."""
    config = gtzan_networks.get_config()
    # Convolutions over frames and bands and one pool over all of both: a few milliseconds a step, and no tie to a length.
    config.model = ConfigDict(gtzan_networks.CONV2D)
    return config


def sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the variants."""
    yield "baseline", {}
    # Augmentation of every clip.
    yield "spec_augment", {"augment.time_masks": 2, "augment.band_masks": 2}
    yield "mixup", {"augment.mixup": 0.4}
    yield "cutmix", {"augment.cutmix": 0.4}
    yield "time_stretch", {"augment.time_stretch": 0.16}
    yield "pitch_shift", {"augment.pitch_shift": 2.0}
    yield "eq", {"augment.eq": 4.0}
    yield "gain", {"augment.gain": 6.0}
    yield "noise", {"augment.noise": 2.0}
    yield "time_shuffle", {"augment.time_shuffle": 4}
    # What is seen of a clip: longer crops, all of it, and how many chunks are scored after the same training.
    yield "crops258", {"data.crop_frames": 258}
    yield "whole_clips", {"data.crop_frames": 0, "data.eval_chunks": 1}
    yield "one_chunk", {"data.eval_chunks": 1}
    yield "five_chunks", {"data.eval_chunks": 5}
    # Regularisation.
    yield "label_smoothing", {"loss.label_smoothing": 0.1}
    yield "weight_decay", {"optimizer.name": "adamw", "optimizer.weight_decay": 0.1}
    yield "no_dropout", {"model.dropout": 0.0}
    yield "ema", {"ema_decay": 0.99}
    # Optimiser and schedule.
    yield "keras_decay", {"optimizer.schedule": "keras", "optimizer.warmup_steps": 0}
    yield "constant_rate", {"optimizer.schedule": "constant"}
    yield "momentum", {"optimizer.name": "momentum", "optimizer.learning_rate": 0.02}
    yield "twice_as_long", {"epochs": 60, "eval_every": 60}
    # Normalisation.
    yield "normalise_global", {"data.normalise": "global"}
    yield "normalise_none", {"data.normalise": "none"}
