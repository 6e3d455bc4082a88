import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from musicgenre.config import base_config, to_plain
from musicgenre.errors import UserError
from musicgenre.runs.model import load_model
from musicgenre.training import fit as loop
from musicgenre.training import hosts
from musicgenre.training.parallel import Parallel
from musicgenre.training.telemetry import read_rows

ROOT = Path(__file__).resolve().parents[2]

# Devices are forced before jax starts, so the runs have their own process. A plain SGD step shows a
# wrong gradient; dropout is off because under pmap each device draws its own mask.
MAIN = """
import sys, json
import jax
from absl import flags, logging
flags.FLAGS.mark_as_parsed(); logging.set_verbosity(logging.ERROR)
path, process, port = sys.argv[1:]
if port != "0":
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
from musicgenre.config import from_plain
from musicgenre.runs import workdir
from musicgenre.training import fit as loop
from musicgenre.training import parallel
received = workdir._Signals.received
for run in json.load(open(path)):
    devices = jax.devices()[: run["devices"]]
    parallel.SHARD_FROM = 64
    workdir._Signals.received = received
    if run["stop"]:
        workdir._Signals.received = lambda self, step: 15 if step == run["stop"] else None
    config = from_plain(run["config"])
    function = loop.pretrain if config.pretrain.method else loop.train
    try:
        function(config, run["workdir"], parallel=run["kind"], progress=False, devices=devices)
    except workdir.Interrupted:
        assert run["stop"]
"""

# The memory of a sharded state on one of eight devices, and the collectives of its step.
MEMORY = """
import flax.linen as nn, jax.numpy as jnp, numpy as np, optax
from musicgenre import models
from musicgenre.training.state import create_state
from musicgenre.training.step import make_train_step
parallel.SHARD_FROM = 65_536

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(64, (3, 3), strides=2, name="first")(x[..., None]))
        return nn.Dense(3, name="head")(nn.relu(nn.Conv(512, (3, 3), name="big")(x)).mean((1, 2)))

optimizer = optax.adam(1e-3, eps=1e-4)
norm = {"mean": np.zeros((1, 8)), "std": np.ones((1, 8))}
generator = np.random.default_rng(0)
x = generator.standard_normal((8, 12, 8), np.float32)
batch = {"x": x, "y": np.arange(8, dtype=np.int32) % 3, "mask": np.ones(8, np.float32)}
found, params = {}, []
for kind in ("jit", "fsdp"):
    spread = parallel.Parallel.create(kind)
    step = make_train_step(
        Net(), optimizer, seed=0, class_weights=jnp.ones(3), ema_decay=0.9, gather=spread.gather
    )
    create = lambda: create_state(Net(), optimizer, norm, seed=0, frames=12, bands=8, ema=True)
    state, full = spread.create_state(create), create()
    leaves, shardings = jax.tree.leaves(state), jax.tree.leaves(spread.state_shardings(full))
    same = [np.array_equal(*pair) for pair in zip(leaves, jax.tree.leaves(full), strict=True)]
    placed_well = [leaf.sharding == where for leaf, where in zip(leaves, shardings, strict=True)]
    placed = spread.place_batch(batch)
    compiled = spread.train_step(step).lower(state, placed).compile()
    for _ in range(3):
        state, _ = compiled(state, placed)
    first = jax.devices()[0]
    shards = [shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]
    found[kind] = {
        "bytes": sum(shard.data.nbytes for shard in shards if shard.device == first),
        "gathers": compiled.as_text().count(" all-gather("),
        "created": all(same) and all(placed_well),
    }
    if kind == "fsdp":
        making = jax.jit(create, out_shardings=spread.state_shardings(full))
        made = making.lower().compile().memory_analysis()
        found["making"] = made.temp_size_in_bytes + made.output_size_in_bytes
    params.append(jax.tree.map(np.asarray, (state.params, state.ema)))
pairs = zip(*map(jax.tree.leaves, params), strict=True)
found["apart"] = max(float(abs(one - other).max()) for one, other in pairs)

module = models.build({"name": "fcn"}, num_classes=50, frames=1366, bands=96)
fcn = jax.eval_shape(
    lambda: create_state(module, optimizer, norm, seed=0, frames=1366, bands=96, ema=False)
)
shard_size = lambda leaf, sharding: np.prod(sharding.shard_shape(leaf.shape))
sizes = jax.tree.map(shard_size, fcn, spread.state_shardings(fcn))
found["fcn"] = [sum(leaf.size for leaf in jax.tree.leaves(fcn)), int(sum(jax.tree.leaves(sizes)))]
print(json.dumps(found))
"""

# Several devices learn the same from teachers, whose predictions are mixed with those of a
# neighbour that may be on another device.
TEACHERS = """
from musicgenre.training.augment import Augmentation

class Small(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(jnp.abs(x).mean(axis=1))
        return nn.Dense(3, name="head")(x)

norm = {"mean": np.full((1, 8), -40.0, np.float32), "std": np.full((1, 8), 10.0, np.float32)}
batch = {
    "x": -40 + 10 * generator.standard_normal((8, 40, 8), np.float32),
    "y": np.arange(8, dtype=np.int32) % 3,
    "mask": np.ones(8, np.float32),
    "teacher": generator.dirichlet(np.ones(3), 8).astype(np.float32),
}
learnt = []
for kind, devices in (("jit", 1), ("pmap", 2)):
    spread = parallel.Parallel.create(kind, jax.devices()[:devices])
    step = make_train_step(
        Small(), optax.sgd(0.1), seed=0, class_weights=jnp.ones(3), teachers_weight=0.8,
        augmentation=Augmentation(40, mixup=0.7), axis_name=spread.axis_name,
    )
    create = lambda: create_state(
        Small(), optax.sgd(0.1), norm, seed=0, frames=40, bands=8, ema=False
    )
    state, metrics = spread.train_step(step)(spread.create_state(create), spread.place_batch(batch))
    values = (metrics["loss"], state.params, state.collections)
    learnt.append(jax.tree.map(np.asarray, values))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), *learnt)
print("equal")
"""


def environment(forced):
    return {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={forced}",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }


def start(runs, tmp_path, process=0, port=0, forced=8, then=""):
    """Starts a process for runs of (config, workdir, kind, devices, step to stop after or 0)."""
    path = tmp_path / "runs.json"
    names = ("config", "workdir", "kind", "devices", "stop")
    plain = [
        dict(zip(names, (to_plain(config), str(workdir), *rest), strict=True))
        for config, workdir, *rest in runs
    ]
    path.write_text(json.dumps(plain))
    command = [sys.executable, "-c", MAIN + then, str(path), str(process), str(port)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(forced),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, timeout=300):
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def config(small_config):
    """Crops and augmentation are on: what a clip undergoes must not depend on its device.

    Two chunks of each of the 9 validation clips are 18 rows, which no number of devices divides.
    """
    small_config.model.batch_norm = True
    small_config.model.dropout = 0.0
    small_config.optimizer.name = "momentum"
    small_config.optimizer.learning_rate = 0.01
    small_config.epochs = small_config.eval_every = 2
    small_config.data.crop_frames = 60
    small_config.data.eval_chunks = 2
    small_config.augment.update({"time_stretch": 0.1, "gain": 3.0, "mixup": 0.4, "time_masks": 1})
    return small_config


def fed(config, on_device, steps_per_call=1, **changes):
    config = ConfigDict(config.to_dict())
    config.data.on_device, config.steps_per_call = on_device, steps_per_call
    config.update_from_flattened_dict(changes)
    return config


def learnt(workdir):
    """Parameters and batch statistics at the end of a run."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_model(workdir).model)]


def assert_close(one, other, atol=1e-6):
    """What was learnt is the same, and so is what was measured of it on the validation clips."""
    for left, right in zip(learnt(one), learnt(other), strict=True):
        np.testing.assert_allclose(left, right, atol=atol, rtol=1e-5)
    rows = [
        [row for row in read_rows(path) if any(name.startswith("valid_") for name in row)]
        for path in (one, other)
    ]
    assert len(rows[0]) == len(rows[1]) > 0
    for left, right in zip(*rows, strict=True):
        assert {**left, "seconds": 0} == pytest.approx({**right, "seconds": 0}, abs=10 * atol)


def test_many_devices_give_the_single_devices_result(config, tmp_path):
    # With averaged parameters and a batch in parts; 24 clips are 2 steps an epoch.
    config.update_from_flattened_dict(
        {"batch_size": 16, "optimizer.accumulate": 2, "ema_decay": 0.9}
    )
    runs = [
        ("one", fed(config, "always"), "jit", 1, 0),
        ("four", fed(config, "never"), "jit", 4, 0),
        ("jit", fed(config, "always", 2), "jit", 8, 0),
        ("pmap", fed(config, "always", 2), "pmap", 8, 0),
        # One run, sharded over eight devices, then on one, then on eight again.
        ("moved", fed(config, "always"), "fsdp", 8, 1),
        ("moved", fed(config, "always"), "jit", 1, 2),
        ("moved", fed(config, "always"), "fsdp", 8, 0),
    ]
    # Without labels: views are compared across devices, machines are sharded.
    config.optimizer.accumulate, config.data.eval_chunks, config.augment.mixup = 1, 1, 0.0
    simclr = {
        "pretrain.method": "simclr",
        "pretrain.epochs": 2,
        "pretrain.projection": 16,
        "augment.time_stretch": 0.0,
        "augment.time_masks": 0,
        "batch_size": 12,
    }
    divergence = {
        "model": ConfigDict({"name": "rbm", "module": "", "layers": (32, 16)}),
        "pretrain.method": "contrastive_divergence",
        "pretrain.epochs": 2,
        "data.crop_frames": 8,
    }
    for name, on_device, steps, kind, devices in (
        ("one", "always", 1, "jit", 1),
        ("two", "never", 1, "jit", 2),
        ("fsdp", "always", 2, "fsdp", 2),
    ):
        for method, fields in (("simclr", simclr), ("rbm", divergence)):
            settings = fed(config, on_device, steps, **fields)
            if method == "rbm":
                settings.ema_decay, settings.augment = 0.0, base_config().augment
            runs.append((f"{method}-{name}", settings, kind, devices, 0))
    runs.append(("rbm-pmap", settings, "pmap", 2, 0))
    output = finish(
        start(
            [(settings, tmp_path / name, *rest) for name, settings, *rest in runs],
            tmp_path,
            then=MEMORY + TEACHERS,
        )
    )
    assert output.splitlines()[-1] == "equal"
    for name in ("simclr-two", "simclr-fsdp", "rbm-two", "rbm-fsdp"):
        assert_close(tmp_path / f"{name.split('-')[0]}-one", tmp_path / name, atol=2e-5)
    # Under pmap each device draws its own chains.
    assert load_model(tmp_path / "rbm-pmap").step == 8
    for name in ("four", "jit", "pmap", "moved"):
        assert_close(tmp_path / "one", tmp_path / name)

    found = json.loads(output.splitlines()[-2])
    # The big kernel has 3 x 3 x 64 x 512 numbers, everything else 640 + 512 + 1,539. Parameters,
    # average and Adam's two moments each have these; then norm's 16, and the counters of steps.
    big, small = 294_912, 2_691
    assert found["jit"] == {
        "bytes": 4 * (4 * (big + small) + 16 + 2),
        "gathers": 0,
        "created": True,
    }
    assert found["fsdp"] == {
        "bytes": 4 * (4 * (big // 8 + small) + 16 + 2),
        "gathers": 1,
        "created": True,
    }
    # While it makes its shards, a device needs fewer bytes than one copy of the big kernel.
    assert found["making"] < 4 * big
    assert found["apart"] < 1e-6
    # FCN-4: 17.4 M parameters, three times with Adam; its small arrays are a thousandth of it.
    full, part = found["fcn"]
    assert full > 52_000_000 and 1 < 8 * part / full < 1.01


def test_two_processes_give_the_single_processs_result(config, tmp_path):
    loop.train(fed(config, "never"), tmp_path / "one", progress=False, devices=jax.devices()[:1])
    port = free_port()
    # The second run is stopped after two steps, and resumes in one process.
    runs = [
        (fed(config, "auto"), tmp_path / "two", "jit", 2, 0),
        (fed(config, "auto"), tmp_path / "moved", "jit", 2, 2),
    ]
    both = [start(runs, tmp_path, process, port, forced=1) for process in range(2)]
    try:
        for process in both:
            finish(process)
    finally:
        for process in both:
            process.kill()
    assert_close(tmp_path / "one", tmp_path / "two")
    assert not (tmp_path / "moved" / "checkpoints" / "3").exists()
    loop.train(fed(config, "auto"), tmp_path / "moved", progress=False, devices=jax.devices()[:1])
    assert_close(tmp_path / "one", tmp_path / "moved")


# A user's module, which the config names: it shards arrays from 64 numbers, and lets process 1 die
# as if its machine had gone, in the second step after the first checkpoint.
DYING = """
import os, pathlib, signal, sys, time
import jax
from musicgenre.models.conv1d import Conv1D
from musicgenre.models.registry import register
from musicgenre.training import feed, parallel

@register("dying")
class Dying(Conv1D):
    pass

next_batches = feed.Feed.next

def next_or_die(self, count=1):
    next_or_die.calls += 1
    if next_or_die.calls == 8 and jax.process_index() == 1:
        while not pathlib.Path("run/checkpoints/6").is_dir():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    return next_batches(self, count)

next_or_die.calls = 0
if "FATE" in os.environ:
    parallel.SHARD_FROM = 64
if os.environ.get("FATE") == "die":
    feed.Feed.next = next_or_die
"""


def test_a_killed_process_ends_the_other_and_the_same_command_goes_on(
    config, tmp_path, monkeypatch
):
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.syspath_prepend(tmp_path)
    settings = fed(config, "auto", **{"epochs": 4, "model.name": "dying", "model.module": "dying"})
    plain = json.dumps(to_plain(settings))
    (tmp_path / "config.py").write_text(
        "import json\nfrom musicgenre.config import from_plain\n"
        f"def get_config():\n    return from_plain(json.loads({plain!r}))\n"
    )

    def run_both(fate):
        port = free_port()
        command = [
            sys.executable,
            str(ROOT / "experiments/train.py"),
            "--config=config.py",
            "--workdir=run",
            "--parallel=fsdp",
        ]
        command += [
            "--noprogress",
            "--verbosity=0",
            f"--coordinator=127.0.0.1:{port}",
            "--num_processes=2",
        ]
        command += ["--heartbeat_seconds=10"]
        both = [
            subprocess.Popen(
                [*command, f"--process_id={number}"],
                cwd=tmp_path,
                env={**environment(1), "FATE": fate},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number in range(2)
        ]
        try:
            said = [process.communicate(timeout=300)[0] for process in both]
        finally:
            for process in both:
                process.kill()
        return [process.returncode for process in both], said

    codes, said = run_both("die")
    assert codes == [hosts.LOST, -signal.SIGKILL], said
    last = said[0].splitlines()[-1]
    assert (
        last.startswith("error: process 0 of 2 cannot continue (")
        and "another process has ended" in last
    )
    assert last.endswith(
        "Start all processes again with the same commands: "
        "the run resumes from the last complete checkpoint."
    )
    assert said[1].splitlines()[-1].startswith("error: process 1 of 2 was ended from outside")

    codes, said = run_both("live")
    assert codes == [0, 0], said
    assert (
        "resuming from step 6 of 12" in said[0]
        and "run: trained 12 steps; validation accuracy" in said[0]
    )
    loop.train(settings, tmp_path / "one", progress=False, devices=jax.devices()[:1])
    assert_close(tmp_path / "one", tmp_path / "run")


def test_a_batch_that_cannot_be_cut_is_refused():
    spread = Parallel.create("jit")
    with pytest.raises(
        UserError, match=r"batch_size=7 is not divisible by \d+ devices x optimizer.accumulate=2"
    ):
        spread.check_batch_size(7, 2)
    with pytest.raises(UserError, match="--parallel must be one of jit, pmap, fsdp, not 'tpu'"):
        Parallel.create("tpu")


def test_joining_takes_all_three_flags():
    with pytest.raises(UserError, match="--coordinator needs --num_processes and --process_id"):
        hosts.join("127.0.0.1:1", 2, None, 30)
    jax.devices()
    with pytest.raises(
        UserError,
        match=r"--process_id=2: not joined \(jax.distributed.initialize\(\) must be called before",
    ):
        hosts.join("127.0.0.1:1", 2, 2, 30)
