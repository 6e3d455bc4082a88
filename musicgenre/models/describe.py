"""What a network consists of: its layers in the order of their calls, found without computing anything."""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# A batch of a prime size that no layer has as another extent, so that it is found again in any shape. Nothing is computed,
# so its size costs nothing.
_BATCH = 10_007
_MARK = re.compile(r"musicgenre (\d+) (in|out)")
# Functions that are no modules, by the name of their `jax.jit`, of their primitive or of a `jax.named_scope`.
_JITTED = {
    "relu": "ReLU",
    "relu6": "ReLU6",
    "leaky_relu": "leaky ReLU",
    "elu": "ELU",
    "selu": "SELU",
    "gelu": "GELU",
    "silu": "SiLU",
    "softplus": "softplus",
    "sigmoid": "sigmoid",
}
_PRIMITIVES = {
    "tanh": "tanh",
    "logistic": "sigmoid",
    "reduce_window_max": "max-pool",
    "reduce_window_sum": "window sum",
}
_SCOPES = {
    "max_pool": "max-pool",
    "max_pool_time": "max-pool",
    "avg_pool_time": "mean-pool",
    "global_max": "global max",
    "l2_pool": "L2-pool",
}
_JOINS = {"add": "sum", "mul": "product", "concatenate": "concatenation"}
# Fields of modules that say how they are run, not what they are.
_NO_SETTINGS = (
    "parent",
    "name",
    "dtype",
    "param_dtype",
    "axis_name",
    "use_running_average",
    "deterministic",
)

Shape = tuple[int, ...]
_Path = tuple[str, ...]
# The nodes that an array comes from, and what it passed since.
_Origin = dict[int, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where an input of a layer comes from.

    Attributes:
      layer: index of the layer whose output it is.
      operations: what that output passes on its way and is no module, as far as it is known by name: activations and pools.
    """

    layer: int
    operations: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a network.

    Attributes:
      name: its path in the network, such as "block1/conv2".
      kind: the class of its module, such as "Conv". "Input" and "Output" are the network's ends, a "Join" is where outputs of
        several layers meet (its name says how), and "Parameters" are those that a module with layers in it has of its own.
      settings: the fields of its module that say what it is: those without a default, and others that differ
        from theirs, such as `features`, `kernel_size` and `strides`.
      inputs: shapes of the arrays that it takes, without the batch. In an array whose first axis is not the batch,
        -n stands for an extent of n times the batch.
      output: the shape that it returns, likewise; empty if it returns none.
      parameters: trained numbers in it, 0 where an earlier layer has the same ones.
      sources: the layers whose outputs it takes, in order.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]
    inputs: tuple[Shape, ...]
    output: Shape
    parameters: int
    sources: tuple[Source, ...]


def describe(module: nn.Module, frames: int, bands: int) -> list[Layer]:
    """Finds the layers of a network in the order in which they are called in use (`train=False`).

    A layer is a module of Flax, or any other that calls no further module; modules around them are in its name. The
    network is traced for shapes alone, and what flows where is read off that trace, so branches, skips and layers
    that are called twice come out as they are. A layer within `nn.scan` or `nn.vmap` is there once, with the shapes of one
    round and the parameters of all.

    Args:
      module: a network, such as from `musicgenre.models.build`.
      frames: frames of its input.
      bands: bands of its input.

    Returns:
      The layers; the first is the "Input" and the last the "Output". Their parameters sum to all that the network has.
    """
    x = jax.ShapeDtypeStruct((_BATCH, frames, bands), jnp.float32)
    variables = dict(jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), x))
    variables.pop("intermediates", None)
    recorder = _Recorder()

    def apply(variables: Any, x: jax.Array) -> Any:
        return module.apply(variables, x, train=False, mutable=["intermediates"])[0]

    with nn.intercept_methods(recorder):
        closed, output = jax.make_jaxpr(apply, return_shape=True)(variables, x)
    flow = _Flow(recorder.calls)
    flow.nodes.append(_Node("Input", {}, _shape(x)))
    weights: list[_Origin] = [{} for _ in jax.tree.leaves(variables)]
    ends = flow.through(closed.jaxpr, [*weights, {0: ()}])
    flow.nodes.append(_Node("Output", ends[0], _shape(output)))

    numbers: dict[int, int] = {}  # of a node among the layers; modules around layers are none
    layers: list[Layer] = []
    owned = _parameters_by_module(variables.get("params", {}), flow.nodes)
    for place, node in enumerate(flow.nodes):
        call = node.call
        if call is None or call.is_layer:
            numbers[place] = len(layers)
        elif not owned.get(call.path):
            continue
        layers.append(_layer(node, owned, numbers))
    return layers


def table(layers: Sequence[Layer]) -> str:
    """Returns layers as an aligned table with a line for each, and the number of all parameters."""
    rows = [("", "layer", "kind", "settings", "input", "output", "parameters", "from")]
    for i, layer in enumerate(layers):
        rows.append(
            (
                str(i),
                layer.name,
                layer.kind,
                settings_text(layer),
                ", ".join(map(shape_text, layer.inputs)),
                shape_text(layer.output),
                f"{layer.parameters:,}" if layer.parameters else "",
                ", ".join(source_text(source) for source in layer.sources),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = (0, 6)
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(
        [*(line.rstrip() for line in lines), f"{total_parameters(layers):,} parameters"]
    )


def source_text(source: Source) -> str:
    """Returns a source as its number and what it passed, such as "3 (ReLU)"."""
    return (
        f"{source.layer} ({', '.join(source.operations)})"
        if source.operations
        else str(source.layer)
    )


def total_parameters(layers: Sequence[Layer]) -> int:
    """Returns how many numbers are trained."""
    return sum(layer.parameters for layer in layers)


def settings_text(layer: Layer) -> str:
    """Returns a layer's settings in words, such as "256 features, kernel 4, stride 2"."""
    names = {
        "kernel_size": "kernel",
        "strides": "stride",
        "feature_group_count": "groups",
        "use_bias": "bias",
    }
    parts = []
    for name, value in layer.settings.items():
        word = names.get(name, name.replace("_", " "))
        if isinstance(value, bool):
            parts.append(word if value else f"no {word}")
        elif name == "features":
            parts.append(f"{_words(value)} {word}")
        elif name != "strides" or set(np.ravel(value)) - {1}:
            parts.append(f"{word} {_words(value)}")
    return ", ".join(parts)


def shape_text(shape: Shape) -> str:
    """Returns a shape as "323 x 256"; an extent of so many batches as "batch" or "4 batch"."""
    words = [
        str(extent) if extent >= 0 else ("batch" if extent == -1 else f"{-extent} batch")
        for extent in shape
    ]
    return " x ".join(words)


@dataclasses.dataclass(eq=False)
class _Call:
    """A method of a module that was called with arrays; `paths` are its module's and those of all that it called."""

    module: nn.Module
    path: _Path
    inputs: tuple[Shape, ...]
    output: Shape
    paths: set[_Path]
    is_layer: bool = True


@dataclasses.dataclass(eq=False)
class _Node:
    """Something in the flow: an end of the network, a place where arrays meet, or a call of a module."""

    kind: str
    origin: _Origin
    output: Shape
    call: _Call | None = None
    name: str = ""


class _Recorder:
    """Notes every call and marks the arrays that go in and come out, so that they are found in the trace."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self._open: list[_Call] = []

    def __call__(self, function: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        arrays = [leaf for leaf in jax.tree.leaves((args, kwargs)) if _is_array(leaf)]
        if context.method_name == "setup" or not arrays:
            return function(*args, **kwargs)
        call = _Call(
            context.module,
            context.module.path,
            tuple(map(_shape, arrays)),
            (),
            {context.module.path},
        )
        number = len(self.calls)
        self.calls.append(call)
        for around in self._open:
            around.paths.add(call.path)
        if any(_is_whole(around.module) for around in self._open):
            call.is_layer = False
        elif self._open:
            self._open[-1].is_layer = False
        self._open.append(call)
        try:
            args, kwargs = _marked((args, kwargs), f"musicgenre {number} in")
            result = function(*args, **kwargs)
        finally:
            self._open.pop()
        call.output = next(
            (_shape(leaf) for leaf in jax.tree.leaves(result) if _is_array(leaf)), ()
        )
        return _marked(result, f"musicgenre {number} out")


class _Flow:
    """Follows the arrays through a trace from mark to mark.

    Attributes:
      nodes: what they pass, in order.
    """

    def __init__(self, calls: Sequence[_Call]) -> None:
        self.nodes: list[_Node] = []
        self._calls = calls
        self._place: dict[int, int] = {}  # of a call among the nodes

    def through(self, jaxpr: Jaxpr, inputs: Sequence[_Origin]) -> list[_Origin]:
        """Returns where the outputs of a trace come from, by where its inputs do."""
        known: dict[Any, _Origin] = dict(zip(jaxpr.invars, inputs, strict=True))

        def origins(variables: Sequence[Any]) -> list[_Origin]:
            return [
                {} if isinstance(variable, Literal) else known.get(variable, {})
                for variable in variables
            ]

        for equation in jaxpr.eqns:
            known.update(
                zip(
                    equation.outvars, self._outputs(equation, origins(equation.invars)), strict=True
                )
            )
        return origins(jaxpr.outvars)

    def _outputs(self, equation: Any, inputs: list[_Origin]) -> list[_Origin]:
        """Returns where the outputs of one equation come from."""
        count = len(equation.outvars)
        if mark := _MARK.fullmatch(str(equation.params.get("name"))):
            return [self._passed(int(mark[1]), mark[2], inputs[0])]
        operation = _operation(equation)
        inner = [part for value in equation.params.values() for part in _traces(value)]
        if operation is None and inner:
            everything = _merged(inputs)
            outputs: list[list[_Origin]] = []
            for trace in inner:
                # The inputs of a loop's condition or of a branch are not those of the equation one by one.
                fits = len(trace.invars) == len(inputs)
                outputs.append(
                    self.through(trace, inputs if fits else [everything] * len(trace.invars))
                )
            if len(outputs) == 1 and len(outputs[0]) == count:
                return outputs[0]
            return [_merged([origin for part in outputs for origin in part] or inputs)] * count
        merged = _merged(inputs)
        if (
            len({frozenset(origin) for origin in inputs if origin}) > 1
            and equation.primitive.name in _JOINS
        ):
            self.nodes.append(
                _Node(
                    "Join",
                    merged,
                    _shape(equation.outvars[0].aval),
                    name=_JOINS[equation.primitive.name],
                )
            )
            merged = {len(self.nodes) - 1: ()}
        if operation is not None:
            merged = {
                place: (passed if operation in passed else (*passed, operation))
                for place, passed in merged.items()
            }
        return [merged] * count

    def _passed(self, number: int, side: str, origin: _Origin) -> _Origin:
        """Returns where an array comes from after a mark."""
        call = self._calls[number]
        if number not in self._place:
            self._place[number] = len(self.nodes)
            self.nodes.append(_Node(type(call.module).__name__, {}, call.output, call))
        place = self._place[number]
        if side == "out":
            return {place: ()} if call.is_layer else origin
        self.nodes[place].origin = _merged([self.nodes[place].origin, origin])
        # What happens within a layer is its own affair.
        return {} if call.is_layer else origin


def _layer(node: _Node, owned: dict[_Path, int], numbers: Mapping[int, int]) -> Layer:
    """Makes a layer of a node, and takes its parameters from those that no layer had yet."""
    sources = tuple(Source(numbers[place], node.origin[place]) for place in sorted(node.origin))
    call = node.call
    if call is None:
        inputs = () if node.kind == "Input" else (node.output,)
        return Layer(node.name or node.kind.lower(), node.kind, {}, inputs, node.output, 0, sources)
    name = "/".join(call.path) or type(call.module).__name__
    if not call.is_layer:
        return Layer(
            name, "Parameters", {"of": type(call.module).__name__}, (), (), owned.pop(call.path), ()
        )
    count = sum(owned.pop(path, 0) for path in call.paths)
    return Layer(
        name, _kind(call.module), _settings(call.module), call.inputs, call.output, count, sources
    )


def _parameters_by_module(params: Mapping[str, Any], nodes: Sequence[_Node]) -> dict[_Path, int]:
    """Returns how many parameters belong to each module that was called: to the innermost that holds them."""
    paths = {
        path
        for node in nodes
        if node.call
        for path in (node.call.paths if node.call.is_layer else {node.call.path})
    }
    counts: dict[_Path, int] = collections.Counter()
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = tuple(str(key.key) for key in keys)
        counts[
            max(
                (path[:length] for length in range(len(path) + 1) if path[:length] in paths),
                key=len,
            )
        ] += leaf.size
    return counts


def _is_whole(module: nn.Module) -> bool:
    """Whether a module is one layer whatever it calls: Flax's own, such as an RNN with its cell."""
    return type(module).__module__.startswith("flax.") and not isinstance(module, nn.Sequential)


def _kind(module: nn.Module) -> str:
    """Returns the class of a module; that of an RNN's cell for an RNN, such as "GRU"."""
    cell = getattr(module, "cell", None)
    return (
        type(cell).__name__.removesuffix("Cell")
        if isinstance(cell, nn.Module)
        else type(module).__name__
    )


def _settings(module: nn.Module) -> dict[str, Any]:
    """Returns the plain fields of a module, and of an RNN's cell, that have no default or another value than it."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(module):
        value = None if field.name in _NO_SETTINGS else getattr(module, field.name)
        if isinstance(value, nn.Module):
            found |= _settings(value)
        elif _is_plain(value) and value != field.default:
            found[field.name] = value
    return found


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) or (
        isinstance(value, (tuple, list)) and all(map(_is_plain, value))
    )


def _operation(equation: Any) -> str | None:
    """Returns what an equation does where it is known by name, such as "ReLU"."""
    for scope in str(equation.source_info.name_stack).split("/"):
        if scope in _SCOPES:
            return _SCOPES[scope]
    return _JITTED.get(str(equation.params.get("name"))) or _PRIMITIVES.get(equation.primitive.name)


def _traces(value: Any) -> list[Jaxpr]:
    """Returns the traces within a parameter of an equation."""
    if isinstance(value, (tuple, list)):
        return [trace for item in value for trace in _traces(item)]
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    return [value] if isinstance(value, Jaxpr) else []


def _merged(origins: Sequence[_Origin]) -> _Origin:
    """Returns the union of origins; what is passed on any of the ways counts, in order of appearance."""
    merged: _Origin = {}
    for origin in origins:
        for place, passed in origin.items():
            before = merged.get(place, ())
            merged[place] = before + tuple(name for name in passed if name not in before)
    return merged


def _words(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        # A pair within a tuple is the padding before and after.
        pairs = [
            item[0] if isinstance(item, (tuple, list)) and len(set(item)) == 1 else item
            for item in value
        ]
        return " x ".join(
            "+".join(map(str, item)) if isinstance(item, (tuple, list)) else str(item)
            for item in pairs
        )
    return f"{value:g}" if isinstance(value, float) else str(value)


def _marked(tree: Any, mark: str) -> Any:
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, mark) if _is_array(leaf) else leaf, tree)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _shape(array: Any) -> Shape:
    """Returns a shape without the batch, or with what stands for it where it is not the first axis."""
    shape = tuple(
        -(extent // _BATCH) if extent and extent % _BATCH == 0 else extent for extent in array.shape
    )
    return shape[1:] if shape and shape[0] == -1 else shape
