import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from musicgenre.cli import main as cli
from musicgenre.inference.index import EmbeddingIndex
from musicgenre.inference.tagger import Tagger

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(bundle, tmp_path_factory):
    """A folder with five good files, and an index of it that the command made."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "music" / "album").mkdir(parents=True)
    for seed, name in enumerate(("a.wav", "album/b.flac", "album/c, d.ogg", "e.mp3", "f.wav")):
        samples = 0.1 * np.random.default_rng(seed).standard_normal(36_000)
        samples = np.cumsum(samples) * 0.02 if seed % 2 else samples
        soundfile.write(folder / "music" / name, samples, 22050)
    words = [f"--index={folder / 'music.index'}", f"--add={folder / 'music'}"]
    assert run(*words, f"--model={bundle}") == 0
    return folder


@pytest.fixture
def current(made, tmp_path, monkeypatch):
    """The current folder, with a copy of the files and of the index, which has their old paths."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "music", tmp_path / "music")
    shutil.copy(made / "music.index", tmp_path)
    return tmp_path


def run(*arguments):
    return cli.main(["similar", *map(str, arguments)])


def expected(made, bundle, query, k):
    """Cosines worked out with the tagger alone, the query itself left out."""
    tagger = Tagger.load(bundle)
    files = [path for path in (made / "music").rglob("*") if path.is_file() and path != query]
    vectors = np.stack([tagger.embed(path) for path in [*files, query]]).astype(float)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = sorted(zip(vectors[:-1] @ vectors[-1], map(str, files), strict=True), reverse=True)
    return [(path, similarity) for similarity, path in pairs[:k]]


def test_table_json_lines_and_csv_of_several_queries(made, current, bundle, capsys):
    inside, outside, bad = (
        made / "music" / "a.wav",
        current / "music" / "e.mp3",
        current / "bad.wav",
    )
    bad.write_bytes(b"RIFF")
    settings = ["--index=music.index", f"--model={bundle}"]
    near = expected(made, bundle, inside, 3)
    assert run(inside, *settings, "--k=3") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [f"{rank:4}  {value:6.3f}  {path}" for rank, (path, value) in enumerate(near, 1)]
    assert lines == [str(inside), *rows]

    assert run(outside, bad, inside, *settings, "--k=3", "--format=jsonl") == 3
    captured = capsys.readouterr()
    first, second, third = map(json.loads, captured.out.splitlines())
    # A copy of a file that the index knows: its twin comes first.
    assert first["path"] == str(outside)
    assert first["neighbours"][0] == {"path": f"{made}/music/e.mp3", "similarity": 1.0}
    assert second["path"] == str(bad)
    assert "not a sound file" in second["error"]
    assert "neighbours" not in second
    assert [entry["path"] for entry in third["neighbours"]] == [path for path, _ in near]
    similarities = [entry["similarity"] for entry in third["neighbours"]]
    assert similarities == pytest.approx([value for _, value in near], abs=2e-6)
    assert "2 files done, 1 failed" in captured.err

    assert run(inside, bad, *settings, "--k=1000000", "--format=csv", "--out=out/table.csv") == 3
    table = list(csv.DictReader(io.StringIO(Path("out/table.csv").read_text())))
    ranks = [(str(inside), str(rank)) for rank in range(1, 5)]
    assert [(row["query"], row["rank"]) for row in table] == [*ranks, (str(bad), "")]
    assert [row["path"] for row in table[:3]] == [path for path, _ in near]
    assert "not a sound file" in table[4]["error"]
    assert float(table[0]["similarity"]) == pytest.approx(near[0][1], abs=2e-6)
    capsys.readouterr()


def test_a_playlist_of_the_neighbours_holds_each_once(made, current, bundle):
    queries = [made / "music" / name for name in ("a.wav", "f.wav")]
    words = ["--index=music.index", f"--model={bundle}", "--k=2", "--format=m3u"]
    assert run(*queries, *words, "--out=like.m3u8") == 0
    lines = Path("like.m3u8").read_text().splitlines()
    near = [pair for query in queries for pair in expected(made, bundle, query, 2)]
    assert lines[0] == "#EXTM3U" and lines[2::2] == list(dict.fromkeys(path for path, _ in near))
    assert lines[1] == f"#EXTINF:-1,{Path(near[0][0]).stem} ({100 * near[0][1]:.0f} %)"


def test_an_index_is_kept_up_to_date(made, current, bundle, capsys):
    settings = ["--index=own.index", f"--model={bundle}"]
    assert run(*settings, "--add=music/album", "--add=music/*.wav") == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "own.index: 4 files (4 added)" in captured.err
    before = Path("own.index").stat().st_mtime_ns
    assert run(*settings, "--add=music/album") == 0
    assert "own.index: 4 files (2 unchanged)" in capsys.readouterr().err
    assert Path("own.index").stat().st_mtime_ns == before
    os.remove("music/album/b.flac")
    Path("music/bad.mp3").write_bytes(b"no music")
    Path("empty").mkdir()
    os.utime("music/a.wav", ns=(1, 1))
    # Adding and asking in one go; the new file is asked for, and one cannot be used.
    assert run("music/e.mp3", *settings, "--add=music", "--add=empty", "--k=9") == 3
    captured = capsys.readouterr()
    assert "own.index: 4 files (1 added, 1 changed, 2 unchanged, 1 gone, 1 failed)" in captured.err
    assert "empty: no sound files in this folder" in captured.err
    assert "bad.mp3: not a sound file" in captured.err
    assert captured.out.splitlines()[0] == "music/e.mp3" and len(captured.out.splitlines()) == 4
    assert run(*settings, "--add=music") == 3
    assert "4 files done, 1 failed" in capsys.readouterr().err
    paths = sorted(os.path.relpath(path) for path in EmbeddingIndex.load("own.index").paths)
    assert paths == [f"music/{name}" for name in ("a.wav", "album/c, d.ogg", "e.mp3", "f.wav")]


def test_names_that_are_no_text(current, bundle, monkeypatch):
    odd = os.fsdecode(os.fsencode(current / "music") + b"/caf\xe9.wav")
    os.rename(current / "music" / "a.wav", odd)
    other = str(current / "music" / "f.wav")

    def output(names, *arguments):
        # As a process has them; pytest's own cannot hold such names.
        listed = io.BytesIO(b"\0".join(map(os.fsencode, names)))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(listed))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
        index = os.fsdecode(b"odd\xe9.index")
        assert run(*arguments, f"--index={index}", f"--model={bundle}") == 0
        return sys.stdout.buffer.getvalue().splitlines()

    assert output([odd, other], other, "--add=-", "--format=m3u")[2:] == [os.fsencode(odd)]
    answer = json.loads(output([odd, ""], "-", "--format=jsonl")[0])
    assert answer["path"] == odd and answer["neighbours"][0]["path"] == other
    assert output([], odd, "--format=csv")[1].startswith(os.fsencode(f"{odd},1,{other},"))
    assert output([], other, "--format=table")[1].endswith(os.fsencode(odd))


def test_input_that_cannot_be_used(made, current, bundle, capsys):
    song = "music/a.wav"
    Path("empty").mkdir()
    Path("bad.wav").write_bytes(b"RIFF")
    Path("text").write_text("no index")
    (current / "new\nline.wav").write_bytes(Path(song).read_bytes())
    index = ["--index=music.index", f"--model={bundle}"]
    for arguments, message in (
        (
            [song, "--index=gone.index"],
            "gone.index: no such index. Create it with: musicgenre similar --index=gone.index",
        ),
        ([song, "--index=text"], "text: not a readable index"),
        ([song, "--index=empty"], "empty: not an index, which is a single file"),
        (["--add=music", f"--index={song}"], "music/a.wav: not a readable index"),
        ([song, "--k=0", *index], "--k=0: 0 is not a positive integer"),
        ([song, "--out=./music.index", *index], "is the index"),
        (index, "no files: name some"),
        (["-", "--add=-", *index], "not both"),
        (["empty", *index], "empty: no sound files in this folder"),
        (["gone.wav", *index], "gone.wav: no such file"),
        (["bad.wav", *index], "bad.wav: not a sound file"),
        (["--add=gone.wav", "--index=new.index", f"--model={bundle}"], "gone.wav: no such file"),
        (
            [song, "--add=bad.wav", "--index=new.index", f"--model={bundle}"],
            "new.index: the index is empty",
        ),
        ([song, "--index=music.index"], "music.index: made with another model"),
        (["--add=music", "--index=music.index"], "music.index: made with another model"),
    ):
        assert run(*arguments) == 2, arguments
        captured = capsys.readouterr()
        assert message in captured.err and captured.out == "", (arguments, captured)
    assert not Path("new.index").exists()
    assert Path("music.index").read_bytes() == (made / "music.index").read_bytes()
    # A playlist has a line for a file, so a name of two lines is left out of it and said so.
    assert run(song, "--add=new\nline.wav", *index, "--format=m3u", "--k=99") == 3
    captured = capsys.readouterr()
    assert "cannot hold a name with a line break" in captured.err
    assert len(captured.out.splitlines()) == 1 + 2 * 5
