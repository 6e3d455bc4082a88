"""Networks by name. A network from outside this package needs no edit here.

A Flax Linen network is a module class with a field `num_classes` and further fields, all with
defaults, which a config sets as `model.<field>`; docs/tutorials/add_network.md shows one.

A Flax NNX network has these as arguments of its constructor, which also takes `rngs`. NNX layers
need the sizes of their inputs, so it may name `frames` and `bands`, which are filled in.

Either takes `x`, float32 `[batch, frames, bands]`, and returns logits, float32 `[batch,
num_classes]`, and sows the embedding before its last layer. That layer, the last one called (Linen)
or assigned in the constructor (NNX), is replaced in transfer. `dtype`, if there is such a field or
argument, is the compute type. A static method `input_limits(fields) -> InputLimits` may say what
input the network takes.

The name comes from the decorator, in a module that `config.module` or `config.model.module` names,
or from an entry point of the group "musicgenre.models" in an installed package.
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
# Fields of every Linen module, those that `build` fills in, and one that networks written for
# version 0.1 may have.
_NOT_HYPERPARAMETERS = ("parent", "name", "num_classes", "dtype", "axis_name")


class InputLimits(NamedTuple):
    """The input that a network can take.

    Attributes:
      min_frames: fewest frames.
      min_bands: fewest bands.
      max_frames: most frames; 0 is any number.
      max_bands: most bands; 0 is any number.
      min_values: smallest product of frames and bands.
      kinds: types of features, such as "logmel" or "waveform"; any if empty.
    """

    min_frames: int = 1
    min_bands: int = 1
    max_frames: int = 0
    max_bands: int = 0
    min_values: int = 1
    kinds: tuple[str, ...] = ()

    def problems(self, frames: int, bands: int, kind: str = "") -> list[str]:
        """Returns what an input of that size and type lacks, as phrases; nothing if it fits."""
        found = []
        for size, least, most, unit in (
            (frames, self.min_frames, self.max_frames, "frames"),
            (bands, self.min_bands, self.max_bands, "bands"),
        ):
            if least == most != size:
                found.append(f"exactly {least} {unit}")
            elif size < least:
                found.append(f"at least {least} {unit}")
            elif most and size > most:
                found.append(f"at most {most} {unit}")
        if frames * bands < self.min_values:
            found.append(f"at least {self.min_values} values (frames x bands)")
        if self.kinds and kind and kind not in self.kinds:
            found.append(f"features of the type {' or '.join(self.kinds)}")
        return found


def register(name: str) -> Callable[[T], T]:
    """Class decorator that makes a Linen or NNX module class known by `name`.

    Raises:
      UserError: it decorates something else, or a class that is not as described above.
      ValueError: another class has that name already.
    """
    if not isinstance(name, str):
        raise UserError(f'register takes a name: write @register("name") above {name}.')

    def decorate(cls: T) -> T:
        _linen_class(cls)
        _MODELS.add(name, cls)
        return cls

    return decorate


def registered() -> dict[str, type[nn.Module]]:
    """Returns the Linen module class of every network by name, those of entry points included."""
    _import_networks()
    return {name: network_class(name) for name in _MODELS.names()}


def network_class(name: str) -> type[nn.Module]:
    """Returns the Linen module class of a network.

    Raises:
      UserError: no network has this name, or its class is not as described above.
    """
    _import_networks()
    return _linen_class(_MODELS.get(name))


def hyperparameters(cls: type[nn.Module]) -> dict[str, Any]:
    """Returns the fields that a config can set, with their defaults."""
    own = [f for f in dataclasses.fields(cls) if f.name not in _NOT_HYPERPARAMETERS and f.init]
    return {
        field.name: field.default
        if field.default_factory is dataclasses.MISSING
        else field.default_factory()
        for field in own
    }


def input_limits(cls: type[nn.Module], fields: Mapping[str, Any] | None = None) -> InputLimits:
    """Returns the input that a network takes with these fields, its defaults if None."""
    limits: Callable[[Mapping[str, Any]], InputLimits] | None = getattr(cls, "input_limits", None)
    return limits(hyperparameters(cls) if fields is None else fields) if limits else InputLimits()


def resolve(model: Mapping[str, Any]) -> dict[str, Any]:
    """Completes a config's model section: the name, the module, and the value of every field.

    Args:
      model: `name`, optionally `module` (a user's Python module; if it registers a network, that is
        the network), and fields of that network.

    Raises:
      UserError: the module cannot be imported or registers nothing, or the name or a field is
        unknown or has another type; the message names the nearest one.
    """
    name, module = str(model.get("name", "")), str(model.get("module", ""))
    if module:
        import_user_module(module, "model.module")
        own = list(_MODELS.added_by(module))
        if not own:
            how = 'decorate its class with @register("name").'
            raise UserError(f"model.module={module!r} registers no model: {how}")
        if len(own) > 1 and name not in own:
            which = f"{', '.join(own)}: say which with model.name."
            raise UserError(f"model.module={module!r} registers {which}")
        name = name if name in own else own[0]
    fields = hyperparameters(network_class(name))
    chosen = {}
    for key, value in model.items():
        if key in fields:
            chosen[key] = _checked(name, key, value, fields[key])
        elif key not in ("name", "module"):
            hint = did_you_mean(key, fields)
            raise UserError(f"model.{key} is not a field of the model {name!r}.{hint}")
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
      frames: of its input.
      bands: of its input.
      kind: type of its features, such as "logmel"; "" does not check it.
      dtype: compute type, "float32" or "bfloat16"; parameters stay float32.

    Raises:
      UserError: as `resolve`, or the network cannot take `[frames, bands]` or `dtype`.
    """
    fields = resolve(model)
    name, _ = fields.pop("name"), fields.pop("module")
    cls = network_class(name)
    if needs := " and ".join(input_limits(cls, fields).problems(frames, bands, kind)):
        raise UserError(
            f"the model {name!r} with these fields needs {needs}, but its input is "
            f"{frames} frames x {bands} bands{f' of {kind}' if kind else ''}. Change data.frames, "
            "data.crop_frames, features or model."
        )
    if "dtype" in {field.name for field in dataclasses.fields(cls)}:
        fields["dtype"] = jnp.dtype(dtype)
    elif dtype != "float32":
        raise UserError(f"the model {name!r} has no field dtype, so it cannot use {dtype=}.")
    return cls(num_classes=num_classes, **fields)


@functools.cache
def _import_networks() -> None:
    """Imports the modules of this package, which register its networks."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def _linen_class(cls: Any) -> type[nn.Module]:
    """Returns a network's Linen module class, or raises UserError if it cannot be a network."""
    if not (isinstance(cls, type) and issubclass(cls, (nn.Module, nnx.Module))):
        bases = "flax.linen.Module or flax.nnx.Module"
        found = getattr(cls, "__name__", f"an instance of {type(cls).__name__}")
        raise UserError(f"a network is a class derived from {bases}, not {found}.")
    if issubclass(cls, nnx.Module):
        return linen_class(cls)
    where = f"the network {cls.__module__}.{cls.__qualname__}"
    if "num_classes" not in {field.name for field in dataclasses.fields(cls)}:
        raise UserError(f"{where} needs a field num_classes: int.")
    for name, default in hyperparameters(cls).items():
        if default is dataclasses.MISSING:
            raise UserError(f"{where}: the field {name} needs a default.")
    return cls


def _checked(model: str, key: str, value: Any, default: Any) -> Any:
    """Returns a field's value in the type of its default, or raises UserError."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, tuple):
        items = (value,) if number else value
        types = {type(item) for item in default}
        if isinstance(items, (list, tuple)) and (not types or types >= set(map(type, items))):
            return tuple(items)
    elif isinstance(default, float) and number:
        return float(value)
    elif type(value) is type(default) or not isinstance(default, (bool, str, int, float)):
        return value
    wanted = f"{type(default).__name__} like {default!r}"
    raise UserError(f"model.{key} of {model!r} must be {wanted}, not {value!r}.")
