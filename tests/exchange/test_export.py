"""The exported programs, run in separate processes without this package."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from tiny_model import tiny_model

from musicgenre import Tagger
from musicgenre.errors import UserError
from musicgenre.exchange import export
from musicgenre.models.crnn import GRU
from musicgenre.runs.model import load_model

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax2onnx", "onnx", "onnxruntime")),
    reason="needs pip install 'musicgenre[export]' (jax2onnx, onnxruntime)",
)
needs_stablehlo = pytest.mark.skipif(
    importlib.util.find_spec("flatbuffers") is None,
    reason="needs pip install 'musicgenre[export]' (flatbuffers)",
)

# Run each program on all signals at once and on the first alone; print the imported packages.
_PRINT = """
packages = {"jax", "flax", "librosa", "musicgenre", "onnxruntime"}
print(sorted({module.partition(".")[0] for module in sys.modules} & packages))
"""
RUN_ONNX = (
    """
import sys, numpy as np, onnxruntime
for name in sys.argv[1:]:
    session = onnxruntime.InferenceSession(name + ".onnx", providers=["CPUExecutionProvider"])
    x = np.load(name + ".npy")
    [three] = session.run(None, {"samples": x})
    [one] = session.run(["probabilities"], {"samples": x[:1]})
    np.save(name + ".out.npy", np.concatenate([three, one]))
"""
    + _PRINT
)
RUN_STABLEHLO = (
    """
import sys, numpy as np, jax.export
for name in sys.argv[1:]:
    call = jax.export.deserialize(bytearray(open(name + ".stablehlo", "rb").read())).call
    x = np.load(name + ".npy")
    np.save(name + ".out.npy", np.concatenate([call(x), call(x[:1])]))
"""
    + _PRINT
)


def models():
    """The packaged model, and tiny ones with tags, crops, MFCCs and another compression."""
    return {
        "gtzan": load_model("gtzan"),
        "tags": tiny_model(
            "multi_label", data__crop_frames=60, data__frames=90, data__eval_chunks=3
        ),
        "mfcc": tiny_model(features__kind="mfcc", features__n_mfcc=13),
        "log10000": tiny_model(
            "multi_label",
            features__sample_rate=16000,
            features__n_fft=512,
            features__hop_length=256,
            features__compression="log10000",
        ),
    }


def check_in_another_process(folder, form, code, imported):
    """Exports every model, runs all programs in one fresh process, and compares with `Tagger`."""
    expected = {}
    for name, model in models().items():
        exported = export.export_model(model, folder / f"{name}.{form}")
        assert (
            exported.samples == model.layout.frames * model.features.hop_length
            and exported.difference < 1e-4
        )
        signals = export.check_signals(exported.samples, model.features.sample_rate)[::-1]
        np.save(folder / f"{name}.npy", signals)
        tagger, rows = Tagger(model), []
        for signal in signals:
            soundfile.write(
                folder / "clip.wav", signal, model.features.sample_rate, subtype="FLOAT"
            )
            tags = dict(tagger.tag(folder / "clip.wav"))
            rows.append([tags[label] for label in model.label_names])
        expected[name] = np.array(rows)
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, *expected], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(imported)
    for name, rows in expected.items():
        found = np.load(folder / f"{name}.out.npy")
        assert np.ptp(rows, axis=0).max() > 0.01, name  # the three signals differ
        np.testing.assert_allclose(
            found, np.concatenate([rows, rows[:1]]), rtol=0, atol=1e-4, err_msg=name
        )


@needs_onnx
def test_onnx_in_a_process_without_jax(tmp_path):
    check_in_another_process(tmp_path, "onnx", RUN_ONNX, ["onnxruntime"])


@needs_stablehlo
def test_stablehlo_in_a_process_with_jax_alone(tmp_path):
    check_in_another_process(tmp_path, "stablehlo", RUN_STABLEHLO, ["jax"])


def test_real_clips_get_the_probabilities_of_tagger(real_data, tmp_path):
    """Measured on 30.01 s: at most 5e-6 by either transform; 1.6e-4 without rounding to float16."""
    model = load_model("gtzan")
    samples = export.input_samples(model)
    assert samples == 387 * 1710
    clips = [
        soundfile.read(path, dtype="float32")[0][:samples]
        for path in sorted((real_data / "gtzan_audio").glob("*/*.au"))
    ]
    clips = np.stack([np.pad(clip, (0, samples - len(clip))) for clip in clips])
    expected = export.reference(model, clips)
    for transform in ("auto", "matmul"):
        run = jax.jit(export.waveform_function(model, samples, transform=transform))
        found = np.concatenate([run(clips[:4]), run(clips[4:])])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("seconds", "changes"),
    [
        (0.7, {"data__pad": "repeat"}),
        (0.7, {"data__pad": "silence"}),
        (0.7, {"data__pad": "zero"}),
        (1.48, {"data__pad": "zero"}),  # the frame at its end is the 64th
        (
            0.4,
            {"data__frames": 90, "data__crop_frames": 60, "data__eval_chunks": 2},
        ),  # 18 frames, fewer than a crop
        (1.8, {"data__frames": 90, "data__crop_frames": 60}),
        (0.0, {"features__kind": "stft", "features__n_fft": 126}),
        (0.04, {"features__kind": "waveform", "features__hop_length": 16}),
    ],
)
def test_shorter_clips_are_padded_as_tagger_pads_them(seconds, changes):
    model = tiny_model(**changes)
    samples = export.input_samples(model, seconds)
    signals = export.check_signals(samples, 22050)[:2]
    found = jax.jit(export.waveform_function(model, samples))(signals)
    np.testing.assert_allclose(found, export.reference(model, signals), rtol=0, atol=1e-4)


def test_the_program_applies_the_temperature():
    model = tiny_model()
    samples = export.input_samples(model)
    signals = export.check_signals(samples, 22050)
    before = export.reference(model, signals)
    found = jax.jit(export.waveform_function(dataclasses.replace(model, temperature=3.0), samples))(
        signals
    )
    roots = np.cbrt(before)
    np.testing.assert_allclose(found, roots / roots.sum(axis=1, keepdims=True), rtol=0, atol=1e-4)
    assert np.abs(found - before).max() > 0.01


def test_the_features_are_rounded_as_the_store_rounds_them():
    """A network that returns one of its cells shows a value that float16 has."""
    model = tiny_model("regression", ("cell",))

    class Cell:
        def apply(self, variables, x, train):
            return x[:, 3, :1]

    model = dataclasses.replace(
        model,
        module=Cell(),
        model={"variables": {}, "norm": {"mean": np.float32(0), "std": np.float32(1)}},
    )
    signals = export.check_signals(6000, 22050)
    found = np.asarray(jax.jit(export.waveform_function(model, 6000, transform="rfft32"))(signals))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, found.astype(np.float16))


class Difficult(nn.Module):
    """Layers of the CRNN and the ResNet that jax2onnx converts wrongly, and a loop over frames."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=True, axis=1, name="norm")(x)
        x = nn.max_pool(x[..., None], (4, 3), (4, 2), padding=((1, 2), (1, 1)))
        x = GRU(4, name="gru")(x.reshape(*x.shape[:2], -1))
        return nn.Dense(self.num_classes, name="head")(x[:, -1])


@needs_onnx
def test_layers_that_jax2onnx_converts_wrongly_are_corrected(tmp_path):
    import onnx

    model = tiny_model()
    variables = jax.jit(Difficult().init)(jax.random.key(0), np.zeros((1, 64, 16), np.float32))
    stats = {"mean": np.linspace(-1, 1, 64), "var": np.linspace(0.5, 2, 64)}
    variables = {
        **variables,
        "batch_stats": {"norm": {name: np.float32(value) for name, value in stats.items()}},
    }
    model = dataclasses.replace(
        model, module=Difficult(), model={"variables": variables, "norm": model.model["norm"]}
    )
    exported = export.export_model(model, tmp_path / "a.onnx")
    assert exported.difference < 1e-4
    # Flax is restored after the export.
    assert (
        export.nn.BatchNorm.__call__ is export._FLAX_BATCH_NORM
        and export.nn.max_pool.__module__.startswith("flax.")
    )
    proto = onnx.load(exported.path)
    [entry] = proto.metadata_props
    beside = json.loads(exported.notes.read_text(encoding="utf-8"))
    assert entry.key == "musicgenre" and json.loads(entry.value) == {
        key: value for key, value in beside.items() if key != "largest_difference"
    }
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 21)]


@needs_stablehlo
def test_a_network_that_computes_in_bfloat16_is_exported_in_float32(tmp_path):
    model, other = tiny_model(), tiny_model(dtype="bfloat16")
    assert other.module.dtype == jnp.bfloat16
    exported = export.export_model(other, tmp_path / "a.stablehlo", seconds=0.5)
    signals = export.check_signals(exported.samples, 22050)
    call = jax.export.deserialize(bytearray(exported.path.read_bytes())).call
    np.testing.assert_allclose(call(signals), export.reference(model, signals), rtol=0, atol=1e-4)


@needs_stablehlo
def test_the_notes_of_a_program(tmp_path):
    model = tiny_model("multi_label", ("low", "naïve", "high/est"))
    exported = export.export_model(model, tmp_path / "new" / "a.stablehlo")
    assert sorted(path.name for path in exported.path.parent.iterdir()) == [
        "a.stablehlo",
        "a.stablehlo.json",
    ]
    assert exported.notes == tmp_path / "new" / "a.stablehlo.json"
    notes = json.loads(exported.notes.read_text(encoding="utf-8"))
    assert notes["labels"] == ["low", "naïve", "high/est"] and notes["task"] == "multi_label"
    assert (notes["sample_rate"], notes["samples"], notes["seconds"]) == (
        22050,
        32768,
        pytest.approx(1.48607, abs=1e-5),
    )
    assert notes["output"]["shape"] == ["batch", 3] and notes["features"]["n_mels"] == 16
    assert notes["largest_difference"] == exported.difference
    assert notes["dataset"] == {"name": "example", "protocol": "random", "synthetic": False}
    assert "/somewhere/private" not in exported.notes.read_text(encoding="utf-8")
    assert jax.export.deserialize(bytearray(exported.path.read_bytes())).platforms == (
        "cpu",
        "cuda",
        "tpu",
    )


@needs_stablehlo
def test_a_program_that_differs_from_the_model_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "a.stablehlo"
    path.write_text("the old file")
    right = export.reference
    monkeypatch.setattr(export, "reference", lambda model, signals: right(model, signals) + 2e-4)
    with pytest.raises(
        UserError,
        match=r"a.stablehlo: the exported program differs from the model by 2.0e-04 .* nothing was",
    ):
        export.export_model(tiny_model(), path, seconds=0.5)
    assert path.read_text() == "the old file" and list(tmp_path.iterdir()) == [path]


@needs_onnx
def test_a_network_that_onnx_cannot_express_is_refused(tmp_path):
    class Sorting:
        def apply(self, variables, x, train):
            return jax.pure_callback(
                lambda a: np.asarray(a),
                jax.ShapeDtypeStruct(x[:, 0, :3].shape, x.dtype),
                x[:, 0, :3],
            )

    model = dataclasses.replace(tiny_model(), module=Sorting())
    with pytest.raises(
        UserError, match=r"the network 'conv1d' cannot be written as ONNX .* Use StableHLO"
    ):
        export.export_model(model, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_bad_formats_lengths_and_missing_packages_are_refused(tmp_path, monkeypatch):
    model = tiny_model()
    with pytest.raises(UserError, match=r"a.onxx: no known format; .* Did you mean 'onnx'"):
        export.export_model(model, tmp_path / "a.onxx")
    for seconds in (1.6, -1.0):
        with pytest.raises(
            UserError, match=f"above 0 and at most the model's clip of 1.49 s, not {seconds:g} s"
        ):
            export.input_samples(model, seconds)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError,
        match=r"onnx: the package 'jax2onnx' is missing: pip install 'musicgenre\[export\]'",
    ):
        export.export_model(model, tmp_path / "a.onnx")
    with pytest.raises(UserError, match="'flatbuffers' is missing"):
        export.export_model(model, tmp_path / "a.stablehlo")
    assert not list(tmp_path.iterdir())
