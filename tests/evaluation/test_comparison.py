import dataclasses
import json
import re

import numpy as np
import pytest

from musicgenre.errors import UserError
from musicgenre.evaluation.audit import AuditSide, audit
from musicgenre.evaluation.comparison import ensemble, summarise_seeds, summarise_variants
from musicgenre.evaluation.report import Evaluation, measure


def member(scores, **changes):
    values = dict(
        title="seed",
        dataset="gtzan",
        protocol="random",
        split="valid",
        task="single_label",
        label_names=("a", "b", "c"),
        clip_ids=["x", "y"],
        paths=["x", "y"],
        groups=["one", "two"],
        scores=np.array(scores),
        targets=np.array([0, 1]),
        curves=[{"step": 1, "train_loss": 1.0}],
        config={"seed": 0, "model": {"name": "conv1d", "width": 8}},
        checkpoint={"step": 7, "which": "last"},
        notes=["said by all"],
    )
    return Evaluation(**{**values, **changes})


FIRST = [[0.6, 0.4, 0.0], [0.5, 0.4, 0.1]]
SECOND = [[0.3, 0.3, 0.4], [0.1, 0.8, 0.1]]


def test_the_mean_of_the_probabilities_is_measured():
    other = member(
        SECOND,
        config={"seed": 1, "model": {"name": "conv1d", "width": 8}},
        checkpoint={"step": 9, "which": "last"},
    )
    both = ensemble([member(FIRST), other], ["s0", "s1"])
    np.testing.assert_allclose(both.scores, [[0.45, 0.35, 0.2], [0.3, 0.6, 0.1]])
    # Each alone is right once, both together twice.
    assert [measure(one)["accuracy"] for one in (member(FIRST), other, both)] == [0.5, 0.5, 1.0]
    assert both.config == {
        "models": ["s0", "s1"],
        "seed": [0, 1],
        "model": {"name": "conv1d", "width": 8},
    }
    assert both.checkpoint == {"step": "7, 9", "which": "last"} and both.curves == ()
    assert both.notes == [
        "Arithmetic mean of the probabilities of 2 models: s0, s1.",
        "said by all",
    ]
    assert both.windows.shape == (2, 2, 3)


def test_a_model_with_more_windows_weighs_no_more():
    windows = np.repeat(np.array(SECOND)[:, None], 3, axis=1)
    both = ensemble([member(FIRST), member(SECOND, windows=windows)], ["s0", "s1"])
    np.testing.assert_allclose(both.windows.mean(axis=1), both.scores)
    # As many windows each are all kept, so that a temperature is fitted on what it divides.
    kept = ensemble([member(FIRST, windows=windows), member(SECOND, windows=windows)], ["s0", "s1"])
    assert kept.windows.shape == (2, 6, 3)


def test_numbers_have_a_mean_too():
    values = dict(task="regression", targets=np.zeros((2, 3)), audit=None)
    both = ensemble([member(FIRST, **values), member(SECOND, **values)], ["s0", "s1"])
    assert measure(both, resamples=20)["mse"] == pytest.approx(
        np.square(np.add(FIRST, SECOND) / 2).mean()
    )
    assert both.notes[0].startswith("Arithmetic mean of the outputs ")


def test_the_audit_that_found_something_is_shown():
    side = AuditSide(["x", "y"], ["1", "2"], ["one", "two"])
    clean, leak = (
        audit(side, AuditSide(["z"], ["3"], ["three"])),
        audit(side, AuditSide(["x"], ["1"], ["one"])),
    )
    both = ensemble([member(FIRST, audit=clean), member(SECOND, audit=leak)], ["s0", "s1"])
    assert clean.clean and not both.audit.clean
    assert ensemble([member(FIRST, audit=clean), member(SECOND)], ["s0", "s1"]).audit is clean


def test_what_cannot_be_averaged_is_refused():
    first = member(FIRST)
    with pytest.raises(UserError, match="s0 and s1 were not evaluated on the same clips"):
        ensemble([first, dataclasses.replace(first, clip_ids=["x", "z"])], ["s0", "s1"])
    with pytest.raises(UserError, match="the labels of s0 and s1 differ"):
        ensemble([first, dataclasses.replace(first, label_names=("a", "b", "d"))], ["s0", "s1"])
    with pytest.raises(UserError, match="0 evaluations with 0 names"):
        ensemble([], [])


def test_summary_over_seeds(tmp_path):
    runs = [
        (f"seed {i}", {"accuracy": value, "macro_f1": 0.3, "macro_roc_auc": None if i else 0.7})
        for i, value in enumerate([0.4, 0.5, 0.6])
    ]
    clips = {"clip_ids": list(range(10)), "groups": ["x"] * 5 + ["y"] * 5, "synthetic": True}
    # The first 4, 5 and 6 clips are right.
    evaluations = [
        member(np.eye(3)[(np.arange(10) >= right).astype(int)], targets=np.zeros(10, int), **clips)
        for right in (4, 5, 6)
    ]
    path = summarise_seeds(tmp_path, runs, title="<b>seeds", evaluations=evaluations)
    page = path.read_text(encoding="utf-8")
    saved = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert saved["measures"]["accuracy"]["mean"] == pytest.approx(0.5)
    assert saved["measures"]["accuracy"]["interval"] == pytest.approx(
        [0.2515862, 0.7484138], abs=1e-6
    )
    assert saved["left_out"] == ["macro_roc_auc"]
    # The artists' means are (4 + 5 + 5) / 15 and 1 / 15; a bootstrap may draw one of them twice.
    assert saved["over_clips"]["bootstrap"] == pytest.approx([1 / 15, 14 / 15])
    assert saved["over_clips"]["bootstrap_unit"] == "artist"
    assert (
        "50.0 %" in page
        and "25.2-74.8" in page
        and "SYNTHETIC" in page
        and "&lt;b&gt;seeds" in page
    )
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "ensemble" not in page and "ensemble" not in saved


def test_the_ensemble_stands_beside_its_seeds(tmp_path):
    metrics = measure(member(FIRST), resamples=20)
    page = summarise_seeds(
        tmp_path, [("s0", metrics), ("s1", metrics)], title="x", ensemble=metrics
    ).read_text(encoding="utf-8")
    saved = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["ensemble"]
    assert saved["accuracy"] == 0.5 and saved["brier"] == metrics["brier"]
    assert saved["intervals"]["accuracy"]["wilson"] == pytest.approx(
        [0.0945312, 0.9054688], abs=1e-6
    )
    assert re.search(
        r"accuracy of the ensemble.*\s*<b>50\.0 %</b><span class=.small.>95 % Wilson 9\.5-90\.5 ·",
        page,
    )


def test_summary_of_variants(tmp_path):
    page = summarise_variants(
        tmp_path,
        {
            "base": [("s0", {"accuracy": 0.4, "ece": 0.1}), ("s1", {"accuracy": 0.6, "ece": 0.1})],
            "wide": [("s0", {"accuracy": 0.7})],
        },
        title="ablation",
    ).read_text(encoding="utf-8")
    saved = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert saved["variants"]["base"]["measures"]["accuracy"]["std"] == pytest.approx(np.sqrt(0.02))
    assert saved["variants"]["wide"]["measures"] == {
        "accuracy": {"n": 1, "mean": 0.7, "std": None, "interval": None, "values": [0.7]}
    }
    assert saved["left_out"] == ["ece"]
    assert (tmp_path / "variants.png").is_file()
    assert "50.0 % ± 14.1 %" in page


def test_summaries_of_runs_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="at least one run"):
        summarise_seeds(tmp_path, [], title="x")
    runs = [("a", {"accuracy": 0.5}), ("b", {"macro_roc_auc": 0.5})]
    with pytest.raises(UserError, match="the runs a, b have no measure in common"):
        summarise_seeds(tmp_path, runs, title="x")
