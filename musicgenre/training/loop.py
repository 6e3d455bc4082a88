"""The training loop, one for all objectives: calls, evaluations, checkpoints, signals."""

import collections
import contextlib
import math
from typing import Any

import numpy as np
from absl import logging

from musicgenre.errors import UserError
from musicgenre.runs.checkpoints import Checkpoints
from musicgenre.runs.notes import run_notes
from musicgenre.runs.processes import is_lost
from musicgenre.runs.workdir import Interrupted, catch_signals
from musicgenre.training.feed import Feed, resident_clips
from musicgenre.training.objectives import Objective
from musicgenre.training.selection import Selection
from musicgenre.training.step import make_many_steps
from musicgenre.training.telemetry import Profiler, Telemetry

# jax 0.10 on several CPU devices deadlocks with many steps in flight; waiting this often costs
# nothing measurable.
MOST_STEPS_IN_FLIGHT = 10


class Loop:
    """The state of a run while it trains. `profile_steps` are (first step, count) to trace."""

    def __init__(
        self, objective: Objective, progress: bool, profile_steps: tuple[int, int] | None
    ) -> None:
        self.objective = objective
        self.run = run = objective.run
        config = run.config
        self.total_steps = objective.stages * objective.stage_steps
        self.selection = Selection(objective.metric or "", config.patience)
        self._checkpoints = Checkpoints(
            run.workdir / "checkpoints", lower_is_better=self.selection.lower_is_better
        )
        resumes = bool(self._checkpoints.steps())
        self._stacked = config.steps_per_call > 1
        clips = resident_clips(run.spread, run.store, run.clips, config.data.on_device)
        self._resident = () if clips is None else (clips,)
        self._state = objective.create_state(resumes)
        iterator = objective.batches(clips is not None, resumes)
        self._feed = Feed(iterator, run.spread, stacked=self._stacked)
        self._notes = run_notes(config, run.store)
        # Sums of the metrics since they were last written, and of how many steps.
        self._sums: dict[str, float] = {"steps": 0}
        self._pending: collections.deque[tuple[int, Any]] = collections.deque()
        self.step = 0
        if restored := self._checkpoints.restore_latest(self._state, self._feed):
            self._state, self.step = restored.value, restored.step
            self._sums = restored.meta.get("epoch", self._sums)
            objective.progress = restored.meta.get("pretrained")
            if objective.metric:
                self.selection.load(restored.meta)
            logging.info("resuming from step %d of %d", self.step, self.total_steps)
        steps, draws = range(self.step, self.total_steps), progress and self.step < self.total_steps
        self._telemetry = Telemetry(run.workdir, steps, draws, objective.stage)
        self._profiler = Profiler(run.workdir, profile_steps, steps)

    def run_to_end(self) -> None:
        """Trains, evaluates and saves until the last step. Raises as `train` does."""
        with (
            contextlib.closing(self._telemetry),
            contextlib.closing(self._checkpoints),
            contextlib.closing(self._profiler),
            catch_signals() as signals,
        ):
            try:
                self._run(signals)
            except Exception as error:
                if is_lost(error):  # a pending save would wait for the process that has died
                    self._checkpoints.abandon()
                raise

    def _run(self, signals: Any) -> None:
        objective, stage, compiled = self.objective, -1, None
        while self.step < self.total_steps and not self.selection.exhausted:
            if stage != self.step // objective.stage_steps:
                stage = self.step // objective.stage_steps
                step = objective.step(stage)
                step = make_many_steps(step) if self._stacked else step
                options = {"resident": bool(self._resident), "stacked": self._stacked}
                compiled = self.run.spread.train_step(step, **options)
            self._call(compiled)
            if evaluates := objective.evaluates(self.step):
                self._evaluate()
            if (number := signals.received(self.step)) is not None:
                if not evaluates:
                    self._settle()
                    self._save(None)
                self._checkpoints.wait()
                raise Interrupted(number, self.step)
        self._checkpoints.wait()

    def _count(self) -> int:
        """Steps of the next call. It ends at an evaluation, so a resumed run has the same calls."""
        most = int(self.run.config.steps_per_call)
        ends = (n for n in range(1, most) if self.objective.evaluates(self.step + n))
        return next(ends, most)

    def _call(self, compiled: Any) -> None:
        """Takes the steps of one call, and waits for earlier ones where that is due."""
        count = self._count()
        numbers = range(self.step, self.step + count)
        self._profiler.before(numbers)
        self._state, metrics = compiled(self._state, self._feed.next(count), *self._resident)
        self._profiler.after(numbers, metrics)
        self._pending.append((self.step + 1, metrics))
        self.step += count
        if self.step < self.total_steps:
            self._feed.prepare(self._count())
        if len(self._pending) >= MOST_STEPS_IN_FLIGHT:
            self._settle(MOST_STEPS_IN_FLIGHT // 2)
        if any(self.objective.logs(number + 1) for number in numbers):
            self._settle()

    def _settle(self, keep: int = 0) -> None:
        """Waits for all but the latest `keep` calls, and checks and writes their metrics."""
        watched = self.objective.watched
        while len(self._pending) > keep:
            first, stack = self._pending.popleft()
            columns = {name: np.atleast_1d(np.asarray(values)) for name, values in stack.items()}
            for i, value in enumerate(columns[watched]):
                if not math.isfinite(value):
                    raise UserError(
                        f"{self.run.workdir}: the training {watched.replace('_', ' ')} became "
                        f"{value} at step {first + i}. The checkpoints before it are intact. Try "
                        f"a smaller {self.objective.remedy}, in another --workdir."
                    )
                for name, column in columns.items():
                    self._sums[name] = self._sums.get(name, 0.0) + float(column[i])
                self._sums["steps"] += 1
                if not self.objective.evaluates(first + i):
                    self._write(first + i, {})

    def _write(self, step: int, measures: dict[str, float]) -> None:
        """Writes the rows of a step, if it is logged or evaluated."""
        means: dict[str, float] = {}
        if logs := self.objective.logs(step):
            steps = self._sums.pop("steps")
            means = {name: total / steps for name, total in self._sums.items()}
            self._sums = {"steps": 0}
        if logs or measures:
            for row in filter(None, self.objective.rows(step, means, measures)):
                self._telemetry.write(step, **row)
        if logs:
            watched = self.objective.watched
            shown = {watched: means[watched]}
            if self.selection.last is not None:
                shown[f"valid_{self.objective.metric}"] = self.selection.last
            self._telemetry.progress(step, self.objective.epoch_line(step), **shown)

    def _evaluate(self) -> None:
        """Measures the state, writes the measures and saves a checkpoint."""
        self._settle()
        metric = self.objective.metric
        measures = self.objective.evaluate(self._state, self.step)
        if metric and measures:
            if metric not in measures:
                raise UserError(
                    f"config.select_metric={metric!r} cannot be measured on this validation split: "
                    f"use one of {', '.join(measures)}."
                )
            self.selection.update(self.step, measures[metric])
        self._write(self.step, measures)
        self._save(measures.get(metric) if metric else None)

    def _save(self, measure: float | None) -> None:
        objective = self.objective
        notes = self._notes | {"measure": measure, "epoch": dict(self._sums)}
        if objective.metric:
            notes |= self.selection.dump()
        else:
            name, lower = objective.compared
            notes |= {"metric": name, "lower_is_better": lower, "pretrained": objective.progress}
        self._checkpoints.save(self._state, self._feed, notes, measure)
