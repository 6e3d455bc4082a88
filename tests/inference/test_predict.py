import csv
import json

import numpy as np
import pytest
import soundfile
from ml_collections import ConfigDict
from tiny_model import tiny_model

from musicgenre.audio.features import compute_features, mel_power, to_db
from musicgenre.datasets.base import find_audio
from musicgenre.inference.predict import csv_line, json_line, ranked, render
from musicgenre.inference.windows import FileScores, file_inputs, score_files
from musicgenre.runs.model import load_model
from musicgenre.training.fit import train


def noise(path, seconds, seed=0):
    samples = 0.1 * np.random.default_rng(seed).standard_normal(int(22050 * seconds))
    soundfile.write(path, samples, 22050)
    return path


def test_windows_have_their_own_db_reference_and_the_frames_of_the_file():
    model = tiny_model()
    size = 64 * 512
    samples = np.random.default_rng(0).standard_normal(int(2.5 * size)).astype(np.float32)
    inputs = file_inputs(samples, model)
    assert inputs.shape == (3, 64, 16) and inputs.dtype == np.float16
    power = mel_power(samples, model.features)
    for row, start in zip(inputs, (0, 64, 160 - 64), strict=True):
        expected = to_db(power[start : start + 64], model.features)
        np.testing.assert_array_equal(row, expected.astype(np.float16))
    first = compute_features(samples[:size], model.features)[:62]
    np.testing.assert_allclose(
        inputs[0][:62] - inputs[0][:62].max(), first - first.max(), atol=0.05
    )


def test_files_have_the_same_scores_alone_and_together_and_bad_ones_a_reason(tmp_path):
    model = tiny_model()
    good = [noise(tmp_path / f"{i}.wav", seconds, i) for i, seconds in enumerate((1.5, 20.0, 3.0))]
    bad = tmp_path / "bad.mp3"
    bad.write_text("no music")
    alone = [next(score_files(model, [path])).probabilities for path in good]
    together = list(score_files(model, [good[0], bad, *good[1:], tmp_path / "gone.wav"]))
    assert [bool(scores.error) for scores in together] == [False, True, False, False, True]
    assert "bad.mp3: not a sound file" in together[1].error
    assert "gone.wav: no such file" in together[4].error
    for one, other in zip(alone, (together[0], together[2], together[3]), strict=True):
        np.testing.assert_array_equal(one, other.probabilities)
        assert abs(one.sum() - 1) < 1e-5


PREDICTIONS = [
    FileScores("x, y.mp3", np.array([0.2, 0.5, 0.3])),
    FileScores("bad.mp3", error="broken"),
]


@pytest.mark.parametrize(
    ("form", "top", "task", "lines"),
    [
        ("table", 2, "single_label", ["x, y.mp3  b 50.0 %  c 30.0 %"]),
        ("table", 2, "regression", ["x, y.mp3  a 0.2  b 0.5  c 0.3"]),
        (
            "csv",
            1,
            "single_label",
            [
                "path,label,a,b,c,error",
                '"x, y.mp3",b,0.200000,0.500000,0.300000,',
                "bad.mp3,,,,,broken",
            ],
        ),
        (
            "csv",
            1,
            "regression",
            ["path,a,b,c,error", '"x, y.mp3",0.200000,0.500000,0.300000,', "bad.mp3,,,,broken"],
        ),
    ],
)
def test_tables(form, top, task, lines):
    assert list(render(PREDICTIONS, ("a", "b", "c"), form, top, task)) == lines


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("single_label", {"labels": [{"label": "b", "probability": 0.5}]}),
        ("regression", {"values": {"a": 0.2, "b": 0.5, "c": 0.3}}),
    ],
)
def test_json(task, fields):
    expected = [{"path": "x, y.mp3", **fields}, {"path": "bad.mp3", "error": "broken"}]
    arguments = (PREDICTIONS, ("a", "b", "c"))
    assert json.loads("\n".join(render(*arguments, "json", 1, task))) == expected
    assert [json.loads(line) for line in render(*arguments, "jsonl", 1, task)] == expected


def test_names_that_are_not_utf8_and_ties():
    name = "caf\udce9 é.mp3"
    assert json.loads(json_line({"path": name})) == {"path": name}
    assert "é" in json_line({"path": "é"})
    assert next(csv.reader([csv_line([name, 'a "b", c'])])) == [name, 'a "b", c']
    values = np.float32([0.25, 0.5, 0.25])
    assert ranked(values, "multi_label") == [1, 0, 2]
    assert ranked(values, "regression") == [0, 1, 2]


def test_real_clips_are_scored_by_a_model_of_the_real_arrays(
    real_data, small_config, prepared, tmp_path
):
    """A short training on the real arrays, then the real `.au` files at the same front end."""
    config = ConfigDict(small_config.to_dict())
    config.data.root = str(real_data / "gtzan_mels")
    config.data.files = ConfigDict({"train": "train.npz", "valid": "valid.npz", "test": ""})
    config.data.frames = 387
    config.features.n_mels = 128
    config.features.hop_length = 1710
    config.batch_size = 32
    config.epochs = 1
    summary = prepared(config)
    assert summary.splits == {"train": 442, "valid": 197} and not summary.skipped
    train(config, tmp_path / "real", progress=False)
    files = find_audio(real_data / "gtzan_audio")
    scores = list(score_files(load_model(tmp_path / "real"), files))
    assert len(scores) == len(files) and not any(one.error for one in scores)
    for one in scores:
        assert one.probabilities.shape == (10,) and abs(one.probabilities.sum() - 1) < 1e-5
