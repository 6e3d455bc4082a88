"""The Million Song Dataset (Bertin-Mahieux, Ellis, Whitman, Lamere 2011): metadata without audio.

A song file (`data/A/X/L/TRAXLZU12903D05F94.h5`) holds one song, an aggregate file many, and a
summary file the tables of many without the lists of tags. The audio is 30 s previews from 7digital,
which `musicgenre.datasets.fetch.previews` fetches.
"""

import csv
import dataclasses
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from musicgenre.datasets.base import Clip, Dataset, Skipped, find_audio, find_files
from musicgenre.datasets.registry import register
from musicgenre.datasets.splits import fractions_text, split_clips
from musicgenre.errors import UserError

# Folder of the previews in the data set's, and the list in it of the outcome for each song.
PREVIEWS, OUTCOMES = "previews", "previews.csv"
TRACK_ID = re.compile(r"TR[A-Z0-9]{16}")
TEXTS = ("song_id", "title", "artist_name", "artist_id", "release")
SHOP_IDS = ("track_7digitalid", "release_7digitalid", "artist_7digitalid")
TABLES = {
    "metadata/songs": TEXTS + SHOP_IDS,
    "analysis/songs": ("track_id", "duration"),
    "musicbrainz/songs": ("year",),
}
# Rows of a table that are read at once: about 4 MB.
BLOCK = 1000
# The Echo Nest gave an artist some dozens of terms; more than this is a damaged index.
MAX_TAGS = 10_000
# Why a song has no preview, by its status in the list of outcomes.
FINAL = {"not_found": "7digital does not have it", "no_audio": "7digital's response was no audio"}
_Pairs = list[tuple[str, float]]
_HDF5_ERRORS = (OSError, KeyError, ValueError, TypeError, RuntimeError, MemoryError, OverflowError)


@dataclasses.dataclass(frozen=True)
class Song:
    """One song of the Million Song Dataset."""

    track_id: str  # "TR" and 16 letters and digits; unique
    song_id: str  # "SO..."; several tracks may be of one song
    title: str
    artist_name: str  # as on the release
    artist_id: str  # The Echo Nest's, "AR..."
    release: str  # the album
    year: int  # of the release by MusicBrainz; 0 if unknown
    duration: float  # of the complete song in seconds
    track_7digitalid: int  # in 7digital's shop; 0 or -1 if it has none, as the next two
    release_7digitalid: int
    artist_7digitalid: int
    # Tags of the artist, the heaviest first; none in a summary file.
    artist_terms: tuple[tuple[str, float], ...] = ()  # The Echo Nest's, with weights 0 to 1
    artist_mbtags: tuple[tuple[str, int], ...] = ()  # MusicBrainz's, with counts


def read_songs(path: str | os.PathLike[str]) -> Iterator[Song]:
    """Yields the songs of a song file, an aggregate file or a summary file, in the file's order.

    Bytes that are not UTF-8 become the replacement character.

    Raises:
      UserError: h5py is not installed, or the file is missing, damaged or not part of the Million
        Song Dataset.
    """
    h5py = _h5py()
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        with h5py.File(path, "r") as file:
            tables = {name: _table(file, path, name) for name in TABLES}
            count = len(tables["metadata/songs"])
            for name, table in tables.items():
                if len(table) != count:
                    rows = f"{name} has {len(table)} rows where metadata/songs has {count}"
                    raise UserError(f"{path}: {rows}.")
            lists = (
                _tags(file, path, "metadata", "artist_terms", "weight"),
                _tags(file, path, "musicbrainz", "artist_mbtags", "count"),
            )
            for start in range(0, count, BLOCK):
                columns: dict[str, list[Any]] = {}
                for name, names in TABLES.items():
                    rows = tables[name].fields(list(names))[start : start + BLOCK]
                    columns |= {column: rows[column].tolist() for column in names}
                for values in zip(*columns.values(), strict=True):
                    yield _song(path, dict(zip(columns, values, strict=True)), *map(next, lists))
    except _HDF5_ERRORS as error:
        reason = " ".join(str(error.args[0] if error.args else type(error).__name__).split())
        raise UserError(f"{path}: not an HDF5 file that can be read ({reason}).") from error


def _song(path: Path, row: dict[str, Any], terms: _Pairs, tags: _Pairs) -> Song:
    fields: dict[str, Any] = {
        name: _text(value) if name in (*TEXTS, "track_id") else value for name, value in row.items()
    }
    if not TRACK_ID.fullmatch(fields["track_id"]):
        raise UserError(f"{path}: {fields['track_id']!r} is not a track_id, TR and 16 characters.")
    counts = tuple((name, int(count)) for name, count in tags)
    return Song(artist_terms=tuple(terms), artist_mbtags=counts, **fields)


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UserError("MSD needs h5py: pip install 'musicgenre[msd]'.") from error
    return h5py


def _table(file: Any, path: Path, name: str) -> Any:
    """Returns a table of the file after checking its columns."""
    table = file.get(name)
    columns = getattr(getattr(table, "dtype", None), "names", None)
    if columns is None or len(getattr(table, "shape", ())) != 1:
        raise UserError(f"{path}: no table {name}; it is no file of the Million Song Dataset.")
    if lacking := [column for column in TABLES[name] if column not in columns]:
        raise UserError(f"{path}: the table {name} has no column {lacking[0]!r}.")
    return table


def _tags(file: Any, path: Path, group: str, names: str, weights: str) -> Iterator[_Pairs]:
    """Yields the (tag, weight) pairs of each row, the heaviest first, repeated tags once."""
    label, index, table = f"{group}/{names}", f"idx_{names}", file[f"{group}/songs"]
    arrays = [file.get(label), file.get(f"{label}_{weights}")]
    if arrays == [None, None]:
        yield from itertools.repeat([])
    shapes = [getattr(array, "shape", None) for array in arrays]
    if shapes[0] is None or len(shapes[0]) != 1 or shapes[0] != shapes[1]:
        raise UserError(
            f"{path}: {label} and {label}_{weights} are not two lists of one length, but "
            f"{shapes[0]} and {shapes[1]}."
        )
    if index not in table.dtype.names:
        raise UserError(f"{path}: {group}/songs has no column {index!r}.")
    # The tags of a row end where the next row's begin.
    bounds = [*table.fields(index)[:].tolist(), shapes[0][0]]
    for first, last in itertools.pairwise(bounds):
        if not 0 <= first <= last <= min(shapes[0][0], first + MAX_TAGS):
            raise UserError(f"{path}: {index} is damaged (a song's {label} are {first} to {last}).")
        pairs: dict[str, float] = {}
        values = np.nan_to_num(arrays[1][first:last].astype(np.float64)).tolist()
        for name, value in zip(arrays[0][first:last], values, strict=True):
            pairs.setdefault(_text(name), value)
        pairs.pop("", None)
        yield sorted(pairs.items(), key=lambda pair: -pair[1])


def _text(value: Any) -> str:
    if not isinstance(value, bytes | str):
        raise ValueError(f"{value!r} where text is needed")
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return text.strip("\0 \t\r\n")


def walk_songs(root: str | os.PathLike[str]) -> Iterator[Song | Skipped]:
    """Yields the songs of every .h5 file at or below `root`, and a `Skipped` per unusable file.

    Files are in order of their paths. A song that is in several files comes several times.

    Raises:
      UserError: h5py is not installed, or there is no .h5 file.
    """
    # Without h5py every file would be skipped for the same reason.
    _h5py()
    root = Path(root)
    files = [root] if root.is_file() else find_files(root, (".h5",))
    if not files:
        raise UserError(f"{root}: no .h5 files of MSD in this folder or below.")
    for path in files:
        try:
            yield from read_songs(path)
        except UserError as error:
            yield Skipped(path.stem, str(path), str(error).removeprefix(f"{path}: "))


def no_songs(root: str | os.PathLike[str], skipped: Sequence[Skipped]) -> UserError:
    """Returns the error of a data set without a usable song."""
    first = f"; the first is {skipped[0].path}: {skipped[0].reason}" if skipped else ""
    count = len(skipped)
    return UserError(f"{root}: no song in its .h5 files, {count} of which cannot be used{first}")


def find_previews(root: str | os.PathLike[str]) -> dict[str, Path]:
    """Returns the sound files below `root` that are named after a track, by track id.

    An example is previews/TRAXLZU12903D05F94.mp3. Where a track has several, the one in the folder
    "previews" counts. For a file `root`, the folder "previews" next to it is searched.
    """
    folder = preview_folder(root)
    files = find_audio(Path(root) if Path(root).is_dir() else folder)
    files.sort(key=lambda path: path.parent == folder)
    return {path.stem: path for path in files if TRACK_ID.fullmatch(path.stem)}


def preview_folder(root: str | os.PathLike[str]) -> Path:
    """Returns the folder "previews" in a data set's folder, or next to its file."""
    root = Path(root)
    return (root if root.is_dir() else root.parent) / PREVIEWS


@register("msd")
def load_msd(
    root: str | Path,
    *,
    top_k: int = 50,
    seed: int = 42,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    allow_missing: bool = False,
) -> Dataset:
    """Reads the songs that have a preview, with their artists' commonest terms as tags.

    A song has its artist's terms, so the split is by artist: any other would give the tags away.
    These are not the Last.fm tags of published results. A song without a preview is skipped where
    that is final: it has no 7digital id, or `previews.csv` says that there is none.

    Args:
      root: the folder with the .h5 files at any depth and the folder "previews" (a preview may also
        be in another folder below); or one file of many songs with "previews" next to it.
      top_k: how many terms are labels: those of most songs with a preview. Songs with none of them
        are skipped.
      seed: of the split.
      fractions: of train, valid and test.
      allow_missing: skip songs whose preview was not fetched yet, instead of an error.

    Returns:
      Clips by track id; a clip's labels are its strongest terms first, its group the artist.

    Raises:
      UserError: h5py is not installed, no songs, no previews, a preview that was not fetched yet,
        or songs without terms.
    """
    root = Path(root)
    audio = find_previews(root)
    found = _gather(root, audio)
    fetch = f"Fetch them: musicgenre fetch_previews --root={root}"
    if not found.usable:
        raise UserError(f"{root}: none of the {found.songs} songs has a preview. {fetch}")
    if found.unfetched and not allow_missing:
        raise UserError(
            f"{root}: {found.unfetched[0]} has no preview yet ({len(found.unfetched)} of "
            f"{found.songs} songs were not fetched so far). {fetch}, or continue without them with "
            "--config.data.allow_missing=True."
        )
    counts = Counter(term for song in found.usable.values() for term, _ in song.artist_terms)
    if not counts:
        why = "A summary file has none; use the song files"
        raise UserError(f"{root}: no song with a preview has artist terms. {why}.")
    names = tuple(sorted(counts, key=lambda term: (-counts[term], term))[:top_k])
    clips = []
    for track_id, song in found.usable.items():
        if labels := tuple(term for term, _ in song.artist_terms if term in names):
            clips.append(Clip(track_id, audio[track_id], labels, "", song.artist_id or None))
        else:
            why = f"none of the {len(names)} commonest artist terms"
            found.skipped.append(Skipped(track_id, str(audio[track_id]), why))
    clips = split_clips(clips, seed, fractions)
    notes = [
        f"{found.songs} songs, {len(found.usable)} with a preview; {len(clips)} of them have one "
        f"of the {len(names)} commonest terms of {len(counts)}.",
        "A song's tags are its artist's Echo Nest terms; results on Last.fm tags are not "
        "comparable.",
    ]
    if found.again:
        notes.append(f"{found.again} rows are of a song that came before; they count once.")
    if strays := len(audio.keys() - found.usable.keys()):
        notes.append(
            f"{strays} sound files are named after tracks that no .h5 file has; they are left out."
        )
    title = f"by artist, top {len(names)} artist terms, {fractions_text(fractions)}, seed {seed}"
    skipped, lines = found.skipped, tuple(notes)
    return Dataset("msd", root, title, "multi_label", names, clips, skipped, notes=lines)


class _Gathered(NamedTuple):
    usable: dict[str, Song]  # songs with a preview, by track id
    skipped: list[Skipped]
    unfetched: list[str]
    songs: int  # distinct ones
    again: int  # rows of a song seen before


def _gather(root: Path, audio: Mapping[str, Path]) -> _Gathered:
    """Reads every song and sorts it by whether it has a preview, and why not."""
    outcomes = _outcomes(preview_folder(root) / OUTCOMES)
    usable, skipped, unfetched = dict[str, Song](), list[Skipped](), list[str]()
    seen = Counter[str]()
    for item in walk_songs(root):
        if isinstance(item, Skipped):
            skipped.append(item)
            continue
        track_id = item.track_id
        seen[track_id] += 1
        if track_id in audio:
            # A summary file has the song but not its terms.
            if track_id not in usable or not usable[track_id].artist_terms:
                usable[track_id] = item
        elif seen[track_id] == 1:
            reason = FINAL.get(outcomes.get(track_id, ""), "")
            if item.track_7digitalid <= 0:
                reason = "it has no 7digital id"
            if not reason:
                unfetched.append(track_id)
            path = str(preview_folder(root) / f"{track_id}.mp3")
            skipped.append(Skipped(track_id, path, f"no preview: {reason or 'not fetched yet'}"))
    if not seen:
        raise no_songs(root, skipped)
    return _Gathered(usable, skipped, unfetched, len(seen), seen.total() - len(seen))


def _outcomes(path: Path) -> dict[str, str]:
    """Returns the status of each track id in the list that fetching writes, {} without a list."""
    if not path.is_file():
        return {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return {row["track_id"]: row["status"] for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as error:
        reason = f"no column {error}" if isinstance(error, KeyError) else f"not readable: {error}"
        raise UserError(f"{path}: {reason}. Delete it; fetch_previews writes it again.") from error
