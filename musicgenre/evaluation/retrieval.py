"""Precision@k of nearest neighbours: how often the clips nearest to a clip are of its class."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from musicgenre.errors import UserError
from musicgenre.evaluation.intervals import clusters

# Queries compared with all clips at once: memory grows with the clips, not with their square.
_QUERIES = 512


def precision_at_k(
    embeddings: np.ndarray, labels: np.ndarray, k: int, groups: Sequence[str | None] | None = None
) -> dict[str, Any]:
    """Returns the fraction of each clip's k nearest others, by cosine, that are of its class.

    Clips of one artist or track resemble each other in more than their class, which makes the
    number too good (Flexer and Schnitzer 2010, "Effects of album and artist filters in audio
    similarity"). `groups` excludes them from each other's neighbours.

    Args:
      embeddings: `[clips, d]`, of any length; one of zeros is equally near to all others.
      labels: class numbers, integers `[clips]`, at least 0.
      k: neighbours of a query.
      groups: artist or track of each clip, see `musicgenre.evaluation.intervals.clusters`.

    Returns:
      `k`, `n` (queries), `precision` (mean over queries), `macro_precision` (mean over classes),
      `chance` (the same for k random allowed clips), `ceiling` (for their best order; below 1 where
      a class has fewer than k), `per_class` (a dict of lists by class number: `n`, `precision`,
      `chance`, `ceiling`; None for a class without queries), `by_query` (float64 `[clips]`, NaN for
      a clip that is no query) and `left_out`, the number of those: their groups leave fewer than k
      others.

    Raises:
      UserError: shapes that do not fit, values that are not finite, k below 1, or no clip with k
        others.

    Examples:
      Two clips of class 0, and two of class 1, one of them nearest to a clip of class 0.

      >>> clips = np.array([[1.0, 0], [1, 0.1], [0, 1], [1, 0.5]])
      >>> found = precision_at_k(clips, np.array([0, 0, 1, 1]), k=1)
      >>> found["precision"], found["per_class"]["precision"]
      (0.75, [1.0, 0.5])
    """
    embeddings, labels = np.asarray(embeddings, np.float64), np.asarray(labels)
    _check(embeddings, labels, k)
    n = len(embeddings)
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.where(length > 0, length, 1)
    group = clusters(n, groups)
    hits, same, others = np.zeros(n), np.zeros(n), np.zeros(n)
    for first in range(0, n, _QUERIES):
        rows = slice(first, first + _QUERIES)
        allowed = group[rows, None] != group[None]
        alike = labels[rows, None] == labels[None]
        similarity = np.where(allowed, unit[rows] @ unit.T, -np.inf)
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        hits[rows] = (np.take_along_axis(alike & allowed, nearest, axis=1)).sum(axis=1)
        same[rows], others[rows] = (alike & allowed).sum(axis=1), allowed.sum(axis=1)
    asked = others >= k
    if not asked.any():
        most = int(others.max())
        raise UserError(f"k={k}: no clip has that many others of other groups, at most {most}.")
    values = {
        "precision": hits / k,
        "chance": same / np.maximum(others, 1),
        "ceiling": np.minimum(same, k) / k,
    }
    chosen = [np.flatnonzero(asked & (labels == number)) for number in range(int(labels.max()) + 1)]
    per_class: dict[str, list[Any]] = {"n": [len(rows) for rows in chosen]}
    for name, value in values.items():
        per_class[name] = [float(value[rows].mean()) if len(rows) else None for rows in chosen]
    macro = float(np.mean([value for value in per_class["precision"] if value is not None]))
    return {
        "k": k,
        "n": int(asked.sum()),
        **{name: float(value[asked].mean()) for name, value in values.items()},
        "macro_precision": macro,
        "per_class": per_class,
        "by_query": np.where(asked, values["precision"], np.nan),
        "left_out": int((~asked).sum()),
    }


def _check(embeddings: np.ndarray, labels: np.ndarray, k: int) -> None:
    shapes = f"{list(embeddings.shape)} and {list(labels.shape)}"
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise UserError(f"embeddings must be [clips, d] and labels [clips], not {shapes}.")
    if not np.issubdtype(labels.dtype, np.integer) or (labels.size and labels.min() < 0):
        raise UserError("labels must be class numbers, integers of at least 0.")
    finite = np.isfinite(embeddings).all(axis=1)
    if not finite.all():
        raise UserError(f"embeddings: that of clip {int(np.argmin(finite))} is not finite.")
    if not 1 <= k < len(labels):
        raise UserError(f"k must be at least 1 and less than the {len(labels)} clips, not {k}.")
