"""Ways to split clips into train, valid and test: pure functions of labels, groups and a seed."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from musicgenre.errors import UserError


def random_split(count: int, seed: int = 42, share: float = 0.33) -> list[str]:
    """Returns the report's split: a random third is "valid", the rest "train".

    The report chose its network on that third and reported it, so it is not called a test split here.

    Args:
      count: clips.
      seed: scikit-learn's `random_state`; the report's is 42.
      share: of the clips that is held out.
    """
    if count < 2:
        raise UserError(f"a random split needs at least 2 clips, not {count}.")
    from sklearn.model_selection import (
        train_test_split,  # takes its time to load, and most splits do not need it
    )

    _, held_out = train_test_split(np.arange(count), test_size=share, random_state=seed)
    splits = np.full(count, "train", object)
    splits[held_out] = "valid"
    return splits.tolist()


def stratified_kfold(labels: Sequence[str], folds: int, fold: int, seed: int) -> list[str]:
    """Returns one turn of a stratified cross-validation: fold k is "test", the next one "valid", the rest "train".

    Raises:
      UserError: fewer than 3 folds, no such fold, or a label with fewer clips than folds.
    """
    check_fold(fold, folds)
    if folds < 3:
        raise UserError(f"data.folds must be at least 3 (test, valid and train), not {folds}.")
    label, count = min(Counter(labels).items(), key=lambda item: item[1])
    if count < folds:
        raise UserError(f"the label {label!r} has {count} clips, fewer than the {folds} folds.")
    from sklearn.model_selection import StratifiedKFold

    parts = [
        part
        for _, part in StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels)
    ]
    splits = np.full(len(labels), "train", object)
    splits[parts[(fold + 1) % folds]] = "valid"
    splits[parts[fold]] = "test"
    return splits.tolist()


def kfold_split(
    labels: Sequence[str],
    folds: int,
    fold: int,
    seed: int,
    groups: Sequence[str | None] | None = None,
) -> list[str]:
    """Returns one turn of a stratified cross-validation: fold k is "valid", the rest "train".

    Args:
      labels: one label for each clip.
      folds: at least 2.
      fold: 0 .. folds - 1.
      seed: of the random order.
      groups: the artist of each clip, who then is in one fold only; a clip with None is a group of its own. None for all: clip
        by clip.

    Raises:
      UserError: fewer than 2 folds, no such fold, a label with fewer clips than folds, fewer groups than folds, or all clips of
        a label in one group, so that a fold would be trained without it.
    """
    check_fold(fold, folds)
    if folds < 2:
        raise UserError(f"data.folds must be at least 2 (valid and train), not {folds}.")
    label, count = min(Counter(labels).items(), key=lambda item: item[1])
    if count < folds:
        raise UserError(f"the label {label!r} has {count} clips, fewer than the {folds} folds.")
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if groups is None:
        parts = [
            part
            for _, part in StratifiedKFold(folds, shuffle=True, random_state=seed).split(
                labels, labels
            )
        ]
    else:
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        together = [
            len(groups) + i if group is None else numbers[group] for i, group in enumerate(groups)
        ]
        if len(set(together)) < folds:
            raise UserError(
                f"the clips are of {len(set(together))} artists or other groups, fewer than the {folds} folds."
            )
        of_label = Counter(label for label, _ in set(zip(labels, together, strict=True)))
        if alone := [label for label, count in of_label.items() if count < 2]:
            raise UserError(
                f"all clips of the label {alone[0]!r} are of one artist or group, so it cannot be held out."
            )
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        parts = [part for _, part in splitter.split(labels, labels, together)]
    splits = np.full(len(labels), "train", object)
    splits[parts[fold]] = "valid"
    return splits.tolist()


def check_fold(fold: int, folds: int) -> None:
    """Raises UserError unless `fold` is one of 0 .. folds - 1."""
    if not 0 <= fold < folds:
        raise UserError(f"data.fold={fold} is not one of 0 to {folds - 1}.")


def group_split(
    labels: Sequence[str],
    groups: Sequence[str | None],
    seed: int,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
) -> list[str]:
    """Splits clips so that no group is in two splits and each label is spread as the fractions say, as near as can be.

    Groups are dealt out in random order, the larger first, each to the split that lacks most clips of the group's
    commonest label. A label with at least as many groups as there are splits comes into each of them.

    Args:
      labels: one label (for tags: any one of them) for each clip.
      groups: the artist, album or track of each clip; a clip without one is a group of its own.
      seed: of the random order.
      fractions: of train, valid and test; 0 leaves a split out.

    Raises:
      UserError: the fractions are negative or do not sum to 1, or nothing is for training.
    """
    if (
        len(fractions) != 3
        or min(fractions) < 0
        or abs(sum(fractions) - 1) > 1e-6
        or fractions[0] <= 0
    ):
        raise UserError(
            f"data.fractions={tuple(fractions)} must be three shares (train, valid, test) that sum to 1, the first above 0."
        )
    names = [
        name for name, share in zip(("train", "valid", "test"), fractions, strict=True) if share > 0
    ]
    shares = np.array([share for share in fractions if share > 0])
    members: dict[tuple[bool, str], list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault((group is None, str(i) if group is None else group), []).append(i)
    by_label: dict[str, list[list[int]]] = {}
    for clips in members.values():
        commonest = Counter(labels[i] for i in clips).most_common(1)[0][0]
        by_label.setdefault(commonest, []).append(clips)
    splits = [""] * len(labels)
    generator = np.random.default_rng(seed)
    for label in sorted(by_label):
        parts = [by_label[label][i] for i in generator.permutation(len(by_label[label]))]
        parts.sort(key=len, reverse=True)
        wanted = shares * sum(map(len, parts))
        placed = np.zeros(len(names))
        for number, clips in enumerate(parts):
            empty = np.flatnonzero(placed == 0)
            # With no more groups left than empty splits, each of those gets one.
            open_splits = (
                empty
                if len(empty) > 0 and len(parts) - number <= len(empty)
                else np.arange(len(names))
            )
            chosen = open_splits[((wanted - placed) / shares)[open_splits].argmax()]
            placed[chosen] += len(clips)
            for i in clips:
                splits[i] = names[chosen]
    return splits
