import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from musicgenre.config import store_path, to_plain
from musicgenre.errors import UserError
from musicgenre.runs.model import load_model
from musicgenre.store.loader import normalisation, train_batches
from musicgenre.store.store import Store
from musicgenre.training import fit as loop
from musicgenre.training import objectives, parallel
from musicgenre.training.feed import Feed, resident_clips
from musicgenre.training.objectives import supervised
from musicgenre.training.parallel import Parallel
from musicgenre.training.telemetry import Telemetry, read_rows

ROOT = Path(__file__).resolve().parents[2]


def changed(config: ConfigDict, **fields) -> ConfigDict:
    config = ConfigDict(config.to_dict())
    for name, value in fields.items():
        node = config
        *parents, leaf = name.split("__")
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return config


def parameters(workdir):
    return jax.tree.map(np.asarray, load_model(workdir).model)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_run_learns_and_is_complete(small_config, tmp_path):
    config = changed(
        small_config,
        epochs=15,
        optimizer__learning_rate=5e-3,
        optimizer__schedule="constant",
        model__dropout=0.0,
    )
    result = loop.train(config, tmp_path / "run", progress=False)
    assert result.step == 45 and result.metric == "accuracy"
    assert result.last == 1.0
    rows = read_rows(tmp_path / "run")
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    assert losses[-1] < 0.3 * losses[0]
    assert [row["step"] for row in rows if "valid_accuracy" in row] == list(range(3, 46, 3))
    model = load_model(tmp_path / "run")
    assert (model.step, model.label_names, model.task) == (
        45,
        ("low", "middle", "high"),
        "single_label",
    )
    assert model.features.n_mels == 16 and model.config.model.filters == (8, 16)
    (line,) = (tmp_path / "run" / "train_clips.json").read_text().splitlines()
    assert len(json.loads(line)["clip_id"]) == 24
    # Only the training split counts: about -40 dB, plus 12 dB in a third of the clips of a band.
    assert model.model["norm"]["mean"].shape == (1, 16)
    np.testing.assert_allclose(
        np.asarray(model.model["norm"]["mean"])[0, :15].mean(), -36.0, atol=0.5
    )


def test_the_same_call_twice_does_nothing_the_second_time(small_config, tmp_path):
    first = loop.train(small_config, tmp_path / "run", progress=False)
    before = parameters(tmp_path / "run")
    second = loop.train(small_config, tmp_path / "run", progress=False)
    assert (first.step, first.last) == (second.step, second.last)
    assert_same(before, parameters(tmp_path / "run"))


MAIN = """
import os, sys
import jax
from absl import flags, logging
flags.FLAGS.mark_as_parsed(); logging.set_verbosity(logging.ERROR)
import contextlib
import json
from musicgenre.config import from_plain
from musicgenre.runs import workdir
from musicgenre.training import fit as loop
config = from_plain(json.load(open(sys.argv[1])))
die = int(sys.argv[3])
seen = [0]
def watched(place_batch, size):
    def placed(self, batch):
        before, seen[0] = seen[0], seen[0] + size(batch)
        if before < die <= seen[0]:
            os.kill(os.getpid(), int(sys.argv[4]))
        return place_batch(self, batch)
    return placed
loop.Parallel.place_batch = watched(loop.Parallel.place_batch, lambda batch: 1)
loop.Parallel.place_batches = watched(loop.Parallel.place_batches, len)
try:
    loop.train(config, sys.argv[2], progress=False)
except workdir.Interrupted as stop:
    print(stop); sys.exit(128 + stop.signal_number)
"""


def run_main(config, workdir, die=0, number=0):
    path = workdir.parent / "main.json"
    path.write_text(json.dumps(to_plain(config)))
    return subprocess.run(
        [sys.executable, "-c", MAIN, str(path), str(workdir), str(die), str(int(number))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


AUGMENTED = {
    "augment__time_stretch": 0.1,
    "augment__mixup": 0.4,
    "augment__time_masks": 1,
    "data__crop_frames": 60,
}


# A batch is placed while the step before its own runs. With two steps per call, an epoch of three
# is a call of two and one of one.
@pytest.mark.parametrize(
    ("number", "code", "die", "stops", "fields"),
    [
        (
            signal.SIGKILL,
            -9,
            9,
            {3, 6},
            {**AUGMENTED, "data__on_device": "always", "steps_per_call": 2},
        ),
        (
            signal.SIGTERM,
            143,
            9,
            {8},
            {**AUGMENTED, "data__on_device": "always", "steps_per_call": 2},
        ),
        (signal.SIGINT, 130, 8, {7}, {"data__crop_frames": 60, "data__on_device": "never"}),
    ],
    ids=["killed", "terminated", "interrupted"],
)
def test_a_killed_run_ends_up_bit_identical(
    small_config, tmp_path, number, code, die, stops, fields
):
    config = changed(
        small_config, model__batch_norm=True, ema_decay=0.9, optimizer__schedule="cosine", **fields
    )
    loop.train(config, tmp_path / "uninterrupted", progress=False)
    killed = run_main(config, tmp_path / "cut", die=die, number=number)
    assert killed.returncode == code, killed.stderr
    # A signal that can be caught saves the running step; else an epoch's checkpoint is intact.
    steps = [
        int(path.name)
        for path in (tmp_path / "cut" / "checkpoints").iterdir()
        if path.name.isdigit()
    ]
    assert max(steps) in stops
    assert run_main(config, tmp_path / "cut").returncode == 0
    assert_same(parameters(tmp_path / "uninterrupted"), parameters(tmp_path / "cut"))
    uninterrupted, resumed = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(tmp_path / name)]
        for name in ("uninterrupted", "cut")
    )
    assert uninterrupted == resumed


def test_without_augmentation_losses_equal_recorded_ones(small_config, tmp_path):
    """Losses of the version that had no augmentation, resident clips or several steps per call."""
    loop.train(
        changed(small_config, model__batch_norm=True, data__crop_frames=60),
        tmp_path / "run",
        progress=False,
    )
    rows = read_rows(tmp_path / "run")
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    np.testing.assert_allclose(
        losses, [1.791928, 1.420284, 1.178955, 1.657368, 1.387239, 1.816752], rtol=1e-3
    )
    np.testing.assert_allclose(rows[-1]["valid_loss"], 1.160520, rtol=1e-3)


def test_resident_clips_and_steps_per_call_change_nothing(small_config, tmp_path):
    config = changed(
        small_config, model__batch_norm=True, epochs=2, log_every=4, eval_every=2, **AUGMENTED
    )
    runs = {
        "plain": {"data__on_device": "never"},
        "resident": {"data__on_device": "always"},
        "calls": {"data__on_device": "always", "steps_per_call": 3},
    }
    for name, fields in runs.items():
        loop.train(changed(config, **fields), tmp_path / name, progress=False)
    assert_same(parameters(tmp_path / "plain"), parameters(tmp_path / "resident"))
    # The order of operations is the same, but XLA may fuse them differently in the loop.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        parameters(tmp_path / "plain"),
        parameters(tmp_path / "calls"),
    )
    plain, calls = read_rows(tmp_path / "plain"), read_rows(tmp_path / "calls")
    assert [row["step"] for row in plain] == [4, 6, 6]
    for one, other in zip(plain, calls, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"seconds"}:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_only_clips_that_fit_are_put_on_the_device(small_config, monkeypatch):
    store = Store.open(store_path(small_config))
    spread, clips = Parallel.create("jit", jax.devices()[:1]), store.indices("train")
    size = 24 * 64 * 16 * 2  # float16
    monkeypatch.setattr(parallel, "_host_memory", lambda: 4 * size)
    placed = resident_clips(spread, store, clips, "auto")
    assert placed.nbytes == size
    np.testing.assert_array_equal(placed, store.gather(clips))
    monkeypatch.setattr(parallel, "_host_memory", lambda: 4 * size - 1)
    assert resident_clips(spread, store, clips, "auto") is None
    assert resident_clips(spread, store, clips, "always").nbytes == size
    monkeypatch.undo()
    assert resident_clips(spread, store, clips, "never") is None
    assert 2**28 < parallel._host_memory() < 2**50

    def full(self, array):
        raise MemoryError

    monkeypatch.setattr(Parallel, "place_whole", full)
    with pytest.raises(
        UserError, match=r"on_device='always': the 24 training clips .* do not fit.*on_device=never"
    ):
        resident_clips(spread, store, clips, "always")


def test_reading_ahead_does_not_change_the_saved_state(small_config):
    store = Store.open(store_path(small_config))
    spread = Parallel.create("jit", jax.devices()[:1])

    def feed():
        return Feed(
            train_batches(store, batch_size=4, steps=9, seed=1, resident=True), spread, stacked=True
        )

    def clips(batch):
        return np.asarray(batch["clip"]).tolist()

    order = clips(feed().next(9))
    ahead = feed()
    assert clips(ahead.next(2)) == order[:2]
    state = ahead.get_state()
    ahead.prepare(3)
    assert ahead.get_state() == state
    resumed = feed()
    resumed.set_state(state)
    # Taking another number than was prepared starts at the same position.
    assert clips(resumed.next(3)) == clips(ahead.next(3)) == order[2:5]
    ahead.prepare(1)
    assert clips(ahead.next(2)) == order[5:7]


def test_a_trace_covers_the_calls_of_its_steps(small_config, tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    take = Feed.next
    monkeypatch.setattr(Feed, "next", lambda self, count: events.append(count) or take(self, count))
    config = changed(small_config, epochs=1, steps_per_call=2)
    loop.train(config, tmp_path / "run", progress=False, profile_steps=(1, 1))
    assert events == ["start", 2, "stop", 1]


def test_a_run_of_the_previous_version_resumes(small_config, tmp_path):
    small_config.epochs = 1
    loop.train(small_config, tmp_path / "run", progress=False)
    path = tmp_path / "run" / "config.json"
    plain = json.loads(path.read_text())
    del (
        plain["augment"],
        plain["steps_per_call"],
        plain["data"]["on_device"],
        plain["model"]["pooling"],
    )
    path.write_text(json.dumps(plain))
    assert loop.train(small_config, tmp_path / "run", progress=False).step == 3
    config = changed(small_config, augment__gain=1.0)
    with pytest.raises(UserError, match=r"\(there -> now\): augment.gain: 0.0 -> 1.0\. Choose"):
        loop.train(config, tmp_path / "run", progress=False)
    config = changed(small_config, model__pooling="mean")
    with pytest.raises(
        UserError, match=r"\(there -> now\): model.pooling: flatten -> mean\. Choose"
    ):
        loop.train(config, tmp_path / "run", progress=False)


@objectives.register("labels_alone")
class LabelsAlone(supervised.Supervised):
    """A user's objective: one epoch on labels, with a field in config.pretrain."""

    stage = "pretrain"
    obeys = ("pretrain.method", "optimizer")
    ignores = ()
    fields: ClassVar = {"rounds": 1}

    @property
    def stage_steps(self):
        return self.run.epoch_steps * self.run.config.pretrain.get("rounds", 1)

    def summary(self, step):
        return f"labels alone, {step} steps"


def test_a_users_objective_runs_in_the_same_loop(small_config, tmp_path):
    small_config.epochs = 100  # its default
    small_config.pretrain.method = "labels_alone"
    small_config.pretrain.rounds = 2
    result = loop.pretrain(small_config, tmp_path / "run", progress=False)
    assert result.step == 6 and "labels alone, 6 steps" in result.line()
    assert [row["step"] for row in read_rows(tmp_path / "run") if "valid_loss" in row] == [3, 6]
    with pytest.raises(UserError, match="patience=1 has no effect on the objective 'labels_alone'"):
        loop.pretrain(changed(small_config, patience=1), tmp_path / "other", progress=False)
    small_config.pretrain.method = ""
    with pytest.raises(UserError, match=r"config.pretrain.rounds is not a field of the objective"):
        loop.train(small_config, tmp_path / "third", progress=False)


@pytest.mark.parametrize("item", ["model", "train", "data", "meta", "_CHECKPOINT_METADATA"])
def test_a_checkpoint_cut_short_falls_back_to_the_one_before(small_config, tmp_path, item, caplog):
    loop.train(small_config, tmp_path / "run", progress=False)
    expected = parameters(tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "12"
    files = (
        [last / item]
        if (last / item).is_file()
        else [path for path in (last / item).rglob("*") if path.is_file()]
    )
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    loop.train(small_config, tmp_path / "run", progress=False)
    assert_same(expected, parameters(tmp_path / "run"))
    if item != "_CHECKPOINT_METADATA":  # Orbax can do without that one
        assert "checkpoint of step 12 cannot be read" in caplog.text
        assert (tmp_path / "run" / "damaged" / "12").is_dir()


def test_no_readable_checkpoint_is_an_error_that_loses_nothing(small_config, tmp_path):
    loop.train(small_config, tmp_path / "run", progress=False)
    for path in (tmp_path / "run" / "checkpoints").rglob("*"):
        if path.is_file() and "model" in path.parts:
            path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the checkpoints \(.*12\) can be read"):
        loop.train(small_config, tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "damaged" / "12").is_dir()


def test_another_config_in_the_same_workdir_is_refused(small_config, tmp_path):
    loop.train(small_config, tmp_path / "run", progress=False)
    with pytest.raises(UserError, match=r"optimizer.learning_rate: 0.001 -> 0.01"):
        loop.train(
            changed(small_config, optimizer__learning_rate=0.01), tmp_path / "run", progress=False
        )


def test_a_nan_loss_stops_the_run(small_config, tmp_path):
    config = changed(
        small_config,
        optimizer__name="sgd",
        optimizer__learning_rate=1e30,
        optimizer__schedule="constant",
    )
    with pytest.raises(
        UserError, match=r"training loss became (nan|inf) at step \d+.*learning_rate"
    ):
        loop.train(config, tmp_path / "run", progress=False)


def test_a_metric_that_the_split_lacks_is_refused(small_config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        supervised, "validation_measures", lambda *_: {"loss": 1.0, "macro_f1": 0.5}
    )
    with pytest.raises(
        UserError, match=r"select_metric='accuracy' cannot be measured.*use one of loss, macro_f1"
    ):
        loop.train(small_config, tmp_path / "run", progress=False)


def test_patience_stops_early_and_stays_stopped(small_config, tmp_path):
    config = changed(
        small_config, epochs=60, patience=3, select_metric="accuracy", optimizer__learning_rate=3e-3
    )
    result = loop.train(config, tmp_path / "run", progress=False)
    assert result.stopped_early and result.step < 180
    again = loop.train(config, tmp_path / "run", progress=False)
    assert again.step == result.step


def test_the_best_and_the_latest_checkpoint_are_kept(small_config, tmp_path, monkeypatch):
    measured = iter([0.2, 0.9, 0.3, 0.4, 0.5, 0.1])

    def measures(*_):
        return {"loss": 1.0, "accuracy": next(measured)}

    monkeypatch.setattr(supervised, "validation_measures", measures)
    result = loop.train(changed(small_config, epochs=6), tmp_path / "run", progress=False)
    assert (result.best, result.best_step, result.last) == (0.9, 6, 0.1)
    assert sorted(
        int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()
    ) == [6, 15, 18]
    assert load_model(tmp_path / "run", "best").step == 6
    assert load_model(tmp_path / "run", "last").step == 18
    with pytest.raises(
        UserError, match=r"no readable checkpoint '7'. There are the steps 6, 15, 18"
    ):
        load_model(tmp_path / "run", "7")


@pytest.mark.parametrize(
    "fields",
    [
        {
            "optimizer__name": "momentum",
            "optimizer__schedule": "exponential",
            "optimizer__decay_rate": 0.9,
        },
        {
            "optimizer__name": "adamw",
            "optimizer__weight_decay": 0.01,
            "optimizer__schedule": "cosine",
            "optimizer__warmup_steps": 2,
        },
        {
            "optimizer__name": "lamb",
            "optimizer__clip_norm": 1.0,
            "loss__label_smoothing": 0.1,
            "data__normalise_clips": 5,
        },
        {"dtype": "bfloat16", "loss__class_weights": "balanced", "optimizer__accumulate": 2},
    ],
    ids=["momentum", "adamw", "lamb", "bfloat16"],
)
def test_every_option_trains(small_config, tmp_path, fields):
    result = loop.train(changed(small_config, epochs=2, **fields), tmp_path / "run", progress=False)
    assert result.step == 6 and result.last is not None and 0 <= result.last <= 1
    statistics = normalisation(
        Store.open(store_path(small_config)), "band", clips=fields.get("data__normalise_clips", 0)
    )
    assert_same(parameters(tmp_path / "run")["norm"], statistics)


def test_a_full_disk_is_named_and_keeps_earlier_files(small_config, tmp_path):
    """A tiny tmpfs simulates the full disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        config = changed(small_config, model__dense=(4096, 256))
        with pytest.raises(UserError, match=r"(could not|cannot) be written"):
            loop.train(config, disk / "run", progress=False)
        assert json.loads((disk / "run" / "config.json").read_text())["batch_size"] == 8
    finally:
        time.sleep(0.5)
        subprocess.run(["umount", "-l", str(disk)], check=False)
    shutil.rmtree(disk, ignore_errors=True)


def test_a_tensorboard_file_that_cannot_be_finished_hides_no_other_error(
    tmp_path, monkeypatch, caplog
):
    telemetry = Telemetry(tmp_path, 0, 1, progress=False)

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(telemetry._writer, "close", full)
    with pytest.raises(UserError, match="the first"), contextlib.closing(telemetry):
        raise UserError("the first")
    assert "could not be finished" in caplog.text
