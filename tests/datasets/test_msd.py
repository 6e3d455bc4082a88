import sys

import numpy as np
import pytest

from musicgenre.datasets.base import Skipped
from musicgenre.datasets.msd import Song, find_previews, load_msd, read_songs, walk_songs
from musicgenre.errors import UserError

h5py = pytest.importorskip("h5py", reason="h5py is not installed (the extra msd)")

REAL = "TRAXLZU12903D05F94"


def columns(text):
    """The type of a table with columns such as "title S1024"."""
    return np.dtype([tuple(column.split()) for column in text.split(",")])


# The three tables of a file; `test_the_files_of_these_tests_are_like_a_real_one` checks them.
TABLES = {
    "metadata": columns(
        "analyzer_version S32, artist_7digitalid <i4, artist_familiarity <f8,"
        "artist_hotttnesss <f8, artist_id S32, artist_latitude <f8, artist_location S1024,"
        "artist_longitude <f8, artist_mbid S40, artist_name S1024, artist_playmeid <i4,"
        "genre S1024, idx_artist_terms <i4, idx_similar_artists <i4, release S1024,"
        "release_7digitalid <i4, song_hotttnesss <f8, song_id S32, title S1024,"
        "track_7digitalid <i4"
    ),
    "analysis": columns(
        "analysis_sample_rate <i4, audio_md5 S32, danceability <f8, duration <f8,"
        "end_of_fade_in <f8, energy <f8, idx_bars_confidence <i4, idx_bars_start <i4,"
        "idx_beats_confidence <i4, idx_beats_start <i4, idx_sections_confidence <i4,"
        "idx_sections_start <i4, idx_segments_confidence <i4, idx_segments_loudness_max <i4,"
        "idx_segments_loudness_max_time <i4, idx_segments_loudness_start <i4,"
        "idx_segments_pitches <i4, idx_segments_start <i4, idx_segments_timbre <i4,"
        "idx_tatums_confidence <i4, idx_tatums_start <i4, key <i4, key_confidence <f8,"
        "loudness <f8, mode <i4, mode_confidence <f8, start_of_fade_out <f8, tempo <f8,"
        "time_signature <i4, time_signature_confidence <f8, track_id S32"
    ),
    "musicbrainz": columns("idx_artist_mbtags <i4, year <i4"),
}


def track(number):
    return f"TR{number:016d}"


def write_h5(path, *songs, lists=True):
    """Writes a file of the data set; a summary file has no lists of tags."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = {name: np.zeros(len(songs), dtype) for name, dtype in TABLES.items()}
    terms, tags = [], []
    for row, song in enumerate(songs):
        tables["metadata"][row]["idx_artist_terms"] = len(terms)
        tables["musicbrainz"][row]["idx_artist_mbtags"] = len(tags)
        terms += song["terms"].items()
        tags += song.get("tags", {}).items()
        for name in song.keys() - {"terms", "tags"}:
            (table,) = (table for table in tables.values() if name in table.dtype.names)
            table[row][name] = song[name]
    arrays = {f"{name}/songs": table for name, table in tables.items()}
    if lists:
        arrays |= {
            "metadata/artist_terms": np.array([name for name, _ in terms], "S256"),
            "metadata/artist_terms_weight": np.array([value for _, value in terms], "<f8"),
            "musicbrainz/artist_mbtags": np.array([name for name, _ in tags], "S256"),
            "musicbrainz/artist_mbtags_count": np.array([value for _, value in tags], "<i4"),
        }
    with h5py.File(path, "w") as file:
        for name, data in arrays.items():
            options = {"maxshape": (None,), "chunks": (4,), "compression": "gzip"}
            file.create_dataset(name, data=data, **options)
    return path


def song(number, artist="AR1", terms=None, **more):
    return {
        "track_id": track(number),
        "song_id": f"SO{number}",
        "title": f"title {number}",
        "artist_id": artist,
        "track_7digitalid": 1000 + number,
        "terms": {"rock": 1.0} if terms is None else terms,
        **more,
    }


def folder_of(track_id):
    return "/".join(("data", *track_id[2:5], f"{track_id}.h5"))


@pytest.fixture
def root(tmp_path):
    """Twenty songs of ten artists with previews, five more without."""
    (tmp_path / "previews").mkdir()
    for number in range(25):
        terms = {"jazz": 0.3, "rock": 0.9, f"rare {number}": 1.0}
        if number % 4 < 2:
            terms = {"rock": 1.0, "pop": 0.2}
        write_h5(tmp_path / folder_of(track(number)), song(number, f"AR{number // 2}", terms))
        if number < 20:
            (tmp_path / "previews" / f"{track(number)}.mp3").touch()
    return tmp_path


def test_a_real_song(real_data):
    (got,) = read_songs(real_data / "msd" / f"{REAL}.h5")
    assert (got.track_id, got.song_id) == (REAL, "SOCWJDB12A58A776AF")
    assert (got.title, got.artist_name) == ("Never Gonna Give You Up", "Rick Astley")
    assert (got.artist_id, got.release) == ("ARWPYQI1187FB4D55A", "Big Tunes - Back 2 The 80s")
    assert (got.year, got.duration) == (1987, pytest.approx(211.69587))
    assert (got.track_7digitalid, got.release_7digitalid) == (8707738, 786795)
    assert got.artist_7digitalid == 3204 and len(got.artist_terms) == 12
    assert got.artist_terms[:2] == (("dance pop", 1.0), ("rock", pytest.approx(0.75590423)))
    assert got.artist_terms[-1] == ("80s", pytest.approx(0.13391383))
    tags = ("uk", "british", "english", "classic pop and rock")
    assert got.artist_mbtags == tuple((tag, 1) for tag in tags)


def test_the_files_of_these_tests_are_like_a_real_one(real_data, tmp_path):
    path = write_h5(tmp_path / "song.h5", song(1, tags={"uk": 1}))
    names = [f"{table}/songs" for table in TABLES]
    names += ["metadata/artist_terms", "metadata/artist_terms_weight"]
    names += ["musicbrainz/artist_mbtags", "musicbrainz/artist_mbtags_count"]
    with h5py.File(real_data / "msd" / f"{REAL}.h5") as real, h5py.File(path) as made:
        for name in names:
            assert made[name].dtype == real[name].dtype and real[name].ndim == 1
            assert made[name].maxshape == real[name].maxshape


def test_one_song(tmp_path):
    terms, tags = {"soul": 0.25, "rhythm & blues": 1.0, "60s": 0.5}, {"uk": 1, "motown": 7}
    more = {
        "title": "Älskar 愛".encode(),
        "artist_name": b"caf\xe9",
        "year": 1964,
        "duration": 12.5,
        "release_7digitalid": -1,
    }
    (got,) = read_songs(write_h5(tmp_path / "a.h5", song(7, terms=terms, tags=tags, **more)))
    assert got == Song(
        track_id=track(7),
        song_id="SO7",
        title="Älskar 愛",
        artist_name="caf\ufffd",
        artist_id="AR1",
        release="",
        year=1964,
        duration=12.5,
        track_7digitalid=1007,
        release_7digitalid=-1,
        artist_7digitalid=0,
        artist_terms=(("rhythm & blues", 1.0), ("60s", 0.5), ("soul", 0.25)),
        artist_mbtags=(("motown", 7), ("uk", 1)),
    )


def test_many_songs_with_and_without_lists(tmp_path, monkeypatch):
    monkeypatch.setattr("musicgenre.datasets.msd.BLOCK", 3)
    terms = [{f"t{i}.{j}": 1 - j / 10 for j in range(i % 4)} for i in range(8)]
    tags = [{f"m{i}": i} if i % 2 else {} for i in range(8)]
    songs = [song(i, terms=terms[i], tags=tags[i]) for i in range(8)]
    got = list(read_songs(write_h5(tmp_path / "aggregate.h5", *songs)))
    assert [s.track_id for s in got] == [track(i) for i in range(8)]
    assert [len(s.artist_terms) for s in got] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert got[7].artist_terms == (("t7.0", 1.0), ("t7.1", 0.9), ("t7.2", 0.8))
    assert got[7].artist_mbtags == (("m7", 7),)
    summary = list(read_songs(write_h5(tmp_path / "summary.h5", *songs, lists=False)))
    assert [s.track_7digitalid for s in summary] == list(range(1000, 1008))
    assert all(s.artist_terms == s.artist_mbtags == () for s in summary)


def test_text_of_variable_length_is_read_too(tmp_path):
    path = write_h5(tmp_path / "a.h5", song(1, terms={"x": 1.0}))
    with h5py.File(path, "a") as file:
        del file["metadata/artist_terms"]
        file.create_dataset("metadata/artist_terms", data=["funk"], dtype=h5py.string_dtype())
    (got,) = read_songs(path)
    assert got.artist_terms == (("funk", 1.0),)


def drop_column(table, name):
    def change(file):
        rows = file[table][:]
        del file[table]
        file[table] = rows[[column for column in rows.dtype.names if column != name]]

    return change


def set_column(table, name, value):
    def change(file):
        rows = file[table][:]
        rows[name] = value
        file[table][...] = rows

    return change


LENGTHS = "not two lists of one length, but"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.pop("musicbrainz"), "no table musicbrainz/songs; it is no file of the"),
        (lambda file: file.move("metadata/songs", "metadata/old"), "no table metadata/songs"),
        (
            lambda file: (file.pop("analysis/songs"), file["analysis"].create_group("songs")),
            "no table analysis/songs",
        ),
        (drop_column("metadata/songs", "track_7digitalid"), "has no column 'track_7digitalid'"),
        (drop_column("metadata/songs", "idx_artist_terms"), "has no column 'idx_artist_terms'"),
        (
            lambda file: file["analysis/songs"].resize((2,)),
            "analysis/songs has 2 rows where metadata/songs has 1",
        ),
        (lambda file: file.pop("metadata/artist_terms_weight"), rf"{LENGTHS} \(1,\) and None"),
        (lambda file: file.pop("musicbrainz/artist_mbtags"), rf"{LENGTHS} None and \(0,\)"),
        (lambda file: file["metadata/artist_terms"].resize((5,)), rf"{LENGTHS} \(5,\) and \(1,\)"),
        (set_column("metadata/songs", "idx_artist_terms", 9), "idx_artist_terms is .* 9 to 1"),
        (set_column("metadata/songs", "idx_artist_terms", -1), "idx_artist_terms is damaged"),
        (
            set_column("analysis/songs", "track_id", b"../../../etc/x"),
            r"'\.\./\.\./\.\./etc/x' is not a track_id",
        ),
    ],
)
def test_what_a_file_lacks_is_named(tmp_path, change, message):
    path = write_h5(tmp_path / "bad.h5", song(1))
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(UserError, match=rf"bad\.h5: .*{message}"):
        list(read_songs(path))


def test_files_that_are_no_hdf5(tmp_path):
    path = write_h5(tmp_path / "a.h5", song(1))
    with h5py.File(path, "r") as file:
        chunk = file["metadata/songs"].id.get_chunk_info(0)
    complete = path.read_bytes()
    end = chunk.byte_offset + chunk.size
    damaged = complete[: chunk.byte_offset] + bytes(chunk.size) + complete[end:]
    for data in (b"", b"hello", complete[: len(complete) // 2], damaged):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.h5: not an HDF5 file that can be read"):
            list(read_songs(path))
    with pytest.raises(UserError, match="nowhere: no such file"):
        list(read_songs(tmp_path / "nowhere"))


def test_a_walk_skips_and_lists_bad_files(root):
    (root / "data" / "TRBAD.h5").write_bytes(b"no")
    write_h5(root / "data" / ".hidden" / "x.h5", song(99))
    items = list(walk_songs(root))
    (bad,) = (item for item in items if isinstance(item, Skipped))
    assert len(items) == 26 and (bad.clip_id, bad.path) == ("TRBAD", str(root / "data/TRBAD.h5"))
    assert bad.reason.startswith("not an HDF5 file")
    assert bad in load_msd(root, allow_missing=True).skipped
    for folder in ("nowhere", "previews"):
        with pytest.raises(UserError, match=rf"{folder}: no \.h5 files"):
            list(walk_songs(root / folder))


def test_songs_with_previews_are_clips_split_by_artist(root):
    dataset = load_msd(root, top_k=3, allow_missing=True)
    assert (dataset.name, dataset.task) == ("msd", "multi_label")
    # 20 songs have rock; songs 0, 1, 4, 5, ... pop; the others jazz and a term of their own.
    assert dataset.label_names == ("rock", "jazz", "pop")
    assert dataset.protocol == "by artist, top 3 artist terms, 70/15/15, seed 42"
    clips = dataset.clips
    assert [clip.clip_id for clip in clips] == [track(number) for number in range(20)]
    assert clips[0].labels == ("rock", "pop") and clips[2].labels == ("rock", "jazz")
    assert clips[3].group == "AR1" and clips[3].path == root / "previews" / f"{track(3)}.mp3"
    pairs = {(clip.group, clip.split) for clip in clips}
    assert len({group for group, _ in pairs}) == len(pairs) == 10
    assert {split for _, split in pairs} == {"train", "valid", "test"}
    assert load_msd(root, top_k=3, allow_missing=True) == dataset
    other = load_msd(root, top_k=3, allow_missing=True, seed=1)
    assert [clip.split for clip in other.clips] != [clip.split for clip in clips]
    wanted = "25 songs, 20 with a preview; 20 of them have one of the 3 commonest terms of 13."
    assert dataset.notes[0] == wanted


def test_songs_without_a_preview_are_skipped_with_the_reason(root):
    message = rf"{track(20)} has no preview yet \(5 of 25 songs.*fetch_previews.*allow_missing=True"
    with pytest.raises(UserError, match=message):
        load_msd(root)
    write_h5(root / folder_of(track(20)), song(20, track_7digitalid=0))
    (root / "previews" / "previews.csv").write_text(
        "track_id,track_7digitalid,status,detail\n"
        f"{track(21)},1021,not_found,HTTP 404\n{track(22)},1022,not_found,HTTP 404\n"
        f"{track(23)},1023,no_audio,JSON\n"
        f"{track(24)},1024,failed,HTTP 500\n"
    )
    with pytest.raises(UserError, match=rf"{track(24)} has no preview yet \(1 of 25"):
        load_msd(root)
    dataset = load_msd(root, allow_missing=True)
    assert {entry.clip_id: entry.reason for entry in dataset.skipped} == {
        track(20): "no preview: it has no 7digital id",
        track(21): "no preview: 7digital does not have it",
        track(22): "no preview: 7digital does not have it",
        track(23): "no preview: 7digital's response was no audio",
        track(24): "no preview: not fetched yet",
    }
    (root / "previews" / f"{track(24)}.mp3").touch()
    assert len(load_msd(root).clips) == 21
    (root / "previews" / "previews.csv").write_text("track_id\nx\n")
    with pytest.raises(UserError, match=r"previews\.csv: no column 'status'"):
        load_msd(root)


def test_songs_without_a_common_term_are_skipped(root):
    write_h5(root / folder_of(track(0)), song(0, terms={"yodel": 1.0}))
    write_h5(root / folder_of(track(1)), song(1, terms={}))
    dataset = load_msd(root, top_k=2, allow_missing=True)
    reasons = {entry.clip_id: entry.reason for entry in dataset.skipped}
    for number in (0, 1):
        assert reasons[track(number)] == "none of the 2 commonest artist terms"
    assert len(dataset.clips) == 18


def test_previews_may_be_next_to_the_song_but_the_folder_previews_comes_first(root):
    folder, previews = root / "data" / "0" / "0" / "0", root / "previews"
    (previews / f"{track(5)}.mp3").rename(folder / f"{track(5)}.mp3")
    for name in (f"{track(6)}.wav", "cover.mp3", f"{track(77)}.mp3"):
        (folder / name).touch()
    assert find_previews(root)[track(5)] == folder / f"{track(5)}.mp3"
    assert find_previews(root)[track(6)] == previews / f"{track(6)}.mp3"
    dataset = load_msd(root, allow_missing=True)
    assert len(dataset.clips) == 20
    assert "1 sound files are named after tracks that no .h5 file has" in " ".join(dataset.notes)


def test_a_summary_file_next_to_the_songs_counts_nothing_twice(root):
    songs = [song(number) for number in range(25)]
    write_h5(root / "AdditionalFiles" / "summary.h5", *songs, lists=False)
    dataset = load_msd(root, allow_missing=True)
    assert len(dataset.clips) == 20 and len(dataset.skipped) == 5
    assert "25 rows are of a song that came before; they count once." in dataset.notes
    assert dataset.clips[2].labels[0] == "rare 2"


def test_one_file_of_many_songs_with_previews_next_to_it(root):
    songs = [song(number, f"AR{number}") for number in range(20)]
    path = write_h5(root / "all.h5", *songs)
    assert len(load_msd(path).clips) == 20
    write_h5(path, *songs, lists=False)
    message = r"no song with a preview has artist terms.*A summary file has none"
    with pytest.raises(UserError, match=message):
        load_msd(path)


def test_nothing_to_learn_from(tmp_path):
    write_h5(tmp_path / "a.h5", song(1))
    message = r"none of the 1 songs has a preview\. Fetch them: musicgenre fetch_previews"
    with pytest.raises(UserError, match=message):
        load_msd(tmp_path, allow_missing=True)
    (tmp_path / "a.h5").write_bytes(b"")
    message = r"no song in its \.h5 files, 1 of which .*; the first is .*a\.h5: not an HDF5"
    with pytest.raises(UserError, match=message):
        load_msd(tmp_path)


def test_without_h5py_the_extra_is_named(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"needs h5py.*pip install 'musicgenre\[msd\]'"):
        load_msd(root)
    with pytest.raises(UserError, match=r"musicgenre\[msd\]"):
        list(read_songs(root / folder_of(track(0))))
