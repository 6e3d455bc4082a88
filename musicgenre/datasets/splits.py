"""Ways to split clips into train, valid and test: pure functions of labels, groups and a seed."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from musicgenre.datasets.base import SPLITS, Clip
from musicgenre.errors import UserError


def random_split(count: int, seed: int = 42, fraction: float = 0.33) -> list[str]:
    """Returns the 2017 report's split: a random third is "valid", the rest "train".

    The report chose its network on that third and reported it, so it is not called a test split.

    Args:
      count: clips, at least 2.
      seed: scikit-learn's `random_state`; the report's is 42.
      fraction: of the clips that is held out.
    """
    if count < 2:
        raise UserError(f"a random split needs at least 2 clips, not {count}.")
    from sklearn.model_selection import train_test_split  # slow to import

    _, held_out = train_test_split(np.arange(count), test_size=fraction, random_state=seed)
    return _train_except(count, valid=held_out)


def stratified_kfold(labels: Sequence[str], folds: int, fold: int, seed: int) -> list[str]:
    """Returns one fold of a cross-validation: fold k is "test", the next "valid", the rest "train".

    Raises:
      UserError: fewer than 3 folds, no such fold, or a label with fewer clips than folds.
    """
    check_fold(fold, folds)
    if folds < 3:
        raise UserError(f"data.folds must be at least 3 (test, valid and train), not {folds}.")
    parts = _stratified(labels, folds, seed)
    return _train_except(len(labels), valid=parts[(fold + 1) % folds], test=parts[fold])


def kfold_split(
    labels: Sequence[str],
    folds: int,
    fold: int,
    seed: int,
    groups: Sequence[str | None] | None = None,
) -> list[str]:
    """Returns one fold of a stratified cross-validation: fold k is "valid", the rest "train".

    Args:
      labels: one label per clip.
      folds: at least 2.
      fold: 0 .. folds - 1.
      seed: of the random order.
      groups: the artist of each clip, who is then in one fold only; None for an unknown artist.

    Raises:
      UserError: fewer than 2 folds, no such fold, a label with fewer clips than folds, fewer groups
        than folds, or all clips of a label in one group, so that a fold would train without it.
    """
    check_fold(fold, folds)
    if folds < 2:
        raise UserError(f"data.folds must be at least 2 (valid and train), not {folds}.")
    return _train_except(len(labels), valid=_stratified(labels, folds, seed, groups)[fold])


def _stratified(
    labels: Sequence[str], folds: int, seed: int, groups: Sequence[str | None] | None = None
) -> list[np.ndarray]:
    """Returns the clips of each fold."""
    label, count = min(Counter(labels).items(), key=lambda item: item[1])
    if count < folds:
        raise UserError(f"the label {label!r} has {count} clips, fewer than the {folds} folds.")
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if groups is None:
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
        return [part for _, part in splitter.split(labels, labels)]
    # A clip without a group is a group of its own, numbered after all others.
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    own = range(len(groups), 2 * len(groups))
    group_of = [
        i if group is None else numbers[group] for i, group in zip(own, groups, strict=True)
    ]
    if (count := len(set(group_of))) < folds:
        raise UserError(f"{count} artists or other groups are fewer than the {folds} folds.")
    groups_of_label = Counter(label for label, _ in set(zip(labels, group_of, strict=True)))
    label, count = groups_of_label.most_common()[-1]
    if count < 2:
        raise UserError(f"all clips of the label {label!r} are of one artist or group.")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    return [part for _, part in splitter.split(labels, labels, group_of)]


def _train_except(count: int, **parts: np.ndarray) -> list[str]:
    """Returns "train" for all clips but those of the parts, which have the part's name."""
    splits = np.full(count, "train", object)
    for name, rows in parts.items():
        splits[rows] = name
    return splits.tolist()


def check_fold(fold: int, folds: int) -> None:
    """Raises UserError unless `fold` is one of 0 .. folds - 1."""
    if not 0 <= fold < folds:
        raise UserError(f"data.fold={fold} is not one of 0 to {folds - 1}.")


def split_fractions(fractions: Sequence[float]) -> tuple[list[str], np.ndarray]:
    """Returns the splits that are not empty, and their fractions of the clips.

    Raises:
      UserError: the fractions are negative or do not sum to 1, or nothing is for training.
    """
    values = np.asarray(fractions, float)
    if len(values) != 3 or min(values) < 0 or abs(sum(values) - 1) > 1e-6 or values[0] <= 0:
        wanted = "three fractions that sum to 1, of train (above 0), valid and test"
        raise UserError(f"data.fractions={tuple(fractions)} must be {wanted}.")
    return [SPLITS[i] for i in np.flatnonzero(values)], values[values > 0]


def fractions_text(fractions: Sequence[float]) -> str:
    """Returns (0.7, 0.15, 0.15) as "70/15/15"."""
    return "/".join(f"{100 * fraction:g}" for fraction in fractions)


def split_clips(clips: Sequence[Clip], seed: int, fractions: Sequence[float]) -> list[Clip]:
    """Returns clips with the splits of `group_split`, by the first label of each."""
    labels = [clip.labels[0] if clip.labels else "" for clip in clips]
    splits = group_split(labels, [clip.group for clip in clips], seed, fractions)
    return [dataclasses.replace(clip, split=x) for clip, x in zip(clips, splits, strict=True)]


def group_split(
    labels: Sequence[str],
    groups: Sequence[str | None],
    seed: int,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
) -> list[str]:
    """Splits clips so that no group is in two splits and each label follows the fractions closely.

    Groups are assigned in random order, the larger first, each to the split that lacks most clips
    of the group's commonest label. A label with at least as many groups as there are splits is in
    each of them.

    Args:
      labels: one label (for tags: any one of them) per clip.
      groups: the artist, album or track of each clip; a clip without one is a group of its own.
      seed: of the random order.
      fractions: of train, valid and test; 0 leaves a split out.

    Raises:
      UserError: as `split_fractions`.
    """
    names, parts = split_fractions(fractions)
    members: dict[str | int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(i if group is None else group, []).append(i)
    by_label: dict[str, list[list[int]]] = {}
    for clips in members.values():
        commonest = Counter(labels[i] for i in clips).most_common(1)[0][0]
        by_label.setdefault(commonest, []).append(clips)
    splits = [""] * len(labels)
    generator = np.random.default_rng(seed)
    for label in sorted(by_label):
        waiting = [by_label[label][i] for i in generator.permutation(len(by_label[label]))]
        waiting.sort(key=len, reverse=True)
        wanted = parts * sum(map(len, waiting))
        assigned = np.zeros(len(names))
        for number, clips in enumerate(waiting):
            candidates, empty = np.arange(len(names)), np.flatnonzero(assigned == 0)
            # With no more groups left than empty splits, each of those gets one.
            if 0 < len(empty) >= len(waiting) - number:
                candidates = empty
            chosen = candidates[((wanted - assigned) / parts)[candidates].argmax()]
            assigned[chosen] += len(clips)
            for i in clips:
                splits[i] = names[chosen]
    return splits
