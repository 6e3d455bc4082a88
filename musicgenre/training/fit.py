"""Training and pretraining: from a config and a store to a workdir with checkpoints."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from musicgenre import models
from musicgenre.config import check_config, store_path
from musicgenre.errors import UserError
from musicgenre.runs.workdir import check_store, claim_workdir
from musicgenre.store.store import Store
from musicgenre.training import objectives
from musicgenre.training.loop import Loop
from musicgenre.training.objectives import rbm, simclr, supervised
from musicgenre.training.parallel import Parallel
from musicgenre.training.run import Run


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended: its last step, and the measures of the last and the best checkpoint."""

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
            f"{self.workdir}: trained {self.step} steps{early}; validation {self.metric} "
            f"{self.last:.4f} at the end, best {self.best:.4f} at step {self.best_step}"
        )


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """How pretraining ended: its last step, and the measures at the end of each stage."""

    workdir: Path
    step: int
    measures: tuple[dict[str, float], ...]
    summary: str

    def line(self) -> str:
        """One line for people."""
        return (
            f"{self.workdir}: {self.summary}. "
            f"To fine-tune: musicgenre train --config.init_from={self.workdir}"
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
    """Trains a model on labels. The same call resumes, bit-exact, from the last intact checkpoint.

    Args:
      config: from `musicgenre.config.base_config`.
      workdir: the run's folder; gets `config.json`, `train_clips.json`, `metrics.jsonl` and
        `checkpoints/`, with teachers also `teachers.npy` and `teachers.json`.
      parallel: "jit", "pmap" or "fsdp", see `musicgenre.training.parallel`. A run may resume with
        another one.
      progress: draw a progress bar.
      profile_steps: (first step, count) to trace.
      devices: devices to use; all if None.

    Raises:
      UserError: the config or the store cannot be used, the workdir holds a run with another
        config, or the loss became NaN or infinite.
      Interrupted: SIGINT or SIGTERM came; everything up to it is saved.
    """
    name = supervised.Supervised.name
    loop = _fit(config, Path(workdir), name, parallel, progress, profile_steps, devices)
    chosen, run = loop.selection, loop.run
    early = chosen.exhausted and loop.step < loop.total_steps
    measures = (str(loop.objective.metric), chosen.last, chosen.best, chosen.best_step)
    synthetic = bool(run.store.dataset["synthetic"])
    return TrainResult(run.workdir, loop.step, early, *measures, synthetic)


def pretrain(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    parallel: str = "jit",
    progress: bool = True,
    profile_steps: tuple[int, int] | None = None,
    devices: list[Any] | None = None,
) -> PretrainResult:
    """Trains a network without labels, by the objective `config.pretrain.method`.

    "" is contrastive divergence for the model "rbm", else SimCLR. The checkpoint holds the network
    with a head that is only initialised, for `config.init_from` of `train`. Arguments and errors
    are those of `train`.
    """
    name = config.pretrain.method or (rbm.NAME if config.model.name == "rbm" else simclr.NAME)
    loop = _fit(config, Path(workdir), name, parallel, progress, profile_steps, devices)
    goal = loop.objective
    return PretrainResult(loop.run.workdir, loop.step, goal.measures(), goal.summary(loop.step))


def _fit(
    config: ConfigDict,
    workdir: Path,
    name: str,
    parallel: str,
    progress: bool,
    profile_steps: tuple[int, int] | None,
    devices: list[Any] | None,
) -> Loop:
    """Runs an objective from the last checkpoint to its end."""
    check_config(config)  # imports the user's module, which may register the objective
    objective = objectives.get(name)
    config = config.copy_and_resolve_references()
    config.model = ConfigDict(models.resolve(config.model.to_dict()))
    if not (workdir / "config.json").is_file():
        objectives.check_fields(config, objective)
    if parallel == "pmap" and not objective.pmap:
        raise UserError(
            f"--parallel=pmap: {name} compares all clips of a batch, which pmap cannot do across "
            "devices. Use jit or fsdp."
        )
    store = Store.open(store_path(config))
    check_store(config, store)
    spread = Parallel.create(parallel, devices)
    spread.check_batch_size(config.batch_size)
    goal = objective(Run(config, store, workdir, spread))
    # Keeps `train` with the same config out of the folder, whose checkpoints it cannot read.
    stage = {} if objective.stage == "train" else {"stage": objective.stage}
    claim_workdir(workdir, ConfigDict({**config.to_dict(), **stage}), store, goal.taught_on)
    loop = Loop(goal, progress, profile_steps)
    loop.run_to_end()
    return loop
