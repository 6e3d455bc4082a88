"""MagnaTagATune (Law, West, Mandel, Bay, Downie 2009): 25,863 clips of 29 s, 188 tags, 4 protocols.

The protocols are not comparable, so every result must name its own. `report` is that of the 2017
report: two nested random splits, in which nine of ten test clips come from a track that is also in
the training set. `clean` and `all` follow the folders of the data set, as Won (2020) and most
others do: no track and no album is on two sides, but six of ten test clips have their artist in the
training set. `grouped` draws a split that keeps tracks together.
"""

import dataclasses
import functools
import gzip
import itertools
import os
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from musicgenre.datasets.base import SPLITS, Clip, Dataset, Skipped
from musicgenre.datasets.registry import register
from musicgenre.datasets.splits import fractions_text, random_split, split_fractions
from musicgenre.errors import UserError, did_you_mean

PROTOCOLS = ("report", "clean", "all", "grouped")
TABLE_NAMES = ("annotations_final.csv", "annotations_final.csv.gz")
# The split of each of the data set's sixteen folders.
FOLDER_SPLITS = dict(
    zip("0123456789abcdef", ["train"] * 12 + ["valid"] + ["test"] * 3, strict=True)
)
# Three mp3s of the published archive are empty.
EMPTY_IN_THE_ARCHIVE = {
    "35644": "6/norine_braun-now_and_zen-08-gently-117-146.mp3",
    "55753": "8/jacob_heringman-josquin_des_prez_lute_settings-19-gintzler__pater_noster-204-233"
    ".mp3",
    "57881": "9/american_baroque-dances_and_suites_of_rameau_and_couperin-25-le_petit_rien_xiveme_"
    "ordre_couperin-88-117.mp3",
}

# FOLDER/artist-album-NN-title-START-END.mp3; the track is the name without the seconds.
_MP3_PATH = re.compile(r"(?:.*/)?(?P<track>(?P<artist>[^-/]+)-[^/]+)-\d+-\d+\.mp3")


@dataclasses.dataclass(frozen=True, eq=False)
class MtatTable:
    """The label table."""

    path: Path
    clip_ids: tuple[str, ...]  # [clips], in ascending order of their numbers
    mp3_paths: tuple[str, ...]  # [clips], in the data set's folder: "f/a-b-01-title-30-59.mp3"
    tag_names: tuple[str, ...]  # [tags], most frequent first, equally frequent ones alphabetically
    tags: np.ndarray  # bool [clips, tags], whether a clip has a tag

    @functools.cached_property
    def tracks(self) -> tuple[str, ...]:
        """The track that each clip is an excerpt of: the mp3's name without seconds, `[clips]`."""
        return tuple(match["track"] for match in map(_MP3_PATH.fullmatch, self.mp3_paths) if match)

    @functools.cached_property
    def artists(self) -> tuple[str, ...]:
        """The artist of each clip, the beginning of the mp3's name, `[clips]`."""
        return tuple(match["artist"] for match in map(_MP3_PATH.fullmatch, self.mp3_paths) if match)


class Leak(NamedTuple):
    """How many of the evaluated clips share a group with training clips."""

    clips: int
    evaluated: int

    @property
    def fraction(self) -> float:
        """The fraction of the evaluated clips, 0 to 1."""
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
    """Reads a folder with `annotations_final.csv` (or `.csv.gz`) and the mp3s.

    The mp3s are in the folders in which they were published, or all in one folder. Labels are the
    `top_k` most frequent tags in that order, the group of a clip is its track.

    Args:
      root: the folder.
      protocol: "report" (clips with a top tag; 13,510 / 3,378 / 4,223), "clean" (clips with a top
        tag; folders 0-b train, c valid, d-f test; 15,250 / 1,529 / 4,332), "all" (every clip, by
        folder; 18,709 / 1,825 / 5,329) or "grouped" (clips with a top tag, split by track).
      top_k: number of tags.
      seed: of "report" and "grouped".
      fractions: of train, valid and test in "grouped".
      allow_missing: list clips whose mp3 is not on disk as skipped, instead of an error.

    Raises:
      UserError: as `read_table` and `protocol_splits`, or mp3s that are not on disk.
    """
    root = Path(root)
    table = read_table(root)
    splits = protocol_splits(table, protocol, top_k=top_k, seed=seed, fractions=fractions)
    grouped = f" by track {fractions_text(fractions)} seed {seed}"
    details = {"report": f" random 64/16/20 seed {seed}", "grouped": grouped}
    title = f"{protocol}{details.get(protocol, '')}, top {top_k} tags"
    used, numbers = [i for i, split in enumerate(splits) if split], Counter(splits)
    parts = ", ".join(f"{split} {numbers[split]:,}" for split in SPLITS if numbers[split])
    counts = f"mtat, protocol {title}: {parts} of {len(splits):,} clips in the table"
    names = table.tag_names[:top_k]
    clips, skipped = [], []
    for i, path in zip(used, _find(root, [table.mp3_paths[i] for i in used]), strict=True):
        clip_id, tags = table.clip_ids[i], tuple(itertools.compress(names, table.tags[i]))
        if path is None:
            skipped.append(Skipped(clip_id, str(root / table.mp3_paths[i]), "not on disk"))
        else:
            clips.append(Clip(clip_id, path, tags, splits[i], table.tracks[i]))
    if skipped and not (allow_missing and clips):
        advice = "Continue without them with --config.data.allow_missing=True, or fetch them: "
        raise UserError(
            f"{skipped[0].path} is not on disk: {len(skipped):,} of {len(used):,} mp3s are missing "
            f"({counts}). {'Fetch them: ' if allow_missing else advice}{_fetch_command(root)}"
        )
    absent = "every mp3 is on disk"
    if skipped:
        absent = f"{len(skipped):,} mp3{'s are' if len(skipped) != 1 else ' is'} not on disk"
    notes = (f"{counts}; {absent}", *_notes(table, splits, top_k))
    return Dataset(
        "mtat", root, title, "multi_label", names, clips, skipped, group_name="track", notes=notes
    )


def read_table(root: str | Path) -> MtatTable:
    """Reads the label table of a folder.

    Two forms are read alike: the original (quoted fields, tags in its own order) and one without
    quotes, the tags by frequency.

    Args:
      root: the folder that holds `annotations_final.csv` or `annotations_final.csv.gz`.

    Raises:
      UserError: there is none, or it cannot be used; the message names the file, line and column.
    """
    path = next(
        (path for path in (Path(root, name) for name in TABLE_NAMES) if path.is_file()), None
    )
    if not path:
        raise UserError(
            f"{root}: no {' or '.join(TABLE_NAMES)} in this folder. Set --config.data.root to the "
            f"one that holds it, or fetch MagnaTagATune with: {_fetch_command(root)}"
        )
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return _parse(path, data.decode("utf-8-sig"))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not UTF-8 text that can be read ({error}).") from error


def _fetch_command(root: str | Path) -> str:
    return f"musicgenre download --dataset=mtat --root={root}"


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
      UserError: an unknown protocol, fewer than `top_k` tags, impossible fractions, or a folder
        that is not one of 0-9, a-f.
    """
    if protocol not in PROTOCOLS:
        hint = did_you_mean(protocol, PROTOCOLS)
        raise UserError(f"data.protocol: MTAT has no protocol {protocol!r}.{hint}")
    count = int(table.tags.any(axis=0).sum())
    if not 1 <= top_k <= count:
        raise UserError(f"data.top_k={top_k} is not one of 1 to {count}, the tags of {table.path}.")
    tagged = table.tags[:, :top_k].any(axis=1) | (protocol == "all")
    chosen: list[int] = np.flatnonzero(tagged).tolist()
    if protocol == "report":
        parts = _nested_random(len(chosen), seed)
    elif protocol == "grouped":
        tracks = [table.tracks[i] for i in chosen]
        parts = split_tracks(table.tags[chosen, :top_k], tracks, seed, fractions)
    else:
        parts = [_folder_split(table, i) for i in chosen]
    splits = [""] * len(table.clip_ids)
    for i, part in zip(chosen, parts, strict=True):
        splits[i] = part
    return splits


def leak(splits: Sequence[str], groups: Sequence[str], evaluated: str = "test") -> Leak:
    """Counts the evaluated clips whose group (their track, their artist) also has a training clip.

    With `protocol_splits` and `MtatTable.tracks` this needs no audio.

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
    """Splits clips so that no track is in two splits and every tag follows the fractions closely.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011) of tracks: the tag with the
    fewest clips left is next. Its tracks are assigned, those with most such clips first, each to
    the split that lacks most of them.

    Args:
      tags: bool `[clips, tags]`.
      tracks: of each clip, `[clips]`.
      seed: of the order of equal tracks.
      fractions: of train, valid and test; 0 leaves a split out.

    Returns:
      The split of each clip.

    Raises:
      UserError: as `splits.split_fractions`.
    """
    names, parts = split_fractions(fractions)
    _, member = np.unique(np.asarray(tracks, np.str_), return_inverse=True)
    count = int(member.max()) + 1
    # The last column counts clips, so that tracks without a tag are assigned by size at the end.
    weights = np.zeros((count, tags.shape[1] + 1), np.int64)
    np.add.at(weights, member, np.concatenate([tags, np.ones((len(tags), 1), bool)], axis=1))
    remaining = weights.sum(axis=0)
    wanted = parts[:, None] * remaining
    order = np.random.default_rng(seed).permutation(count)
    assigned = np.full(count, -1)
    while (assigned < 0).any():
        rarest = -1
        if remaining[:-1].any():
            rarest = int(np.where(remaining[:-1] > 0, remaining[:-1], np.inf).argmin())
        waiting = [track for track in order if assigned[track] < 0 and weights[track, rarest] > 0]
        for track in sorted(waiting, key=lambda track: -weights[track, rarest]):
            need = wanted / parts[:, None]
            # Where several splits lack equally many, the one that lacks most clips.
            assigned[track] = np.lexsort((need[:, -1], need[:, rarest]))[-1]
            wanted[assigned[track]] -= weights[track]
            remaining = remaining - weights[track]
    return [names[part] for part in assigned[member]]


def _nested_random(count: int, seed: int) -> list[str]:
    """Returns the report's split: a random fifth is "test", then a fifth of the rest "valid"."""
    outer = random_split(count, seed, 0.2)
    inner = iter(random_split(outer.count("train"), seed, 0.2))
    return ["test" if part == "valid" else next(inner) for part in outer]


def _folder_split(table: MtatTable, row: int) -> str:
    path = table.mp3_paths[row]
    if path.split("/")[0] not in FOLDER_SPLITS:
        raise UserError(
            f"{table.path}, clip {table.clip_ids[row]}, column mp3_path: {path!r} is in none of "
            "the folders 0-9 and a-f of this protocol. Use --config.data.protocol=grouped."
        )
    return FOLDER_SPLITS[path.split("/")[0]]


def _notes(table: MtatTable, splits: Sequence[str], top_k: int) -> list[str]:
    """Returns what a reader of a result on this split should know."""
    evaluated = "test" if "test" in splits else "valid"
    tracks, artists = leak(splits, table.tracks, evaluated), leak(splits, table.artists, evaluated)
    notes = [
        f"leaks by the table: {tracks.clips:,} of {tracks.evaluated:,} {evaluated} clips "
        f"({tracks.fraction:.1%}) are from a track that is also in train, {artists.clips:,} "
        f"({artists.fraction:.1%}) by an artist who is in train, too"
    ]
    used = {i for i, split in zip(table.clip_ids, splits, strict=True) if split}
    empty = [i for i, path in EMPTY_IN_THE_ARCHIVE.items() if i in used and path in table.mp3_paths]
    if empty:
        known = "known to be empty files in the published archive and counted above"
        notes.append(f"{known}: clips {', '.join(empty)}")
    frequency = table.tags.sum(axis=0)
    if top_k < len(frequency) and frequency[top_k - 1] == frequency[top_k]:
        last, first = table.tag_names[top_k - 1 : top_k + 1]
        order = f"{first!r} is left out by alphabetical order"
        notes.append(f"the tags {last!r} and {first!r} are equally frequent; {order}")
    return notes


def _find(root: Path, mp3_paths: Sequence[str]) -> list[Path | None]:
    """Returns the path of each mp3: `root/<its path>`, `root/<its name>`, or None."""

    @functools.cache
    def files(folder: Path) -> set[str]:
        # Listing each folder once is faster than 25,863 tests, by far on a network disk.
        return {e.name for e in os.scandir(folder) if e.is_file()} if folder.is_dir() else set()

    found: list[Path | None] = []
    for mp3_path in mp3_paths:
        folder, _, name = mp3_path.rpartition("/")
        homes = (home for home in (root / folder, root) if name in files(home))
        found.append(next((home / name for home in homes), None))
    return found


def _parse(path: Path, text: str) -> MtatTable:
    """Reads the fields and checks every one."""
    # No field of the table has a quote, a tab or a newline inside, so that quotes have no meaning.
    lines = text.replace('"', "").replace("\r\n", "\n").rstrip("\n").split("\n")
    header = lines[0].split("\t")
    _check_header(path, header)
    if len(lines) == 1:
        raise UserError(f"{path}: no rows below the header.")
    clip_column, path_column = header.index("clip_id"), header.index("mp3_path")
    tag_columns = [i for i in range(len(header)) if i not in (clip_column, path_column)]
    names = [header[i] for i in tag_columns]
    first_lines: dict[object, int] = {}
    ids, mp3_paths, marks = [], [], []
    for line, row in enumerate(lines[1:], start=2):
        fields = row.split("\t")
        where = f"{path}, line {line}"
        if len(fields) != len(header):
            raise UserError(f"{where}: {len(fields)} fields where the header has {len(header)}.")
        clip_id, mp3_path = fields[clip_column], fields[path_column]
        own = [fields[i] for i in tag_columns]
        column, problem = "", ""
        if not (clip_id.isascii() and clip_id.isdigit()):
            column, problem = "clip_id", f"{clip_id!r} is not a number"
        elif not _MP3_PATH.fullmatch(mp3_path) or {"", ".."} & set(mp3_path.split("/")):
            wanted = "a path such as f/artist-album-01-title-START-END.mp3"
            column, problem = "mp3_path", f"{mp3_path!r} is not {wanted}"
        elif (first := first_lines.setdefault(int(clip_id), line)) != line:
            column, problem = "clip_id", f"clip {clip_id} is already on line {first}"
        elif (first := first_lines.setdefault(mp3_path, line)) != line:
            column, problem = "mp3_path", f"{mp3_path} is already on line {first}"
        elif not set(own) <= {"0", "1"}:
            column, mark = next(x for x in zip(names, own, strict=True) if x[1] not in ("0", "1"))
            problem = f"{mark[:40]!r} is not 0 or 1"
        if problem:
            raise UserError(f"{where}, column {column}: {problem}.")
        ids.append(clip_id)
        mp3_paths.append(mp3_path)
        marks.append("".join(own))
    tags = np.frombuffer("".join(marks).encode(), np.uint8).reshape(len(ids), -1) == ord("1")
    counts = tags.sum(axis=0)
    by_frequency = sorted(range(len(names)), key=lambda i: (-counts[i], names[i]))
    rows = sorted(range(len(ids)), key=lambda i: int(ids[i]))

    def pick(values: list[str], order: list[int]) -> tuple[str, ...]:
        return tuple(values[i] for i in order)

    tags = tags[np.ix_(rows, by_frequency)]
    return MtatTable(path, pick(ids, rows), pick(mp3_paths, rows), pick(names, by_frequency), tags)


def _check_header(path: Path, header: Sequence[str]) -> None:
    problem, ((name, count),) = "", Counter(header).most_common(1)
    if absent := [column for column in ("clip_id", "mp3_path") if column not in header]:
        problem = f"no column {absent[0]} among the {len(header)} columns, which tabs separate"
    elif len(header) < 3:
        problem = "no column of a tag, only clip_id and mp3_path"
    elif count > 1:
        problem = f"{count} columns named {name!r}"
    elif "" in header:
        problem = "a column without a name"
    if problem:
        raise UserError(f"{path}, line 1: {problem}.")
