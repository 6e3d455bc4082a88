"""The training loop: from a config and a store to checkpoints, going on wherever the last run stopped."""

import collections
import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from musicgenre import models
from musicgenre.config import check_config, store_path
from musicgenre.errors import UserError
from musicgenre.evaluation.metrics import (
    multi_label_metrics,
    regression_metrics,
    single_label_metrics,
)
from musicgenre.runs.checkpoints import Checkpoints
from musicgenre.runs.notes import run_notes
from musicgenre.runs.processes import is_lost
from musicgenre.runs.workdir import Interrupted, catch_signals, check_store, claim_workdir
from musicgenre.store.loader import normalisation, train_batches
from musicgenre.store.store import Store
from musicgenre.training.augment import Augmentation, window_frames
from musicgenre.training.losses import balanced_weights
from musicgenre.training.objectives.distillation import NOTES, distils, read_teachers, soft_targets
from musicgenre.training.optimisers import learning_rate_schedule, make_optimizer
from musicgenre.training.parallel import Feed, Parallel
from musicgenre.training.scoring import score_clips
from musicgenre.training.state import TrainState, create_state
from musicgenre.training.step import make_many_steps, make_score_step, make_train_step
from musicgenre.training.telemetry import Profiler, Telemetry
from musicgenre.training.transfer import layer_order, layer_rates, start_from

# jax 0.10 on several CPU devices deadlocks with many steps in flight; waiting this often costs nothing measurable.
MOST_STEPS_IN_FLIGHT = 10
# What a run is followed by where config.select_metric does not say.
_MAIN_METRIC = {"single_label": "accuracy", "multi_label": "macro_roc_auc", "regression": "r2"}


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended: its last step, the validation measures of the last and the best checkpoint, what kind of audio."""

    workdir: Path
    step: int
    stopped_early: bool
    metric: str
    last: float | None
    best: float | None
    best_step: int | None
    synthetic: bool

    def line(self) -> str:
        """One line for people."""
        if self.last is None or self.best is None:
            return f"{self.workdir}: trained {self.step} steps (no validation split)"
        early = ", stopped early" if self.stopped_early else ""
        return (
            f"{self.workdir}: trained {self.step} steps{early}; validation {self.metric} {self.last:.4f} at the end, best "
            f"{self.best:.4f} at step {self.best_step}"
        )


def train(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    parallel: str = "jit",
    progress: bool = True,
    profile_steps: tuple[int, int] | None = None,
    devices: list[Any] | None = None,
) -> TrainResult:
    """Trains a model, or goes on with it: the same call resumes, bit for bit, from the last whole checkpoint.

    Args:
      config: from `musicgenre.config.base_config`.
      workdir: the run's folder; gets `config.json`, `train_clips.json`, `metrics.jsonl` and `checkpoints/`, with teachers also
        `teachers.npy` and `teachers.json`.
      parallel: "jit", "pmap" or "fsdp", see `musicgenre.training.parallel`; any of them goes on with any other's run.
      progress: draw a progress bar.
      profile_steps: (first step, count) to trace.
      devices: devices to use; all if None.

    Returns:
      How the run ended.

    Raises:
      UserError: the config or the store cannot be used, the workdir holds a run with another config, or the loss
        became NaN.
      Interrupted: SIGINT or SIGTERM came; everything up to it is saved.
    """
    workdir = Path(workdir)
    check_config(config)
    config = config.copy_and_resolve_references()
    config.model = ConfigDict(models.resolve(config.model.to_dict()))
    store = Store.open(store_path(config))
    check_store(config, store)
    # A run that goes on does so without its teachers.
    teachers = (
        read_teachers(config, store)
        if distils(config) and not (workdir / NOTES).is_file()
        else None
    )
    claim_workdir(workdir, config, store, [teacher.trained_on for teacher in teachers or ()])

    spread = Parallel.create(parallel, devices)
    spread.check_batch_size(config.batch_size, config.optimizer.accumulate)
    train_clips = store.indices("train")
    valid_clips = store.indices("valid") if "valid" in store.splits else np.array([], int)
    epoch_steps = math.ceil(len(train_clips) / config.batch_size)
    total_steps = epoch_steps * config.epochs
    frames = config.data.crop_frames or store.layout.frames
    module = models.build(
        config.model.to_dict(),
        num_classes=len(store.label_names),
        frames=frames,
        bands=store.bands,
        kind=store.features.kind,
        dtype=config.dtype,
    )
    layers = layer_order(module, frames, store.bands)
    rates = layer_rates(
        layers,
        transferred=bool(config.init_from),
        transferred_rate=config.optimizer.transferred_rate,
        layer_decay=config.optimizer.layer_decay,
    )
    optimizer = make_optimizer(config.optimizer, total_steps, rates)
    schedule = learning_rate_schedule(config.optimizer, total_steps)
    weights = np.ones(len(store.label_names), np.float32)
    if config.loss.class_weights == "balanced" and store.task == "regression":
        raise UserError("config.loss.class_weights='balanced' has no meaning for a regression.")
    if config.loss.name == "cross_entropy" and store.task == "regression":
        raise UserError(
            "config.loss.name='cross_entropy' has no meaning for a regression, which takes 'mse'."
        )
    if config.loss.class_weights == "balanced":
        weights = balanced_weights(store.targets(train_clips), len(store.label_names))
    augmentation = Augmentation.from_config(config, frames)
    window = window_frames(frames, store.layout.frames, config.augment.time_stretch)
    clips = resident_clips(spread, store, train_clips, config.data.on_device)
    one_step = make_train_step(
        module,
        optimizer,
        seed=config.seed,
        class_weights=jnp.asarray(weights),
        task=store.task,
        loss=config.loss.name,
        label_smoothing=config.loss.label_smoothing,
        teachers_weight=config.distill.weight,
        ema_decay=config.ema_decay,
        accumulate=config.optimizer.accumulate,
        axis_name=spread.axis_name,
        augmentation=augmentation,
        window_frames=window,
        gather=spread.gather,
    )
    stacked = config.steps_per_call > 1
    step_function = spread.train_step(
        make_many_steps(one_step) if stacked else one_step,
        resident=clips is not None,
        stacked=stacked,
    )
    score = spread.score_step(make_score_step(module, store.task))
    metric = config.select_metric or _MAIN_METRIC[store.task]
    checkpoints = Checkpoints(workdir / "checkpoints", lower_is_better=metric == "loss")
    norm = normalisation(store, config.data.normalise, clips=config.data.normalise_clips)

    def create() -> TrainState:
        return create_state(
            module,
            optimizer,
            norm,
            seed=config.seed,
            frames=frames,
            bands=store.bands,
            ema=config.ema_decay > 0,
        )

    if config.init_from and not checkpoints.steps():
        state = start_from(
            create(),
            layers,
            config.init_from,
            model=config.model.to_dict(),
            features=store.features,
        )
        state = spread.place_state(state)
    else:
        state = spread.create_state(create)
    targets = None
    if distils(config):
        targets = soft_targets(
            config, store, workdir, spread, None if checkpoints.steps() else teachers
        )
    iterator = train_batches(
        store,
        batch_size=config.batch_size,
        steps=total_steps,
        seed=config.seed,
        crop_frames=config.data.crop_frames,
        window_frames=window if config.augment.time_stretch else 0,
        resident=clips is not None,
        teacher=targets,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
    )
    feed = Feed(iterator, spread, stacked=stacked)
    progress_so_far = _Selection(metric, config.patience)
    step = 0
    if restored := checkpoints.restore_latest(state, feed):
        state, step = restored.value, restored.step
        progress_so_far.load(restored.meta)
        logging.info("going on from step %d of %d", step, total_steps)
    telemetry = Telemetry(workdir, step, total_steps, progress and step < total_steps)
    profiler = Profiler(workdir, profile_steps, range(step, total_steps))
    notes = run_notes(config, store)

    def evaluate() -> dict[str, float]:
        if len(valid_clips) == 0:
            return {}
        scores = score_clips(
            score,
            state.model(),
            store,
            valid_clips,
            batch_size=spread.round_up(config.batch_size),
            crop_frames=config.data.crop_frames,
            chunks=config.data.eval_chunks,
        )
        measures = validation_measures(
            scores, store.targets(valid_clips), store.label_names, store.task
        )
        if metric not in measures:
            raise UserError(
                f"config.select_metric={metric!r} cannot be measured on this validation split; take one of {', '.join(measures)}."
            )
        return measures

    def save(measures: dict[str, float]) -> None:
        checkpoints.save(
            state,
            feed,
            notes | progress_so_far.dump() | {"measure": measures.get(metric)},
            measures.get(metric),
        )

    pending: collections.deque[tuple[int, Any]] = collections.deque()
    seen: list[dict[str, float]] = []

    def settle(keep: int = 0) -> None:
        """Waits for the steps in flight, all but the latest `keep` calls: logs them, and stops at a loss that is no number."""
        while len(pending) > keep:
            first, stack = pending.popleft()
            columns = {name: np.atleast_1d(np.asarray(values)) for name, values in stack.items()}
            for number in range(first, first + len(columns["loss"])):
                values = {name: float(column[number - first]) for name, column in columns.items()}
                if not math.isfinite(values["loss"]):
                    raise UserError(
                        f"{workdir}: the training loss became {values['loss']} at step {number}. The checkpoints before it are "
                        "whole. Try a smaller --config.optimizer.learning_rate, or --config.optimizer.clip_norm=1."
                    )
                seen.append(values)
                if number % config.log_every == 0 or number == total_steps:
                    log(number)

    def log(number: int) -> None:
        means = {name: float(np.mean([values[name] for values in seen])) for name in seen[0]}
        seen.clear()
        telemetry.write(
            number,
            **{f"train_{name}": value for name, value in means.items()},
            learning_rate=float(schedule(number - 1)),
        )
        telemetry.progress(number, loss=means["loss"], **progress_so_far.shown())

    evaluation_steps = epoch_steps * config.eval_every

    def call_steps(step: int) -> int:
        """Steps of the call that begins at `step`: no evaluation lies within one, so a resumed run is cut up alike."""
        return min(
            config.steps_per_call, evaluation_steps - step % evaluation_steps, total_steps - step
        )

    with (
        contextlib.closing(telemetry),
        contextlib.closing(checkpoints),
        contextlib.closing(profiler),
        catch_signals() as signals,
        _all_processes(checkpoints),
    ):
        while step < total_steps and not progress_so_far.exhausted:
            count = call_steps(step)
            for number in range(step, step + count):
                profiler.before(number)
            batch = feed.next(count)
            state, metrics = (
                step_function(state, batch) if clips is None else step_function(state, batch, clips)
            )
            for number in range(step, step + count):
                profiler.after(number, metrics)
            pending.append((step + 1, metrics))
            step += count
            saved = False
            if step < total_steps:
                feed.prepare(call_steps(step))
            if len(pending) >= MOST_STEPS_IN_FLIGHT:
                settle(MOST_STEPS_IN_FLIGHT // 2)
            if step // config.log_every > (step - count) // config.log_every:
                settle()
            if step % evaluation_steps == 0 or step == total_steps:
                settle()
                measures = evaluate()
                if measures:
                    progress_so_far.update(step, measures[metric])
                    telemetry.write(
                        step, **{f"valid_{name}": value for name, value in measures.items()}
                    )
                save(measures)
                saved = True
            if (number_of_signal := signals.received(step)) is not None:
                if not saved:
                    settle()
                    save({})
                checkpoints.wait()
                raise Interrupted(number_of_signal, step)
        checkpoints.wait()
    return TrainResult(
        workdir,
        step,
        progress_so_far.exhausted and step < total_steps,
        metric,
        progress_so_far.last,
        progress_so_far.best,
        progress_so_far.best_step,
        bool(store.dataset["synthetic"]),
    )


def validation_measures(
    scores: np.ndarray, targets: np.ndarray, label_names: tuple[str, ...], task: str
) -> dict[str, float]:
    """Returns the numbers that a run is followed and its best checkpoint chosen by.

    Args:
      scores: probabilities, or a regression's outputs, `[clips, classes]`.
      targets: class numbers `[clips]`, 0/1 tags or numbers `[clips, classes]`.
      label_names: `[classes]`.
      task: "single_label", "multi_label" or "regression".
    """
    names: tuple[str, ...]
    if task == "single_label":
        measured = single_label_metrics(scores, targets, label_names)
        names = ("accuracy", "macro_f1", "macro_roc_auc", "macro_pr_auc")
        loss = measured["nll"]
    elif task == "multi_label":
        measured = multi_label_metrics(scores, targets, label_names)
        names = ("macro_f1", "macro_roc_auc", "macro_pr_auc")
        clipped = np.clip(scores, 1e-7, 1 - 1e-7)
        loss = float(-(targets * np.log(clipped) + (1 - targets) * np.log1p(-clipped)).mean())
    else:
        measured = regression_metrics(scores, targets, label_names)
        names = ("r2", "mse", "correlation")
        loss = measured["mse"]
    return {"loss": loss} | {name: measured[name] for name in names if measured[name] is not None}


class _Selection:
    """Follows the chosen measure: the best so far, and whether patience has run out."""

    def __init__(self, metric: str, patience: int) -> None:
        self._metric = metric
        self._patience = patience
        self._lower = metric == "loss"
        self._since = 0
        self.last: float | None = None
        self.best: float | None = None
        self.best_step: int | None = None

    @property
    def exhausted(self) -> bool:
        """True once `patience` evaluations in a row were no better than the best before them."""
        return 0 < self._patience <= self._since

    def update(self, step: int, value: float) -> None:
        self.last = value
        gain = (
            math.inf
            if self.best is None
            else (self.best - value if self._lower else value - self.best)
        )
        self._since = 0 if gain > 0 else self._since + 1
        if gain >= 0:  # of equals the later is kept, as the checkpoints' policy does
            self.best, self.best_step = value, step

    def shown(self) -> dict[str, float]:
        return {} if self.last is None else {f"valid_{self._metric}": self.last}

    def dump(self) -> dict[str, Any]:
        return {
            "metric": self._metric,
            "lower_is_better": self._lower,
            "selection": {
                "since": self._since,
                "last": self.last,
                "best": self.best,
                "best_step": self.best_step,
            },
        }

    def load(self, meta: dict[str, Any]) -> None:
        saved = meta["selection"]
        self._since, self.last, self.best, self.best_step = (
            saved[k] for k in ("since", "last", "best", "best_step")
        )


def resident_clips(
    spread: Parallel, store: Store, clips: np.ndarray, mode: str
) -> jax.Array | None:
    """Copies clips to every device as they are in the store, float16 `[clips, frames, bands]`; None where they stay on disk.

    Args:
      spread: the devices.
      store: where the clips are.
      clips: which, `[n]`.
      mode: "auto" (where they fit, see `Parallel.has_room`), "always" or "never".

    Raises:
      UserError: they were always to be there, and the memory does not suffice.
    """
    size = 2 * len(clips) * store.layout.frames * store.bands
    if mode == "never" or (mode == "auto" and not spread.has_room(size)):
        return None
    try:
        return jax.block_until_ready(spread.place_whole(store.gather(clips)))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        raise UserError(
            f"config.data.on_device={mode!r}: the {len(clips)} training clips ({size / 2**30:.1f} GiB) do not fit on each device "
            "beside what is there. Set --config.data.on_device=never."
        ) from error


@contextlib.contextmanager
def _all_processes(checkpoints: Checkpoints) -> Iterator[None]:
    """Has nothing wait for a checkpoint that another process has left."""
    try:
        yield
    except Exception as error:
        if is_lost(error):
            checkpoints.abandon()
        raise
