import csv
import dataclasses
import json
import re

import numpy as np
import pytest

from musicgenre.errors import UserError
from musicgenre.evaluation.audit import AuditSide, audit
from musicgenre.evaluation.intervals import wilson
from musicgenre.evaluation.report import (
    Evaluation,
    calibration_line,
    headline,
    measure,
    write_report,
)

NASTY = "<script>alert(1)</script>"


def single(**changes):
    """Ten clips of two classes, eight right; the most confident mistake has the nasty name."""
    labels = np.array([0, 1] * 5)
    right = np.where(np.arange(10) < 8, 0.8, 0.3)
    right[9] = 0.05
    scores = np.where(np.eye(2, dtype=bool)[labels], right[:, None], 1 - right[:, None])
    values = dict(
        title="a & b",
        dataset="gtzan",
        protocol="fault_filtered",
        split="valid",
        task="single_label",
        label_names=("blues", "ro,ck"),
        clip_ids=[*(f"clip{9 - i}" for i in range(9)), NASTY],
        paths=[f"/data/{i}.wav" for i in range(10)],
        scores=scores,
        targets=labels,
        groups=["x", "x", "y", "y", "z", "z", "w", "w", None, None],
        config={"model": {"name": "conv1d"}, "note": NASTY},
        curves=[
            {"step": 1, "train_loss": 1.0},
            {"step": 2, "valid_loss": 1.1, "valid_accuracy": 0.5},
        ],
        checkpoint={"step": 2, "which": "last", "selected_on": None},
        command="evaluate --workdir=x",
    )
    return Evaluation(**{**values, **changes})


def tagging(**changes):
    scores = np.array([[0.9, 0.6, 0.1], [0.8, 0.2, 0.3], [0.3, 0.7, 0.2], [0.6, 0.1, 0.4]])
    targets = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0]])
    values = dict(
        title="tags",
        dataset="mtat",
        protocol="clean",
        split="test",
        task="multi_label",
        label_names=("rock", "vocal", "never"),
        clip_ids=list("dcba"),
        paths=list("dcba"),
        groups=[None] * 4,
        scores=scores,
        targets=targets,
    )
    return Evaluation(**{**values, **changes})


def test_files_and_numbers(tmp_path):
    path = write_report(tmp_path / "out", single(), resamples=200)
    assert path == tmp_path / "out" / "report.html"
    assert {file.name for file in path.parent.iterdir()} == {
        "metrics.json",
        "predictions.csv",
        "report.html",
        "curves.png",
        "confusion.png",
        "per_class.png",
        "roc.png",
        "reliability.png",
        "abstention.png",
    }
    text = (path.parent / "metrics.json").read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text
    saved = json.loads(text)
    assert saved["accuracy"] == 0.8
    assert saved["intervals"]["accuracy"]["wilson"] == pytest.approx(
        [0.4901625, 0.9433178], abs=1e-6
    )
    assert saved["intervals"]["bootstrap_unit"] == "artist"
    assert saved["intervals"]["bootstrap_units"] == 6
    measured = measure(single(), resamples=200)
    assert {key: saved[key] for key in measured} == json.loads(json.dumps(measured))
    assert headline(saved) == saved["headline"]


def test_html_stands_alone_and_escapes(tmp_path):
    page = write_report(tmp_path, single(), resamples=50).read_text(encoding="utf-8")
    for target in re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", page):
        assert target.startswith(("data:image/png;base64,", "#"))
    assert not re.search(r"url\(|@import|<link|<script", page)
    assert NASTY not in page
    assert page.count("&lt;script&gt;") == 2
    assert "a &amp; b" in page
    assert "prefers-color-scheme: dark" in page
    assert "80.0 %" in page and "49.0-94.3" in page.replace("\u2011", "-")
    assert "SYNTHETIC" not in page
    assert re.search(r'0\.800\s*<span class="small">0\.376-0\.964</span>', page)


def test_predictions_are_sorted_and_readable(tmp_path):
    write_report(tmp_path, single(), resamples=20)
    with open(tmp_path / "predictions.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert list(rows[0]) == [
        "clip_id",
        "split",
        "truth",
        "predicted",
        "correct",
        "p_blues",
        "p_ro,ck",
    ]
    assert [row["clip_id"] for row in rows] == sorted(single().clip_ids)
    assert sum(int(row["correct"]) for row in rows) == 8
    assert list(rows[0].values()) == [NASTY, "valid", "ro,ck", "blues", "0", "0.950000", "0.050000"]


def test_the_most_confident_mistakes_come_first(tmp_path):
    page = write_report(tmp_path, single(), resamples=20).read_text(encoding="utf-8")
    section = page[page.index("Most confident mistakes") : page.index("Leakage audit")]
    assert re.findall(r'class="path">([^<]+)<', section) == ["/data/9.wav", "/data/8.wav"]
    assert "0.950" in section and "0.700" in section


def test_multi_label(tmp_path):
    page = write_report(tmp_path, tagging(), resamples=100).read_text(encoding="utf-8")
    assert "1 of 3 tags (never)" in page
    assert "Confusion" not in page
    saved = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert saved["macro_roc_auc"] == pytest.approx(0.75)
    assert saved["intervals"]["bootstrap_unit"] == "clip"
    with open(tmp_path / "predictions.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["clip_id"], row["truth"], row["predicted"], row["correct"]) for row in rows] == [
        ("a", "", "rock", "0"),
        ("b", "rock|vocal", "vocal", "0"),
        ("c", "", "rock", "0"),
        ("d", "rock|vocal", "rock|vocal", "1"),
    ]


def quick(evaluation, **arguments):
    return measure(evaluation, resamples=10, **arguments)


def test_each_class_has_an_interval_of_its_recall():
    # Both have five clips and four right; of the tags "rock" has 1 of 2, and "never" has none.
    assert [row["recall_wilson"] for row in quick(single())["per_class"]] == [
        pytest.approx(wilson(4, 5))
    ] * 2
    found = [row["recall_wilson"] for row in quick(tagging())["per_class"]]
    assert found == [pytest.approx(wilson(1, 2)), pytest.approx(wilson(2, 2)), None]


def test_abstention_is_measured_where_there_is_one_label():
    found = quick(single())["abstention"]
    # The most confident is wrong, then come the eight that are right.
    assert found["curve"]["accuracy"] == pytest.approx(
        [0, *(i / (i + 1) for i in range(1, 9)), 0.8]
    )
    assert [row["n"] for row in found["at"]] == [9, 9, 9] and found["at"][0]["threshold"] == 0.8


def test_a_temperature_fitted_on_the_evaluated_clips_is_noted(tmp_path):
    metrics = quick(single(), calibration=single())
    found = metrics["calibration"]
    assert found["shared"] == 10 and found["fitted_on"] == "fitted on valid (10 clips of gtzan)"
    assert found["before"]["nll"] == pytest.approx(metrics["nll"]) and found["before"][
        "ece"
    ] == pytest.approx(metrics["ece"])
    # Fitted on the very clips it can only gain, and more than one that is fitted on others.
    assert (
        found["after"]["nll"] < found["before"]["nll"]
        and found["after"]["nll"] < found["cross_fitted"]["nll"]
    )
    assert len(found["cross_fitted"]["temperatures"]) == 5
    page = write_report(tmp_path, single(), metrics=metrics).read_text(encoding="utf-8")
    assert "fitted on the evaluated clips themselves" in page and "5 folds of the artists" in page
    assert (tmp_path / "reliability_after.png").is_file() and page.count("data:image/png") == 7
    summary = calibration_line(metrics)
    assert summary.startswith(
        f"temperature {found['temperature']:.3f}, fitted on valid (10 clips of gtzan): calibration "
        "error before "
    )
    # All other measures are without it.
    plain = quick(single())
    assert {
        key: value for key, value in metrics.items() if key != "calibration"
    } == plain and calibration_line(plain) == ""


def test_a_temperature_fitted_elsewhere_or_given(tmp_path):
    other = single(clip_ids=[f"other{i}" for i in range(10)], split="test")
    found = quick(single(), calibration=other)["calibration"]
    assert (found["shared"], found["cross_fitted"], found["fitted_on"]) == (
        0,
        None,
        "fitted on test (10 clips of gtzan)",
    )
    trained = quick(single(), calibration=single(split="train", clip_ids=other.clip_ids))[
        "calibration"
    ]
    assert "too confident" in trained["fitted_on"]
    some = single(clip_ids=[*(f"clip{i}" for i in range(1, 4)), *(f"other{i}" for i in range(7))])
    page = write_report(tmp_path, single(), metrics=quick(single(), calibration=some)).read_text(
        encoding="utf-8"
    )
    assert (
        "fitted on 3 of the 10 evaluated clips" in page and "evaluated clips themselves" not in page
    )
    found = quick(single(), calibration=2.0)["calibration"]
    assert (found["temperature"], found["fitted_on"]) == (2.0, "given")
    # 0.8 becomes 2/3, as sqrt(0.8) and sqrt(0.2) are as 2 to 1; the two that are wrong likewise.
    before = np.array([0.8] * 8 + [0.3, 0.05])
    assert found["after"]["nll"] == pytest.approx(
        -np.log(before**0.5 / (before**0.5 + (1 - before) ** 0.5)).mean()
    )


def test_a_temperature_comes_on_top_of_the_models_own():
    scored = single(temperature=1.5)
    plain, on_top = (quick(one, calibration=one)["calibration"] for one in (single(), scored))
    assert on_top["temperature"] == pytest.approx(1.5 * plain["temperature"])
    assert on_top["after"] == plain["after"]
    assert on_top["cross_fitted"]["temperatures"] == pytest.approx(
        [1.5 * t for t in plain["cross_fitted"]["temperatures"]]
    )
    # The one that it has already changes nothing.
    found = quick(scored, calibration=1.5)
    assert found["calibration"]["after"]["nll"] == pytest.approx(found["nll"])


def test_tags_and_numbers_take_no_temperature():
    numbers = tagging(task="regression")
    for one in (tagging(), numbers):
        found = quick(one, calibration=one)
        assert (
            found == quick(one)
            and not {"abstention", "calibration", "ece_by_chance", "brier"} & found.keys()
        )


def test_headline():
    line = headline(measure(single(), resamples=200))
    expected = (
        r"accuracy 80\.0 % \(95 % Wilson 49\.0-94\.3, artist bootstrap [\d.]+-[\d.]+\), 10 clips"
    )
    assert re.fullmatch(expected, line)
    assert headline({"accuracy": 0.5, "n": 4}) == "accuracy 50.0 %, 4 clips"
    line = headline(measure(tagging(), resamples=100))
    assert line.startswith("macro ROC-AUC 0.750 (95 % clip bootstrap ")
    assert line.endswith("4 clips, 3 tags, tags left out of the means: 1")


def test_one_clip_alone_can_be_reported(tmp_path):
    one = single(
        clip_ids=["a"],
        paths=["a"],
        groups=[None],
        scores=np.array([[0.6, 0.4]]),
        targets=np.array([0]),
        curves=(),
    )
    write_report(tmp_path, one, resamples=20)
    saved = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert saved["macro_roc_auc"] is None
    assert saved["intervals"]["accuracy"]["bootstrap"] is None
    assert saved["undefined"] == ["blues", "ro,ck"]


def test_the_page_shows_all_warnings(tmp_path):
    evaluation = single()
    ids, groups = evaluation.clip_ids, evaluation.groups
    leak = audit(AuditSide(ids, ids, groups), AuditSide(["clip9", "q"], ["h", "i"], [None, "y"]))
    skipped = [
        {"clip_id": "jazz.00054", "path": "/data/jazz.00054.wav", "reason": "cannot be decoded"}
    ]
    checkpoint = {"step": 7, "which": "best", "selected_on": "valid accuracy"}
    told = dataclasses.replace(
        evaluation, synthetic=True, audit=leak, skipped=skipped, checkpoint=checkpoint
    )
    page = write_report(tmp_path, told, resamples=20).read_text(encoding="utf-8")
    for words in (
        "SYNTHETIC",
        "trained on some of what it is evaluated on",
        "same clip: 1 of 10",
        "same artist: 2 of 10",
        "1 × cannot be decoded",
        "jazz.00054",
        "best, step 7",
        "model.name",
        "The artist is unknown for 2 of 10 clips",
    ):
        assert words in page, words
    assert (
        json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["audit"]["clean"]
        is False
    )


def test_refusals():
    with pytest.raises(UserError, match="10 clip ids but 9 paths"):
        measure(single(paths=["x"] * 9))
    with pytest.raises(UserError, match="'a' occurs more than once"):
        measure(single(clip_ids=["a"] * 10))
    with pytest.raises(UserError, match="task must be"):
        measure(single(task="ranking"))
