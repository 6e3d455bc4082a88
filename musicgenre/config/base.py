"""The config of an experiment: its defaults, its checks, and what is derived from it."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from musicgenre.audio.features import FeatureSpec
from musicgenre.audio.layout import ClipLayout
from musicgenre.config import sections
from musicgenre.config.fields import Section, check_type, documented_fields
from musicgenre.datasets.registry import CONFIG_OPTIONS, extra_fields
from musicgenre.errors import UserError, did_you_mean
from musicgenre.files import fingerprint
from musicgenre.registry import import_user_module

# Pretraining methods of this package, which have no fields beyond those of the section `pretrain`.
_OWN_METHODS = ("", "contrastive_divergence", "simclr")


def base_config() -> ConfigDict:
    """Returns every field with its default: the report's front end, network and recipe."""
    features = {name: default for name, default, _ in documented_fields(FeatureSpec)}
    return ConfigDict(sections.defaults() | {"features": features})


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every leaf."""
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def check_config(config: ConfigDict) -> None:
    """Checks a config against the fields of `base_config()` and the ranges of their values.

    The user's module that `config.module` names is imported first. Fields of `model` are the chosen
    network's and are checked when it is built, those of a pretraining objective of the user's own
    when it starts.

    Raises:
      UserError: an unknown field (the message names the nearest one), a missing field, a value of
        another type or out of its range, or values that contradict each other.
    """
    if config.get("module"):
        import_user_module(config.module)
    known, values = dict(flatten(base_config())), dict(flatten(config))
    own = {f"data.{key}": value for key, value in _own_data_fields(config).items()}
    for name, value in values.items():
        if name in own:
            check_type(name, value, own[name])
        elif name not in known and not _checked_later(name, config):
            raise UserError(
                f"config.{name} is not a field of the configuration."
                + did_you_mean(name, known | own)
            )
        elif name.startswith("features."):
            check_type(name, value, known[name])
    if missing := [name for name in known if name not in values]:
        raise UserError(
            f"config.{missing[0]} is missing: start the config from "
            "musicgenre.config.base_config()."
        )
    _make(sections.Experiment, config)
    for section, cls in sections.SECTIONS.items():
        _make(cls, config[section])
    _check_together(config)
    _check_augment(config)


def _make(cls: type[Section], values: Any) -> Section:
    """Makes a section, which checks its fields."""
    fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
    if cls is sections.Data:
        fields["files"] = _make(sections.Files, values.files)
    return cls(**fields)


def _own_data_fields(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields that a user's data set adds to the section `data`, with their defaults."""
    return extra_fields(str(config.data.get("dataset", "")))


def _checked_later(name: str, config: ConfigDict) -> bool:
    own_method = config.pretrain.get("method") not in _OWN_METHODS
    return name.startswith("model.") or (name.startswith("pretrain.") and own_method)


def _check_together(config: ConfigDict) -> None:
    """Raises UserError where fields contradict each other."""
    if config.optimizer.transferred_rate != 1 and not config.init_from:
        raise UserError(
            "config.optimizer.transferred_rate has no effect without config.init_from, the run to "
            "start from."
        )
    teachers = config.distill.teachers
    if unnamed := [name for name in teachers if not isinstance(name, str) or not name]:
        raise UserError(
            "config.distill.teachers takes the names of models, such as ('gtzan',), not "
            f"{unnamed[0]!r}."
        )
    if config.batch_size % config.optimizer.accumulate:
        raise UserError(
            f"config.batch_size={config.batch_size} does not divide by "
            f"optimizer.accumulate={config.optimizer.accumulate}."
        )
    if config.data.crop_frames and config.data.normalise == "position":
        raise UserError(
            "config.data.crop_frames needs a normalisation that does not depend on the position in "
            "the clip: set --config.data.normalise=band."
        )
    if config.features.kind == "waveform" and config.data.pad == "silence":
        raise UserError(
            "config.data.pad='silence' is the quietest value of a spectrogram: take 'repeat' or "
            "'zero' for a waveform."
        )
    if len(config.data.fractions) != 3:
        raise UserError(
            "config.data.fractions takes three numbers (train, valid, test), not "
            f"{config.data.fractions!r}."
        )
    feature_spec(config)
    clip_layout(config)


# Types of features that an augmentation applies to. Those in dB need compression "db" as well.
_DECIBELS = ("gain", "eq", "noise", "low_pass", "high_pass")
_AUGMENTED = {
    "time_stretch": ("logmel", "stft", "mfcc"),
    "pitch_shift": ("logmel",),
    "band_masks": ("logmel", "stft"),
} | dict.fromkeys(_DECIBELS, ("logmel", "stft"))


def _check_augment(config: ConfigDict) -> None:
    """Raises UserError for an augmentation that the features cannot undergo."""
    augment, spec = config.augment, feature_spec(config)
    frames = config.data.crop_frames or config.data.frames

    def wrong(name: str, reason: str) -> UserError:
        return UserError(f"config.augment.{name}={augment[name]} {reason}")

    for name, value in augment.items():
        if value == float("inf"):
            raise wrong(name, "must be a finite number.")
    if augment.time_shuffle == 1 or augment.time_shuffle > frames:
        raise wrong("time_shuffle", f"must be 0 (off) or from 2 segments to the {frames} frames.")
    if augment.pitch_shift >= spec.bands:
        raise wrong("pitch_shift", f"must be below the {spec.bands} bands.")
    for name, size, what in (("time", frames, "frames"), ("band", spec.bands, "bands")):
        if augment[f"{name}_masks"] and augment[f"{name}_mask_share"] * size < 1:
            raise wrong(f"{name}_mask_share", f"of {size} {what} is less than one: empty masks.")
    for name, kinds in _AUGMENTED.items():
        if augment[name] and spec.kind not in kinds:
            wanted = f"features.kind={' or '.join(kinds)}, not {spec.kind!r}"
            raise wrong(name, f"is for {wanted}: leave it at 0.")
        if augment[name] and name in _DECIBELS and spec.compression != "db":
            raise wrong(
                name,
                f"is in dB, which features.compression={spec.compression!r} is not: leave it at 0.",
            )
    for name in ("time_stretch", "time_shuffle"):
        if augment[name] and config.data.normalise == "position":
            raise wrong(
                name,
                "needs a normalisation that does not depend on the position in the clip: set "
                "--config.data.normalise=band.",
            )
    for name in ("mixup", "cutmix"):
        if augment[name] and config.batch_size < 2:
            raise wrong(name, "mixes the clips of a batch: config.batch_size must be at least 2.")


def feature_spec(config: ConfigDict) -> FeatureSpec:
    """Returns the front end of a config."""
    return FeatureSpec.from_dict(config.features.to_dict())


def clip_layout(config: ConfigDict) -> ClipLayout:
    """Returns the shape of the clips in a config's store."""
    return ClipLayout(config.data.frames, config.data.pad, config.data.excerpt)


def dataset_options(config: ConfigDict) -> dict[str, Any]:
    """Returns the options of `musicgenre.datasets.load_dataset` in a config."""
    data = config.data.to_dict()
    data |= {"seed": data["split_seed"], "layout": data["array_layout"]}
    options = {name: data[name] for name in ("dataset", "root", *CONFIG_OPTIONS)}
    own = {name: data.get(name, default) for name, default in _own_data_fields(config).items()}
    return options | own


def store_path(config: ConfigDict) -> Path:
    """Returns the store's folder: the named one, or one derived from data set and front end."""
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
    """Returns a plain config of an earlier version, with newer fields at their defaults."""

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
