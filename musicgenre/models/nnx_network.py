"""NNX networks as Linen modules: training, checkpoints, transfer and export see one type of network.

A network is created in every trace, takes its values from the Linen variables, and leaves its new
statistics there, as in `flax.nnx.bridge.ToLinen`. Unlike that class, this one gives the variables
plain names (`convs/0/kernel`), keeps the order of the layers, and collects what is sown.
"""

import functools
import inspect
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from musicgenre.errors import UserError

# Arguments of a constructor that the caller of the network fills in.
_FILLED = ("self", "num_classes", "dtype", "frames", "bands", "rngs")


class _Layer(nn.Module):
    """Stands for a layer, so that Linen's interceptors learn the names in their order."""

    def __call__(self) -> None:
        pass


class NNXNetwork(nn.Module):
    """Base of the Linen modules that `linen_class` makes; their fields are the constructor's arguments."""

    # Set by an interceptor under pmap, as on `nn.BatchNorm`.
    axis_name: ClassVar[str | None] = None
    nnx_class: ClassVar[Any]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        network = self._create(x)
        if self.is_initializing():
            self._write(network)
            for name in vars(network):
                if self.has_variable("params", name):
                    _Layer(name=name)()
        else:
            self._read(network)
        for _, layer in nnx.iter_modules(network):
            if isinstance(layer, nnx.BatchNorm):
                layer.axis_name = self.axis_name or layer.axis_name
        logits, sown = nnx.capture(network, nnx.Intermediate)(x, train=train)
        if not self.is_initializing():
            self._write(network)
        self._write(sown)
        return logits.astype(jnp.float32)

    def _create(self, x: jax.Array) -> Any:
        arguments = inspect.signature(self.nnx_class.__init__).parameters
        given = {"frames": x.shape[1], "bands": x.shape[2]}
        given = {
            name: given[name] if name in given else getattr(self, name)
            for name in arguments
            if name not in ("self", "rngs")
        }
        # One key for all of NNX's streams: each layer takes its own from it.
        streams = [stream for stream in ("params", "dropout") if self.has_rng(stream)]
        return self.nnx_class(**given, rngs=nnx.Rngs(self.make_rng(streams[0]) if streams else 0))

    def _read(self, network: Any) -> None:
        """Takes a network's values from the variables."""
        new = []
        for path, variable in _flat_state(network):
            value = self.variables[_collection(variable)]
            for key in path:
                value = value[str(key)]
            new.append((path, variable.replace(value)))
        nnx.update(network, nnx.from_flat_state(new))

    def _write(self, node: Any) -> None:
        """Puts the values of a network, or of what it has sown, into those variables that may change."""
        trees: dict[str, dict[str, Any]] = {}
        for path, variable in _flat_state(node):
            *parents, leaf = map(str, path)
            tree = trees.setdefault(_collection(variable), {})
            for key in parents:
                tree = tree.setdefault(key, {})
            tree[leaf] = variable.get_value()
        for collection, tree in trees.items():
            if self.is_mutable_collection(collection):
                for name, value in tree.items():
                    self.put_variable(collection, name, value)


def _flat_state(node: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Returns the variables of a network or a state, by path; arrays that are no variables are constants."""
    state = node if isinstance(node, nnx.State) else nnx.state(node, nnx.Not(nnx.RngState))
    return [
        (path, leaf) for path, leaf in nnx.to_flat_state(state) if isinstance(leaf, nnx.Variable)
    ]


def _collection(variable: Any) -> str:
    return nnx.variable_name_from_type(type(variable), allow_register=True)


@functools.cache
def linen_class(cls: type[nnx.Module]) -> type[nn.Module]:
    """Returns a Linen module class whose fields are the arguments of an NNX class's constructor.

    Raises:
      UserError: the constructor or `__call__` is not as `musicgenre.models.registry` describes.
    """
    where = f"the NNX network {cls.__module__}.{cls.__qualname__}"
    arguments = inspect.signature(cls.__init__).parameters
    for name in ("num_classes", "rngs"):
        if name not in arguments:
            raise UserError(f"{where} needs an argument {name} of its constructor.")
    for name, argument in arguments.items():
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            raise UserError(f"{where}: its constructor must name its arguments instead of *{name}.")
        if argument.default is argument.empty and name not in _FILLED:
            raise UserError(f"{where}: the argument {name} of its constructor needs a default.")
    if "train" not in inspect.signature(cls.__call__).parameters:
        raise UserError(f"{where} needs a method __call__(self, x, train=False).")
    fields = [name for name in arguments if name not in ("self", "frames", "bands", "rngs")]
    defaults = {
        name: arguments[name].default
        for name in fields
        if arguments[name].default is not inspect.Parameter.empty
    }
    defaults.setdefault("dtype", jnp.float32) if "dtype" in fields else None
    # Dataclasses take fields without a default first.
    fields.sort(key=lambda name: name in defaults)
    limits = {"input_limits": cls.input_limits} if hasattr(cls, "input_limits") else {}
    members = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__annotations__": dict.fromkeys(fields, Any),
        "nnx_class": cls,
    }
    return type(cls.__name__, (NNXNetwork,), members | defaults | limits)
