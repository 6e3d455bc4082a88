import csv
import json

import numpy as np
import pytest
import soundfile

from musicgenre.config import base_config, dataset_options, store_path
from musicgenre.datasets import load_dataset
from musicgenre.errors import UserError
from musicgenre.evaluation.report import headline, measure, write_report
from musicgenre.inference.predict import render
from musicgenre.inference.windows import score_files
from musicgenre.runs.model import load_model
from musicgenre.store.store import Store
from musicgenre.studies.evaluate import evaluate_model
from musicgenre.training.fit import train


@pytest.fixture
def factors(tmp_path):
    """A config of a list of tones with two numbers each: their level, and how much noise is in them."""
    generator = np.random.default_rng(0)
    time = np.arange(16000) / 8000
    lines = ["path,targets,split"]
    for number in range(60):
        level, noise = generator.uniform(-1, 1, 2)
        sound = 0.2 * 10 ** (level / 2) * np.sin(2 * np.pi * 300 * time)
        sound += 0.01 * 10**noise * generator.standard_normal(len(time))
        soundfile.write(tmp_path / f"{number:02d}.wav", sound, 8000)
        lines.append(
            f"{number:02d}.wav,{level:.6f}|{noise:.6f},{'valid' if number % 3 == 2 else 'train'}"
        )
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    config = base_config()
    config.data.dataset = "csv"
    config.data.root = str(tmp_path / "list.csv")
    config.data.stores_root = str(tmp_path / "stores")
    config.data.frames = 64
    config.data.normalise = "band"
    config.features.update(sample_rate=8000, n_fft=512, hop_length=250, n_mels=24, db_ref="1.0")
    config.model.update(filters=(16,), dense=(32,), dropout=0.0)
    config.batch_size = 20
    config.epochs = 60
    config.eval_every = 20
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "constant"
    return config


def test_numbers_from_sound_files_to_a_report(factors, prepared, tmp_path):
    prepared(factors)
    store = Store.open(store_path(factors))
    assert (
        store.task == "regression"
        and store.label_names == ("target1", "target2")
        and store.values.shape == (60, 2)
    )
    result = train(factors, tmp_path / "run", progress=False)
    assert result.metric == "r2" and result.last > 0.8
    model = load_model(tmp_path / "run", "best")
    evaluation = evaluate_model(model, store, "valid")
    metrics = measure(evaluation)
    assert metrics["r2"] == pytest.approx(result.best, abs=1e-5)
    low, high = metrics["intervals"]["r2"]["bootstrap"]
    assert low < metrics["r2"] < high
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
    assert shown[0]["values"] == pytest.approx(
        dict(zip(model.label_names, evaluation.scores[0], strict=True)), abs=0.05
    )
    assert next(render([predicted], model.label_names, "table", 1, model.task)).count("target") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,targets\n00.wav,1|x\n", "line 2: targets '1|x' must be finite numbers"),
        ("path,targets\n00.wav,1|nan\n", "line 2: targets '1|nan' must be finite numbers"),
        ("path,targets\n00.wav,1|2\n01.wav,3\n", "line 3: 1 targets where the lines before have 2"),
        ("path,targets,label\n00.wav,1|2,a\n", "must name the columns path and label"),
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
