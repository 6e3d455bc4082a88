"""GTZAN (Tzanetakis and Cook 2002): 1,000 clips of 30 s in 10 genres, with four protocols.

`fault_filtered` is the split of Kereliuk, Sturm and Larsen (2015) without replicas and mislabelled
clips. The artists and their three folds are Foleiss and Tavares's (2020), after Sturm's index. In a
random split most of the test clips have their artist in the training set.
"""

import csv
import functools
from pathlib import Path

from musicgenre.datasets.base import AUDIO_EXTENSIONS, SPLITS, Clip, Dataset, Skipped, packaged
from musicgenre.datasets.registry import register
from musicgenre.datasets.splits import check_fold, group_split, random_split, stratified_kfold
from musicgenre.errors import UserError, did_you_mean

GENRES = (
    "blues",
    "classical",
    "country",
    "disco",
    "hiphop",
    "jazz",
    "metal",
    "pop",
    "reggae",
    "rock",
)
# Broken in the common copies, from which many people have deleted it.
BROKEN = "jazz.00054"
PROTOCOLS = ("fault_filtered", "artist_folds", "random", "stratified_kfold")
# Where common copies have the genres' folders.
SUBFOLDERS = ("", "genres", "genres_original", "Data/genres_original")


@register("gtzan")
def load_gtzan(
    root: str | Path,
    protocol: str = "fault_filtered",
    *,
    fold: int = 0,
    folds: int = 10,
    seed: int = 42,
    allow_missing: bool = False,
) -> Dataset:
    """Reads a folder with files `<genre>/<genre>.NNNNN.<ext>`, where ext is au, wav, flac, mp3, ...

    Args:
      root: the folder that holds the genres' folders, itself or in one of `SUBFOLDERS`.
      protocol: "fault_filtered" (443 / 197 / 290 clips), "artist_folds" (3 folds), "random" (the
        2017 report's 67 / 33) or "stratified_kfold".
      fold: which fold is the test split.
      folds: number of folds of "stratified_kfold".
      seed: of the splits that are drawn.
      allow_missing: list clips that are not on disk as skipped, instead of an error.

    Raises:
      UserError: another layout, an unknown protocol, two files of one clip, or a clip of the lists
        other than `BROKEN` that is not on disk.
    """
    root = Path(root)
    files = _find(root)
    splits, described = _protocol(protocol, list(files), fold, folds, seed)
    artists = artist_groups()
    missing = [clip_id for clip_id in splits if clip_id not in files]
    absent = [clip_id for clip_id in missing if clip_id != BROKEN]
    if absent and not allow_missing:
        raise UserError(
            f"{root}: {absent[0]} is not on disk ({len(absent)} of the {len(splits)} clips of "
            f"{protocol!r} are missing). Add them, or continue without them with "
            "--config.data.allow_missing=True."
        )
    skipped = [
        Skipped(clip_id, str(path), "its artist is not known, so it is in no artist fold")
        for clip_id, path in files.items()
        if protocol == "artist_folds" and clip_id not in artists
    ]
    skipped += [
        Skipped(
            clip_id,
            str(root / _genre(clip_id) / clip_id),
            "broken in the common copy" if clip_id == BROKEN else "not on disk",
        )
        for clip_id in missing
    ]
    clips = [
        Clip(clip_id, files[clip_id], (_genre(clip_id),), split, artists.get(clip_id, (None, 0))[0])
        for clip_id, split in splits.items()
        if clip_id in files
    ]
    return Dataset("gtzan", root, described, "single_label", GENRES, clips, skipped)


def _protocol(
    protocol: str, clip_ids: list[str], fold: int, folds: int, seed: int
) -> tuple[dict[str, str], str]:
    """Returns the split of each clip of the protocol, and the protocol with its parameters."""
    if protocol == "fault_filtered":
        return fault_filtered_lists(), protocol
    if protocol == "artist_folds":
        check_fold(fold, 3)
        artists = artist_groups()
        rest = [clip_id for clip_id, (_, number) in artists.items() if number != fold + 1]
        groups = [artists[clip_id][0] for clip_id in rest]
        parts = group_split([_genre(clip_id) for clip_id in rest], groups, seed, (0.8, 0.2, 0))
        splits = dict.fromkeys(artists, "test") | dict(zip(rest, parts, strict=True))
        return splits, f"artist_folds fold {fold} of 3, seed {seed}"
    if protocol == "random":
        parts, described = random_split(len(clip_ids), seed), "random 67/33"
    elif protocol == "stratified_kfold":
        parts = stratified_kfold([_genre(clip_id) for clip_id in clip_ids], folds, fold, seed)
        described = f"stratified_kfold fold {fold} of {folds}"
    else:
        hint = did_you_mean(protocol, PROTOCOLS)
        raise UserError(f"data.protocol: GTZAN has no protocol {protocol!r}.{hint}")
    return dict(zip(clip_ids, parts, strict=True)), f"{described}, seed {seed}"


def _find(root: Path) -> dict[str, Path]:
    """Returns the sound files by clip id, in order of their ids."""
    files: dict[str, Path] = {}
    for folder in (root / name for name in SUBFOLDERS):
        for path in sorted(path for genre in GENRES for path in folder.glob(f"{genre}/{genre}.*")):
            number = path.stem.removeprefix(f"{path.parent.name}.")
            if path.suffix.lower() not in AUDIO_EXTENSIONS or not number.isdigit():
                continue
            if files.setdefault(path.stem, path) != path:
                raise UserError(f"{path} and {files[path.stem].name} are the same clip; keep one.")
        if files:
            return files
    wanted = "ten folders with files such as blues/blues.00000.wav"
    raise UserError(f"--config.data.root={root}: not GTZAN's layout, {wanted}.")


def _genre(clip_id: str) -> str:
    return clip_id.partition(".")[0]


@functools.lru_cache(maxsize=1)
def artist_groups() -> dict[str, tuple[str, int]]:
    """Returns (artist, fold 1 to 3) of the 948 clips whose artist is known (412 artists)."""
    rows = list(csv.reader(packaged("artist_groups.csv").splitlines()))[1:]
    return {clip_id: (f"artist {group}", int(fold)) for clip_id, group, fold in rows}


def fault_filtered_lists() -> dict[str, str]:
    """Returns the split of each clip in the fault-filtered lists (443 / 197 / 290 clips)."""
    lines = {split: packaged(f"{split}_filtered.txt").split() for split in SPLITS}
    return {Path(line).stem: split for split in SPLITS for line in lines[split]}
