import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from musicgenre.errors import UserError
from musicgenre.evaluation.intervals import bootstrap_mean, wilson
from musicgenre.evaluation.robustness import Outcome, Robustness, headline, measure, write_report


def scores(*decisions, sure=0.8):
    """Probabilities of two classes that decide so."""
    table = np.full((len(decisions), 2), 1 - sure)
    table[np.arange(len(decisions)), list(decisions)] = sure
    return table


@pytest.fixture
def tested():
    """Six clips, four right. One change turns three of these and a wrong one; one turns none."""
    targets = np.array([0, 0, 0, 0, 1, 1])
    return Robustness(
        title="six clips",
        facts={"model": "a toy"},
        label_names=("no", "y|s <b>"),
        clip_ids=[f"clip{i}" for i in range(6)],
        groups=["a", "a", "b", "b", None, None],
        group_name="artist",
        targets=targets,
        before=scores(0, 0, 0, 0, 0, 0),
        outcomes=[
            Outcome("turned", False, "Turns four.", scores(1, 1, 1, 0, 1, 0)),
            Outcome("less sure", True, "Turns none.", scores(0, 0, 0, 0, 0, 0, sure=0.7)),
        ],
        equalised=np.stack(
            [scores(1, 0, 0, 0, 0, 0), scores(0, 1, 0, 0, 1, 0), scores(0, 0, 0, 0, 1, 1)]
        ),
        equaliser="gains",
        missing=[{"name": "mp3", "reason": "no encoder."}],
        skipped=[{"clip_id": "bad", "path": "bad.wav", "reason": "bad.wav: empty"}],
        notes=["a note"],
        command="python x",
    )


def test_measures_worked_by_hand(tested):
    found = measure(tested)
    assert (
        found["clips"] == 6
        and found["accuracy"] == pytest.approx(4 / 6)
        and found["unit"] == "artist"
    )
    calm, turned = found["transforms"]  # the irrelevant ones first
    assert (turned["name"], turned["kind"], calm["kind"]) == ("turned", "audible", "irrelevant")
    assert turned["changed"] == 4 and turned["share_changed_interval"] == list(wilson(4, 6))
    assert (turned["worse"], turned["better"]) == (3, 1)
    # Four clips differ; three or more of four on one side, both ways: 2 (4 + 1) / 16.
    assert turned["p"] == pytest.approx(10 / 16)
    assert turned["accuracy"] == pytest.approx(2 / 6) and turned[
        "accuracy_change"
    ] == pytest.approx(-2 / 6)
    difference = np.array([-1.0, -1, -1, 0, 1, 0])
    assert turned["accuracy_change_interval"] == list(bootstrap_mean(difference, tested.groups))
    # The true label goes from 0.8 to 0.2 three times, and from 0.2 to 0.8 once.
    assert turned["probability_change"] == pytest.approx(-2 * 0.6 / 6)
    assert calm["changed"] == 0 and calm["p"] == 1.0 and calm["accuracy_change"] == 0
    assert calm["probability_change"] == pytest.approx((-0.1 * 4 + 0.1 * 2) / 6)
    assert found["kinds"]["irrelevant"]["unchanged"]["count"] == 6
    assert found["kinds"]["audible"]["unchanged"]["count"] == 2
    assert found["kinds"]["audible"]["right_under_all"]["count"] == 1
    assert found["kinds"]["audible"]["worst"] == {"name": "turned", "share_changed": 4 / 6}
    searched = found["equalisers"]
    # Clips 0 and 1 can be made wrong, 4 and 5 right.
    assert searched["tries"] == 3 and searched["changed"]["count"] == 4
    assert searched["lowest"]["count"] == 2 and searched["lowest"]["interval"] == list(wilson(2, 6))
    assert searched["highest"]["count"] == 6
    lines = headline(found)
    assert (
        "66.7 %" in lines[0]
        and "6 of 6 clips (100.0 %)" in lines[1]
        and "turned, alters 66.7 %" in lines[2]
    )
    assert "as low as 33.3 %" in lines[3] and "as high as 100.0 %" in lines[3]


def test_without_labels_the_decision_before_is_followed(tested):
    found = measure(dataclasses.replace(tested, targets=None, groups=[None] * 6))
    turned = found["transforms"][1]
    assert turned["changed"] == 4 and turned["probability_change"] == pytest.approx(-4 * 0.6 / 6)
    assert (
        found["accuracy"]
        is turned["accuracy"]
        is turned["p"]
        is found["equalisers"]["lowest"]
        is None
    )
    assert found["unit"] == "clip" and found["kinds"]["audible"]["right_under_all"] is None
    assert len(headline(found)) == 3 and "ccuracy" not in " ".join(headline(found))


def test_one_artist_has_no_bootstrap_and_no_try_has_no_line(tested):
    found = measure(dataclasses.replace(tested, groups=["a"] * 6, equalised=np.zeros((0, 6, 2))))
    assert found["transforms"][1]["accuracy_change_interval"] is None
    assert found["equalisers"]["changed"]["count"] == 0 and len(headline(found)) == 3


def test_the_report_has_all_results(tested, tmp_path):
    assert write_report(tmp_path, tested, measure(tested)) == tmp_path / "robustness.md"
    text = (tmp_path / "robustness.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| turned"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["turned", "audible"] and cells[2].startswith("66.7 (30.0 to 90.3)")
    assert (
        cells[3] == "33.3"
        and cells[4].startswith("-33.3 (")
        and cells[5] == "3 / 1"
        and cells[6] == "0.62"
    )
    assert "+0.0 (+0.0 to +0.0)" in text and not re.search(
        r"-0\.0+(?!\d)", text
    )  # a rounded zero has no minus
    for part in ("mp3: no encoder.", "bad: bad.wav: empty", "a note", "python x", "Turns four."):
        assert part in text
    saved = json.loads((tmp_path / "robustness.json").read_text())
    assert saved["clip_results"][0]["changed_by"] == {"turned": "y|s <b>"}
    assert saved["clip_results"][3]["changed_by"] == {} and saved["skipped"][0]["clip_id"] == "bad"
    assert saved["transforms"] == measure(tested)["transforms"]
    page = (tmp_path / "report.html").read_text()
    assert (
        "data:image/png;base64," in page and "66.7 (30.0 to 90.3)" in page and "no encoder" in page
    )
    with Image.open(tmp_path / "robustness.png") as image:
        assert image.width > 1200 and np.asarray(image.convert("L")).std() > 10


def test_reports_on_synthetic_models_say_so_first(tested, tmp_path):
    synthetic = dataclasses.replace(tested, synthetic=True, targets=None)
    write_report(tmp_path, synthetic, measure(synthetic))
    assert (tmp_path / "robustness.md").read_text().startswith("# SYNTHETIC · six clips")
    assert "<strong>SYNTHETIC</strong>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_ids": []}, "no clip"),
        ({"before": np.zeros((6, 3))}, r"unchanged\) are \[6, 3\], not \[6, 2\]"),
        ({"groups": [None]}, "for each of the 6 clips"),
        ({"equalised": np.zeros((3, 5, 2))}, r"equalised\) are \[5, 2\]"),
    ],
)
def test_what_does_not_fit_together(tested, change, message):
    with pytest.raises(UserError, match=message):
        measure(dataclasses.replace(tested, **change))
