"""Fields that know their meaning and range, and sections of them that check themselves."""

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any, ClassVar

from musicgenre.errors import UserError, did_you_mean


def setting(
    default: Any,
    meaning: str,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """Returns a dataclass field with its default, its meaning (with units) and its allowed values.

    The field has its default's type. `choices` are its only values; `least`, `above`, `most` and
    `below` limit a number.
    """
    limits = {"at least": least, "above": above, "at most": most, "below": below}
    known = {words: limit for words, limit in limits.items() if limit is not None}
    metadata = {"meaning": meaning, "choices": choices, "limits": known}
    return dataclasses.field(default=default, metadata=metadata)


def default_of(field: Any) -> Any:
    """Returns the default of a dataclass field."""
    made: bool = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def check_type(name: str, value: Any, default: Any) -> None:
    """Raises UserError unless a value has its default's type; an int may stand for a float."""
    numeric = isinstance(default, float) and type(value) is int
    if type(value) is not type(default) and not numeric:
        wanted = type(default).__name__
        raise UserError(f"config.{name} must be {wanted} like {default!r}, not {value!r}.")


# A NaN fails every one of them.
_HOLDS = {"at least": operator.ge, "above": operator.gt}
_HOLDS |= {"at most": operator.le, "below": operator.lt}


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of a config. Making one checks each of its fields.

    Raises:
      UserError: a value has another type or lies out of its range; the message names the field.
    """

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field in [field for field in dataclasses.fields(self) if field.metadata]:
            name, value = self.prefix + field.name, getattr(self, field.name)
            choices, limits = field.metadata["choices"], field.metadata["limits"]
            check_type(name, value, field.default)
            if choices and value not in choices:
                hint = did_you_mean(value, choices)
                raise UserError(f"config.{name}={value!r} is not known.{hint}")
            if not all(_HOLDS[words](value, limit) for words, limit in limits.items()):
                raise UserError(f"config.{name} must be {limits_text(limits)}, not {value}.")


def limits_text(limits: dict[str, float]) -> str:
    """Returns limits in words, such as "at least 0 and below 1"."""
    return " and ".join(f"{words} {limit:g}" for words, limit in limits.items())


def documented_fields(cls: Any) -> Iterator[tuple[str, Any, str]]:
    """Yields (name, default, meaning) of a dataclass's fields, from the docstrings."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, attributes = (base.__dict__.get("__doc__") or "").partition("Attributes:\n")
        name = ""
        for line in attributes.partition("\n\n")[0].splitlines():
            if line.startswith(6 * " ") and line[6:7].strip() and ": " in line:
                name, _, text = line.strip().partition(": ")
                meanings[name] = text
            elif name and line.startswith(6 * " "):
                meanings[name] += " " + line.strip()
    for field in dataclasses.fields(cls):
        yield field.name, default_of(field), meanings.get(field.name, "")
