from collections import Counter

import numpy as np
import pytest

from musicgenre.config import base_config, dataset_options, store_path
from musicgenre.datasets import load_dataset
from musicgenre.datasets.arrays import artist_known, load_arrays, open_array_file, whole_clip
from musicgenre.datasets.splits import kfold_split
from musicgenre.errors import UserError


def save_file(path, first, count, frames=10, artists=None):
    """Writes clips whose cell [band, frame] is 1000 * clip + 100 * band + frame."""
    clip = np.arange(first, first + count)[:, None, None]
    values = 1000 * clip + 100 * np.arange(3)[:, None] + np.arange(frames)
    np.savez(
        path,
        spectrogram=values.astype(np.float32),
        label=np.arange(count) % 2,
        genres=np.array(["a", "b"]),
        clip_id=np.array([f"clip{number}" for number in clip.ravel()]),
        group=np.array(artists or [""] * count),
    )


@pytest.fixture
def two_files(tmp_path):
    """8 clips to train on, two each by four artists, and 4 by nobody known to validate on."""
    save_file(tmp_path / "train.npz", 0, 8, artists=["w", "x", "w", "x", "y", "z", "y", "z"])
    save_file(tmp_path / "valid.npz", 8, 4)
    save_file(tmp_path / "test.npz", 12, 2)
    return tmp_path


def load(root, protocol, files="train valid test", **options):
    files = {split: f"{split}.npz" for split in files.split()}
    return load_arrays(root, files, protocol=protocol, **options)


def ids(dataset, split):
    return [clip.clip_id for clip in dataset.clips if clip.split == split]


def test_each_clip_is_held_out_once_and_labels_are_spread_evenly():
    labels = ["a"] * 10 + ["b"] * 15
    turns = [kfold_split(labels, 5, fold, seed=3) for fold in range(5)]
    assert all(sorted(turn[i] for turn in turns) == ["train"] * 4 + ["valid"] for i in range(25))
    for turn in turns:
        held_out = [label for label, split in zip(labels, turn, strict=True) if split == "valid"]
        assert Counter(held_out) == {"a": 2, "b": 3}
    assert turns[0] == kfold_split(labels, 5, 0, seed=3) != kfold_split(labels, 5, 0, seed=4)


def test_no_artist_is_on_both_sides():
    labels = ["a", "b"] * 20
    groups = [None if i % 5 == 0 else f"artist {i % 10}" for i in range(40)]
    together = 0
    for fold in range(4):
        splits = kfold_split(labels, 4, fold, seed=0, groups=groups)
        sides = [
            {group for group, split in zip(groups, splits, strict=True) if split == side}
            for side in ("train", "valid")
        ]
        assert sides[0] & sides[1] <= {None}  # clips by nobody known are free to be anywhere
        together += splits.count("valid")
    assert together == 40


def test_folds_that_cannot_be():
    labels = ["a"] * 4 + ["b"] * 4
    for arguments, message in (
        ((labels, 1, 0, 0), "data.folds must be at least 2"),
        ((labels, 4, 4, 0), "data.fold=4 is not one of 0 to 3"),
        ((labels, 5, 0, 0), "the label 'a' has 4 clips, fewer than the 5 folds"),
        ((labels, 3, 0, 0, ["x", "y"] * 4), "2 artists or other groups are fewer than the 3 folds"),
        ((labels, 2, 0, 0, [*"xxxxyzyz"]), "all clips of the label 'a' are of one artist"),
    ):
        with pytest.raises(UserError, match=message):
            kfold_split(*arguments)


def test_folds_are_made_of_the_files_that_are_given_and_the_test_file_stays(two_files):
    turns = [load(two_files, "random_kfold", folds=3, fold=fold) for fold in range(3)]
    assert turns[1].protocol == "random_kfold fold 1 of 3, seed 42"
    assert all(ids(turn, "test") == ["clip12", "clip13"] for turn in turns)
    held_out = [clip_id for turn in turns for clip_id in ids(turn, "valid")]
    assert sorted(held_out) == sorted(f"clip{i}" for i in range(12))
    by_artist = load(two_files, "artist_kfold", "train", folds=2)
    pairs = {(clip.group, clip.split) for clip in by_artist.clips}
    assert sorted(group for group, _ in pairs) == [*"wxyz"] and len({s for _, s in pairs}) == 2
    with pytest.raises(UserError, match="folds are made of the train and valid files"):
        load(two_files, "random_kfold", "test")
    with pytest.raises(UserError, match=r"'artist_kfolds'\. Did you mean 'artist_kfold'"):
        load(two_files, "artist_kfolds")


@pytest.mark.parametrize("layout", ["mel_time", "time_mel"])
def test_segments_are_the_parts_of_their_clips(two_files, layout):
    if layout == "time_mel":
        with np.load(two_files / "train.npz") as file:
            arrays = {**file}
        arrays["spectrogram"] = arrays["spectrogram"].transpose(0, 2, 1)
        np.savez(two_files / "train.npz", **arrays)
    options = {"layout": layout, "folds": 2, "frames": 3}
    dataset = load(two_files, "segment_leaked", "train", **options)
    assert dataset.protocol == "segment_leaked fold 0 of 2, seed 42, 3 segments a clip"
    assert len(dataset.clips) == 24 and len({clip.row for clip in dataset.clips}) == 24
    file = open_array_file(two_files / "train.npz", layout)
    for clip in dataset.clips:
        number, index = (int(part) for part in clip.clip_id.removeprefix("clip").split("#"))
        # Three segments of three frames; the tenth frame of the clip is left over.
        wanted = 1000 * number + 100 * np.arange(3) + np.arange(3 * index, 3 * index + 3)[:, None]
        np.testing.assert_array_equal(file.spectrogram(clip.row), wanted)
        assert whole_clip(clip.clip_id) == f"clip{number}"
    np.testing.assert_array_equal(file.spectrogram(7)[:, 0], 7000 + np.arange(10))
    # At random: some clip has segments on both sides.
    train, valid = (set(map(whole_clip, ids(dataset, side))) for side in ("train", "valid"))
    assert train & valid


def test_segments_of_a_clip_by_nobody_known_belong_together(two_files):
    dataset = load(two_files, "segment_leaked", "valid", folds=2, frames=5)
    assert [clip.clip_id for clip in dataset.clips[:3]] == ["clip10#0", "clip10#1", "clip11#0"]
    assert [clip.group for clip in dataset.clips[1:3]] == ["clip clip10", "clip clip11"]
    assert not any(artist_known(clip.clip_id, clip.group) for clip in dataset.clips)
    assert artist_known("clip0#1", "w") and not artist_known("clip8", None)
    with pytest.raises(UserError, match=r"10 frames do not hold two segments of data\.frames=6"):
        load(two_files, "segment_leaked", frames=6)


def test_each_fold_of_a_config_has_its_own_store(two_files):
    stores, held_out = set(), []
    config = base_config()
    config.data.update({"dataset": "arrays", "root": str(two_files), "folds": 2})
    config.data.files.update({"train": "train.npz", "valid": "valid.npz"})
    protocols = ("fault_filtered", "random_kfold", "random_kfold", "artist_kfold")
    for protocol, fold in zip(protocols, (0, 0, 1, 0), strict=True):
        config.data.update({"protocol": protocol, "fold": fold})
        stores.add(store_path(config))
        held_out.append(set(ids(load_dataset(dataset_options(config)), "valid")))
    assert len(stores) == 4
    assert held_out[0] == {"clip8", "clip9", "clip10", "clip11"}  # as the files say
    assert not held_out[1] & held_out[2] and len(held_out[1] | held_out[2]) == 12
    config.data.update({"protocol": "segment_leaked", "frames": 5})
    assert len(load_dataset(dataset_options(config)).clips) == 24


def test_gtzan_by_artist(real_data):
    root, held_out = real_data / "gtzan_mels", []
    for fold in range(5):
        dataset = load(root, "artist_kfold", "train valid", fold=fold, folds=5)
        pairs = {(clip.group, clip.split) for clip in dataset.clips if clip.group}
        assert len(pairs) == len({group for group, _ in pairs})
        held_out += ids(dataset, "valid")
    assert len(held_out) == len(set(held_out)) == 639
