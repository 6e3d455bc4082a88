r"""Training choices for a small 2D network on GTZAN (442 training clips), one change each.

    musicgenre ablate --config=ablations/gtzan_training:arrays \
      --config.data.root=/data/gtzan_mels --workdir=runs/gtzan_training --seeds=3

Validation accuracy on the arrays at the end of training, seeds 0-2, mean +- standard deviation (95
% t interval of the mean; fault-filtered lists, 30 epochs, nothing selected; jax 0.10.2, one CPU
core, 10 to 40 s per run); the table and its plot are in docs/results/gtzan_training:

    baseline          54.7 % +- 1.8 (50.2-59.1)    one_chunk         54.5 % +- 2.8 (47.5-61.4)
    spec_augment      54.8 % +- 1.3 (51.5-58.2)    five_chunks       55.3 % +- 2.6 (48.8-61.9)
    mixup             53.3 % +- 4.0 (43.3-63.3)    label_smoothing   53.5 % +- 2.8 (46.5-60.4)
    cutmix            51.1 % +- 1.6 (47.0-55.2)    weight_decay      55.0 % +- 2.1 (49.7-60.2)
    time_stretch      50.6 % +- 4.4 (39.6-61.6)    no_dropout        54.7 % +- 2.9 (47.4-61.9)
    pitch_shift       57.4 % +- 2.7 (50.7-64.0)    ema               55.2 % +- 1.8 (50.7-59.6)
    eq                54.5 % +- 1.3 (51.3-57.7)    keras_decay       53.8 % +- 2.5 (47.5-60.1)
    gain              55.0 % +- 1.8 (50.6-59.4)    constant_rate     51.6 % +- 0.8 (49.7-53.5)
    noise             52.8 % +- 3.2 (44.9-60.7)    momentum          48.4 % +- 2.3 (42.7-54.1)
    time_shuffle      54.3 % +- 5.3 (41.2-67.4)    twice_as_long     57.4 % +- 1.3 (54.0-60.7)
    crops258          56.7 % +- 4.1 (46.5-66.9)    normalise_global  57.7 % +- 2.5 (51.5-63.9)
    whole_clips       51.3 % +- 4.8 (39.2-63.3)    normalise_none    56.2 % +- 3.4 (47.8-64.6)

With 23 changes and one baseline of three seeds, the best of them are overestimated.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from musicgenre.configs.ablations import gtzan_networks


def get_config(source: str = "audio") -> ConfigDict:
    """Returns `conv2d` of `gtzan_networks`, trained as there; `source` is "audio" or "arrays"."""
    config = gtzan_networks.get_config(source)
    # A few milliseconds per step, and its global pool takes any number of frames.
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
    # Longer training windows, whole clips, and the number of windows per evaluated clip.
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
