"""Objectives: what a run learns from. The loop itself is `musicgenre.training.loop`.

Three come with this package: `supervised` (labels, and teachers where there are any), `simclr` and
`contrastive_divergence`. A module of your own adds one for `config.pretrain.method`:

    @register("masked")
    class Masked(Objective):
        ...
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from ml_collections import ConfigDict

from musicgenre.config import base_config, flatten
from musicgenre.errors import UserError, did_you_mean
from musicgenre.registry import Registry
from musicgenre.runs.provenance import TrainedOn
from musicgenre.training.run import Run
from musicgenre.training.state import TrainState
from musicgenre.training.step import StepFunction

# Sections and fields that the loop and the store obey, whatever the objective.
COMMON = (
    "seed",
    "module",
    "data",
    "features",
    "model",
    "batch_size",
    "eval_every",
    "log_every",
    "steps_per_call",
)
_OBJECTIVES: Registry[type["Objective"]] = Registry("objective", "musicgenre.objectives")
T = TypeVar("T", bound="Objective")


class Objective(abc.ABC):
    """One way of learning. An instance belongs to one run.

    Of the config fields that a class does not obey, only those in `ignores`, which belong to the
    other command and may come in the same file, may differ from their defaults.

    Attributes:
      name: its name in the registry.
      stage: "train" or "pretrain".
      obeys: sections and fields of the config in addition to `COMMON`.
      ignores: sections and fields of the other command.
      refuses: fields, within those that it obeys, that it cannot honour, each with the reason.
      fields: its own fields in `config.pretrain`, with their defaults.
      pmap: `--parallel=pmap` is possible.
      stages: how many there are, each with its own step function.
      watched: the metric that ends the run if it becomes NaN or infinite.
      remedy: what to set then, after "a smaller".
      metric: the measure that the best checkpoint is selected by; None selects none.
      compared: the measure, and whether lower is better, that notes name if `metric` is None.
      taught_on: what the teachers of a new run were trained on, for its record.
      progress: measures so far, JSON values that checkpoints save.
    """

    name: ClassVar[str] = ""
    stage: ClassVar[str] = "pretrain"
    obeys: ClassVar[tuple[str, ...]] = ()
    ignores: ClassVar[tuple[str, ...]] = ()
    refuses: ClassVar[Mapping[str, str]] = {}
    fields: ClassVar[Mapping[str, Any]] = {}
    pmap: ClassVar[bool] = True
    watched: ClassVar[str] = "loss"
    remedy: ClassVar[str] = "--config.optimizer.learning_rate, or --config.optimizer.clip_norm=1"
    stages: int = 1
    metric: str | None = None
    compared: ClassVar[tuple[str, bool]] = ("loss", True)
    taught_on: Sequence[TrainedOn] = ()
    progress: Any = None

    def __init__(self, run: Run) -> None:
        self.run = run

    @property
    def stage_steps(self) -> int:
        """Steps of each stage; by default, `config.pretrain.epochs` of them."""
        return self.run.epoch_steps * int(self.run.config.pretrain.epochs)

    @abc.abstractmethod
    def create_state(self, resumes: bool) -> TrainState:
        """Returns the first state on the devices; with `resumes`, only its shapes matter."""

    @abc.abstractmethod
    def batches(self, resident: bool, resumes: bool) -> Any:
        """Returns Grain's iterator, of clip numbers alone where the clips are `resident`."""

    @abc.abstractmethod
    def step(self, stage: int) -> StepFunction:
        """Returns the pure step of a stage: `(state, batch[, clips]) -> (state, metrics)`."""

    @abc.abstractmethod
    def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """Measures a state after `step`; the result is empty without a validation split."""

    def logs(self, step: int) -> bool:
        """Returns whether the means of the metrics so far are written after a step."""
        return step % self.run.config.log_every == 0 or step % self.stage_steps == 0

    def evaluates(self, step: int) -> bool:
        """Returns whether a step is followed by an evaluation and a checkpoint."""
        epochs = self.run.epoch_steps * self.run.config.eval_every
        return step % epochs == 0 or step % self.stage_steps == 0

    @abc.abstractmethod
    def rows(
        self, step: int, means: dict[str, float], measures: dict[str, float]
    ) -> list[dict[str, float]]:
        """Notes how a step went, and returns its rows of `metrics.jsonl`.

        `means` are those of the metrics since the last such step, empty where `logs` is False;
        `measures` are from `evaluate`, empty where the step is not evaluated.
        """

    def epoch_line(self, step: int) -> str:
        """Returns a line to print after a logged step; "" prints none."""
        return ""

    def measures(self) -> tuple[dict[str, float], ...]:
        """Returns the measures at the end of each stage so far."""
        return tuple(self.progress or ())

    def summary(self, step: int) -> str:
        """Returns how pretraining went, for people."""
        return f"pretrained in {step} steps"


def register(name: str) -> Callable[[type[T]], type[T]]:
    """Returns a class decorator that makes an objective available as `config.pretrain.method`."""

    def add(cls: type[T]) -> type[T]:
        cls.name = name
        _OBJECTIVES.add(name, cls)
        return cls

    return add


def get(name: str) -> type[Objective]:
    """Returns an objective by name. Raises UserError where there is none."""
    return _OBJECTIVES.get(name)


def check_fields(config: ConfigDict, objective: type[Objective]) -> None:
    """Raises UserError for a field off its default that an objective does not obey."""
    defaults = dict(flatten(base_config()))
    own = {f"pretrain.{name}" for name in objective.fields}
    known = (*COMMON, *objective.obeys, *objective.ignores, *own)
    for name, value in flatten(config):
        if name in defaults and value == defaults[name]:
            continue
        if name in objective.refuses:
            raise UserError(f"config.{name}={value!r}: {objective.refuses[name]}")
        if name not in defaults and name.startswith("pretrain.") and name not in own:
            raise UserError(
                f"config.{name} is not a field of the objective {objective.name!r}."
                + did_you_mean(name, [*own, *(n for n in defaults if n.startswith("pretrain."))])
            )
        if not any(name == field or name.startswith(f"{field}.") for field in known):
            raise UserError(
                f"config.{name}={value!r} has no effect on the objective {objective.name!r}: "
                f"leave it at {defaults.get(name)!r}."
            )
