"""Exports a trained model as one program from samples to probabilities: StableHLO or ONNX.

The program takes mono samples at the model's rate, float32 `[batch, samples]` for any batch, and
returns probabilities (a regression's outputs), float32 `[batch, classes]`. It contains the front
end, the clip's layout, the normalisation, the network and the softmax or sigmoid. The number of
samples is fixed: one clip of the model (`layout.frames` hops) or less, which the program pads as
`layout.pad` says. For a model trained on crops, the program cuts the `data.eval_chunks` windows of
an evaluation out of the clip and averages their probabilities.

The probabilities are those of `Tagger.tag` for a file of these samples, to 1e-4; otherwise no file
is written. To that end the program rounds the features to float16, as the store does. A bfloat16
network is exported, and compared, in float32.

`<program>.json` holds the labels in the order of the outputs, the rate, the number of samples, the
task and the model's card, as does an ONNX file's metadata.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from musicgenre import __version__
from musicgenre.audio.features import frame_count
from musicgenre.audio.features_jax import features
from musicgenre.audio.layout import ClipLayout
from musicgenre.errors import UserError, did_you_mean
from musicgenre.files import replacing, write_json
from musicgenre.inference.windows import BATCH, Network, file_inputs
from musicgenre.models.apply import normalise
from musicgenre.runs.bundle import model_card
from musicgenre.runs.model import TrainedModel
from musicgenre.store.loader import chunk_starts

FORMATS = ("onnx", "stablehlo")
# The modules that each format needs besides the package's own dependencies.
_NEEDED = {"onnx": ("jax2onnx", "onnx", "onnxruntime"), "stablehlo": ("flatbuffers",)}
PLATFORMS = ("cpu", "cuda", "tpu")
# Older ONNX runtimes read older operator sets; this one has all that the networks need.
OPSET = 21
# The largest difference from `Tagger` in a probability.
TOLERANCE = 1e-4
# Flax's own, which jax2onnx replaces while it works.
_FLAX_BATCH_NORM = nn.BatchNorm.__call__
# The key of the notes in an ONNX file's metadata, and their version.
NOTES_KEY, _SCHEMA = "musicgenre", 1


class Exported(NamedTuple):
    """An exported program: its file, its JSON notes, the samples of one input.

    `difference` is the largest from the model's probabilities, over test signals.
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
) -> Exported:
    """Writes a model as a program with notes, after comparing the program with the model.

    ONNX has the input "samples" and the output "probabilities". StableHLO is serialised by
    `jax.export` for CPUs, CUDA and TPUs. `jax.export.deserialize(bytes).call(samples)` runs it with
    JAX alone, of the version that wrote it or a later one.

    Args:
      model: a trained model.
      path: the file.
      form: "onnx" or "stablehlo"; "" goes by the file's suffix.
      seconds: the length of an input, at most the model's clip; 0 is the clip.
      card: what users should know about it, Markdown; "" is the model's own, or `model_card`.

    Raises:
      UserError: the form is not known, a package is missing, the length does not fit, the network
        cannot be written in that form, or the program differs from the model. Nothing is written.
    """
    path = Path(path)
    form = check_format(path, form)
    dtype = getattr(model.module, "dtype", None)
    if dtype is not None and jnp.dtype(dtype) != jnp.float32:
        model = dataclasses.replace(model, module=model.module.clone(dtype=jnp.dtype("float32")))
    samples = input_samples(model, seconds)
    notes = _notes(model, samples, form, card)
    write, read = (_onnx_bytes, _run_onnx) if form == "onnx" else (_stablehlo_bytes, _run_stablehlo)
    program = write(model, samples, notes)
    beside = path.with_name(path.name + ".json")
    # Both files are written, or neither: the program is renamed last.
    with replacing(path) as temporary:
        temporary.write_bytes(program)
        try:
            difference = _difference(model, samples, read(temporary))
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise UserError(
                f"{path}: the exported program cannot be run ({reason}); nothing was written."
            ) from error
        if not difference <= TOLERANCE:
            raise UserError(
                f"{path}: the exported program differs from the model by {difference:.1e} in a "
                f"probability, more than {TOLERANCE:.0e}; nothing was written."
            )
        write_json(beside, notes | {"largest_difference": difference})
    return Exported(path, beside, samples, difference)


def check_format(path: str | os.PathLike[str], form: str = "") -> str:
    """Returns `form`, or that of the file's suffix; raises UserError if it cannot be written."""
    form = form or Path(path).suffix.removeprefix(".").lower()
    if form not in FORMATS:
        hint = did_you_mean(form, FORMATS)
        raise UserError(
            f"{path}: no known format; name it *.onnx or *.stablehlo, or set --format.{hint}"
        )
    if missing := [name for name in _NEEDED[form] if importlib.util.find_spec(name) is None]:
        remedy = "pip install 'musicgenre[export]'"
        raise UserError(f"{form}: the package {missing[0]!r} is missing: {remedy}.")
    return form


def input_samples(model: TrainedModel, seconds: float = 0.0) -> int:
    """Returns the samples of an input of `seconds`, or of the model's clip if 0.

    Raises:
      UserError: it is longer than a clip, or negative.
    """
    spec = model.features
    clip = model.layout.frames * spec.hop_length
    samples = round(seconds * spec.sample_rate) if seconds else clip
    if not 0 < samples <= clip:
        most = f"{clip / spec.sample_rate:.2f} s, not {seconds:g} s"
        raise UserError(f"the length must be above 0 and at most the model's clip of {most}.")
    return samples


def waveform_function(
    model: TrainedModel, samples: int, *, transform: str = "auto"
) -> Callable[[jax.Array], jax.Array]:
    """Returns the function from float32 `[batch, samples]` to float32 `[batch, classes]`.

    See `musicgenre.audio.features_jax.features` for `transform`.
    """
    spec, layout, frames = model.features, model.layout, model.frames
    length = min(frame_count(samples, spec), layout.frames)
    starts = [0]
    if frames < layout.frames:
        starts = chunk_starts(length, frames, int(model.config.data.eval_chunks)).tolist()
    saved = jax.device_get(model.model)

    def scores(waveform: jax.Array) -> jax.Array:
        clip = _fit(features(waveform, spec, frames=length, transform=transform), layout)
        # The barrier keeps XLA from removing the two conversions.
        stored = jax.lax.optimization_barrier(clip.astype(jnp.float16))
        # Joined along time and then reshaped: jax2onnx miscounts a joined batch axis.
        windows = jnp.concatenate([stored[:, start : start + frames] for start in starts], axis=1)
        windows = windows.reshape(waveform.shape[0] * len(starts), frames, spec.bands)
        x = normalise(windows, saved["norm"])
        logits: Any = model.module.apply(saved["variables"], x, train=False)
        each = model.probabilities(logits)
        if len(starts) == 1:
            return each
        return each.reshape(waveform.shape[0], len(starts), each.shape[-1]).mean(axis=1)

    return scores


def _fit(clips: jax.Array, layout: ClipLayout) -> jax.Array:
    """Pads `[batch, up to frames, bands]` to `[batch, frames, bands]`; see `ClipLayout.fit`."""
    length = clips.shape[1]
    missing = layout.frames - length
    if not missing:
        return clips
    if layout.pad == "repeat":
        copies = -(-layout.frames // length)
        return jnp.concatenate([clips] * copies, axis=1)[:, : layout.frames]
    padded = jnp.pad(clips, ((0, 0), (0, missing), (0, 0)))
    if layout.pad == "zero":
        return padded
    real = np.arange(layout.frames)[None, :, None] < length
    return jnp.where(real, padded, clips.min(axis=(1, 2), keepdims=True))


def _notes(model: TrainedModel, samples: int, form: str, card: str) -> dict[str, Any]:
    def array(name: str, size: int) -> dict[str, Any]:
        return {"name": name, "dtype": "float32", "shape": ["batch", size]}

    spec, known = model.features, ("name", "protocol", "synthetic")
    return {
        "schema": _SCHEMA,
        "format": form,
        "model": str(model.config.model.name),
        "task": model.task,
        "labels": list(model.label_names),
        "sample_rate": spec.sample_rate,
        "samples": samples,
        "seconds": samples / spec.sample_rate,
        "input": array("samples", samples),
        "output": array("probabilities", len(model.label_names)),
        "features": spec.to_dict(),
        "dataset": {key: model.dataset[key] for key in known if key in model.dataset},
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
    function = export.export(jax.jit(waveform_function(model, samples)), platforms=PLATFORMS)
    return bytes(function(jax.ShapeDtypeStruct((batch, samples), jnp.float32)).serialize())


def _onnx_bytes(model: TrainedModel, samples: int, notes: dict[str, Any]) -> bytes:
    import onnx
    from jax2onnx import to_onnx

    # Matrix products, since onnxruntime refuses the Fourier transform that jax2onnx writes.
    function = waveform_function(model, samples, transform="matmul")

    def traced(waveform: jax.Array) -> jax.Array:
        with _mended():
            return function(waveform)

    try:
        with _quick_and_quiet():
            proto = to_onnx(
                traced,
                [jax.ShapeDtypeStruct(("batch", samples), jnp.float32)],
                model_name=notes["model"],
                opset=OPSET,
                input_names=["samples"],
                output_names=["probabilities"],
            )
    except Exception as error:
        reason = "".join(str(error).splitlines()[:1])[:200]
        raise UserError(
            f"the network {notes['model']!r} cannot be written as ONNX by jax2onnx "
            f"({type(error).__name__}: {reason}). Use StableHLO: --format=stablehlo."
        ) from error
    # Some intermediate shapes that jax2onnx notes are wrong; runtimes infer their own.
    del proto.graph.value_info[:]
    text = json.dumps(notes, ensure_ascii=False, allow_nan=False)
    onnx.helper.set_model_props(proto, {NOTES_KEY: text})
    return bytes(proto.SerializeToString())


@contextlib.contextmanager
def _quick_and_quiet() -> Iterator[None]:
    """Makes jax2onnx warn of nothing, and load only its plugins for JAX and Flax.

    All of its plugins take five seconds.
    """
    from jax.extend.core import ClosedJaxpr
    from jax2onnx.plugins import plugin_system

    core: Any = importlib.import_module("jax._src.core")
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    complete = plugin_system._already_imported_plugins
    if not complete:
        folder = Path(plugin_system.__file__).parent
        for library in ("jax", "flax"):
            plugin_system._import_tree(folder / library, f"{plugin_system.__package__}.{library}")
    plugin_system._already_imported_plugins = True
    # jax2onnx 0.17 looks for this class where JAX 0.12 no longer has it.
    added = not hasattr(core, "ClosedJaxpr")
    if added:
        core.ClosedJaxpr = ClosedJaxpr
    try:
        yield
    finally:
        if added:
            del core.ClosedJaxpr
        plugin_system._already_imported_plugins = complete
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _mended() -> Iterator[None]:
    """Works around two errors of jax2onnx 0.17 while a function is traced.

    It ignores numeric padding of `nn.max_pool`, so the input is padded first. It fails on an
    `nn.BatchNorm` over another axis than the last, for which Flax's own code is traced.
    """
    pool, norm = nn.max_pool, nn.BatchNorm.__call__

    def max_pool(x: Any, window_shape: Any, strides: Any = None, padding: Any = "VALID") -> Any:
        if not isinstance(padding, str):
            x = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-jnp.inf)
            padding = "VALID"
        return pool(x, window_shape=window_shape, strides=strides, padding=padding)

    def batch_norm(self: Any, x: Any, *arguments: Any, **named: Any) -> Any:
        last = self.axis in (-1, x.ndim - 1)
        return (norm if last else _FLAX_BATCH_NORM)(self, x, *arguments, **named)

    nn.max_pool, nn.BatchNorm.__call__ = max_pool, batch_norm  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.max_pool, nn.BatchNorm.__call__ = pool, norm  # type: ignore[method-assign]


def _run_stablehlo(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    from jax import export

    return jax.jit(export.deserialize(bytearray(path.read_bytes())).call)


def _run_onnx(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda x: np.asarray(session.run(["probabilities"], {"samples": x})[0])


def _difference(
    model: TrainedModel, samples: int, program: Callable[[np.ndarray], np.ndarray]
) -> float:
    """Returns the largest difference in a probability over batches of two clips and of one."""
    signals = check_signals(samples, model.features.sample_rate)
    expected = reference(model, signals)
    found = np.concatenate([program(signals[:2]), program(signals[2:])])
    return float(np.abs(found - expected).max()) if found.shape == expected.shape else np.inf


def reference(model: TrainedModel, signals: np.ndarray) -> np.ndarray:
    """Returns `Tagger`'s probabilities for signals `[n, samples]`, float32 `[n, classes]`."""
    network = Network(model)
    scores = []
    for signal in signals:
        inputs = file_inputs(signal, model)
        batches = (inputs[start : start + BATCH] for start in range(0, len(inputs), BATCH))
        each = np.concatenate([network(batch)[0] for batch in batches])
        scores.append(each.mean(axis=0, dtype=np.float64))
    return np.stack(scores).astype(np.float32)


def check_signals(samples: int, sample_rate: int) -> np.ndarray:
    """Returns noise bursts, a falling tone, and a chord in faint noise, float32 `[3, samples]`."""
    noise = np.random.default_rng(0).standard_normal(samples)
    time = np.arange(samples) / sample_rate
    bursts = 0.2 * noise * np.exp(-8 * (time % 0.5))
    falling = 0.5 * np.sin(2 * np.pi * (880 * time - 10 * time**2)) * (time < 0.8 * time[-1])
    tones = sum(0.1 * np.sin(2 * np.pi * hertz * time) for hertz in (220.0, 277.2, 329.6, 1318.5))
    return np.stack([bursts, falling, tones + 1e-4 * noise]).astype(np.float32)
