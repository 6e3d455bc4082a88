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
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

from musicgenre.errors import UserError, did_you_mean
from musicgenre.models.nnx_network import linen_class
from musicgenre.registry import Registry, import_user_module

T = TypeVar("T", bound=type)

_MODELS: Registry[Any] = Registry("model", "musicgenre.models")
# Fields of every Linen module, those that `build` fills in, and one that networks written for version
# 0.1 may declare.
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


def register(name: str) -> Callable[[T], T]:
    """Class decorator that makes a Linen or NNX module class known by `name`.

    Raises:
      UserError: what is decorated is no such class, or does not keep the contract above.
      ValueError: another class has that name already.
    """
    if not isinstance(name, str):
        raise UserError(f'write @register("name") above {_words(name)}: it needs a name.')

    def decorate(cls: T) -> T:
        _linen_class(cls)
        _MODELS.add(name, cls)
        return cls

    return decorate


def _linen_class(cls: Any) -> type[nn.Module]:
    """Returns a network's Linen module class, or raises UserError where it cannot be a network."""
    if isinstance(cls, type) and issubclass(cls, nnx.Module):
        return linen_class(cls)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UserError(
            f"a network is a class derived from flax.linen.Module or flax.nnx.Module, not {_words(cls)}."
        )
    where = f"the network {cls.__module__}.{cls.__qualname__}"
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if "num_classes" not in fields:
        raise UserError(f"{where} needs a field num_classes: int.")
    for name, field in fields.items():
        if (
            name not in _NOT_HYPERPARAMETERS
            and field.init
            and _default(field) is dataclasses.MISSING
        ):
            raise UserError(f"{where}: the field {name} needs a default.")
    return cls


def _words(thing: Any) -> str:
    """Returns what a thing is, such as "the function f"."""
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    name = getattr(thing, "__name__", "")
    return f"the function {name}" if name else f"an instance of {type(thing).__name__}"


@functools.cache
def _import_networks() -> None:
    """Imports every module of this package, which registers its networks."""
    package = importlib.import_module("musicgenre.models")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def network_class(name: str) -> type[nn.Module]:
    """Returns the Linen module class of a registered network.

    Raises:
      UserError: no network has this name; the message names the nearest one.
    """
    _import_networks()
    return _linen_class(_MODELS.get(name))


def registered() -> dict[str, type[nn.Module]]:
    """Returns the Linen module class of every network by name: of this package, of installed packages'
    entry points, and of modules that have been imported."""
    _import_networks()
    return {name: network_class(name) for name in _MODELS.names()}


def hyperparameters(cls: type[nn.Module]) -> dict[str, Any]:
    """Returns the fields that a config can set, with their defaults."""
    return {
        field.name: _default(field)
        for field in dataclasses.fields(cls)
        if field.name not in _NOT_HYPERPARAMETERS and field.init
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


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
    fields = hyperparameters(network_class(name))
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
    cls = network_class(resolved["name"])
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
    import_user_module(module, "model.module")
    own = list(_MODELS.added_by(module))
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
