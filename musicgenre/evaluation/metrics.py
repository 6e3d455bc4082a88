"""Measures of single-label classification, tagging (multi-label) and regression, ready for JSON.

All functions raise UserError for arrays whose shapes do not fit and for values that are no numbers.
Undefined measures are None, never NaN; means leave them out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn import metrics as sk

from musicgenre.errors import UserError

_BINS = 15
# Averages over windows and bfloat16 round a little past 1.
_ROUNDING, _ROUNDING_OF_SUM = 2e-3, 2e-2


def single_label_metrics(
    scores: np.ndarray, labels: np.ndarray, label_names: Sequence[str]
) -> dict[str, Any]:
    """Returns the measures of a classifier that gives each clip one of several labels.

    Args:
      scores: probabilities, each row summing to 1, `[clips, classes]`.
      labels: true class numbers, integers `[clips]`.
      label_names: `[classes]`.

    Returns:
      `n`, `accuracy`, `balanced_accuracy`, `top3_accuracy` (None for three classes or fewer),
      `macro_precision`, `macro_recall`, `macro_f1`, `macro_roc_auc` and `macro_pr_auc` (each class
      against the rest; PR-AUC is average precision), `nll`, `ece`, `brier` and `reliability` (see
      `calibration_metrics`), `confusion` (counts, rows are the truth), `per_class` (one dict per
      class), `undefined` (the names of the classes without a clip or with all of them) and
      `undefined_count`. A class that is never predicted has precision 0 in `macro_precision`, as in
      scikit-learn, and None in `per_class`.

    Raises:
      UserError: scores outside [0, 1] or rows that do not sum to 1, labels out of range; no clips.
    """
    scores, labels = _check_scores(scores, label_names), np.asarray(labels)
    _check_labels(scores, labels)
    clips, classes = scores.shape
    predicted = scores.argmax(axis=1)
    targets, chosen = (np.equal.outer(rows, np.arange(classes)) for rows in (labels, predicted))
    per_class = _per_label(scores, targets.astype(int), chosen, label_names)
    present = [row | {"precision": row["precision"] or 0.0} for row in per_class if row["support"]]
    means = _means(present, "precision", "recall", "f1", "roc_auc", "pr_auc", prefix="macro_")
    top3 = np.argsort(-scores, axis=1, kind="stable")[:, :3] == labels[:, None]
    return {
        "n": clips,
        "accuracy": float(np.mean(predicted == labels)),
        "balanced_accuracy": means["macro_recall"],
        "top3_accuracy": float(np.mean(top3.any(axis=1))) if classes > 3 else None,
        **means,
        **calibration_metrics(scores, labels),
        **_rows(per_class, "roc_auc"),
        "confusion": sk.confusion_matrix(labels, predicted, labels=np.arange(classes)).tolist(),
    }


def calibration_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Returns how well a classifier's probabilities are calibrated.

    Scores are probabilities `[clips, classes]`, and labels true class numbers, integers `[clips]`.

    Returns:
      `nll` (mean negative log likelihood in nats, probabilities clipped at 1e-12), `ece` (expected
      calibration error of the highest probability, Guo 2017, arXiv:1706.04599), `brier` (mean over
      clips of the squared differences from 0 and 1 summed over the classes, 0 to 2; Brier 1950) and
      `reliability` (the bins of `ece`).
    """
    truth = np.equal.outer(labels, np.arange(scores.shape[1]))
    ece, reliability = _calibration(scores.max(axis=1), scores.argmax(axis=1) == labels)
    return {
        "nll": float(-np.mean(np.log(np.clip(scores[truth], 1e-12, 1)))),
        "ece": ece,
        "brier": float(np.square(scores - truth).sum(axis=1).mean()),
        "reliability": reliability,
    }


def ece_by_chance(confidence: np.ndarray, *, draws: int = 200, seed: int = 0) -> float:
    """Returns the mean `ece` of a perfectly calibrated classifier, above 0 since clips are few.

    In each draw, each clip is right with its highest probability, `confidence` `[clips]`
    (Vaicenavicius et al. 2019, arXiv:1902.06977).
    """
    drawn = np.random.default_rng(seed).random((draws, len(confidence))) < confidence
    return float(np.mean([_calibration(confidence, correct)[0] for correct in drawn]))


def multi_label_metrics(
    scores: np.ndarray, targets: np.ndarray, label_names: Sequence[str]
) -> dict[str, Any]:
    """Returns the measures of a tagger, which gives each clip any number of tags.

    Args:
      scores: probabilities, `[clips, tags]`.
      targets: 0 or 1, `[clips, tags]`.
      label_names: `[tags]`.

    Returns:
      `n`, `tags`, `macro_roc_auc`, `macro_pr_auc` (average precision), `macro_f1` and `micro_f1` at
      the threshold 0.5, `ece` and `reliability` (over all entries: mean probability against the
      frequency of the tag), `per_class` (one dict per tag), `undefined` (the names of the tags with
      no positive or no negative clip) and `undefined_count`.

    Raises:
      UserError: scores outside [0, 1], targets other than 0 and 1; no clips.
    """
    scores, targets = _check_scores(scores, label_names), np.asarray(targets)
    _check_shape("targets", targets, scores.shape)
    _refuse(~np.isin(targets, (0, 1)), "targets", targets, label_names, "is not 0 or 1")
    targets, predicted = targets.astype(int), scores >= 0.5
    per_tag = _per_label(scores, targets, predicted, label_names)
    defined = [row for row in per_tag if row["roc_auc"] is not None]
    hits, both = int((predicted & (targets == 1)).sum()), int(predicted.sum() + targets.sum())
    ece, reliability = _calibration(scores.ravel(), targets.ravel() == 1)
    return {
        "n": len(scores),
        "tags": len(per_tag),
        **_means(defined, "roc_auc", "pr_auc", "f1", prefix="macro_"),
        "micro_f1": 2 * hits / both if both else None,
        "ece": ece,
        "reliability": reliability,
        **_rows(per_tag, "roc_auc"),
    }


def regression_metrics(
    predicted: np.ndarray, targets: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
    """Returns the measures of a regression, such as one onto latent factors.

    Args:
      predicted: `[clips, outputs]`.
      targets: `[clips, outputs]`.
      names: `[outputs]`.

    Returns:
      `n`, `outputs`, `r2` (coefficient of determination), `mse` (mean squared error), `mae` (mean
      absolute error) and `correlation` (Pearson's), each the mean over the outputs, `per_class`
      (one dict per output), `undefined` (the names of the outputs that are constant over the clips,
      without `r2` and `correlation`) and `undefined_count`.
    """
    predicted, targets = np.asarray(predicted, np.float64), np.asarray(targets, np.float64)
    for what, values in (("predictions", predicted), ("targets", targets)):
        _check_shape(what, values, (len(predicted), len(names)))
        _refuse(~np.isfinite(values), what, values, names, "is not finite")
    rows: list[dict[str, Any]] = []
    for name, truth, guess in zip(names, targets.T, predicted.T, strict=True):
        varies, both = np.ptp(truth) > 0, np.ptp(truth) > 0 and np.ptp(guess) > 0
        rows.append(
            {
                "label": str(name),
                "support": len(truth),
                "r2": float(sk.r2_score(truth, guess)) if varies else None,
                "mse": float(sk.mean_squared_error(truth, guess)),
                "mae": float(sk.mean_absolute_error(truth, guess)),
                "correlation": float(np.corrcoef(truth, guess)[0, 1]) if both else None,
            }
        )
    return {
        "n": len(targets),
        "outputs": len(names),
        **_means(rows, "r2", "mse", "mae", "correlation"),
        **_rows(rows, "r2"),
    }


def weighted_r2(
    predicted: np.ndarray, targets: np.ndarray
) -> Callable[[np.ndarray], tuple[float, float]]:
    """Returns a function from weights `[clips]` to the mean R2 and the mean squared error.

    Both arrays are `[clips, outputs]`.
    """
    targets = np.asarray(targets, np.float64)
    errors = np.square(np.asarray(predicted, np.float64) - targets)

    def measures(weights: np.ndarray) -> tuple[float, float]:
        weights = weights / weights.sum()
        mse, variance = weights @ errors, weights @ np.square(targets - weights @ targets)
        varies = variance > 0
        r2 = 1 - mse[varies] / variance[varies]
        return (float(r2.mean()) if varies.any() else float("nan")), float(mse.mean())

    return measures


def weighted_macro_aucs(
    scores: np.ndarray, targets: np.ndarray
) -> Callable[[np.ndarray], tuple[float, float]]:
    """Returns a function from weights of the clips to macro ROC-AUC and macro PR-AUC.

    It is fast enough for a bootstrap, as the clips are sorted only once. Labels without positive or
    without negative weight are left out of the means of a call; without any label they are NaN.
    Scores and targets (0 or 1) are `[clips, labels]`.
    """
    scores, targets = np.asarray(scores), np.asarray(targets)
    usable = (targets == 1).any(axis=0) & (targets == 0).any(axis=0)
    labels = []
    for column in np.flatnonzero(usable):
        order = np.argsort(-scores[:, column], kind="stable")
        # Clips of equal score make one step of the curve, which ends at the last of them.
        ends = np.append(np.flatnonzero(np.diff(scores[order, column])), len(order) - 1)
        labels.append((order, ends, targets[order, column] == 1))

    def aucs(weights: np.ndarray) -> tuple[float, float]:
        roc, pr = [], []
        for order, ends, positive in labels:
            ordered = weights[order]
            hits = np.cumsum(ordered * positive, dtype=float)[ends]
            drawn = np.cumsum(ordered, dtype=float)[ends]
            positives, negatives = hits[-1], drawn[-1] - hits[-1]
            if positives == 0 or negatives == 0:
                continue
            recall = np.append(0, hits) / positives
            false_alarm = np.append(0, drawn - hits) / negatives
            roc.append(float(np.sum(np.diff(false_alarm) * (recall[1:] + recall[:-1]) / 2)))
            pr.append(float(np.sum(np.diff(recall) * hits / np.maximum(drawn, 1e-300))))
        return (float(np.mean(roc)), float(np.mean(pr))) if roc else (float("nan"), float("nan"))

    return aucs


def average_by_clip(scores: np.ndarray, clip_index: np.ndarray, clips: int) -> np.ndarray:
    """Returns the mean score of each clip over its windows, float64 `[clips, classes]`.

    Args:
      scores: probabilities, `[windows, classes]`.
      clip_index: the clip of each window, integers in `[0, clips)`, `[windows]`; in any order.
      clips: number of clips.

    Raises:
      UserError: a clip without a window.
    """
    windows = np.bincount(clip_index, minlength=clips)
    if (empty := np.flatnonzero(windows == 0)).size:
        missing = f"{len(empty)} of {clips} clips have no window"
        raise UserError(f"{missing}, the first is clip {empty[0]}.")
    sums = np.zeros((clips, scores.shape[1]))
    np.add.at(sums, clip_index, scores)
    return sums / windows[:, None]


def _check_shape(what: str, values: np.ndarray, shape: tuple[int, ...]) -> None:
    if values.shape != shape:
        raise UserError(f"{what} must have the shape {list(shape)}, not {list(values.shape)}.")
    if 0 in shape:
        raise UserError(f"{what} have the shape {list(shape)}: there is nothing to measure.")


def _refuse(
    wrong: np.ndarray, what: str, values: np.ndarray, names: Sequence[str], why: str
) -> None:
    """Raises UserError that names the first wrong entry of values `[clips, labels]`."""
    if wrong.any():
        clip, label = np.argwhere(wrong)[0]
        value = f"{values[clip, label]:.6g} for {names[label]!r}"
        raise UserError(f"{what}: clip {clip} has {value}, which {why} ({wrong.sum()} in all).")


def _check_scores(scores: np.ndarray, label_names: Sequence[str]) -> np.ndarray:
    """Returns the scores as float64 within [0, 1], or raises UserError."""
    scores = np.asarray(scores, np.float64)
    _check_shape("scores", scores, (len(scores), len(label_names)))
    _refuse(np.isnan(scores), "scores", scores, label_names, "is not a number")
    outside = (scores < -_ROUNDING) | (scores > 1 + _ROUNDING)
    _refuse(outside, "scores", scores, label_names, "is outside [0, 1]")
    return np.clip(scores, 0, 1)


def _check_labels(scores: np.ndarray, labels: np.ndarray) -> None:
    clips, classes = scores.shape
    _check_shape("labels", labels, (clips,))
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"labels must be integers, not {labels.dtype}.")
    if (wrong := np.flatnonzero((labels < 0) | (labels >= classes))).size:
        label = labels[wrong[0]]
        raise UserError(f"labels: clip {wrong[0]} has the label {label} of {classes} classes.")
    sums = scores.sum(axis=1)
    if (wrong := np.flatnonzero(np.abs(sums - 1) > _ROUNDING_OF_SUM)).size:
        raise UserError(f"scores: clip {wrong[0]} sums to {sums[wrong[0]]:.4f}, not to 1.")


def _per_label(
    scores: np.ndarray, targets: np.ndarray, predicted: np.ndarray, label_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the measures of each label against the rest; all inputs `[clips, labels]`."""
    rows = []
    columns = zip(label_names, scores.T, targets.T, predicted.T, strict=True)
    for name, score, truth, chosen in columns:
        support, selected = int(truth.sum()), int(chosen.sum())
        hits = int((chosen & (truth == 1)).sum())
        curves = 0 < support < len(truth)
        rows.append(
            {
                "label": str(name),
                "support": support,
                "predicted": selected,
                "precision": hits / selected if selected else None,
                "recall": hits / support if support else None,
                "f1": 2 * hits / (support + selected) if support + selected else None,
                "roc_auc": float(sk.roc_auc_score(truth, score)) if curves else None,
                "pr_auc": float(sk.average_precision_score(truth, score)) if curves else None,
            }
        )
    return rows


def _rows(per_label: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Returns the rows, and which of them have no value of `key`."""
    undefined = [row["label"] for row in per_label if row[key] is None]
    return {"undefined": undefined, "undefined_count": len(undefined), "per_class": per_label}


def _means(rows: list[dict[str, Any]], *keys: str, prefix: str = "") -> dict[str, float | None]:
    """Returns the mean of each measure over the rows that have a value, or None without any."""
    known = {key: [row[key] for row in rows if row[key] is not None] for key in keys}
    return {prefix + key: float(np.mean(own)) if own else None for key, own in known.items()}


def _calibration(confidence: np.ndarray, correct: np.ndarray) -> tuple[float, list[dict[str, Any]]]:
    """Returns the expected calibration error and its bins (low, high]; 0 is in the first."""
    bins = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    count = np.bincount(bins, minlength=_BINS).tolist()
    summed, hits = np.bincount(bins, confidence, _BINS), np.bincount(bins, correct, _BINS)
    rows = [
        {
            "low": i / _BINS,
            "high": (i + 1) / _BINS,
            "n": n,
            "confidence": float(summed[i] / n) if n else None,
            "accuracy": float(hits[i] / n) if n else None,
        }
        for i, n in enumerate(count)
    ]
    return float(np.abs(hits - summed).sum() / len(confidence)), rows
