"""What a data set is: clips with labels, groups and splits. Every reader in this folder returns a `Dataset`."""

import dataclasses
import os
from collections import Counter
from pathlib import Path

from musicgenre.errors import UserError

SPLITS = ("train", "valid", "test")
TASKS = ("single_label", "multi_label", "regression")
# What soundfile's libsndfile decodes, by file ending.
AUDIO_EXTENSIONS = (".wav", ".au", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif")
SPLIT_ALIASES = {
    "train": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
}


@dataclasses.dataclass(frozen=True)
class Clip:
    """One piece of music.

    Attributes:
      clip_id: unique in its data set and stable over time, such as "blues.00012".
      path: the sound file, or the array file that holds the clip's spectrogram.
      labels: one label (single-label), any number of tags (multi-label), or none (regression).
      split: "train", "valid" or "test".
      group: what must not be split apart (an artist or a track), or None where it is not known.
      row: the clip's row in an array file; None for a sound file.
      values: regression: a number for each of the data set's label names.
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
    """Clips and what is known of them together.

    Attributes:
      name: the reader's name, such as "gtzan".
      root: the folder or file that was read.
      protocol: how the split was made, with its parameters, such as "fault_filtered" or "artist_folds fold 1".
      task: "single_label", "multi_label" or "regression".
      label_names: every label, or the name of every number of a regression, in the order of the model's outputs.
      clips: sorted by `clip_id`; ids are unique.
      skipped: clips that the protocol names but that cannot be used (missing on disk, say).
      synthetic: True where the audio is made up, which every report then says.
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
      UserError: no clips, a clip id twice, an unknown label or split, not exactly one label where the task is
        "single_label", or not a number for each name where it is "regression".
    """
    if not dataset.clips:
        raise UserError(f"{dataset.root}: no usable clips found for the data set {dataset.name!r}.")
    if dataset.task not in TASKS:
        raise UserError(f"task must be one of {', '.join(TASKS)}, not {dataset.task!r}.")
    known = set(dataset.label_names)
    for clip_id, count in Counter(clip.clip_id for clip in dataset.clips).items():
        if count > 1:
            raise UserError(
                f"{dataset.root}: the clip id {clip_id!r} occurs {count} times; ids must be unique."
            )
    for clip in dataset.clips:
        if clip.split not in SPLITS:
            raise UserError(
                f"{clip.clip_id}: split {clip.split!r} is not one of {', '.join(SPLITS)}."
            )
        if unknown := [label for label in clip.labels if label not in known]:
            raise UserError(
                f"{clip.clip_id}: label {unknown[0]!r} is not one of the data set's labels ({', '.join(dataset.label_names)})."
            )
        if dataset.task == "single_label" and len(clip.labels) != 1:
            raise UserError(f"{clip.clip_id}: {len(clip.labels)} labels where one is needed.")
        if dataset.task == "regression" and len(clip.values) != len(dataset.label_names):
            raise UserError(
                f"{clip.clip_id}: {len(clip.values)} numbers where {len(dataset.label_names)} are needed."
            )
    clips = tuple(sorted(dataset.clips, key=lambda clip: clip.clip_id))
    return dataclasses.replace(dataset, clips=clips)


def find_audio(root: Path) -> list[Path]:
    """Returns the sound files below a folder, sorted; hidden ones and those behind links to folders are left out."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(folder, name)
            for name in names
            if name.lower().endswith(AUDIO_EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(found)
