import importlib.util
import json

import numpy as np
import pytest
from tiny_model import tiny_model

from musicgenre.cli.main import main
from musicgenre.exchange import export
from musicgenre.runs.bundle import save_bundle

needs_stablehlo = pytest.mark.skipif(
    importlib.util.find_spec("flatbuffers") is None,
    reason="needs pip install 'musicgenre[export]' (flatbuffers)",
)


@pytest.fixture
def bundle(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_bundle(tiny_model("multi_label"), path)
    return path


@needs_stablehlo
def test_a_model_is_exported_and_the_check_is_printed(bundle, tmp_path, capsys):
    out = tmp_path / "exports" / "tiny.bin"
    words = ["export", str(bundle), "--out", str(out), "--format=stablehlo", "--seconds=0.5"]
    assert main(words) == 0
    said, errors = capsys.readouterr()
    lines = said.splitlines()
    assert (
        lines[0] == f"{out}: 0.2 MB; samples [batch, 11025] (0.50 s, mono, 22050 Hz) "
        "-> probabilities [batch, 3]"
    )
    notes = json.loads((tmp_path / "exports" / "tiny.bin.json").read_text())
    assert lines[1].startswith(f"checked: at most {notes['largest_difference']:.1e} from the model")
    assert notes["format"] == "stablehlo"
    assert notes["card"].startswith("# conv1d on example")
    assert not errors
    assert len(lines) == 3
    assert sorted(path.name for path in out.parent.iterdir()) == ["tiny.bin", "tiny.bin.json"]


@needs_stablehlo
def test_a_program_that_differs_leaves_no_file(bundle, tmp_path, capsys, monkeypatch):
    def different(model, signals):
        return np.full((len(signals), 3), 2, np.float32)

    monkeypatch.setattr(export, "reference", different)
    out = tmp_path / "new" / "tiny.stablehlo"
    assert main(["export", str(bundle), "--out", str(out), "--seconds=0.5"]) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("arguments", "missing", "message"),
    [
        (
            ["{bundle}", "--out={out}.onnx"],
            ["jax2onnx"],
            "'jax2onnx' is missing: pip install 'musicgenre[export]'",
        ),
        (
            ["{bundle}", "--out={out}.onnx"],
            ["onnxruntime"],
            "'onnxruntime' is missing: pip install 'musicgenre[export]'",
        ),
        (
            ["{bundle}", "--out={out}.stablehlo"],
            ["flatbuffers"],
            "'flatbuffers' is missing: pip install 'musicgenre[export]'",
        ),
        (
            ["{bundle}", "--out={out}.tflite"],
            [],
            "a.tflite: no known format; name it *.onnx or *.stablehlo",
        ),
        (
            ["{bundle}", "--out={out}"],
            [],
            "no known format; name it *.onnx or *.stablehlo, or set --format.",
        ),
        (
            ["gtzn", "--out={out}.onnx"],
            [],
            "gtzn: no such workdir, bundle or packaged model. Did you mean 'gtzan'?",
        ),
        (
            ["{bundle}", "--out={out}.onnx", "--seconds=3"],
            [],
            "at most the model's clip of 1.49 s, not 3 s",
        ),
        (["{bundle}", "--out={out}.onnx", "--checkpoint=7"], [], "a bundle holds one checkpoint"),
    ],
)
def test_what_cannot_be_exported(
    bundle, tmp_path, capsys, monkeypatch, arguments, missing, message
):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else "there"
    )
    out = tmp_path / "a"
    assert main(["export", *(word.format(bundle=bundle, out=out) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [bundle]
