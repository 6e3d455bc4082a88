"""What a run tells while it runs: metrics.jsonl always, TensorBoard when installed, a progress bar, a profile."""

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
    """Returns the rows of a run's metrics.jsonl, oldest first; a line that a crash cut short is left out."""
    path = Path(workdir) / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class Telemetry:
    """Writes a run's measures. Only process 0 writes.

    Args:
      workdir: the run's folder.
      start_step: where the run goes on; rows of later steps, which it will do again, are removed.
      total_steps: length of the whole run.
      progress: draw a progress bar.
      name: what stands before it.
    """

    def __init__(
        self, workdir: Path, start_step: int, total_steps: int, progress: bool, name: str = "train"
    ) -> None:
        self._active = jax.process_index() == 0
        self._path = workdir / "metrics.jsonl"
        self._writer: Any = None
        self._start = time.monotonic()
        if not self._active:
            self._bar = tqdm(disable=True)
            return
        kept = [row for row in read_rows(workdir) if row["step"] <= start_step]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            pass
        else:
            self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        self._bar = tqdm(
            total=total_steps, initial=start_step, unit="step", desc=name, disable=not progress
        )

    def write(self, step: int, **values: float) -> None:
        """Appends one row: the step, the seconds since this process began, and the values."""
        if not self._active:
            return
        row = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **values}
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written ({error.strerror}). Free some space and run the same command "
                "again: it goes on from the last whole checkpoint."
            ) from error
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def progress(self, step: int, **values: float) -> None:
        """Moves the bar to a step and shows the values beside it."""
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix(
            {name: f"{value:.4g}" for name, value in values.items()}, refresh=False
        )

    def say(self, line: str) -> None:
        """Prints a line, unless it is empty, above the bar."""
        if self._active and line:
            tqdm.write(line)

    def close(self) -> None:
        """Closes the bar and the TensorBoard file."""
        self._bar.close()
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                # On a full disk this must not hide the error that ended the run.
                logging.warning(
                    "TensorBoard's file could not be finished (%s); metrics.jsonl has the same numbers",
                    error,
                )


class Profiler:
    """Writes a trace of some steps to `<workdir>/profile`, for TensorBoard or Perfetto.

    Args:
      workdir: the run's folder.
      steps: (first, count) of the steps to trace, or None.
      trains: the steps that this call trains. A first step that is none of them is warned of: nothing would be written.
    """

    def __init__(
        self, workdir: Path, steps: tuple[int, int] | None, trains: range | None = None
    ) -> None:
        self._folder = os.fspath(workdir / "profile")
        self._steps = steps
        self._running = False
        if steps and trains is not None and steps[0] not in trains:
            there = (
                f"trains steps {trains[0]} to {trains[-1]}"
                if trains
                else f"trains none: the run has its {trains.start} steps"
            )
            logging.warning(
                "--profile_steps=%d,%d: no trace will be written; this call %s", *steps, there
            )

    def before(self, step: int) -> None:
        """Is called before each step."""
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """Is called after each step with its result, which is waited for before the trace ends."""
        if self._running and self._steps and step + 1 >= sum(self._steps):
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
