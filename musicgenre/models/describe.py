"""The layers of a network in the order of their calls, found without computing anything."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Jaxpr, Var

Shape = tuple[int, ...]
# The calls that an array comes from, each with the operations since.
_Origin = dict[int, tuple[str, ...]]

# Operations that are not modules, by the name of their `jax.named_scope`, `jax.jit` or primitive.
_OPERATIONS = {
    "max_pool": "max-pool",
    "avg_pool_time": "mean-pool",
    "global_max": "global max",
    "l2_pool": "L2-pool",
    "reduce_window_max": "max-pool",
    "relu": "ReLU",
    "elu": "ELU",
    "gelu": "GELU",
    "silu": "SiLU",
    "sigmoid": "sigmoid",
    "logistic": "sigmoid",
    "tanh": "tanh",
}
# Fields of modules that do not say what they compute.
_NO_SETTINGS = {"parent", "name", "dtype", "param_dtype", "axis_name", "train"}
_NO_SETTINGS |= {"use_running_average", "deterministic"}


class Source(NamedTuple):
    """The layer, by its index, whose output a layer takes, and activations and pools in between."""

    layer: int
    operations: tuple[str, ...] = ()


@dataclasses.dataclass(eq=False)
class Layer:
    """One layer of a network.

    Attributes:
      name: its path in the network, such as "block1/conv2".
      kind: class of its module, such as "Conv"; "Input" and "Output" are the network's ends,
        "Parameters" those of a module that also calls layers.
      settings: fields of its module that differ from their defaults.
      inputs: shapes of the arrays that it takes, without the batch.
      output: shape that it returns, likewise.
      parameters: trained numbers in it; 0 where an earlier layer has the same ones.
      sources: the layers whose outputs it takes, in order.
    """

    name: str
    kind: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inputs: tuple[Shape, ...] = ()
    output: Shape = ()
    parameters: int = 0
    sources: tuple[Source, ...] = ()


def describe(module: nn.Module, frames: int, bands: int) -> list[Layer]:
    """Finds the layers of a network in the order in which they are called with `train=False`.

    A layer is a module of Flax, or any other that calls no further module; an NNX network is one.
    The "Input", `[frames, bands]`, is the first and the "Output" the last. Their parameters sum to
    the network's.
    """
    x = jax.ShapeDtypeStruct((1, frames, bands), jnp.float32)
    variables = dict(jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), x))
    variables.pop("intermediates", None)
    calls = [_Call(Layer("input", "Input", output=(frames, bands)), [])]

    def apply(variables: Any, x: jax.Array) -> Any:
        return module.apply(variables, x, train=False, mutable=["intermediates"])[0]

    with nn.intercept_methods(_Recorder(calls)):
        trace, output = jax.make_jaxpr(apply, return_shape=True)(variables, x)
    end = Layer("output", "Output", {}, (output.shape[1:],), output.shape[1:])
    weights: list[_Origin] = [{} for _ in jax.tree.leaves(variables)]
    calls.append(_Call(end, [], origin=_connect(trace.jaxpr, [*weights, {0: ()}], calls)[0]))
    # Parameters belong to the innermost module that was called, at its first call.
    owners = {path: call.layer for call in reversed(calls) for path in call.paths}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(variables.get("params", {})):
        path = tuple(key.key for key in keys)
        inner = max((path[:n] for n in range(len(path)) if path[:n] in owners), key=len)
        owners[inner].parameters += leaf.size
    kept = [n for n, call in enumerate(calls) if call.is_layer or call.layer.parameters]
    index = {n: i for i, n in enumerate(kept)}
    for call in calls:
        origin = sorted(call.origin.items())
        call.layer.sources = tuple(Source(index[n], names) for n, names in origin)
    return [calls[n].layer for n in kept]


def table(layers: Sequence[Layer]) -> str:
    """Returns layers as an aligned table, and the number of all parameters below it."""
    rows = [("", "layer", "type", "settings", "input", "output", "parameters", "from")]
    for i, layer in enumerate(layers):
        inputs, output = ", ".join(map(_words, layer.inputs)), _words(layer.output)
        count = f"{layer.parameters:,}" if layer.parameters else ""
        sources = [f"{n} ({', '.join(names)})".removesuffix(" ()") for n, names in layer.sources]
        shapes = (inputs, output, count, ", ".join(sources))
        rows.append((str(i), layer.name, layer.kind, settings_text(layer), *shapes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ruled = [rows[0], ["-" * width for width in widths], *rows[1:]]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in ruled]
    return "\n".join([*lines, f"{total_parameters(layers):,} parameters"])


def total_parameters(layers: Sequence[Layer]) -> int:
    """Returns how many numbers are trained."""
    return sum(layer.parameters for layer in layers)


def settings_text(layer: Layer) -> str:
    """Returns a layer's settings, such as "features 256, kernel_size 4"."""
    return ", ".join(f"{name} {_words(value)}" for name, value in layer.settings.items())


def shape_text(shape: Shape) -> str:
    """Returns a shape such as "323 x 256"."""
    return _words(tuple(shape))


@dataclasses.dataclass
class _Call:
    layer: Layer
    paths: list[tuple[str, ...]]  # of its module, and of what a module of Flax's own calls
    is_layer: bool = True
    is_flax: bool = False
    origin: _Origin = dataclasses.field(default_factory=dict)


class _Recorder:
    """Appends calls of modules, and marks the arrays that they take and return for `_connect`."""

    def __init__(self, calls: list[_Call]) -> None:
        self.calls = calls
        self._open: list[_Call] = []

    def __call__(self, function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, inputs = context.module, _shapes((args, kwargs))
        if context.method_name == "setup" or not inputs:
            return function(*args, **kwargs)
        if self._open and (self._open[-1].is_flax or module.path == self._open[-1].paths[0]):
            self._open[-1].paths.append(module.path)
            return function(*args, **kwargs)
        kind = type(getattr(module, "cell", module)).__name__.removesuffix("Cell")
        layer = Layer("/".join(module.path) or kind, kind, _settings(module), inputs)
        call = _Call(layer, [module.path])
        call.is_flax = type(module).__module__.startswith("flax.") and kind != "Sequential"
        for outer in self._open[-1:]:
            outer.is_layer = False
            if outer.layer.kind != "Parameters":
                outer.layer.settings = {"of": outer.layer.kind}
                outer.layer.kind, outer.layer.inputs = "Parameters", ()
        mark = f"musicgenre {len(self.calls)}"
        self.calls.append(call)
        self._open.append(call)
        args, kwargs = _marked((args, kwargs), f"{mark} in")
        result = function(*args, **kwargs)
        self._open.pop()
        if not call.is_layer:
            return result
        layer.output = _shapes(result)[0]
        return _marked(result, f"{mark} out")


def _connect(trace: Any, inputs: Sequence[_Origin], calls: Sequence[_Call]) -> list[_Origin]:
    """Notes where each call's inputs come from, and returns where the trace's outputs do."""
    known: dict[Any, _Origin] = dict(zip(trace.invars, inputs, strict=True))
    for equation in trace.eqns:
        origins = [known.get(v, {}) if isinstance(v, Var) else {} for v in equation.invars]
        merged = _Origin()
        for n, names in (item for origin in origins for item in origin.items()):
            merged[n] = tuple(dict.fromkeys((*merged.get(n, ()), *names)))
        name, parameters = str(equation.params.get("name")), equation.params
        inner = parameters.get("jaxpr", parameters.get("call_jaxpr"))
        inner = getattr(inner, "jaxpr", inner)
        scopes = str(equation.source_info.name_stack).split("/")
        passed = [w for w in (*scopes, name, equation.primitive.name) if w in _OPERATIONS][:1]
        if mark := re.fullmatch(r"musicgenre (\d+) (in|out)", name):
            call = calls[int(mark[1])]
            if mark[2] == "out":
                merged = {int(mark[1]): ()}
            elif call.is_layer:
                call.origin |= merged
        elif passed:
            new = _OPERATIONS[passed[0]]
            merged = {n: tuple(dict.fromkeys((*names, new))) for n, names in merged.items()}
        elif isinstance(inner, Jaxpr) and len(inner.invars) == len(origins):
            known.update(zip(equation.outvars, _connect(inner, origins, calls), strict=True))
            continue
        known.update(dict.fromkeys(equation.outvars, merged))
    return [known.get(v, {}) if isinstance(v, Var) else {} for v in trace.outvars]


def _settings(module: nn.Module) -> dict[str, Any]:
    """Returns the plain fields of a module, or an RNN's cell, that differ from their defaults."""
    fields = ((field, getattr(module, field.name)) for field in dataclasses.fields(module))
    plain = {field.name: value for field, value in fields if value != field.default}
    if "cell" in plain:
        return _settings(plain["cell"])
    types = (bool, int, float, str, tuple)
    return {k: v for k, v in plain.items() if k not in _NO_SETTINGS and isinstance(v, types)}


def _words(value: Any, joint: str = " x ") -> str:
    return joint.join(_words(v, "+") for v in value) if isinstance(value, tuple) else str(value)


def _marked(tree: Any, mark: str) -> Any:
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, mark) if _is_array(leaf) else leaf, tree)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _shapes(tree: Any) -> tuple[Shape, ...]:
    """Returns the shapes of the arrays in a tree, without their first axis."""
    return tuple(leaf.shape[1:] for leaf in jax.tree.leaves(tree) if _is_array(leaf))
