import dataclasses
import errno
import json
import os
import pickle

import numpy as np
import pytest
import soundfile
from threadpoolctl import threadpool_info, threadpool_limits

from musicgenre.audio.decode import load_audio
from musicgenre.audio.features import FeatureSpec, compute_features
from musicgenre.datasets.base import Clip, Dataset, Skipped, make_dataset
from musicgenre.errors import UserError
from musicgenre.pipeline import prepare
from musicgenre.pipeline.prepare import prepare_store
from musicgenre.pipeline.store import ClipLayout, Store

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
        Clip(f"c{i}", sound(tmp_path / f"c{i}.wav", seconds, i), ("ab"[i % 2],), split, "same" if i < 2 else None)
        for i, (seconds, split) in enumerate(zip(lengths, splits, strict=True))
    ]
    return make_dataset(Dataset("test", tmp_path, "given", "single_label", ("a", "b"), tuple(clips)))


def make(dataset, path, **options):
    return prepare_store(
        dataset, options.pop("spec", SPEC), options.pop("layout", LAYOUT), path, workers=1, progress=False, **options
    )


def snapshot(folder):
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_store_holds_the_features_and_what_is_known(dataset, tmp_path):
    summary = make(dataset, tmp_path / "store")
    assert (summary.clips, summary.computed, summary.reused, summary.splits) == (6, 6, 0, {"test": 1, "train": 3, "valid": 2})
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
    process = prepare.process_clip

    def stops(clip, *rest):
        if clip.clip_id == "c3":
            raise KeyboardInterrupt
        return process(clip, *rest)

    monkeypatch.setattr(prepare, "process_clip", stops)
    with pytest.raises(KeyboardInterrupt):
        make(dataset, tmp_path / "store")
    with pytest.raises(UserError, match=r"no finished spectrogram store.*prepare\.py"):
        Store.open(tmp_path / "store")
    monkeypatch.setattr(prepare, "process_clip", process)
    assert make(dataset, tmp_path / "store").computed == 4


def test_two_processes_give_the_same_bytes_as_one(tmp_path):
    clips = [Clip(f"c{i:02d}", sound(tmp_path / f"c{i:02d}.wav", 1.5, i), ("ab"[i % 2],), "train") for i in range(9)]
    dataset = make_dataset(Dataset("test", tmp_path, "given", "single_label", ("a", "b"), tuple(clips)))
    make(dataset, tmp_path / "one")
    prepare_store(dataset, SPEC, LAYOUT, tmp_path / "two", workers=2, progress=False)
    assert {k: v[1] for k, v in snapshot(tmp_path / "one").items()} == {k: v[1] for k, v in snapshot(tmp_path / "two").items()}


def test_skipped_clips_are_listed_with_their_reason_and_not_tried_again(dataset, tmp_path):
    (tmp_path / "c0.wav").write_bytes(b"")
    (tmp_path / "c4.wav").write_bytes(b"no sound at all")
    dataset = dataclasses.replace(dataset, skipped=(Skipped("gone", "gone.wav", "not on disk"),))
    summary = make(dataset, tmp_path / "store")
    assert [entry["clip_id"] for entry in summary.skipped] == ["gone", "c0", "c4"]
    assert "empty file" in summary.skipped[1]["reason"] and "not a sound file" in summary.skipped[2]["reason"]
    assert "3 skipped" in summary.lines()[0] and "skipped c0: " in summary.lines()[2]
    assert Store.open(tmp_path / "store").skipped == summary.skipped
    assert make(dataset, tmp_path / "store").computed == 0
    sound(tmp_path / "c0.wav", 2.0, 5)
    assert make(dataset, tmp_path / "store").clips == 5


def test_a_split_without_a_usable_clip_is_an_error(dataset, tmp_path):
    (tmp_path / "c5.wav").write_bytes(b"")
    with pytest.raises(UserError, match=r"no clip of the split 'test' could be used.*c5\.wav: empty file"):
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
    with pytest.raises(UserError, match=r"00001\.npy: this shard.*(missing|damaged).*prepare\.py again"):
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
    copy = pickle.dumps(store)
    assert len(copy) < 4000
    np.testing.assert_array_equal(pickle.loads(copy).gather(np.array([3])), first)


def test_an_absent_split_lists_those_that_are_there(dataset, tmp_path):
    make(dataclasses.replace(dataset, clips=dataset.clips[:5]), tmp_path / "store")
    with pytest.raises(UserError, match=r"no clips in the split 'test'. There are: train \(3\), valid \(2\)"):
        Store.open(tmp_path / "store").indices("test")


def test_tags_become_rows_of_zeros_and_ones(dataset, tmp_path):
    clips = tuple(
        dataclasses.replace(clip, labels=labels)
        for clip, labels in zip(dataset.clips, [("a",), ("b", "a"), (), ("b",), ("a",), ("a", "b")], strict=True)
    )
    make(make_dataset(dataclasses.replace(dataset, clips=clips, task="multi_label")), tmp_path / "store")
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
    with pytest.raises(UserError, match=r"00001\.npy: cannot be written \(No space left on device\)"):
        make(dataset, tmp_path / "store")
    assert sorted(os.listdir(tmp_path / "store" / "shards")) == ["00000.json", "00000.npy"]
    assert make(dataset, tmp_path / "store").computed == 3


def test_a_rebuilt_shard_takes_a_new_number(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CLIPS_PER_SHARD", 2)
    make(dataset, tmp_path / "store")
    (tmp_path / "store/shards/00001.npy").write_bytes(b"damaged")
    assert make(dataset, tmp_path / "store").computed == 2
    assert sorted(os.listdir(tmp_path / "store/shards")) == [f"0000{n}.{end}" for n in (0, 2, 3) for end in ("json", "npy")]
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    assert [shard["file"] for shard in manifest["shards"]] == ["00000.npy", "00002.npy", "00003.npy"]
    assert manifest["clips"]["shard"] == [0, 0, 2, 2, 1, 1]


def test_the_number_of_threads_does_not_decide_the_bytes(dataset, tmp_path, monkeypatch):
    seen = []
    process = prepare.process_clip

    def looks(*arguments):
        seen.extend(pool["num_threads"] for pool in threadpool_info())
        return process(*arguments)

    monkeypatch.setattr(prepare, "process_clip", looks)
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
