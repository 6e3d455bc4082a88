"""A run's folder: which run owns it, its training clips, and how a signal ends the run."""

import contextlib
import json
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from musicgenre import models
from musicgenre.config import completed, differences, feature_spec, to_plain
from musicgenre.errors import UserError
from musicgenre.files import read_json, write_json, write_text
from musicgenre.runs.model import training_clips
from musicgenre.runs.provenance import CLIPS_FILE, TrainedOn, clips_of, joined
from musicgenre.store.store import Store


class Interrupted(Exception):
    """A signal ended the run after a checkpoint; `signal_number` says which."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} after step {step}; "
            "the same command resumes from there"
        )
        self.signal_number = signal_number


def check_store(config: ConfigDict, store: Store) -> None:
    """Raises UserError if the store was not prepared with the config's front end and frames."""
    wanted = feature_spec(config)
    if lines := differences(store.features.to_dict(), wanted.to_dict()):
        raise UserError(
            f"{store.path}: the store's features are not the config's (store -> config): "
            f"{'; '.join(lines)}. Prepare another store, or change --config.features."
        )
    if (frames := store.layout.frames) != config.data.frames:
        needed = f"config.data.frames is {config.data.frames}"
        raise UserError(f"{store.path}: the store has {frames} frames per clip, {needed}.")


def claim_workdir(
    workdir: Path, config: ConfigDict, store: Store, teachers: Iterable[TrainedOn] = ()
) -> None:
    """Claims a folder for a run: records its config, training clips and its teachers' clips.

    Raises:
      UserError: the folder holds another run, or the model of `config.init_from` cannot be read.
    """
    plain = to_plain(config)
    path = workdir / "config.json"
    own = clips_of(store, store.indices("train"))
    if path.is_file():
        there = completed(read_json(path, "run configuration"))
        if there["model"].get("name") == plain["model"]["name"]:
            # Fields that the network has gained since then are at their defaults.
            named = {name: plain["model"][name] for name in ("name", "module")}
            there["model"] = to_plain(ConfigDict(models.resolve(named))) | there["model"]
        if changed := differences(there, plain):
            raise UserError(
                f"{workdir}: holds a run with another config (there -> now): {'; '.join(changed)}. "
                "Choose another --workdir, or resume with the same config."
            )
        trained = read_json(workdir / CLIPS_FILE, "list of training clips")
        if (trained["clip_id"], trained["sha256"]) != (own.clip_ids, own.hashes):
            text = "the store's training clips have changed since this run began"
            raise UserError(f"{workdir}: {text}. Choose another --workdir.")
        return
    record = own.to_json() | {"store": own.sources[0]}
    known = set(own.clip_ids)
    if config.init_from:  # the audit counts what the other model has learnt from, too
        before = training_clips(config.init_from, field="config.init_from")
        record["init_from"] = joined([before], known).to_json()
    if others := list(teachers):
        record["teachers"] = joined(others, known).to_json()
    if jax.process_index() == 0:
        # On one line: indenting a million clips takes longer than all the rest.
        write_text(workdir / CLIPS_FILE, json.dumps(record, ensure_ascii=False) + "\n")
        write_json(path, plain)


class _Signals:
    """Remembers the first SIGINT or SIGTERM. On several processes all stop at the same step."""

    def __init__(self) -> None:
        self._number: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self._number is not None:
            raise KeyboardInterrupt  # a second signal does not wait for the checkpoint
        self._number = number

    def received(self, step: int) -> int | None:
        if jax.process_count() > 1:
            # Orbax and JAX agree on this, so all processes save at the same step.
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
        return self._number


@contextlib.contextmanager
def catch_signals() -> Iterator[_Signals]:
    """Catches SIGINT and SIGTERM while the loop runs in the main thread of a single process."""
    signals = _Signals()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield signals
        return
    numbers = signal.SIGINT, signal.SIGTERM
    before = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
