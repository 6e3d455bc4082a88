"""What a trained network listens to: its filters, activations, the parts of a sound that speak for a label, and how these sound.

Sources: K. Simonyan, A. Vedaldi, A. Zisserman, "Deep inside convolutional networks", arXiv:1312.6034, for saliency; A. Shrikumar
et al., "Not just a black box", arXiv:1605.01713, for gradient times input; M. Sundararajan, A. Taly, Q. Yan, "Axiomatic
attribution for deep networks", arXiv:1703.01365, for integrated gradients; R. Selvaraju et al., "Grad-CAM", arXiv:1610.02391.

A unit is one output of a layer, such as one filter of a convolution. Where it has several positions, its activation is the
maximum over them. Besides its layers each network has an "input" (what it is given, normalised), an "embedding" (where it sows
one) and an "output", whose units are the labels and whose values are logits.
"""

import collections
import dataclasses
import heapq
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import librosa
import numpy as np
import scipy.fft
import scipy.ndimage
import soundfile
from librosa.filters import mel as mel_filter_bank

from musicgenre.audio.decode import stream_audio
from musicgenre.audio.features import FeatureSpec
from musicgenre.errors import UserError, did_you_mean
from musicgenre.inference.windows import BATCH, Network, Window, stream_windows
from musicgenre.models.describe import Layer, describe
from musicgenre.runs.model import TrainedModel

INPUT, EMBEDDING, OUTPUT = "input", "embedding", "output"
# Time steps that Grad-CAM's layer should at least have: with fewer there is next to nothing to see.
_FEWEST_STEPS = 4
# Over how long a unit without positions in time must be spoken for, seconds: the moment of a label is the middle of it.
_MOMENT_SECONDS = 1.0
# How far apart a waveform's saliency is smoothed, seconds: as a mask it must not be audible itself.
_WAVEFORM_SMOOTHING = 0.02


@dataclasses.dataclass(frozen=True)
class Tap:
    """A place in a network where its values can be read.

    Attributes:
      name: as `musicgenre.models.describe` calls the layer; "#2" follows where it is called a second time.
      kind: class of its module, such as "Conv"; "Input", "Embedding" or "Output".
      shape: of its values, without the batch. The last extent is that of its units, the first of several is time.
      path: of its module.
      call: which call of that module, from 0.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    path: tuple[str, ...] = ()
    call: int = 0

    @property
    def units(self) -> int:
        """How many units it has."""
        return self.shape[-1]

    @property
    def steps(self) -> int:
        """How many positions in time it has; 1 where it has no time."""
        return self.shape[0] if len(self.shape) > 1 else 1


class Filters(NamedTuple):
    """The kernels of a first layer.

    Attributes:
      layer: its name.
      form: "bands" (each spans all bands of the input), "patch" (a few bands, anywhere) or "waveform" (samples).
      kernels: float32 `[filters, bands, frames]`, the lowest band and the earliest frame first; of the form "waveform" `[filters,
        1, samples]`.
    """

    layer: str
    form: str
    kernels: np.ndarray


class Gradients(NamedTuple):
    """What a unit's activation changes with.

    Attributes:
      scores: the activation, float32 `[n]`.
      inputs: its derivative by the features (as they are before the normalisation), float32 `[n, frames, bands]`.
      values: of the layer that was asked for, float32 `[n, ...]`; None if none was.
      by_values: the derivative by these, likewise.
    """

    scores: np.ndarray
    inputs: np.ndarray
    values: np.ndarray | None = None
    by_values: np.ndarray | None = None


class Attribution(NamedTuple):
    """How much each part of an input adds to a unit's activation.

    Attributes:
      values: float32 `[frames, bands]`, of the features.
      heard: the same on bands that can be heard: of MFCCs on the mel bands that they sum up, float32 `[frames, mels]`, and
        otherwise `values` itself. Both have the same sum.
      score: the activation.
      reference: the activation of what the input is compared with; 0 for a gradient times input.
    """

    values: np.ndarray
    heard: np.ndarray
    score: float
    reference: float = 0.0


class Chosen(NamedTuple):
    """The window of a file that is explained.

    Attributes:
      window: the window.
      start: seconds.
      end: seconds; of a file that is shorter than a window, where the file ends.
      probabilities: of the window, float32 `[classes]`.
      label: which label is explained.
      file_probabilities: mean over all windows of the file, float32 `[classes]`.
      seconds: length of the file.
    """

    window: Window
    start: float
    end: float
    probabilities: np.ndarray
    label: int
    file_probabilities: np.ndarray
    seconds: float


class Moment(NamedTuple):
    """Where a unit is excited.

    Attributes:
      layer: of the unit.
      unit: its number.
      path: the sound file.
      time: seconds; of a unit without positions in time, the middle of what speaks for it most.
      start: of the window, seconds.
      end: of the window, seconds.
      activation: its value; of the "output", the probability.
    """

    layer: str
    unit: int
    path: str
    time: float
    start: float
    end: float
    activation: float


class Explainer:
    """The network of a trained model, with every layer open to be read. Compiled once for each set of layers that is asked for.

    Args:
      model: from `musicgenre.runs.model.load_model`.

    Attributes:
      model: the model.
      layers: what `musicgenre.models.describe` finds.
      taps: where values can be read, by name in the order of the network.
    """

    def __init__(self, model: TrainedModel) -> None:
        self.model = model
        frames, bands = model.frames, model.features.bands
        self.layers: list[Layer] = describe(model.module, frames, bands)
        called: collections.Counter[str] = collections.Counter()
        found: list[Tap] = []
        for layer in self.layers:
            if layer.kind not in ("Input", "Output", "Join", "Parameters"):
                number = called[layer.name]
                called[layer.name] += 1
                name = layer.name if not number else f"{layer.name}#{number + 1}"
                found.append(Tap(name, layer.kind, (), tuple(layer.name.split("/")), number))
        ends = [
            Tap(INPUT, "Input", (frames, bands)),
            Tap(EMBEDDING, "Embedding", ()),
            Tap(OUTPUT, "Output", ()),
        ]
        self._open = {tap.name: tap for tap in (ends[0], *found, *ends[1:])}
        self._saved = jax.device_put(model.model)
        x = jax.ShapeDtypeStruct((1, frames, bands), jnp.float32)
        shapes = jax.eval_shape(
            lambda saved, x: self._run(saved, x, tuple(self._open)), model.model, x
        )
        # What is called by another method than `__call__`, or within a loop of Flax's, gives no values.
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
          UserError: there is none of that name; the message has the nearest.
        """
        if name not in self.taps:
            raise UserError(
                f"layer {name!r}: the model has none of that name.{did_you_mean(name, self.taps)}"
            )
        return self.taps[name]

    def check_unit(self, layer: str, unit: int) -> None:
        """Raises UserError where a layer, or a unit of it, does not exist."""
        units = self.tap(layer).units
        if not 0 <= unit < units:
            raise UserError(
                f"unit {unit}: the layer {layer!r} has {units} units, 0 to {units - 1}."
            )

    @property
    def last_convolution(self) -> str:
        """The last convolution with at least four steps in time, or else that with the most; "input" where there is none."""
        convolutions = [
            tap for tap in self.taps.values() if "conv" in tap.kind.lower() and len(tap.shape) > 1
        ]
        if not convolutions:
            return INPUT
        long = [tap for tap in convolutions if tap.steps >= _FEWEST_STEPS]
        return (long or [max(convolutions, key=lambda tap: tap.steps)])[-1].name

    def activations(
        self, inputs: np.ndarray, names: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the values of layers, float32 `[n, ...]` each, as their modules return them.

        What is no module, such as most activation functions, comes after.

        Args:
          inputs: features as windows have them, `[n, frames, bands]`.
          names: of the layers; all of them if None.
        """
        names = tuple(self.taps) if names is None else tuple(self.tap(name).name for name in names)
        found = self._forward(self._saved, jnp.asarray(inputs, jnp.float32), names=names)
        return {name: np.asarray(found[name], np.float32) for name in names}

    def gradients(
        self, inputs: np.ndarray, layer: str, unit: int | Sequence[int], over: str = ""
    ) -> Gradients:
        """Returns a unit's activations and their derivatives.

        Args:
          inputs: `[n, frames, bands]`.
          layer: of the unit.
          unit: its number, or one for each input, `[n]`.
          over: a layer by whose values it is derived, too; "" for none.
        """
        units = np.broadcast_to(np.asarray(unit, np.int32), len(inputs))
        for number in set(units.tolist()):
            self.check_unit(layer, number)
        if over:
            if over in (EMBEDDING, OUTPUT):
                raise UserError(f"layer {over!r} has no positions that a map could be drawn of.")
            self.tap(over)
        found = self._backward(
            self._saved, jnp.asarray(inputs, jnp.float32), units, layer=layer, over=over
        )
        arrays = (None if part is None else np.asarray(part, np.float32) for part in found)
        return Gradients(*arrays)  # type: ignore[arg-type]

    def _run(
        self,
        saved: Any,
        x: jax.Array,
        names: tuple[str, ...],
        shift: jax.Array | None = None,
        over: str = "",
    ) -> dict[str, jax.Array]:
        """Returns values by name; `shift` is added to those of the layer `over`."""
        from musicgenre.models.apply import normalise  # brings Optax

        wanted = {self._open[name].path for name in names}
        place = self._open[over] if over else None
        calls: collections.Counter[tuple[str, ...]] = collections.Counter()

        def shifted(function: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            result = function(*args, **kwargs)
            if (
                place is None
                or context.method_name != "__call__"
                or context.module.path != place.path
            ):
                return result
            calls[place.path] += 1
            if not place.path or calls[place.path] != place.call + 1:
                return result
            leaves, tree = jax.tree.flatten(result)
            return jax.tree.unflatten(tree, [leaves[0] + shift, *leaves[1:]])

        x = normalise(x, saved["norm"])
        if over == INPUT:
            x = x + shift
        with nn.intercept_methods(shifted):
            logits, sown = self.model.module.apply(
                saved["variables"],
                x,
                train=False,
                capture_intermediates=lambda module, method: (
                    method == "__call__" and module.path in wanted
                ),
                mutable=["intermediates"],
            )
        kept = sown.get("intermediates", {})
        values: dict[str, jax.Array] = {}
        for name in names:
            if name == INPUT:
                values[name] = x
            elif name == OUTPUT:
                values[name] = logits
            elif name == EMBEDDING:
                if EMBEDDING in kept:
                    values[name] = kept[EMBEDDING][0]
            elif (value := _sown(kept, self._open[name])) is not None:
                values[name] = value
        return values

    def _gradients(
        self, saved: Any, x: jax.Array, units: jax.Array, layer: str, over: str
    ) -> tuple[Any, ...]:
        names = tuple({layer, over} - {""})

        def total(
            x: jax.Array, shift: jax.Array | None
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
            values = self._run(saved, x, names, shift, over)
            scores = _strongest(values[layer].astype(jnp.float32), units)
            # The inputs do not see each other, so the sum's derivatives are each one's own.
            return scores.sum(), (scores, values[over] if over else None)

        if not over:
            (_, (scores, _)), by_x = jax.value_and_grad(total, has_aux=True)(x, None)
            return scores, by_x, None, None
        shape = jax.eval_shape(lambda x: self._run(saved, x, (over,))[over], x)
        (_, (scores, values)), (by_x, by_shift) = jax.value_and_grad(total, (0, 1), has_aux=True)(
            x, jnp.zeros(shape.shape, shape.dtype)
        )
        return scores, by_x, values, by_shift


def _sown(kept: Any, tap: Tap) -> jax.Array | None:
    """Returns what a module's call gave, its first array; None where it was not kept."""
    for key in tap.path:
        kept = kept.get(key, {}) if isinstance(kept, Mapping) else {}
    results = kept.get("__call__", ()) if isinstance(kept, Mapping) else ()
    leaves = jax.tree.leaves(results[tap.call]) if tap.call < len(results) else []
    return leaves[0] if leaves and jnp.issubdtype(leaves[0].dtype, jnp.floating) else None


def _strongest(values: jax.Array, units: jax.Array) -> jax.Array:
    """Returns the maximum of each input's unit over its positions, `[n]` of `[n, ..., units]`; of equal ones the first counts."""
    flat = values.reshape(len(values), -1, values.shape[-1])
    one = jnp.take_along_axis(flat, units[:, None, None], axis=2)[:, :, 0]
    place = jax.lax.stop_gradient(one.argmax(axis=1))
    return jnp.take_along_axis(one, place[:, None], axis=1)[:, 0]


def first_filters(model: TrainedModel, layers: Sequence[Layer] | None = None) -> list[Filters]:
    """Returns the kernels of the layers that see the input itself, or what was only normalised of it.

    Those of a dense layer are laid out as frames x bands where it sees all of them, and as bands where it sees a frame.

    Args:
      model: a trained model.
      layers: what `describe` finds in it, where that is known.
    """
    frames, bands = model.frames, model.features.bands
    layers = describe(model.module, frames, bands) if layers is None else layers
    params = model.model["variables"]["params"]
    weighted: list[bool] = []  # whether a layer, or one on the way to it, has kernels
    found: dict[str, Filters] = {}
    for layer in layers:
        node: Any = params
        for key in layer.name.split("/"):
            node = node.get(key, {}) if isinstance(node, Mapping) else {}
        kernel = node.get("kernel") if isinstance(node, Mapping) else None
        behind = any(weighted[source.layer] for source in layer.sources)
        if kernel is not None and np.ndim(kernel) > 1 and not behind and layer.name not in found:
            found[layer.name] = _filters(
                layer, np.asarray(kernel, np.float32), frames, bands, model.features.kind
            )
        weighted.append(behind or kernel is not None)
    return list(found.values())


def _filters(layer: Layer, kernel: np.ndarray, frames: int, bands: int, kind: str) -> Filters:
    """Sorts a kernel's axes, `[..., in, out]`, by what they are."""
    if kernel.ndim == 4:
        # [frames, bands, channels, filters]; a first layer sees one channel, of several the mean is taken.
        image = kernel.mean(axis=2).transpose(2, 1, 0)
        return Filters(layer.name, "bands" if image.shape[1] == bands else "patch", image)
    if kernel.ndim == 3:
        if kind == "waveform" and kernel.shape[1] == 1:
            return Filters(layer.name, "waveform", kernel.transpose(2, 1, 0))
        return Filters(
            layer.name, "bands" if kernel.shape[1] == bands else "patch", kernel.transpose(2, 1, 0)
        )
    if kernel.ndim > 4:
        return Filters(
            layer.name, "patch", kernel.reshape(-1, 1, kernel.shape[-1]).transpose(2, 1, 0)
        )
    inputs, units = kernel.shape
    if inputs == frames * bands:
        return Filters(layer.name, "bands", kernel.reshape(frames, bands, units).transpose(2, 1, 0))
    if inputs == bands:
        return Filters(layer.name, "bands", kernel.T[:, :, None])
    return Filters(layer.name, "patch", kernel.T[:, :, None])


def frequency_responses(
    taps: np.ndarray, sample_rate: int, bins: int = 257
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns how strongly filters pass each frequency, sorted by the frequency of their peak.

    Args:
      taps: `[filters, samples]`.
      sample_rate: Hz.
      bins: frequencies from 0 to half the rate.

    Returns:
      dB below each filter's peak, float32 `[filters, bins]`; the frequencies in Hz, `[bins]`; the filters' numbers, `[filters]`.
    """
    gain = np.abs(np.fft.rfft(taps, n=max(2 * (bins - 1), taps.shape[1]), axis=1))
    order = np.argsort(gain.argmax(axis=1), kind="stable")
    gain = gain[order]
    peak = np.maximum(gain.max(axis=1, keepdims=True), 1e-12)
    return (
        (20 * np.log10(np.maximum(gain / peak, 1e-6))).astype(np.float32),
        np.linspace(0, sample_rate / 2, gain.shape[1]),
        order,
    )


def heard_bands(values: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns features, or derivatives by them, `[..., bands]` on bands that can be heard.

    MFCCs are an orthonormal transform of the mel bands in dB, so that its transpose takes both back to these, without what the
    transform leaves out. Other features stay as they are.
    """
    return values @ _cepstrum(spec) if spec.kind == "mfcc" else values


def _cepstrum(spec: FeatureSpec) -> np.ndarray:
    """Returns the transform from mel bands in dB to MFCCs, float32 `[n_mfcc, n_mels]`."""
    rows: np.ndarray = scipy.fft.dct(np.eye(spec.n_mels), axis=0, type=2, norm="ortho")[
        : spec.n_mfcc
    ].astype(np.float32)
    return rows


def silence(features: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns the features of silence beside this sound, float32 `[frames, bands]`: nothing above the floor of its scale."""
    features = features.astype(np.float32)
    if spec.kind == "waveform" or spec.compression == "log10000":
        return np.zeros_like(features)
    loudest = 0.0 if spec.db_ref == "max" else float(heard_bands(features, spec).max())
    if spec.kind == "mfcc":
        row = (loudest - spec.top_db) * _cepstrum(spec).sum(axis=1)
        return np.broadcast_to(row, features.shape).astype(np.float32)
    return np.full_like(features, loudest - spec.top_db)


def gradient_times_input(
    explainer: Explainer, features: np.ndarray, layer: str, unit: int
) -> Attribution:
    """Returns the derivative by each value of the normalised input times that value.

    Of a linear network that is what each value adds to the activation. The zero is the mean of the training clips.

    Args:
      explainer: of the model.
      features: one window, `[frames, bands]`.
      layer: of the unit.
      unit: its number.
    """
    # As many inputs as `integrated_gradients` takes at a time, which costs less than to compile the network for another number.
    found = explainer.gradients(np.broadcast_to(features, (BATCH, *features.shape)), layer, unit)
    mean = np.broadcast_to(
        np.asarray(explainer.model.model["norm"]["mean"], np.float32), features.shape
    )
    return _attribution(
        found.inputs[0], features - mean, explainer.model.features, float(found.scores[0])
    )


def integrated_gradients(
    explainer: Explainer,
    features: np.ndarray,
    layer: str,
    unit: int,
    *,
    baseline: np.ndarray | None = None,
    steps: int = 64,
) -> Attribution:
    """Returns what each value adds to the activation on the straight way from a baseline to the input.

    The sum over all values is the difference of the two activations, but for the error of the sum over the steps (the midpoint
    rule), which more of them make smaller.

    Args:
      explainer: of the model.
      features: one window, `[frames, bands]`.
      layer: of the unit.
      unit: its number.
      baseline: `[frames, bands]`; silence if None.
      steps: derivatives that are taken on the way.
    """
    spec = explainer.model.features
    features = features.astype(np.float32)
    start = silence(features, spec) if baseline is None else baseline.astype(np.float32)
    # Both ends first, then the middles of the steps; the last batch is filled up, so that one size is compiled.
    places = np.concatenate([[0, 1], (np.arange(steps) + 0.5) / steps]).astype(np.float32)
    total = np.zeros(features.shape, np.float64)
    ends: list[float] = []
    for first in range(0, len(places), BATCH):
        some = np.resize(places[first : first + BATCH], BATCH)[:, None, None]
        found = explainer.gradients(start + some * (features - start), layer, unit)
        ends = ends or found.scores[:2].tolist()
        total += found.inputs[0 if first else 2 : len(places) - first].sum(axis=0, dtype=np.float64)
    return _attribution(
        (total / steps).astype(np.float32), features - start, spec, ends[1], ends[0]
    )


def _attribution(
    gradient: np.ndarray,
    change: np.ndarray,
    spec: FeatureSpec,
    score: float,
    reference: float = 0.0,
) -> Attribution:
    values = (gradient * change).astype(np.float32)
    heard = (
        values if spec.kind != "mfcc" else heard_bands(gradient, spec) * heard_bands(change, spec)
    )
    return Attribution(values, heard.astype(np.float32), score, reference)


def grad_cam(values: np.ndarray, by_values: np.ndarray) -> np.ndarray:
    """Returns Grad-CAM's map, the sum of a layer's units weighted by their mean derivative, where it is positive.

    Args:
      values: of the layer for one input, `[..., units]`.
      by_values: the derivatives of the activation that is explained, likewise.

    Returns:
      float32 `[...]`, not negative.
    """
    weights = by_values.reshape(-1, by_values.shape[-1]).mean(axis=0)
    return np.maximum(values @ weights, 0).astype(np.float32)


def stretched(positions: np.ndarray, frames: int, bands: int) -> np.ndarray:
    """Returns a map over positions `[steps]` or `[steps, heights]` as float32 `[frames, bands]`, linear between their centres.

    Positions are taken to lie evenly over the input, which padding and pools that leave out a rest shift a little.
    """
    grid = positions.reshape(len(positions), -1)
    for extent in (bands, frames):
        # Along the last axis, which then becomes the first.
        count = grid.shape[1]
        centres = (np.arange(count) + 0.5) * extent / count - 0.5
        grid = np.stack([np.interp(np.arange(extent), centres, line) for line in grid], axis=1)
    return grid.astype(np.float32)


def class_map(
    explainer: Explainer, features: np.ndarray, layer: str, unit: int, over: str = ""
) -> np.ndarray:
    """Returns Grad-CAM for a unit, float32 `[steps]` or `[steps, heights]`.

    Args:
      explainer: of the model.
      features: one window, `[frames, bands]`.
      layer: of the unit, usually "output".
      unit: its number.
      over: the layer whose positions the map has; the last convolution if "".

    Raises:
      UserError: that layer has no positions.
    """
    over = over or explainer.last_convolution
    if len(explainer.tap(over).shape) < 2:
        known = [name for name, tap in explainer.taps.items() if len(tap.shape) > 1]
        raise UserError(
            f"layer {over!r} has no positions that a map could be drawn of; {', '.join(known)} have."
        )
    found = explainer.gradients(features[None], layer, unit, over)
    assert found.values is not None and found.by_values is not None
    image = grad_cam(found.values[0], found.by_values[0])
    return image if image.ndim < 3 else image.reshape(*image.shape[:2], -1).mean(axis=2)


def strongest_units(
    explainer: Explainer, features: np.ndarray, label: int, count: int = 3
) -> list[int]:
    """Returns the units of the embedding that speak most for a label, the strongest first.

    It is their activation times their weight in the layer "head"; without such a layer the activation alone.

    Args:
      explainer: of the model.
      features: one window, `[frames, bands]`.
      label: its number.
      count: how many.
    """
    if EMBEDDING not in explainer.taps:
        return []
    embedding = explainer.activations(features[None])[EMBEDDING][
        0
    ]  # of all layers, as compiled for `activations` anyway
    head = explainer.model.model["variables"]["params"].get("head", {})
    kernel = (
        np.asarray(head["kernel"])
        if isinstance(head, Mapping) and "kernel" in head
        else np.zeros((0, 0))
    )
    if embedding.ndim == 1 and len(kernel) == len(embedding) and kernel.ndim == 2:
        embedding = embedding * kernel[:, label]
    strength = embedding.reshape(-1, embedding.shape[-1]).max(axis=0)
    return np.argsort(-strength, kind="stable")[:count].tolist()


def choose_window(
    model: TrainedModel,
    network: Network,
    path: str | os.PathLike[str],
    *,
    label: int | None = None,
    at: float | None = None,
    min_seconds: float = 1.0,
) -> Chosen:
    """Finds the window of a file that is explained, in bounded memory.

    Args:
      model: a trained model.
      network: its network.
      path: the sound file.
      label: which label; the file's most probable one if None, and with `at` the window's. Of a regression it is the largest
        output.
      at: seconds; the window that holds them, nearest to its middle. If None, that in which the label is most probable.
      min_seconds: shorter files are refused.

    Raises:
      UserError: the file cannot be used, or `at` is not in it.
    """
    spec, samples = model.features, [0]
    seconds_of_frame = spec.hop_length / spec.sample_rate
    best: list[tuple[float, Window, np.ndarray]] = []
    total, count = np.zeros(len(model.label_names)), 0
    for batch in _batches(path, model, samples, min_seconds):
        scores, _ = network(np.stack([window.inputs for window in batch]))
        total += scores.sum(axis=0, dtype=np.float64)
        count += len(batch)
        for window, row in zip(batch, scores, strict=True):
            middle = (window.start + window.length / 2) * seconds_of_frame
            # One window for each label that may be asked for in the end, or the one that is nearest.
            values = row.tolist() if at is None else [-abs(middle - at)]
            best = [
                entry if value <= entry[0] else (value, window, row)
                for value, entry in zip(
                    values, best or [(-np.inf, window, row)] * len(values), strict=True
                )
            ]
    seconds = samples[0] / spec.sample_rate
    if at is not None and not 0 <= at <= seconds:
        raise UserError(f"{path}: has no second {at:g}; it is {seconds:.1f} s long.")
    mean = (total / count).astype(np.float32)
    if at is None:
        label = int(mean.argmax()) if label is None else label
        _, window, row = best[label]
    else:
        _, window, row = best[0]
        label = int(row.argmax()) if label is None else label
    start = window.start * seconds_of_frame
    end = min((window.start + window.length) * seconds_of_frame, seconds)
    return Chosen(window, start, end, row, label, mean, seconds)


def strongest_moments(
    explainer: Explainer,
    paths: Sequence[str | os.PathLike[str]],
    units: Sequence[tuple[str, int]],
    *,
    count: int = 5,
    min_seconds: float = 1.0,
    failed: Callable[[str], None] | None = None,
) -> list[Moment]:
    """Finds the moments that excite units most, over any number of files, in bounded memory.

    A window gives a unit one moment at most.

    Args:
      explainer: of the model.
      paths: sound files.
      units: layer and number of each.
      count: moments of each unit.
      min_seconds: shorter files are refused.
      failed: is told why a file cannot be used; the rest goes on. If None, that is raised.

    Returns:
      Moments in the order of the units, the strongest first.

    Raises:
      UserError: an unknown unit.
    """
    model = explainer.model
    for layer, unit in units:
        explainer.check_unit(layer, unit)
    names = tuple(dict.fromkeys(layer for layer, _ in units))
    order = itertools.count()
    best: list[list[tuple[float, int, str, Window, int, float]]] = [[] for _ in units]
    for path in paths:
        samples = [0]
        here: list[list[tuple[float, int, Window, int]]] = [[] for _ in units]
        try:
            for batch in _batches(path, model, samples, min_seconds):
                found = explainer.activations(_filled([window.inputs for window in batch]), names)
                if OUTPUT in found:
                    found[OUTPUT] = np.asarray(model.probabilities(jnp.asarray(found[OUTPUT])))
                for row, window in enumerate(batch):
                    for number, (layer, unit) in enumerate(units):
                        value, step = _peak(
                            found[layer][row, ..., unit], window.length / model.frames
                        )
                        # Of equal ones the earlier is kept.
                        _keep(here[number], (value, -next(order), window, step), count)
        except UserError as error:
            if failed is None:
                raise
            failed(str(error))
            continue
        seconds = samples[0] / model.features.sample_rate
        for number, entries in enumerate(here):
            for value, turn, window, step in entries:
                _keep(best[number], (value, turn, os.fspath(path), window, step, seconds), count)
    found_moments = [
        (layer, unit, entry)
        for (layer, unit), entries in zip(units, best, strict=True)
        for entry in sorted(entries, key=lambda entry: entry[:2], reverse=True)
    ]
    frames: dict[int, float] = {}
    for name in names:
        timeless = [
            i for i, (layer, _, entry) in enumerate(found_moments) if layer == name and entry[4] < 0
        ]
        for first in range(0, len(timeless), BATCH):
            some = timeless[first : first + BATCH]
            windows, numbers = (
                [found_moments[i][2][3] for i in some],
                [found_moments[i][1] for i in some],
            )
            frames |= dict(
                zip(some, busiest_frames(explainer, windows, name, numbers), strict=True)
            )
    return [
        _moment(explainer, layer, unit, entry, frames.get(i))
        for i, (layer, unit, entry) in enumerate(found_moments)
    ]


def _batches(
    path: str | os.PathLike[str], model: TrainedModel, samples: list[int], min_seconds: float
) -> Iterator[list[Window]]:
    """Yields a file's windows one after the other, `BATCH` at a time, and counts its samples in `samples[0]`."""
    spec = model.features

    def counted() -> Iterator[np.ndarray]:
        for block in stream_audio(
            path, spec.sample_rate, min_seconds=min_seconds, resampler=spec.resampler
        ):
            samples[0] += len(block)
            yield block

    windows = stream_windows(counted(), spec, model, step=model.frames)
    while batch := list(itertools.islice(windows, BATCH)):
        yield batch


def _filled(inputs: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks inputs and fills the batch up to a power of two, so that few sizes are compiled."""
    room = (1 << (len(inputs) - 1).bit_length()) - len(inputs)
    return np.stack([*inputs, *[np.zeros_like(inputs[0])] * room])


def _peak(values: np.ndarray, real: float) -> tuple[float, int]:
    """Returns the maximum over positions `[steps, ...]` within the share of them that is real, and its step."""
    if not values.ndim:
        return float(values), -1
    steps = values.reshape(len(values), -1).max(axis=1)[: max(round(real * len(values)), 1)]
    place = int(steps.argmax())
    return float(steps[place]), place


def _keep(heap: list[Any], entry: Any, count: int) -> None:
    """Keeps the largest entries, which differ in their first two items."""
    if len(heap) < count:
        heapq.heappush(heap, entry)
    elif entry[:2] > heap[0][:2]:
        heapq.heapreplace(heap, entry)


def _moment(
    explainer: Explainer,
    layer: str,
    unit: int,
    entry: tuple[float, int, str, Window, int, float],
    busiest: float | None,
) -> Moment:
    """Finds the time of a moment: of its position, or of the frame that speaks most for the unit."""
    value, _, path, window, step, seconds = entry
    model = explainer.model
    hop = model.features.hop_length / model.features.sample_rate
    frame = (
        (step + 0.5) * model.frames / explainer.taps[layer].steps - 0.5
        if busiest is None
        else busiest
    )
    # Frames of a waveform begin at multiples of the hop; others are centred there.
    time = (window.start + frame + (0.5 if model.features.kind == "waveform" else 0.0)) * hop
    end = min((window.start + window.length) * hop, seconds)
    return Moment(layer, unit, path, min(max(time, 0.0), seconds), window.start * hop, end, value)


def busiest_frames(
    explainer: Explainer, windows: Sequence[Window], layer: str, units: Sequence[int]
) -> list[float]:
    """Returns the middle of the second of each window that speaks most for a unit, as a frame of it.

    What speaks is the derivative times what the sound has that silence does not.

    Args:
      explainer: of the model.
      windows: up to `BATCH`.
      layer: of the units.
      units: one for each window.
    """
    spec = explainer.model.features
    features = np.stack([window.inputs for window in windows]).astype(np.float32)
    rows = np.arange(BATCH) % len(windows)
    gradients = explainer.gradients(
        features[rows], layer, [units[row] for row in rows.tolist()]
    ).inputs
    width = max(round(_MOMENT_SECONDS * spec.sample_rate / spec.hop_length), 1)
    found = []
    for window, values, gradient in zip(windows, features, gradients, strict=False):
        speaks = (gradient * (values - silence(values, spec))).sum(axis=1, dtype=np.float64)[
            : window.length
        ]
        found.append(
            float(
                scipy.ndimage.uniform_filter1d(
                    speaks, min(width, len(speaks)), mode="constant"
                ).argmax()
            )
        )
    return found


def listening_mask(heard: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns how much of each part of a sound speaks for a unit, float32 between 0 and 1 in the shape of `heard`.

    Args:
      heard: `Attribution.heard`, `[frames, bands]`. Its positive part is smoothed, so that single cells do not ring, and loud
        from a hundredth of it on.
      spec: the front end.
    """
    positive = np.maximum(heard, 0).astype(np.float64)
    if spec.kind == "waveform":
        width = max(round(_WAVEFORM_SMOOTHING * spec.sample_rate), 1)
        smooth = scipy.ndimage.uniform_filter1d(positive.ravel(), width, mode="nearest").reshape(
            positive.shape
        )
    else:
        smooth = scipy.ndimage.gaussian_filter(positive, (1.0, 1.0), mode="nearest")
    most = float(np.quantile(smooth, 0.99)) or float(smooth.max())
    return (
        np.clip(smooth / most, 0, 1).astype(np.float32)
        if most > 0
        else np.zeros(heard.shape, np.float32)
    )


def invert(
    features: np.ndarray, spec: FeatureSpec, mask: np.ndarray | None = None, *, iterations: int = 32
) -> np.ndarray:
    """Returns a sound that has these features: what is left of a sound for the network.

    Mel bands are spread over the frequencies by least squares, and the phases that no spectrogram has are found by Griffin and
    Lim's iteration, both by librosa. Frames that lie too far apart for that are interpolated.

    Args:
      features: `[frames, bands]`, not normalised.
      spec: the front end.
      mask: gains between 0 and 1 of the amplitudes, in the shape of `heard_bands`; None leaves all of it.
      iterations: of Griffin and Lim's.

    Returns:
      Samples, float32 `[samples]`; a waveform's own, others with a peak of 0.9.
    """
    features = features.astype(np.float32)
    if spec.kind == "waveform":
        return (features if mask is None else features * mask).ravel()
    amplitude = np.sqrt(_power(features, spec))
    # The least squares converge at any scale, but slowly at those of other powers than about 1.
    amplitude = (amplitude if mask is None else amplitude * mask) / max(
        float(amplitude.max()), 1e-12
    )
    if spec.kind == "stft":
        magnitude = amplitude.T
    else:
        magnitude = librosa.feature.inverse.mel_to_stft(
            np.square(amplitude.T),
            sr=spec.sample_rate,
            n_fft=spec.n_fft,
            power=2.0,
            fmin=spec.fmin,
            fmax=spec.top_frequency,
        )
    hop = min(spec.hop_length, max(spec.n_fft // 4, 1))
    length = max((len(features) - 1) * spec.hop_length, 1)
    magnitude = _resampled_frames(magnitude.T, spec.hop_length, hop, length).T
    samples = librosa.griffinlim(
        np.ascontiguousarray(magnitude),
        n_iter=iterations,
        hop_length=hop,
        n_fft=spec.n_fft,
        random_state=0,
        length=length,
    )
    peak = float(np.abs(samples).max())
    return (0.9 * samples / peak if peak > 0 else samples).astype(np.float32)


def through_mask(samples: np.ndarray, spec: FeatureSpec, mask: np.ndarray) -> np.ndarray:
    """Returns a sound with only so much of each of its parts as a mask leaves.

    Args:
      samples: of the window, float32 `[samples]` at the front end's rate.
      spec: the front end.
      mask: gains between 0 and 1, in the shape of `heard_bands`.

    Returns:
      float32 `[samples]`.
    """
    if spec.kind == "waveform":
        gains = (
            np.resize(mask.ravel(), len(samples))
            if mask.size < len(samples)
            else mask.ravel()[: len(samples)]
        )
        return (samples * gains).astype(np.float32)
    if spec.kind != "stft":
        weights = mel_filter_bank(
            sr=spec.sample_rate,
            n_fft=spec.n_fft,
            n_mels=spec.n_mels,
            fmin=spec.fmin,
            fmax=spec.top_frequency,
            norm=None,
        )
        mask = mask @ (weights / np.maximum(weights.sum(axis=0, keepdims=True), 1e-6))
    hop = min(spec.hop_length, max(spec.n_fft // 4, 1))
    spectrum = librosa.stft(samples.astype(np.float32), n_fft=spec.n_fft, hop_length=hop)
    gains = _resampled_frames(mask, spec.hop_length, hop, len(samples))[: spectrum.shape[1]]
    spectrum *= np.pad(gains, ((0, spectrum.shape[1] - len(gains)), (0, 0)), mode="edge").T
    return librosa.istft(spectrum, hop_length=hop, n_fft=spec.n_fft, length=len(samples)).astype(
        np.float32
    )


def _power(features: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Returns the power of features, `[frames, bands]` as `heard_bands`; what lies at the scale's floor is nothing."""
    if spec.compression == "log10000":
        return np.maximum(np.power(np.float32(10), features) - 1, 0) / np.float32(10000)
    floor = float(heard_bands(silence(features, spec), spec)[0].max())
    db = heard_bands(features, spec)
    return np.where(
        db > floor + 0.05,
        np.power(np.float32(10), np.minimum(db, floor + spec.top_db + 20) / 10),
        np.float32(0),
    )


def _resampled_frames(values: np.ndarray, hop: int, wanted: int, length: int) -> np.ndarray:
    """Returns frames `[frames, any]` at another hop, linear between them, for so many samples."""
    places = np.arange(1 + length // wanted) * (wanted / hop)
    lower = np.minimum(places.astype(int), len(values) - 1)
    upper = np.minimum(lower + 1, len(values) - 1)
    share = np.clip(places - lower, 0, 1)[:, None].astype(np.float32)
    return values[lower] * (1 - share) + values[upper] * share


def read_excerpt(path: str | os.PathLike[str], start: float, end: float) -> tuple[np.ndarray, int]:
    """Reads a part of a sound file as it is, without the rest: all channels at its own rate.

    Args:
      path: a sound file.
      start: seconds.
      end: seconds; the file may end before.

    Returns:
      float32 `[samples, channels]` and the rate in Hz.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:
            first = max(round(start * file.samplerate), 0)
            file.seek(min(first, file.frames))
            return file.read(
                max(round(end * file.samplerate) - first, 0), dtype="float32", always_2d=True
            ), file.samplerate
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        raise UserError(
            f"{os.fsdecode(path)}: cannot be read from {start:.1f} s on ({error})."
        ) from error


def write_sound(path: str | os.PathLike[str], samples: np.ndarray, sample_rate: int) -> Path:
    """Writes samples, `[samples]` or `[samples, channels]`, as a WAV file of 16 bits, atomically; returns its path."""
    from musicgenre.files import replacing

    with replacing(path) as temporary:
        try:
            soundfile.write(
                temporary, np.clip(samples, -1, 1), sample_rate, subtype="PCM_16", format="WAV"
            )
        except soundfile.LibsndfileError as error:
            raise OSError(str(error)) from error
    return Path(path)
