import csv
import re
from urllib.parse import unquote

import jax
import numpy as np
import pytest
import soundfile
from ml_collections import ConfigDict
from tiny_model import tiny_model

from musicgenre.cli import main as cli
from musicgenre.inference.tagger import Tagger
from musicgenre.runs.bundle import save_bundle


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """Each network runs a few times only, so optimising its program would take longer."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def music(tmp_path):
    """Two good files, one with a tone from 2 to 3 s, and a bad one."""
    (tmp_path / "music").mkdir()
    generator = np.random.default_rng(0)
    for name, seconds in (("a b#1%.wav", 2), ("c.flac", 4)):
        samples = 0.05 * generator.standard_normal(22050 * seconds)
        if name == "c.flac":
            samples[44100:66150] += 0.3 * np.sin(2 * np.pi * 1500 * np.arange(22050) / 22050)
        soundfile.write(tmp_path / "music" / name, samples, 22050)
    (tmp_path / "music" / "bad.wav").write_bytes(b"RIFF")
    return tmp_path / "music"


def run(*arguments):
    return cli.main(["explain", *map(str, arguments)])


def addresses(page):
    """The files that a page shows, plays or leads to."""
    text = page.read_text()
    assert "http" not in text
    return [
        page.parent / unquote(address) for address in re.findall(r'(?:src|href)="([^"]+)"', text)
    ]


def test_a_folder_is_explained_and_its_bad_file_reported(bundle, music, tmp_path, capsys):
    out = tmp_path / "out"
    (music / "a b#1%.wav").rename(music / "other.wav.txt")
    assert run(music, f"--model={bundle}", f"--out={out}", "--cut", "--top=2", "--seconds=1") == 3
    captured = capsys.readouterr()
    assert "bad.wav: not a sound file" in captured.err and "1 file done, 1 failed" in captured.err
    tagger = Tagger.load(bundle)
    label = tagger.tag(music / "c.flac", top=1)[0].label
    assert f"{music}/c.flac: {label} " in captured.out
    assert f"1 file explained -> {out}/index.html" in captured.out
    for page in (out / "index.html", out / "c" / "index.html"):
        assert addresses(page) and all(path.is_file() for path in addresses(page)), page
    suffixes = {path.suffix for path in addresses(out / "c" / "index.html")}
    assert suffixes == {".html", ".png", ".wav"}
    assert f"Evidence for {label}" in (out / "c" / "index.html").read_text().replace("&#x2F;", "/")

    with np.load(out / "c" / "activations.npz", allow_pickle=False) as found:
        assert found["conv1"].shape == (32, 8)
        assert found["embedding"].shape == (16,)
        assert found["output"].shape == (3,)
        shown = found["output"]
    with np.load(out / "c" / "saliency.npz", allow_pickle=False) as found:
        for name in ("gradient_times_input", "integrated_gradients"):
            assert found[name].shape == (64, 16)
        assert found["grad_cam"].shape == (8,) and str(found["target"]) == label
        start, end = float(found["start"]), float(found["end"])
    # It is the window in which the label is most probable.
    windows = tagger.taggram(music / "c.flac")
    best = windows.probabilities[:, tagger.labels.index(label)].argmax()
    assert (start, end) == pytest.approx((windows.starts[best], windows.ends[best]))
    softmax = np.exp(shown) / np.exp(shown).sum()
    np.testing.assert_allclose(softmax, windows.probabilities[best], rtol=1e-3)
    original, rate = soundfile.read(out / "c" / "original.wav")
    full, _ = soundfile.read(music / "c.flac")
    first = round(start * rate)
    np.testing.assert_allclose(original, full[first : first + len(original)], atol=1e-4)
    assert len(original) == pytest.approx((end - start) * rate, abs=2)

    with open(out / "moments.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    units = {(row["layer"], row["unit"]) for row in rows}
    assert {("output", "0"), ("output", "1"), ("output", "2")} < units
    assert any(layer == "embedding" for layer, _ in units)
    assert len(rows) == 2 * len(units) and len(list((out / "moments").glob("*.wav"))) == len(rows)
    strongest = float(windows.probabilities[:, 1].max())
    row = next(row for row in rows if row["layer"] == "output" and row["unit"] == "1")
    assert row["label"] == "middle"
    assert row["rank"] == "1"
    assert float(row["activation"]) == pytest.approx(strongest, rel=1e-4)
    for row in rows:
        start, time, end = (float(row[name]) for name in ("window_start", "time", "window_end"))
        assert start - 0.1 <= time <= end + 0.1


def test_one_unit_of_a_layer(bundle, music, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--label=low", "--at=1.0", "--layer=conv1", "--unit=3", "--parts=saliency,moments"]
    options += ["--top=1", f"--model={bundle}", f"--out={out}", "--clips", music / "c.flac"]
    assert run(music / "a b#1%.wav", *options) == 0
    pages = [out / "index.html", out / "a b_1_" / "index.html"]
    assert pages[1] in addresses(pages[0])
    assert all(path.is_file() for page in pages for path in addresses(page))
    text = pages[1].read_text()
    assert "Evidence for low" in text
    assert "Evidence for conv1 unit 3" in text
    assert "audio" not in text
    with np.load(out / "a b_1_" / "saliency-conv1_unit_3.npz") as found:
        # A unit of the first layer depends on as many frames as its kernel is long.
        assert "grad_cam" not in found
        assert 1 <= np.count_nonzero(np.abs(found["gradient_times_input"]).sum(axis=1)) <= 4
    with open(out / "moments.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["layer"], row["unit"], row["file"]) == ("conv1", "3", str(music / "c.flac"))
    line = f"conv1 unit 3  {float(row['activation']):.4g}  {music}/c.flac  "
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "parts", "bands"),
    [
        ("mfcc", "saliency,sound", 8),
        ("stft", "filters,saliency", 257),
        ("waveform", "filters,saliency,sound", 256),
    ],
)
def test_other_front_ends(kind, parts, bands, music, tmp_path):
    changes = {"features__kind": kind, "features__n_fft": 512, "features__hop_length": 256}
    if kind == "waveform":
        fields = {"name": "sample_level", "module": "", "first_filters": 4}
        fields |= {"filters": (4, 4, 4), "last_filters": 8}
        changes |= {"model": ConfigDict(fields), "data__normalise": "global"}
    if kind == "mfcc":
        changes |= {"features__n_mfcc": 8}
    path = tmp_path / "model.safetensors"
    save_bundle(tiny_model(**changes), path)
    out = tmp_path / "out"
    assert run(music / "c.flac", f"--model={path}", f"--out={out}", f"--parts={parts}") == 0
    for page in (out / "index.html", out / "c" / "index.html"):
        assert all(address.is_file() for address in addresses(page))
    inverted = list((out / "c").glob("inverted-*.wav"))
    assert len(inverted) == (2 if kind == "mfcc" else 0)
    assert len(list((out / "c").glob("masked-*.wav"))) == (2 if "sound" in parts else 0)
    assert (out / "filters-conv1.png").is_file() == ("filters" in parts)
    with np.load(out / "c" / "saliency.npz") as found:
        assert found["integrated_gradients"].shape == (64, bands)


def test_the_layers_are_listed_without_a_file(bundle, capsys):
    assert run("--list-layers", f"--model={bundle}") == 0
    lines = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["layer", "type", "values", "units"]
    assert ["conv2", "Conv", "8 x 16", "16"] in lines
    assert ["output", "Output", "3", "3"] in lines
    assert lines[-1][0].startswith("Grad-CAM uses 'conv2'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label=midle"], "--label=midle: no label of this model. Did you mean 'middle'?"),
        (
            ["--layer=conv3"],
            "layer 'conv3': the model has no layer of that name. Did you mean 'conv",
        ),
        (["--layer=conv2", "--unit=16"], "unit 16: the layer 'conv2' has 16 units, 0 to 15."),
        (
            ["--layer=dense1"],
            "--layer: layer 'dense1': it has no positions for Grad-CAM to map. Layers with posi",
        ),
        (["--unit=1"], "--unit requires --layer"),
        (["--at=-1"], "--at must not be negative, but is -1."),
        (["--at=nan"], "--at must not be negative"),
        (["--at=99"], "99 s is beyond its end; it is 4.0 s long"),
        (["--parts=filters,sounds"], "--parts: 'sounds' is not known. Did you mean 'sound'?"),
        (["--top=0"], "--top=0: 0 is not a positive integer"),
        (["--seconds=0"], "--seconds must be positive"),
        (["--out=FILE"], "this is a file; name a folder"),
        (["--out=FILE/x"], "cannot be written"),
        (["--clips", "BAD"], "bad.wav: not a sound file"),
        (["--model=nothing"], "no such workdir, bundle or packaged model"),
    ],
)
def test_mistakes_are_named(options, message, bundle, music, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    bad = str(music / "bad.wav")
    options = [option.replace("FILE", str(file)).replace("BAD", bad) for option in options]
    # --clips is read after a file is explained; the slow parts of that are left out.
    parts = "--parts=moments" if "--clips" in options else "--parts=filters"
    words = [f"--model={bundle}", f"--out={tmp_path / 'out'}", parts, *options]
    assert run(music / "c.flac", *words) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("name", ["missing.wav", "empty.wav", "silent.wav", "short.wav", "bad.wav"])
def test_files_that_cannot_be_used(name, bundle, music, tmp_path, capsys):
    (music / "empty.wav").write_bytes(b"")
    soundfile.write(music / "silent.wav", np.zeros(44100), 22050)
    soundfile.write(music / "short.wav", np.ones(2205), 22050)
    assert run(music / name, f"--model={bundle}", f"--out={tmp_path / 'out'}") == 2
    assert f"error: {music / name}: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_to_explain(bundle, capsys):
    assert run(f"--model={bundle}") == 2
    error = capsys.readouterr().err
    assert "no files: name sound files or folders, or give --list_layers." in error
