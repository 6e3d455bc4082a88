import json
import os
import shutil
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
import json, sys
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np, optax
from absl import flags, logging
from flax import nnx
flags.FLAGS.mark_as_parsed(); logging.set_verbosity(logging.ERROR)
from musicgenre import models
from musicgenre.config import from_plain
from musicgenre.runs import workdir
from musicgenre.training import fit, parallel
from musicgenre.training.augment import Augmentation
from musicgenre.training.state import create_state
from musicgenre.training.step import make_train_step

received = workdir._Signals.received
parallel.SHARD_FROM = 64
for run in json.load(open(sys.argv[1])):
    stop = run["stop"]
    workdir._Signals.received = (
        (lambda self, step: 15 if step == stop else None) if stop else received
    )
    config = from_plain(run["config"])
    function = fit.pretrain if config.pretrain.method else fit.train
    devices = jax.devices()[: run["devices"]]
    try:
        function(config, run["workdir"], parallel=run["kind"], progress=False, devices=devices)
    except workdir.Interrupted:
        assert stop
"""

# The memory of a sharded state on one of four devices, and the collectives of its step.
MEMORY = """
parallel.SHARD_FROM = 16_384

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(32, (3, 3), strides=2, name="first")(x[..., None]))
        return nn.Dense(3, name="head")(nn.relu(nn.Conv(128, (3, 3), name="big")(x)).mean((1, 2)))

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
    placed = [leaf.sharding == wanted for leaf, wanted in zip(leaves, shardings, strict=True)]
    data = spread.place_batch(batch)
    compiled = spread.train_step(step).lower(state, data).compile()
    for _ in range(3):
        state, _ = compiled(state, data)
    first = jax.devices()[0]
    shards = [shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]
    found[kind] = {
        "bytes": sum(shard.data.nbytes for shard in shards if shard.device == first),
        "gathers": compiled.as_text().count(" all-gather("),
        "created": all(same) and all(placed),
    }
    if kind == "fsdp":
        making = jax.jit(create, out_shardings=spread.state_shardings(full))
        made = making.lower().compile().memory_analysis()
        found["making"] = made.temp_size_in_bytes + made.output_size_in_bytes
    params.append(jax.tree.map(np.asarray, (state.params, state.ema)))
pairs = zip(*map(jax.tree.leaves, params), strict=True)
found["apart"] = max(float(abs(one - other).max()) for one, other in pairs)
print(json.dumps(found))
"""

# Two devices learn the same as one under pmap, a Linen and an NNX network with synchronised batch
# normalisation; from teachers, too, whose predictions are mixed with those of a neighbour that may
# be on the other device.
PMAP = """
class Linen(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(jnp.abs(x).mean(axis=1))
        return nn.Dense(self.num_classes, name="head")(x)

class NNX(nnx.Module):
    def __init__(self, num_classes, *, bands, rngs):
        self.norm = nnx.BatchNorm(bands, rngs=rngs)
        self.head = nnx.Linear(bands, num_classes, rngs=rngs)

    def __call__(self, x, train=False):
        return self.head(self.norm(jnp.abs(x).mean(axis=1), use_running_average=not train))

norm = {"mean": np.full((1, 8), -40.0, np.float32), "std": np.full((1, 8), 10.0, np.float32)}
batch = {
    "x": -40 + 10 * generator.standard_normal((8, 40, 8), np.float32),
    "y": np.arange(8, dtype=np.int32) % 3,
    "mask": np.ones(8, np.float32),
    "teacher": generator.dirichlet(np.ones(3), 8).astype(np.float32),
}
for network in (Linen, NNX):
    models.register(network.__name__)(network)
    net = models.build({"name": network.__name__}, num_classes=3, frames=40, bands=8)
    learnt = []
    for kind, devices in (("jit", 1), ("pmap", 2)):
        spread = parallel.Parallel.create(kind, jax.devices()[:devices])
        step = make_train_step(
            net, optax.sgd(0.1), seed=0, class_weights=jnp.ones(3), teachers_weight=0.8,
            augmentation=Augmentation(frames=40, mixup=0.7), axis_name=spread.axis_name,
        )
        create = lambda: create_state(
            net, optax.sgd(0.1), norm, seed=0, frames=40, bands=8, ema=False
        )
        state = spread.create_state(create)
        start = jax.tree.map(np.array, state.collections)
        state, metrics = spread.train_step(step)(state, spread.place_batch(batch))
        learnt.append(jax.tree.map(np.asarray, (metrics["loss"], state.params, state.collections)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), *learnt)
    moved = jax.tree.map(lambda a, b: abs(a - b).max() > 0, start, learnt[1][2])
    assert jax.tree.leaves(moved) == [True, True]
print("equal")
"""


def environment(forced):
    return {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={forced}",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }


def run_all(runs, tmp_path, then=""):
    """Trains in a process of four devices: (config, workdir, kind, devices, stop after or 0)."""
    path = tmp_path / "runs.json"
    names = ("config", "workdir", "kind", "devices", "stop")
    plain = [
        dict(zip(names, (to_plain(config), str(workdir), *rest), strict=True))
        for config, workdir, *rest in runs
    ]
    path.write_text(json.dumps(plain))
    command = [sys.executable, "-c", MAIN + then, str(path)]
    run = {"cwd": ROOT, "env": environment(4), "capture_output": True, "text": True}
    done = subprocess.run(command, **run, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def config(small_config):
    """Windows and augmentation are on: they must not depend on a clip's device.

    Two windows of each of the 9 validation clips are 18 rows, which 4 devices do not divide.
    """
    small_config.model.batch_norm = True
    small_config.model.dropout = 0.0
    small_config.model.filters = (4,)
    small_config.optimizer.name = "momentum"
    small_config.optimizer.learning_rate = 0.01
    small_config.epochs = 1
    small_config.data.crop_frames = 60
    small_config.data.eval_chunks = 2
    small_config.augment.update({"mixup": 0.4, "time_masks": 1})
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
    """Parameters are the same, and so are the metrics on the validation clips."""
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
    # With averaged parameters and a batch in parts; 24 clips are 3 steps.
    config.update_from_flattened_dict({"optimizer.accumulate": 2, "ema_decay": 0.9})
    runs = [
        ("one", fed(config, "always"), "jit", 1, 0),
        ("jit", fed(config, "never"), "jit", 4, 0),
        ("pmap", fed(config, "always", 2), "pmap", 4, 0),
        # One run, sharded over four devices, then on one, then on four again.
        ("moved", fed(config, "always"), "fsdp", 4, 1),
        ("moved", fed(config, "always"), "jit", 1, 2),
        ("moved", fed(config, "always"), "fsdp", 4, 0),
    ]
    # Without labels: views are compared across devices, machines are sharded.
    config.optimizer.accumulate, config.data.eval_chunks = 1, 1
    config.augment = base_config().augment
    simclr = {
        "pretrain.method": "simclr",
        "pretrain.epochs": 1,
        "pretrain.projection": 16,
        "augment.gain": 3.0,
        "batch_size": 12,
    }
    divergence = {
        "model": ConfigDict({"name": "rbm", "module": "", "layers": (32, 16)}),
        "pretrain.method": "contrastive_divergence",
        "pretrain.epochs": 1,
        "data.crop_frames": 8,
        "ema_decay": 0.0,
    }
    for method, fields in (("simclr", simclr), ("rbm", divergence)):
        runs.append((f"{method}-one", fed(config, "never", 1, **fields), "jit", 1, 0))
        settings = fed(config, "always", 2, **fields)
        runs.append((f"{method}-fsdp", settings, "fsdp", 2, 0))
    settings = fed(settings, "always", **{"model.layers": (16,)})
    runs.append(("rbm-pmap", settings, "pmap", 2, 0))
    trained = [(settings, tmp_path / name, *rest) for name, settings, *rest in runs]
    memory, equal = run_all(trained, tmp_path, MEMORY + PMAP)[-2:]
    assert equal == "equal"
    for name in ("jit", "pmap", "moved"):
        assert_close(tmp_path / "one", tmp_path / name)
    for method in ("simclr", "rbm"):
        assert_close(tmp_path / f"{method}-one", tmp_path / f"{method}-fsdp", atol=2e-5)
    # Under pmap each device draws its own chains.
    assert load_model(tmp_path / "rbm-pmap").step == 3

    found = json.loads(memory)
    # The big kernel has 3 x 3 x 32 x 128 numbers, everything else 320 + 128 + 387. Parameters,
    # average and Adam's two moments each have these; then norm's 16, and the counters of steps.
    big, small = 36_864, 835
    assert found["jit"] == {
        "bytes": 4 * (4 * (big + small) + 16 + 2),
        "gathers": 0,
        "created": True,
    }
    assert found["fsdp"] == {
        "bytes": 4 * (4 * (big // 4 + small) + 16 + 2),
        "gathers": 1,
        "created": True,
    }
    # While it makes its shards, a device needs less than its parts of a full state and a copy of
    # the big kernel.
    assert found["making"] < 4 * 4 * (big + small)
    assert found["apart"] < 1e-6


# A user's module, which the config names: it shards arrays from 64 numbers, and lets process 1 die
# as if its machine had failed, in the second step after the first checkpoint.
DYING = """
import os, pathlib, signal, sys, time
import jax
from musicgenre.training import feed, parallel

next_batches = feed.Feed.next

def next_or_die(self, count=1):
    next_or_die.calls += 1
    if next_or_die.calls == 5 and jax.process_index() == 1:
        while not pathlib.Path("run/checkpoints/3").is_dir():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    return next_batches(self, count)

next_or_die.calls = 0
if "FATE" in os.environ:
    parallel.SHARD_FROM = 64
if os.environ.get("FATE") == "die":
    feed.Feed.next = next_or_die
"""


def test_a_killed_process_ends_the_other_and_the_same_commands_resume(
    config, tmp_path, monkeypatch
):
    """Two processes give one process's result, and so does one process that takes over."""
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.syspath_prepend(tmp_path)
    settings = fed(config, "auto", epochs=2, module="dying")
    plain = json.dumps(to_plain(settings))
    (tmp_path / "config.py").write_text(
        "import json\nfrom musicgenre.config import from_plain\n"
        f"def get_config():\n    return from_plain(json.loads({plain!r}))\n"
    )

    def run_both(fate):
        port = free_port()
        command = [sys.executable, "-m", "musicgenre", "train", "--config=config.py"]
        command += ["--workdir=run", "--parallel=fsdp", "--noprogress", "--verbosity=0"]
        command += [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
        command += ["--heartbeat_seconds=10"]
        both = [
            subprocess.Popen(
                [*command, f"--process_id={number}"],
                cwd=tmp_path,
                env={**environment(1), "FATE": fate, "PYTHONPATH": str(ROOT)},
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

    shutil.copytree(tmp_path / "run", tmp_path / "taken_over")

    codes, said = run_both("live")
    assert codes == [0, 0], said
    assert "resuming from step 3 of 6" in said[0]
    assert "run: trained 6 steps; validation accuracy" in said[0]
    for name in ("one", "taken_over"):
        loop.train(settings, tmp_path / name, progress=False, devices=jax.devices()[:1])
        assert_close(tmp_path / name, tmp_path / "run")


def test_a_batch_that_cannot_be_divided_is_refused():
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
