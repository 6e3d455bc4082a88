"""A trained model as one program from sound to probabilities, for use without this package: StableHLO or ONNX.

The program takes mono samples at the model's rate, float32 `[batch, samples]` for any batch, and returns probabilities, float32
`[batch, classes]` (a regression's outputs). The front end, the clip's layout, the normalisation, the network and the softmax or
sigmoid are inside. The number of samples is fixed: those of one of the model's clips, `layout.frames` hops, or of a shorter one,
which is filled up inside as `layout.pad` says. A model that was trained on crops takes a whole clip, too: the program cuts the
`data.eval_chunks` windows that an evaluation takes out of it, and averages their probabilities.

What comes out is what `Tagger.tag` says of a file of these samples, to 1e-4, and no file is written of which that is not so. To
that end the features are rounded to float16 inside, as the store rounds those that the network was trained on: of `Tagger`'s,
which pass through it too, they then differ in the few cells that lie next to a rounding's edge, and not in every one.

A network whose compute type is bfloat16 is exported, and compared, in float32.

Beside the program lies `<program>.json` with the labels in the order of the outputs, the rate, the number of samples, the task
and the model's card; an ONNX file holds them in its metadata as well.
"""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from musicgenre import __version__
from musicgenre.audio.features import frame_count
from musicgenre.audio.features_jax import features
from musicgenre.audio.layout import ClipLayout
from musicgenre.errors import UserError, did_you_mean
from musicgenre.files import replacing
from musicgenre.inference.windows import BATCH, Network, file_inputs
from musicgenre.runs.bundle import model_card
from musicgenre.runs.model import TrainedModel

FORMATS = ("onnx", "stablehlo")
# What each format's export needs beyond the package's own dependencies, by the name that Python imports.
_NEEDED = {"onnx": ("jax2onnx", "onnx", "onnxruntime"), "stablehlo": ("flatbuffers",)}
PLATFORMS = ("cpu", "cuda", "tpu")
# Older ONNX runtimes read older operator sets; jax2onnx writes this one for all that the networks here need.
OPSET = 21
# The largest difference from `Tagger` in a probability.
TOLERANCE = 1e-4
# As Flax has it: jax2onnx puts another in its place while it works.
_FLAX_BATCH_NORM = nn.BatchNorm.__call__
# The key of the notes in an ONNX file's metadata, and their version.
NOTES_KEY, _SCHEMA = "musicgenre", 1


@dataclasses.dataclass(frozen=True)
class Exported:
    """A program that was written.

    Attributes:
      path: its file.
      notes: the JSON file beside it.
      samples: of one input.
      difference: the largest difference of its probabilities from the model's own, over a few test signals.
    """

    path: Path
    notes: Path
    samples: int
    difference: float


def export_model(
    model: TrainedModel,
    path: str | os.PathLike[str],
    form: str = "",
    *,
    seconds: float = 0.0,
    card: str = "",
    tolerance: float = TOLERANCE,
) -> Exported:
    """Writes a model as a program and its notes, both atomically, after the program has been run and compared with the model.

    ONNX has the input "samples" and the output "probabilities". StableHLO is serialised by `jax.export` for CPUs, CUDA and TPUs,
    and run by `jax.export.deserialize(bytes).call(samples)` with JAX alone, of the version that wrote it or a later one.

    Args:
      model: a trained model.
      path: the file.
      form: "onnx" or "stablehlo"; "" goes by the file's ending.
      seconds: the length of an input, at most the model's clip; 0 is the clip.
      card: what people should know of it, Markdown; "" is the model's own, or one made of its notes.
      tolerance: the largest difference that is allowed.

    Raises:
      UserError: the form is not known, a package is missing, the length does not fit, the network cannot be written in that form,
        or what was written differs from the model. Nothing is written then.
    """
    path = Path(path)
    form = check_format(path, form)
    model = _in_float32(model)
    samples = input_samples(model, seconds)
    notes = _notes(model, samples, form, card)
    write, read = (_onnx_bytes, _run_onnx) if form == "onnx" else (_stablehlo_bytes, _run_stablehlo)
    program = write(model, samples, notes)
    beside = path.with_name(path.name + ".json")
    # Both are there, or neither: the program takes its name last.
    with replacing(path) as temporary, replacing(beside) as temporary_notes:
        temporary.write_bytes(program)
        try:
            difference = _difference(model, samples, read(temporary))
        except Exception as error:
            raise UserError(
                f"{path}: the exported program cannot be run ({type(error).__name__}: {str(error)[:200]}); nothing was written."
            ) from error
        if not difference <= tolerance:
            raise UserError(
                f"{path}: the exported program differs from the model by {difference:.1e} in a probability, more than "
                f"{tolerance:.0e}; nothing was written."
            )
        text = json.dumps(
            {**notes, "largest_difference": float(difference)},
            indent=1,
            ensure_ascii=False,
            allow_nan=False,
        )
        temporary_notes.write_text(text + "\n", encoding="utf-8")
    return Exported(path, beside, samples, difference)


def check_format(path: str | os.PathLike[str], form: str = "") -> str:
    """Returns the format that a file is written in: `form`, or that of its ending if "".

    Raises:
      UserError: it is not known, or a package that it takes is missing.
    """
    form = form or Path(path).suffix.removeprefix(".").lower()
    if form not in FORMATS:
        raise UserError(
            f"{os.fspath(path)}: no known format; the name ends in .onnx or .stablehlo, or --format says which."
            + did_you_mean(form, FORMATS)
        )
    if missing := [name for name in _NEEDED[form] if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"{form}: the package {missing[0]!r} is missing: pip install 'musicgenre[export]'."
        )
    return form


def input_samples(model: TrainedModel, seconds: float = 0.0) -> int:
    """Returns how many samples an input of a model's program has.

    Args:
      model: a trained model.
      seconds: the length of an input; 0 is the model's clip.

    Raises:
      UserError: it is longer than a clip, or negative.
    """
    spec = model.features
    clip = model.layout.frames * spec.hop_length
    samples = round(seconds * spec.sample_rate) if seconds else clip
    if not 0 < samples <= clip:
        raise UserError(
            f"the length must be above 0 and at most the model's clip of {clip / spec.sample_rate:.2f} s, not {seconds:g} s."
        )
    return samples


def waveform_function(
    model: TrainedModel, samples: int, *, transform: str = "auto"
) -> Callable[[jax.Array], jax.Array]:
    """Returns the function from samples, float32 `[batch, samples]`, to probabilities, float32 `[batch, classes]`.

    Args:
      model: a trained model.
      samples: of one input, see `input_samples`.
      transform: see `musicgenre.audio.features_jax.features`.
    """
    from musicgenre.models.apply import normalise
    from musicgenre.store.loader import chunk_starts  # brings Grain

    spec, layout, frames = model.features, model.layout, model.frames
    length = min(frame_count(samples, spec), layout.frames)
    starts = (
        chunk_starts(length, frames, int(model.config.data.eval_chunks)).tolist()
        if frames < layout.frames
        else [0]
    )
    saved = jax.device_get(model.model)

    def scores(waveform: jax.Array) -> jax.Array:
        clip = _fit(features(waveform, spec, frames=length, transform=transform), layout)
        # The barrier keeps XLA from taking the two conversions for nothing.
        stored = jax.lax.optimization_barrier(clip.astype(jnp.float16))
        # Side by side and then below each other; jax2onnx loses count of a batch that is put together.
        windows = jnp.concatenate([stored[:, start : start + frames] for start in starts], axis=1)
        windows = windows.reshape(waveform.shape[0] * len(starts), frames, spec.bands)
        logits = model.module.apply(
            saved["variables"], normalise(windows, saved["norm"]), train=False
        )
        each = model.probabilities(logits)
        return (
            each.reshape(waveform.shape[0], len(starts), each.shape[-1]).mean(axis=1)
            if len(starts) > 1
            else each
        )

    return scores


def _fit(clips: jax.Array, layout: ClipLayout) -> jax.Array:
    """Returns `[batch, frames, bands]` filled up from `[batch, up to frames, bands]`; see `ClipLayout.fit`."""
    length = clips.shape[1]
    missing = layout.frames - length
    if not missing:
        return clips
    if layout.pad == "repeat":
        again = -(-layout.frames // length)
        return jnp.concatenate([clips] * again, axis=1)[:, : layout.frames]
    if layout.pad == "zero":
        return jnp.pad(clips, ((0, 0), (0, missing), (0, 0)))
    real = np.arange(layout.frames)[None, :, None] < length
    return jnp.where(
        real, jnp.pad(clips, ((0, 0), (0, missing), (0, 0))), clips.min(axis=(1, 2), keepdims=True)
    )


def _in_float32(model: TrainedModel) -> TrainedModel:
    dtype = getattr(model.module, "dtype", None)
    if dtype is None or jnp.dtype(dtype) == jnp.float32:
        return model
    return dataclasses.replace(model, module=model.module.clone(dtype=jnp.dtype("float32")))


def _notes(model: TrainedModel, samples: int, form: str, card: str) -> dict[str, Any]:
    spec = model.features
    return {
        "schema": _SCHEMA,
        "format": form,
        "model": str(model.config.model.name),
        "task": model.task,
        "labels": list(model.label_names),
        "sample_rate": spec.sample_rate,
        "samples": samples,
        "seconds": samples / spec.sample_rate,
        "input": {"name": "samples", "dtype": "float32", "shape": ["batch", samples]},
        "output": {
            "name": "probabilities",
            "dtype": "float32",
            "shape": ["batch", len(model.label_names)],
        },
        "features": spec.to_dict(),
        "dataset": {
            key: model.dataset[key]
            for key in ("name", "protocol", "synthetic")
            if key in model.dataset
        },
        "step": model.step,
        "checkpoint": model.which,
        "temperature": model.temperature,
        "card": card or model.card or model_card(model),
        "musicgenre": __version__,
        "jax": jax.__version__,
    }


def _stablehlo_bytes(model: TrainedModel, samples: int, notes: dict[str, Any]) -> bytes:
    from jax import export

    (batch,) = export.symbolic_shape("batch")
    function = jax.jit(waveform_function(model, samples))
    exported = export.export(function, platforms=PLATFORMS)(
        jax.ShapeDtypeStruct((batch, samples), jnp.float32)
    )
    return bytes(exported.serialize())


def _onnx_bytes(model: TrainedModel, samples: int, notes: dict[str, Any]) -> bytes:
    import onnx
    from jax2onnx import to_onnx

    # By products, which every runtime has: onnxruntime refuses the Fourier transform that jax2onnx writes.
    function = waveform_function(model, samples, transform="matmul")

    def traced(waveform: jax.Array) -> jax.Array:
        with _mended():
            return function(waveform)

    try:
        with _quiet("jax2onnx", "onnx_ir"), _few_plugins():
            proto = to_onnx(
                traced,
                [jax.ShapeDtypeStruct(("batch", samples), jnp.float32)],
                model_name=notes["model"],
                opset=OPSET,
                input_names=["samples"],
                output_names=["probabilities"],
            )
    except Exception as error:
        raise UserError(
            f"the network {notes['model']!r} cannot be written as ONNX by jax2onnx ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:200] if str(error) else ''}). Take StableHLO: --format=stablehlo."
        ) from error
    # Some of the shapes that it notes on the way are wrong; a runtime finds its own.
    del proto.graph.value_info[:]
    onnx.helper.set_model_props(
        proto, {NOTES_KEY: json.dumps(notes, ensure_ascii=False, allow_nan=False)}
    )
    return bytes(proto.SerializeToString())


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Holds back the warnings of loggers, which are of no use to whoever exports a model."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _few_plugins() -> Iterator[None]:
    """Has jax2onnx load its plugins of JAX and Flax only, and all others when somebody else uses it.

    Those of other libraries, with the examples that they bring, take five seconds.
    """
    from jax2onnx.plugins import plugin_system

    if plugin_system._already_imported_plugins:
        yield
        return
    folder = Path(plugin_system.__file__).parent
    for library in ("jax", "flax"):
        plugin_system._import_tree(folder / library, f"{plugin_system.__package__}.{library}")
    plugin_system._already_imported_plugins = True
    try:
        yield
    finally:
        plugin_system._already_imported_plugins = False


@contextlib.contextmanager
def _mended() -> Iterator[None]:
    """Puts right, while a function is traced, what jax2onnx 0.17 makes of two layers of Flax.

    It takes numbers as the padding of `nn.max_pool` for none, so the input is padded first; and fails on an `nn.BatchNorm` over
    another axis than the last, which here computes as Flax has it.
    """
    pool, norm = nn.max_pool, nn.BatchNorm.__call__

    def max_pool(
        x: jax.Array, window_shape: Any, strides: Any = None, padding: Any = "VALID"
    ) -> jax.Array:
        if not isinstance(padding, str):
            x = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-jnp.inf)
            padding = "VALID"
        pooled: jax.Array = pool(x, window_shape=window_shape, strides=strides, padding=padding)
        return pooled

    def batch_norm(self: nn.BatchNorm, x: jax.Array, *arguments: Any, **named: Any) -> jax.Array:
        last = self.axis in (-1, x.ndim - 1)
        normalised: jax.Array = (norm if last else _FLAX_BATCH_NORM)(self, x, *arguments, **named)
        return normalised

    nn.max_pool, nn.BatchNorm.__call__ = max_pool, batch_norm
    try:
        yield
    finally:
        nn.max_pool, nn.BatchNorm.__call__ = pool, norm


def _run_stablehlo(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    from jax import export

    call = jax.jit(export.deserialize(bytearray(path.read_bytes())).call)
    return lambda x: np.asarray(call(x))


def _run_onnx(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda x: np.asarray(session.run(["probabilities"], {"samples": x})[0])


def _difference(
    model: TrainedModel, samples: int, program: Callable[[np.ndarray], np.ndarray]
) -> float:
    """Returns the largest difference of a program's probabilities from the model's own over two batches, of two and of one."""
    signals = check_signals(samples, model.features.sample_rate)
    expected = reference(model, signals)
    found = np.concatenate([program(signals[:2]), program(signals[2:])])
    return float(np.abs(found - expected).max()) if found.shape == expected.shape else np.inf


def reference(model: TrainedModel, signals: np.ndarray) -> np.ndarray:
    """Returns what `Tagger` makes of files that hold the signals `[n, samples]`, float32 `[n, classes]`."""
    network = Network(model)
    scores = []
    for signal in signals:
        inputs = file_inputs(signal, model)
        parts = [
            network(inputs[start : start + BATCH])[0] for start in range(0, len(inputs), BATCH)
        ]
        scores.append(np.concatenate(parts).mean(axis=0, dtype=np.float64))
    return np.stack(scores).astype(np.float32)


def check_signals(samples: int, sample_rate: int) -> np.ndarray:
    """Returns noise in bursts, a falling tone over silence, and a chord in faint noise, float32 `[3, samples]`."""
    generator = np.random.default_rng(0)
    time = np.arange(samples) / sample_rate
    noise = generator.standard_normal(samples)
    bursts = 0.2 * noise * np.exp(-8 * (time % 0.5))
    falling = 0.5 * np.sin(2 * np.pi * (880 * time - 10 * time**2)) * (time < 0.8 * time[-1])
    chord = (
        sum(0.1 * np.sin(2 * np.pi * hertz * time) for hertz in (220.0, 277.2, 329.6, 1318.5))
        + 1e-4 * noise
    )
    return np.stack([bursts, falling, chord]).astype(np.float32)
