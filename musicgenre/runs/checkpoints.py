"""Orbax checkpoints: the latest two and the best, each complete enough to resume or to be used."""

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import grain.checkpoint
import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from musicgenre.errors import UserError
from musicgenre.runs.notes import saved_shapes
from musicgenre.runs.processes import ProcessLost, is_lost

# The model (variables and normalisation), the rest of the state, the Grain iterator, JSON notes.
ITEMS = ("model", "train", "data", "meta")


class Restored(NamedTuple):
    """A restored checkpoint: its step, the state (or the model alone), and its notes."""

    step: int
    value: Any
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: `<workdir>/checkpoints`.
      lower_is_better: the best checkpoint has the lowest measure.
    """

    def __init__(self, folder: Path, *, lower_is_better: bool = False) -> None:
        def measure(metrics: Any) -> float:
            return float(metrics["measure"])

        # Two of the latest: if one is damaged, the one before it can be restored.
        latest = checkpoint_managers.LatestN(n=2)
        best = checkpoint_managers.BestN(
            n=1,
            get_metric_fn=measure,
            reverse=lower_is_better,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=measure,
            best_mode="min" if lower_is_better else "max",
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([latest, best]),
            create=True,
            cleanup_tmp_directories=True,
        )
        self._folder = folder.absolute()
        self._abandoned = False
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=ITEMS)

    def save(self, state: Any, iterator: Any, meta: dict[str, Any], measure: float | None) -> None:
        """Saves a `TrainState`, a Grain iterator and JSON values in the background.

        `measure` selects the best checkpoint; it is None without a validation split.

        Raises:
          UserError: an earlier save failed, such as on a full disk; older checkpoints are intact.
        """
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(state.model()),
            train=ocp.args.StandardSave(state.rest()),
            data=grain.checkpoint.CheckpointSave(iterator),
            meta=ocp.args.JsonSave(meta),
        )
        metrics = None if measure is None else {"measure": measure}
        with self._writing():
            self._manager.save(int(state.step), args=items, metrics=metrics, force=True)

    def wait(self) -> None:
        """Waits until everything is on disk. Raises UserError if that failed."""
        with self._writing():
            self._manager.wait_until_finished()

    def abandon(self) -> None:
        """Makes `close` abandon a pending save, because a peer process has died."""
        self._abandoned = True

    def close(self) -> None:
        """Waits and releases the manager's threads."""
        if not self._abandoned:
            self.wait()
            self._manager.close()

    def steps(self) -> list[int]:
        """Returns the steps on disk in ascending order."""
        return sorted(self._manager.all_steps())

    def restore_latest(self, state: Any, iterator: Any) -> Restored | None:
        """Returns the latest readable checkpoint, or None if there is no checkpoint.

        Unreadable ones are moved to `<workdir>/damaged/` with a warning. The number of devices and
        processes and `--parallel` may differ from those of the saving run.

        Args:
          state: a state of the same shapes, with the placement that the restored one should have.
          iterator: the Grain iterator; it is set to the checkpoint's position.

        Raises:
          UserError: there are checkpoints, but none can be read.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, (state.model(), state.rest()))
        steps = self.steps()
        for step in reversed(steps):
            items = ocp.args.Composite(
                model=ocp.args.StandardRestore(abstract[0]),
                train=ocp.args.StandardRestore(abstract[1]),
                meta=ocp.args.JsonRestore(),
            )
            try:
                restored = self._manager.restore(step, args=items)
                # The iterator's position is the same on every process.
                saved = (self._folder / str(step) / "data").glob("process_*-of-*.json")
                text = min(saved).read_bytes()
                decoded = isinstance(iterator, grain.DatasetIterator)
                iterator.set_state(json.loads(text) if decoded else text)
                iterator.start_prefetch()
            except Exception as error:  # Orbax and TensorStore raise many types for damaged files
                self._set_aside(step, error)
                continue
            return Restored(step, state.joined(restored.model, restored.train), restored.meta)
        if steps:
            names = ", ".join(map(str, steps))
            raise UserError(
                f"{self._folder}: none of the checkpoints ({names}) can be read; they are now in "
                f"{self._folder.parent / 'damaged'}. Train again in another --workdir."
            )
        return None

    def _set_aside(self, step: int, error: Exception) -> None:
        damaged = self._folder.parent / "damaged"
        damaged.mkdir(exist_ok=True)
        names = itertools.chain([str(step)], (f"{step}-{number}" for number in itertools.count(2)))
        target = next(damaged / name for name in names if not (damaged / name).exists())
        _warn_unreadable(step, error, f"; it is moved to {target} and the one before is tried")
        if jax.process_index() == 0:
            shutil.move(self._folder / str(step), target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("a damaged checkpoint is set aside")
        self._manager.reload()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if is_lost(error):
                raise ProcessLost(error) from error
            raise UserError(
                f"{self._folder}: the checkpoint could not be written ({_line(error)}). Free "
                "some space and repeat the command: it resumes from the last complete checkpoint."
            ) from error


def read_model(folder: Path, which: str) -> Restored:
    """Reads only the model (`variables` and `norm`) from a checkpoint in `<workdir>/checkpoints`.

    `which` is "best", "last" or a step. If the last one is unreadable, the one before it is read,
    with a warning.

    Raises:
      UserError: there is no such checkpoint, or it cannot be read.
    """
    steps = sorted((int(p.name) for p in folder.glob("*") if p.name.isdigit()), reverse=True)
    if not steps:
        raise UserError(
            f"{folder.parent}: no checkpoint found there. Train first: "
            f"musicgenre train --config=... --workdir={folder.parent}"
        )
    options = ocp.CheckpointManagerOptions(create=False)
    metas: dict[int, dict[str, Any]] = {}
    with ocp.CheckpointManager(folder.absolute(), options=options, item_names=ITEMS) as manager:

        def restored(step: int, **items: Any) -> Any:
            try:
                return manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:  # see restore_latest
                _warn_unreadable(step, error)

        for step in steps:
            if items := restored(step, meta=ocp.args.JsonRestore()):
                metas[step] = items.meta
        for step in _candidates(which, metas):
            shapes = ocp.args.StandardRestore(saved_shapes(metas[step]))
            if items := restored(step, model=shapes):
                return Restored(step, items.model, metas[step])
    raise UserError(
        f"{folder}: no readable checkpoint {which!r}. There are the steps "
        f"{', '.join(map(str, steps[::-1]))}, 'last', and 'best' if a measure was taken."
    )


def _candidates(which: str, metas: dict[int, dict[str, Any]]) -> list[int]:
    """Returns the steps that `which` can mean, the preferred one first."""
    if which == "last":
        return sorted(metas, reverse=True)
    if which != "best":
        return [step for step in metas if str(step) == which]
    measured = [
        (meta["measure"] * (-1 if meta["lower_is_better"] else 1), step)
        for step, meta in metas.items()
        if meta["measure"] is not None
    ]
    return [max(measured)[1]] if measured else []


def _warn_unreadable(step: int, error: Exception, action: str = "") -> None:
    logging.warning("the checkpoint of step %d cannot be read (%s)%s", step, _line(error), action)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
