"""A user's own music in folders, one per class."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from musicgenre.datasets.base import SPLIT_ALIASES, Clip, Dataset, find_audio
from musicgenre.datasets.registry import register
from musicgenre.datasets.splits import fractions_text, group_split
from musicgenre.errors import UserError


@register("folder")
def load_folder(
    root: str | Path, *, seed: int = 42, fractions: Sequence[float] = (0.7, 0.15, 0.15)
) -> Dataset:
    """Reads `<root>/<class>/.../<file>`, or `<root>/<train|valid|test>/<class>/.../<file>`.

    Without split folders the clips are split at random, never within a folder below the class's (an
    artist or album).

    Args:
      root: the folder.
      seed: of the split.
      fractions: of train, valid and test.

    Raises:
      UserError: no such folder, a sound file outside any class, or fewer than two classes.
    """
    root = Path(root)
    files = {path: path.relative_to(root) for path in find_audio(root)}
    if not files:
        raise UserError(
            f"{root}: no sound files in this folder. Set --config.data.root to a folder with a "
            "sub-folder per class."
        )
    top = {path.parts[0] for path in files.values()}
    given = len(top) > 1 and all(name.lower() in SPLIT_ALIASES for name in top)
    stems = Counter(path.with_suffix("") for path in files.values())
    labels, groups, splits = [], [], []
    for path, relative in files.items():
        folders = relative.parts[1 if given else 0 : -1]
        if not folders:
            raise UserError(f"{path}: is in no class; move it into a folder named after its label.")
        labels.append(folders[0])
        groups.append("/".join(folders) if len(folders) > 1 else None)
        splits.append(SPLIT_ALIASES[relative.parts[0].lower()] if given else "")
    if len(set(labels)) < 2:
        raise UserError(f"{root}: one class only ({labels[0]!r}); a classifier needs two folders.")
    protocol = "split folders"
    if not given:
        splits = group_split(labels, groups, seed, fractions)
        protocol = f"grouped by folder, {fractions_text(fractions)}, seed {seed}"
    # The suffix stays in the id only where two files differ by nothing else.
    unique = [
        path if stems[path.with_suffix("")] > 1 else path.with_suffix("") for path in files.values()
    ]
    clips = [
        Clip(path.as_posix(), file, (label,), split, group)
        for file, path, label, split, group in zip(
            files, unique, labels, splits, groups, strict=True
        )
    ]
    names = tuple(sorted(set(labels)))
    return Dataset("folder", root, protocol, "single_label", names, clips, group_name="folder")
