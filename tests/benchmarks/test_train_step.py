import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks._nets import TINY
from musicgenre import models

torch = pytest.importorskip("torch", reason="the peers' extra (PyTorch) is not installed")


@pytest.fixture
def benchmark(monkeypatch):
    module = importlib.import_module("benchmarks.train_step")
    # PyTorch's threads busy-wait, which takes minutes while other tests run.
    monkeypatch.setattr(module, "usable_cores", lambda: 1)
    torch.set_num_threads(1)
    return module


@pytest.fixture
def torch_nets(benchmark):
    return importlib.import_module("benchmarks.torch_nets")


def drawn_variables(module, frames, bands):
    """Kernels of unit gain, vectors between 0.5 and 1.5: every bias and normalisation matters."""
    generator = np.random.default_rng(0)

    def draw(leaf):
        if len(leaf.shape) > 1:
            return np.float32(
                generator.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
            )
        return np.float32(generator.uniform(0.5, 1.5, leaf.shape))

    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, frames, bands)), train=False)
    )
    return {
        name: jax.tree.map(draw, shapes[name])
        for name in ("params", "batch_stats")
        if name in shapes
    }


# Inputs are smaller than the benchmark's where a network takes any size.
@pytest.mark.parametrize(
    ("name", "frames", "bands"),
    [
        ("conv1d", 647, 128),
        ("short_chunk", 128, 128),
        ("short_chunk_res", 9, 10),
        ("resnet18", 21, 12),
        ("fcn4", 1366, 96),
        ("crnn", 1366, 96),
    ],
)
def test_both_sides_are_the_same_network(benchmark, torch_nets, name, frames, bands):
    net = benchmark.NETS[name]
    module = models.build(net.model, num_classes=benchmark.CLASSES, frames=frames, bands=bands)
    variables = drawn_variables(module, frames, bands)
    peer = torch_nets.build(name, benchmark.CLASSES, frames, bands)
    torch_nets.load_flax(peer, variables)
    ours = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert sum(parameter.numel() for parameter in peer.parameters()) == ours
    if name in ("fcn4", "crnn"):
        return  # their inputs cannot be smaller, and a forward pass takes too long
    x = np.random.default_rng(1).standard_normal((2, frames, bands), np.float32)
    expected = jax.jit(lambda v, x: module.apply(v, x, train=False))(variables, x)
    with torch.no_grad():
        found = peer.eval()(torch.from_numpy(x)).numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_the_gru_equals_keras_1s(torch_nets):
    crnn = importlib.import_module("musicgenre.models.crnn")
    generator = np.random.default_rng(0)
    variables = {
        "kernel": generator.standard_normal((5, 12), np.float32),
        "recurrent_kernel": generator.standard_normal((4, 12), np.float32),
        "bias": generator.standard_normal(12, np.float32),
    }
    x = generator.standard_normal((2, 7, 5), np.float32)
    peer = torch_nets.GRU(5, 4)
    peer.load_state_dict({name: torch.from_numpy(value) for name, value in variables.items()})
    expected = crnn.GRU(4).apply({"params": variables}, x)
    np.testing.assert_allclose(
        peer(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-4, atol=1e-5
    )


def test_a_missing_parameter_is_refused(benchmark, torch_nets):
    module = models.build(TINY["tiny"].model, num_classes=10, frames=100, bands=16)
    variables = drawn_variables(module, 100, 16)
    del variables["params"]["conv2"]["bias"]
    with pytest.raises(RuntimeError, match=r"conv2\.bias"):
        torch_nets.load_flax(torch_nets.build("tiny", 10, 100, 16), variables)


def test_memory_is_measured_in_a_new_process(benchmark, monkeypatch):
    calls = []

    def run(*arguments):
        calls.append(arguments)
        return {"steps": 123.5, "peak": 200.0}

    monkeypatch.setattr(benchmark, "in_new_process", run)
    memory = benchmark.measure_memory("torch eager", "tiny", 8, "float32", tiny=True)
    assert memory == {"steps": 123.5, "peak": 200.0}
    flags = ("--memory_of=torch eager", "--nets=tiny", "--batch=8", "--dtypes=float32", "--tiny")
    assert calls == [("train_step", *flags)]


def test_a_dry_run_prints_every_figure(benchmark, capsys, monkeypatch):
    ours, theirs = {"steps": 300, "peak": 500}, {"steps": 200, "peak": 250}

    def measure_memory(side, *_, **__):
        return ours if side == "jax" else theirs

    monkeypatch.setattr(benchmark, "measure_memory", measure_memory)
    assert benchmark.main(["--tiny", "--no_compile"]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"jax / torch eager: [\d.]+ \(quartiles", printed)) == 2  # of both types
    assert printed.count("target: at most 1, ") == 1  # in float32 alone
    for what, jax_mb, torch_mb, ratio in (
        ("stepping", 300, 200, "1.500"),
        ("with compilation", 500, 250, "2.000"),
    ):
        line = f"memory, {what}, MB: jax {jax_mb}, torch eager {torch_mb}"
        assert f"{line}\n    jax / torch eager: {ratio}" in printed
    rates = r"the device: [\d.]+ TFLOP/s in products of 1024\^3, [\d.]+ GB/s in copies"
    assert len(re.findall(rates, printed)) == 2
    with pytest.raises(SystemExit):
        benchmark.main(["--nets=conv3d"])
    assert "--nets: 'conv3d' is none of conv1d, fcn4, crnn" in capsys.readouterr().err
