import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import mutagen
import numpy as np
import pytest
import soundfile
from mutagen.easyid3 import EasyID3
from PIL import Image
from tiny_model import tiny_model

from musicgenre.audio import file_tags
from musicgenre.cli import main as cli
from musicgenre.inference.windows import score_files
from musicgenre.runs.bundle import save_bundle
from musicgenre.runs.model import load_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def music(tmp_path):
    """A folder with four good files, two of them in a folder of their own."""
    (tmp_path / "music" / "album").mkdir(parents=True)
    for seed, name in enumerate(("a.wav", "album/b.flac", "album/c, d.ogg", "e.mp3")):
        samples = 0.1 * np.random.default_rng(seed).standard_normal(22050 * 2 + 5000 * seed)
        samples = np.cumsum(samples) * 0.02 if seed % 2 else samples
        soundfile.write(tmp_path / "music" / name, samples, 22050)
    return tmp_path / "music"


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def expected(bundle, path):
    model = load_model(bundle)
    probabilities = next(score_files(model, [path])).probabilities
    return model.label_names[int(probabilities.argmax())], probabilities


def test_files_folders_and_patterns_are_found_once(bundle, music, capsys):
    words = [music / "album", music / "*.wav", music / "album" / "b.flac", f"--model={bundle}"]
    assert run("tag", *words, "--top=1") == 0
    lines = capsys.readouterr().out.splitlines()
    names = ("album/b.flac", "album/c, d.ogg", "a.wav")
    assert [line.split("  ")[0] for line in lines] == [str(music / name) for name in names]
    label, probabilities = expected(bundle, music / "album" / "b.flac")
    assert lines[0] == f"{music}/album/b.flac  {label} {100 * probabilities.max():.1f} %"


def test_json_lines_and_csv(bundle, music, capsys):
    bad = music / "bad.wav"
    bad.write_bytes(b"RIFF")
    files = [music / "a.wav", bad, music / "album" / "c, d.ogg"]
    assert run("tag", *files, f"--model={bundle}", "--format=jsonl", "--top=2") == 3
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [row["path"] for row in rows] == list(map(str, files))
    assert "not a sound file" in rows[1]["error"]
    label, probabilities = expected(bundle, files[0])
    probability = pytest.approx(probabilities.max(), abs=1e-6)
    assert rows[0]["labels"][0] == {"label": label, "probability": probability}
    assert len(rows[2]["labels"]) == 2
    assert "error: " in captured.err
    assert "bad.wav" in captured.err
    assert "2 files done, 1 failed" in captured.err
    out = music / "table.csv"
    assert run("tag", *files, f"--model={bundle}", "--format=csv", f"--out={out}") == 3
    table = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [row["label"] for row in table] == [label, "", expected(bundle, files[2])[0]]
    assert float(table[0]["middle"]) == pytest.approx(probabilities[1], abs=1e-6)
    assert "not a sound file" in table[1]["error"]


def test_a_playlist_for_each_label(bundle, music, tmp_path, capsys):
    out = tmp_path / "lists"
    assert run("tag", music, f"--model={bundle}", "--format=m3u", f"--out={out}") == 0
    listed = {}
    for playlist in out.iterdir():
        lines = playlist.read_text().splitlines()
        assert lines[0] == "#EXTM3U"
        label = lines[1].removeprefix("#PLAYLIST:")
        assert playlist.name == f"{label.replace('/', '_')}.m3u8"
        paths = lines[3::2]
        column = load_model(bundle).label_names.index(label)
        order = [expected(bundle, path)[1][column] for path in paths]
        assert order == sorted(order, reverse=True)
        listed |= dict.fromkeys(paths, label)
    files = [path for path in music.rglob("*") if path.is_file()]
    assert listed == {str(path): expected(bundle, path)[0] for path in files}
    words = [f"--model={bundle}", "--format=m3u", "--min_probability=1.1"]
    assert run("tag", music, *words, f"--out={tmp_path / 'none'}") == 0
    assert not (tmp_path / "none").exists()


def test_a_list_on_standard_input_with_a_name_that_is_no_text(bundle, music, monkeypatch):
    odd = os.fsencode(music) + b"/caf\xe9.wav"
    os.rename(music / "a.wav", odd)
    names = odd + b"\n" + os.fsencode(music / "e.mp3") + b"\n"
    command = [sys.executable, "-m", "musicgenre", "tag", "-", f"--model={bundle}"]
    done = subprocess.run(
        [*command, "--format=csv"], input=names, capture_output=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith(odd + b",")
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(odd + b"\0")))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, "utf-8"))
    assert run("tag", "-", f"--model={bundle}", "--format=jsonl") == 0
    assert os.fsencode(json.loads(output.getvalue())["path"]) == odd
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert run("tag", "-", f"--model={bundle}") == 2


def test_names_that_are_no_text_in_every_command(bundle, music, tmp_path, monkeypatch):
    # As a process has them; pytest's own cannot hold such names.
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    monkeypatch.setattr(
        sys, "stderr", io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    )
    odd = os.fsdecode(os.fsencode(music) + b"/caf\xe9.flac")
    os.rename(music / "album" / "b.flac", odd)
    assert run("embed", odd, f"--model={bundle}", f"--out={tmp_path / 'e.npz'}") == 0
    with np.load(tmp_path / "e.npz") as arrays:
        assert arrays["path"].tolist() == [odd]
    assert run("taggram", odd, f"--model={bundle}", f"--out={tmp_path}") == 0
    assert len(list(tmp_path.glob("caf*.taggram.*"))) == 3
    assert run("tag", odd, f"--model={bundle}", "--write_tags") == 0
    assert mutagen.File(odd)["GENRE"] == [expected(bundle, odd)[0]]
    assert run("tag", odd, f"--model={bundle}", "--format=m3u", f"--out={tmp_path / 'lists'}") == 0
    assert os.fsencode(odd) in next((tmp_path / "lists").iterdir()).read_bytes()
    os.truncate(os.fsencode(odd), 0)
    assert run("tag", odd, f"--model={bundle}") == 2
    sys.stderr.flush()
    assert b"caf\\udce9.flac: empty file" in sys.stderr.buffer.getvalue()
    assert os.fsencode(odd) + b": " in sys.stdout.buffer.getvalue()


@pytest.mark.parametrize("extension", ["mp3", "flac", "ogg", "wav", "aiff"])
def test_genres_are_written_and_the_sound_stays(bundle, tmp_path, capsys, extension):
    path = tmp_path / f"song.{extension}"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(40_000), 22050)
    if extension == "mp3":
        tags = EasyID3()
        tags["title"], tags["genre"] = "A song", ["Polka", "Waltz"]
        tags.save(path)
    path.chmod(0o640)
    label, _ = expected(bundle, path)
    before, sound = path.read_bytes(), soundfile.read(path)[0]
    assert run("tag", path, f"--model={bundle}", "--write-tags", "--dry-run") == 0
    old = "Polka, Waltz" if extension == "mp3" else "(none)"
    assert f"song.{extension}: genre would be changed: {old} -> {label}" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert run("tag", path, f"--model={bundle}", "--write_tags") == 0
    assert file_tags.read_genre(path) == [label]
    np.testing.assert_array_equal(soundfile.read(path)[0], sound)
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if extension == "mp3":
        assert EasyID3(path)["title"] == ["A song"] and EasyID3(path)["genre"] == [label]
    content = path.read_bytes()
    assert run("tag", path, f"--model={bundle}", "--write_tags", "--top=2", "--keep_genre") == 0
    assert path.read_bytes() == content
    assert run("tag", path, f"--model={bundle}", "--write_tags", "--top=2") == 0
    assert len(file_tags.read_genre(path)) == 2 and file_tags.read_genre(path)[0] == label


def test_a_failure_keeps_the_original(bundle, music, monkeypatch, capsys):
    files = [music / "e.mp3", music / "album" / "b.flac"]
    before = [path.read_bytes() for path in files]

    def cut(self, *arguments, **keywords):
        with open(self.filename, "r+b") as file:
            file.truncate(100)
        raise mutagen.MutagenError("no space left")

    for kind in (type(mutagen.File(path)) for path in files):
        monkeypatch.setattr(kind, "save", cut)
    assert run("tag", *files, f"--model={bundle}", "--write_tags") == 2
    assert capsys.readouterr().err.count("no space left); the file is unchanged") == 2
    assert [path.read_bytes() for path in files] == before
    assert not [path for path in music.rglob("*") if path.name.endswith(".tmp")]
    # Tags that do not come back as they were written are a failure, too.
    monkeypatch.setattr(type(mutagen.File(files[1])), "save", lambda self: None)
    assert run("tag", files[1], f"--model={bundle}", "--write_tags") == 2
    assert "do not keep the genre" in capsys.readouterr().err and files[1].read_bytes() == before[1]


def test_a_link_stays_a_link_and_au_has_no_tags(bundle, music, tmp_path, capsys):
    link = tmp_path / "link.flac"
    link.symlink_to(music / "album" / "b.flac")
    assert run("tag", link, f"--model={bundle}", "--write_tags") == 0
    assert link.is_symlink() and file_tags.read_genre(music / "album" / "b.flac")
    soundfile.write(music / "f.au", 0.1 * np.random.default_rng(0).standard_normal(40_000), 22050)
    assert run("tag", music / "f.au", music / "e.mp3", f"--model={bundle}", "--write_tags") == 3
    assert "f.au: a file of this format has no genre tag" in capsys.readouterr().err


def test_taggram_as_arrays_table_and_picture(bundle, music, tmp_path, capsys):
    out = tmp_path / "out"
    words = [music / "e.mp3", music / "album", f"--model={bundle}", f"--out={out}"]
    assert run("taggram", *words, "--step=0.5") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    with np.load(out / "e.taggram.npz") as arrays:
        assert arrays["label"].tolist() == ["low", "middle", "high/est"]
        assert arrays["probability"].shape == (len(arrays["start"]), 3)
        np.testing.assert_allclose(np.diff(arrays["start"])[:-1], 22 * 512 / 22050)
        rows = list(csv.reader((out / "e.taggram.csv").open()))
        assert rows[0] == ["start", "end", "low", "middle", "high/est"]
        assert len(rows) == 1 + len(arrays["start"])
        numbers = np.array(rows[1:], float)
        np.testing.assert_allclose(numbers[:, 2:], arrays["probability"], atol=1e-6)
        np.testing.assert_allclose(numbers[:, 1], arrays["end"], atol=1e-3)
    with Image.open(out / "e.taggram.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_embeddings_of_files_and_windows(bundle, music, tmp_path):
    bad = music / "bad.wav"
    bad.write_bytes(b"RIFF")
    assert run("embed", music, f"--model={bundle}", f"--out={tmp_path / 'e.npz'}", "--windows") == 3
    with np.load(tmp_path / "e.npz") as arrays:
        names = [Path(path).name for path in arrays["path"]]
        assert names == ["a.wav", "b.flac", "c, d.ogg", "e.mp3"]
        assert arrays["embedding"].shape == (4, 16)
        for row in range(4):
            own = arrays["window_file"] == row
            # The last window overlaps the one before; each counts by the seconds that it adds.
            weights = np.diff(arrays["window_end"][own], prepend=0)
            mean = np.average(arrays["window_embedding"][own], axis=0, weights=weights)
            np.testing.assert_allclose(mean, arrays["embedding"][row], rtol=0.01, atol=0.01)
        assert np.all(arrays["window_end"] > arrays["window_start"])


def test_bundle_with_a_card(bundle, tmp_path, capsys):
    (tmp_path / "remarks.md").write_text("Licence: yours.")
    out = tmp_path / "again.safetensors"
    assert run("bundle", bundle, out, "--half", f"--remarks={tmp_path / 'remarks.md'}") == 0
    assert "# conv1d on example" in capsys.readouterr().out
    assert load_model(out).card.endswith("Licence: yours.\n")
    assert out.stat().st_size < 0.9 * bundle.stat().st_size
    assert run("bundle", bundle, tmp_path / "x.bin") == 2
    assert run("bundle", bundle, out, "--remarks=/nowhere.md") == 2
    assert "nowhere.md: not a readable text file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["tag", "taggram", "embed"])
def test_bad_input_of_every_command(bundle, tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "silent").mkdir()
    (tmp_path / "empty.mp3").write_bytes(b"")
    (tmp_path / "corrupt.flac").write_bytes(b"fLaC" + bytes(500))
    out = [f"--out={tmp_path / 'out.npz'}"] if command == "embed" else []
    for argument, message in (
        ("gone.wav", "gone.wav: no such file"),
        ("silent", "silent: no sound files in this folder"),
        ("nothing*.mp3", "no file matches this pattern"),
        ("empty.mp3", "empty file"),
        ("corrupt.flac", "not a sound file"),
    ):
        assert run(command, argument, f"--model={bundle}", *out) == 2, argument
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error and "0 files done, 1 failed" in error
    (tmp_path / "some.wav").touch()
    assert run(command, "some.wav", "--model=nowhere", *out) == 2
    assert "nowhere: no such workdir, bundle or packaged model" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.npz")) and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tag", "x.wav", "--dry_run"], "go with --write_tags"),
        (["tag", "x.wav", "--format=m3u"], "needs --out"),
        (["taggram", "x.wav", "--formats=gif"], "'gif' is not known"),
        (["embed", "x.wav", "--out=x.npy"], "must end in .npz"),
    ],
)
def test_wrong_options_are_one_line(capsys, arguments, message):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_labels_are_needed_for_tags(tmp_path, music, capsys):
    save_bundle(tiny_model("regression", ("x", "y")), tmp_path / "numbers.safetensors")
    assert run("tag", music, f"--model={tmp_path / 'numbers.safetensors'}", "--write_tags") == 2
    assert "its outputs are numbers" in capsys.readouterr().err
    assert run("tag", music / "a.wav", f"--model={tmp_path / 'numbers.safetensors'}") == 0
    assert "  x " in capsys.readouterr().out
