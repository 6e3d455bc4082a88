import numpy as np
import pytest
from scipy.special import softmax

from musicgenre.errors import UserError
from musicgenre.evaluation.calibration import cross_fitted, fit_temperature, risk_coverage, tempered
from musicgenre.evaluation.intervals import wilson


def sure_of_the_first(clips, right):
    """Clips with one window each, all predicted as class 0 with 0.9; the first `right` are."""
    return np.tile([[[0.9, 0.1]]], (clips, 1, 1)), np.where(np.arange(clips) < right, 0, 1)


def test_a_temperature_divides_the_logits():
    logits = np.random.default_rng(0).normal(size=(7, 3, 5))
    windows = softmax(logits, axis=-1)
    np.testing.assert_allclose(
        tempered(windows, 1.7), softmax(logits / 1.7, axis=-1).mean(axis=1), rtol=1e-12
    )
    np.testing.assert_array_equal(tempered(windows, 1.0), windows.mean(axis=1))
    # sqrt(0.8) and sqrt(0.2) are as 2 to 1; the other window is even, and stays so.
    assert tempered(np.array([[[0.8, 0.2], [0.5, 0.5]]]), 2.0) == pytest.approx(
        np.array([[7 / 12, 5 / 12]])
    )
    assert np.isfinite(tempered(np.array([[[1.0, 0.0]]]), 0.1)).all()


def test_the_fitted_temperature_by_hand():
    # Right for 3 of 4, so 0.9 should be 0.75: the logit ln 9 becomes ln 3.
    assert fit_temperature(*sure_of_the_first(4, 3)) == pytest.approx(2, rel=1e-4)
    assert fit_temperature(*sure_of_the_first(100, 99)) == pytest.approx(
        np.log(9) / np.log(99), rel=1e-4
    )
    # Nothing is sure enough where all are right; the search ends at its bound.
    assert fit_temperature(*sure_of_the_first(4, 4)) == pytest.approx(0.1, rel=0.01)
    with pytest.raises(UserError, match="0 clips with 0 labels"):
        fit_temperature(np.zeros((0, 1, 2)), np.zeros(0, int))


def test_the_temperature_of_a_mean_over_windows_is_the_best_one():
    generator = np.random.default_rng(1)
    logits = generator.normal(scale=3, size=(400, 4, 6))
    labels = np.array(
        [generator.choice(6, p=row) for row in softmax(logits.mean(axis=1) / 2, axis=-1)]
    )
    windows = softmax(logits, axis=-1)
    found = fit_temperature(windows, labels)

    def loss(temperature):
        return -np.log(
            softmax(logits / temperature, axis=-1).mean(axis=1)[np.arange(400), labels]
        ).mean()

    assert loss(found) < min(loss(1.02 * found), loss(0.98 * found), loss(1.0))


def test_no_clip_influences_its_own_temperature():
    # One artist's clips ask for 2, the other's for 1; each gets what the other asks for.
    (one, labels), (other, more) = sure_of_the_first(4, 3), sure_of_the_first(10, 9)
    scores, temperatures = cross_fitted(
        np.concatenate([one, other]), np.concatenate([labels, more]), ["a"] * 4 + ["b"] * 10
    )
    assert sorted(temperatures) == pytest.approx([1, 2], rel=1e-3)
    assert scores[:4, 0] == pytest.approx(np.full(4, 0.9), rel=1e-3)
    assert scores[4:, 0] == pytest.approx(np.full(10, 0.75), rel=1e-3)


def test_folds():
    windows, labels = sure_of_the_first(12, 9)
    assert len(cross_fitted(windows, labels)[1]) == 5
    assert len(cross_fitted(windows, labels, ["a", "b", "c"] * 4)[1]) == 3
    assert cross_fitted(windows, labels, ["a"] * 12) is None


def test_accuracy_against_coverage_by_hand():
    found = risk_coverage(np.array([0.6, 0.9, 0.7, 0.8]), np.array([0, 1, 1, 0]))
    # The most confident first: right, wrong, right, wrong.
    assert found["curve"]["coverage"] == [0.25, 0.5, 0.75, 1]
    assert found["curve"]["accuracy"] == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2])
    assert found["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert found["aurc_best"] == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)
    half, *rest = found["at"]
    assert half == {
        "target": 0.5,
        "coverage": 0.5,
        "n": 2,
        "accuracy": 0.5,
        "wilson": list(wilson(1, 2)),
        "threshold": 0.8,
    }
    assert [(row["target"], row["n"], row["threshold"]) for row in rest] == [
        (0.8, 4, 0.6),
        (0.9, 4, 0.6),
    ]
    with pytest.raises(UserError, match="at least one clip"):
        risk_coverage(np.zeros(0), np.zeros(0))


def test_the_order_of_equal_confidences_does_not_matter():
    generator = np.random.default_rng(2)
    confidence, correct = np.round(generator.random(300), 1), generator.integers(0, 2, 300)
    order = generator.permutation(300)
    found, other = (
        risk_coverage(confidence, correct),
        risk_coverage(confidence[order], correct[order]),
    )
    assert found["aurc"] == pytest.approx(other["aurc"], abs=1e-12) and found["at"] == other["at"]
    assert len(found["curve"]["accuracy"]) == 200
    even = risk_coverage(np.full(10, 0.3), np.arange(10) % 2)
    assert even["aurc"] == pytest.approx(0.5) and even["at"][0]["n"] == 10


def test_eight_tenths_of_ten_clips_are_eight():
    # In binary 0.8 * 10 and 0.9 * 10 might round past the number.
    assert [row["n"] for row in risk_coverage(np.arange(10) / 10, np.ones(10))["at"]] == [5, 8, 9]
