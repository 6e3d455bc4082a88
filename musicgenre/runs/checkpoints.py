"""Checkpoints with Orbax: the latest two and the best, each with all that is needed to go on or to be used."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import grain.checkpoint
import grain.python as grain_python
import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from musicgenre.errors import UserError
from musicgenre.runs.processes import ProcessLost, is_lost

# What one step holds: the model (variables and normalisation, enough to use it), the rest of the state, the Grain iterator,
# and notes as JSON (config, labels, features, measures).
ITEMS = ("model", "train", "data", "meta")


class State(Protocol):
    """What a run changes: `musicgenre.training.state.TrainState`."""

    @property
    def step(self) -> Any:
        """Steps done."""
        ...

    def model(self) -> dict[str, Any]:
        """Returns what is needed to use the model."""
        ...

    def rest(self) -> dict[str, Any]:
        """Returns what resuming needs besides the model."""
        ...

    def joined(self, model: dict[str, Any], rest: dict[str, Any]) -> Any:
        """Returns the state whose `model()` and `rest()` these are."""
        ...


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint gave back: the state (or the model alone) and the notes saved with it."""

    step: int
    value: Any
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, below `<workdir>/checkpoints`.

    Args:
      folder: where they lie.
      lower_is_better: how the measure that the best is chosen by is to be read.
    """

    def __init__(self, folder: Path, *, lower_is_better: bool = False) -> None:
        self._folder = folder.absolute()
        self._lower_is_better = lower_is_better
        self._abandoned = False
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        def measure(metrics: Any) -> float:
            return float(metrics["measure"])

        mode = "min" if self._lower_is_better else "max"
        # Two of the latest: should one be cut short, the one before is there.
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(n=2),
                checkpoint_managers.BestN(
                    n=1,
                    get_metric_fn=measure,
                    reverse=self._lower_is_better,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=measure,
            best_mode=mode,
            preservation_policy=policy,
            create=True,
            cleanup_tmp_directories=True,
        )
        return ocp.CheckpointManager(self._folder, options=options, item_names=ITEMS)

    def save(
        self, state: State, iterator: Any, meta: dict[str, Any], measure: float | None
    ) -> None:
        """Saves a step in the background.

        Args:
          state: the state after the step.
          iterator: Grain's iterator at the same place.
          meta: JSON values.
          measure: what the best checkpoint is chosen by; None where there is no validation split.

        Raises:
          UserError: an earlier save failed (the disk is full, say); what was saved before is whole.
        """
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(state.model()),
            train=ocp.args.StandardSave(state.rest()),
            data=grain.checkpoint.CheckpointSave(iterator),
            meta=ocp.args.JsonSave(meta),
        )
        try:
            self._manager.save(
                int(state.step),
                args=items,
                metrics=None if measure is None else {"measure": measure},
                force=True,
            )
        except (OSError, ValueError) as error:
            raise self._save_failed(error) from error

    def wait(self) -> None:
        """Waits until everything is on disk. Raises UserError where that failed."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._save_failed(error) from error

    def abandon(self) -> None:
        """Has `close` not wait for a save that is under way: the other processes, which have a part in it, are gone."""
        self._abandoned = True

    def close(self) -> None:
        """Waits and releases the manager's threads."""
        if self._abandoned:
            return
        self.wait()
        self._manager.close()

    def steps(self) -> list[int]:
        """Returns the steps that are on disk, in order."""
        return sorted(self._manager.all_steps())

    def restore_latest(self, state: State, iterator: Any) -> Restored | None:
        """Restores the latest checkpoint that can be read.

        One that cannot is moved to `<workdir>/damaged/`, with a warning, and the one before is tried.

        Args:
          state: a state of the same shape, placed on the devices as the restored one is to be.
          iterator: Grain's iterator, set to the place of the checkpoint.

        The checkpoint may be of another number of devices or processes, and of another `--parallel`.

        Returns:
          The state and notes, or None where no checkpoint is there.

        Raises:
          UserError: there are checkpoints, but none of them can be read.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, (state.model(), state.rest()))
        steps = self.steps()
        for step in reversed(steps):
            try:
                items = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        model=ocp.args.StandardRestore(abstract[0]),
                        train=ocp.args.StandardRestore(abstract[1]),
                        meta=ocp.args.JsonRestore(),
                    ),
                )
                _restore_iterator(self._folder / str(step) / "data", iterator)
            except (
                Exception
            ) as error:  # Orbax and TensorStore raise many kinds for a file that is cut short.
                self._set_aside(step, error)
                continue
            return Restored(step, state.joined(items.model, items.train), items.meta)
        if steps:
            raise UserError(
                f"{self._folder}: none of the checkpoints ({', '.join(map(str, steps))}) can be read; they were "
                f"moved to {self._folder.parent / 'damaged'}. Train again in another --workdir."
            )
        return None

    def _set_aside(self, step: int, error: Exception) -> None:
        damaged = self._folder.parent / "damaged"
        damaged.mkdir(exist_ok=True)
        target = damaged / str(step)
        number = 1
        while target.exists():
            number += 1
            target = damaged / f"{step}-{number}"
        logging.warning(
            "the checkpoint of step %d cannot be read (%s); it is moved to %s and the one before is tried",
            step,
            _first_line(error),
            target,
        )
        self._manager.close()
        if jax.process_index() == 0:
            shutil.move(self._folder / str(step), target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("a damaged checkpoint is set aside")
        self._manager = self._open()

    def _save_failed(self, error: Exception) -> UserError:
        if is_lost(error):
            return ProcessLost(error)
        return UserError(
            f"{self._folder}: the checkpoint could not be written ({_first_line(error)}). Free some space and run "
            "the same command again: it goes on from the last whole checkpoint."
        )


def _restore_iterator(folder: Path, iterator: Any) -> None:
    """Sets an iterator to the place that Grain saved: it is the same on every process, of however many there were."""
    text = min(folder.glob("process_*-of-*.json")).read_bytes()
    iterator.set_state(
        json.loads(text) if isinstance(iterator, grain_python.DatasetIterator) else text
    )
    iterator.start_prefetch()


def read_model(
    folder: Path, which: str, abstract_model: Callable[[dict[str, Any]], Any]
) -> Restored:
    """Reads the model alone out of a run's checkpoint.

    Args:
      folder: `<workdir>/checkpoints`.
      which: "best", "last" or a step as a number. Should the last one be unreadable, the one before is taken, with a
        warning.
      abstract_model: the notes of a checkpoint -> the shapes of its `TrainState.model()`.

    Returns:
      The step, the model (`variables` and `norm`) and the notes.

    Raises:
      UserError: no checkpoint is there, not this one, or it cannot be read.
    """
    steps = (
        sorted((int(path.name) for path in folder.glob("*") if path.name.isdigit()), reverse=True)
        if folder.is_dir()
        else []
    )
    if not steps:
        raise UserError(
            f"{folder.parent}: no checkpoint found there. Train first: "
            f"experiments/train.py --config=... --workdir={folder.parent}"
        )
    options = ocp.CheckpointManagerOptions(create=False)
    manager = ocp.CheckpointManager(folder.absolute(), options=options, item_names=ITEMS)
    try:
        metas: dict[int, dict[str, Any]] = {}
        for step in steps:
            try:
                metas[step] = manager.restore(
                    step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
                ).meta
            except Exception as error:  # see restore_latest
                logging.warning(
                    "the checkpoint of step %d cannot be read (%s)", step, _first_line(error)
                )
        for step in _candidates(which, metas):
            try:
                target = jax.tree.map(ocp.utils.to_shape_dtype_struct, abstract_model(metas[step]))
                items = manager.restore(
                    step, args=ocp.args.Composite(model=ocp.args.StandardRestore(target))
                )
                return Restored(step, items.model, metas[step])
            except UserError:
                raise
            except Exception as error:  # see restore_latest
                logging.warning(
                    "the checkpoint of step %d cannot be read (%s)", step, _first_line(error)
                )
    finally:
        manager.close()
    raise UserError(
        f"{folder}: no readable checkpoint {which!r}. There are the steps {', '.join(map(str, sorted(steps)))}; use 'last', "
        "'best' (where a validation split was measured) or one of them."
    )


def _candidates(which: str, metas: dict[int, dict[str, Any]]) -> list[int]:
    """Returns the steps that `which` can mean, the preferred one first."""
    if which == "last":
        return sorted(metas, reverse=True)
    if which == "best":
        measured = [
            (meta["measure"] * (-1 if meta["lower_is_better"] else 1), step)
            for step, meta in metas.items()
            if meta["measure"] is not None
        ]
        return [max(measured)[1]] if measured else []
    return [step for step in metas if str(step) == which]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
