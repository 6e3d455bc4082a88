import sys

import numpy as np
import pytest

from musicgenre.datasets.base import Skipped
from musicgenre.datasets.msd import Song, find_previews, load_msd, read_songs, walk_songs
from musicgenre.errors import UserError

h5py = pytest.importorskip("h5py", reason="h5py is not installed (the extra msd)")


def columns(text):
    """The type of a table with columns such as "title S1024"."""
    return np.dtype([tuple(column.split()) for column in text.split(",")])


# The three tables of a file; `test_the_files_of_these_tests_are_like_a_real_one` checks them.
METADATA = columns(
    "analyzer_version S32, artist_7digitalid <i4, artist_familiarity <f8, artist_hotttnesss <f8,"
    "artist_id S32, artist_latitude <f8, artist_location S1024, artist_longitude <f8,"
    "artist_mbid S40, artist_name S1024, artist_playmeid <i4, genre S1024, idx_artist_terms <i4,"
    "idx_similar_artists <i4, release S1024, release_7digitalid <i4, song_hotttnesss <f8,"
    "song_id S32, title S1024, track_7digitalid <i4"
)
ANALYSIS = columns(
    "analysis_sample_rate <i4, audio_md5 S32, danceability <f8, duration <f8, end_of_fade_in <f8,"
    "energy <f8, idx_bars_confidence <i4, idx_bars_start <i4, idx_beats_confidence <i4,"
    "idx_beats_start <i4, idx_sections_confidence <i4, idx_sections_start <i4,"
    "idx_segments_confidence <i4, idx_segments_loudness_max <i4,"
    "idx_segments_loudness_max_time <i4, idx_segments_loudness_start <i4,"
    "idx_segments_pitches <i4, idx_segments_start <i4, idx_segments_timbre <i4,"
    "idx_tatums_confidence <i4, idx_tatums_start <i4, key <i4, key_confidence <f8, loudness <f8,"
    "mode <i4, mode_confidence <f8, start_of_fade_out <f8, tempo <f8, time_signature <i4,"
    "time_signature_confidence <f8, track_id S32"
)
MUSICBRAINZ = columns("idx_artist_mbtags <i4, year <i4")


def track(number):
    return f"TR{number:016d}"


def write_h5(path, *songs, lists=True):
    """Writes a file of the data set; a summary file has no lists of tags."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = [np.zeros(len(songs), dtype) for dtype in (METADATA, ANALYSIS, MUSICBRAINZ)]
    terms, weights, tags, counts = [], [], [], []
    for row, song in enumerate(songs):
        tables[0][row]["idx_artist_terms"], tables[2][row]["idx_artist_mbtags"] = (
            len(terms),
            len(tags),
        )
        for name, value in song.items():
            if name == "terms":
                terms += value
                weights += value.values()
            elif name == "tags":
                tags += value
                counts += value.values()
            else:
                (table,) = (table for table in tables if name in table.dtype.names)
                table[row][name] = value
    with h5py.File(path, "w") as file:
        for group, table in zip(("metadata", "analysis", "musicbrainz"), tables, strict=True):
            file.create_group(group).create_dataset(
                "songs", data=table, maxshape=(None,), chunks=(4,), compression="gzip"
            )
        if lists:
            made = {
                "metadata/artist_terms": np.array(terms, "S256"),
                "metadata/artist_terms_weight": np.array(weights, "<f8"),
                "musicbrainz/artist_mbtags": np.array(tags, "S256"),
                "musicbrainz/artist_mbtags_count": np.array(counts, "<i4"),
            }
            for name, data in made.items():
                file.create_dataset(
                    name, data=data, maxshape=(None,), chunks=(32,), compression="gzip"
                )
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
    for number in range(25):
        terms = (
            {"rock": 1.0, "pop": 0.2}
            if number % 4 < 2
            else {"jazz": 0.3, "rock": 0.9, f"rare {number}": 1.0}
        )
        write_h5(tmp_path / folder_of(track(number)), song(number, f"AR{number // 2}", terms))
    (tmp_path / "previews").mkdir()
    for number in range(20):
        (tmp_path / "previews" / f"{track(number)}.mp3").touch()
    return tmp_path


def test_a_real_song(real_data):
    (got,) = read_songs(real_data / "msd" / "TRAXLZU12903D05F94.h5")
    assert (got.track_id, got.song_id, got.title) == (
        "TRAXLZU12903D05F94",
        "SOCWJDB12A58A776AF",
        "Never Gonna Give You Up",
    )
    assert (got.artist_name, got.artist_id, got.release) == (
        "Rick Astley",
        "ARWPYQI1187FB4D55A",
        "Big Tunes - Back 2 The 80s",
    )
    assert (got.year, got.duration) == (1987, pytest.approx(211.69587))
    assert (got.track_7digitalid, got.release_7digitalid, got.artist_7digitalid) == (
        8707738,
        786795,
        3204,
    )
    assert got.artist_terms[:2] == (("dance pop", 1.0), ("rock", pytest.approx(0.75590423)))
    assert (
        got.artist_terms[-1] == ("80s", pytest.approx(0.13391383)) and len(got.artist_terms) == 12
    )
    assert got.artist_mbtags == (
        ("uk", 1),
        ("british", 1),
        ("english", 1),
        ("classic pop and rock", 1),
    )


def test_the_files_of_these_tests_are_like_a_real_one(real_data, tmp_path):
    path = write_h5(tmp_path / "song.h5", song(1, tags={"uk": 1}))
    with (
        h5py.File(real_data / "msd" / "TRAXLZU12903D05F94.h5", "r") as real,
        h5py.File(path, "r") as made,
    ):
        names = []
        made.visititems(
            lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None
        )
        assert len(names) == 7
        for name in names:
            assert (made[name].dtype, made[name].ndim, made[name].maxshape) == (
                real[name].dtype,
                1,
                real[name].maxshape,
            )


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
    # A block ends between rows whose lists join.
    monkeypatch.setattr("musicgenre.datasets.msd.BLOCK", 3)
    songs = [
        song(
            i,
            terms={f"t{i}.{j}": 1 - j / 10 for j in range(i % 4)},
            tags={f"m{i}": i} if i % 2 else {},
        )
        for i in range(8)
    ]
    got = list(read_songs(write_h5(tmp_path / "aggregate.h5", *songs)))
    assert [s.track_id for s in got] == [track(i) for i in range(8)]
    assert [len(s.artist_terms) for s in got] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert got[7].artist_terms == (("t7.0", 1.0), ("t7.1", 0.9), ("t7.2", 0.8)) and got[
        7
    ].artist_mbtags == (("m7", 7),)
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


def damage(path, change):
    with h5py.File(path, "a") as file:
        change(file)


def drop_column(table_name, name):
    def change(file):
        rows = file[table_name][:]
        del file[table_name]
        file.create_dataset(
            table_name, data=rows[[column for column in rows.dtype.names if column != name]]
        )

    return change


def set_column(table_name, name, value):
    def change(file):
        rows = file[table_name][:]
        rows[name] = value
        file[table_name][...] = rows

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda file: file.pop("musicbrainz"),
            "no table musicbrainz/songs; it is no file of the Million Song Dataset",
        ),
        (lambda file: file.move("metadata/songs", "metadata/old"), "no table metadata/songs"),
        (
            lambda file: (file.pop("analysis/songs"), file["analysis"].create_group("songs")),
            "no table analysis/songs",
        ),
        (
            drop_column("metadata/songs", "track_7digitalid"),
            "metadata/songs has no column 'track_7digitalid'",
        ),
        (
            drop_column("metadata/songs", "idx_artist_terms"),
            "metadata/songs has no column 'idx_artist_terms'",
        ),
        (
            lambda file: file["analysis/songs"].resize((2,)),
            "analysis/songs has 2 rows where metadata/songs has 1",
        ),
        (
            lambda file: file.pop("metadata/artist_terms_weight"),
            r"not two lists of one length, but \(1,\) and None",
        ),
        (
            lambda file: file.pop("musicbrainz/artist_mbtags"),
            r"not two lists of one length, but None and \(0,\)",
        ),
        (
            lambda file: file["metadata/artist_terms"].resize((5,)),
            r"not two lists of one length, but \(5,\) and \(1,\)",
        ),
        (
            set_column("metadata/songs", "idx_artist_terms", 9),
            "idx_artist_terms is damaged .* 9 to 1",
        ),
        (set_column("metadata/songs", "idx_artist_terms", -1), "idx_artist_terms is damaged"),
        (
            set_column("analysis/songs", "track_id", b"../../../etc/x"),
            r"has the track_id '\.\./\.\./\.\./etc/x'",
        ),
    ],
)
def test_what_a_file_lacks_is_named(tmp_path, change, message):
    path = write_h5(tmp_path / "bad.h5", song(1))
    damage(path, change)
    with pytest.raises(UserError, match=f"bad.h5: .*{message}|bad.h5: {message}"):
        list(read_songs(path))


def test_files_that_are_no_hdf5(tmp_path):
    intact = write_h5(tmp_path / "intact.h5", song(1)).read_bytes()
    for name, data in {"empty": b"", "text": b"hello", "half": intact[: len(intact) // 2]}.items():
        path = tmp_path / f"{name}.h5"
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"{name}\.h5: not an HDF5 file that can be read"):
            list(read_songs(path))
    with pytest.raises(UserError, match="nowhere: no such file"):
        list(read_songs(tmp_path / "nowhere"))


def test_a_chunk_that_does_not_unpack(tmp_path):
    path = write_h5(tmp_path / "a.h5", song(1))
    with h5py.File(path, "r") as file:
        chunk = file["metadata/songs"].id.get_chunk_info(0)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.h5: not an HDF5 file that can be read"):
        list(read_songs(path))


def test_a_walk_skips_and_lists_bad_files(root):
    (root / "data" / "A").mkdir(parents=True)
    (root / "data" / "A" / "TRBAD.h5").write_bytes(b"no")
    (root / "data" / ".hidden").mkdir()
    write_h5(root / "data" / ".hidden" / "x.h5", song(99))
    items = list(walk_songs(root))
    bad = [item for item in items if isinstance(item, Skipped)]
    assert len(items) == 26 and [(item.clip_id, item.path) for item in bad] == [
        ("TRBAD", str(root / "data/A/TRBAD.h5"))
    ]
    assert bad[0].reason.startswith("not an HDF5 file")
    assert bad[0] in load_msd(root, allow_missing=True).skipped
    with pytest.raises(UserError, match="no such folder"):
        list(walk_songs(root / "nowhere"))
    with pytest.raises(UserError, match=r"no \.h5 files"):
        list(walk_songs(root / "previews"))


def test_songs_with_previews_are_clips_split_by_artist(root):
    dataset = load_msd(root, top_k=3, allow_missing=True)
    assert (dataset.name, dataset.task) == ("msd", "multi_label")
    # 20 songs have rock; songs 0, 1, 4, 5, ... pop; the others jazz and a term of their own.
    assert dataset.label_names == ("rock", "jazz", "pop")
    assert dataset.protocol == "by artist, top 3 artist terms, 70/15/15, seed 42"
    assert [clip.clip_id for clip in dataset.clips] == [track(number) for number in range(20)]
    assert dataset.clips[0].labels == ("rock", "pop") and dataset.clips[2].labels == (
        "rock",
        "jazz",
    )
    assert (
        dataset.clips[3].group == "AR1"
        and dataset.clips[3].path == root / "previews" / f"{track(3)}.mp3"
    )
    by_artist = {}
    for clip in dataset.clips:
        by_artist.setdefault(clip.group, set()).add(clip.split)
    assert len(by_artist) == 10 and all(len(splits) == 1 for splits in by_artist.values())
    assert {split for splits in by_artist.values() for split in splits} == {
        "train",
        "valid",
        "test",
    }
    assert load_msd(root, top_k=3, allow_missing=True) == dataset
    other = load_msd(root, top_k=3, allow_missing=True, seed=1)
    assert [clip.split for clip in other.clips] != [clip.split for clip in dataset.clips]
    assert (
        dataset.notes[0]
        == "25 songs, 20 with a preview; 20 of them have one of the 3 commonest terms of 13."
    )


def test_songs_without_a_preview_are_skipped_with_the_reason(root):
    with pytest.raises(
        UserError,
        match=rf"{track(20)} has no preview yet \(5 of 25 "
        rf"songs.*fetch_previews.*allow_missing=True",
    ):
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
    with pytest.raises(UserError, match=r"previews\.csv: has no column 'status'"):
        load_msd(root)


def test_songs_without_a_common_term_are_skipped(root):
    write_h5(root / folder_of(track(0)), song(0, terms={"yodel": 1.0}))
    write_h5(root / folder_of(track(1)), song(1, terms={}))
    dataset = load_msd(root, top_k=2, allow_missing=True)
    assert [
        (entry.clip_id, entry.reason) for entry in dataset.skipped if "preview:" not in entry.reason
    ] == [
        (track(0), "none of the 2 commonest artist terms"),
        (track(1), "none of the 2 commonest artist terms"),
    ]
    assert len(dataset.clips) == 18


def test_previews_may_lie_beside_the_song_and_the_folder_previews_wins(root):
    beside = root / "data" / "0" / "0" / "0"
    (root / "previews" / f"{track(5)}.mp3").rename(beside / f"{track(5)}.mp3")
    (beside / f"{track(6)}.wav").touch()
    (beside / "cover.mp3").touch()
    (beside / f"{track(77)}.mp3").touch()
    assert find_previews(root)[track(5)] == beside / f"{track(5)}.mp3"
    assert find_previews(root)[track(6)] == root / "previews" / f"{track(6)}.mp3"
    dataset = load_msd(root, allow_missing=True)
    assert len(dataset.clips) == 20
    assert (
        "1 sound files are named after tracks that no .h5 file has; they are left out."
        in dataset.notes
    )


def test_a_summary_file_beside_the_songs_counts_nothing_twice(root):
    write_h5(
        root / "AdditionalFiles" / "summary.h5",
        *(song(number) for number in range(25)),
        lists=False,
    )
    dataset = load_msd(root, allow_missing=True)
    assert len(dataset.clips) == 20 and len(dataset.skipped) == 5
    assert "25 rows are of a song that came before; they count once." in dataset.notes
    assert dataset.clips[2].labels[0] == "rare 2"


def test_one_file_of_many_songs_with_previews_beside_it(root):
    path = write_h5(
        root / "all.h5", *(song(number, f"AR{number}", {"rock": 1.0}) for number in range(20))
    )
    assert len(load_msd(path).clips) == 20
    write_h5(path, *(song(number) for number in range(20)), lists=False)
    with pytest.raises(
        UserError, match=r"no song with a preview has artist terms.*A summary file has none"
    ):
        load_msd(path)


def test_nothing_to_learn_from(root, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    write_h5(empty / "a.h5", song(1))
    with pytest.raises(
        UserError,
        match=r"none of the 1 songs has a preview in .*previews\. Fetch some: musicgenre "
        r"fetch_previews",
    ):
        load_msd(empty, allow_missing=True)
    (empty / "a.h5").write_bytes(b"")
    with pytest.raises(
        UserError,
        match=r"no song in its \.h5 files, 1 of which cannot be used; the first is .*a\.h5: not an "
        r"HDF5",
    ):
        load_msd(empty)


def test_without_h5py_the_extra_is_named(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"needs h5py.*pip install 'musicgenre\[msd\]'"):
        load_msd(root)
    with pytest.raises(UserError, match=r"musicgenre\[msd\]"):
        list(read_songs(root / folder_of(track(0))))
