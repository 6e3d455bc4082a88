"""A user's own music in folders, one per class."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from musicgenre.datasets.base import SPLIT_ALIASES, Clip, Dataset, find_audio
from musicgenre.datasets.registry import register
from musicgenre.datasets.splits import fractions_text, split_clips
from musicgenre.errors import UserError


@register("folder")
def load_folder(
    root: str | Path, *, seed: int = 42, fractions: Sequence[float] = (0.7, 0.15, 0.15)
) -> Dataset:
    """Reads `<root>/<class>/.../<file>`, or `<root>/<train|valid|test>/<class>/.../<file>`.

    Without split folders the clips are split at random, never within a folder below the class's (an
    artist or album).

    Raises:
      UserError: no sound files, one outside any class, or fewer than two classes.
    """
    root = Path(root)
    files = {path: path.relative_to(root) for path in find_audio(root)}
    if not files:
        raise UserError(f"--config.data.root={root}: no sound files in this folder.")
    top = {path.parts[0] for path in files.values()}
    given = len(top) > 1 and all(name.lower() in SPLIT_ALIASES for name in top)
    stems = Counter(path.with_suffix("") for path in files.values())
    clips = []
    for file, path in files.items():
        folders = path.parts[1 if given else 0 : -1]
        if not folders:
            raise UserError(f"{file}: is in no class; move it into a folder named after its label.")
        split = SPLIT_ALIASES[path.parts[0].lower()] if given else ""
        group = "/".join(folders) if len(folders) > 1 else None
        # The suffix stays in the id only where two files differ by nothing else.
        stem = path.with_suffix("")
        clip_id = (path if stems[stem] > 1 else stem).as_posix()
        clips.append(Clip(clip_id, file, folders[:1], split, group))
    names = tuple(sorted({clip.labels[0] for clip in clips}))
    if len(names) < 2:
        raise UserError(f"{root}: one class only ({names[0]!r}); a classifier needs two folders.")
    protocol = "split folders"
    if not given:
        clips = split_clips(clips, seed, fractions)
        protocol = f"grouped by folder, {fractions_text(fractions)}, seed {seed}"
    return Dataset("folder", root, protocol, "single_label", names, clips, group_name="folder")
