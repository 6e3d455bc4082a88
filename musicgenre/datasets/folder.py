"""One's own music in folders: one sub-folder a class."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from musicgenre.datasets.base import SPLIT_ALIASES, Clip, Dataset, find_audio, make_dataset
from musicgenre.datasets.registry import register
from musicgenre.datasets.splits import group_split
from musicgenre.errors import UserError


@register("folder")
def load_folder(
    root: str | Path, *, seed: int = 42, fractions: Sequence[float] = (0.7, 0.15, 0.15)
) -> Dataset:
    """Reads `<root>/<class>/.../<file>`, or `<root>/<train|valid|test>/<class>/.../<file>`.

    Without split folders the clips are split at random, never within a folder below the class's (an artist or album).

    Args:
      root: the folder.
      seed: of the split.
      fractions: of train, valid and test.

    Raises:
      UserError: no such folder, a sound file outside any class, or fewer than two classes.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder. Set --config.data.root to one with a sub-folder for each class."
        )
    files = find_audio(root)
    if not files:
        raise UserError(f"{root}: no sound files in this folder.")
    top = {path.relative_to(root).parts[0] for path in files}
    given = len(top) > 1 and all(name.lower() in SPLIT_ALIASES for name in top)
    stems = Counter(path.relative_to(root).with_suffix("") for path in files)
    places: list[tuple[str, str, str | None]] = []
    for path in files:
        folders = path.relative_to(root).parts[1 if given else 0 : -1]
        if not folders:
            raise UserError(
                f"{path}: lies in no class; put it into a sub-folder named after its label."
            )
        split = SPLIT_ALIASES[path.relative_to(root).parts[0].lower()] if given else ""
        places.append((split, folders[0], "/".join(folders) if len(folders) > 1 else None))
    labels = [label for _, label, _ in places]
    groups = [group for _, _, group in places]
    if len(set(labels)) < 2:
        raise UserError(
            f"{root}: one class only ({labels[0]!r}); a classifier needs at least two sub-folders with sound files."
        )
    splits = (
        [split for split, _, _ in places] if given else group_split(labels, groups, seed, fractions)
    )
    clips = []
    for path, label, group, split in zip(files, labels, groups, splits, strict=True):
        relative = path.relative_to(root)
        # The ending stays in the id only where two files differ by nothing else.
        clip_id = (
            relative if stems[relative.with_suffix("")] > 1 else relative.with_suffix("")
        ).as_posix()
        clips.append(Clip(clip_id, path, (label,), split, group))
    protocol = (
        "split folders" if given else f"grouped by folder, {fractions_text(fractions)}, seed {seed}"
    )
    return make_dataset(
        Dataset(
            "folder",
            root,
            protocol,
            "single_label",
            tuple(sorted(set(labels))),
            tuple(clips),
            group_name="folder",
        )
    )


def fractions_text(fractions: Sequence[float]) -> str:
    """Returns (0.7, 0.15, 0.15) as "70/15/15"."""
    return "/".join(f"{100 * share:g}" for share in fractions)
