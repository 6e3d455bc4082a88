"""A run's measures: metrics.jsonl, TensorBoard where installed, a progress bar, a profile."""

import json
import os
import time
from pathlib import Path
from typing import Any

import jax
from absl import logging
from tqdm import tqdm

from musicgenre.errors import UserError
from musicgenre.files import write_text


def read_rows(workdir: str | Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics.jsonl, oldest first, without truncated lines."""
    path = Path(workdir) / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class Telemetry:
    """Writes a run's measures, on process 0 alone.

    Rows after the first of `steps`, those that this call trains, are removed. `name` labels the
    progress bar.
    """

    def __init__(self, workdir: Path, steps: range, progress: bool, name: str = "train") -> None:
        self._active = jax.process_index() == 0
        self._path = workdir / "metrics.jsonl"
        self._writer: Any = None
        self._began = time.monotonic()
        bar = {"total": steps.stop, "initial": steps.start, "unit": "step", "desc": name}
        self._bar = tqdm(**bar, disable=not (progress and self._active))
        if not self._active:
            return
        kept = [row for row in read_rows(workdir) if row["step"] <= steps.start]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=steps.start + 1)

    def write(self, step: int, **values: float) -> None:
        """Appends a row: the step, the seconds since this process began, and the values."""
        if not self._active:
            return
        row = {"step": step, "seconds": round(time.monotonic() - self._began, 3), **values}
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written ({error.strerror}). Free some space and run the "
                "same command again: it resumes from the last intact checkpoint."
            ) from error
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def progress(self, step: int, line: str, **values: float) -> None:
        """Moves the bar to a step, shows the values, and prints a line unless it is empty."""
        if self._active and line:
            tqdm.write(line)
        self._bar.update(step - self._bar.n)
        shown = {name: f"{value:.4g}" for name, value in values.items()}
        self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Closes the bar and the TensorBoard file."""
        self._bar.close()
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:  # a full disk must not hide the error that ended the run
            logging.warning("TensorBoard's file is incomplete (%s); metrics.jsonl is not", error)


class Profiler:
    """Writes a trace of some steps to `<workdir>/profile`, for TensorBoard or Perfetto.

    `steps` are the first to trace and a count, or None. If this call does not train the first one,
    there is a warning.
    """

    def __init__(self, workdir: Path, steps: tuple[int, int] | None, trains: range) -> None:
        self._folder = os.fspath(workdir / "profile")
        self._first, count = steps or (-1, 0)
        self._last = self._first + count - 1
        self._running = False
        if steps and self._first not in trains:
            there = f"none: the run has its {trains.start} steps"
            if trains:
                there = f"steps {trains[0]} to {trains[-1]}"
            text = "--profile_steps=%d,%d: no trace will be written; this call trains %s"
            logging.warning(text, *steps, there)

    def before(self, steps: range) -> None:
        """Starts the trace before the call that has its first step."""
        if self._first in steps:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, steps: range, result: Any) -> None:
        """Ends the trace after the call with its last step, once its `result` is there."""
        if self._running and steps[-1] >= self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends a running trace."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
