import dataclasses
import json
import os
import resource
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import soundfile
from safetensors import safe_open
from safetensors.numpy import save_file
from sklearn.neighbors import NearestNeighbors
from tiny_model import tiny_model

from musicgenre.errors import UserError
from musicgenre.files import read_arrays, write_arrays
from musicgenre.inference.index import EmbeddingIndex, Update, model_digest
from musicgenre.inference.tagger import Tagger
from musicgenre.runs.bundle import save_bundle
from musicgenre.runs.model import load_model

NO_TEXT = os.fsdecode(b"/music/caf\xe9.mp3")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tagger(model):
    return Tagger(model)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Six good files of noise; what tests change they copy."""
    folder = tmp_path_factory.mktemp("sounds")
    return [sound(folder / f"{number}.wav", number) for number in range(6)]


def sound(path, seed=0, seconds=1.6):
    samples = 0.1 * np.random.default_rng(seed).standard_normal(int(22050 * seconds))
    soundfile.write(path, np.cumsum(samples) * 0.02 if seed % 2 else samples, 22050)
    return str(path)


def random_index(n=300, d=16):
    return EmbeddingIndex(
        [f"/music/{i:03d}.mp3" for i in range(n)], np.random.default_rng(0).standard_normal((n, d))
    )


def test_neighbours_are_those_of_scikit_learn():
    index = random_index()
    values = np.random.default_rng(0).standard_normal((300, 16))
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    np.testing.assert_allclose(index.embeddings, unit, atol=1e-7)
    assert index.embeddings.dtype == np.float32
    queries = np.random.default_rng(1).standard_normal((5, 16)) * 100
    nearest = NearestNeighbors(n_neighbors=7, metric="cosine").fit(values)
    distances, rows = nearest.kneighbors(queries)
    for query, distance, row in zip(queries, distances, rows, strict=True):
        found = index.search(query, 7)
        assert [near.path for near in found] == [f"/music/{i:03d}.mp3" for i in row]
        np.testing.assert_allclose([near.similarity for near in found], 1 - distance, atol=1e-6)


def test_a_query_is_left_out_by_any_name_and_equals_go_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.mp3").symlink_to(tmp_path / "b.mp3")
    names = ["b.mp3", "a.mp3", "c.mp3", "zero.mp3"]
    index = EmbeddingIndex(names, np.array([[2.0, 0], [1, 0], [3, 4], [0, 0]]))
    assert index.paths == [str(tmp_path / name) for name in names]
    found = index.search(np.array([5.0, 0]), 10**9)
    assert [Path(near.path).name for near in found] == ["a.mp3", "b.mp3", "c.mp3", "zero.mp3"]
    np.testing.assert_allclose([near.similarity for near in found], [1, 1, 0.6, 0], atol=1e-7)
    for name in ("b.mp3", "./b.mp3", tmp_path / "link.mp3"):
        found = index.search(np.array([5.0, 0]), 2, exclude=name)
        assert [Path(near.path).name for near in found] == ["a.mp3", "c.mp3"]
    assert len(index.search(np.array([5.0, 0]), 4, exclude="elsewhere.mp3")) == 4
    assert EmbeddingIndex(["a.mp3"], np.ones((1, 2))).search(np.ones(2), 3, exclude="a.mp3") == []
    assert EmbeddingIndex().search(np.ones(2), 3) == []


@pytest.mark.parametrize(
    ("query", "k", "message"),
    [
        (np.ones(16), 0, "k must be at least 1, not 0"),
        (np.ones(15), 1, r"is \[15\], those of the index are \[16\]"),
        (np.full(16, np.nan), 1, "not finite"),
    ],
)
def test_queries_that_cannot_be_asked(query, k, message):
    with pytest.raises(UserError, match=message):
        random_index().search(query, k)


def test_arrays_that_make_no_index():
    with pytest.raises(UserError, match=r"2 paths need embeddings \[2, d\]"):
        EmbeddingIndex(["a", "b"], np.ones((3, 2)))
    with pytest.raises(UserError, match="twice"):
        EmbeddingIndex(["a", "./a"], np.ones((2, 2)))
    with pytest.raises(UserError, match="not finite"):
        EmbeddingIndex(["a"], np.array([[np.inf, 1]]))


def test_a_saved_index_is_bit_exact(tmp_path):
    index = EmbeddingIndex(
        [NO_TEXT, "/music/line\nbreak, ü.mp3"],
        np.array([[1.0, 2], [0, 0]]),
        np.array([[2**40, 1], [2, 1_700_000_000_123_456_789]]),
    )
    index.model = {"digest": "abc", "source": "café"}
    index.save(tmp_path / "music.index")
    again = EmbeddingIndex.load(tmp_path / "music.index")
    assert again.paths == index.paths and again.model == index.model
    np.testing.assert_array_equal(again.embeddings, index.embeddings)
    np.testing.assert_array_equal(again.stats, index.stats)
    again.save(tmp_path / "again.index")
    assert (tmp_path / "again.index").read_bytes() == (tmp_path / "music.index").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again.index", "music.index"]
    EmbeddingIndex(model={"digest": "abc"}).save(tmp_path / "empty.index")
    assert len(EmbeddingIndex.load(tmp_path / "empty.index")) == 0


def test_an_index_of_version_0_1_is_searched_and_embedded_again_by_an_update(
    tagger, sounds, tmp_path
):
    path = tmp_path / "music.index"
    index = EmbeddingIndex.of(tagger.model)
    index.update(tagger, sounds[:2], save_to=path)
    assert index.outdated == 0
    arrays, notes = read_arrays(path, key="musicgenre_index", schemas=(2,), what="", remedy="")
    write_arrays(path, arrays, notes | {"schema": 1}, key="musicgenre_index")
    old = EmbeddingIndex.load(path)
    assert old.outdated == 2 and old.stored(sounds[0]) is None
    assert [near.path for near in old.search(tagger.embed(sounds[0]), 1)] == sounds[:1]
    assert old.update(tagger, sounds[:1], save_to=path) == Update(0, 1, 0, 0, 0)
    assert EmbeddingIndex.load(path).outdated == 1
    assert old.update(tagger, sounds[:2], save_to=path) == Update(0, 1, 1, 0, 0)
    assert EmbeddingIndex.load(path).outdated == 0


def test_files_that_are_no_index(tmp_path):
    path = tmp_path / "music.index"

    def refused(message, name=path):
        with pytest.raises(UserError, match=message) as caught:
            EmbeddingIndex.load(name)
        assert str(name) in str(caught.value)

    refused("no such index. Create it with: musicgenre similar")
    refused("not an index, which is a single file", tmp_path)
    for content in (b"", b"not an index", b"\xff" * 100, b"RIFF" * 1000):
        path.write_bytes(content)
        refused("not a readable index, or cut short")
    random_index().save(path)
    good = path.read_bytes()
    path.write_bytes(good[:-10])
    refused("cut short")
    for offset in (-5, len(good) // 2):
        path.write_bytes(good[:offset] + bytes([good[offset] ^ 1]) + good[offset:][1:])
        refused("damaged: its arrays do not match their SHA-256")
    save_file({"x": np.zeros(1)}, tmp_path / "model.safetensors", metadata={"musicgenre": "{}"})
    refused("holds other arrays and no index", tmp_path / "model.safetensors")
    path.write_bytes(good)
    with safe_open(path, "numpy") as file:
        notes = json.loads(file.metadata()["musicgenre_index"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for text, message in (
        (json.dumps(notes | {"schema": 3}), "does not read schema 3"),
        ("{", "notes cannot be read"),
        ("[]", "notes cannot be read"),
        (json.dumps(notes | {"model": None}), "notes or arrays are incomplete"),
    ):
        save_file(arrays, path, metadata={"musicgenre_index": text})
        refused(message)
    save_file({"path": arrays["path"]}, path, metadata={"musicgenre_index": json.dumps(notes)})
    refused("damaged: its arrays")


def test_the_digest_knows_a_model_again_and_no_other(model, tmp_path):
    save_bundle(model, tmp_path / "a.safetensors")
    save_bundle(model, tmp_path / "half.safetensors", half=True)
    digest = model_digest(model)
    assert len(digest) == 64 and digest == model_digest(load_model(tmp_path / "a.safetensors"))
    changed = jax.tree.map(np.copy, model.model)
    changed["norm"]["mean"][0, 3] += 1e-3
    other_network, cropped = (model.config.copy_and_resolve_references() for _ in range(2))
    other_network.model.padding, cropped.data.crop_frames = "VALID", 32
    others = [
        load_model(tmp_path / "half.safetensors"),
        dataclasses.replace(model, model=changed),
        dataclasses.replace(model, label_names=("low", "high/est", "middle")),
        dataclasses.replace(model, features=dataclasses.replace(model.features, fmin=20.0)),
        dataclasses.replace(model, layout=dataclasses.replace(model.layout, pad="silence")),
        dataclasses.replace(model, config=other_network),
        dataclasses.replace(model, config=cropped),
    ]
    digests = [model_digest(other) for other in others]
    assert len({digest, *digests}) == 8
    index = EmbeddingIndex.of(model)
    index.check_model(load_model(tmp_path / "a.safetensors"))
    with pytest.raises(
        UserError,
        match=r"made with another model, run \(conv1d; low, middle, high/est\).*low, high/est, m",
    ):
        index.check_model(others[2])
    with pytest.raises(UserError, match=r"another model, unknown \(\?; \?\)"):
        random_index().check_model(model)


def test_an_update_embeds_only_what_is_new_or_has_changed(tagger, tmp_path):
    files = [sound(tmp_path / f"{number}.wav", number) for number in range(3)]
    index = EmbeddingIndex.of(tagger.model)
    assert index.update(tagger, [*files, Path(files[0])], [tmp_path]) == Update(3, 0, 0, 0, 0)
    for file in files:
        expected = tagger.embed(file)
        expected = expected / np.linalg.norm(expected)
        np.testing.assert_allclose(index.stored(file), expected, atol=1e-6)
        assert index.search(expected, 1)[0].path == file
    before = index.embeddings.copy()
    assert index.update(tagger, files, [tmp_path]) == Update(0, 0, 3, 0, 0)
    np.testing.assert_array_equal(index.embeddings, before)
    # Another length; the same length with another time; a new file; a deleted file.
    sound(tmp_path / "0.wav", 7, seconds=2)
    same = os.stat(files[1])
    sound(tmp_path / "1.wav", 8)
    os.utime(files[1], ns=(same.st_atime_ns, same.st_mtime_ns + 1))
    assert os.stat(files[1]).st_size == same.st_size
    assert index.stored(files[0]) is None
    assert index.stored(files[1]) is None
    assert index.stored(files[2]) is not None
    os.remove(files[2])
    new = sound(tmp_path / "new.wav", 9)
    assert index.update(tagger, [files[0], files[1], new], [tmp_path]) == Update(1, 2, 0, 1, 0)
    assert sorted(index.paths) == sorted([files[0], files[1], new])
    for file in index.paths:
        expected = tagger.embed(file)
        expected = expected / np.linalg.norm(expected)
        np.testing.assert_allclose(index.stored(file), expected, atol=1e-6)


def test_only_what_is_certainly_gone_is_taken_out(tagger, tmp_path):
    for name in ("here", "disk", "here-too"):
        (tmp_path / name).mkdir()
    names = ("here/a.wav", "here/b.wav", "disk/c.wav", "here-too/d.wav", "here/odd.music")
    a, b, c, d, odd = files = [str(tmp_path / name) for name in names]
    for number, file in enumerate(files):
        sound(tmp_path / "x.wav", number)
        os.rename(tmp_path / "x.wav", file)
    index = EmbeddingIndex.of(tagger.model)
    index.update(tagger, files)
    for file in (b, c, d):
        os.remove(file)
    # `disk` has no file, so it may not be mounted; `here-too` is not below `here`; `odd` exists,
    # though a search for sound files does not find it.
    folders = [tmp_path / "here", tmp_path / "disk"]
    assert index.update(tagger, [a], folders) == Update(0, 0, 1, 1, 0)
    assert sorted(index.paths) == sorted([a, c, d, odd])
    # A file that is named and is not there is taken out, and said so.
    messages = []
    assert index.update(tagger, [a, d], failed=messages.append) == Update(0, 0, 1, 0, 1)
    assert sorted(index.paths) == sorted([a, c, odd])
    assert "no such file" in messages[0]
    assert d in messages[0]


def test_a_file_that_has_become_bad_is_reported_and_not_kept(tagger, sounds, tmp_path):
    bad = sound(tmp_path / "bad.wav")
    index = EmbeddingIndex.of(tagger.model)
    path = tmp_path / "music.index"
    index.update(tagger, [*sounds[:2], bad], save_to=path)
    Path(bad).write_bytes(b"RIFF")
    messages = []
    done = index.update(tagger, [bad, *sounds[:3]], failed=messages.append, save_to=path)
    assert done == Update(1, 0, 2, 0, 1)
    assert len(messages) == 1
    assert "bad.wav: not a sound file" in messages[0]
    assert EmbeddingIndex.load(path).paths == sounds[:3]
    # A new index of bad files only is not written at all.
    empty = EmbeddingIndex.of(tagger.model)
    assert empty.update(tagger, [bad], save_to=tmp_path / "none.index").failed == 1
    assert not (tmp_path / "none.index").exists()


def test_an_interruption_keeps_what_was_there_and_what_is_done(
    tagger, sounds, tmp_path, monkeypatch
):
    path = tmp_path / "music.index"
    index = EmbeddingIndex.of(tagger.model)
    index.update(tagger, sounds[:1], save_to=path)
    saved = []
    save, scores = EmbeddingIndex.save, Tagger.scores

    def stopped(self, paths, **settings):
        for number, found in enumerate(scores(self, paths, **settings)):
            if number == 3:
                raise KeyboardInterrupt
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(
            EmbeddingIndex, "save", lambda self, where: (saved.append(len(self)), save(self, where))
        )
        patch.setattr(Tagger, "scores", stopped)
        with pytest.raises(KeyboardInterrupt):
            index.update(tagger, sounds, save_to=path, every=2)
    assert saved == [3, 4]
    again = EmbeddingIndex.load(path)
    assert again.paths == sounds[:4]
    assert again.update(tagger, sounds, save_to=path) == Update(2, 0, 4, 0, 0)
    # A disk that takes no more leaves the file as it was.
    before, new = path.read_bytes(), sound(tmp_path / "new.wav", 7)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(UserError, match=r"music.index: cannot be written \(File too large\)"):
            again.update(tagger, [new], save_to=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["music.index", "new.wav"]
    assert path.stat().st_mode == Path(new).stat().st_mode


def test_models_that_cannot_update_it(tagger, sounds):
    class Plain(nn.Module):
        num_classes: int

        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(self.num_classes, name="head")(x.mean(axis=1))

    index = EmbeddingIndex.of(tagger.model)
    with pytest.raises(UserError, match="another model"):
        index.update(Tagger(dataclasses.replace(tagger.model, label_names=("x", "y", "z"))), sounds)
    variables = Plain(3).init(jax.random.key(0), np.zeros((1, 64, 16)))
    plain = dataclasses.replace(
        tagger.model,
        module=Plain(3),
        model={"variables": variables, "norm": tagger.model.model["norm"]},
    )
    with pytest.raises(UserError, match="sows no embedding"):
        EmbeddingIndex.of(plain).update(Tagger(plain), sounds)
