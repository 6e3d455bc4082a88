"""Calibration of a classifier by one temperature, and its accuracy where it may abstain."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from sklearn.model_selection import GroupKFold

from musicgenre.errors import UserError
from musicgenre.evaluation.intervals import clusters, wilson

# The range of a fitted temperature.
BOUNDS = (0.1, 10.0)
FOLDS = 5
# Fractions of the clips for which reports give the accuracy.
COVERAGES = (0.5, 0.8, 0.9)
_MOST_POINTS = 200


def tempered(windows: np.ndarray, temperature: float) -> np.ndarray:
    """Returns the probabilities of clips after dividing the logits by a temperature.

    A clip's probabilities are the mean over its windows (and over the models of an ensemble). The
    logarithms of the probabilities are the logits up to a constant.

    Args:
      windows: probabilities of each window, `[clips, windows, classes]`.
      temperature: above 1 makes them less confident, 1 leaves them as they are.

    Returns:
      float64 `[clips, classes]`.

    Examples:
      >>> tempered(np.array([[[0.8, 0.2]]]), 2.0).round(3).tolist()
      [[0.667, 0.333]]
    """
    windows = np.asarray(windows, np.float64)
    if temperature != 1:
        logits = np.log(np.maximum(windows, np.finfo(np.float32).tiny))
        windows = softmax(logits / temperature, axis=-1)
    mean: np.ndarray = windows.mean(axis=1)
    return mean


def fit_temperature(windows: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature in `BOUNDS` with the smallest negative log likelihood.

    After Guo et al. 2017, arXiv:1706.04599. The windows are those of `tempered`; labels are class
    numbers, integers `[clips]`.

    Raises:
      UserError: no clips, or another number of labels.
    """
    labels, clips = np.asarray(labels), len(windows)
    if not clips or clips != len(labels):
        raise UserError(f"no temperature can be fitted on {clips} clips with {len(labels)} labels.")

    def loss(log_temperature: float) -> float:
        truth = tempered(windows, np.exp(log_temperature))[np.arange(clips), labels]
        return float(-np.log(np.clip(truth, 1e-12, 1)).mean())

    found = minimize_scalar(loss, bounds=np.log(BOUNDS), method="bounded", options={"xatol": 1e-5})
    return float(np.exp(found.x))


def cross_fitted(
    windows: np.ndarray, labels: np.ndarray, groups: Sequence[str | None] | None = None
) -> tuple[np.ndarray, list[float]] | None:
    """Returns probabilities with temperatures that were each fitted on other clips.

    The clips are divided into `FOLDS` folds, keeping groups (see `intervals.clusters`) together.
    Each fold has the temperature fitted on the others. See `fit_temperature` for the arguments.

    Returns:
      Probabilities, float64 `[clips, classes]`, and the temperature of each fold; None if there is
      a single group.
    """
    cluster = clusters(len(labels), groups)
    folds = min(FOLDS, int(cluster.max()) + 1)
    if folds < 2:
        return None
    scores, temperatures = np.zeros((len(labels), windows.shape[-1])), []
    for others, fold in GroupKFold(folds).split(windows, groups=cluster):
        temperatures.append(fit_temperature(windows[others], labels[others]))
        scores[fold] = tempered(windows[fold], temperatures[-1])
    return scores, temperatures


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """Returns the accuracy of a classifier that abstains on the clips it is least confident of.

    The curve is that of Geifman and El-Yaniv (2017, arXiv:1705.08500), averaged over all orders of
    clips of equal confidence.

    Args:
      confidence: the highest probability of each clip, `[clips]`.
      correct: whether it was right, 0/1 `[clips]`.

    Returns:
      `aurc`, the area under the curve of risk (fraction of errors among the clips kept) against
      coverage (fraction kept): the mean over 1, 2, ... all clips kept (Geifman et al. 2019,
      arXiv:1805.08206); `aurc_best`, its value if all errors were less confident than the right
      clips; `curve`, `coverage` and `accuracy` of up to 200 points; and `at`, one row for each of
      `COVERAGES`: `target`, `threshold` (the confidence that this fraction reaches), and `n`,
      `coverage`, `accuracy` and `wilson` (its interval) of the clips of at least that confidence.

    Raises:
      UserError: no clips.
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    clips = len(confidence)
    if not clips:
        raise UserError("a curve of accuracy against coverage needs at least one clip.")
    order = np.argsort(-confidence, kind="stable")
    ordered = confidence[order]
    _, tied, sizes = np.unique(-ordered, return_inverse=True, return_counts=True)
    kept = np.arange(1, clips + 1)
    accuracy = np.cumsum((np.bincount(tied, correct[order]) / sizes)[tied]) / kept
    best = np.minimum(correct.sum() / kept, 1)
    points = np.unique(np.linspace(0, clips - 1, min(clips, _MOST_POINTS)).round().astype(int))
    at = []
    for target in COVERAGES:
        threshold = ordered[int(np.ceil(round(target * clips, 9))) - 1]
        chosen = correct[confidence >= threshold]
        n, hits = len(chosen), int(chosen.sum())
        row = {"target": target, "coverage": n / clips, "n": n, "accuracy": hits / n}
        at.append(row | {"wilson": list(wilson(hits, n)), "threshold": float(threshold)})
    return {
        "aurc": float(1 - accuracy.mean()),
        "aurc_best": float(1 - best.mean()),
        "curve": {
            "coverage": (kept[points] / clips).tolist(),
            "accuracy": accuracy[points].tolist(),
        },
        "at": at,
    }
