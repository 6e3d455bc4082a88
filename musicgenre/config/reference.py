"""Every config field in words, for `musicgenre config` and for the reference page."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from musicgenre import models
from musicgenre.audio.features import FeatureSpec
from musicgenre.config import base, sections
from musicgenre.config.fields import Section, documented_fields, limits_text
from musicgenre.models.registry import input_limits


class FieldText(NamedTuple):
    """A field in words: dotted name, default, meaning with units, choices or range."""

    name: str
    default: Any
    meaning: str
    allowed: str = ""


Texts = dict[str, tuple[str, list[FieldText]]]


def section_texts() -> Texts:
    """Returns section -> (what it is about, its fields), in the order of a config."""
    every: dict[str, type[Section]] = {"": sections.Experiment, **sections.SECTIONS}
    texts: Texts = {name: (_summary(cls), list(_fields(cls))) for name, cls in every.items()}
    own = documented_fields(FeatureSpec)
    front_end = [FieldText(f"features.{name}", *description) for name, *description in own]
    return texts | {"features": (_summary(FeatureSpec), front_end)}


def network_texts() -> Texts:
    """Returns network -> (what it is, its own fields of the section `model`)."""
    texts: Texts = {}
    for name, cls in models.registered().items():
        meanings = {field: meaning for field, _, meaning in documented_fields(cls)}
        own = models.hyperparameters(cls).items()
        fields = [FieldText(f"model.{key}", value, meanings.get(key, "")) for key, value in own]
        texts[name] = (_summary(cls), fields)
    return texts


def listing(values: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Yields lines for people: every field with its value, meaning and allowed values.

    The values are the defaults, or those of a config; "*" marks the ones that it changes.
    """
    shown = dict(base.flatten(values)) if values is not None else {}
    texts = section_texts()
    if values is not None:
        network = network_texts()[str(values["model"]["name"])]
        texts["model"] = (texts["model"][0], texts["model"][1] + network[1])
    for name, (summary, fields) in texts.items():
        yield f"# {name or 'top level'}: {summary}"
        for field in fields:
            value = shown.get(field.name, field.default)
            mark = "*" if value != field.default else " "
            yield f"{mark} {field.name} = {value!r}"
            yield f"      {field.meaning}{f' [{field.allowed}]' if field.allowed else ''}"
        yield ""


def network_listing() -> Iterator[str]:
    """Yields lines for people: every registered network with its fields and the input it takes."""
    for name, (summary, fields) in network_texts().items():
        yield f"# {name}: {summary}"
        yield f"  input: {_input_text(models.registered()[name])}"
        for field in fields:
            yield f"  {field.name} = {field.default!r}"
            if field.meaning:
                yield f"      {field.meaning}"
        yield ""


def markdown() -> Iterator[str]:
    """Yields the lines of the reference page: one table per section and per network."""
    yield "# Config fields"
    yield ""
    yield "Every field is a flag: `--config.optimizer.name=adamw`. `musicgenre config` lists them."
    for title, texts in (("Section", section_texts()), ("Network", network_texts())):
        for name, (summary, fields) in texts.items():
            yield from ("", f"## {title} `{name or 'top level'}`", "", summary, "")
            if fields:
                yield from ("| field | default | meaning | allowed |", "| --- | --- | --- | --- |")
            for field in fields:
                cells = (f"`{field.name}`", f"`{field.default!r}`", field.meaning, field.allowed)
                yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _fields(cls: type[Section]) -> Iterator[FieldText]:
    for field in dataclasses.fields(cls):
        if not field.metadata:
            yield from _fields(sections.Files)
            continue
        choices, limits = field.metadata["choices"], field.metadata["limits"]
        allowed = ", ".join(choice or "''" for choice in choices) or limits_text(limits)
        yield FieldText(cls.prefix + field.name, field.default, field.metadata["meaning"], allowed)


def _summary(cls: Any) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _input_text(cls: Any) -> str:
    """Returns the input that a network takes with its default fields."""
    limits = input_limits(cls)
    parts = [f"at least {limits.min_frames} frames x {limits.min_bands} bands"]
    parts += [f"at most {limits.max_frames} frames"] * bool(limits.max_frames)
    parts += [f"at most {limits.max_bands} bands"] * bool(limits.max_bands)
    parts += [f"at least {limits.min_values} values"] * (limits.min_values > 1)
    parts += [f"of {' or '.join(limits.kinds)}"] * bool(limits.kinds)
    return ", ".join(parts)
