import dataclasses
import errno
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors import safe_open
from threadpoolctl import threadpool_info, threadpool_limits

from musicgenre.audio.decode import load_audio
from musicgenre.audio.features import FeatureSpec, compute_features
from musicgenre.audio.layout import ClipLayout
from musicgenre.datasets.base import Clip, Dataset, Skipped
from musicgenre.errors import UserError
from musicgenre.files import read_json, sha256
from musicgenre.store import prepare
from musicgenre.store import store as store_module
from musicgenre.store.prepare import prepare_store
from musicgenre.store.store import Store

SPEC = FeatureSpec(sample_rate=8000, n_fft=256, hop_length=128, n_mels=20)
LAYOUT = ClipLayout(frames=100)


def sound(path, seconds, seed):
    samples = 0.1 * np.random.default_rng(seed).standard_normal(int(8000 * seconds))
    soundfile.write(path, samples, 8000)
    return path


@pytest.fixture
def dataset(tmp_path):
    lengths = [2.0, 1.2, 3.0, 2.0, 2.0, 2.0]
    splits = ["train", "train", "train", "valid", "valid", "test"]
    clips = [
        Clip(
            f"c{i}",
            sound(tmp_path / f"c{i}.wav", seconds, i),
            ("ab"[i % 2],),
            split,
            "same" if i < 2 else None,
        )
        for i, (seconds, split) in enumerate(zip(lengths, splits, strict=True))
    ]
    return Dataset("test", tmp_path, "given", "single_label", ("a", "b"), tuple(clips))


def make(dataset, path, **options):
    return prepare_store(
        dataset,
        options.pop("spec", SPEC),
        options.pop("layout", LAYOUT),
        path,
        workers=1,
        progress=False,
        **options,
    )


def columns_file(folder):
    (file,) = folder.glob("clips-*.safetensors")
    return file


def as_schema_1(folder):
    """Makes the store what the first version of this package wrote."""
    store, manifest = Store.open(folder), read_json(folder / "manifest.json")
    records = [read_json(place) for place in sorted((folder / "shards").glob("*.json"))]
    entries = {
        entry["clip_id"]: entry | {"shard": i}
        for i, record in enumerate(records)
        for entry in record["clips"]
    }
    used = [entries[clip_id] for clip_id in store.clip_ids]
    clips = {
        name: [entry[name] for entry in used]
        for name in ("clip_id", "path", "shard", "row", "length", "sha256")
    }
    clips |= {
        "labels": [list(each) for each in store.labels],
        "split": store.splits.tolist(),
        "group": store.groups,
    }
    if store.values is not None:
        clips["values"] = store.values.tolist()
    manifest |= {
        "schema": 1,
        "shards": [
            {name: record[name] for name in ("file", "rows", "bytes", "sha256")}
            for record in records
        ],
        "clips": clips,
        "skipped": store.skipped,
    }
    del manifest["splits"]
    for file in [*folder.glob("clips-*"), *folder.glob("skipped-*")]:
        file.unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def known(store):
    """All that a store knows of its clips."""
    names = ("label_names", "labels", "groups", "skipped", "dataset", "features", "layout")
    arrays = [
        np.asarray(getattr(store, name)).tolist()
        for name in ("clip_ids", "paths", "splits", "lengths", "hashes", "values")
    ]
    return (
        [getattr(store, name) for name in names],
        arrays,
        store.gather(np.arange(len(store))).tobytes(),
    )


def snapshot(folder):
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_the_store_holds_the_features_and_what_is_known(dataset, tmp_path):
    summary = make(dataset, tmp_path / "store")
    assert (summary.clips, summary.computed, summary.reused, summary.splits) == (
        6,
        6,
        0,
        {"test": 1, "train": 3, "valid": 2},
    )
    store = Store.open(tmp_path / "store")
    assert store.clip_ids.tolist() == [f"c{i}" for i in range(6)]
    assert store.lengths.tolist() == [100, 76, 100, 100, 100, 100]
    assert store.groups == ["same", "same", None, None, None, None]
    assert store.targets(store.indices("train")).tolist() == [0, 1, 0]
    samples = load_audio(tmp_path / "c0.wav", 8000).samples
    expected = compute_features(samples[: 100 * 128], SPEC)[:100].astype(np.float16)
    np.testing.assert_array_equal(store.gather(np.array([0]))[0], expected)
    # A short clip is repeated from its start.
    short = store.gather(np.array([1]))[0]
    np.testing.assert_array_equal(short[76:], short[:24])
    crops = store.gather(np.array([0, 2]), np.array([5, 60]), 30)
    np.testing.assert_array_equal(crops[1], store.gather(np.array([2]))[0, 60:90])


@pytest.mark.parametrize(("pad", "value"), [("silence", None), ("zero", 0.0)])
def test_other_ways_to_fill_a_short_clip(dataset, tmp_path, pad, value):
    make(dataset, tmp_path / "store", layout=ClipLayout(100, pad))
    short = Store.open(tmp_path / "store").gather(np.array([1]))[0].astype(np.float32)
    assert (short[76:] == (short[:76].min() if value is None else value)).all()


def test_the_middle_of_a_longer_clip(dataset, tmp_path):
    make(dataset, tmp_path / "store", layout=ClipLayout(50, excerpt="middle"))
    samples = load_audio(tmp_path / "c2.wav", 8000).samples
    start = (len(samples) - 50 * 128) // 2
    expected = compute_features(samples[start : start + 50 * 128], SPEC)[:50].astype(np.float16)
    np.testing.assert_array_equal(Store.open(tmp_path / "store").gather(np.array([2]))[0], expected)


def test_a_second_run_changes_no_file(dataset, tmp_path):
    make(dataset, tmp_path / "store")
    before = snapshot(tmp_path / "store")
    summary = make(dataset, tmp_path / "store")
    assert (summary.computed, summary.reused) == (0, 6)
    assert snapshot(tmp_path / "store") == before


def test_only_what_changed_or_is_new_is_computed(dataset, tmp_path):
    smaller = dataclasses.replace(dataset, clips=dataset.clips[1:])
    make(smaller, tmp_path / "store")
    sound(tmp_path / "c3.wav", 2.5, 99)
    summary = make(dataset, tmp_path / "store")
    assert (summary.computed, summary.reused) == (2, 4)
    fresh = make(dataset, tmp_path / "fresh")
    grown, whole = Store.open(tmp_path / "store"), Store.open(fresh.store)
    np.testing.assert_array_equal(grown.gather(np.arange(6)), whole.gather(np.arange(6)))


def test_an_interrupted_run_goes_on_after_its_last_shard(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CLIPS_PER_SHARD", 2)
    process = prepare.Recipe.__call__

    def stops(recipe, clip):
        if clip.clip_id == "c3":
            raise KeyboardInterrupt
        return process(recipe, clip)

    monkeypatch.setattr(prepare.Recipe, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        make(dataset, tmp_path / "store")
    with pytest.raises(UserError, match=r"no finished spectrogram store.*musicgenre prepare"):
        Store.open(tmp_path / "store")
    monkeypatch.setattr(prepare.Recipe, "__call__", process)
    assert make(dataset, tmp_path / "store").computed == 4


def test_two_processes_give_the_same_bytes_as_one(tmp_path):
    """With more clips than the processes share memory for, and one that is skipped."""
    clips = [
        Clip(f"c{i:02d}", sound(tmp_path / f"c{i:02d}.wav", 1.5, i), ("ab"[i % 2],), "train")
        for i in range(22)
    ]
    clips[5].path.write_bytes(b"")
    dataset = Dataset("test", tmp_path, "given", "single_label", ("a", "b"), tuple(clips))
    make(dataset, tmp_path / "one")
    prepare_store(dataset, SPEC, LAYOUT, tmp_path / "two", workers=2, progress=False)
    assert {k: v[1] for k, v in snapshot(tmp_path / "one").items()} == {
        k: v[1] for k, v in snapshot(tmp_path / "two").items()
    }


def test_preparing_loads_little():
    """Worker processes load all this anew before they begin."""
    loaded = "import sys, musicgenre.store.prepare; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "musicgenre.audio.features" in modules
    assert not {"librosa", "numba", "soxr", "jax", "scipy.signal", "sklearn"} & set(modules)


def test_skipped_clips_are_listed_with_their_reason_and_not_tried_again(dataset, tmp_path):
    (tmp_path / "c0.wav").write_bytes(b"")
    (tmp_path / "c4.wav").write_bytes(b"no sound at all")
    dataset = dataclasses.replace(dataset, skipped=(Skipped("gone", "gone.wav", "not on disk"),))
    summary = make(dataset, tmp_path / "store")
    assert [entry["clip_id"] for entry in summary.skipped] == ["gone", "c0", "c4"]
    assert (
        "empty file" in summary.skipped[1]["reason"]
        and "not a sound file" in summary.skipped[2]["reason"]
    )
    assert "3 skipped" in summary.lines()[0] and "skipped c0: " in summary.lines()[2]
    assert Store.open(tmp_path / "store").skipped == summary.skipped
    assert make(dataset, tmp_path / "store").computed == 0
    sound(tmp_path / "c0.wav", 2.0, 5)
    assert make(dataset, tmp_path / "store").clips == 5


def test_a_split_without_a_usable_clip_is_an_error(dataset, tmp_path):
    (tmp_path / "c5.wav").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"no clip of the split 'test' could be used.*c5\.wav: empty file"
    ):
        make(dataset, tmp_path / "store")


def test_another_front_end_is_never_mixed_in(dataset, tmp_path):
    make(dataset, tmp_path / "store")
    before = snapshot(tmp_path / "store")
    for change in ({"spec": dataclasses.replace(SPEC, hop_length=64)}, {"layout": ClipLayout(90)}):
        with pytest.raises(UserError, match="never mixes them"):
            make(dataset, tmp_path / "store", **change)
    with pytest.raises(UserError, match="this store is of protocol 'given', not 'other'"):
        make(dataclasses.replace(dataset, protocol="other"), tmp_path / "store")
    assert snapshot(tmp_path / "store") == before


def test_a_foreign_folder_is_left_alone(dataset, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no store"):
        make(dataset, tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_shard_is_named_and_rebuilt(dataset, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(prepare, "CLIPS_PER_SHARD", 2)
    make(dataset, tmp_path / "store")
    whole = Store.open(tmp_path / "store").gather(np.arange(6))
    shard = tmp_path / "store" / "shards" / "00001.npy"
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        content[-7] ^= 1
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(content[:-100])
    else:
        shard.unlink()
    with pytest.raises(
        UserError, match=r"00001\.npy: this shard.*(missing|damaged).*musicgenre prepare again"
    ):
        Store.open(tmp_path / "store")
    assert make(dataset, tmp_path / "store").computed == 2
    np.testing.assert_array_equal(Store.open(tmp_path / "store").gather(np.arange(6)), whole)


def test_broken_manifests_are_named(dataset, tmp_path):
    make(dataset, tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    manifest = json.loads(path.read_text())
    for content, message in (
        ("{", "not a readable store manifest"),
        (json.dumps(manifest | {"schema": 99}), "schema 99"),
        (json.dumps({"schema": 1}), "incomplete manifest"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            Store.open(tmp_path / "store")


def test_it_pickles_small_and_reads_after(dataset, tmp_path):
    make(dataset, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    first = store.gather(np.array([3]))
    # What was read of the clips stays behind: a copy of a million clips is as small.
    assert store.clip_ids[3] == "c3" and store.hashes[3] == sha256(tmp_path / "c3.wav")
    copy = pickle.dumps(store)
    assert len(copy) < 2000 and b"c3.wav" not in copy
    again = pickle.loads(copy)
    np.testing.assert_array_equal(again.gather(np.array([3])), first)
    assert again.clip_ids.tolist() == store.clip_ids.tolist() and again.skipped == []


@pytest.mark.parametrize("task", ["single_label", "multi_label", "regression"])
def test_a_store_of_schema_1_is_read_and_brought_up_to_date_without_computing(
    dataset, tmp_path, monkeypatch, task
):
    monkeypatch.setattr(prepare, "CLIPS_PER_SHARD", 2)
    labels = {
        "single_label": [("a",)] * 6,
        "multi_label": [("b", "a"), (), ("a",), ("b",), (), ("b",)],
        "regression": [()] * 6,
    }
    clips = tuple(
        dataclasses.replace(clip, labels=own, values=(i / 3, -i) if task == "regression" else ())
        for i, (clip, own) in enumerate(zip(dataset.clips, labels[task], strict=True))
    )
    (tmp_path / "c1.wav").write_bytes(b"")
    dataset = dataclasses.replace(dataset, clips=clips, task=task)
    make(dataset, tmp_path / "store")
    new, files = known(Store.open(tmp_path / "store")), snapshot(tmp_path / "store")
    as_schema_1(tmp_path / "store")
    old = Store.open(tmp_path / "store")
    assert known(old) == new
    copy = pickle.loads(pickle.dumps(old))
    assert (
        known(copy) == new
        and copy.targets(np.array([4, 0])).tolist() == old.targets(np.array([4, 0])).tolist()
    )
    summary = make(dataset, tmp_path / "store")
    assert (summary.computed, summary.reused) == (0, 6)
    assert {name: content for name, (_, content) in snapshot(tmp_path / "store").items()} == {
        name: content for name, (_, content) in files.items()
    }


def test_names_that_are_no_ascii_and_clips_without_labels_come_back(dataset, tmp_path):
    names = ["", "é ß", "a\nb", "\udcff broken", "日本", "z" * 300]
    columns = store_module.clip_columns(
        ("x", "y", "z"),
        ("test", "train"),
        clip_id=map(str, range(6)),
        path=names,
        labels=[(), ("z", "x"), (), ("y",), (), ("x",)],
        split=["train"] * 5 + ["test"],
        group=["b", None, "a", "b", None, ""],
        shard=np.zeros(6),
        row=np.arange(6),
        length=np.ones(6),
        sha256=np.zeros((6, 32)),
    )
    assert columns["label"].tolist() == [2, 0, 1, 0] and columns["label_bounds"].tolist() == [
        0,
        0,
        2,
        2,
        3,
        3,
        4,
    ]
    assert columns["group"].tolist() == [2, -1, 1, 2, -1, 0] and columns["split"].tolist() == [
        1,
        1,
        1,
        1,
        1,
        0,
    ]
    make(dataset, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    store._arrays |= columns
    store.label_names = ("x", "y", "z")
    assert store.paths.tolist() == names and store.groups == ["b", None, "a", "b", None, ""]
    assert store.labels == [(), ("z", "x"), (), ("y",), (), ("x",)]
    store.dataset = store.dataset | {"task": "multi_label"}
    assert store.targets(np.array([3, 0, 1, 1])).tolist() == [
        [0, 1, 0],
        [0, 0, 0],
        [1, 0, 1],
        [1, 0, 1],
    ]


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damaged_columns_are_named_and_written_anew(dataset, tmp_path, damage):
    (tmp_path / "c4.wav").write_bytes(b"")
    make(dataset, tmp_path / "store")
    before = snapshot(tmp_path / "store")
    for pattern in ("clips-*.safetensors", "skipped-*.jsonl"):
        assert make(dataset, tmp_path / "store").computed == 0
        (file,) = (tmp_path / "store").glob(pattern)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(content if damage == "flip" else content[:-1])
        with pytest.raises(
            UserError,
            match=rf"{file.name}: this part.*(missing|damaged).*again: it rewrites the file",
        ):
            Store.open(tmp_path / "store")
    assert make(dataset, tmp_path / "store").computed == 0
    assert {k: v[1] for k, v in snapshot(tmp_path / "store").items()} == {
        k: v[1] for k, v in before.items()
    }


def test_who_has_a_store_open_keeps_the_columns_that_it_opened(dataset, tmp_path):
    make(dataclasses.replace(dataset, clips=dataset.clips[1:]), tmp_path / "store")
    first = Store.open(tmp_path / "store")
    make(dataset, tmp_path / "store")
    assert (
        columns_file(tmp_path / "store").name
        == read_json(tmp_path / "store/manifest.json")["clips"]["file"]
    )
    assert (
        first.clip_ids.tolist() == [f"c{i}" for i in range(1, 6)]
        and len(Store.open(tmp_path / "store")) == 6
    )


def test_many_threads_read_more_shards_than_are_kept_open(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CLIPS_PER_SHARD", 1)
    monkeypatch.setattr(store_module, "_OPEN_SHARDS", 2)
    make(dataset, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    expected = np.stack([np.load(tmp_path / f"store/shards/0000{i}.npy")[0] for i in range(6)])
    orders = [np.random.default_rng(seed).integers(0, 6, 40) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for order, x in zip(
            orders,
            pool.map(lambda order: store.gather(order, np.full(40, 7), 50), orders),
            strict=True,
        ):
            np.testing.assert_array_equal(x, expected[order, 7:57])
    if Path("/proc/self/fd").is_dir():
        files = [os.path.realpath(place) for place in Path("/proc/self/fd").iterdir()]
        assert (
            len(
                [name for name in files if name.startswith(str(tmp_path)) and name.endswith(".npy")]
            )
            == 2
        )


def test_what_a_shard_does_not_hold_is_never_read(dataset, tmp_path):
    make(dataset, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    for start in (-1, 71):
        with pytest.raises(
            ValueError, match=rf"frames {start} to {start + 30} of clips of 100 frames"
        ):
            store.gather(np.array([1]), np.array([start]), 30)
    assert store.gather(np.array([], np.int64)).shape == (0, 100, 20)
    shard = tmp_path / "store/shards/00000.npy"
    os.truncate(shard, shard.stat().st_size - 1)
    store.gather(np.array([4]))
    with pytest.raises(UserError, match=r"00000\.npy: this shard is damaged \(it ends early\)"):
        store.gather(np.array([5]))
    shard.unlink()
    with pytest.raises(
        UserError, match=r"00000\.npy: this shard of the store cannot be read \(No such file"
    ):
        pickle.loads(pickle.dumps(store)).gather(np.array([0]))


@pytest.mark.parametrize("most_mapped", [0, 128], ids=["read", "mapped"])
def test_shards_read_or_mapped_give_the_same_and_one_cut_while_in_use_is_named(
    dataset, tmp_path, monkeypatch, most_mapped
):
    monkeypatch.setattr(store_module, "_OPEN_SHARDS", most_mapped)
    monkeypatch.setattr(prepare, "CLIPS_PER_SHARD", 4)
    make(dataset, tmp_path / "store")
    store, copy = (
        Store.open(tmp_path / "store"),
        pickle.loads(pickle.dumps(Store.open(tmp_path / "store"))),
    )
    whole = np.concatenate([np.load(tmp_path / f"store/shards/0000{i}.npy") for i in range(2)])
    clips, starts = np.array([5, 0, 3, 0]), np.array([0, 70, 31, 2])
    expected = np.stack(
        [whole[clip, start : start + 30] for clip, start in zip(clips, starts, strict=True)]
    )
    for opened in (store, copy):
        np.testing.assert_array_equal(opened.gather(clips, starts, 30), expected)
    # Touching a mapped page that the file has lost would end the process.
    os.truncate(tmp_path / "store/shards/00001.npy", 128)
    with pytest.raises(UserError, match=r"00001\.npy: this shard is damaged \(it ends early\)"):
        store.gather(np.array([5]))
    np.testing.assert_array_equal(store.gather(np.array([3])), whole[3:4])
    os.truncate(tmp_path / "store/shards/00000.npy", 0)
    with pytest.raises(UserError, match=r"00000\.npy: this shard is damaged \(it ends early\)"):
        pickle.loads(pickle.dumps(store)).gather(np.array([3]))


def test_a_quick_run_trusts_the_checksums(dataset, tmp_path):
    make(dataset, tmp_path / "store")
    shard = tmp_path / "store/shards/00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert make(dataset, tmp_path / "store", verify=False).computed == 0
    assert make(dataset, tmp_path / "store").computed == 6


def test_an_absent_split_lists_those_that_are_there(dataset, tmp_path):
    make(dataclasses.replace(dataset, clips=dataset.clips[:5]), tmp_path / "store")
    with pytest.raises(
        UserError, match=r"no clips in the split 'test'. There are: train \(3\), valid \(2\)"
    ):
        Store.open(tmp_path / "store").indices("test")


def test_tags_become_rows_of_zeros_and_ones(dataset, tmp_path):
    clips = tuple(
        dataclasses.replace(clip, labels=labels)
        for clip, labels in zip(
            dataset.clips, [("a",), ("b", "a"), (), ("b",), ("a",), ("a", "b")], strict=True
        )
    )
    make(dataclasses.replace(dataset, clips=clips, task="multi_label"), tmp_path / "store")
    store = Store.open(tmp_path / "store")
    assert store.targets(np.arange(4)).tolist() == [[1, 0], [1, 1], [0, 0], [0, 1]]


def test_a_full_disk_is_named_and_the_next_run_goes_on(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CLIPS_PER_SHARD", 3)
    save = np.save
    calls = []

    def full(handle, array, **options):
        calls.append(len(array))
        if len(calls) == 2:
            handle.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(handle, array, **options)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(
        UserError, match=r"00001\.npy: cannot be written \(No space left on device\)"
    ):
        make(dataset, tmp_path / "store")
    assert sorted(os.listdir(tmp_path / "store" / "shards")) == ["00000.json", "00000.npy"]
    assert make(dataset, tmp_path / "store").computed == 3


def test_a_rebuilt_shard_takes_a_new_number(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CLIPS_PER_SHARD", 2)
    make(dataset, tmp_path / "store")
    (tmp_path / "store/shards/00001.npy").write_bytes(b"damaged")
    assert make(dataset, tmp_path / "store").computed == 2
    assert sorted(os.listdir(tmp_path / "store/shards")) == [
        f"0000{n}.{end}" for n in (0, 2, 3) for end in ("json", "npy")
    ]
    with safe_open(columns_file(tmp_path / "store"), "numpy") as columns:
        assert columns.get_tensor("shard_number").tolist() == [0, 2, 3]
        assert columns.get_tensor("shard").tolist() == [0, 0, 2, 2, 1, 1]


def test_the_number_of_threads_does_not_decide_the_bytes(dataset, tmp_path, monkeypatch):
    seen = []
    process = prepare.Recipe.__call__

    def looks(*arguments):
        seen.extend(pool["num_threads"] for pool in threadpool_info())
        return process(*arguments)

    monkeypatch.setattr(prepare.Recipe, "__call__", looks)
    with threadpool_limits(2):
        make(dataset, tmp_path / "store")
        assert {pool["num_threads"] for pool in threadpool_info()} == {2}
        first, second = prepare.one_thread(), prepare.one_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        # One of two that run side by side has ended: the other still needs the limit.
        assert {pool["num_threads"] for pool in threadpool_info()} == {1}
        second.__exit__(None, None, None)
        assert {pool["num_threads"] for pool in threadpool_info()} == {2}
    assert seen and set(seen) == {1}
