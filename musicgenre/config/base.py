"""The fields of an experiment. Files in `configs/` start from `base_config()` and change what differs."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from musicgenre.audio.features import FeatureSpec
from musicgenre.audio.layout import ClipLayout
from musicgenre.errors import UserError, did_you_mean
from musicgenre.files import fingerprint


def base_config() -> ConfigDict:
    """Returns every field with its default: the report's front end, model and recipe (sections 3 and 4)."""
    config = ConfigDict()
    config.seed = 0  # parameters, order of the clips, crops and dropout all derive from it

    config.data = data = ConfigDict()
    data.dataset = "gtzan"  # gtzan, mtat, msd, folder, csv, arrays or synthetic
    data.root = ""  # folder or file of the data set
    data.store = ""  # folder of its spectrogram store; "" derives one below stores_root
    data.stores_root = "stores"
    # gtzan: fault_filtered, artist_folds, random or stratified_kfold; mtat: clean, all, report or grouped; arrays: files (which
    # fault_filtered means as well), artist_kfold, random_kfold or segment_leaked
    data.protocol = "fault_filtered"
    data.top_k = 50  # mtat and msd: the most frequent tags, which are the labels
    data.fold = 0
    data.folds = 10
    data.split_seed = 42
    data.fractions = (
        0.7,
        0.15,
        0.15,
    )  # folder, csv, msd and mtat's grouped: train, valid and test, where the data have no splits
    data.allow_missing = False  # skip clips that a list names but that are not on disk (msd: not fetched yet), and say so
    data.task = ""  # csv: single_label, multi_label or regression; "" goes by the columns
    data.files = ConfigDict({"train": "", "valid": "", "test": ""})  # arrays: a file for each split
    data.array_layout = (
        "mel_time"  # arrays: order of the axes after the clips, mel_time or time_mel
    )
    data.clips_per_style = 24  # synthetic
    data.seconds = 6.0  # synthetic: length of a clip
    data.min_seconds = 1.0  # shorter sound files are skipped
    data.frames = 647  # frames per clip in the store
    data.pad = "repeat"  # what fills a shorter clip: repeat, silence or zero
    data.excerpt = "start"  # what is kept of a longer one: start or middle
    data.normalise = "position"  # position, band, global or none
    # Training clips that its statistics are taken from, evenly spaced; 0 takes all. 20,000 of a million are read in half a minute
    data.normalise_clips = 0
    data.crop_frames = 0  # random crop in time when training; 0 trains on whole clips
    data.eval_chunks = 1  # with crops: evenly spaced chunks per clip whose scores are averaged
    data.workers = 0  # Grain worker processes; none is fastest for a memory map
    # The training clips on the devices as a whole, where each step picks its batch: auto (where they fit), always or never. The
    # result is the same.
    data.on_device = "auto"

    # Done to training batches on the device, before normalisation, in this order; each is off at 0. See
    # musicgenre/training/augment.py
    config.augment = augment = ConfigDict()
    augment.time_stretch = 0.0  # rates from 1 / (1 + this) to 1 + this
    augment.time_shuffle = 0  # segments of the clip that are put into another order
    augment.pitch_shift = 0.0  # bands, up or down at most
    augment.gain = 0.0  # dB, up or down at most
    augment.eq = 0.0  # dB, up or down at most, of a curve over the bands
    augment.eq_points = 4  # points of that curve; 2 are a tilt
    augment.noise = 0.0  # dB, largest standard deviation of noise on every cell
    augment.mixup = (
        0.0  # alpha of the beta distribution of a clip's share in a mixture with another
    )
    augment.cutmix = 0.0  # the same, of the share of frames that stay the clip's own
    augment.mix_share = 1.0  # chance of a clip to be mixed
    augment.time_masks = 0  # SpecAugment: masks over frames
    augment.time_mask_share = 0.1  # widest of them, as a share of the frames
    augment.band_masks = 0  # masks over bands
    augment.band_mask_share = 0.1  # widest of them, as a share of the bands
    augment.low_pass = 0.0  # most that is taken away at the top, as a share of the bands
    augment.high_pass = 0.0  # the same at the bottom
    augment.pass_share = 1.0  # chance of a clip to undergo each of these two
    augment.probability = 1.0  # chance of a clip to undergo each of these but mixing and the passes

    config.features = ConfigDict(dataclasses.asdict(FeatureSpec()))

    config.model = ConfigDict()
    config.model.name = "conv1d"  # its fields go beside the name: --config.model.batch_norm=True
    config.model.module = ""  # a Python module of your own that registers a model

    config.init_from = (
        ""  # workdir, bundle or packaged model whose layers, all but the head, this run starts from
    )

    # Learning without labels, before: experiments/pretrain.py
    config.pretrain = pretrain = ConfigDict()
    # contrastive_divergence (stacked restricted Boltzmann machines) or simclr (two views of each clip; any network, by the
    # section `optimizer`); "" takes the first for the model rbm, the second for all others
    pretrain.method = ""
    pretrain.epochs = 20  # contrastive_divergence: of each layer
    pretrain.learning_rate = 0.01  # contrastive_divergence, as are the next three
    pretrain.momentum = 0.5
    pretrain.weight_decay = 2e-4
    pretrain.cd_steps = 1  # Gibbs steps
    pretrain.temperature = 0.5  # simclr: what the cosines are divided by
    pretrain.projection = (
        128  # simclr: numbers that views are compared by, made of the embedding by two dense layers
    )

    config.batch_size = 32  # clips of one step over all devices
    config.epochs = 100
    config.dtype = "float32"  # compute type: float32 or bfloat16; parameters stay float32

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adam"  # sgd, momentum, adam, adamw or lamb
    optimizer.learning_rate = 1e-3
    optimizer.momentum = 0.9
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.0  # adamw and lamb; on kernels only
    optimizer.schedule = (
        "keras"  # constant, cosine, exponential or keras: rate / (1 + decay_rate * step)
    )
    optimizer.decay_rate = 0.01  # keras: as above; exponential: factor each decay_steps
    optimizer.decay_steps = 1000
    optimizer.warmup_steps = 0
    optimizer.clip_norm = 0.0  # largest global norm of the gradient; 0 does not clip
    optimizer.transferred_rate = (
        1.0  # factor of the rate for layers that come from init_from; 0 freezes them
    )
    optimizer.layer_decay = 1.0  # factor of the rate from one layer to the one before it; below 1 the first layers move least
    optimizer.accumulate = 1  # parts that a batch is cut into, one after the other, to save memory

    config.loss = ConfigDict()
    # cross_entropy (softmax, or sigmoid for tags) or mse (of the probabilities, or of the outputs of a regression); "" goes by
    # the task
    config.loss.name = ""
    config.loss.label_smoothing = 0.0
    config.loss.class_weights = "none"  # none, or balanced by the training split

    # What other models say of the training clips, in the place of a share of the labels: musicgenre/training/objectives/distillation.py
    config.distill = ConfigDict()
    config.distill.teachers = ()  # workdirs, bundles or packaged models of the same labels and front end; () is off
    config.distill.weight = 0.5  # share of the teachers in the targets
    config.distill.temperature = (
        1.0  # their logits are divided by it: above 1 evens out what they say
    )

    config.ema_decay = (
        0.0  # exponential moving average of the parameters, used to evaluate; 0 is off
    )

    config.steps_per_call = 1  # steps that the device takes on its own, one after the other: for networks of a few milliseconds
    config.eval_every = 1  # epochs from one evaluation and checkpoint to the next
    config.log_every = 10  # steps
    config.select_metric = (
        ""  # marks the best checkpoint: accuracy, loss, macro_f1, macro_roc_auc, macro_pr_auc, r2
    )
    config.patience = 0  # evaluations without a better one until training stops early; 0 never does
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every leaf."""
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def check_config(config: ConfigDict) -> None:
    """Holds a config against `base_config()` and the ranges of its values.

    Fields of `model` are the chosen model's, and others of `pretrain` the chosen objective's; both are
    checked when these are built.

    Raises:
      UserError: an unknown field (the message names the nearest one), a missing field, a value of another type or
        out of its range.
    """
    known = dict(flatten(base_config()))
    there = dict(flatten(config))
    for name, value in there.items():
        if name.startswith(("model.", "pretrain.")) and name not in known:
            continue
        if name not in known:
            raise UserError(
                f"config.{name} is not a field of the configuration." + did_you_mean(name, known)
            )
        default = known[name]
        numeric = (
            isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
        )
        if type(value) is not type(default) and not numeric:
            raise UserError(
                f"config.{name} must be {type(default).__name__} like {default!r}, not {value!r}."
            )
    if missing := [name for name in known if name not in there]:
        raise UserError(
            f"config.{missing[0]} is missing: start the config from musicgenre.config.base_config()."
        )
    positive = (
        "batch_size",
        "epochs",
        "eval_every",
        "log_every",
        "data.eval_chunks",
        "steps_per_call",
        "optimizer.accumulate",
        "optimizer.decay_steps",
        "data.top_k",
        "pretrain.epochs",
        "pretrain.cd_steps",
        "pretrain.projection",
    )
    for name in positive:
        if there[name] < 1:
            raise UserError(f"config.{name} must be at least 1, not {there[name]}.")
    above_zero = (
        "optimizer.learning_rate",
        "optimizer.eps",
        "data.seconds",
        "pretrain.learning_rate",
        "pretrain.temperature",
        "distill.temperature",
    )
    for name in above_zero:
        if not there[name] > 0:
            raise UserError(f"config.{name} must be above 0, not {there[name]}.")
    for name in (
        "patience",
        "optimizer.clip_norm",
        "optimizer.weight_decay",
        "optimizer.decay_rate",
        "data.crop_frames",
        "optimizer.warmup_steps",
        "pretrain.weight_decay",
        "data.workers",
        "data.frames",
        "data.min_seconds",
        "data.normalise_clips",
        "seed",
        "data.split_seed",
    ):
        if there[name] < 0:
            raise UserError(f"config.{name} must not be negative, but is {there[name]}.")
    below_one = (
        "ema_decay",
        "loss.label_smoothing",
        "optimizer.momentum",
        "optimizer.b1",
        "optimizer.b2",
        "pretrain.momentum",
    )
    for name in below_one:
        if not 0 <= there[name] < 1:
            raise UserError(f"config.{name} must be at least 0 and below 1, not {there[name]}.")
    for name, least in (
        ("optimizer.transferred_rate", 0.0),
        ("optimizer.layer_decay", 1e-6),
        ("distill.weight", 0.0),
    ):
        if not least <= there[name] <= 1:
            raise UserError(f"config.{name} must lie between 0 and 1, not {there[name]}.")
    if there["optimizer.transferred_rate"] != 1 and not there["init_from"]:
        raise UserError(
            "config.optimizer.transferred_rate has no effect without config.init_from, the run to start from."
        )
    if unnamed := [
        name for name in there["distill.teachers"] if not isinstance(name, str) or not name
    ]:
        raise UserError(
            f"config.distill.teachers takes the names of models, such as ('gtzan',), not {unnamed[0]!r}."
        )
    choices = {
        "dtype": ("float32", "bfloat16"),
        "loss.class_weights": ("none", "balanced"),
        "optimizer.name": ("sgd", "momentum", "adam", "adamw", "lamb"),
        "optimizer.schedule": ("constant", "cosine", "exponential", "keras"),
        "select_metric": (
            "",
            "accuracy",
            "loss",
            "macro_f1",
            "macro_roc_auc",
            "macro_pr_auc",
            "r2",
        ),
        "loss.name": ("", "cross_entropy", "mse"),
        "data.normalise": ("position", "band", "global", "none"),
        "data.array_layout": ("mel_time", "time_mel"),
        "data.on_device": ("auto", "always", "never"),
    }
    for name, allowed in choices.items():
        if there[name] not in allowed:
            raise UserError(
                f"config.{name}={there[name]!r} is not known."
                + did_you_mean(str(there[name]), allowed)
            )
    if there["batch_size"] % there["optimizer.accumulate"]:
        raise UserError(
            f"config.batch_size={there['batch_size']} does not divide by optimizer.accumulate={there['optimizer.accumulate']}."
        )
    if there["data.crop_frames"] and there["data.normalise"] == "position":
        raise UserError(
            "config.data.crop_frames needs a normalisation that does not depend on the position in the clip: "
            "set --config.data.normalise=band."
        )
    if there["features.kind"] == "waveform" and there["data.pad"] == "silence":
        raise UserError(
            "config.data.pad='silence' is the quietest value of a spectrogram: take 'repeat' or 'zero' for a waveform."
        )
    if len(there["data.fractions"]) != 3:
        raise UserError(
            f"config.data.fractions takes three numbers (train, valid, test), not {there['data.fractions']!r}."
        )
    feature_spec(config)
    clip_layout(config)
    _check_augment(config)


# Kinds of features that an augmentation makes sense of; of log-mels and the STFT, its amounts are in dB.
_AUGMENTED_KINDS = {
    "time_stretch": ("logmel", "stft", "mfcc"),
    "pitch_shift": ("logmel",),
    "gain": ("logmel", "stft"),
    "eq": ("logmel", "stft"),
    "noise": ("logmel", "stft"),
    "band_masks": ("logmel", "stft"),
    "low_pass": ("logmel", "stft"),
    "high_pass": ("logmel", "stft"),
}


def _check_augment(config: ConfigDict) -> None:
    """Raises UserError for an augmentation whose value is out of its range, or that the features cannot undergo."""
    augment, spec = config.augment, feature_spec(config)
    frames = config.data.crop_frames or config.data.frames
    for name, value in augment.items():
        if name.endswith("_share") or name == "probability":
            if not 0 < value <= 1:
                raise UserError(
                    f"config.augment.{name} must be above 0 and at most 1, not {value}."
                )
        elif not 0 <= value < float("inf"):
            raise UserError(
                f"config.augment.{name} must not be negative or infinite, but is {value}."
            )
    if augment.eq_points < 2:
        raise UserError(
            f"config.augment.eq_points must be at least 2, a tilt, not {augment.eq_points}."
        )
    if augment.time_stretch > 1:
        raise UserError(
            f"config.augment.time_stretch must be at most 1, twice as fast or slow, not {augment.time_stretch}."
        )
    if augment.time_shuffle == 1 or augment.time_shuffle > frames:
        raise UserError(
            f"config.augment.time_shuffle={augment.time_shuffle} must be 0 (off) or from 2 segments to the {frames} frames."
        )
    if augment.pitch_shift >= spec.bands:
        raise UserError(
            f"config.augment.pitch_shift={augment.pitch_shift} must be below the {spec.bands} bands."
        )
    for name, size in (("time", frames), ("band", spec.bands)):
        share = augment[f"{name}_mask_share"]
        if augment[f"{name}_masks"] and share * size < 1:
            what = "frames" if name == "time" else "bands"
            raise UserError(
                f"config.augment.{name}_mask_share={share} of {size} {what} is less than one: its masks would be empty."
            )
    for name in ("low_pass", "high_pass"):
        if augment[name] > 1:
            raise UserError(
                f"config.augment.{name} is a share of the bands, at most 1, not {augment[name]}."
            )
    for name, kinds in _AUGMENTED_KINDS.items():
        if augment[name] and spec.kind not in kinds:
            raise UserError(
                f"config.augment.{name} is for features.kind={' or '.join(kinds)}, not {spec.kind!r}: leave it at 0."
            )
        if (
            augment[name]
            and name in ("gain", "eq", "noise", "low_pass", "high_pass")
            and spec.compression != "db"
        ):
            raise UserError(
                f"config.augment.{name} is in dB, which features.compression={spec.compression!r} is not: leave it at 0."
            )
    for name in ("time_stretch", "time_shuffle"):
        if augment[name] and config.data.normalise == "position":
            raise UserError(
                f"config.augment.{name} needs a normalisation that does not depend on the position in the clip: "
                "set --config.data.normalise=band."
            )
    for name in ("mixup", "cutmix"):
        if augment[name] and config.batch_size < 2:
            raise UserError(
                f"config.augment.{name} mixes the clips of a batch: config.batch_size must be at least 2."
            )


def feature_spec(config: ConfigDict) -> FeatureSpec:
    """Returns the front end of a config."""
    return FeatureSpec.from_dict(config.features.to_dict())


def clip_layout(config: ConfigDict) -> ClipLayout:
    """Returns the shape of clips in the store of a config."""
    return ClipLayout(config.data.frames, config.data.pad, config.data.excerpt)


def dataset_options(config: ConfigDict) -> dict[str, Any]:
    """Returns the options of `musicgenre.datasets.load_dataset` that a config holds."""
    data = config.data.to_dict()
    names = (
        "dataset",
        "root",
        "protocol",
        "fold",
        "folds",
        "fractions",
        "allow_missing",
        "task",
        "files",
        "top_k",
        "clips_per_style",
        "seconds",
        "frames",
    )
    return {name: data[name] for name in names} | {
        "seed": data["split_seed"],
        "layout": data["array_layout"],
    }


def store_path(config: ConfigDict) -> Path:
    """Returns the store's folder: the one that is named, or one that differs for each data set and front end."""
    if config.data.store:
        return Path(config.data.store)
    made_from = {
        **dataset_options(config),
        "min_seconds": config.data.min_seconds,
        "features": feature_spec(config).to_dict(),
        "layout": vars(clip_layout(config)),
    }
    del made_from["frames"]  # it is in the layout
    made_from["root"] = os.path.abspath(config.data.root) if config.data.root else ""
    return Path(config.data.stores_root) / f"{config.data.dataset}-{fingerprint(made_from)}"


def to_plain(config: ConfigDict) -> dict[str, Any]:
    """Returns a config as JSON values (tuples become lists)."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return plain


def from_plain(values: Mapping[str, Any]) -> ConfigDict:
    """Returns the config of `to_plain`'s result, lists as tuples again."""

    def tuples(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: tuples(item) for key, item in value.items()}
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value

    return ConfigDict(tuples(values))


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a plain config of an earlier version with the fields that have come since, at their defaults."""

    def merge(default: Any, there: Any) -> Any:
        if not isinstance(default, Mapping) or not isinstance(there, Mapping):
            return there
        return {
            key: merge(default[key], there[key]) if key in there else default[key]
            for key in default
        } | {key: value for key, value in there.items() if key not in default}

    merged: dict[str, Any] = merge(to_plain(base_config()), values)
    return merged


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Returns "field: value -> value" for each field in which two plain configs differ."""
    left, right = dict(flatten(one)), dict(flatten(other))
    return [
        f"{name}: {left.get(name, '(absent)')} -> {right.get(name, '(absent)')}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]
