import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from musicgenre.config import to_plain
from musicgenre.errors import UserError
from musicgenre.inference.model import load_model
from musicgenre.training import loop
from musicgenre.training.parallel import Parallel

ROOT = Path(__file__).resolve().parents[2]

# Devices are forced before jax starts, so the runs have a process of their own. A plain SGD step shows a wrong gradient;
# dropout is off because under pmap each device draws its own mask.
MAIN = """
import sys, json
import jax
from absl import flags, logging
flags.FLAGS.mark_as_parsed(); logging.set_verbosity(logging.ERROR)
path, process, port = sys.argv[1:]
if port != "0":
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
from musicgenre.config import from_plain
from musicgenre.training import loop
for run in json.load(open(path)):
    devices = jax.devices()[: run["devices"]]
    print(loop.train(from_plain(run["config"]), run["workdir"], parallel=run["kind"], progress=False, devices=devices).line())
"""


def start(runs, tmp_path, process=0, port=0, forced=8):
    """Starts a process for runs of (config, workdir, kind, devices)."""
    path = tmp_path / "runs.json"
    plain = [
        {"config": to_plain(config), "workdir": str(workdir), "kind": kind, "devices": count}
        for config, workdir, kind, count in runs
    ]
    path.write_text(json.dumps(plain))
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={forced}",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    command = [sys.executable, "-c", MAIN, str(path), str(process), str(port)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


@pytest.fixture
def config(small_config):
    """Crops and augmentation are on: what a clip undergoes must not depend on the device that it is on."""
    small_config.model.batch_norm = True
    small_config.model.dropout = 0.0
    small_config.optimizer.name = "momentum"
    small_config.optimizer.learning_rate = 0.01
    small_config.epochs = small_config.eval_every = 2
    small_config.data.crop_frames = 60
    small_config.augment.update({"time_stretch": 0.1, "gain": 3.0, "mixup": 0.4, "time_masks": 1})
    return small_config


def fed(config, on_device, steps_per_call=1):
    config = ConfigDict(config.to_dict())
    config.data.on_device, config.steps_per_call = on_device, steps_per_call
    return config


def learnt(workdir):
    """Parameters and batch statistics at the end of a run."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_model(workdir).model)]


def assert_close(one, other):
    for left, right in zip(learnt(one), learnt(other), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6, rtol=1e-5)


def test_eight_devices_give_the_single_devices_result(config, tmp_path):
    runs = {
        "one": (fed(config, "never"), "jit", 1),
        "jit": (fed(config, "always", 2), "jit", 8),
        "pmap": (fed(config, "never"), "pmap", 8),
        "pmap-resident": (fed(config, "always", 3), "pmap", 8),
    }
    finish(start([(config, tmp_path / name, *rest) for name, (config, *rest) in runs.items()], tmp_path))
    for name in ("jit", "pmap", "pmap-resident"):
        assert_close(tmp_path / "one", tmp_path / name)


def test_two_processes_give_the_single_processs_result(config, tmp_path):
    loop.train(fed(config, "never"), tmp_path / "one", progress=False, devices=jax.devices()[:1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = [(fed(config, "auto"), tmp_path / "two", "jit", 2)]
    both = [start(runs, tmp_path, process, port, forced=1) for process in range(2)]
    try:
        for process in both:
            finish(process)
    finally:
        for process in both:
            process.kill()
    assert_close(tmp_path / "one", tmp_path / "two")


def test_a_batch_that_cannot_be_cut_is_refused():
    spread = Parallel.create("jit")
    with pytest.raises(UserError, match=r"batch_size=7 does not divide by \d+ devices x optimizer.accumulate=2"):
        spread.check_batch_size(7, 2)
    with pytest.raises(UserError, match="--parallel must be 'jit' or 'pmap', not 'tpu'"):
        Parallel.create("tpu")
