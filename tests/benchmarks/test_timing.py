import importlib
import re

import pytest


@pytest.fixture
def benchmark():
    """A function that imports a benchmark by name."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_contestants_take_turns_and_the_ratio_is_of_each_round(benchmark, monkeypatch):
    timing = benchmark("_timing")
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def contestant(name, seconds):
        remaining = iter(seconds)

        def run():
            calls.append(name)
            clock[0] += next(remaining)

        return run

    # The first of each is the warm-up. In the second round everything is ten times slower.
    contestants = {"a": contestant("a", [9, 2, 40, 8]), "b": contestant("b", [9, 1, 10, 2])}
    timings = timing.alternate(contestants, rounds=3, units=2)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert timings["a"].seconds == (1.0, 20.0, 4.0) and timings["a"].median == 4.0
    assert (
        "median   4000.000 ms   quartiles 2500.000 to 12000.000   fastest 1000.000   3 rounds"
        in timings["a"].line()
    )
    ratio = timing.ratio(timings["a"], timings["b"])
    assert (ratio.low, ratio.median, ratio.high) == (3.0, 4.0, 4.0)
    assert (
        ratio.line("a / b", at_most=4)
        == "  a / b: 4.000 (quartiles 3.000 to 4.000); bar: at most 4, met"
    )
    assert ratio.line("a / b", at_least=4.5).endswith("bar: at least 4.5, NOT met")


def test_the_machine_is_described(benchmark):
    text = benchmark("_timing").machine(("numpy", "jax", "nothing-of-that-name"))
    import jax
    import numpy

    assert (
        f"numpy {numpy.__version__}, jax {jax.__version__}, nothing-of-that-name (absent)" in text
    )
    assert "JAX devices: 1 x cpu (cpu)" in text and "cores usable" in text


@pytest.mark.parametrize("options", [["--augment"], ["--feed=read"]], ids=["resident", "read"])
def test_the_input_benchmark_runs_dry(benchmark, capsys, options):
    assert benchmark("input").main(["--tiny", *options]) == 0
    out = capsys.readouterr().out
    assert re.search(r"fed / ready: \d+\.\d{3} \(quartiles .*bar: at most 1.03, (NOT )?met", out)
    assert re.search(r"Grain's rate / bare loop's: \d+\.\d{3} .*bar: at least 0.8, (NOT )?met", out)
