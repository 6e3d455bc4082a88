import dataclasses
import errno
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

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


def of_clips(folder, clips):
    parts = (folder, "given", "single_label", ("a", "b"), tuple(clips))
    return Dataset("test", *parts)


@pytest.fixture
def dataset(tmp_path):
    lengths = [2.0, 1.2, 3.0, 2.0, 2.0, 2.0]
    splits = ["train", "train", "train", "valid", "valid", "test"]
    clips = []
    for i, (seconds, split) in enumerate(zip(lengths, splits, strict=True)):
        path = sound(tmp_path / f"c{i}.wav", seconds, i)
        clips.append(Clip(f"c{i}", path, ("ab"[i % 2],), split, "same" if i < 2 else None))
    return of_clips(tmp_path, clips)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


def make(dataset, path, **options):
    settings = {"spec": SPEC, "layout": LAYOUT, "workers": 1, "progress": False} | options
    return prepare_store(dataset, path=path, **settings)


def of_size(monkeypatch, clips):
    monkeypatch.setattr(prepare, "CLIPS_PER_SHARD", clips)


def columns_file(folder):
    (file,) = folder.glob("clips-*.safetensors")
    return file


def spoil(file, damage):
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def snapshot(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def contents(folder):
    return {name: content for name, (_, content) in snapshot(folder).items()}


def test_the_store_holds_the_features_and_the_columns(dataset, path, tmp_path):
    summary = make(dataset, path)
    assert (summary.clips, summary.computed, summary.reused) == (6, 6, 0)
    assert summary.splits == {"test": 1, "train": 3, "valid": 2}
    store = Store.open(path)
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
def test_a_short_clip_is_padded(dataset, path, pad, value):
    make(dataset, path, layout=ClipLayout(100, pad))
    short = Store.open(path).gather(np.array([1]))[0].astype(np.float32)
    assert (short[76:] == (short[:76].min() if value is None else value)).all()


def test_the_middle_of_a_longer_clip_is_kept(dataset, path, tmp_path):
    make(dataset, path, layout=ClipLayout(50, excerpt="middle"))
    samples = load_audio(tmp_path / "c2.wav", 8000).samples
    start = (len(samples) - 50 * 128) // 2
    expected = compute_features(samples[start : start + 50 * 128], SPEC)[:50].astype(np.float16)
    np.testing.assert_array_equal(Store.open(path).gather(np.array([2]))[0], expected)


def test_a_second_run_changes_no_file(dataset, path):
    make(dataset, path)
    before = snapshot(path)
    summary = make(dataset, path)
    assert (summary.computed, summary.reused) == (0, 6)
    assert snapshot(path) == before


def test_only_what_changed_or_is_new_is_computed(dataset, path, tmp_path):
    smaller = dataclasses.replace(dataset, clips=dataset.clips[1:])
    make(smaller, path)
    sound(tmp_path / "c3.wav", 2.5, 99)
    summary = make(dataset, path)
    assert (summary.computed, summary.reused) == (2, 4)
    fresh = make(dataset, tmp_path / "fresh")
    grown, new = Store.open(path), Store.open(fresh.store)
    np.testing.assert_array_equal(grown.gather(np.arange(6)), new.gather(np.arange(6)))


def test_an_interrupted_run_resumes_after_its_last_shard(dataset, path, monkeypatch):
    of_size(monkeypatch, 2)
    process = prepare.Recipe.__call__

    def stops(recipe, clip):
        if clip.clip_id == "c3":
            raise KeyboardInterrupt
        return process(recipe, clip)

    monkeypatch.setattr(prepare.Recipe, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        make(dataset, path)
    with pytest.raises(UserError, match=r"no finished spectrogram store.*musicgenre prepare"):
        Store.open(path)
    monkeypatch.setattr(prepare.Recipe, "__call__", process)
    assert make(dataset, path).computed == 4


def test_two_processes_give_the_same_bytes_as_one(tmp_path):
    """With more clips than are pending at a time, and one that is skipped."""
    paths = [sound(tmp_path / f"c{i:02d}.wav", 1.5, i) for i in range(22)]
    paths[5].write_bytes(b"")
    clips = [Clip(p.stem, p, ("ab"[i % 2],), "train") for i, p in enumerate(paths)]
    for name, workers in (("one", 1), ("two", 2)):
        make(of_clips(tmp_path, clips), tmp_path / name, workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_preparing_loads_little():
    """Every worker process imports all this before it begins."""
    loaded = "import sys, musicgenre.store.prepare; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "musicgenre.audio.features" in modules
    assert not {"librosa", "numba", "soxr", "jax", "scipy.signal", "sklearn"} & set(modules)


def test_skipped_clips_are_listed_with_their_reason_and_not_tried_again(dataset, path, tmp_path):
    (tmp_path / "c0.wav").write_bytes(b"")
    (tmp_path / "c4.wav").write_bytes(b"no sound at all")
    dataset = dataclasses.replace(dataset, skipped=(Skipped("gone", "gone.wav", "not on disk"),))
    summary = make(dataset, path)
    assert [entry["clip_id"] for entry in summary.skipped] == ["gone", "c0", "c4"]
    reasons = [entry["reason"] for entry in summary.skipped]
    assert "empty file" in reasons[1] and "not a sound file" in reasons[2]
    assert "3 skipped" in summary.lines()[0] and "skipped c0: " in summary.lines()[2]
    assert Store.open(path).skipped == summary.skipped
    assert make(dataset, path).computed == 0
    sound(tmp_path / "c0.wav", 2.0, 5)
    assert make(dataset, path).clips == 5


def test_a_split_without_a_usable_clip_is_an_error(dataset, path, tmp_path):
    (tmp_path / "c5.wav").write_bytes(b"")
    message = r"no clip of the split 'test' could be used.*c5\.wav: empty file"
    with pytest.raises(UserError, match=message):
        make(dataset, path)


def test_front_ends_layouts_and_data_sets_are_never_mixed(dataset, path):
    make(dataset, path)
    before = snapshot(path)
    for change in ({"spec": dataclasses.replace(SPEC, hop_length=64)}, {"layout": ClipLayout(90)}):
        with pytest.raises(UserError, match="never mixes them"):
            make(dataset, path, **change)
    with pytest.raises(UserError, match="this store is of protocol 'given', not 'other'"):
        make(dataclasses.replace(dataset, protocol="other"), path)
    assert snapshot(path) == before


def test_a_foreign_folder_is_left_alone(dataset, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no store"):
        make(dataset, tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_shard_is_named_and_rebuilt(dataset, path, monkeypatch, damage):
    of_size(monkeypatch, 2)
    make(dataset, path)
    complete = Store.open(path).gather(np.arange(6))
    spoil(path / "shards/00001.npy", damage)
    message = r"00001\.npy: this shard.*(missing|damaged).*musicgenre prepare again"
    with pytest.raises(UserError, match=message):
        Store.open(path)
    assert make(dataset, path).computed == 2
    np.testing.assert_array_equal(Store.open(path).gather(np.arange(6)), complete)


def test_broken_manifests_are_named(dataset, path):
    make(dataset, path)
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    for content, message in (
        ("{", "not a readable store manifest"),
        (json.dumps(manifest | {"schema": 99}), "schema 2, not schema 99. Update musicgenre"),
        (json.dumps({"schema": 2}), "incomplete manifest"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            Store.open(path)


def test_a_store_pickles_small_and_reads_afterwards(dataset, path, tmp_path):
    make(dataset, path)
    store = Store.open(path)
    first = store.gather(np.array([3]))
    # Columns are not pickled: a copy of a million clips is as small.
    assert store.clip_ids[3] == "c3" and store.hashes[3] == sha256(tmp_path / "c3.wav")
    copy = pickle.dumps(store)
    assert len(copy) < 2000 and b"c3.wav" not in copy
    again = pickle.loads(copy)
    np.testing.assert_array_equal(again.gather(np.array([3])), first)
    assert again.clip_ids.tolist() == store.clip_ids.tolist() and again.skipped == []


def test_a_store_of_schema_1_is_refused_and_upgraded_without_computing(dataset, path):
    make(dataset, path)
    expected = contents(path)
    manifest = read_json(path / "manifest.json")
    (path / "manifest.json").write_text(json.dumps(manifest | {"schema": 1, "clips": {}}))
    columns_file(path).unlink()
    message = (
        r"not schema 1\. Run musicgenre prepare again: it rewrites this file, computing nothing"
    )
    with pytest.raises(UserError, match=message):
        Store.open(path)
    assert make(dataset, path).computed == 0
    assert contents(path) == expected


def test_the_numbers_of_a_regression_are_kept(dataset, path):
    clips = tuple(
        dataclasses.replace(clip, labels=(), values=(i / 4, -i))
        for i, clip in enumerate(dataset.clips)
    )
    make(dataclasses.replace(dataset, clips=clips, task="regression"), path)
    store = Store.open(path)
    assert store.values.dtype == np.float32
    assert store.targets(np.array([4, 1])).tolist() == [[1, -4], [0.25, -1]]


def test_unusual_names_and_clips_without_labels_are_restored(dataset, path):
    names = ["", "é ß", "a\nb", "\udcff broken", "日本", "z" * 300]
    labels = [(), ("z", "x"), (), ("y",), (), ("x",)]
    groups = ["b", None, "a", "b", None, ""]
    splits = ["train"] * 5 + ["test"]
    clips = [
        SimpleNamespace(
            clip_id=str(i), path=names[i], labels=labels[i], split=splits[i], group=group
        )
        for i, group in enumerate(groups)
    ]
    rows = np.zeros(6, prepare._ROW)
    shards = [(0, 6, 100, "00" * 32)]
    columns = store_module.make_columns(clips, ("x", "y", "z"), ("test", "train"), rows, shards)
    assert columns["label"].tolist() == [2, 0, 1, 0]
    assert columns["label_bounds"].tolist() == [0, 0, 2, 2, 3, 3, 4]
    assert columns["group"].tolist() == [2, -1, 1, 2, -1, 0]
    assert columns["split"].tolist() == [1, 1, 1, 1, 1, 0]
    make(dataset, path)
    store = Store.open(path)
    store._arrays |= columns
    store.label_names = ("x", "y", "z")
    assert store.paths.tolist() == names and store.groups == groups and store.labels == labels
    store.dataset = store.dataset | {"task": "multi_label"}
    targets = [[0, 1, 0], [0, 0, 0], [1, 0, 1], [1, 0, 1]]
    assert store.targets(np.array([3, 0, 1, 1])).tolist() == targets


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_damaged_columns_are_named_and_rewritten(dataset, path, tmp_path, damage):
    (tmp_path / "c4.wav").write_bytes(b"")
    make(dataset, path)
    before = contents(path)
    for pattern in ("clips-*.safetensors", "skipped-*.jsonl"):
        assert make(dataset, path).computed == 0
        (file,) = path.glob(pattern)
        spoil(file, damage)
        message = rf"{file.name}: this part.*(missing|damaged).*again: it rewrites the file"
        with pytest.raises(UserError, match=message):
            Store.open(path)
    assert make(dataset, path).computed == 0
    assert contents(path) == before


def test_an_open_store_keeps_its_columns_while_a_run_replaces_them(dataset, path):
    make(dataclasses.replace(dataset, clips=dataset.clips[1:]), path)
    first = Store.open(path)
    make(dataset, path)
    assert columns_file(path).name == read_json(path / "manifest.json")["clips"]["file"]
    assert first.clip_ids.tolist() == [f"c{i}" for i in range(1, 6)]
    assert len(Store.open(path)) == 6


def test_many_threads_read_more_shards_than_are_kept_open(dataset, path, tmp_path, monkeypatch):
    of_size(monkeypatch, 1)
    monkeypatch.setattr(store_module, "_OPEN_SHARDS", 2)
    make(dataset, path)
    store = Store.open(path)
    expected = np.stack([np.load(path / f"shards/0000{i}.npy")[0] for i in range(6)])
    orders = [np.random.default_rng(seed).integers(0, 6, 40) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        read = pool.map(lambda order: store.gather(order, np.full(40, 7), 50), orders)
        for order, x in zip(orders, read, strict=True):
            np.testing.assert_array_equal(x, expected[order, 7:57])
    if Path("/proc/self/fd").is_dir():
        files = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        assert sum(name.startswith(str(tmp_path)) and name.endswith(".npy") for name in files) == 2


def test_frames_outside_a_clip_and_lost_bytes_are_never_read(dataset, path):
    make(dataset, path)
    store = Store.open(path)
    for start in (-1, 71):
        message = f"frames {start} to {start + 30} of clips of 100 frames"
        with pytest.raises(ValueError, match=message):
            store.gather(np.array([1]), np.array([start]), 30)
    assert store.gather(np.array([], np.int64)).shape == (0, 100, 20)
    shard = path / "shards/00000.npy"
    os.truncate(shard, shard.stat().st_size - 1)
    store.gather(np.array([4]))
    with pytest.raises(UserError, match=r"00000\.npy: this shard is damaged \(it ends early\)"):
        store.gather(np.array([5]))
    shard.unlink()
    message = r"00000\.npy: this shard of the store cannot be read \(No such file"
    with pytest.raises(UserError, match=message):
        pickle.loads(pickle.dumps(store)).gather(np.array([0]))


@pytest.mark.parametrize("most_mapped", [0, 128], ids=["read", "mapped"])
def test_read_and_mapped_shards_agree_and_one_truncated_in_use_is_named(
    dataset, path, monkeypatch, most_mapped
):
    monkeypatch.setattr(store_module, "_OPEN_SHARDS", most_mapped)
    of_size(monkeypatch, 4)
    make(dataset, path)
    store, copy = Store.open(path), pickle.loads(pickle.dumps(Store.open(path)))
    clips = np.concatenate([np.load(path / f"shards/0000{i}.npy") for i in range(2)])
    indices, starts = np.array([5, 0, 3, 0]), np.array([0, 70, 31, 2])
    expected = [clips[i, start : start + 30] for i, start in zip(indices, starts, strict=True)]
    for opened in (store, copy):
        np.testing.assert_array_equal(opened.gather(indices, starts, 30), expected)
    # Touching a mapped page that the file has lost would end the process.
    os.truncate(path / "shards/00001.npy", 128)
    with pytest.raises(UserError, match=r"00001\.npy: this shard is damaged \(it ends early\)"):
        store.gather(np.array([5]))
    np.testing.assert_array_equal(store.gather(np.array([3])), clips[3:4])
    os.truncate(path / "shards/00000.npy", 0)
    with pytest.raises(UserError, match=r"00000\.npy: this shard is damaged \(it ends early\)"):
        pickle.loads(pickle.dumps(store)).gather(np.array([3]))


def test_a_run_without_verification_checks_sizes_only(dataset, path):
    make(dataset, path)
    spoil(path / "shards/00000.npy", "changed")
    assert make(dataset, path, verify=False).computed == 0
    assert make(dataset, path).computed == 6


def test_an_absent_split_lists_the_others(dataset, path):
    make(dataclasses.replace(dataset, clips=dataset.clips[:5]), path)
    message = r"no clips in the split 'test'. There are: train \(3\), valid \(2\)"
    with pytest.raises(UserError, match=message):
        Store.open(path).indices("test")


def test_tags_become_rows_of_zeros_and_ones(dataset, path):
    tags = [("a",), ("b", "a"), (), ("b",), ("a",), ("a", "b")]
    pairs = zip(dataset.clips, tags, strict=True)
    clips = tuple(dataclasses.replace(clip, labels=labels) for clip, labels in pairs)
    make(dataclasses.replace(dataset, clips=clips, task="multi_label"), path)
    assert Store.open(path).targets(np.arange(4)).tolist() == [[1, 0], [1, 1], [0, 0], [0, 1]]


def test_a_full_disk_is_named_and_the_next_run_resumes(dataset, path, monkeypatch):
    of_size(monkeypatch, 3)
    save, calls = np.save, []

    def full(handle, array, **options):
        calls.append(len(array))
        if len(calls) == 2:
            handle.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(handle, array, **options)

    monkeypatch.setattr(np, "save", full)
    message = r"00001\.npy: cannot be written \(No space left on device\)"
    with pytest.raises(UserError, match=message):
        make(dataset, path)
    assert sorted(os.listdir(path / "shards")) == ["00000.json", "00000.npy"]
    assert make(dataset, path).computed == 3


def test_a_rebuilt_shard_takes_a_new_number(dataset, path, monkeypatch):
    of_size(monkeypatch, 2)
    make(dataset, path)
    (path / "shards/00001.npy").write_bytes(b"damaged")
    assert make(dataset, path).computed == 2
    assert sorted(os.listdir(path / "shards")) == [
        f"0000{n}.{end}" for n in (0, 2, 3) for end in ("json", "npy")
    ]
    with safe_open(columns_file(path), "numpy") as columns:
        assert columns.get_tensor("shard_number").tolist() == [0, 2, 3]
        assert columns.get_tensor("shard").tolist() == [0, 0, 2, 2, 1, 1]


def test_features_are_computed_in_one_thread(dataset, path, monkeypatch):
    seen = []
    process = prepare.Recipe.__call__

    def record(*arguments):
        seen.extend(pool["num_threads"] for pool in threadpool_info())
        return process(*arguments)

    monkeypatch.setattr(prepare.Recipe, "__call__", record)
    with threadpool_limits(2):
        make(dataset, path)
        assert {pool["num_threads"] for pool in threadpool_info()} == {2}
        first, second = prepare.one_thread(), prepare.one_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        # The first of two users has ended; the other still needs the limit.
        assert {pool["num_threads"] for pool in threadpool_info()} == {1}
        second.__exit__(None, None, None)
        assert {pool["num_threads"] for pool in threadpool_info()} == {2}
    assert seen and set(seen) == {1}
