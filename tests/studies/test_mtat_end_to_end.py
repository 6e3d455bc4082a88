"""The whole way on a small tree in MagnaTagATune's layout with made-up audio: prepare, train a narrow FCN-4, measure each tag."""

import json

import numpy as np
import pytest
from mtat_tree import make_mtat_tree
from sklearn.metrics import average_precision_score, roc_auc_score

from musicgenre.config import base_config, store_path
from musicgenre.evaluation.report import headline, measure, write_report
from musicgenre.runs.model import load_model
from musicgenre.store.store import Store
from musicgenre.studies.evaluate import evaluate_model
from musicgenre.training.fit import train


def test_from_mp3s_to_the_auc_of_every_tag(tmp_path, prepared):
    make_mtat_tree(tmp_path / "mtat", clips=60, seconds=2.0, empty=1)
    config = base_config()
    config.data.dataset = "mtat"
    config.data.root = str(tmp_path / "mtat")
    config.data.stores_root = str(tmp_path / "stores")
    config.data.protocol = "clean"
    config.data.top_k = 12
    config.data.normalise = "band"
    # FCN-4's own pools need 1280 frames x 96 bands; these are a tenth of the frames.
    config.data.frames = 128
    config.features.update(sample_rate=12000, n_fft=512, hop_length=256, n_mels=96)
    config.model.update(
        name="fcn",
        filters=(8, 16, 24, 32),
        time_pools=(4, 4, 4, 2),
        band_pools=(2, 4, 3, 4),
        dropout=0.0,
    )
    config.batch_size = 10
    config.epochs = 40
    config.eval_every = 40
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "constant"

    summary = prepared(config)
    assert [entry["reason"].endswith("empty file (0 bytes).") for entry in summary.skipped] == [
        True
    ]
    store = Store.open(store_path(config))
    assert store.group_name == "track" and len(store.label_names) == 12
    result = train(config, tmp_path / "run", progress=False)
    # Half of the made-up tags follow from the sound of a style: far above chance after a few epochs.
    assert result.metric == "macro_roc_auc" and result.last > 0.7
    evaluation = evaluate_model(load_model(tmp_path / "run"), store, "test")
    metrics = measure(evaluation)
    for number, row in enumerate(metrics["per_class"]):
        truth, scores = (
            np.asarray(evaluation.targets)[:, number],
            np.asarray(evaluation.scores)[:, number],
        )
        assert row["roc_auc"] == pytest.approx(roc_auc_score(truth, scores))
        assert row["pr_auc"] == pytest.approx(average_precision_score(truth, scores))
    assert metrics["macro_pr_auc"] == pytest.approx(
        np.mean([row["pr_auc"] for row in metrics["per_class"]])
    )
    assert metrics["intervals"]["bootstrap_unit"] == "track" and "track bootstrap" in headline(
        metrics
    )
    assert evaluation.audit.clean and evaluation.audit.group_name == "track"
    write_report(tmp_path / "report", evaluation, metrics=metrics)
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["tags"] == 12
