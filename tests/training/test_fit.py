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
from musicgenre.runs.workdir import Interrupted
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
    """Every batch has all clips, so the training loss falls."""
    config = changed(
        small_config, batch_size=24, log_every=1, optimizer__schedule="constant", model__dropout=0.0
    )
    result = loop.train(config, tmp_path / "run", progress=False)
    assert result.step == 4 and result.metric == "accuracy"
    rows = read_rows(tmp_path / "run")
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    measures = [row["valid_accuracy"] for row in rows if "valid_accuracy" in row]
    assert [row["step"] for row in rows if "valid_accuracy" in row] == [1, 2, 3, 4]
    assert result.last == measures[-1] and result.best == max(measures)
    model = load_model(tmp_path / "run")
    assert (model.step, model.task) == (4, "single_label")
    assert model.label_names == ("low", "middle", "high")
    assert model.features.n_mels == 16 and model.config.model.filters == (8, 16)
    (line,) = (tmp_path / "run" / "train_clips.json").read_text().splitlines()
    assert len(json.loads(line)["clip_id"]) == 24
    # The normalisation is the training split's alone: -40 dB, and 12 dB more in a third of bands.
    assert model.model["norm"]["mean"].shape == (1, 16)
    np.testing.assert_allclose(
        np.asarray(model.model["norm"]["mean"])[0, :15].mean(), -36.0, atol=0.5
    )
    # The same call does nothing the second time.
    before = parameters(tmp_path / "run")
    again = loop.train(config, tmp_path / "run", progress=False)
    assert again == result
    assert_same(before, parameters(tmp_path / "run"))


AUGMENTED = {
    "augment__time_stretch": 0.1,
    "augment__mixup": 0.4,
    "augment__time_masks": 1,
    "data__crop_frames": 60,
}
# Kills its process, as no handler could, when it has placed nine batches.
KILLED = """
import json, os, signal, sys
from absl import flags
flags.FLAGS.mark_as_parsed()
from musicgenre.config import from_plain
from musicgenre.training import fit
place_batches, placed = fit.Parallel.place_batches, []
def place_or_die(self, batches):
    placed.extend(batches)
    if len(placed) >= 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return place_batches(self, batches)
fit.Parallel.place_batches = place_or_die
fit.train(from_plain(json.load(open(sys.argv[1]))), sys.argv[2], progress=False)
"""


def saved_steps(workdir):
    return [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]


def rows_of(workdir):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(workdir)]


def stop_at(monkeypatch, name, count, number):
    """Sends this process a signal when it places its batch number `count`."""
    original, placed = getattr(Parallel, name), []

    def place_or_stop(self, batch, *options, **axis):
        before = len(placed)
        placed.extend([batch] if isinstance(batch, dict) else batch)
        if before < count <= len(placed):
            os.kill(os.getpid(), number)
        return original(self, batch, *options, **axis)

    monkeypatch.setattr(Parallel, name, place_or_stop)


def test_a_stopped_run_ends_up_bit_identical(small_config, tmp_path, monkeypatch):
    """Killed or stopped by a signal; with the clips on the device, or read by each step."""
    # A batch is placed while the step before its own runs. With two steps per call, an epoch of
    # three is a call of two and one of one.
    config = changed(
        small_config,
        model__batch_norm=True,
        ema_decay=0.9,
        optimizer__schedule="cosine",
        steps_per_call=2,
        data__on_device="always",
        **AUGMENTED,
    )
    uninterrupted = tmp_path / "uninterrupted"
    loop.train(config, uninterrupted, progress=False)
    (tmp_path / "config.json").write_text(json.dumps(to_plain(config)))
    command = [sys.executable, "-c", KILLED, tmp_path / "config.json", tmp_path / "killed"]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # An epoch's checkpoint is intact.
    assert max(saved_steps(tmp_path / "killed")) in {3, 6}
    # A signal that can be caught saves the running step.
    stop_at(monkeypatch, "place_batches", 9, signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 8;"):
        loop.train(config, tmp_path / "terminated", progress=False)
    monkeypatch.undo()
    for name in ("killed", "terminated"):
        loop.train(config, tmp_path / name, progress=False)
        assert_same(parameters(uninterrupted), parameters(tmp_path / name))
        assert rows_of(uninterrupted) == rows_of(tmp_path / name)

    config = changed(config, steps_per_call=1, epochs=2)
    loop.train(config, tmp_path / "resident", progress=False)
    config.data.on_device = "never"
    stop_at(monkeypatch, "place_batch", 6, signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped by SIGINT after step 5;"):
        loop.train(config, tmp_path / "interrupted", progress=False)
    monkeypatch.undo()
    loop.train(config, tmp_path / "interrupted", progress=False)
    assert_same(parameters(tmp_path / "resident"), parameters(tmp_path / "interrupted"))
    assert rows_of(tmp_path / "resident") == rows_of(tmp_path / "interrupted")


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


def test_several_steps_per_call_give_the_same_result(small_config, tmp_path):
    config = changed(small_config, model__batch_norm=True, epochs=2, log_every=4, eval_every=2)
    loop.train(config, tmp_path / "plain", progress=False)
    loop.train(changed(config, steps_per_call=3), tmp_path / "calls", progress=False)

    def close(one, other):
        # The order of operations is the same, but XLA may fuse them differently in the loop.
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)

    jax.tree.map(close, parameters(tmp_path / "plain"), parameters(tmp_path / "calls"))
    plain, calls = rows_of(tmp_path / "plain"), rows_of(tmp_path / "calls")
    assert [row["step"] for row in plain] == [4, 6, 6]
    jax.tree.map(close, plain, calls)


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


def test_a_damaged_checkpoint_falls_back_to_the_one_before(small_config, tmp_path, caplog):
    small_config.epochs = 2
    run = tmp_path / "run"
    loop.train(small_config, run, progress=False)
    expected = parameters(run)
    # Orbax can do without the last one.
    for item in ("model", "train", "data", "meta", "_CHECKPOINT_METADATA"):
        caplog.clear()
        last = run / "checkpoints" / "6" / item
        for path in [last] if last.is_file() else last.rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        loop.train(small_config, run, progress=False)
        assert_same(expected, parameters(run))
        if item != "_CHECKPOINT_METADATA":
            assert "checkpoint of step 6 cannot be read" in caplog.text
            assert (run / "damaged" / "6").is_dir()
            shutil.rmtree(run / "damaged")

    for path in (run / "checkpoints").rglob("*"):
        if path.is_file() and "model" in path.parts:
            path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the checkpoints \(.*6\) can be read"):
        loop.train(small_config, run, progress=False)
    assert (run / "damaged" / "6").is_dir()


def test_another_config_in_the_same_workdir_is_refused(small_config, tmp_path):
    small_config.epochs = 1
    loop.train(small_config, tmp_path / "run", progress=False)
    config = changed(small_config, optimizer__learning_rate=0.01)
    with pytest.raises(UserError, match=r"optimizer.learning_rate: 0.001 -> 0.01"):
        loop.train(config, tmp_path / "run", progress=False)


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


def test_patience_stops_early_and_stays_stopped(small_config, tmp_path, monkeypatch):
    measures = {"loss": 1.0, "accuracy": 0.5}
    monkeypatch.setattr(supervised, "validation_measures", lambda *_: measures)
    config = changed(small_config, epochs=60, patience=2)
    result = loop.train(config, tmp_path / "run", progress=False)
    assert result.stopped_early and result.step == 9
    assert loop.train(config, tmp_path / "run", progress=False) == result


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
    result = loop.train(changed(small_config, epochs=1, **fields), tmp_path / "run", progress=False)
    assert result.step == 3 and result.last is not None and 0 <= result.last <= 1
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
    telemetry = Telemetry(tmp_path, range(1), progress=False)

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(telemetry._writer, "close", full)
    with pytest.raises(UserError, match="the first"), contextlib.closing(telemetry):
        raise UserError("the first")
    assert "TensorBoard's file is incomplete" in caplog.text
