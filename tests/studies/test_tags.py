import json

import numpy as np
import pytest
import soundfile

from musicgenre.config import base_config, store_path
from musicgenre.evaluation.report import write_report
from musicgenre.inference.windows import score_files
from musicgenre.runs.model import load_model
from musicgenre.store.store import Store
from musicgenre.studies.evaluate import evaluate_model
from musicgenre.training.fit import train


@pytest.fixture
def tagged(tmp_path):
    """Sound files with any of the tags low (a 200 Hz tone), high (3 kHz) and noisy, listed in a CSV file."""
    generator = np.random.default_rng(0)
    time = np.arange(16000) / 8000
    lines = ["path,labels,split"]
    for number in range(48):
        tags = [tag for bit, tag in enumerate(("low", "high", "noisy")) if number >> bit & 1]
        sound = 1e-3 * generator.standard_normal(len(time))
        sound += 0.3 * np.sin(2 * np.pi * 200 * time) * ("low" in tags) + 0.3 * np.sin(
            2 * np.pi * 3000 * time
        ) * ("high" in tags)
        sound += 0.05 * generator.standard_normal(len(time)) * ("noisy" in tags)
        soundfile.write(tmp_path / f"{number:02d}.wav", sound, 8000)
        lines.append(
            f"{number:02d}.wav,{'|'.join(tags)},{('train', 'train', 'valid')[number // 8 % 3]}"
        )
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_tags_from_sound_files_to_a_report(tagged, prepared, tmp_path):
    config = base_config()
    config.data.dataset = "csv"
    config.data.root = str(tagged / "list.csv")
    config.data.stores_root = str(tmp_path / "stores")
    config.data.frames = 64
    config.data.normalise = "band"
    config.features.update(sample_rate=8000, n_fft=512, hop_length=250, n_mels=24)
    config.model.update(filters=(16,), dense=(32,), dropout=0.0)
    config.batch_size = 16
    config.epochs = 40
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "constant"
    prepared(config)
    result = train(config, tmp_path / "run", progress=False)
    assert result.metric == "macro_roc_auc" and result.last > 0.95
    model = load_model(tmp_path / "run", "best")
    evaluation = evaluate_model(model, Store.open(store_path(config)), "valid")
    assert evaluation.targets.shape == (16, 3) and model.label_names == ("high", "low", "noisy")
    write_report(tmp_path / "report", evaluation)
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["task"] == "multi_label" and metrics["macro_roc_auc"] == pytest.approx(
        result.best, abs=1e-6
    )
    assert metrics["checkpoint"]["selected_on"].startswith("validation macro_roc_auc")
    both = next(score_files(model, [tagged / "03.wav"])).probabilities
    assert both[0] > 0.5 and both[1] > 0.5 and both[2] < 0.5
