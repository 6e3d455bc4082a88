"""GTZAN (Tzanetakis and Cook 2002): 1,000 clips of 30 s, 10 genres, with splits that can be trusted and some that cannot.

`fault_filtered` is the split of Kereliuk, Sturm and Larsen (2015) without replicas and mislabelled clips. The artists and
their three folds are Foleiss and Tavares's (2020), after Sturm's index. In a random split most of the test clips have
their artist in the training set.
"""

import csv
import functools
import importlib.resources
from collections import Counter
from pathlib import Path

from musicgenre.datasets.base import AUDIO_EXTENSIONS, Clip, Dataset, Skipped, make_dataset
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
PROTOCOLS = ("fault_filtered", "artist_folds", "random", "stratified_kfold")


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
    """Reads a folder `<genre>/<genre>.NNNNN.<ext>`.

    Args:
      root: the folder that holds the genres' folders.
      protocol: "fault_filtered" (443 / 197 / 290 clips), "artist_folds" (3 folds), "random" (the report's 67 / 33) or
        "stratified_kfold".
      fold: which fold is the test split.
      folds: number of folds of "stratified_kfold".
      seed: of the splits that are drawn.
      allow_missing: list clips of the protocol that are not on disk as skipped, instead of an error.

    Raises:
      UserError: another layout, an unknown protocol, a clip twice, or a clip of the lists that is not on disk.
    """
    root = Path(root)
    files = _find(root)
    artists = artist_groups()
    skipped: list[Skipped] = []
    if protocol == "fault_filtered":
        splits = fault_filtered_lists()
        described = protocol
    elif protocol == "artist_folds":
        check_fold(fold, 3)
        known = [clip_id for clip_id in artists if clip_id.split(".")[0] in GENRES]
        rest = [clip_id for clip_id in known if artists[clip_id][1] != fold + 1]
        parts = group_split(
            [clip_id.split(".")[0] for clip_id in rest],
            [artists[clip_id][0] for clip_id in rest],
            seed,
            (0.8, 0.2, 0),
        )
        splits = dict.fromkeys(known, "test") | dict(zip(rest, parts, strict=True))
        skipped += [
            Skipped(clip_id, str(path), "its artist is not known, so it is in no artist fold")
            for clip_id, path in files.items()
            if clip_id not in artists
        ]
        described = f"artist_folds fold {fold} of 3, seed {seed}"
    elif protocol == "random":
        splits = dict(zip(files, random_split(len(files), seed), strict=True))
        described = f"random 67/33, seed {seed}"
    elif protocol == "stratified_kfold":
        splits = dict(
            zip(
                files,
                stratified_kfold([clip_id.split(".")[0] for clip_id in files], folds, fold, seed),
                strict=True,
            )
        )
        described = f"stratified_kfold fold {fold} of {folds}, seed {seed}"
    else:
        raise UserError(
            f"data.protocol: GTZAN has no protocol {protocol!r}."
            + did_you_mean(protocol, PROTOCOLS)
        )
    missing = [clip_id for clip_id in splits if clip_id not in files]
    if missing and not allow_missing:
        raise UserError(
            f"{root}: {missing[0]} is not on disk ({len(missing)} of the {len(splits)} clips of {protocol!r} are "
            "missing). Add them, or go on without them with --config.data.allow_missing=True."
        )
    skipped += [
        Skipped(clip_id, str(root / clip_id.split(".")[0] / clip_id), "not on disk")
        for clip_id in missing
    ]
    clips = [
        Clip(
            clip_id,
            files[clip_id],
            (clip_id.split(".")[0],),
            split,
            artists.get(clip_id, (None, 0))[0],
        )
        for clip_id, split in splits.items()
        if clip_id in files
    ]
    return make_dataset(
        Dataset("gtzan", root, described, "single_label", GENRES, tuple(clips), tuple(skipped))
    )


def _find(root: Path) -> dict[str, Path]:
    """Returns the sound files by clip id, in order of their ids."""
    files: dict[str, Path] = {}
    for genre in GENRES:
        for path in sorted((root / genre).glob(f"{genre}.*")):
            if (
                path.suffix.lower() not in AUDIO_EXTENSIONS
                or not path.stem[len(genre) + 1 :].isdigit()
            ):
                continue
            if path.stem in files:
                raise UserError(
                    f"{path} and {files[path.stem].name} are the same clip; keep one of them."
                )
            files[path.stem] = path
    if not files:
        raise UserError(
            f"{root}: not GTZAN's layout. Expected folders {', '.join(GENRES)} with files such as "
            "blues/blues.00000.wav; set --config.data.root to the folder that holds them."
        )
    return files


def _packaged(name: str) -> str:
    """Returns a list that ships with the package."""
    try:
        return (
            importlib.resources.files("musicgenre.datasets")
            .joinpath("data", name)
            .read_text(encoding="utf-8")
        )
    except OSError as error:
        raise UserError(
            f"musicgenre/datasets/data/{name}: this list should come with the package but cannot be read "
            f"({error.strerror}). Install musicgenre again."
        ) from error


@functools.lru_cache(maxsize=1)
def artist_groups() -> dict[str, tuple[str, int]]:
    """Returns (artist, fold 1 to 3) of each clip whose artist is known (948 clips by 412 artists)."""
    rows = csv.DictReader(_packaged("artist_groups.csv").splitlines())
    return {
        row["clip_id"]: (f"artist {row['artist_group']}", int(row["artist_fold"])) for row in rows
    }


def fault_filtered_lists() -> dict[str, str]:
    """Returns the split of each clip of the fault-filtered lists: 443 train, 197 valid, 290 test."""
    splits: dict[str, str] = {}
    for split in ("train", "valid", "test"):
        for line in _packaged(f"{split}_filtered.txt").split():
            splits[Path(line).stem] = split
    assert Counter(splits.values()) == {"train": 443, "valid": 197, "test": 290}, (
        "the packaged lists are not whole"
    )
    return splits
