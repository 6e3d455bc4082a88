"""95 % intervals of a number over clips, over groups of clips and over seeds."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from musicgenre.errors import UserError

# The confidence level of all intervals.
LEVEL = 0.95


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Returns the Wilson score interval of a proportion (Wilson 1927, "Probable inference").

    Args:
      successes: clips that were right.
      n: clips.

    Raises:
      UserError: no clips, or more successes than clips.

    Examples:
      >>> [round(limit, 3) for limit in wilson(90, 197)]
      [0.389, 0.527]
    """
    if n < 1 or not 0 <= successes <= n:
        raise UserError(f"{successes} of {n} clips is not a proportion.")
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap(
    statistic: Callable[[np.ndarray], Sequence[float]],
    n: int,
    groups: Sequence[str | None] | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> list[tuple[float, float] | None]:
    """Returns percentile intervals of statistics, resampling complete groups of clips.

    Clips by one artist resemble each other, so resampling single clips makes an interval too narrow
    (Davison and Hinkley 1997, section 3.8).

    Args:
      statistic: from how often each clip was drawn, int `[n]`, to one or more numbers `[k]`. Draws
        for which a number is NaN are left out.
      n: clips.
      groups: see `clusters`.
      resamples: draws.
      seed: of the draws.

    Returns:
      For each of the k numbers (low, high), or None where it is undefined: there is a single group,
      or fewer than half of the draws have a value.

    Raises:
      UserError: no clips, or another number of groups than clips.
    """
    cluster = clusters(n, groups)
    draws = _draws(cluster.max() + 1, resamples, seed)
    values = np.array([statistic(counts[cluster]) for counts in draws], float)
    return [None if cluster.max() == 0 else _percentiles(column) for column in values.T]


def bootstrap_mean(
    values: np.ndarray,
    groups: Sequence[str | None] | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Returns `bootstrap`'s interval of the mean of `values` `[n]`, but faster."""
    values = np.asarray(values, float)
    cluster = clusters(len(values), groups)
    if cluster.max() == 0:
        return None
    sums, sizes = np.bincount(cluster, values), np.bincount(cluster)
    draws = _draws(len(sizes), resamples, seed)
    return _percentiles((draws @ sums) / (draws @ sizes))


def seeds_summary(values: Sequence[float]) -> dict[str, Any]:
    """Returns the mean of one number over seeds, and its uncertainty.

    Returns:
      `n`, `mean`, `std` (ddof 1), `interval` (Student's t, of the mean) and `values`; `std` and
      `interval` are None for a single seed.

    Raises:
      UserError: no values, or NaN or infinity among them.
    """
    numbers = [float(value) for value in values]
    if not numbers or not all(map(math.isfinite, numbers)):
        raise UserError(f"a summary over seeds needs at least one finite number, not {numbers}.")
    n, mean = len(numbers), float(np.mean(numbers))
    std = interval = None
    if n > 1:
        std = float(np.std(numbers, ddof=1))
        half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * std / math.sqrt(n)
        interval = [mean - half, mean + half]
    return {"n": n, "mean": mean, "std": std, "interval": interval, "values": numbers}


def clusters(n: int, groups: Sequence[str | None] | None) -> np.ndarray:
    """Returns the number of each clip's group, int `[n]`, from 0 in the order of their first clips.

    Args:
      n: clips.
      groups: `[n]`; a clip with None is its own group, and without groups each clip is.

    Raises:
      UserError: no clips, or another number of groups.
    """
    if n < 1:
        raise UserError("an interval needs at least one clip.")
    if groups is None:
        return np.arange(n)
    if len(groups) != n:
        raise UserError(f"{len(groups)} groups for {n} clips.")
    names = [i if group is None else str(group) for i, group in enumerate(groups)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names])


def _draws(groups: int, resamples: int, seed: int) -> np.ndarray:
    """Returns how often each group is drawn, int `[resamples, groups]`."""
    drawn = np.random.default_rng(seed).integers(groups, size=(resamples, groups))
    return np.apply_along_axis(np.bincount, 1, drawn, minlength=groups)


def _percentiles(values: np.ndarray) -> tuple[float, float] | None:
    defined = values[np.isfinite(values)]
    if len(defined) < len(values) / 2:
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
