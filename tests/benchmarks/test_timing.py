import re

import jax
import numpy as np
import pytest

from benchmarks import _timing, input


def test_functions_alternate_and_ratios_are_of_each_round(monkeypatch, capsys):
    clock, cpu, calls = [0.0], [0.0], []
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(_timing.time, "process_time", lambda: cpu[0])

    def takes(name, seconds):
        remaining = iter(seconds)

        def run():
            calls.append(name)
            spent = next(remaining)
            clock[0] += spent
            cpu[0] += spent / 2

        return run

    # The first call of each is the warm-up. In the second round everything is ten times slower.
    functions = {"a": takes("a", [9, 2, 40, 8]), "b": takes("b", [9, 1, 10, 2])}
    wall, processor = _timing.alternate(functions, rounds=3, units=2)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert wall["a"].tolist() == [1.0, 20.0, 4.0] and processor["a"].tolist() == [0.5, 10.0, 2.0]
    _timing.print_timings(wall, rate=lambda median: f"{1 / median:.2f}")
    assert capsys.readouterr().out.splitlines() == [
        "     median ms              quartiles   fastest  rate",
        "  a   4000.000  2500.000 to 12000.000  1000.000  0.25",
        "  b   1000.000    750.000 to 3000.000   500.000  1.00",
    ]
    ratio = _timing.ratio(wall["a"], wall["b"])
    assert (ratio.low, ratio.median, ratio.high) == (3.0, 4.0, 4.0)
    line = "  a / b: 4.000 (quartiles 3.000 to 4.000); target: at most 4, met"
    assert ratio.line("a / b", at_most=4) == line
    assert ratio.line("a / b", at_least=4.5).endswith("; target: at least 4.5, missed")


def test_the_machine_is_described():
    text = _timing.machine(("numpy", "jax", "nothing-of-that-name"))
    versions = f"numpy {np.__version__}, jax {jax.__version__}, nothing-of-that-name (absent)"
    assert versions in text and "JAX devices: 1 x cpu (cpu)" in text and "usable cores" in text


def test_a_new_process_returns_the_object_on_its_last_line(monkeypatch):
    commands = []

    class Done:
        stdout = 'a warning\n{"steps": 123.5, "peak": 200}\n'

    monkeypatch.setattr(
        _timing.subprocess, "run", lambda command, **_: commands.append(command) or Done
    )
    assert _timing.in_new_process("tag", "--of=a.wav") == {"steps": 123.5, "peak": 200}
    assert commands[0][1:] == ["-m", "benchmarks.tag", "--of=a.wav"]


def test_flags_take_the_type_of_their_default(capsys):
    parser = _timing.flags(
        "What.", ("rounds", 3, "rounds"), ("fast", False, "fast"), ("of", "", None)
    )
    given = parser.parse_args(["--rounds=4", "--fast"])
    assert (given.rounds, given.fast, given.of) == (4, True, "")
    assert "rounds (default: 3)" in parser.format_help() and "--of" not in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args(["--rounds=x"])
    assert "invalid int value: 'x'" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--augment"], ["--feed=read"]], ids=["resident", "read"])
def test_the_input_benchmark_runs_dry(capsys, options):
    assert input.main(["--tiny", *options]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"fed / ready: \d+\.\d{3} \(quartiles .*target: at most 1.03, (met|missed)", out
    )
    assert re.search(r"Grain's rate / loop's: \d+\.\d{3} .*target: at least 0.8, (met|missed)", out)
