"""NNX networks as Linen modules: training, checkpoints and export see one type of network.

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
from flax.traverse_util import unflatten_dict

from musicgenre.errors import UserError

# Arguments of a constructor that are filled in, and those that need no default.
_SIZES_AND_RNGS = ("self", "rngs", "frames", "bands")
_FILLED = (*_SIZES_AND_RNGS, "num_classes", "dtype")


class _Layer(nn.Module):
    """Stands for a layer, so that Linen's interceptors learn the names in their order."""

    def __call__(self) -> None:
        pass


class NNXNetwork(nn.Module):
    """Base of the Linen modules that `linen_class` makes.

    Attributes:
      axis_name: device axis of batch normalisation; an interceptor sets it, as on `nn.BatchNorm`.
    """

    nnx_class: ClassVar[Any]
    axis_name: ClassVar[str | None] = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 `[batch, num_classes]`, of `x` `[batch, frames, bands]`."""
        sizes = {"frames": x.shape[1], "bands": x.shape[2]}
        arguments = inspect.signature(self.nnx_class.__init__).parameters
        names = [name for name in arguments if name not in ("self", "rngs")]
        # One key for all of NNX's streams: each layer derives its own.
        streams = [stream for stream in ("params", "dropout") if self.has_rng(stream)]
        rngs = nnx.Rngs(self.make_rng(streams[0]) if streams else 0)
        fields = {name: sizes[name] if name in sizes else getattr(self, name) for name in names}
        network = self.nnx_class(**fields, rngs=rngs)
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

    def _read(self, network: Any) -> None:
        """Takes a network's values from the variables."""
        new = []
        for path, variable in _variables(network):
            value = functools.reduce(lambda tree, key: tree[str(key)], path, self.variables)
            new.append((path[1:], variable.replace(value)))
        nnx.update(network, nnx.from_flat_state(new))

    def _write(self, node: Any) -> None:
        """Puts the values of a network, or what it has sown, into the mutable variables."""
        flat = {tuple(map(str, path)): v.get_value() for path, v in _variables(node)}
        for collection, tree in unflatten_dict(flat).items():
            if self.is_mutable_collection(collection):
                for name, value in tree.items():
                    self.put_variable(collection, name, value)


def _variables(node: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Returns the variables of a network or a state by collection and path, without constants."""
    state = node if isinstance(node, nnx.State) else nnx.state(node, nnx.Not(nnx.RngState))
    return [
        ((nnx.variable_name_from_type(type(value), allow_register=True), *path), value)
        for path, value in nnx.to_flat_state(state)
        if isinstance(value, nnx.Variable)
    ]


@functools.cache
def linen_class(cls: type[nnx.Module]) -> type[nn.Module]:
    """Returns a Linen module class with the arguments of an NNX class's constructor as its fields.

    Raises:
      UserError: the constructor or `__call__` is not as `musicgenre.models.registry` describes.
    """
    where = f"the NNX network {cls.__module__}.{cls.__qualname__}"
    arguments = inspect.signature(cls.__init__).parameters
    for name in ("num_classes", "rngs"):
        if name not in arguments:
            raise UserError(f"{where}: its constructor needs an argument {name}.")
    for name, argument in arguments.items():
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            raise UserError(f"{where}: its constructor must name its arguments instead of *{name}.")
        if argument.default is argument.empty and name not in _FILLED:
            raise UserError(f"{where}: the argument {name} of its constructor needs a default.")
    if "train" not in inspect.signature(cls.__call__).parameters:
        raise UserError(f"{where} needs a method __call__(self, x, train=False).")
    fields = {n: a.default for n, a in arguments.items() if n not in _SIZES_AND_RNGS}
    if fields.get("dtype") is inspect.Parameter.empty:
        fields["dtype"] = jnp.float32
    del fields["num_classes"]
    members = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    annotations = dict.fromkeys(["num_classes", *fields], Any)
    members |= {"nnx_class": cls, "__annotations__": annotations}
    if hasattr(cls, "input_limits"):
        members["input_limits"] = staticmethod(cls.input_limits)
    return type(cls.__name__, (NNXNetwork,), members | fields)
