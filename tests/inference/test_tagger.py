import dataclasses
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
import soundfile
from tiny_model import tiny_model

import musicgenre
from musicgenre import Tagger
from musicgenre.errors import UserError
from musicgenre.inference.windows import score_files
from musicgenre.runs.bundle import save_bundle


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "tiny.safetensors"
    save_bundle(tiny_model(), path)
    return Tagger.load(path)


def sound(path, seconds=3.0, seed=0):
    samples = 0.1 * np.random.default_rng(seed).standard_normal(int(22050 * seconds))
    soundfile.write(path, samples, 22050)
    return path


def test_tags_are_the_sorted_scores(tagger, tmp_path):
    path = sound(tmp_path / "a.wav")
    tags = tagger.tag(path)
    expected = next(score_files(tagger.model, [path])).probabilities
    assert [tag.probability for tag in tags] == sorted(expected.tolist(), reverse=True)
    assert dict(tags) == dict(zip(tagger.labels, expected.tolist(), strict=True))
    assert abs(sum(tag.probability for tag in tags) - 1) < 1e-5
    assert tagger.tag(path, top=1) == tags[:1]


def test_a_taggram_covers_the_file_and_its_weighted_mean_is_the_tags(tagger, tmp_path):
    path = sound(tmp_path / "a.wav", 4.0)
    found = tagger.taggram(path)
    window = 64 * 512 / 22050
    np.testing.assert_allclose(found.starts[:2], [0, window])
    assert found.starts[-1] == pytest.approx(4.0 - window, abs=512 / 22050)
    assert np.all(found.ends <= 4.0) and found.ends[-1] == pytest.approx(4.0, abs=512 / 22050)
    # 172 frames in windows of 64; the last adds 44.
    weights = [1, 1, 44 / 64]
    mean = np.average(found.probabilities, axis=0, weights=weights)
    mean = dict(zip(tagger.labels, mean, strict=True))
    for label, probability in tagger.tag(path):
        assert mean[label] == pytest.approx(probability, abs=1e-6)
    embedding = np.average(found.embeddings, axis=0, weights=weights)
    np.testing.assert_allclose(tagger.embed(path), embedding, atol=1e-6)
    # 172 hops, windows of 64 at 0, 9, ... 108
    assert len(tagger.taggram(path, step_seconds=0.2).starts) == 13
    with pytest.raises(UserError, match="at most a window's 64"):
        tagger.taggram(path, step_seconds=30)
    with pytest.raises(UserError, match="must not be negative"):
        tagger.taggram(path, step_seconds=-1)


def test_a_bad_file_yields_its_error_and_the_others_their_tags(tagger, tmp_path):
    bad = tmp_path / "bad.mp3"
    bad.write_text("no music")
    good, other = sound(tmp_path / "a.wav"), sound(tmp_path / "b.wav", 2.0, 1)
    files = [good, bad, other, tmp_path / "gone.wav"]
    found = list(tagger.tag_files(files, top=2))
    assert [file.path for file in found] == [str(path) for path in files]
    assert [len(file.tags) for file in found] == [2, 0, 2, 0]
    assert "not a sound file" in found[1].error and "no such file" in found[3].error
    assert found[2].tags == tuple(tagger.tag(files[2], top=2))
    with pytest.raises(UserError, match="gone"):
        tagger.tag(files[3])


def test_a_regression_keeps_the_order_of_its_outputs(tmp_path):
    tags = Tagger(tiny_model("regression", ("x", "y", "z"))).tag(sound(tmp_path / "a.wav"))
    assert [tag.label for tag in tags] == ["x", "y", "z"]
    assert min(tag.probability for tag in tags) < 0


def test_a_network_without_an_embedding_still_tags(tmp_path):
    class Plain(nn.Module):
        num_classes: int

        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(self.num_classes, name="head")(x.mean(axis=1))

    variables = Plain(3).init(jax.random.key(0), np.zeros((1, 64, 16)))
    model = tiny_model()
    saved = {"variables": variables, "norm": model.model["norm"]}
    tagger = Tagger(dataclasses.replace(model, module=Plain(3), model=saved))
    path = sound(tmp_path / "a.wav")
    assert len(tagger.tag(path)) == 3
    with pytest.raises(UserError, match="sows no embedding"):
        tagger.embed(path)


def test_importing_the_package_is_light():
    code = (
        "import sys, musicgenre, musicgenre.cli.main; "
        "print([name for name in ('jax', 'flax', 'librosa', 'matplotlib') if name in sys.modules])"
    )
    options = {"capture_output": True, "text": True, "check": True}
    assert subprocess.run([sys.executable, "-c", code], **options).stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'Taggre'"):
        musicgenre.Taggre  # noqa: B018
