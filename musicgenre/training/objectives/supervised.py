"""Learning from labels, and with `config.distill` from teachers' predictions as well."""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from musicgenre.errors import UserError
from musicgenre.evaluation import metrics
from musicgenre.training.augment import Augmentation, window_frames
from musicgenre.training.losses import balanced_weights
from musicgenre.training.objectives import Objective, register
from musicgenre.training.objectives.distillation import NOTES, distils, read_teachers, soft_targets
from musicgenre.training.optimisers import learning_rate_schedule, make_optimizer
from musicgenre.training.run import Run
from musicgenre.training.state import TrainState, create_state
from musicgenre.training.step import StepFunction, make_score_step, make_train_step
from musicgenre.training.transfer import layer_order, layer_rates, start_from

# Each task's metrics, and the names of those that a run is followed by; the first is what the best
# checkpoint is selected by where config.select_metric is empty.
_METRICS: Mapping[str, tuple[Any, tuple[str, ...]]] = {
    "single_label": (
        metrics.single_label_metrics,
        ("accuracy", "macro_f1", "macro_roc_auc", "macro_pr_auc"),
    ),
    "multi_label": (metrics.multi_label_metrics, ("macro_roc_auc", "macro_f1", "macro_pr_auc")),
    "regression": (metrics.regression_metrics, ("r2", "mse", "correlation")),
}


@register("supervised")
class Supervised(Objective):
    """Trains a network on labels: the objective of `musicgenre.training.fit.train`."""

    stage = "train"
    obeys = (
        "augment",
        "init_from",
        "epochs",
        "dtype",
        "optimizer",
        "loss",
        "distill",
        "ema_decay",
        "select_metric",
        "patience",
    )
    ignores = ("pretrain",)

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config, store, optimizer = run.config, run.store, run.config.optimizer
        run.spread.check_batch_size(config.batch_size, optimizer.accumulate)
        for field, value in (("class_weights", "balanced"), ("name", "cross_entropy")):
            if store.task == "regression" and config.loss[field] == value:
                raise UserError(f"config.loss.{field}={value!r} has no meaning for a regression.")
        self._teachers = None
        # A resumed run needs its teachers' predictions, which are saved, and not the teachers.
        if distils(config) and not (run.workdir / NOTES).is_file():
            self._teachers = read_teachers(config, store)
            self.taught_on = [teacher.trained_on for teacher in self._teachers]
        self.metric = config.select_metric or _METRICS[store.task][1][0]
        self._module = run.module()
        self._layers = layer_order(self._module, run.frames, store.bands)
        rates = layer_rates(
            self._layers, bool(config.init_from), optimizer.transferred_rate, optimizer.layer_decay
        )
        self._optimizer = make_optimizer(optimizer, self.stage_steps, rates)
        self._schedule = learning_rate_schedule(optimizer, self.stage_steps)
        self._window = window_frames(run.frames, store.layout.frames, config.augment.time_stretch)
        self._score = run.spread.score_step(make_score_step(self._module, store.task))

    @property
    def stage_steps(self) -> int:
        """Steps of the run."""
        return self.run.epoch_steps * int(self.run.config.epochs)

    def create_state(self, resumes: bool) -> TrainState:
        """Returns a fresh state, or one that starts from the layers of `config.init_from`."""
        config, spread, settings = self.run.config, self.run.spread, self.run.initial()
        settings["ema"] = config.ema_decay > 0
        create = functools.partial(create_state, self._module, self._optimizer, **settings)
        if not config.init_from or resumes:
            return spread.create_state(create)
        model, features = config.model.to_dict(), self.run.store.features
        state = start_from(create(), self._layers, config.init_from, model=model, features=features)
        return spread.place_state(state)

    def batches(self, resident: bool, resumes: bool) -> Any:
        """Returns the iterator over training batches."""
        targets = None
        if distils(self.run.config):
            targets = soft_targets(self.run, None if resumes else self._teachers)
        window = self._window if self.run.config.augment.time_stretch else 0
        return self.run.batches(self.stage_steps, resident, window_frames=window, teacher=targets)

    def step(self, stage: int) -> StepFunction:
        """Returns the training step."""
        config, store, spread = self.run.config, self.run.store, self.run.spread
        weights = np.ones(len(store.label_names), np.float32)
        if config.loss.class_weights == "balanced":
            weights = balanced_weights(store.targets(self.run.clips), len(store.label_names))
        return make_train_step(
            self._module,
            self._optimizer,
            seed=config.seed,
            class_weights=jnp.asarray(weights),
            task=store.task,
            loss=config.loss.name,
            label_smoothing=config.loss.label_smoothing,
            teachers_weight=config.distill.weight,
            ema_decay=config.ema_decay,
            accumulate=config.optimizer.accumulate,
            axis_name=spread.axis_name,
            augmentation=Augmentation.from_config(config, self.run.frames),
            window_frames=self._window,
            gather=spread.gather,
        )

    def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """Returns the validation measures."""
        store = self.run.store
        if "valid" not in store.splits:
            return {}
        clips = store.indices("valid")
        scores = self.run.scores(self._score, state.model(), clips)
        return validation_measures(scores, store.targets(clips), store.label_names, store.task)

    def rows(
        self, step: int, means: dict[str, float], measures: dict[str, float]
    ) -> list[dict[str, float]]:
        """Returns a row of training metrics and one of validation measures."""
        train = {f"train_{name}": value for name, value in means.items()}
        if train:
            train["learning_rate"] = float(self._schedule(step - 1))
        return [train, {f"valid_{name}": value for name, value in measures.items()}]


def validation_measures(
    scores: np.ndarray, targets: np.ndarray, label_names: tuple[str, ...], task: str
) -> dict[str, float]:
    """Returns the measures that a run is followed by.

    `scores` are probabilities, or a regression's outputs, `[clips, classes]`; `targets` class
    numbers `[clips]`, or 0/1 tags or numbers `[clips, classes]`.
    """
    measure, names = _METRICS[task]
    measured = measure(scores, targets, label_names)
    if task == "multi_label":
        clipped = np.clip(scores, 1e-7, 1 - 1e-7)
        loss = float(-(targets * np.log(clipped) + (1 - targets) * np.log1p(-clipped)).mean())
    else:
        loss = measured["nll" if task == "single_label" else "mse"]
    return {"loss": loss} | {name: measured[name] for name in names if measured[name] is not None}
