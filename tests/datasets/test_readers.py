import importlib.resources

import numpy as np
import pytest
import soundfile

from musicgenre.audio.features import FeatureSpec
from musicgenre.audio.layout import ClipLayout
from musicgenre.datasets import arrays
from musicgenre.datasets.arrays import load_arrays, open_array_file
from musicgenre.datasets.csv_file import load_csv
from musicgenre.datasets.folder import load_folder
from musicgenre.datasets.gtzan import GENRES, artist_groups, load_gtzan
from musicgenre.datasets.splits import group_split, random_split, stratified_kfold
from musicgenre.errors import UserError
from musicgenre.store.prepare import prepare_store


def count(dataset):
    splits = [clip.split for clip in dataset.clips]
    return {split: splits.count(split) for split in ("train", "valid", "test")}


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.fixture
def gtzan(tmp_path):
    touch(tmp_path, *(f"{genre}/{genre}.{i:05d}.wav" for genre in GENRES for i in range(100)))
    return tmp_path


def test_the_fault_filtered_lists(gtzan):
    dataset = load_gtzan(gtzan)
    assert count(dataset) == {"train": 443, "valid": 197, "test": 290}
    known = {clip.clip_id for clip in dataset.clips if clip.group}
    assert known == {clip.clip_id for clip in dataset.clips} & set(artist_groups())
    assert dataset.label_names == GENRES and dataset.clips[0].labels == ("blues",)


def test_a_missing_clip_is_named_or_listed(gtzan):
    (gtzan / "jazz" / "jazz.00055.wav").unlink()
    message = r"jazz\.00055 is not on disk \(1 of the 930 clips.*allow_missing=True"
    with pytest.raises(UserError, match=message):
        load_gtzan(gtzan)
    dataset = load_gtzan(gtzan, allow_missing=True)
    assert [(s.clip_id, s.reason) for s in dataset.skipped] == [("jazz.00055", "not on disk")]


def test_the_broken_clip_may_be_missing(gtzan):
    (gtzan / "jazz" / "jazz.00054.wav").unlink()
    dataset = load_gtzan(gtzan)
    assert count(dataset) == {"train": 442, "valid": 197, "test": 290}
    skipped = [(s.clip_id, s.reason) for s in dataset.skipped]
    assert skipped == [("jazz.00054", "broken in the common copy")]


def test_a_clip_that_does_not_decode_is_skipped_and_listed_by_prepare(tmp_path):
    """As in common copies of GTZAN, whose jazz.00054.wav no decoder reads."""
    names = [f"{genre}/{genre}.{i:05d}.wav" for genre in ("jazz", "rock") for i in (53, 54)]
    touch(tmp_path, *names)
    for name in names:
        soundfile.write(tmp_path / name, np.sin(np.arange(16000) / 9), 16000)
    bad = tmp_path / "jazz" / "jazz.00054.wav"
    bad.write_bytes(b"no sound at all" * 100)
    dataset = load_gtzan(tmp_path, "random")
    spec, options = FeatureSpec(sample_rate=16000, n_mels=16), {"workers": 1, "progress": False}
    summary = prepare_store(dataset, spec, ClipLayout(32), tmp_path / "store", **options)
    (skipped,) = summary.skipped
    assert skipped["clip_id"] == "jazz.00054" and str(bad) in skipped["reason"]
    assert sum(summary.splits.values()) == 3 and any("jazz.00054" in x for x in summary.lines())


def test_artist_folds_share_no_artist_and_cover_every_known_clip(gtzan):
    tested = []
    for fold in range(3):
        dataset = load_gtzan(gtzan, "artist_folds", fold=fold)
        pairs = {(clip.group, clip.split) for clip in dataset.clips}
        assert len(pairs) == len({group for group, _ in pairs})
        assert len(dataset.skipped) == 52 and len(dataset.clips) == 948
        assert 0.1 < count(dataset)["valid"] / 632 < 0.3
        tested += [c.clip_id for c in dataset.clips if c.split == "test"]
    assert sorted(tested) == sorted(artist_groups())
    with pytest.raises(UserError, match=r"data\.fold=3 is not one of 0 to 2"):
        load_gtzan(gtzan, "artist_folds", fold=3)


def test_the_reports_random_split(gtzan):
    dataset = load_gtzan(gtzan, "random")
    assert count(dataset) == {"train": 670, "valid": 330, "test": 0}
    again, other = (load_gtzan(gtzan, "random", seed=seed).clips for seed in (42, 1))
    assert dataset.clips == again != other


def test_stratified_folds_partition_the_clips(gtzan):
    tested = []
    for fold in range(10):
        dataset = load_gtzan(gtzan, "stratified_kfold", fold=fold)
        assert count(dataset) == {"train": 800, "valid": 100, "test": 100}
        test = [c for c in dataset.clips if c.split == "test"]
        assert all(sum(c.labels == (genre,) for c in test) == 10 for genre in GENRES)
        tested += [c.clip_id for c in test]
    assert len(set(tested)) == 1000


@pytest.mark.parametrize("folder", ["", "genres", "genres_original", "Data/genres_original"])
@pytest.mark.parametrize("suffix", ["au", "wav", "flac", "mp3"])
def test_common_copies_of_gtzan_are_found(tmp_path, folder, suffix):
    names = [f"{genre}/{genre}.{i:05d}.{suffix}" for genre in GENRES for i in range(3)]
    touch(tmp_path / folder, *names, "jazz/._jazz.00001.wav", "jazz/jazz.txt", "jazz/jazz.mf")
    touch(tmp_path, "Data/features_30_sec.csv", "Data/images_original/jazz/jazz00000.png")
    dataset = load_gtzan(tmp_path, "random")
    assert [clip.path for clip in dataset.clips] == [tmp_path / folder / name for name in names]


def test_mistakes_with_gtzan(gtzan, tmp_path):
    with pytest.raises(UserError, match=r"no protocol 'random2'\. Did you mean 'random'"):
        load_gtzan(gtzan, "random2")
    touch(gtzan, "blues/blues.00000.au")
    with pytest.raises(UserError, match=r"blues\.00000\.\w+ and blues\.00000\.\w+ are the same"):
        load_gtzan(gtzan)
    with pytest.raises(UserError, match=r"not GTZAN's layout.*blues/blues\.00000\.wav"):
        load_gtzan(tmp_path / "nowhere")


def test_groups_are_never_split_and_fractions_are_near():
    generator = np.random.default_rng(0)
    groups = [f"g{i}" for i in generator.integers(0, 60, 600)]
    labels = ["ab"[int(group[1:]) % 2] for group in groups]
    splits = group_split(labels, groups, 0, (0.6, 0.2, 0.2))
    for group in set(groups):
        assert len({s for s, g in zip(splits, groups, strict=True) if g == group}) == 1
    for label in "ab":
        mine = [s for s, x in zip(splits, labels, strict=True) if x == label]
        for split, fraction in (("train", 0.6), ("test", 0.2)):
            assert abs(mine.count(split) / len(mine) - fraction) < 0.05
    assert splits != group_split(labels, groups, 1, (0.6, 0.2, 0.2))
    assert set(group_split(["a"] * 3, [None] * 3, 0)) == {"train", "valid", "test"}
    assert set(group_split(["a"] * 30, [None] * 30, 0, (0.8, 0.2, 0))) == {"train", "valid"}
    with pytest.raises(UserError, match="three fractions"):
        group_split(labels, groups, 0, (0.6, 0.6, 0.2))


def test_splits_that_cannot_be():
    with pytest.raises(UserError, match="label 'b' has 2 clips, fewer than the 3 folds"):
        stratified_kfold(["a"] * 5 + ["b"] * 2, 3, 0, 0)
    with pytest.raises(UserError, match="at least 3"):
        stratified_kfold(["a"] * 5, 2, 0, 0)
    with pytest.raises(UserError, match="at least 2 clips"):
        random_split(1)


def test_folders_are_classes_and_deeper_ones_groups(tmp_path):
    touch(tmp_path / "jazz", "miles/a.mp3", "miles/b.mp3", "c.wav")
    touch(tmp_path / "rock", "x.flac", "x.wav", ".hidden.wav", "cover.jpg")
    dataset = load_folder(tmp_path)
    assert dataset.label_names == ("jazz", "rock")
    assert [(c.clip_id, c.group) for c in dataset.clips] == [
        ("jazz/c", None),
        ("jazz/miles/a", "jazz/miles"),
        ("jazz/miles/b", "jazz/miles"),
        ("rock/x.flac", None),
        ("rock/x.wav", None),
    ]
    assert dataset.clips[1].split == dataset.clips[2].split


def test_folders_named_after_splits_are_the_splits(tmp_path):
    touch(tmp_path, "train/a/1.wav", "train/b/2.wav", "Validation/a/3.wav", "test/b/4.wav")
    dataset = load_folder(tmp_path)
    assert {c.clip_id: (c.labels[0], c.split) for c in dataset.clips} == {
        "train/a/1": ("a", "train"),
        "train/b/2": ("b", "train"),
        "Validation/a/3": ("a", "valid"),
        "test/b/4": ("b", "test"),
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no sound files"),
        (["a/1.wav", "a/2.wav"], "one class only"),
        (["a/1.wav", "b/2.wav", "3.wav"], r"3\.wav: is in no class"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(UserError, match=message):
        load_folder(tmp_path)


def write_csv(root, text, encoding="utf-8"):
    touch(root, "one.wav", "two.wav", "sub/three.wav")
    (root / "list.csv").write_text(text, encoding=encoding)
    return root / "list.csv"


def test_csv_with_labels_splits_and_groups(tmp_path):
    text = "path;label;split;group\none.wav;a;train;g\ntwo.wav;b;val;\nsub/three.wav;a;TEST;h\n"
    dataset = load_csv(write_csv(tmp_path, text, "utf-8-sig"))
    assert dataset.task == "single_label" and dataset.label_names == ("a", "b")
    assert [(c.clip_id, c.split, c.group) for c in dataset.clips] == [
        ("one.wav", "train", "g"),
        ("sub/three.wav", "test", "h"),
        ("two.wav", "valid", None),
    ]
    assert dataset.clips[1].path == tmp_path / "sub" / "three.wav"


def test_csv_with_tags(tmp_path):
    rows = "one.wav,slow|guitar,train\ntwo.wav,,train\nsub/three.wav,fast,valid\n"
    dataset = load_csv(write_csv(tmp_path, f"path,labels,split\n{rows}"))
    assert dataset.task == "multi_label" and dataset.label_names == ("fast", "guitar", "slow")
    assert [c.labels for c in dataset.clips] == [("slow", "guitar"), ("fast",), ()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,lable\none.wav,a\n", "line 1: unknown column 'lable'. Did you mean 'label'"),
        ("path\none.wav\n", "line 1: it must name path and label"),
        ("path,label\none.wav,a,b\n", "line 2: 3 fields where the header has 2"),
        ("path,label\none.wav,\n", "line 2: empty label"),
        ("path,label,split\none.wav,a,dev\n", "line 2: split 'dev' is not train, valid or test"),
        ("path,label\none.wav,a\none.wav,b\n", "line 3: one.wav is already on line 2"),
        ("path,label\nfour.wav,a\n", r"line 2: .*four\.wav is not on disk"),
        ("path,label\n", "no rows"),
    ],
)
def test_csv_mistakes_name_the_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_csv(write_csv(tmp_path, text))


def test_csv_may_miss_files_if_told_so(tmp_path):
    path = write_csv(tmp_path, "path,label\none.wav,a\nfour.wav,b\n")
    dataset = load_csv(path, allow_missing=True)
    assert len(dataset.clips) == 1 and dataset.skipped[0].clip_id == "four.wav"


def test_the_real_arrays(real_data, tmp_path):
    root = real_data / "gtzan_mels"
    dataset = load_arrays(root, {"train": "train.npz", "valid": "valid.npz", "test": ""})
    assert count(dataset) == {"train": 442, "valid": 197, "test": 0}
    assert dataset.label_names == GENRES
    file = open_array_file(root / "valid.npz")
    assert file.frames_and_bands == (387, 128)
    with np.load(root / "valid.npz", allow_pickle=False) as raw:
        wanted = raw["db_min"][7] * (1 - (float(raw["spectrogram"][7, 30, 100]) + 0.5) / 256)
        chosen = {name: raw[name][[5, 9]] for name in raw.files if name != "genres"}
        np.savez(tmp_path / "unseen.npz", genres=raw["genres"], **chosen)
    decibels = file.spectrogram(7)
    assert decibels.shape == (387, 128) and decibels.min() >= -80 and decibels.max() < 0
    np.testing.assert_allclose(decibels[100, 30], wanted, rtol=1e-6)
    unseen = load_arrays(tmp_path, {"test": "unseen.npz"}).clips
    assert [clip.split for clip in unseen] == ["test"] * 2
    assert unseen[0].group == artist_groups()[unseen[0].clip_id][0]


def fields(**changed):
    return {
        "spectrogram": np.zeros((3, 4, 5), np.float32),
        "label": np.array([0, 1, 0]),
        "genres": np.array(["a", "b"]),
        "clip_id": np.array(["x", "y", "z"]),
    } | changed


def saved(path, **changed):
    values = {name: value for name, value in fields(**changed).items() if value is not None}
    np.savez(path, **values)
    return path


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": None}, "no array 'label'; it has clip_id, genres, spectrogram"),
        ({"label": np.array([0, 2, 1])}, "label 2 of y is not one of the 2 genres"),
        ({"label": np.array([0, 1])}, r"label has the shape \[2\] for 3 spectrograms"),
        ({"genres": None}, "an array genres"),
        ({"clip_id": np.array(["x", "y", "x"])}, "clip id 'x' occurs 2 times"),
        ({"spectrogram": np.zeros((3, 4, 5), np.uint8)}, "uint8, so an array db_min is needed"),
        ({"spectrogram": np.zeros((3, 4), np.float32)}, r"shape \[3, 4\]"),
        ({"clip_id": np.array(["x", "y", "z"], object)}, "Object arrays cannot be loaded"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path, changed, message):
    saved(tmp_path / "bad.npz", **changed)
    with pytest.raises(UserError, match=message):
        load_arrays(tmp_path, {"train": "bad.npz"})


def test_damaged_and_oversized_archives(tmp_path, monkeypatch):
    intact = saved(tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(intact[: len(intact) // 2])
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("cut.npz", "text.npz"):
        with pytest.raises(UserError, match=rf"{name}: not an \.npz file that can be read"):
            load_arrays(tmp_path, {"train": name})
    monkeypatch.setattr(arrays, "MAX_BYTES", 100)
    saved(tmp_path / "b.npz")
    with pytest.raises(UserError, match="unpacks to"):
        load_arrays(tmp_path, {"train": "b.npz"})


def test_files_that_do_not_fit_together(tmp_path):
    saved(tmp_path / "a.npz")
    ids = np.array(["u", "v", "w"])
    saved(tmp_path / "b.npz", clip_id=ids, genres=np.array(["b", "a"]))
    saved(tmp_path / "c.npz", clip_id=ids, spectrogram=np.zeros((3, 4, 6), np.float32))
    for name, message in (
        ("b.npz", "label names b, a are not those"),
        ("c.npz", r"clips of \(6, 4\)"),
        ("a.npz", "occurs 2 times"),
    ):
        with pytest.raises(UserError, match=message):
            load_arrays(tmp_path, {"train": "a.npz", "valid": name})


def test_not_a_number_names_the_clip(tmp_path):
    spectrogram = np.zeros((3, 4, 5), np.float32)
    spectrogram[1, 2, 3] = np.nan
    file = open_array_file(saved(tmp_path / "nan.npz", spectrogram=spectrogram))
    assert file.spectrogram(0).shape == (5, 4)
    with pytest.raises(UserError, match="spectrogram of y has values that are not finite"):
        file.spectrogram(1)


def test_npy_with_its_table_in_the_other_layout(tmp_path):
    values = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
    np.save(tmp_path / "mels.npy", values)
    with pytest.raises(UserError, match=r"mels\.csv: no such file"):
        load_arrays(tmp_path, {"train": "mels.npy"}, "time_mel")
    (tmp_path / "mels.csv").write_text("clip_id,label,group\nx,a,g\ny,b,\n")
    dataset = load_arrays(tmp_path, {"train": "mels.npy"}, "time_mel")
    assert [(c.clip_id, c.labels, c.group) for c in dataset.clips] == [
        ("x", ("a",), "g"),
        ("y", ("b",), None),
    ]
    file = open_array_file(tmp_path / "mels.npy", "time_mel")
    np.testing.assert_array_equal(file.spectrogram(1), values[1])


def test_a_split_list_that_is_gone_is_named(gtzan, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path / "no package")
    message = r"data/train_filtered\.txt: this file comes with .*Install musicgenre again"
    with pytest.raises(UserError, match=message):
        load_gtzan(gtzan)
