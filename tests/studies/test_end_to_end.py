"""From sound files to reports: prepare a store, train for a few steps, evaluate and predict."""

import csv
import json

import numpy as np
import pytest
import soundfile
from mtat_tree import make_mtat_tree
from sklearn.metrics import average_precision_score, roc_auc_score

from musicgenre.config import base_config, dataset_options, store_path
from musicgenre.datasets import load_dataset
from musicgenre.errors import UserError
from musicgenre.evaluation.report import headline, measure, write_report
from musicgenre.inference.predict import render
from musicgenre.inference.windows import score_files
from musicgenre.runs.model import load_model
from musicgenre.store.store import Store
from musicgenre.studies.evaluate import evaluate_model, evaluate_runs
from musicgenre.training.fit import train

RATE = 8000


def csv_config(folder, header, rows):
    """A config of a small network on the sounds of a CSV list: rows of (samples, cells)."""
    lines = [header]
    for number, (sound, cells) in enumerate(rows):
        soundfile.write(folder / f"{number:02d}.wav", sound, RATE)
        lines.append(f"{number:02d}.wav,{cells}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    config = base_config()
    config.data.dataset = "csv"
    config.data.root = str(folder / "list.csv")
    config.data.stores_root = str(folder / "stores")
    config.data.frames = 64
    config.data.normalise = "band"
    config.features.update(sample_rate=RATE, n_fft=512, hop_length=250, n_mels=24, db_ref="1.0")
    config.model.update(filters=(16,), dense=(32,), dropout=0.0)
    config.batch_size = 16
    config.epochs = 2
    return config


@pytest.fixture
def factors(tmp_path):
    """Tones with two numbers each: their level, and how much noise is in them."""
    generator = np.random.default_rng(0)
    time = np.arange(2 * RATE) / RATE
    rows = []
    for number in range(24):
        level, noise = generator.uniform(-1, 1, 2)
        sound = 0.2 * 10 ** (level / 2) * np.sin(2 * np.pi * 300 * time)
        sound += 0.01 * 10**noise * generator.standard_normal(len(time))
        split = "valid" if number % 3 == 2 else "train"
        rows.append((sound, f"{level:.6f}|{noise:.6f},{split}"))
    return csv_config(tmp_path, "path,targets,split", rows)


def test_tags_of_mp3s_in_the_layout_of_magnatagatune(tmp_path, prepared):
    make_mtat_tree(tmp_path / "mtat", clips=60, seconds=2.0, empty=1)
    config = base_config()
    config.data.update({"dataset": "mtat", "root": str(tmp_path / "mtat"), "protocol": "clean"})
    config.data.stores_root = str(tmp_path / "stores")
    config.data.top_k = 12
    # FCN-4's own pools need 1280 frames x 96 bands; these are a tenth of the frames.
    config.data.frames = 128
    config.features.update(sample_rate=12000, n_fft=512, hop_length=256, n_mels=96)
    pools = {"time_pools": (4, 4, 4, 2), "band_pools": (2, 4, 3, 4)}
    config.model.update(name="fcn", filters=(8, 8, 8, 8), dropout=0.0, **pools)
    config.batch_size = 10
    config.epochs = 1
    [skipped] = prepared(config).skipped
    assert skipped["reason"].endswith("empty file (0 bytes).")
    store = Store.open(store_path(config))
    assert store.group_name == "track" and len(store.label_names) == 12
    result = train(config, tmp_path / "run", progress=False)
    model = load_model(tmp_path / "run")
    valid = measure(evaluate_model(model, store, "valid"), resamples=10)
    assert result.metric == "macro_roc_auc"
    assert result.last == pytest.approx(valid["macro_roc_auc"], abs=1e-6)
    evaluation = evaluate_model(model, store, "test")
    metrics = measure(evaluation)
    rows = metrics["per_class"]
    for row, truth, scores in zip(rows, evaluation.targets.T, evaluation.scores.T, strict=True):
        assert row["roc_auc"] == pytest.approx(roc_auc_score(truth, scores))
        assert row["pr_auc"] == pytest.approx(average_precision_score(truth, scores))
    assert metrics["macro_pr_auc"] == pytest.approx(np.mean([row["pr_auc"] for row in rows]))
    assert metrics["intervals"]["bootstrap_unit"] == "track"
    assert "track bootstrap" in headline(metrics)
    assert evaluation.audit.clean and evaluation.audit.group_name == "track"
    write_report(tmp_path / "report", evaluation, metrics=metrics)
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["tags"] == 12


def test_tags_from_a_list(tmp_path, prepared):
    """Sounds with any of the tags low (a 200 Hz tone), high (3 kHz) and noisy."""
    generator = np.random.default_rng(0)
    time = np.arange(2 * RATE) / RATE
    rows = []
    for number in range(24):
        tags = [tag for bit, tag in enumerate(("low", "high", "noisy")) if number >> bit & 1]
        sound = (1e-3 + 0.05 * ("noisy" in tags)) * generator.standard_normal(len(time))
        for tag, hertz in (("low", 200), ("high", 3000)):
            sound += 0.3 * np.sin(2 * np.pi * hertz * time) * (tag in tags)
        rows.append((sound, f"{'|'.join(tags)},{('train', 'train', 'valid')[number // 8]}"))
    config = csv_config(tmp_path, "path,labels,split", rows)
    prepared(config)
    result = train(config, tmp_path / "run", progress=False)
    model = load_model(tmp_path / "run", "best")
    evaluation = evaluate_model(model, Store.open(store_path(config)), "valid")
    assert evaluation.targets.shape == (8, 3) and model.label_names == ("high", "low", "noisy")
    write_report(tmp_path / "report", evaluation)
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["task"] == "multi_label" and result.metric == "macro_roc_auc"
    assert metrics["macro_roc_auc"] == pytest.approx(result.best, abs=1e-6)
    assert metrics["checkpoint"]["selected_on"].startswith("validation macro_roc_auc")
    [predicted] = score_files(model, [tmp_path / "19.wav"])
    assert evaluation.targets[3].tolist() == [1, 1, 0]
    np.testing.assert_allclose(predicted.probabilities, evaluation.scores[3], atol=0.05)


def test_numbers_from_sound_files_to_a_report(factors, prepared, tmp_path):
    prepared(factors)
    store = Store.open(store_path(factors))
    assert store.task == "regression" and store.label_names == ("target1", "target2")
    assert store.values.shape == (24, 2)
    result = train(factors, tmp_path / "run", progress=False)
    model = load_model(tmp_path / "run", "best")
    evaluation = evaluate_model(model, store, "valid")
    metrics = measure(evaluation)
    assert result.metric == "r2" and metrics["r2"] == pytest.approx(result.best, rel=1e-4)
    assert headline(metrics).startswith(f"r2 {metrics['r2']:.3f} (95 % clip bootstrap")
    page = write_report(tmp_path / "report", evaluation, metrics=metrics).read_text()
    assert "Per output" in page and "confusion" not in page.lower()
    with open(tmp_path / "report" / "predictions.csv", newline="") as file:
        row = next(csv.DictReader(file))
    clip = evaluation.clip_ids.index(row["clip_id"])
    assert float(row["truth_target2"]) == pytest.approx(evaluation.targets[clip, 1], rel=1e-4)
    assert float(row["predicted_target1"]) == pytest.approx(evaluation.scores[clip, 0], rel=1e-4)
    [predicted] = score_files(model, [tmp_path / "02.wav"])
    shown = json.loads("".join(render([predicted], model.label_names, "json", 1, model.task)))
    expected = dict(zip(model.label_names, evaluation.scores[0].tolist(), strict=True))
    assert shown[0]["values"] == pytest.approx(expected, abs=0.05)
    assert next(render([predicted], model.label_names, "table", 1, model.task)).count("target") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,targets\n00.wav,1|x\n", "line 2: targets '1|x' must be finite numbers"),
        ("path,targets\n00.wav,1|nan\n", "line 2: targets '1|nan' must be finite numbers"),
        ("path,targets\n00.wav,1|2\n01.wav,3\n", "line 3: 1 targets where the lines before have 2"),
        ("path,targets,label\n00.wav,1|2,a\n", "must name path and label"),
    ],
)
def test_wrong_numbers_are_named(factors, tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        load_dataset(dataset_options(factors))


@pytest.mark.parametrize(
    ("field", "value"), [("loss.name", "cross_entropy"), ("loss.class_weights", "balanced")]
)
def test_losses_of_labels_are_refused(factors, prepared, tmp_path, field, value):
    prepared(factors)
    factors.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match="no meaning for a regression"):
        train(factors, tmp_path / "run", progress=False)


def test_several_runs_have_reports_of_each_of_their_ensemble_and_a_summary(small_config, tmp_path):
    small_config.epochs = 1
    run, out = tmp_path / "run", tmp_path / "out"
    train(small_config, run, progress=False)
    alone = evaluate_runs([run], temperature="valid", neighbours=[1])
    assert alone.report == run / "evaluation-test" / "report.html" and not alone.leaks
    assert (alone.report.parent / "neighbours.json").is_file()
    assert any(line.startswith("temperature ") for line in alone.lines)
    both = evaluate_runs([run, run], out=out, arrays=tmp_path / "valid.npz", split="valid")
    assert both.lines[-1] == f"report: {both.report}" and both.report == out / "report.html"
    assert {path.parent.name for path in out.glob("*/report.html")} == {"run0", "run1", "ensemble"}
    one, other = (json.loads((out / n / "metrics.json").read_text()) for n in ("run1", "ensemble"))
    assert one["n"] == other["n"] == 9 and one["accuracy"] == other["accuracy"]
    assert other["config"]["models"] == [str(run)] * 2
    # All training clips again, under other names: the audit compares their content.
    leaked = evaluate_runs([run], out=out, arrays=tmp_path / "train.npz", split="test")
    assert leaked.leaks and any("LEAK" in line for line in leaked.lines)
    with pytest.raises(UserError, match="several --workdir need a folder"):
        evaluate_runs([run, run])
