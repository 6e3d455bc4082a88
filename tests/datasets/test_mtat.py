import gzip
import itertools
from collections import Counter

import numpy as np
import pytest
from mtat_tree import make_mtat_tree
from sklearn.model_selection import train_test_split

from musicgenre.audio.features import FeatureSpec
from musicgenre.audio.layout import ClipLayout
from musicgenre.datasets import mtat
from musicgenre.datasets.mtat import leak, load_mtat, protocol_splits, read_table, split_tracks
from musicgenre.errors import UserError
from musicgenre.evaluation.audit import AuditSide, audit
from musicgenre.store.prepare import prepare_store

# Four clips of three tracks, in no order of their ids. Counts: guitar 3, harp 2, cello 2, odd 1,
# silence 0.
ROWS = (
    ("30", "00110", "c/ann-first-01-one-0-29.mp3"),
    ("4", "01100", "0/bob-second-02-two_b-29-58.mp3"),
    ("200", "10000", "f/ann-third-01-three-58-87.mp3"),
    ("100", "01110", "0/bob-second-02-two_b-0-29.mp3"),
)
HEADER = ("clip_id", "odd", "harp", "guitar", "cello", "silence", "mp3_path")


def table(rows=ROWS, header=HEADER, quote=""):
    lines = [header, *([clip_id, *tags, path] for clip_id, tags, path in rows)]
    return "".join("\t".join(f"{quote}{field}{quote}" for field in line) + "\n" for line in lines)


def plus(*row):
    return table([*ROWS, row])


def write(root, text, name="annotations_final.csv"):
    root.mkdir(exist_ok=True)
    data = text.encode()
    (root / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return root


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.fixture
def root(tmp_path):
    """A folder with the table and its four mp3s."""
    touch(write(tmp_path, table()), *(path for _, _, path in ROWS))
    return tmp_path


def count(splits):
    counts = Counter(splits)
    return tuple(counts[split] for split in ("train", "valid", "test"))


def test_both_forms_of_the_table_give_the_same(tmp_path):
    order = (3, 4, 2, 1, 5)  # by frequency: guitar, cello, harp, odd, silence
    rows = [(i, "".join(tags[column - 1] for column in order), path) for i, tags, path in ROWS]
    header = ["clip_id", *(HEADER[column] for column in order), "mp3_path"]
    quoted = table(quote='"')
    forms = [
        write(tmp_path / "a", quoted),
        write(tmp_path / "b", table(rows, header), "annotations_final.csv.gz"),
        write(tmp_path / "c", "\ufeff" + quoted.replace("\n", "\r\n") + "\r\n"),
    ]
    for read in map(read_table, forms):
        assert read.tag_names == ("guitar", "cello", "harp", "odd", "silence")
        assert read.clip_ids == ("4", "30", "100", "200")
        marks = ["".join(row) for row in read.tags.astype(int).astype(str)]
        assert marks == ["10100", "11000", "11100", "00010"]
        two = "bob-second-02-two_b"
        assert read.tracks == (two, "ann-first-01-one", two, "ann-third-01-three")
        assert read.artists == ("bob", "ann", "bob", "ann")
        assert read.mp3_paths[3] == "f/ann-third-01-three-58-87.mp3"


def test_clips_have_their_tags_by_frequency_and_their_track(root):
    dataset = load_mtat(root, "clean", top_k=3)
    assert dataset.task == "multi_label" and dataset.name == "mtat"
    assert dataset.label_names == ("guitar", "cello", "harp")
    assert dataset.protocol == "clean, top 3 tags"
    assert [(c.clip_id, c.labels, c.split, c.group) for c in dataset.clips] == [
        ("100", ("guitar", "cello", "harp"), "train", "bob-second-02-two_b"),
        ("30", ("guitar", "cello"), "valid", "ann-first-01-one"),
        ("4", ("guitar", "harp"), "train", "bob-second-02-two_b"),
    ]
    assert dataset.clips[1].path == root / "c" / "ann-first-01-one-0-29.mp3"
    everything = load_mtat(root, "all", top_k=3)
    (test,) = (clip for clip in everything.clips if clip.split == "test")
    assert (test.clip_id, test.labels) == ("200", ())
    assert everything.notes[:2] == (
        "mtat, protocol all, top 3 tags: train 2, valid 1, test 1 of 4 clips in the table; every "
        "mp3 is on disk",
        "leaks by the table: 0 of 1 test clips (0.0%) are from a track that is also in train, 0 "
        "(0.0%) by an artist who is in train, too",
    )


def test_a_tie_at_the_last_tag_is_broken_by_name_and_reported(root):
    dataset = load_mtat(root, "all", top_k=2)
    assert dataset.label_names == ("guitar", "cello")
    equal = "the tags 'cello' and 'harp' are equally frequent; 'harp' is left out by"
    assert dataset.notes[-1] == f"{equal} alphabetical order"
    assert len(load_mtat(root, "all", top_k=3).notes) == 2
    rows = [(clip_id, tags[:4], path) for clip_id, tags, path in ROWS]
    write(root, table(rows, (*HEADER[:5], HEADER[6])))
    assert len(load_mtat(root, "all", top_k=4).notes) == 2


MP3 = "1/a-b-01-c-0-29.mp3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            table().replace("1\t1\t0\t0\t0/b", "1\t2\t0\t0\t0/b"),
            "line 3, column guitar: '2' is not",
        ),
        (table().replace("1\t1\t0\t0\t0/b", "-\t1\t0\t0\t0/b"), "line 3, column harp: '-' is not"),
        (
            table(quote='"').replace('"1"\t"0"\t"0"\t"0/bob', '"1"\t""\t"0"\t"0/bob'),
            "line 3, column cello: '' is not 0 or 1",
        ),
        (table().replace("0\t0\t0\t0\tf/", "0\t0\t01\t0\tf/"), "line 4, column cello: '01' is not"),
        (plus("0030", "10000", MP3), "line 6, column clip_id: clip 0030 is already on line 2"),
        (plus("x7", "10000", MP3), "line 6, column clip_id: 'x7' is not a number"),
        (
            plus("7", "10000", ROWS[2][2]),
            "line 6, column mp3_path: f/ann-third-01-three-58-87.mp3 is already on line 4",
        ),
        (plus("7", "10000", ""), "line 6, column mp3_path: '' is not a path such as"),
        (plus("7", "10000", "../a-b-01-c-0-29.mp3"), r"line 6, column mp3_path: '\.\./a-b"),
        (plus("7", "10000", "/etc/a-b-01-c-0-29.mp3"), "line 6, column mp3_path: '/etc/a-b"),
        (plus("7", "1000", MP3), "line 6: 6 fields where the header has 7"),
        (table().replace("c/ann", "c/a\tnn"), "line 2: 8 fields where the header has 7"),
        (table(header=("Clip ID", *HEADER[1:])), "line 1: no column clip_id among the 7 columns"),
        (table().replace("\t", ","), "line 1: no column clip_id among the 1 columns, .*tabs"),
        (table(header=("clip_id", "odd", "odd", *HEADER[3:])), "line 1: 2 columns named 'odd'"),
        (table(header=("clip_id", "", *HEADER[2:])), "line 1: a column without a name"),
        ("clip_id\tmp3_path\n1\ta-b-01-c-0-29.mp3\n", "line 1: no column of a tag"),
        (table(()), "no rows below the header"),
        ("", "line 1: no column clip_id"),
    ],
)
def test_a_table_that_cannot_be_used_is_named_by_line_and_column(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_table(write(tmp_path, text))


def test_files_that_are_no_table(tmp_path):
    with pytest.raises(UserError, match=r"no annotations_final\.csv or .*download --dataset=mtat"):
        read_table(tmp_path)
    packed = gzip.compress(table().encode())
    (tmp_path / "annotations_final.csv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"annotations_final\.csv\.gz: not UTF-8 text that can be"):
        read_table(tmp_path)
    (tmp_path / "annotations_final.csv").write_bytes(table().encode().replace(b"ann", b"\xe9nn"))
    with pytest.raises(UserError, match=r"annotations_final\.csv: not UTF-8 text that can be read"):
        read_table(tmp_path)


def test_mistakes_with_protocols(tmp_path):
    write(tmp_path, table())
    read = read_table(tmp_path)
    with pytest.raises(UserError, match=r"MTAT has no protocol 'reprot'\. Did you mean 'report'"):
        protocol_splits(read, "reprot")
    for top_k in (0, 5):
        with pytest.raises(UserError, match=rf"data\.top_k={top_k} is not one of 1 to 4, the tags"):
            protocol_splits(read, "clean", top_k=top_k)
    with pytest.raises(UserError, match="three fractions"):
        protocol_splits(read, "grouped", top_k=4, fractions=(0.5, 0.2, 0.2))
    moved = read_table(write(tmp_path, plus("7", "10000", "mp3/a-b-01-c-0-29.mp3")))
    message = r"clip 7, column mp3_path: 'mp3/a-b-01-c-0-29\.mp3' is in none of the folders"
    with pytest.raises(UserError, match=message):
        protocol_splits(moved, "clean", top_k=4)
    assert count(protocol_splits(moved, "report", top_k=4)) == (3, 1, 1)


def test_missing_files_are_named_counted_or_listed(tmp_path):
    # One mp3 is in its folder, one in the table's.
    touch(write(tmp_path, table()), ROWS[1][2], "ann-first-01-one-0-29.mp3")
    with pytest.raises(UserError) as caught:
        load_mtat(tmp_path, "all", top_k=4)
    assert str(caught.value) == (
        f"{tmp_path}/0/bob-second-02-two_b-0-29.mp3 is not on disk: 2 of 4 mp3s are missing (mtat, "
        "protocol all, top 4 tags: train 2, valid 1, test 1 of 4 clips in the table). Continue "
        "without them with --config.data.allow_missing=True, or fetch them: musicgenre download "
        f"--dataset=mtat --root={tmp_path}"
    )
    dataset = load_mtat(tmp_path, "all", top_k=4, allow_missing=True)
    assert [(c.clip_id, c.path.relative_to(tmp_path).as_posix()) for c in dataset.clips] == [
        ("30", "ann-first-01-one-0-29.mp3"),
        ("4", "0/bob-second-02-two_b-29-58.mp3"),
    ]
    skipped = [(s.clip_id, s.reason) for s in dataset.skipped]
    assert skipped == [("100", "not on disk"), ("200", "not on disk")]
    assert dataset.notes[0].endswith("test 1 of 4 clips in the table; 2 mp3s are not on disk")
    for path in (tmp_path / ROWS[1][2], tmp_path / "ann-first-01-one-0-29.mp3"):
        path.unlink()
    with pytest.raises(UserError, match=r"4 of 4 mp3s are missing \(mtat.*\)\. Fetch them: music"):
        load_mtat(tmp_path, "all", top_k=4, allow_missing=True)


def test_the_report_splits_at_random_twice(tmp_path):
    rows = [(str(i), "01000", f"0/a-b-{i:02d}-c-0-29.mp3") for i in range(100)]
    read = read_table(write(tmp_path, table(rows[::-1])))
    splits = np.array(protocol_splits(read, "report", top_k=1, seed=7))
    rest, test = train_test_split(np.arange(100), test_size=0.2, random_state=7)
    # The inner split is over positions among the rest in the table's order, whatever order the
    # outer one gave them.
    inner, valid = train_test_split(np.sort(rest), test_size=0.2, random_state=7)
    for split, rows in (("test", test), ("valid", valid), ("train", inner)):
        assert np.flatnonzero(splits == split).tolist() == sorted(rows)
    assert count(splits) == (64, 16, 20)


def test_leaks_counted_by_hand():
    splits = ["train", "train", "valid", "test", "test", "test", ""]
    groups = ["a", "b", "a", "b", "c", "a", "c"]
    assert leak(splits, groups) == (2, 3) and leak(splits, groups).fraction == pytest.approx(2 / 3)
    assert leak(splits, groups, "valid") == (1, 1)
    assert leak(["train"], ["a"]).fraction == 0


def test_tracks_stay_whole_and_tags_are_spread():
    generator = np.random.default_rng(0)
    tracks = [f"track {i}" for i in generator.integers(0, 150, 600)]
    chance = np.array([0.5, 0.3, 0.2, 0.15])
    own = {track: generator.random(4) < chance for track in sorted(set(tracks))}
    tags = np.array([own[track] for track in tracks])
    splits = np.array(split_tracks(tags, tracks, 0, (0.6, 0.2, 0.2)))
    assert all(len(set(splits[np.array(tracks) == track])) == 1 for track in own)
    for split, part in (("train", 0.6), ("valid", 0.2), ("test", 0.2)):
        assert abs((splits == split).mean() - part) < 0.02
        # Tracks have four clips or so: no tag is further off than by one track.
        assert np.abs(tags[splits == split].sum(axis=0) - part * tags.sum(axis=0)).max() <= 4
    again, other = (split_tracks(tags, tracks, seed, (0.6, 0.2, 0.2)) for seed in (0, 1))
    assert splits.tolist() == again != other
    assert set(split_tracks(tags, tracks, 0, (0.8, 0.2, 0))) == {"train", "valid"}
    with pytest.raises(UserError, match=r"data\.fractions=\(0, 0\.5, 0\.5\) must be three"):
        split_tracks(tags, tracks, 0, (0, 0.5, 0.5))


def test_the_tree_reads_alike_in_both_forms(tmp_path):
    original, unquoted = (
        read_table(make_mtat_tree(tmp_path / f"{quoted}", audio=False, quoted=quoted))
        for quoted in (True, False)
    )
    assert original.tag_names == unquoted.tag_names
    # ceil(.2 x 96) = 20, ceil(.2 x 76) = 16
    counts = {"report": (60, 16, 20), "clean": (56, 20, 20), "all": (56, 20, 20)}
    for protocol in mtat.PROTOCOLS:
        splits = protocol_splits(original, protocol, top_k=12)
        assert splits == protocol_splits(unquoted, protocol, top_k=12)
        assert count(splits) == counts.get(protocol, count(splits))


def test_an_empty_mp3_is_counted_and_then_skipped_by_prepare(tmp_path):
    make_mtat_tree(tmp_path / "mtat", clips=4, seconds=2, empty=1)
    dataset = load_mtat(tmp_path / "mtat", "clean", top_k=6)
    wanted = (
        "mtat, protocol clean, top 6 tags: train 5 of 5 clips in the table; every mp3 is on disk"
    )
    assert dataset.notes[0] == wanted
    spec, options = FeatureSpec(sample_rate=16000, n_mels=16), {"workers": 1, "progress": False}
    summary = prepare_store(dataset, spec, ClipLayout(32), tmp_path / "store", **options)
    assert summary.splits == {"train": 4}
    assert [(s["clip_id"], s["reason"]) for s in summary.skipped] == [
        ("30", f"{tmp_path}/mtat/0/nobody-nothing-01-silence_0-0-2.mp3: empty file (0 bytes).")
    ]


@pytest.fixture
def real_table(real_data):
    return read_table(real_data / "mtat")


def test_the_real_table(real_table):
    assert real_table.tags.shape == (25863, 188)
    assert len(set(real_table.tracks)) == 5405 and len(set(real_table.artists)) == 230
    names, counts = real_table.tag_names, real_table.tags.sum(axis=0)
    assert [names[i] for i in (0, 1, 49, 50)] == ["guitar", "classical", "choral", "electro"]
    assert counts[[0, 1, 49, 50]].tolist() == [4852, 4272, 490, 474]
    # Equally frequent tags come in alphabetical order; none of these pairs is at the boundary.
    assert names[28:30] == ("no vocal", "pop") and names[47:49] == ("female voice", "metal")
    paths = dict(zip(real_table.clip_ids, real_table.mp3_paths, strict=True))
    assert mtat.EMPTY_IN_THE_ARCHIVE.items() <= paths.items()


@pytest.mark.parametrize(
    ("protocol", "counts", "tracks", "artists"),
    [
        ("report", (13510, 3378, 4223), 3796, 4223),
        ("clean", (15250, 1529, 4332), 0, 2680),
        ("all", (18709, 1825, 5329), 0, 3284),
    ],
)
def test_the_published_counts_and_the_leaks(real_table, protocol, counts, tracks, artists):
    splits = protocol_splits(real_table, protocol)
    assert count(splits) == counts
    assert leak(splits, real_table.tracks) == (tracks, counts[2])
    assert leak(splits, real_table.artists) == (artists, counts[2])
    if protocol == "report":
        other = protocol_splits(real_table, protocol, seed=1)
        assert other != splits and count(other) == counts


def test_the_grouped_split_of_the_real_table(real_table):
    splits = np.array(protocol_splits(real_table, "grouped"))
    assert (splits != "").sum() == 21111
    tracks = np.array(real_table.tracks)
    sides = [set(tracks[splits == split]) for split in ("train", "valid", "test")]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    top = real_table.tags[:, :50]
    for split, part in (("train", 0.7), ("valid", 0.15), ("test", 0.15)):
        assert np.abs(top[splits == split].sum(axis=0) / top.sum(axis=0) - part).max() < 0.03


def test_the_audit_reports_the_leak_of_the_reports_split(real_table):
    for protocol, clips in (("report", 3796), ("clean", 0)):
        splits = protocol_splits(real_table, protocol)
        sides = []
        for split in ("test", "train"):
            chosen = [part == split for part in splits]
            ids = list(itertools.compress(real_table.clip_ids, chosen))
            tracks = list(itertools.compress(real_table.tracks, chosen))
            sides.append(AuditSide(ids, [None] * len(ids), tracks))
        findings = audit(*sides, group_name="track").findings
        assert [(f.kind, f.clips) for f in findings] == [("same track", clips)] * bool(clips)
        train = Counter(sides[1].groups)
        assert sum(f.pairs for f in findings) == sum(train[track] for track in sides[0].groups)


def test_the_real_folder_counts_what_it_lacks(real_data):
    dataset = load_mtat(real_data / "mtat", "clean", allow_missing=True)
    assert dataset.notes == (
        "mtat, protocol clean, top 50 tags: train 15,250, valid 1,529, test 4,332 of 25,863 clips "
        "in the table; 21,110 mp3s are not on disk",
        "leaks by the table: 0 of 4,332 test clips (0.0%) are from a track that is also in train, "
        "2,680 (61.9%) by an artist who is in train, too",
        "known to be empty files in the published archive and counted above: clips 35644, 55753, "
        "57881",
    )
    [clip] = dataset.clips
    assert (clip.clip_id, clip.labels, clip.split) == ("37386", ("techno",), "test")
    assert clip.group == "joram-moments_of_clarity-08-solipsism"
    assert clip.path.is_file() and len(dataset.skipped) == 21110
