"""The values and derivatives of a trained network's layers, and the kernels of its first layers.

A unit is one output of a layer, such as one filter of a convolution. Where it has several
positions, its activation is the maximum over them. Besides its layers each network has an "input"
(normalised), an "embedding" (where the network sows one) and an "output", whose units are the
labels and whose values are logits.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from musicgenre.errors import UserError, did_you_mean
from musicgenre.models.apply import normalise
from musicgenre.models.describe import Layer, describe
from musicgenre.runs.model import TrainedModel

INPUT, EMBEDDING, OUTPUT = "input", "embedding", "output"
# Modules of `describe` that are no layers, or that have a tap of another name.
_SKIPPED = ("Input", "Output", "Join", "Parameters")


@dataclasses.dataclass(frozen=True)
class Tap:
    """A point of a network at which its values can be read.

    Attributes:
      name: the layer's name in `musicgenre.models.describe`; "#2" is appended for its second call.
      type: class of its module, such as "Conv"; "Input", "Embedding" or "Output".
      shape: of its values, without the batch. The last axis is the units, the first of several is
        time.
      path: of its module.
      call: which call of that module, from 0.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    path: tuple[str, ...] = ()
    call: int = 0

    @property
    def units(self) -> int:
        """The number of units."""
        return self.shape[-1]

    @property
    def steps(self) -> int:
        """The number of positions in time; 1 for a layer without a time axis."""
        return self.shape[0] if len(self.shape) > 1 else 1


class Filters(NamedTuple):
    """The kernels of a first layer.

    Attributes:
      layer: its name.
      form: "bands" (each kernel spans all bands of the input), "patch" (a few bands) or "waveform"
        (samples).
      kernels: float32 `[filters, bands, frames]`, the lowest band and the earliest frame first; of
        the form "waveform" `[filters, 1, samples]`.
    """

    layer: str
    form: str
    kernels: np.ndarray


class Gradients(NamedTuple):
    """Derivatives of a unit's activation, float32.

    Attributes:
      scores: the activation, `[n]`.
      inputs: its derivative with respect to the features before normalisation,
        `[n, frames, bands]`.
      values: of the layer `over`, `[n, ...]`; None without such a layer.
      by_values: the derivative with respect to these, likewise.
    """

    scores: np.ndarray
    inputs: np.ndarray
    values: np.ndarray | None = None
    by_values: np.ndarray | None = None


class Explainer:
    """A trained network whose layers can be read. It is compiled once per set of layers.

    Attributes:
      model: the model, from `musicgenre.runs.model.load_model`.
      layers: the output of `musicgenre.models.describe`.
      taps: the points at which values can be read, by name in the network's order.
    """

    def __init__(self, model: TrainedModel) -> None:
        self.model = model
        frames, bands = model.frames, model.features.bands
        self.layers: list[Layer] = describe(model.module, frames, bands)
        calls: collections.Counter[str] = collections.Counter()
        found = [Tap(INPUT, "Input", (frames, bands))]
        for layer in self.layers:
            if layer.kind in _SKIPPED:
                continue
            call = calls[layer.name]
            calls[layer.name] += 1
            name = f"{layer.name}#{call + 1}" if call else layer.name
            found.append(Tap(name, layer.kind, (), tuple(layer.name.split("/")), call))
        found += [Tap(EMBEDDING, "Embedding", ()), Tap(OUTPUT, "Output", ())]
        self._open = {tap.name: tap for tap in found}
        self._saved = jax.device_put(model.model)
        x = jax.ShapeDtypeStruct((1, frames, bands), jnp.float32)
        every = tuple(self._open)
        shapes = jax.eval_shape(lambda saved, x: self._run(saved, x, every), model.model, x)
        # Flax captures no values of methods other than `__call__`, or inside its loops.
        self.taps = {
            name: dataclasses.replace(tap, shape=shapes[name].shape[1:])
            for name, tap in self._open.items()
            if name in shapes and len(shapes[name].shape) > 1 and shapes[name].shape[0] == 1
        }
        self._forward = jax.jit(self._run, static_argnames="names")
        self._backward = jax.jit(self._gradients, static_argnames=("layer", "over"))

    def tap(self, name: str) -> Tap:
        """Returns a tap by its name.

        Raises:
          UserError: there is none of that name; the message suggests the nearest.
        """
        if name not in self.taps:
            hint = did_you_mean(name, self.taps)
            raise UserError(f"layer {name!r}: the model has no layer of that name.{hint}")
        return self.taps[name]

    def check_unit(self, layer: str, unit: int) -> None:
        """Raises UserError if the layer or the unit does not exist."""
        units = self.tap(layer).units
        if not 0 <= unit < units:
            raise UserError(
                f"unit {unit}: the layer {layer!r} has {units} units, 0 to {units - 1}."
            )

    def check_positions(self, layer: str) -> None:
        """Raises UserError if Grad-CAM cannot map the layer, since it has no positions."""
        known = [name for name, tap in self.taps.items() if len(tap.shape) > 1]
        known = [name for name in known if name not in (EMBEDDING, OUTPUT)]
        if self.tap(layer).name not in known:
            raise UserError(
                f"layer {layer!r}: it has no positions for Grad-CAM to map. "
                f"Layers with positions: {', '.join(known)}."
            )

    @property
    def last_convolution(self) -> str:
        """The last convolution with at least 4 time steps, else that with most; else "input"."""
        found = [tap for tap in self.taps.values() if "conv" in tap.type.lower()]
        found = [tap for tap in found if len(tap.shape) > 1]
        # A map of fewer than four steps shows little.
        long = [tap for tap in found if tap.steps >= 4]
        best = long or sorted(found, key=lambda tap: -tap.steps)[:1] or [self.taps[INPUT]]
        return best[-1].name

    def activations(
        self, inputs: np.ndarray, names: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the outputs of layers (None for all), float32 `[n, ...]`, by name.

        They are the modules' own outputs for the features `[n, frames, bands]` of windows. Most
        activation functions are no modules and come after.

        Raises:
          UserError: an unknown layer.
        """
        names = tuple(self.taps) if names is None else tuple(self.tap(name).name for name in names)
        found = self._forward(self._saved, jnp.asarray(inputs, jnp.float32), names=names)
        return {name: np.asarray(found[name], np.float32) for name in names}

    def gradients(self, inputs: np.ndarray, layer: str, unit: int, over: str = "") -> Gradients:
        """Returns a unit's activations and their derivatives.

        Args:
          inputs: `[n, frames, bands]`.
          layer: of the unit.
          unit: its number.
          over: a layer with positions, whose derivatives are returned as well; "" for none.

        Raises:
          UserError: an unknown layer or unit, or `over` has no positions.
        """
        self.check_unit(layer, unit)
        if over:
            self.check_positions(over)
        x = jnp.asarray(inputs, jnp.float32)
        found = self._backward(self._saved, x, unit, layer=layer, over=over)
        return Gradients(*jax.tree.map(lambda part: np.asarray(part, np.float32), found))

    def _run(
        self,
        saved: Any,
        x: jax.Array,
        names: tuple[str, ...],
        shift: jax.Array | None = None,
        over: str = "",
    ) -> dict[str, jax.Array]:
        """Returns values by name; `shift` is added to those of the layer `over`."""
        wanted = {self._open[name].path for name in names}
        shifted = self._open[over] if over and over != INPUT else None
        calls = itertools.count()

        def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            result = call(*args, **kwargs)
            method = (context.method_name, context.module.path)
            if not shifted or method != ("__call__", shifted.path) or next(calls) != shifted.call:
                return result
            leaves, tree = jax.tree.flatten(result)
            return jax.tree.unflatten(tree, [leaves[0] + shift, *leaves[1:]])

        x = normalise(x, saved["norm"])
        if over == INPUT and shift is not None:
            x = x + shift
        with nn.intercept_methods(intercept):
            logits, sown = self.model.module.apply(
                saved["variables"],
                x,
                train=False,
                capture_intermediates=lambda module, method: (
                    method == "__call__" and module.path in wanted
                ),
                mutable=["intermediates"],
            )
        kept = flatten_dict(sown.get("intermediates", {}))
        ends = {INPUT: x, OUTPUT: logits, EMBEDDING: kept.get((EMBEDDING,), (None,))[0]}
        values = {
            name: ends[name] if name in ends else _sown(kept, self._open[name]) for name in names
        }
        return {name: value for name, value in values.items() if value is not None}

    def _gradients(
        self, saved: Any, x: jax.Array, unit: jax.Array, layer: str, over: str
    ) -> tuple[Any, ...]:
        names = tuple({layer, over} - {""})

        def total(x: jax.Array, shift: jax.Array | None) -> tuple[jax.Array, tuple[Any, Any]]:
            values = self._run(saved, x, names, shift, over)
            scores = _strongest(values[layer].astype(jnp.float32), unit)
            # The inputs are independent, so the derivative of the sum is that of each.
            return scores.sum(), (scores, values[over] if over else None)

        shift = None
        if over:
            shape = jax.eval_shape(lambda x: self._run(saved, x, (over,))[over], x)
            shift = jnp.zeros(shape.shape, shape.dtype)
        differentiate = jax.value_and_grad(total, (0, 1) if over else (0,), has_aux=True)
        (_, (scores, values)), (by_x, *rest) = differentiate(x, shift)
        return scores, by_x, values, rest[0] if over else None


def _sown(kept: dict[Any, Any], tap: Tap) -> jax.Array | None:
    """Returns the first array of a module's call; None if Flax did not capture it."""
    results = kept.get((*tap.path, "__call__"), ())
    leaves = jax.tree.leaves(results[tap.call]) if tap.call < len(results) else []
    return leaves[0] if leaves and jnp.issubdtype(leaves[0].dtype, jnp.floating) else None


def _strongest(values: jax.Array, unit: jax.Array) -> jax.Array:
    """Returns the maximum of a unit over its positions, `[n]` of `[n, ..., units]`.

    Of equal values the first counts, so that its derivative is at one position.
    """
    flat = values.reshape(len(values), -1, values.shape[-1])
    one = jnp.take(flat, unit, axis=2)
    position = jax.lax.stop_gradient(one.argmax(axis=1))
    return jnp.take_along_axis(one, position[:, None], axis=1)[:, 0]


def first_filters(explainer: Explainer) -> list[Filters]:
    """Returns the kernels of the layers that receive the input itself or its normalised values.

    Those of a dense layer have the form "bands" if it receives all frames or one frame.
    """
    model = explainer.model
    params = flatten_dict(model.model["variables"]["params"])
    weighted: list[bool] = []  # whether a layer, or one before it, has kernels
    found: dict[str, Filters] = {}
    for layer in explainer.layers:
        kernel = params.get((*layer.name.split("/"), "kernel"))
        behind = any(weighted[source.layer] for source in layer.sources)
        if kernel is not None and np.ndim(kernel) > 1 and not behind and layer.name not in found:
            found[layer.name] = _filters(layer.name, np.asarray(kernel, np.float32), model)
        weighted.append(behind or kernel is not None)
    return list(found.values())


def _filters(name: str, kernel: np.ndarray, model: TrainedModel) -> Filters:
    """Sorts a kernel's axes, `[..., in, out]`, into filters, bands and frames."""
    bands, units = model.features.bands, kernel.shape[-1]
    if kernel.ndim == 4:
        # [frames, bands, channels, filters]; a first layer has one channel, else the mean is taken.
        image = kernel.mean(axis=2)
    elif kernel.ndim == 2:
        frames = model.frames if len(kernel) == model.frames * bands else 1
        image = kernel.reshape(frames, -1, units)
    else:
        image = kernel if kernel.ndim == 3 else kernel.reshape(-1, 1, units)
    form = "bands" if image.shape[1] == bands else "patch"
    if kernel.ndim == 3 and model.features.kind == "waveform" and image.shape[1] == 1:
        form = "waveform"
    return Filters(name, form, image.transpose(2, 1, 0))


def frequency_responses(kernels: np.ndarray, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the magnitude responses of filters on a waveform, sorted by their peak frequency.

    Args:
      kernels: `[filters, samples]`.
      sample_rate: Hz.

    Returns:
      dB below each filter's peak, float32 `[filters, bins]`, and the frequencies in Hz, `[bins]`.
    """
    gain = np.abs(np.fft.rfft(kernels, n=max(512, kernels.shape[1]), axis=1))
    gain = gain[np.argsort(gain.argmax(axis=1), kind="stable")]
    peak = np.maximum(gain.max(axis=1, keepdims=True), 1e-12)
    decibels = 20 * np.log10(np.maximum(gain / peak, 1e-6))
    return decibels.astype(np.float32), np.linspace(0, sample_rate / 2, gain.shape[1])
