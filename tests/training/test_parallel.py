import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from musicgenre.config import to_plain
from musicgenre.errors import UserError
from musicgenre.training.parallel import Parallel

ROOT = Path(__file__).resolve().parents[2]

# Devices are forced before jax starts, so each case has a process of its own. A plain SGD step shows a wrong gradient;
# dropout is off because under pmap each device draws its own mask.
MAIN = """
import sys, json
import jax
from absl import flags, logging
flags.FLAGS.mark_as_parsed(); logging.set_verbosity(logging.ERROR)
path, workdir, kind, count, process, port = sys.argv[1:]
if port != "0":
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
from musicgenre.config import from_plain
from musicgenre.training import loop
config = from_plain(json.load(open(path)))
devices = jax.devices()[: int(count)] if port == "0" else None
print(loop.train(config, workdir, parallel=kind, progress=False, devices=devices).line())
"""


def start(config, tmp_path, workdir, kind, count, process=0, port=0, forced=8):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_plain(config)))
    command = [sys.executable, "-c", MAIN, str(path), str(workdir), kind, str(count), str(process), str(port)]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={forced}",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


@pytest.fixture
def config(small_config):
    small_config.model.batch_norm = True
    small_config.model.dropout = 0.0
    small_config.optimizer.name = "momentum"
    small_config.optimizer.learning_rate = 0.01
    small_config.epochs = 3
    return small_config


def learnt(workdir):
    """Parameters and batch statistics at the end of a run."""
    import jax

    from musicgenre.inference.model import load_model

    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_model(workdir).model)]


def assert_close(one, other):
    for left, right in zip(learnt(one), learnt(other), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6, rtol=1e-5)


def test_eight_devices_give_the_single_devices_result(config, tmp_path):
    for workdir, kind, count in (("one", "jit", 1), ("jit", "jit", 8), ("pmap", "pmap", 8)):
        finish(start(config, tmp_path, tmp_path / workdir, kind, count))
    assert_close(tmp_path / "one", tmp_path / "jit")
    assert_close(tmp_path / "one", tmp_path / "pmap")


def test_two_processes_give_the_single_processs_result(config, tmp_path):
    finish(start(config, tmp_path, tmp_path / "one", "jit", 1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [start(config, tmp_path, tmp_path / "two", "jit", 0, process, port, forced=1) for process in range(2)]
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
