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

    Imports `config.module` first. Fields of `model` are the chosen network's, and others of
    `pretrain` the chosen objective's: both are checked when these are built.

    Raises:
      UserError: an unknown field (the message names the nearest one), a missing field, a value of
        another type or out of its range, or values that contradict each other.
    """
    if config.get("module"):
        import_user_module(config.module)
    known, values = dict(flatten(base_config())), dict(flatten(config))
    own = {f"data.{key}": value for key, value in _own_data_fields(config).items()}
    for name, value in values.items():
        if name in own or (name in known and name.startswith("features.")):
            check_type(name, value, (own | known)[name])
        elif name not in known and not name.startswith(("model.", "pretrain.")):
            hint = did_you_mean(name, known | own)
            raise UserError(f"config.{name} is not a field of the configuration.{hint}")
    if missing := [name for name in known if name not in values]:
        raise UserError(f"config.{missing[0]} is missing: start from base_config().")
    _make(sections.Experiment, config)
    for section, cls in sections.SECTIONS.items():
        _make(cls, config[section])
    clip_layout(config)
    for problem, text in (*_contradictions(config), *_unfit_augmentations(config)):
        if problem:
            raise UserError(f"config.{text}")


def _make(cls: type[Section], values: Any) -> Section:
    """Makes a section, which checks its fields."""
    fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
    if cls is sections.Data:
        fields["files"] = _make(sections.Files, values.files)
    return cls(**fields)


def _own_data_fields(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields that a user's data set adds to the section `data`, with their defaults."""
    return extra_fields(str(config.data.get("dataset", "")))


def _contradictions(config: ConfigDict) -> Iterator[tuple[Any, str]]:
    """Yields whether fields contradict each other, and a message that follows "config."."""
    data, optimizer = config.data, config.optimizer
    yield (
        optimizer.transferred_rate != 1 and not config.init_from,
        "optimizer.transferred_rate has no effect without config.init_from, the run to start from.",
    )
    for name in config.distill.teachers:
        yield (
            not isinstance(name, str) or not name,
            f"distill.teachers takes the names of models, such as ('gtzan',), not {name!r}.",
        )
    yield (
        config.batch_size % optimizer.accumulate,
        f"batch_size={config.batch_size} does not divide by optimizer.accumulate="
        f"{optimizer.accumulate}.",
    )
    yield data.crop_frames and data.normalise == "position", f"data.crop_frames {_BY_BAND}"
    yield (
        config.features.kind == "waveform" and data.pad == "silence",
        "data.pad='silence' is the quietest value of a spectrogram: take 'repeat' or 'zero' for a "
        "waveform.",
    )
    yield (
        len(data.fractions) != 3,
        f"data.fractions takes three numbers (train, valid, test), not {data.fractions!r}.",
    )


_BY_BAND = (
    "needs a normalisation that does not depend on the position in the clip: set "
    "--config.data.normalise=band."
)
# Types of features that an augmentation applies to. Those in dB need compression "db" as well.
_DECIBELS = ("gain", "eq", "noise", "low_pass", "high_pass")
_AUGMENTED = {
    "time_stretch": ("logmel", "stft", "mfcc"),
    "pitch_shift": ("logmel",),
    "band_masks": ("logmel", "stft"),
} | dict.fromkeys(_DECIBELS, ("logmel", "stft"))


def _unfit_augmentations(config: ConfigDict) -> Iterator[tuple[Any, str]]:
    """Yields whether an augmentation cannot be applied, and a message that follows "config."."""
    augment, spec = config.augment, feature_spec(config)
    frames = config.data.crop_frames or config.data.frames
    said = {name: f"augment.{name}={value}" for name, value in augment.items()}
    for name, value in augment.items():
        yield value == float("inf"), f"{said[name]} must be a finite number."
    yield (
        augment.time_shuffle == 1 or augment.time_shuffle > frames,
        f"{said['time_shuffle']} must be 0 (off) or from 2 segments to the {frames} frames.",
    )
    too_far = f"{said['pitch_shift']} must be below the {spec.bands} bands."
    yield augment.pitch_shift >= spec.bands, too_far
    for name, size, what in (("time", frames, "frames"), ("band", spec.bands, "bands")):
        widest = f"{name}_mask_share"
        empty = augment[f"{name}_masks"] and augment[widest] * size < 1
        yield empty, f"{said[widest]} of {size} {what} is less than one: empty masks."
    for name, kinds in _AUGMENTED.items():
        wanted = f"features.kind={' or '.join(kinds)}, not {spec.kind!r}"
        unfit = augment[name] and spec.kind not in kinds
        yield unfit, f"{said[name]} is for {wanted}: leave it at 0."
        yield (
            augment[name] and name in _DECIBELS and spec.compression != "db",
            f"{said[name]} is in dB, which features.compression={spec.compression!r} is not: leave "
            "it at 0.",
        )
    for name in ("time_stretch", "time_shuffle"):
        yield augment[name] and config.data.normalise == "position", f"{said[name]} {_BY_BAND}"
    for name in ("mixup", "cutmix"):
        yield (
            augment[name] and config.batch_size < 2,
            f"{said[name]} mixes the clips of a batch: config.batch_size must be at least 2.",
        )


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
        return {**default, **{key: merge(default.get(key), there[key]) for key in there}}

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
