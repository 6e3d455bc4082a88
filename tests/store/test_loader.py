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


def batches(store, **options):
    return train_batches(store, **({"batch_size": 7, "steps": 9, "seed": 5} | options))


def rows_of(store, batch):
    """Returns the clip of each full-clip row, found by its content."""
    every = store.gather(np.arange(len(store)))
    return [int(np.flatnonzero((every == row).all(axis=(1, 2)))[0]) for row in batch["x"]]


def test_each_epoch_has_every_clip_once_in_another_order(store):
    made = list(batches(store, batch_size=5, steps=24, seed=3))
    seen = [clip for batch in made for clip in rows_of(store, batch)]
    epochs = [seen[i : i + 24] for i in range(0, 120, 24)]
    train = store.indices("train").tolist()
    assert all(sorted(epoch) == train for epoch in epochs)
    assert epochs[0] != epochs[1]
    for batch in made:
        np.testing.assert_array_equal(batch["y"], store.targets(np.array(rows_of(store, batch))))


def test_the_seed_decides_and_the_state_resumes(store):
    def run(seed):
        return batches(store, batch_size=4, steps=12, seed=seed, crop_frames=20)

    one, two, other = list(run(1)), list(run(1)), list(run(2))
    assert all((a["x"] == b["x"]).all() for a, b in zip(one, two, strict=True))
    assert any((a["x"] != b["x"]).any() for a, b in zip(one, other, strict=True))
    iterator, resumed = run(1), run(1)
    for _ in range(5):
        next(iterator)
    resumed.set_state(iterator.get_state())
    for expected in one[5:]:
        np.testing.assert_array_equal(next(resumed)["x"], expected["x"])


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize(
    ("seed", "step"), [(3, 0), (3, 31), (3, 32), (0, 5000), (2**33, 2**32 - 5)]
)
def test_steps_drawn_together_equal_those_drawn_one_by_one(store, seed, step, stride):
    """Each step has the stream of (seed, step, 0) and its part of the shuffled epochs."""
    store.lengths[::2] = 30
    train = store.indices("train")
    make = _MakeBatch(store, train, 7, 20, seed, resident=True, stride=stride)
    for number in (step, step + stride, step + 2 * stride, step + 1):
        positions = []
        for row in range(number * 7, (number + 1) * 7):
            epoch, position = divmod(row, len(train))
            order = np.random.default_rng((seed, 0x5EED, epoch)).permutation(len(train))
            positions.append(int(order[position]))
        ends = store.lengths[train[positions]].astype(np.int64) - 20 + 1
        starts = np.random.default_rng((seed, number, 0)).integers(0, ends)
        batch = make(number)
        assert batch["clip"].tolist() == positions
        np.testing.assert_array_equal(batch["start"], starts)


def test_a_state_equals_that_of_grains_own_reader(store):
    ours = batches(store, batch_size=4, steps=6, seed=1, crop_frames=20)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    make = _MakeBatch(store, store.indices("train"), 4, 20, 1)
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
    clips = store.gather(np.arange(len(store)))
    starts = set()
    for batch in batches(store, batch_size=8, steps=30, seed=0, crop_frames=20):
        assert batch["x"].shape == (8, 20, 16)
        for row in batch["x"]:
            hits = [s for s in range(45) for clip in clips if (clip[s : s + 20] == row).all()]
            assert len(hits) == 1
            starts.add(hits[0])
    assert starts == set(range(11))


@pytest.mark.parametrize("crop_frames", [0, 20])
def test_processes_divide_each_batch(store, crop_frames):
    options = {"batch_size": 6, "crop_frames": crop_frames}
    halves = [batches(store, process_index=i, process_count=2, **options) for i in range(2)]
    for batch, left, right in zip(batches(store, **options), *halves, strict=True):
        np.testing.assert_array_equal(batch["x"], np.concatenate([left["x"], right["x"]]))


def test_positions_and_starts_of_resident_clips_point_to_the_crops(store):
    store.lengths[::2] = 30
    clips = store.gather(store.indices("train"))
    resident = batches(store, crop_frames=20, resident=True)
    for batch, numbers in zip(batches(store, crop_frames=20), resident, strict=True):
        assert set(numbers) == {"clip", "start", "y", "mask"}
        pairs = zip(numbers["clip"], numbers["start"], strict=True)
        crops = [clips[clip, start : start + 20] for clip, start in pairs]
        np.testing.assert_array_equal(crops, batch["x"])
        np.testing.assert_array_equal(numbers["y"], batch["y"])


def test_a_window_surrounds_its_crop(store):
    store.lengths[::2] = 30
    options = {"crop_frames": 20, "window_frames": 27}
    for crop, window in zip(batches(store, crop_frames=20), batches(store, **options), strict=True):
        assert window["x"].shape == (7, 27, 16)
        pairs = zip(window["x"], window["offset"], strict=True)
        crops = [x[offset : offset + 20] for x, offset in pairs]
        np.testing.assert_array_equal(crops, crop["x"])
        # All of a window is real here: clips have 30 or 64 frames.
        assert (window["length"] == 27).all()
    store.lengths[:] = 23
    (short,) = batches(store, steps=1, **options)
    assert short["length"].tolist() == [23] * 7 and short["offset"].max() <= 3


def test_worker_processes_give_the_same_batches(store):
    workers = batches(store, steps=4, workers=2)
    for batch, other in zip(batches(store, steps=4), workers, strict=True):
        np.testing.assert_array_equal(batch["x"], other["x"])
    workers.close()


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_covers_every_window_once_and_masks_the_rest(store, processes):
    indices = store.indices("valid")
    options = {"batch_size": 8, "crop_frames": 20, "chunks": 3, "process_count": processes}
    parts = [
        list(eval_batches(store, indices, process_index=i, **options)) for i in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1
    counts = np.zeros(len(indices))
    for batch in (batch for part in parts for batch in part):
        assert batch["x"].shape == (8 // processes, 20, 16)
        np.add.at(counts, batch["clip"], batch["mask"])
    assert (counts == 3).all()


def test_windows_extend_from_the_first_frame_to_the_last():
    assert chunk_starts(100, 20, 3).tolist() == [0, 40, 80]
    assert chunk_starts(100, 20, 1).tolist() == [40]
    assert chunk_starts(15, 20, 3).tolist() == [0, 0, 0]


def test_statistics_equal_those_of_the_training_split(store):
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
    every = normalisation(store, "position", block=5, clips=24)
    np.testing.assert_array_equal(every["std"], position["std"])
    store.lengths[:] = 10
    band = normalisation(store, "band")
    np.testing.assert_allclose(band["mean"][0], x[:, :10].mean(axis=(0, 1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_frames": 65}, "crop_frames=65 is not between 1 and the store's 64"),
        ({"batch_size": 5, "process_count": 2}, "batch_size=5 is not a multiple of 2 processes"),
    ],
)
def test_bad_requests_are_named(store, options, message):
    with pytest.raises(UserError, match=message):
        batches(store, **options)
