import grain
import numpy as np
import pytest

from musicgenre.config import store_path
from musicgenre.errors import UserError
from musicgenre.store.loader import (
    _MakeBatch,
    chunk_starts,
    eval_batches,
    normalisation,
    train_batches,
)
from musicgenre.store.store import Store


@pytest.fixture
def store(small_config):
    return Store.open(store_path(small_config))


def rows_of(store, batch):
    """The clip of each uncropped row, found by its content."""
    every = store.gather(np.arange(len(store)))
    return [int(np.flatnonzero((every == row).all(axis=(1, 2)))[0]) for row in batch["x"]]


def test_each_epoch_has_every_clip_once_in_another_order(store):
    batches = list(train_batches(store, batch_size=5, steps=24, seed=3))
    seen = [clip for batch in batches for clip in rows_of(store, batch)]
    epochs = [seen[i : i + 24] for i in range(0, 120, 24)]
    train = store.indices("train").tolist()
    assert all(sorted(epoch) == train for epoch in epochs)
    assert epochs[0] != epochs[1]
    for batch in batches:
        np.testing.assert_array_equal(batch["y"], store.targets(np.array(rows_of(store, batch))))


def test_the_seed_decides_and_the_state_resumes(store):
    def batches(seed):
        return train_batches(store, batch_size=4, steps=12, seed=seed, crop_frames=20)

    one, two, other = list(batches(1)), list(batches(1)), list(batches(2))
    assert all((a["x"] == b["x"]).all() for a, b in zip(one, two, strict=True))
    assert any((a["x"] != b["x"]).any() for a, b in zip(one, other, strict=True))
    iterator = batches(1)
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    resumed = batches(1)
    resumed.set_state(state)
    for expected in one[5:]:
        np.testing.assert_array_equal(next(resumed)["x"], expected["x"])


@pytest.mark.parametrize(
    ("seed", "step"), [(3, 0), (3, 31), (3, 32), (0, 5000), (2**33, 2**32 - 5)]
)
@pytest.mark.parametrize("stride", [1, 3])
def test_steps_drawn_together_are_those_drawn_one_by_one(store, seed, step, stride):
    """Each step has the stream of (seed, step, 0) and its part of the shuffled epochs."""
    store.lengths[::2] = 30
    train = store.indices("train")
    make = _MakeBatch(store, train, 7, 20, 20, False, seed, True, 0, 1, stride)
    for number in (step, step + stride, step + 2 * stride, step + 1):
        picks = []
        for position in range(number * 7, (number + 1) * 7):
            epoch, index = divmod(position, len(train))
            picks.append(
                int(np.random.default_rng((seed, 0x5EED, epoch)).permutation(len(train))[index])
            )
        ends = store.lengths[train[picks]].astype(np.int64) - 20 + 1
        batch = make(number)
        assert batch["clip"].tolist() == picks
        np.testing.assert_array_equal(
            batch["start"], np.random.default_rng((seed, number, 0)).integers(0, ends)
        )


def test_a_state_is_that_of_grains_own_reader(store):
    ours = train_batches(store, batch_size=4, steps=6, seed=1, crop_frames=20)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    make = _MakeBatch(store, store.indices("train"), 4, 20, 20, False, 1, False, 0, 1)
    theirs = iter(grain.MapDataset.range(6).map(make).to_iter_dataset(options))
    for _ in range(4):
        next(theirs)
    ours.set_state(theirs.get_state())
    rest = list(ours)
    assert len(rest) == 2 and ours.get_state() == {"next_index": 6}
    for batch, other in zip(rest, theirs, strict=True):
        np.testing.assert_array_equal(batch["x"], other["x"])


def test_crops_stay_inside_the_real_frames(store):
    store.lengths[:] = 30
    full = store.gather(np.arange(len(store)))
    starts = set()
    for batch in train_batches(store, batch_size=8, steps=30, seed=0, crop_frames=20):
        assert batch["x"].shape == (8, 20, 16)
        for row in batch["x"]:
            hits = [s for s in range(45) for clip in full if (clip[s : s + 20] == row).all()]
            assert len(hits) == 1
            starts.add(hits[0])
    assert starts == set(range(11))


@pytest.mark.parametrize("crop_frames", [0, 20])
def test_processes_share_each_batch(store, crop_frames):
    def batches(**share):
        return list(
            train_batches(store, batch_size=6, steps=8, seed=5, crop_frames=crop_frames, **share)
        )

    full = batches()
    halves = [batches(process_index=i, process_count=2) for i in range(2)]
    for batch, left, right in zip(full, *halves, strict=True):
        np.testing.assert_array_equal(batch["x"], np.concatenate([left["x"], right["x"]]))
    with pytest.raises(UserError, match="batch_size=5 does not divide by the 2 processes"):
        train_batches(store, batch_size=5, steps=8, seed=5, process_count=2)


def test_of_resident_clips_the_numbers_and_starts_are_those_that_would_be_read(store):
    store.lengths[::2] = 30
    full = store.gather(store.indices("train"))
    read = list(train_batches(store, batch_size=7, steps=9, seed=5, crop_frames=20))
    named = list(train_batches(store, batch_size=7, steps=9, seed=5, crop_frames=20, resident=True))
    for batch, numbers in zip(read, named, strict=True):
        assert set(numbers) == {"clip", "start", "y", "mask"}
        cut = [
            full[clip, start : start + 20]
            for clip, start in zip(numbers["clip"], numbers["start"], strict=True)
        ]
        np.testing.assert_array_equal(cut, batch["x"])
        np.testing.assert_array_equal(numbers["y"], batch["y"])


def test_a_window_lies_around_its_crop(store):
    store.lengths[::2] = 30
    crops = list(train_batches(store, batch_size=7, steps=9, seed=5, crop_frames=20))
    windows = list(
        train_batches(store, batch_size=7, steps=9, seed=5, crop_frames=20, window_frames=27)
    )
    lengths = set()
    for crop, window in zip(crops, windows, strict=True):
        assert window["x"].shape == (7, 27, 16)
        cut = [
            x[offset : offset + 20] for x, offset in zip(window["x"], window["offset"], strict=True)
        ]
        np.testing.assert_array_equal(cut, crop["x"])
        # All of a window is real here: clips have 30 or 64 frames.
        lengths |= set(window["length"].tolist())
    assert lengths == {27}
    store.lengths[:] = 23
    (short,) = train_batches(store, batch_size=7, steps=1, seed=5, crop_frames=20, window_frames=27)
    assert short["length"].tolist() == [23] * 7 and short["offset"].max() <= 3
    with pytest.raises(
        UserError, match="window_frames=19 is not between the crop's 20 and the store's 64"
    ):
        train_batches(store, batch_size=7, steps=1, seed=5, crop_frames=20, window_frames=19)


def test_worker_processes_give_the_same_batches(store):
    here = list(train_batches(store, batch_size=8, steps=4, seed=1))
    workers = train_batches(store, batch_size=8, steps=4, seed=1, workers=2)
    for batch, other in zip(here, workers, strict=True):
        np.testing.assert_array_equal(batch["x"], other["x"])
    workers.close()


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_sees_every_chunk_once_and_masks_the_rest(store, processes):
    indices = store.indices("valid")
    parts = [
        list(
            eval_batches(
                store,
                indices,
                batch_size=8,
                crop_frames=20,
                chunks=3,
                process_index=i,
                process_count=processes,
            )
        )
        for i in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1
    counts = np.zeros(len(indices))
    for batch in (batch for part in parts for batch in part):
        assert batch["x"].shape == (8 // processes, 20, 16)
        np.add.at(counts, batch["clip"], batch["mask"])
    assert (counts == 3).all()


def test_chunks_reach_from_the_first_frame_to_the_last():
    assert chunk_starts(100, 20, 3).tolist() == [0, 40, 80]
    assert chunk_starts(100, 20, 1).tolist() == [40]
    assert chunk_starts(15, 20, 3).tolist() == [0, 0, 0]


def test_statistics_are_those_of_the_training_split(store):
    x = store.gather(store.indices("train")).astype(np.float64)
    position = normalisation(store, "position", block=5)
    np.testing.assert_allclose(position["mean"], x.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(position["std"], x.std(axis=0), rtol=1e-4)
    band = normalisation(store, "band", block=5)
    np.testing.assert_allclose(band["mean"][0], x.mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(band["std"][0], x.std(axis=(0, 1)), rtol=1e-4)
    everything = normalisation(store, "global")
    np.testing.assert_allclose(everything["std"], np.full((1, 16), x.std()), rtol=1e-4)
    assert (normalisation(store, "none")["std"] == 1).all()
    # Of 24 clips, 5 at even distances: every 4.8th.
    some = normalisation(store, "position", block=2, clips=5)
    np.testing.assert_allclose(some["mean"], x[[0, 4, 9, 14, 19]].mean(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(
        normalisation(store, "position", block=5, clips=24)["std"], position["std"]
    )
    store.lengths[:] = 10
    np.testing.assert_allclose(
        normalisation(store, "band")["mean"][0], x[:, :10].mean(axis=(0, 1)), rtol=1e-5
    )


def test_bad_requests_are_named(store):
    with pytest.raises(UserError, match="crop_frames=65 is not between 1 and the store's 64"):
        train_batches(store, batch_size=4, steps=1, seed=0, crop_frames=65)
    with pytest.raises(UserError, match=r"data\.normalise must be"):
        normalisation(store, "clip")
