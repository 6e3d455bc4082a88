"""What a data set is: clips with labels, groups and splits. Every reader returns a `Dataset`."""

import dataclasses
import importlib.resources
import os
from collections import Counter
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
    """Clips, and what applies to all of them.

    Attributes:
      name: the reader's name, such as "gtzan".
      root: the folder or file that was read.
      protocol: how the split was made, with its parameters, such as "artist_folds fold 1".
      task: "single_label", "multi_label" or "regression".
      label_names: every label, or the name of every number of a regression, in the order of the
        model's outputs.
      clips: sorted by `clip_id`; ids are unique.
      skipped: clips that the protocol names but that cannot be used, such as missing files.
      synthetic: True where the audio is synthetic; every report then says so.
      group_name: what a group is, such as "artist" or "track".
      notes: lines for people on how the clips were chosen and counted; `prepare` prints them first.
    """

    name: str
    root: Path
    protocol: str
    task: str
    label_names: tuple[str, ...]
    clips: tuple[Clip, ...]
    skipped: tuple[Skipped, ...] = ()
    synthetic: bool = False
    group_name: str = "artist"
    notes: tuple[str, ...] = ()


def make_dataset(dataset: Dataset) -> Dataset:
    """Sorts the clips by id and checks what every data set promises.

    Raises:
      UserError: no clips, a repeated clip id, an unknown label or split, not exactly one label
        where the task is "single_label", or not one number per name where it is "regression".
    """
    if not dataset.clips:
        raise UserError(f"{dataset.root}: no usable clips found for the data set {dataset.name!r}.")
    if dataset.task not in TASKS:
        raise UserError(f"task must be one of {', '.join(TASKS)}, not {dataset.task!r}.")
    ((clip_id, count),) = Counter(clip.clip_id for clip in dataset.clips).most_common(1)
    if count > 1:
        raise UserError(
            f"{dataset.root}: the clip id {clip_id!r} occurs {count} times; ids must be unique."
        )
    names = dataset.label_names
    known = set(names)
    for clip in dataset.clips:
        problem = ""
        if clip.split not in SPLITS:
            problem = f"split {clip.split!r} is not one of {', '.join(SPLITS)}"
        elif unknown := [label for label in clip.labels if label not in known]:
            problem = (
                f"label {unknown[0]!r} is not one of the data set's labels ({', '.join(names)})"
            )
        elif dataset.task == "single_label" and len(clip.labels) != 1:
            problem = f"{len(clip.labels)} labels where one is needed"
        elif dataset.task == "regression" and len(clip.values) != len(names):
            problem = f"{len(clip.values)} numbers where {len(names)} are needed"
        if problem:
            raise UserError(f"{clip.clip_id}: {problem}.")
    clips = tuple(sorted(dataset.clips, key=lambda clip: clip.clip_id))
    return dataclasses.replace(dataset, clips=clips)


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
    """Returns the text of a file in `musicgenre/datasets/data/`.

    Raises:
      UserError: it cannot be read.
    """
    try:
        folder = importlib.resources.files("musicgenre.datasets")
        return folder.joinpath("data", name).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"musicgenre/datasets/data/{name}: this file comes with the package but cannot be read "
            f"({error.strerror}). Install musicgenre again."
        ) from error
