"""MagnaTagATune (Law, West, Mandel, Bay and Downie 2009): 25,863 clips of 29 s with 188 tags, in four protocols.

The protocols are not comparable with each other, so every number must say which it is. `report` is that of the 2017 report: two
nested random splits, in which nine of ten test clips come from a track that is also in the training set. `clean` and `all` go by
the folders of the data set, as Won (2020) and most others do: no track and no album is on two sides, but six of ten test clips
have their artist in the training set. `grouped` draws a split of its own that keeps tracks whole.
"""

import dataclasses
import functools
import gzip
import os
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from musicgenre.datasets.base import SPLITS, Clip, Dataset, Skipped, make_dataset
from musicgenre.datasets.folder import fractions_text
from musicgenre.datasets.registry import register
from musicgenre.datasets.splits import random_split
from musicgenre.errors import UserError, did_you_mean

PROTOCOLS = ("report", "clean", "all", "grouped")
TABLE_NAMES = ("annotations_final.csv", "annotations_final.csv.gz")
# The split of each of the data set's sixteen folders.
FOLDER_SPLITS = (
    dict.fromkeys("0123456789ab", "train") | {"c": "valid"} | dict.fromkeys("def", "test")
)
# Three mp3s of the published archive hold not a single byte.
EMPTY_IN_THE_ARCHIVE = {
    "35644": "6/norine_braun-now_and_zen-08-gently-117-146.mp3",
    "55753": "8/jacob_heringman-josquin_des_prez_lute_settings-19-gintzler__pater_noster-204-233.mp3",
    "57881": "9/american_baroque-dances_and_suites_of_rameau_and_couperin-25-le_petit_rien_xiveme_ordre_couperin-88-117.mp3",
}
# A larger table is refused before it fills the memory; MTAT's has 12 million bytes, or 22 with its quotes.
MAX_TABLE_BYTES = 2**28

_TAB, _NEWLINE, _ZERO, _ONE = b"\t\n01"
# artist-album-NN-title-START-END.mp3; the track is all but the seconds.
_MP3_NAME = re.compile(r"(?P<track>(?P<artist>[^-]+)-.+)-\d+-\d+\.mp3")


@dataclasses.dataclass(frozen=True, eq=False)
class MtatTable:
    """The label table.

    Attributes:
      path: the file.
      clip_ids: `[clips]`, in ascending order of their numbers.
      mp3_paths: of each clip, relative to the data set's folder, such as "f/artist-album-01-title-30-59.mp3".
      tag_names: `[tags]`, the most frequent first; equally frequent ones in alphabetical order.
      tags: bool `[clips, tags]`, whether a clip has a tag.
    """

    path: Path
    clip_ids: tuple[str, ...]
    mp3_paths: tuple[str, ...]
    tag_names: tuple[str, ...]
    tags: np.ndarray

    @functools.cached_property
    def tracks(self) -> tuple[str, ...]:
        """The track that each clip was cut from: the mp3's name without its seconds, `[clips]`."""
        return tuple(match["track"] for match in map(_match_name, self.mp3_paths) if match)

    @functools.cached_property
    def artists(self) -> tuple[str, ...]:
        """The artist of each clip, the beginning of the mp3's name, `[clips]`."""
        return tuple(match["artist"] for match in map(_match_name, self.mp3_paths) if match)


class Leak(NamedTuple):
    """How many of the evaluated clips share something with the clips trained on."""

    clips: int
    evaluated: int

    @property
    def share(self) -> float:
        """The share of the evaluated clips, 0 to 1."""
        return self.clips / self.evaluated if self.evaluated else 0.0


@register("mtat")
def load_mtat(
    root: str | Path,
    protocol: str = "clean",
    *,
    top_k: int = 50,
    seed: int = 42,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    allow_missing: bool = False,
) -> Dataset:
    """Reads a folder with `annotations_final.csv` (or `.csv.gz`) and the mp3s as they were published, or all in one folder.

    Labels are the `top_k` most frequent tags in that order, the group of a clip is its track.

    Args:
      root: the folder.
      protocol: "report" (clips with a top tag; 13,510 / 3,378 / 4,223), "clean" (clips with a top tag; folders 0-b train,
        c valid, d-f test; 15,250 / 1,529 / 4,332), "all" (every clip, by folder; 18,709 / 1,825 / 5,329) or "grouped" (clips
        with a top tag, split by track).
      top_k: number of tags.
      seed: of "report" and "grouped".
      fractions: of train, valid and test in "grouped".
      allow_missing: list clips whose mp3 is not on disk as skipped, instead of an error.

    Raises:
      UserError: no table, a table that cannot be used (the message names its line and column), an unknown protocol, or mp3s that
        are not on disk.
    """
    root = Path(root)
    table = read_table(root)
    splits = protocol_splits(table, protocol, top_k=top_k, seed=seed, fractions=fractions)
    chosen = [i for i, split in enumerate(splits) if split]
    places = dict(zip(chosen, _find(root, [table.mp3_paths[i] for i in chosen]), strict=True))
    missing = [i for i in chosen if places[i] is None]
    described = _describe(protocol, top_k, seed, fractions)
    counts = f"mtat, protocol {described}: {_counts(splits)} of {len(splits):,} clips in the table"
    if missing and (not allow_missing or len(missing) == len(chosen)):
        go_on = (
            ""
            if allow_missing
            else "Go on without them with --config.data.allow_missing=True, or fetch them. "
        )
        first = root / table.mp3_paths[missing[0]]
        raise UserError(
            f"{first} is not on disk: {len(missing):,} of {len(chosen):,} mp3s are missing ({counts}). {go_on}The "
            f"command that fetches them: python experiments/download.py --dataset=mtat --root={root}"
        )
    names = table.tag_names[:top_k]
    top = table.tags[:, :top_k]
    clips = [
        Clip(
            table.clip_ids[i],
            path,
            tuple(names[tag] for tag in np.flatnonzero(top[i])),
            splits[i],
            table.tracks[i],
        )
        for i, path in places.items()
        if path is not None
    ]
    skipped = [
        Skipped(table.clip_ids[i], str(root / table.mp3_paths[i]), "not on disk") for i in missing
    ]
    absent = (
        f"{len(missing):,} mp3{'s are' if len(missing) != 1 else ' is'} not on disk"
        if missing
        else "every mp3 is on disk"
    )
    notes = (f"{counts}; {absent}", *_notes(table, splits, top_k))
    return make_dataset(
        Dataset(
            "mtat",
            root,
            described,
            "multi_label",
            names,
            tuple(clips),
            tuple(skipped),
            group_name="track",
            notes=notes,
        )
    )


def read_table(root: str | Path) -> MtatTable:
    """Reads the label table of a folder.

    Both forms of it are read: the original (quoted fields, tags in an order of their own) and one without quotes, the tags by
    frequency. They give the same result.

    Args:
      root: the folder that holds `annotations_final.csv` or `annotations_final.csv.gz`.

    Raises:
      UserError: there is none, or it cannot be used; the message names the file, line and column.
    """
    for name in TABLE_NAMES:
        path = Path(root) / name
        if path.is_file():
            return _parse(path, _read(path))
    raise UserError(
        f"{root}: no {' or '.join(TABLE_NAMES)} in this folder. Set --config.data.root to the one that holds it, or fetch "
        f"MagnaTagATune with: python experiments/download.py --dataset=mtat --root={root}"
    )


def protocol_splits(
    table: MtatTable,
    protocol: str,
    *,
    top_k: int = 50,
    seed: int = 42,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
) -> list[str]:
    """Returns the split of each clip of the table, "" for those that the protocol leaves out.

    Args:
      table: the label table.
      protocol: one of `PROTOCOLS`.
      top_k: number of tags; all protocols but "all" leave out the clips that have none of them.
      seed: of "report" and "grouped".
      fractions: of train, valid and test in "grouped".

    Raises:
      UserError: an unknown protocol, fewer than `top_k` tags, fractions that cannot be, or a folder that is not one of 0-9, a-f.
    """
    if protocol not in PROTOCOLS:
        raise UserError(
            f"data.protocol: MTAT has no protocol {protocol!r}." + did_you_mean(protocol, PROTOCOLS)
        )
    occurring = int(table.tags.any(axis=0).sum())
    if not 1 <= top_k <= occurring:
        raise UserError(
            f"data.top_k={top_k} is not one of 1 to {occurring}, the tags that occur in {table.path}."
        )
    tagged = np.flatnonzero(table.tags[:, :top_k].any(axis=1)).tolist()
    chosen: list[int] = list(range(len(table.clip_ids))) if protocol == "all" else tagged
    if protocol == "report":
        parts = _nested_random(len(chosen), seed)
    elif protocol == "grouped":
        parts = split_tracks(
            table.tags[chosen, :top_k], [table.tracks[i] for i in chosen], seed, fractions
        )
    else:
        parts = [_folder_split(table, i) for i in chosen]
    splits = [""] * len(table.clip_ids)
    for i, part in zip(chosen, parts, strict=True):
        splits[i] = part
    return splits


def leak(splits: Sequence[str], groups: Sequence[str], evaluated: str = "test") -> Leak:
    """Counts the evaluated clips whose group (their track, their artist) also has a clip in train.

    With `protocol_splits` and `MtatTable.tracks` this needs the table alone, no audio.

    Args:
      splits: of each clip, `[clips]`.
      groups: of each clip, `[clips]`.
      evaluated: the split that is compared with train.
    """
    trained = {group for split, group in zip(splits, groups, strict=True) if split == "train"}
    tested = [group for split, group in zip(splits, groups, strict=True) if split == evaluated]
    return Leak(sum(group in trained for group in tested), len(tested))


def split_tracks(
    tags: np.ndarray,
    tracks: Sequence[str],
    seed: int,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
) -> list[str]:
    """Splits clips so that no track is in two splits and every tag is spread as the fractions say, as near as can be.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011) of whole tracks: the tag with the fewest clips left is dealt
    out next, its tracks with most of such clips first, each to the split that lacks most of them.

    Args:
      tags: bool `[clips, tags]`.
      tracks: of each clip, `[clips]`.
      seed: of the order of equal tracks.
      fractions: of train, valid and test; 0 leaves a split out.

    Returns:
      The split of each clip.

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
    names = [name for name, share in zip(SPLITS, fractions, strict=True) if share > 0]
    shares = np.array([share for share in fractions if share > 0])
    _, member = np.unique(np.asarray(tracks, np.str_), return_inverse=True)
    count = int(member.max()) + 1
    # The last column counts clips, so that tracks without a tag are dealt out by size when all tags are done.
    weights = np.zeros((count, tags.shape[1] + 1), np.int64)
    np.add.at(weights, member, np.concatenate([tags, np.ones((len(tags), 1), bool)], axis=1))
    remaining = weights.sum(axis=0)
    wanted = shares[:, None] * remaining
    order = np.random.default_rng(seed).permutation(count)
    assigned = np.full(count, -1)
    while (assigned < 0).any():
        rarest = (
            int(np.where(remaining[:-1] > 0, remaining[:-1], np.inf).argmin())
            if remaining[:-1].any()
            else -1
        )
        waiting = [track for track in order if assigned[track] < 0 and weights[track, rarest] > 0]
        for track in sorted(waiting, key=lambda track: -weights[track, rarest]):
            need = wanted / shares[:, None]
            # Where several splits lack equally many, the one that lacks most clips.
            assigned[track] = np.lexsort((need[:, -1], need[:, rarest]))[-1]
            wanted[assigned[track]] -= weights[track]
            remaining = remaining - weights[track]
    return [names[part] for part in assigned[member]]


def _nested_random(count: int, seed: int) -> list[str]:
    """Returns the report's split: a random fifth is "test", then a random fifth of the rest "valid"."""
    outer = np.array(random_split(count, seed, 0.2), object)
    splits = np.where(outer == "valid", "test", outer)
    rest = np.flatnonzero(outer == "train")
    splits[rest] = random_split(len(rest), seed, 0.2)
    return splits.tolist()


def _folder_split(table: MtatTable, row: int) -> str:
    folder = table.mp3_paths[row].split("/")[0]
    if folder not in FOLDER_SPLITS:
        raise UserError(
            f"{table.path}, clip {table.clip_ids[row]}, column mp3_path: {table.mp3_paths[row]!r} is in none of the folders 0-9 "
            "and a-f, by which this protocol splits. Use --config.data.protocol=grouped."
        )
    return FOLDER_SPLITS[folder]


def _describe(protocol: str, top_k: int, seed: int, fractions: Sequence[float]) -> str:
    details = {
        "report": f" random 64/16/20 seed {seed}",
        "grouped": f" by track {fractions_text(fractions)} seed {seed}",
    }
    return f"{protocol}{details.get(protocol, '')}, top {top_k} tags"


def _counts(splits: Sequence[str]) -> str:
    """Returns "train 15,250, valid 1,529, test 4,332"."""
    counts = Counter(splits)
    return ", ".join(f"{split} {counts[split]:,}" for split in SPLITS if counts[split])


def _notes(table: MtatTable, splits: Sequence[str], top_k: int) -> list[str]:
    """What someone who reads a number on this split should know."""
    evaluated = "test" if "test" in splits else "valid"
    tracks, artists = leak(splits, table.tracks, evaluated), leak(splits, table.artists, evaluated)
    notes = [
        f"leaks by the table: {tracks.clips:,} of {tracks.evaluated:,} {evaluated} clips ({tracks.share:.1%}) are from a track "
        f"that is also in train, {artists.clips:,} ({artists.share:.1%}) by an artist who is in train, too"
    ]
    used = {i for i, split in zip(table.clip_ids, splits, strict=True) if split}
    empty = [i for i, path in EMPTY_IN_THE_ARCHIVE.items() if i in used and path in table.mp3_paths]
    if empty:
        notes.append(
            f"known to be empty files in the published archive and counted above: clips {', '.join(empty)}"
        )
    frequency = table.tags.sum(axis=0)
    if top_k < len(frequency) and frequency[top_k - 1] == frequency[top_k]:
        last, first = table.tag_names[top_k - 1 : top_k + 1]
        notes.append(
            f"the tags {last!r} and {first!r} are equally frequent; {first!r} is left out by alphabetical order"
        )
    return notes


def _find(root: Path, mp3_paths: Sequence[str]) -> list[Path | None]:
    """Returns where each mp3 is: `root/<its path>` or `root/<its name>`, None where it is at neither place."""

    @functools.cache
    def files(folder: Path) -> set[str]:
        # One listing a folder is quicker than asking for each of 25,863 files, by far on a network disk.
        try:
            with os.scandir(folder) as entries:
                return {entry.name for entry in entries if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return set()

    found: list[Path | None] = []
    for mp3_path in mp3_paths:
        folder, _, name = mp3_path.rpartition("/")
        if name in files(root / folder):
            found.append(root / mp3_path)
        else:
            found.append(root / name if name in files(root) else None)
    return found


def _read(path: Path) -> bytes:
    """Returns the table's text without quotes, each line ended by one newline."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            data = stream.read(MAX_TABLE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}). Fetch it again.") from error
    if len(data) > MAX_TABLE_BYTES:
        raise UserError(
            f"{path}: holds more than {MAX_TABLE_BYTES:,} bytes, so it is not MTAT's label table."
        )
    # No field of the table has a quote, a tab or a newline inside, so that quotes carry no meaning.
    data = (
        data.removeprefix(b"\xef\xbb\xbf").replace(b'"', b"").replace(b"\r\n", b"\n").rstrip(b"\n")
    )
    return data + b"\n"


def _parse(path: Path, data: bytes) -> MtatTable:
    """Finds the fields by their tabs and newlines, all at once, and checks every one."""
    text = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero((text == _TAB) | (text == _NEWLINE))
    fields = np.diff(np.flatnonzero(text[ends] == _NEWLINE), prepend=-1)
    columns = int(fields[0])
    header = _decode(path, 1, data[: ends[columns - 1]]).split("\t")
    _check_header(path, header)
    if len(wrong := np.flatnonzero(fields != columns)):
        raise UserError(
            f"{path}, line {wrong[0] + 1}: {fields[wrong[0]]} fields where the header has {columns}."
        )
    if len(fields) == 1:
        raise UserError(f"{path}: no rows below the header.")
    starts = np.concatenate([[0], ends[:-1] + 1]).reshape(len(fields), columns)[1:]
    ends = ends.reshape(len(fields), columns)[1:]

    ids = _column(path, data, starts, ends, header.index("clip_id"))
    seen: dict[int, int] = {}
    for line, clip_id in enumerate(ids, start=2):
        if not (clip_id.isascii() and clip_id.isdigit()):
            raise UserError(f"{path}, line {line}, column clip_id: {clip_id!r} is not a number.")
        if int(clip_id) in seen:
            raise UserError(
                f"{path}, line {line}, column clip_id: clip {clip_id} is already on line {seen[int(clip_id)]}."
            )
        seen[int(clip_id)] = line
    mp3_paths = _column(path, data, starts, ends, header.index("mp3_path"))
    lines: dict[str, int] = {}
    for line, mp3_path in enumerate(mp3_paths, start=2):
        if not _match_name(mp3_path) or mp3_path.startswith("/") or ".." in mp3_path.split("/"):
            raise UserError(
                f"{path}, line {line}, column mp3_path: {mp3_path!r} is not a path such as f/artist-album-01-title-START-END.mp3."
            )
        if mp3_path in lines:
            raise UserError(
                f"{path}, line {line}, column mp3_path: {mp3_path} is already on line {lines[mp3_path]}."
            )
        lines[mp3_path] = line

    places = [i for i, name in enumerate(header) if name not in ("clip_id", "mp3_path")]
    first = starts[:, places]
    values = text[first]
    bad = np.argwhere((ends[:, places] - first != 1) | ((values != _ZERO) & (values != _ONE)))
    if len(bad):
        row, column = int(bad[0][0]), places[bad[0][1]]
        value = data[starts[row, column] : ends[row, column]].decode(errors="replace")
        raise UserError(
            f"{path}, line {row + 2}, column {header[column]}: {value[:40]!r} is not 0 or 1."
        )
    tags = values == _ONE
    names = [header[i] for i in places]
    counts = tags.sum(axis=0)
    by_frequency = sorted(range(len(names)), key=lambda i: (-counts[i], names[i]))
    rows = sorted(range(len(ids)), key=lambda i: int(ids[i]))
    return MtatTable(
        path,
        tuple(ids[i] for i in rows),
        tuple(mp3_paths[i] for i in rows),
        tuple(names[i] for i in by_frequency),
        tags[np.ix_(rows, by_frequency)],
    )


def _check_header(path: Path, header: Sequence[str]) -> None:
    for name in ("clip_id", "mp3_path"):
        if name not in header:
            raise UserError(
                f"{path}, line 1: no column {name} among the {len(header)} columns (they are separated by tabs)."
                + (f" Is it {near!r}?" if (near := _nearest(name, header)) else "")
            )
    if len(header) < 3:
        raise UserError(f"{path}, line 1: no column of a tag beside clip_id and mp3_path.")
    for name, count in Counter(header).items():
        if not name or count > 1:
            raise UserError(
                f"{path}, line 1: {f'{count} columns named {name!r}' if name else 'a column without a name'}."
            )


def _nearest(name: str, header: Sequence[str]) -> str:
    """Returns the column that is `name` but for its case, spaces and underscores, or ""."""

    def plain(text: str) -> str:
        return re.sub(r"[\s_-]", "", text).lower()

    return next((column for column in header if plain(column) == plain(name)), "")


def _column(
    path: Path, data: bytes, starts: np.ndarray, ends: np.ndarray, column: int
) -> list[str]:
    """Returns the fields of a column as text, `[rows]`."""
    return [
        _decode(path, line, data[start:end])
        for line, (start, end) in enumerate(
            zip(starts[:, column].tolist(), ends[:, column].tolist(), strict=True), start=2
        )
    ]


def _decode(path: Path, line: int, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {line}: not UTF-8 text ({error.reason} at byte {error.start} of the field)."
        ) from error


def _match_name(mp3_path: str) -> re.Match[str] | None:
    return _MP3_NAME.fullmatch(mp3_path.rpartition("/")[2])
