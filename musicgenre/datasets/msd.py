"""The Million Song Dataset (Bertin-Mahieux, Ellis, Whitman, Lamere 2011): what is known of a million songs, without the sound.

A song file (`data/A/X/L/TRAXLZU12903D05F94.h5`) holds one song, an aggregate file many, and a summary file the tables of many
without the lists of tags. The sound is 30 s previews from 7digital, which `musicgenre.datasets.fetch.previews` fetches.
"""

import csv
import dataclasses
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from musicgenre.datasets.base import Clip, Dataset, Skipped, find_audio, make_dataset
from musicgenre.datasets.folder import fractions_text
from musicgenre.datasets.registry import register
from musicgenre.datasets.splits import group_split
from musicgenre.errors import UserError

# Folder of the previews below the data set's, and the list of what came of each song in it.
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
# Why a song that 7digital was asked for has no preview, by its status in the list of outcomes.
FINAL = {"not_found": "7digital does not have it", "no_audio": "7digital's answer was no sound"}


@dataclasses.dataclass(frozen=True)
class Song:
    """One song of the Million Song Dataset.

    Attributes:
      track_id: "TR" and 16 letters and digits; unique.
      song_id: "SO..."; several tracks may be of one song.
      title: of the song.
      artist_name: as on the release.
      artist_id: The Echo Nest's, "AR...".
      release: the album.
      year: of the release by MusicBrainz; 0 where it is not known.
      duration: of the whole song in seconds.
      track_7digitalid: of this track in 7digital's shop; 0 or -1 where there is none. The other two alike.
      release_7digitalid: of the release.
      artist_7digitalid: of the artist.
      artist_terms: The Echo Nest's tags of the artist with their weights (0 to 1), the strongest first; none in a summary file.
      artist_mbtags: MusicBrainz's tags of the artist with their counts, the most frequent first; none in a summary file.
    """

    track_id: str
    song_id: str
    title: str
    artist_name: str
    artist_id: str
    release: str
    year: int
    duration: float
    track_7digitalid: int
    release_7digitalid: int
    artist_7digitalid: int
    artist_terms: tuple[tuple[str, float], ...] = ()
    artist_mbtags: tuple[tuple[str, int], ...] = ()


def read_songs(path: str | os.PathLike[str]) -> Iterator[Song]:
    """Yields the songs of a song file, an aggregate file or a summary file, in the file's order.

    Text that is not UTF-8 keeps what can be read; the rest becomes the replacement character.

    Raises:
      UserError: h5py is not installed, or the file is missing, damaged or none of the Million Song Dataset.
    """
    h5py = _h5py()
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        with h5py.File(path, "r") as file:
            tables = {place: _table(file, path, place, names) for place, names in TABLES.items()}
            count = len(tables["metadata/songs"])
            for place, table in tables.items():
                if len(table) != count:
                    raise UserError(
                        f"{path}: {place} has {len(table)} rows where metadata/songs has {count}."
                    )
            terms = _Tags(
                file,
                path,
                tables["metadata/songs"],
                "metadata/artist_terms",
                "metadata/artist_terms_weight",
            )
            tags = _Tags(
                file,
                path,
                tables["musicbrainz/songs"],
                "musicbrainz/artist_mbtags",
                "musicbrainz/artist_mbtags_count",
            )
            for start in range(0, count, BLOCK):
                stop = min(start + BLOCK, count)
                columns: dict[str, Any] = {}
                for place, names in TABLES.items():
                    rows = tables[place].fields(list(names))[start:stop]
                    columns |= {name: rows[name].tolist() for name in names}
                for i, term, tag in zip(
                    range(stop - start),
                    terms.read(start, stop),
                    tags.read(start, stop),
                    strict=True,
                ):
                    track_id = _text(columns["track_id"][i])
                    if not TRACK_ID.fullmatch(track_id):
                        raise UserError(
                            f"{path}: analysis/songs has the track_id {track_id!r}; TR and 16 characters are needed."
                        )
                    values: dict[str, Any] = {name: _text(columns[name][i]) for name in TEXTS}
                    values |= {name: int(columns[name][i]) for name in (*SHOP_IDS, "year")}
                    yield Song(
                        track_id=track_id,
                        duration=float(columns["duration"][i]),
                        artist_terms=tuple(term),
                        artist_mbtags=tuple((name, int(number)) for name, number in tag),
                        **values,
                    )
    except (
        OSError,
        KeyError,
        ValueError,
        TypeError,
        RuntimeError,
        MemoryError,
        OverflowError,
    ) as error:
        reason = " ".join(str(error.args[0] if error.args else type(error).__name__).split())
        raise UserError(f"{path}: not an HDF5 file that can be read ({reason}).") from error


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            "the Million Song Dataset needs h5py, which is not installed: pip install 'musicgenre[msd]'."
        ) from error
    return h5py


def _table(file: Any, path: Path, place: str, names: Sequence[str]) -> Any:
    """Returns a table of the file after a look at its columns."""
    table = file.get(place)
    columns = getattr(getattr(table, "dtype", None), "names", None)
    if columns is None or len(getattr(table, "shape", ())) != 1:
        raise UserError(f"{path}: no table {place}; it is no file of the Million Song Dataset.")
    if lacking := [name for name in names if name not in columns]:
        raise UserError(f"{path}: the table {place} has no column {lacking[0]!r}.")
    return table


class _Tags:
    """The tags of every song with their weights: two long arrays, and for each row of a table where its part begins."""

    def __init__(self, file: Any, path: Path, table: Any, names: str, weights: str) -> None:
        self._path, self._table, self._place = path, table, names
        self._index = f"idx_{names.rpartition('/')[2]}"
        self._names, self._weights = file.get(names), file.get(weights)
        if self._names is None and self._weights is None:
            return
        shapes = [getattr(array, "shape", None) for array in (self._names, self._weights)]
        if shapes[0] is None or len(shapes[0]) != 1 or shapes[0] != shapes[1]:
            raise UserError(
                f"{path}: {names} and {weights} are not two lists of one length, but {shapes[0]} and {shapes[1]}."
            )
        if self._index not in table.dtype.names:
            raise UserError(
                f"{path}: {table.name[1:]} has no column {self._index!r}, which says where a song's {names} begin."
            )

    def read(self, start: int, stop: int) -> list[list[tuple[str, float]]]:
        """Returns for each of the rows its (tag, weight) pairs, the heaviest first; a tag twice counts once."""
        if self._names is None:
            return [[] for _ in range(start, stop)]
        # A part ends where the next row's begins.
        bounds = self._table.fields(self._index)[start : stop + 1].astype(np.int64).tolist()
        if len(bounds) == stop - start:
            bounds.append(self._names.shape[0])
        for first, last in itertools.pairwise(bounds):
            if not 0 <= first <= last <= min(self._names.shape[0], first + MAX_TAGS):
                raise UserError(
                    f"{self._path}: {self._index} is damaged (a song's part of {self._place} is {first} to {last})."
                )
        names = self._names[bounds[0] : bounds[-1]].tolist()
        weights = np.nan_to_num(self._weights[bounds[0] : bounds[-1]].astype(np.float64)).tolist()
        result = []
        for first, last in itertools.pairwise(bound - bounds[0] for bound in bounds):
            pairs: dict[str, float] = {}
            for name, weight in zip(names[first:last], weights[first:last], strict=True):
                if text := _text(name):
                    pairs.setdefault(text, weight)
            result.append(sorted(pairs.items(), key=lambda pair: -pair[1]))
        return result


def _text(value: Any) -> str:
    if not isinstance(value, bytes | str):
        raise ValueError(f"{value!r} where text is needed")
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return text.strip("\0 \t\r\n")


def walk_songs(root: str | os.PathLike[str]) -> Iterator[Song | Skipped]:
    """Yields the songs of every .h5 file at or below `root`, and a `Skipped` for each file that cannot be used.

    Files are taken in order of their paths. A song that is in several files comes several times.

    Raises:
      UserError: h5py is not installed, no such folder or file, or no .h5 file in it.
    """
    # Without h5py every file would be skipped for the same reason.
    _h5py()
    root = Path(root)
    if not root.exists():
        raise UserError(
            f"{root}: no such folder. It should hold the .h5 files of the Million Song Dataset, at any depth."
        )
    files = [root]
    if root.is_dir():
        files = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            files += [
                Path(folder, name)
                for name in names
                if name.lower().endswith(".h5") and not name.startswith(".")
            ]
        files.sort()
    if not files:
        raise UserError(
            f"{root}: no .h5 files of the Million Song Dataset in this folder or below."
        )
    for path in files:
        try:
            yield from read_songs(path)
        except UserError as error:
            yield Skipped(path.stem, str(path), str(error).removeprefix(f"{path}: "))


def find_previews(root: str | os.PathLike[str]) -> dict[str, Path]:
    """Returns the sound files below `root` that are named after a track, such as previews/TRAXLZU12903D05F94.mp3, by track id.

    Where a track has several, the one in the folder "previews" counts. For a file `root`, the folder "previews" beside it is
    searched.
    """
    folder = preview_folder(root)
    files = find_audio(Path(root) if Path(root).is_dir() else folder)
    files.sort(key=lambda path: path.parent == folder)
    return {path.stem: path for path in files if TRACK_ID.fullmatch(path.stem)}


def preview_folder(root: str | os.PathLike[str]) -> Path:
    """Returns where the previews of a data set lie: the folder "previews" in its folder, or beside its file."""
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
    """Reads the songs that have a preview, with the commonest of their artists' terms as tags, split by artist.

    A song has its artist's terms, so songs of one artist have the same tags: in a split that is not by artist they would give
    the answer away. These are not the Last.fm tags that published figures on the Million Song Dataset are about.

    A song without a preview is skipped where that is final (no 7digital id, or the list `previews.csv` of the fetching says
    that there is none).

    Args:
      root: the folder with the .h5 files at any depth and the folder "previews" (a preview may lie elsewhere below, named after
        its track); or one file of many songs with "previews" beside it.
      top_k: how many terms are labels: those that most of the songs with a preview have. Songs with none of them are skipped.
      seed: of the split.
      fractions: of train, valid and test.
      allow_missing: skip songs, too, that have no preview because none was fetched yet, instead of an error.

    Returns:
      Clips by track id; a clip's labels are its strongest terms first, its group the artist.

    Raises:
      UserError: h5py is not installed, no songs, no previews, a preview that was not fetched yet, or songs without terms.
    """
    root = Path(root)
    audio = find_previews(root)
    found = _gather(root, audio)
    fetch = f"python experiments/fetch_previews.py --root={root}"
    if not found.usable:
        raise UserError(
            f"{root}: none of the {found.songs} songs has a preview in {preview_folder(root)}. Fetch some: {fetch}"
        )
    if found.unfetched and not allow_missing:
        raise UserError(
            f"{root}: {found.unfetched[0]} has no preview yet ({len(found.unfetched)} of {found.songs} songs were not fetched so "
            f"far). Fetch them: {fetch}, or go on without them with --config.data.allow_missing=True."
        )
    skipped = found.skipped
    counts = Counter(term for song in found.usable.values() for term, _ in song.artist_terms)
    if not counts:
        raise UserError(
            f"{root}: no song with a preview has artist terms, which are the labels. A summary file has none; the song files or "
            "an aggregate file are needed."
        )
    names = tuple(sorted(counts, key=lambda term: (-counts[term], term))[:top_k])
    songs, labels = [], []
    for song in found.usable.values():
        tags = tuple(term for term, _ in song.artist_terms if term in names)
        if tags:
            songs.append(song)
            labels.append(tags)
        else:
            skipped.append(
                Skipped(
                    song.track_id,
                    str(audio[song.track_id]),
                    f"none of the {len(names)} commonest artist terms",
                )
            )
    splits = group_split(
        [tags[0] for tags in labels], [song.artist_id or None for song in songs], seed, fractions
    )
    clips = tuple(
        Clip(song.track_id, audio[song.track_id], tags, split, song.artist_id or None)
        for song, tags, split in zip(songs, labels, splits, strict=True)
    )
    notes = [
        f"{found.songs} songs, {len(found.usable)} with a preview; {len(clips)} of them have one of the {len(names)} commonest "
        f"terms of {len(counts)}.",
        "A song's tags are its artist's Echo Nest terms; results on Last.fm tags are not comparable.",
    ]
    if found.again:
        notes.append(f"{found.again} rows are of a song that came before; they count once.")
    if strays := len(audio.keys() - found.usable.keys()):
        notes.append(
            f"{strays} sound files are named after tracks that no .h5 file knows; they are left out."
        )
    protocol = f"by artist, top {len(names)} artist terms, {fractions_text(fractions)}, seed {seed}"
    return make_dataset(
        Dataset(
            "msd", root, protocol, "multi_label", names, clips, tuple(skipped), notes=tuple(notes)
        )
    )


@dataclasses.dataclass
class _Gathered:
    """Songs with a preview by track id, what was skipped, songs to be fetched, distinct songs, and rows of a song seen before."""

    usable: dict[str, Song] = dataclasses.field(default_factory=dict)
    skipped: list[Skipped] = dataclasses.field(default_factory=list)
    unfetched: list[str] = dataclasses.field(default_factory=list)
    songs: int = 0
    again: int = 0


def _gather(root: Path, audio: Mapping[str, Path]) -> _Gathered:
    """Reads every song and sorts it by whether it has a preview, and why not."""
    outcomes = read_outcomes(preview_folder(root) / OUTCOMES)
    found, seen = _Gathered(), set[str]()
    for item in walk_songs(root):
        if isinstance(item, Skipped):
            found.skipped.append(item)
            continue
        track_id = item.track_id
        new = track_id not in seen
        seen.add(track_id)
        found.again += not new
        if track_id in audio:
            # A summary file knows the song but not its terms.
            if new or not found.usable[track_id].artist_terms:
                found.usable[track_id] = item
        elif new:
            reason = (
                "it has no 7digital id"
                if item.track_7digitalid <= 0
                else FINAL.get(outcomes.get(track_id, ""))
            )
            if reason is None:
                found.unfetched.append(track_id)
            place = preview_folder(root) / f"{track_id}.mp3"
            found.skipped.append(
                Skipped(track_id, str(place), f"no preview: {reason or 'not fetched yet'}")
            )
    found.songs = len(seen)
    if not seen:
        first = (
            f"; the first is {found.skipped[0].path}: {found.skipped[0].reason}"
            if found.skipped
            else ""
        )
        raise UserError(
            f"{root}: no song in its .h5 files, {len(found.skipped)} of which cannot be used{first}"
        )
    return found


def read_outcomes(path: Path) -> dict[str, str]:
    """Returns the status of each track id in the list that fetching writes; nothing where there is no list.

    Raises:
      UserError: the file cannot be read or lacks a column.
    """
    if not path.is_file():
        return {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return {row["track_id"]: row["status"] for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path}: cannot be read ({error}). Delete it; fetch_previews.py writes it again."
        ) from error
    except KeyError as error:
        raise UserError(
            f"{path}: has no column {error.args[0]!r}. Delete it; fetch_previews.py writes it again."
        ) from error
