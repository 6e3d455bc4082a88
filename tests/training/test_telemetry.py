import jax
import pytest
from absl import logging

from musicgenre.training.telemetry import Profiler


@pytest.mark.parametrize(
    ("trains", "warning"),
    [
        (range(120), ""),
        (
            range(20),
            "--profile_steps=20,5: no trace will be written; this call trains steps 0 to 19",
        ),
        (
            range(100, 120),
            "--profile_steps=20,5: no trace will be written; this call trains steps 100 to 119",
        ),
        (
            range(100, 100),
            "--profile_steps=20,5: no trace will be written; "
            "this call trains none: the run has its 100 steps",
        ),
    ],
)
def test_steps_that_are_not_trained_are_warned_of(monkeypatch, tmp_path, trains, warning):
    told, traced = [], []
    monkeypatch.setattr(logging, "warning", lambda text, *values: told.append(text % values))
    monkeypatch.setattr(jax.profiler, "start_trace", traced.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    profiler = Profiler(tmp_path, (20, 5), trains)
    for step in trains:
        profiler.before(range(step, step + 1))
        profiler.after(range(step, step + 1), None)
    profiler.close()
    assert told == [warning] * bool(warning)
    assert traced == ([] if warning else [str(tmp_path / "profile")])
    Profiler(tmp_path, None, trains)
    assert len(told) == bool(warning)
