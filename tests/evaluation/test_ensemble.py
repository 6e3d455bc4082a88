import dataclasses

import numpy as np
import pytest

from musicgenre.errors import UserError
from musicgenre.evaluation.audit import AuditSide, audit
from musicgenre.evaluation.ensemble import ensemble
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
        "Mean of the probabilities (arithmetic, all weigh the same) of 2 models: s0, s1.",
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
    assert both.notes[0].startswith("Mean of the outputs ")


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
    with pytest.raises(UserError, match="not 0 with 0 names"):
        ensemble([], [])
