"""Models by name. A module registers itself; one of the user's own needs no edit here.

    from musicgenre.models import register

    @register("my_net")
    class MyNet(nn.Module):
        num_classes: int
        width: int = 64
        @nn.compact
        def __call__(self, x, train): ...   # x [batch, frames, bands] -> logits [batch, num_classes]

The contract: fields are hyperparameters, `num_classes` is the only one without a default; `x` is float32; logits
come back as float32; the embedding before the head is sown as `self.sow("intermediates", "embedding", e)`. One field
is filled in where a module has it: `dtype` (the compute type). A static method `input_limits(fields) -> InputLimits` says what input it can take.
"""

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from musicgenre.errors import UserError, did_you_mean

_MODELS: dict[str, type[nn.Module]] = {}
# Fields of every Linen module, those that `build` fills in, and one that networks written for version 0.1 may declare.
_NOT_HYPERPARAMETERS = ("parent", "name", "num_classes", "dtype", "axis_name")


class InputLimits(NamedTuple):
    """The input a model can take.

    Attributes:
      min_frames: fewest frames.
      min_bands: fewest bands.
      max_frames: most frames; 0 is any number.
      max_bands: most bands; 0 is any number.
      min_values: fewest values in all, frames x bands.
      kinds: kinds of features, such as "logmel" or "waveform"; any if empty.
    """

    min_frames: int = 1
    min_bands: int = 1
    max_frames: int = 0
    max_bands: int = 0
    min_values: int = 1
    kinds: tuple[str, ...] = ()

    def problems(self, frames: int, bands: int, kind: str = "") -> list[str]:
        """Returns what an input of that size and kind lacks, as phrases; nothing where it fits."""
        if self.min_frames == self.max_frames and frames != self.min_frames:
            found = [f"exactly {self.min_frames} frames"]
        elif frames < self.min_frames:
            found = [f"at least {self.min_frames} frames"]
        elif self.max_frames and frames > self.max_frames:
            found = [f"at most {self.max_frames} frames"]
        else:
            found = []
        if bands < self.min_bands:
            found.append(f"at least {self.min_bands} bands")
        if self.max_bands and bands > self.max_bands:
            found.append(f"at most {self.max_bands} bands")
        if frames * bands < self.min_values:
            found.append(f"at least {self.min_values} values (frames x bands)")
        if self.kinds and kind and kind not in self.kinds:
            found.append(f"features of the kind {' or '.join(self.kinds)}")
        return found


def register(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator that makes a Linen module known by `name`.

    Raises:
      ValueError: another class has that name already, or the class has no field `num_classes`.
    """

    def decorate(cls: type[nn.Module]) -> type[nn.Module]:
        there = _MODELS.get(name)
        # The same class seen twice is a module that was imported anew, not two models.
        if there is not None and (there.__module__, there.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ValueError(
                f"two models are registered as {name!r}: {there.__module__}.{there.__qualname__} and "
                f"{cls.__module__}.{cls.__qualname__}"
            )
        if "num_classes" not in {field.name for field in dataclasses.fields(cls)}:
            raise ValueError(
                f"the model {name!r} ({cls.__module__}.{cls.__qualname__}) needs a field num_classes: int"
            )
        _MODELS[name] = cls
        return cls

    return decorate


def registered() -> dict[str, type[nn.Module]]:
    """Returns every model of this package, and those that have been imported since, by name."""
    import musicgenre.models as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_MODELS.items()))


def hyperparameters(cls: type[nn.Module]) -> dict[str, Any]:
    """Returns the fields that a config can set, with their defaults."""
    return {
        field.name: field.default
        for field in dataclasses.fields(cls)
        if field.name not in _NOT_HYPERPARAMETERS and field.init
    }


def input_limits(cls: type[nn.Module], fields: Mapping[str, Any] | None = None) -> InputLimits:
    """Returns the input that a model takes with these fields (its defaults if None); any input where it does not say."""
    limits: Callable[[Mapping[str, Any]], InputLimits] | None = getattr(cls, "input_limits", None)
    return limits(hyperparameters(cls) if fields is None else fields) if limits else InputLimits()


def resolve(model: Mapping[str, Any]) -> dict[str, Any]:
    """Completes a config's model section: the name, the module, and every hyperparameter with its value.

    Args:
      model: `name`, optionally `module` (a Python module of the user's own that registers a model when it is
        imported; if it registers one, that is the model), and fields of that model.

    Returns:
      A mapping with `name`, `module` and all hyperparameters.

    Raises:
      UserError: the module cannot be imported or registers nothing, the name is unknown, or a field is; the
        message names the nearest one.
    """
    name, module = str(model.get("name", "")), str(model.get("module", ""))
    if module:
        name = _import_model(module, name)
    models = registered()
    if name not in models:
        raise UserError(f"model.name: no model {name!r}." + did_you_mean(name, models))
    fields = hyperparameters(models[name])
    chosen = {key: value for key, value in model.items() if key not in ("name", "module")}
    for key, value in chosen.items():
        if key not in fields:
            raise UserError(
                f"model.{key} is not a field of the model {name!r}." + did_you_mean(key, fields)
            )
        chosen[key] = _checked(name, key, value, fields[key])
    return {"name": name, "module": module} | fields | chosen


def build(
    model: Mapping[str, Any],
    *,
    num_classes: int,
    frames: int,
    bands: int,
    kind: str = "",
    dtype: str = "float32",
) -> nn.Module:
    """Makes the Linen module of a config's model section.

    Args:
      model: see `resolve`.
      num_classes: outputs.
      frames: frames of its input.
      bands: bands of its input.
      kind: kind of its features, such as "logmel"; "" does not check it.
      dtype: compute type, "float32" or "bfloat16"; parameters stay float32.

    Raises:
      UserError: as `resolve`, or the model cannot take `[frames, bands]`.
    """
    resolved = resolve(model)
    cls = registered()[resolved["name"]]
    fields = {key: value for key, value in resolved.items() if key not in ("name", "module")}
    limits = input_limits(cls, fields)
    if problems := limits.problems(frames, bands, kind):
        raise UserError(
            f"the model {resolved['name']!r} with these fields needs {' and '.join(problems)}, but its input is "
            f"{frames} frames x {bands} bands{f' of {kind}' if kind else ''}. Change data.frames, data.crop_frames, features or "
            "model."
        )
    known = {field.name for field in dataclasses.fields(cls)}
    if "dtype" in known:
        fields["dtype"] = jnp.dtype(dtype)
    elif dtype != "float32":
        raise UserError(
            f"the model {resolved['name']!r} has no field dtype, so dtype={dtype!r} cannot be used with it."
        )
    return cls(num_classes=num_classes, **fields)


def _import_model(module: str, name: str) -> str:
    """Imports a user's module and returns the name of the model that it registers."""
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"model.module={module!r}: no module {error.name!r}; run from the folder that holds it, or put "
            "that folder on PYTHONPATH."
        ) from error
    own = [key for key, cls in _MODELS.items() if cls.__module__ == imported.__name__]
    if not own:
        raise UserError(
            f'model.module={module!r} registers no model: decorate its class with @register("name").'
        )
    if len(own) > 1 and name not in own:
        raise UserError(
            f"model.module={module!r} registers {', '.join(own)}: say which with model.name."
        )
    return name if name in own else own[0]


def _checked(model: str, key: str, value: Any, default: Any) -> Any:
    """Returns a field's value in the type of its default, or raises UserError."""
    if isinstance(default, tuple):
        items = (
            (value,) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
        )
        if isinstance(items, (list, tuple)):
            kinds = {type(item) for item in default}
            if not kinds or all(type(item) in kinds for item in items):
                return tuple(items)
    elif isinstance(default, (bool, str)):
        if type(value) is type(default):
            return value
    elif isinstance(default, float):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(default, int):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    else:
        return value
    raise UserError(
        f"model.{key} of {model!r} must be {type(default).__name__} like {default!r}, not {value!r}."
    )
