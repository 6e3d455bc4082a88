import csv
import dataclasses
import json

import jax
import numpy as np
import pytest
import soundfile
from ml_collections import ConfigDict
from tiny_model import tiny_model

from musicgenre.audio.features import compute_features, mel_power, to_db
from musicgenre.config import store_path
from musicgenre.datasets.base import find_audio
from musicgenre.errors import UserError
from musicgenre.evaluation.calibration import tempered
from musicgenre.evaluation.report import write_report
from musicgenre.inference.predict import Prediction, predict_files, render
from musicgenre.inference.windows import file_inputs
from musicgenre.runs.bundle import save_bundle
from musicgenre.runs.model import load_model
from musicgenre.store.store import Store
from musicgenre.studies.evaluate import (
    evaluate_model,
    store_of_arrays,
    temperature_source,
    training_store,
)
from musicgenre.training.fit import train
from musicgenre.training.scoring import score_clips
from musicgenre.training.step import make_score_step


@pytest.fixture
def model(small_config, tmp_path):
    small_config.optimizer.schedule = "constant"
    small_config.optimizer.learning_rate = 5e-3
    small_config.model.dropout = 0.0
    small_config.epochs = 12
    train(small_config, tmp_path / "run", progress=False)
    return load_model(tmp_path / "run")


def noise(path, seconds, seed=0):
    samples = 0.1 * np.random.default_rng(seed).standard_normal(int(22050 * seconds))
    soundfile.write(path, samples, 22050)
    return path


def test_a_long_file_is_the_mean_of_its_windows(model, tmp_path):
    size = 64 * 512
    samples = np.random.default_rng(0).standard_normal(int(2.5 * size)).astype(np.float32)
    inputs = file_inputs(samples, model)
    assert inputs.shape == (3, 64, 16) and inputs.dtype == np.float16
    # Frames are those of the whole file, each window has a dB reference of its own, and the last one ends with the file.
    power = mel_power(samples, model.features)
    for row, start in zip(inputs, (0, 64, 160 - 64), strict=True):
        np.testing.assert_array_equal(
            row, to_db(power[start : start + 64], model.features).astype(np.float16)
        )
    first = compute_features(samples[:size], model.features)[:63]
    np.testing.assert_allclose(
        inputs[0][:62] - inputs[0][:62].max(), first[:62] - first[:62].max(), atol=0.05
    )


def test_files_alone_or_together_give_the_same_and_bad_ones_say_why(model, tmp_path):
    good = [noise(tmp_path / f"{i}.wav", seconds, i) for i, seconds in enumerate((1.5, 20.0, 3.0))]
    bad = tmp_path / "bad.mp3"
    bad.write_text("no music")
    alone = [next(predict_files(model, [path])).probabilities for path in good]
    together = list(predict_files(model, [good[0], bad, *good[1:], tmp_path / "gone.wav"]))
    assert [bool(p.error) for p in together] == [False, True, False, False, True]
    assert (
        "bad.mp3: not a sound file" in together[1].error
        and "gone.wav: no such file" in together[4].error
    )
    for one, other in zip(alone, (together[0], together[2], together[3]), strict=True):
        np.testing.assert_array_equal(one, other.probabilities)
        assert abs(one.sum() - 1) < 1e-5


def test_forms_of_output():
    names = ("a", "b", "c")
    predictions = [
        Prediction("x, y.mp3", np.array([0.2, 0.5, 0.3])),
        Prediction("bad.mp3", None, "broken"),
    ]
    assert list(render(predictions, names, "table", 2)) == ["x, y.mp3  b 50.0 %  c 30.0 %"]
    parsed = json.loads("\n".join(render(predictions, names, "json", 1)))
    assert parsed == [
        {"path": "x, y.mp3", "labels": [{"label": "b", "probability": 0.5}]},
        {"path": "bad.mp3", "error": "broken"},
    ]
    rows = list(csv.reader(render(predictions, names, "csv", 1)))
    assert rows[0] == ["path", "label", "a", "b", "c", "error"]
    assert rows[1:] == [
        ["x, y.mp3", "b", "0.200000", "0.500000", "0.300000", ""],
        ["bad.mp3", "", "", "", "", "broken"],
    ]


def test_evaluation_gives_the_scores_of_training(model, small_config):
    evaluation = evaluate_model(model, Store.open(store_path(small_config)), "valid")
    accuracy = (evaluation.scores.argmax(axis=1) == evaluation.targets).mean()
    assert accuracy == model.measure[1] == 1.0
    assert evaluation.audit.clean and evaluation.audit.trained == 24
    assert evaluation.checkpoint == {"step": 36, "which": "last", "selected_on": "nothing"}


def test_an_unseen_file_of_the_same_form_is_scored_as_test(model, small_arrays, tmp_path):
    with np.load(small_arrays / "test.npz") as file:
        arrays = dict(file)
    order = np.array([4, 2, 7])
    # Another order of the labels and fewer of them: the truth is told by name.
    renamed = {k: v[order] for k, v in arrays.items() if k != "genres"} | {
        "genres": np.array(["low", "middle", "high"])
    }
    np.savez(tmp_path / "unseen.npz", **renamed)
    store = store_of_arrays(model, tmp_path / "unseen.npz", "test", tmp_path / "scratch")
    evaluation = evaluate_model(model, store, "test")
    assert evaluation.clip_ids == ["test.2", "test.4", "test.7"]
    assert evaluation.targets.tolist() == [2, 1, 1]
    assert (evaluation.scores.argmax(axis=1) == evaluation.targets).all()


def test_leaks_from_the_training_clips_are_found(model, small_arrays, tmp_path):
    with np.load(small_arrays / "train.npz") as file:
        arrays = dict(file)
    rows = slice(0, 3)
    copies = {k: v[rows] for k, v in arrays.items() if k != "genres"} | {"genres": arrays["genres"]}
    copies["clip_id"] = np.array(["train.0", "renamed", "quieter"])
    copies["spectrogram"] = copies["spectrogram"].copy()
    copies["spectrogram"][2] -= 3.0
    np.savez(tmp_path / "leaky.npz", **copies)
    evaluation = evaluate_model(
        model, store_of_arrays(model, tmp_path / "leaky.npz", "test", tmp_path / "scratch"), "test"
    )
    assert not evaluation.audit.clean
    assert {finding.kind for finding in evaluation.audit.findings} >= {
        "same clip",
        "same content",
        "near-identical",
    }


def test_a_bundle_is_evaluated_and_never_said_to_have_no_leak(small_config, tmp_path):
    save_bundle(
        dataclasses.replace(tiny_model(labels=("high", "low", "middle")), which="best"),
        tmp_path / "tiny.safetensors",
    )
    model = load_model(tmp_path / "tiny.safetensors")
    place = store_path(small_config)
    evaluation = evaluate_model(model, Store.open(place), "valid")
    # The store's labels are low, middle and high; the model's have another order.
    assert evaluation.targets.tolist() == [1, 2, 0] * 3 and evaluation.scores.shape == (9, 3)
    assert evaluation.title == "tiny.safetensors: conv1d on arrays" and evaluation.curves == []
    assert evaluation.notes == [
        "The checkpoint may have been chosen on this very split, so its measures may be a little too good."
    ]
    said = evaluation.audit.summary()
    assert not evaluation.audit.clean and len(said) == 1
    assert (
        said[0].startswith("training clips unknown: ")
        and "tiny.safetensors does not list them" in said[0]
    )
    report = write_report(tmp_path / "report", evaluation, resamples=20).read_text()
    assert "<strong>Training clips unknown</strong>" in report and "no leak" not in report.lower()
    # The store's training split need not be the one that the model was trained on.
    trained = evaluate_model(model, Store.open(place), "train")
    assert trained.audit.unknown and trained.notes == []
    with pytest.raises(
        UserError, match=r"tiny.safetensors: a bundle does not say which store .* --store="
    ):
        training_store(tmp_path / "tiny.safetensors")


def test_each_window_is_scored_with_the_temperature(small_config, tmp_path):
    model = tiny_model(data__crop_frames=60, data__eval_chunks=3, batch_size=4)
    # Evaluated as a bundle is, which lists no training clips.
    (tmp_path / "bundle").touch()
    model = dataclasses.replace(
        model, label_names=("high", "low", "middle"), workdir=tmp_path / "bundle"
    )
    store = Store.open(store_path(small_config))
    plain = evaluate_model(model, store, "valid")
    assert plain.windows.shape == (9, 3, 3) and plain.temperature == 1
    # As training scores clips: 27 windows in 7 batches, the last of them filled up.
    score = jax.jit(make_score_step(model.module, model.task))
    expected = score_clips(
        score, model.model, store, store.indices("valid"), batch_size=4, crop_frames=60, chunks=3
    )
    np.testing.assert_allclose(plain.scores, expected, rtol=1e-5, atol=1e-7)
    warm = evaluate_model(dataclasses.replace(model, temperature=1.7), store, "valid")
    np.testing.assert_allclose(warm.scores, tempered(plain.windows, 1.7), rtol=1e-4)
    assert warm.temperature == 1.7 and np.abs(warm.scores - plain.scores).max() > 0.01


def test_where_a_temperature_comes_from(small_config, tmp_path):
    save_bundle(tiny_model(labels=("high", "low", "middle")), tmp_path / "tiny.safetensors")
    model, store = load_model(tmp_path / "tiny.safetensors"), Store.open(store_path(small_config))
    evaluation = evaluate_model(model, store, "valid")

    def source(asked, one=evaluation, **arguments):
        return temperature_source(asked, one, model, store, tmp_path / "scratch", **arguments)

    assert source("1.5") == 1.5 and source("valid") is evaluation
    other = source("test")
    assert other.split == "test" and other.clip_ids[0] == "test.0"
    file = source(str(tmp_path / "test.npz"))
    assert file.clip_ids == other.clip_ids and file.split == "valid"
    np.testing.assert_allclose(file.scores, other.scores, atol=1e-6)
    # A file's store has no other split, and a bundle does not say what it was trained on.
    with pytest.raises(UserError, match="a bundle does not say which store"):
        source("test", alone=True)
    assert source("valid", dataclasses.replace(evaluation, task="multi_label")) is None
    for wrong in ("lukewarm", "0", "-1", "inf"):
        with pytest.raises(UserError, match=f"--temperature={wrong}: must be a split"):
            source(wrong)


def test_stores_that_do_not_fit_are_refused(model, small_config):
    store = Store.open(store_path(small_config))
    store.label_names = ("low", "polka", "high")
    with pytest.raises(UserError, match="the model does not know the label 'polka'"):
        evaluate_model(model, store, "valid")
    store.features = type(store.features)(n_mels=16, hop_length=256)
    with pytest.raises(UserError, match=r"hop_length: 256 -> 512"):
        evaluate_model(model, store, "valid")


def test_no_run_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"none: no such workdir.*musicgenre train"):
        load_model(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no checkpoint found"):
        load_model(tmp_path / "empty")


def test_the_real_clips_go_through_a_checkpoint_of_the_arrays(
    real_data, small_config, prepared, tmp_path
):
    """A short training on the real arrays, then the real `.au` and FLAC files at the same front end (hop 1710)."""
    config = ConfigDict(small_config.to_dict())
    config.data.root = str(real_data / "gtzan_mels")
    config.data.files = ConfigDict({"train": "train.npz", "valid": "valid.npz", "test": ""})
    config.data.frames = 387
    config.features.n_mels = 128
    config.features.hop_length = 1710
    config.model = ConfigDict(
        {
            "name": "conv1d",
            "module": "",
            "filters": (64, 64, 64),
            "dense": (128,),
            "batch_norm": True,
        }
    )
    config.batch_size = 32
    config.epochs = 4
    config.optimizer.schedule = "constant"
    summary = prepared(config)
    assert summary.splits == {"train": 442, "valid": 197} and not summary.skipped
    result = train(config, tmp_path / "real", progress=False)
    assert result.last > 0.3  # ten classes: chance is 0.1
    files = find_audio(real_data / "gtzan_audio")
    predictions = list(predict_files(load_model(tmp_path / "real"), files))
    assert len(predictions) == 28 and not any(p.error for p in predictions)
    right = [np.argmax(p.probabilities) == 1 for p in predictions if "classical" in p.path]
    assert np.mean(right) > 0.5
