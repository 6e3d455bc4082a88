import dataclasses

import jax
import numpy as np
import pytest
from tiny_model import tiny_model

from musicgenre.config import store_path
from musicgenre.errors import UserError
from musicgenre.evaluation.calibration import tempered
from musicgenre.evaluation.report import write_report
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
    small_config.epochs = 2
    train(small_config, tmp_path / "run", progress=False)
    return load_model(tmp_path / "run")


def test_evaluation_gives_the_scores_of_training(model, small_config):
    evaluation = evaluate_model(model, Store.open(store_path(small_config)), "valid")
    accuracy = (evaluation.scores.argmax(axis=1) == evaluation.targets).mean()
    assert accuracy == model.measure[1]
    assert evaluation.audit.clean and evaluation.audit.trained == 24
    assert evaluation.checkpoint == {"step": 6, "which": "last", "selected_on": "nothing"}


def test_arrays_of_a_file_are_scored_like_those_of_a_store(
    model, small_config, small_arrays, tmp_path
):
    with np.load(small_arrays / "test.npz") as file:
        arrays = dict(file)
    order = np.array([4, 2, 7])
    # The labels have another order, and are matched by name.
    renamed = {k: v[order] for k, v in arrays.items() if k != "genres"} | {
        "genres": np.array(["low", "middle", "high"])
    }
    np.savez(tmp_path / "unseen.npz", **renamed)
    store = store_of_arrays(model, tmp_path / "unseen.npz", "test", tmp_path / "scratch")
    evaluation = evaluate_model(model, store, "test")
    assert evaluation.clip_ids == ["test.2", "test.4", "test.7"]
    assert evaluation.targets.tolist() == [2, 1, 1]
    expected = evaluate_model(model, Store.open(store_path(small_config)), "test").scores
    np.testing.assert_allclose(evaluation.scores, expected[[2, 4, 7]], atol=1e-6)


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


def test_a_bundle_is_evaluated_and_its_training_clips_are_reported_as_unknown(
    small_config, tmp_path
):
    save_bundle(
        dataclasses.replace(tiny_model(labels=("high", "low", "middle")), which="best"),
        tmp_path / "tiny.safetensors",
    )
    model = load_model(tmp_path / "tiny.safetensors")
    path = store_path(small_config)
    evaluation = evaluate_model(model, Store.open(path), "valid")
    # The store's labels are low, middle and high; the model's have another order.
    assert evaluation.targets.tolist() == [1, 2, 0] * 3 and evaluation.scores.shape == (9, 3)
    assert evaluation.title == "tiny.safetensors: conv1d on arrays" and evaluation.curves == []
    assert evaluation.notes == [
        "The checkpoint may have been chosen on this very split, so its measures may be a little "
        "too good."
    ]
    summary = evaluation.audit.summary()
    assert not evaluation.audit.clean and len(summary) == 1
    assert (
        summary[0].startswith("training clips unknown: ")
        and "tiny.safetensors does not list them" in summary[0]
    )
    report = write_report(tmp_path / "report", evaluation, resamples=20).read_text()
    assert "<strong>Training clips unknown</strong>" in report and "no leak" not in report.lower()
    # The store's training split need not be the one that the model was trained on.
    trained = evaluate_model(model, Store.open(path), "train")
    assert trained.audit.unknown and trained.notes == []
    with pytest.raises(UserError, match=r"a bundle does not name its training store\. .* --store="):
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
    with pytest.raises(UserError, match="a bundle does not name its training store"):
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
