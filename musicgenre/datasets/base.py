"""What a data set is: clips with labels, groups and splits. Every reader returns a `Dataset`."""

import dataclasses
import importlib.resources
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from musicgenre.errors import UserError

SPLITS = ("train", "valid", "test")
TASKS = ("single_label", "multi_label", "regression")
# The suffixes of sound files that libsndfile decodes.
AUDIO_EXTENSIONS = (".wav", ".au", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif")
SPLIT_ALIASES = {split: split for split in SPLITS} | {"val": "valid", "validation": "valid"}


@dataclasses.dataclass(frozen=True)
class Clip:
    """One piece of music.

    Attributes:
      clip_id: unique in its data set and stable over time, such as "blues.00012".
      path: the sound file, or the array file that holds the clip's spectrogram.
      labels: one label (single-label), any number of tags (multi-label), or none (regression).
      split: "train", "valid" or "test".
      group: what a split should keep together (an artist or a track), or None if unknown.
      row: the clip's row in an array file; None for a sound file.
      values: regression: one number per label name of the data set.
    """

    clip_id: str
    path: Path
    labels: tuple[str, ...]
    split: str
    group: str | None = None
    row: int | None = None
    values: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A clip that could not be used, and why."""

    clip_id: str
    path: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Clips, and what applies to all of them. Sorts the clips by id and checks them.

    Attributes:
      name: the reader's name, such as "gtzan".
      root: the folder or file that was read.
      protocol: how the split was made, with its parameters, such as "artist_folds fold 1".
      task: one of `TASKS`.
      label_names: every label, or the name of every number of a regression, in the order of the
        model's outputs.
      clips: with unique ids.
      skipped: clips that the protocol names but that cannot be used, such as missing files.
      synthetic: True where the audio is synthetic; every report then says so.
      group_name: what a group is, such as "artist" or "track".
      notes: lines for people on how the clips were chosen and counted; `prepare` prints them first.

    Raises:
      UserError: no clips, a repeated clip id, an unknown label or split, not exactly one label
        where the task is "single_label", or not one number per name where it is "regression".
    """

    name: str
    root: Path
    protocol: str
    task: str
    label_names: tuple[str, ...]
    clips: Sequence[Clip]
    skipped: Sequence[Skipped] = ()
    synthetic: bool = False
    group_name: str = "artist"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.clips:
            raise UserError(f"{self.root}: no usable clips found for the data set {self.name!r}.")
        if self.task not in TASKS:
            raise UserError(f"task must be one of {', '.join(TASKS)}, not {self.task!r}.")
        ((clip_id, count),) = Counter(clip.clip_id for clip in self.clips).most_common(1)
        if count > 1:
            raise UserError(f"{self.root}: the clip id {clip_id!r} occurs {count} times.")
        known = dict.fromkeys(self.label_names)
        for clip in self.clips:
            problem = ""
            if clip.split not in SPLITS:
                problem = f"split {clip.split!r} is not one of {', '.join(SPLITS)}"
            elif unknown := [label for label in clip.labels if label not in known]:
                names = ", ".join(known)
                problem = f"label {unknown[0]!r} is not one of the data set's labels ({names})"
            elif self.task == "single_label" and len(clip.labels) != 1:
                problem = f"{len(clip.labels)} labels where one is needed"
            elif self.task == "regression" and len(clip.values) != len(known):
                problem = f"{len(clip.values)} numbers where {len(known)} are needed"
            if problem:
                raise UserError(f"{clip.clip_id}: {problem}.")
        # A frozen dataclass sets its fields this way.
        object.__setattr__(self, "clips", tuple(sorted(self.clips, key=lambda c: c.clip_id)))
        object.__setattr__(self, "skipped", tuple(self.skipped))


def find_audio(root: Path) -> list[Path]:
    """Returns the sound files below a folder, as `find_files` does."""
    return find_files(root, AUDIO_EXTENSIONS)


def find_files(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Returns the files below a folder with one of the suffixes in any case, sorted.

    Hidden files and folders and links to folders are left out.
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(folder, name)
            for name in names
            if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
    return sorted(found)


def packaged(name: str) -> str:
    """Returns the text of a file in `musicgenre/datasets/data/`; raises UserError if it is gone."""
    try:
        folder = importlib.resources.files("musicgenre.datasets")
        return folder.joinpath("data", name).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"musicgenre/datasets/data/{name}: this file comes with the package but cannot be read "
            f"({error.strerror}). Install musicgenre again."
        ) from error
