import json
import math

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn import metrics as sk

from musicgenre.errors import UserError
from musicgenre.evaluation.metrics import (
    average_by_clip,
    ece_by_chance,
    multi_label_metrics,
    regression_metrics,
    single_label_metrics,
    weighted_macro_aucs,
    weighted_r2,
)

# Four clips of three classes, worked by hand below.
SCORES = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.1, 0.8, 0.1], [0.05, 0.25, 0.7]])
LABELS = np.array([0, 1, 1, 0])
NAMES = ("a", "b", "c")


def random_softmax(clips=60, classes=5, seed=0):
    generator = np.random.default_rng(seed)
    exponent = np.exp(generator.normal(size=(clips, classes)))
    return exponent / exponent.sum(axis=1, keepdims=True), generator.integers(classes, size=clips)


def rank_auc(truth, scores):
    """ROC-AUC as the Mann-Whitney statistic."""
    positives = truth.sum()
    ranks = rankdata(scores)[truth == 1].sum()
    return (ranks - positives * (positives + 1) / 2) / (positives * (len(truth) - positives))


def test_single_label_by_hand():
    measured = single_label_metrics(SCORES, LABELS, NAMES)
    assert measured["n"] == 4
    assert measured["accuracy"] == 0.5
    assert measured["balanced_accuracy"] == 0.5
    assert measured["confusion"] == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]
    # a: precision 1/2, recall 1/2; b: precision 1, recall 1/2.
    assert measured["macro_precision"] == 0.75
    assert measured["macro_f1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert measured["nll"] == pytest.approx(-np.mean(np.log([0.7, 0.35, 0.8, 0.05])))
    # Squared differences of the first clip: .09 + .04 + .01; of the second: .16 + .4225 + .0625.
    assert measured["brier"] == pytest.approx((0.14 + 0.645 + 0.06 + 1.455) / 4)
    assert measured["undefined"] == ["c"]
    assert measured["undefined_count"] == 1
    assert measured["per_class"][2] == {
        "label": "c",
        "support": 0,
        "predicted": 1,
        "precision": 0.0,
        "recall": None,
        "f1": 0.0,
        "roc_auc": None,
        "pr_auc": None,
    }
    assert measured["top3_accuracy"] is None


def test_calibration_error_by_hand():
    # Highest probabilities .7 (right), .4 (wrong), .8 (right), .7 (wrong): the two of .7 share a
    # bin, right half of the time, so the error is (|.5 - .7| * 2 + |0 - .4| + |1 - .8|) / 4.
    measured = single_label_metrics(SCORES, LABELS, NAMES)
    assert measured["ece"] == pytest.approx((0.4 + 0.4 + 0.2) / 4)
    bins = measured["reliability"]
    assert len(bins) == 15
    assert [row["n"] for row in bins if row["n"]] == [1, 2, 1]
    assert (bins[10]["low"], bins[10]["high"]) == (10 / 15, 11 / 15)
    assert (bins[10]["confidence"], bins[10]["accuracy"]) == (pytest.approx(0.7), 0.5)
    assert bins[0]["accuracy"] is None


def test_few_clips_show_a_calibration_error_by_chance():
    # For one clip of 0.5 it is 0.5, right or wrong; for n clips in one bin, the mean absolute
    # deviation of a binomial proportion.
    assert ece_by_chance(np.array([0.5])) == 0.5
    assert ece_by_chance(np.full(400, 0.5)) == pytest.approx(
        np.sqrt(2 * 0.25 / (np.pi * 400)), rel=0.15
    )
    assert ece_by_chance(np.ones(50)) == 0


def test_single_label_agrees_with_scikit_learn():
    scores, labels = random_softmax()
    measured = single_label_metrics(scores, labels, list("abcde"))
    predicted = scores.argmax(axis=1)
    assert measured["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert measured["balanced_accuracy"] == pytest.approx(
        sk.balanced_accuracy_score(labels, predicted)
    )
    assert measured["macro_precision"] == pytest.approx(
        sk.precision_score(labels, predicted, average="macro", zero_division=0)
    )
    assert measured["macro_f1"] == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    assert measured["top3_accuracy"] == pytest.approx(sk.top_k_accuracy_score(labels, scores, k=3))
    assert measured["nll"] == pytest.approx(sk.log_loss(labels, scores))
    assert measured["macro_roc_auc"] == pytest.approx(
        np.mean([rank_auc((labels == k).astype(int), scores[:, k]) for k in range(5)])
    )


def test_a_class_never_predicted_counts_as_precision_zero():
    scores = np.array([[0.9, 0.1], [0.8, 0.2]])
    measured = single_label_metrics(scores, np.array([0, 1]), ["a", "b"])
    assert measured["macro_precision"] == 0.25
    assert measured["per_class"][1]["precision"] is None


@pytest.mark.parametrize("clips", [1, 5])
def test_one_class_present_gives_none_and_no_nan(clips):
    scores = np.tile([[0.2, 0.5, 0.2, 0.1]], (clips, 1))
    measured = single_label_metrics(scores, np.ones(clips, int), list("abcd"))
    assert measured["macro_roc_auc"] is None
    assert measured["macro_pr_auc"] is None
    assert measured["undefined"] == list("abcd")
    assert measured["accuracy"] == 1.0
    json.dumps(measured, allow_nan=False)


def test_a_certain_mistake_has_a_finite_loss():
    measured = single_label_metrics(np.array([[1.0, 0.0]]), np.array([1]), ["a", "b"])
    assert measured["nll"] == pytest.approx(-math.log(1e-12))


def multi_label_case():
    scores = np.array(
        [[0.9, 0.6, 0.1, 0.7], [0.8, 0.2, 0.3, 0.6], [0.3, 0.7, 0.2, 0.9], [0.6, 0.1, 0.4, 0.8]]
    )
    targets = np.array([[1, 1, 0, 1], [0, 0, 0, 1], [1, 1, 0, 1], [0, 0, 0, 1]])
    return scores, targets, ("rock", "vocal", "never", "always")


def test_multi_label_by_hand():
    measured = multi_label_metrics(*multi_label_case())
    # rock: positives .9 and .3 against .8 and .6 win 2 of 4 pairs; vocal: all 4.
    assert measured["macro_roc_auc"] == pytest.approx((0.5 + 1) / 2)
    # rock: precision 1 at recall 1/2, 2/4 at recall 1; vocal: 1.
    assert measured["macro_pr_auc"] == pytest.approx(((1 + 0.5) / 2 + 1) / 2)
    # At .5: rock 1 hit, 3 chosen, 2 there; vocal 2, 2, 2; never 0, 0, 0; always 4, 4, 4.
    assert measured["macro_f1"] == pytest.approx((2 / 5 + 1) / 2)
    assert measured["micro_f1"] == pytest.approx(2 * 7 / (9 + 8))


def test_undefined_tags_are_listed_and_left_out():
    measured = multi_label_metrics(*multi_label_case())
    assert measured["undefined"] == ["never", "always"]
    assert measured["undefined_count"] == 2
    assert measured["per_class"][2]["roc_auc"] is None
    json.dumps(measured, allow_nan=False)


def test_multi_label_calibration_by_hand():
    scores, targets = np.array([[0.1, 0.9], [0.9, 0.5]]), np.array([[0, 1], [0, 1]])
    measured = multi_label_metrics(scores, targets, ("a", "b"))
    # Bins: .1 (never there), .5 (always there), .9 twice (there once).
    assert measured["ece"] == pytest.approx((0.1 + 0.5 + 2 * 0.4) / 4)


def test_weighted_aucs_agree_with_scikit_learn_on_ties_and_weights():
    generator = np.random.default_rng(3)
    scores = np.round(generator.random((80, 4)), 1)
    targets = generator.integers(0, 2, (80, 4))
    weights = generator.integers(0, 4, 80)
    roc, pr = weighted_macro_aucs(scores, targets)(weights)
    settings = {"average": "macro", "sample_weight": weights}
    assert roc == pytest.approx(sk.roc_auc_score(targets, scores, **settings))
    assert pr == pytest.approx(sk.average_precision_score(targets, scores, **settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scores=SCORES[:, :2]), r"scores must have the shape \[4, 3\], not \[4, 2\]"),
        (dict(scores=SCORES[:0], labels=LABELS[:0]), "nothing to measure"),
        (
            dict(scores=np.where(SCORES == 0.8, np.nan, SCORES)),
            "clip 2 has nan for 'b', which is not a number",
        ),
        (
            dict(scores=np.where(SCORES == 0.8, 1.5, SCORES)),
            r"clip 2 has 1.5 for 'b', which is outside",
        ),
        (dict(scores=SCORES / 2), "clip 0 sums to 0.5000"),
        (dict(labels=LABELS[:3]), "labels must have the shape"),
        (dict(labels=LABELS.astype(float)), "labels must be integers"),
        (dict(labels=np.array([0, 1, 3, 0])), "clip 2 has the label 3"),
    ],
)
def test_single_label_refuses(change, message):
    with pytest.raises(UserError, match=message):
        single_label_metrics(**{"scores": SCORES, "labels": LABELS, "label_names": NAMES, **change})


def test_multi_label_refuses_other_targets():
    scores, targets, names = multi_label_case()
    with pytest.raises(UserError, match="targets must have the shape"):
        multi_label_metrics(scores, targets[:2], names)
    with pytest.raises(UserError, match="clip 0 has 2 for 'rock', which is not 0 or 1"):
        multi_label_metrics(scores, targets + targets, names)


def test_a_regressions_measures_equal_scikit_learns():
    generator = np.random.default_rng(0)
    truth = generator.standard_normal((40, 3))
    guess = truth * [1.0, 0.5, 0.0] + 0.3 * generator.standard_normal((40, 3))
    got = regression_metrics(guess, truth, ("a", "b", "c"))
    assert got["r2"] == pytest.approx(sk.r2_score(truth, guess)) and got["mse"] == pytest.approx(
        ((guess - truth) ** 2).mean()
    )
    assert got["correlation"] == pytest.approx(
        np.mean([np.corrcoef(guess[:, i], truth[:, i])[0, 1] for i in range(3)])
    )
    assert got["per_class"][2]["r2"] < 0 < got["per_class"][0]["r2"] and got["outputs"] == 3
    # Weights are repetitions.
    weights = generator.integers(0, 4, 40)
    repeated = regression_metrics(
        np.repeat(guess, weights, axis=0), np.repeat(truth, weights, axis=0), ("a", "b", "c")
    )
    assert weighted_r2(guess, truth)(weights) == pytest.approx((repeated["r2"], repeated["mse"]))


def test_a_constant_output_is_left_out_of_r2():
    truth = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    got = regression_metrics(truth + np.array([0.0, 1.0]), truth, ("moves", "constant"))
    assert got["undefined"] == ["constant"] and got["r2"] == 1.0 and got["mse"] == 0.5
    with pytest.raises(UserError, match="predictions: clip 1 has nan for 'moves'"):
        regression_metrics(truth * [[1, 1], [np.nan, 1], [1, 1]], truth, ("moves", "constant"))


def test_the_mean_over_windows_in_any_order():
    scores = np.array([[0.2, 0.8], [1.0, 0.0], [0.4, 0.6], [0.6, 0.4]], np.float32)
    average = average_by_clip(scores, np.array([1, 0, 1, 1]), 2)
    np.testing.assert_allclose(average, [[1, 0], [0.4, 0.6]], rtol=1e-6)
    assert average.dtype == np.float64
    with pytest.raises(UserError, match="1 of 3 clips have no window, the first is clip 1"):
        average_by_clip(scores, np.array([0, 0, 2, 2]), 3)
