"""Clips to a spectrogram store on several machines, with an Apache Beam pipeline.

The machine that starts the job assigns the clips to shards. Workers compute complete shards and
write them into the store's folder. At the end the first machine checks every new shard and writes
the manifest. The store is byte-identical to that of `prepare_store`, and a run that died resumes
from the existing shards.

All machines must see the sound files and the store under the same paths (NFS, say). Object stores
(gs://, s3://) must be mounted as folders. Only one run at a time may write a store: cancel a job
that is still running before starting the command again.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import json
import logging
import os
import re
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from musicgenre.audio.features import FeatureSpec
from musicgenre.audio.layout import ClipLayout
from musicgenre.datasets.base import Clip, Dataset
from musicgenre.errors import UserError, did_you_mean
from musicgenre.files import replacing
from musicgenre.store.prepare import (
    CLIPS_PER_SHARD,
    PrepareSummary,
    Recipe,
    ShardTask,
    StorePlan,
    finished_shard,
    one_thread,
    progress_bar,
    write_shard,
)

# Beam's flags by default: two processes on this machine.
LOCAL_FLAGS = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")
# Beam's counters, in this namespace: clips_computed, clips_skipped, shards_written, shards_found.
NAMESPACE = "musicgenre.prepare"
# Packages whose versions may change the bytes.
_PACKAGES = ("musicgenre", "librosa", "numpy", "scipy", "soundfile", "soxr")
_LOCAL_RUNNERS = ("", "direct", "switchingdirect", "bundlebaseddirect", "fnapi")
_POLL_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """What all tasks of a job have in common.

    Attributes:
      recipe: how clips become rows.
      shards: the folder of the shards, an absolute path.
      versions: of the packages that determine the bytes, on the machine that starts the job.
      unreadable: ids of clips whose files that machine cannot read.
    """

    recipe: Recipe
    shards: Path
    versions: dict[str, str]
    unreadable: frozenset[str] = frozenset()


def prepare_store_beam(
    dataset: Dataset,
    spec: FeatureSpec,
    layout: ClipLayout,
    path: str | Path,
    beam_flags: Sequence[str] = (),
    *,
    min_seconds: float = 1.0,
    array_layout: str = "mel_time",
    clips_per_shard: int = CLIPS_PER_SHARD,
    progress: bool = True,
    verify: bool = True,
) -> PrepareSummary:
    """Writes or updates the store of a data set with the workers of a Beam runner.

    Args:
      dataset: the clips; their paths must be absolute unless the runner is Beam's local one.
      spec: the front end.
      layout: frames per clip, padding and excerpt.
      path: the store's folder, visible to all workers under this path; created if missing.
      beam_flags: the runner and its options as Beam's flags, `--name=value`; by default two local
        processes.
      min_seconds: as for `prepare_store`, like the other options.
      array_layout: order of the axes of array files.
      clips_per_shard: clips per shard; only the default gives the shards of `prepare_store`.
      progress: draw a progress bar of the finished shards.
      verify: compare existing shards with their checksums.

    Raises:
      UserError: as `prepare_store`; also if Apache Beam is not installed, a flag is wrong, a path
        is not in a shared folder, or the job failed. Finished shards are kept.
    """
    _import_beam()
    options, local = _options(beam_flags or LOCAL_FLAGS)
    if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):
        raise UserError(
            f"{path}: the store must be a folder that all workers see; object stores are not "
            "supported. Mount it, or choose a shared folder with --config.data.store=..."
        )
    relative = [clip.path for clip in dataset.clips if not clip.path.is_absolute()]
    if relative and not local:
        raise UserError(
            f"{relative[0]}: a relative path means another file on another machine. Give "
            "--config.data.root (in a CSV file, the column path) as an absolute path."
        )
    recipe = Recipe(spec, layout, array_layout, min_seconds)
    plan = StorePlan(dataset, recipe, path, verify=verify, progress=progress)
    # A function, since all tasks of a large data set at once would fill the memory.
    tasks = functools.partial(plan.tasks, clips_per_shard, fill_gaps=True)
    if plan.todo:
        with progress_bar(plan, progress) as bar, _followed(plan.shards, tasks(), bar):
            _run(plan, tasks(), options)
        _collect(plan, tasks)
    return plan.finish()


def write_shards(pipeline: Any, todo: Path, job: ShardJob) -> Any:
    """Adds the steps to a Beam pipeline: read the tasks, distribute them, write a shard for each.

    Args:
      pipeline: the `beam.Pipeline`.
      todo: a file with one task per line, as `task_to_json` writes it. Tasks travel through the
        shuffle, not in the job's graph, whose size runners limit.
      job: what all tasks have in common.

    Returns:
      A PCollection of shard numbers.
    """
    beam = _import_beam()
    return (
        pipeline
        | "Name the list" >> beam.Create([str(todo)])
        | "Read the list" >> beam.FlatMap(_read_lines)
        | "Spread" >> beam.Reshuffle()
        | "Write shards" >> beam.Map(make_shard, job)
    )


def make_shard(line: str, job: ShardJob) -> int:
    """Computes and writes the shard of one task, in a worker. An existing, intact shard is kept.

    Args:
      line: the task, from `task_to_json`.
      job: what all tasks have in common.

    Returns:
      The shard's number.

    Raises:
      UserError: this worker has other package versions, does not see the files, or cannot write.
    """
    from apache_beam.metrics import Metrics

    task = task_from_json(line)
    if finished_shard(job.shards, task, job.recipe.made_with) is not None:
        Metrics.counter(NAMESPACE, "shards_found").inc()
        return task.number
    _check_worker(task, job)
    with one_thread():
        results = [job.recipe(clip) for clip in task.clips]
    write_shard(job.shards, task, results, job.recipe.made_with)
    skipped = sum(isinstance(result, str) for result in results)
    Metrics.counter(NAMESPACE, "clips_skipped").inc(skipped)
    Metrics.counter(NAMESPACE, "clips_computed").inc(len(results) - skipped)
    Metrics.counter(NAMESPACE, "shards_written").inc()
    return task.number


def task_to_json(task: ShardTask) -> str:
    """Returns a task as one line of ASCII."""
    clips = [vars(clip) | {"path": str(clip.path)} for clip in task.clips]
    return json.dumps([task.number, clips, task.sources])


def task_from_json(line: str) -> ShardTask:
    """Returns the task of `task_to_json`'s line."""
    number, clips, sources = json.loads(line)
    convert = {"path": Path, "labels": tuple, "values": tuple}
    fields = ({k: convert.get(k, lambda v: v)(v) for k, v in clip.items()} for clip in clips)
    return ShardTask(number, tuple(Clip(**each) for each in fields), tuple(sources))


def package_versions() -> dict[str, str]:
    """Returns the versions of the packages that determine the store's bytes."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _import_beam() -> ModuleType:
    root = logging.getLogger()
    level = root.level
    try:
        # Hides the warning that Google's clients are missing; only Beam's own sources need them.
        root.setLevel(logging.ERROR)
        import apache_beam
    except ImportError as error:
        raise UserError(
            f"Apache Beam cannot be imported ({error}). Install it with pip install "
            "'musicgenre[scale]', or run musicgenre prepare, which uses all cores of this machine."
        ) from error
    finally:
        root.setLevel(level)
    return apache_beam


def _options(flags: Sequence[str]) -> tuple[Any, bool]:
    """Returns Beam's options, and whether the runner is the local one.

    Raises:
      UserError: a flag is not written `--name=value`, has a wrong value, or is unknown to the local
        runner. Other runners may know more flags, so Beam judges these.
    """
    from apache_beam.options import pipeline_options as beam_options

    for flag in flags:
        if not flag.startswith("--") or flag == "--":
            raise UserError(
                f"unexpected argument {flag!r}: Beam's flags follow after -- and are written "
                "--name=value."
            )
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            options = beam_options.PipelineOptions(list(flags))
            given = options.get_all_options(retain_unknown_options=True)
    except SystemExit:
        reason = printed.getvalue().strip().rpartition("error: ")[2]
        raise UserError(f"Beam's flags cannot be used: {reason}.") from None
    runner = str(options.view_as(beam_options.StandardOptions).runner or "").rpartition(".")[2]
    if runner.lower().removesuffix("runner") not in _LOCAL_RUNNERS:
        return options, False
    known = beam_options.PipelineOptions([]).get_all_options()
    for name in sorted(given.keys() - known.keys()):
        hint = did_you_mean(name, ["runner", *(n for n in known if n.startswith("direct_"))])
        raise UserError(f"--{name} is not a flag of Beam's local runner.{hint}")
    # Otherwise DirectRunner tries to download another runner, which lacks --direct_num_workers.
    options.view_as(beam_options.TypeOptions).allow_unsafe_triggers = True
    # Worker processes would print a dozen lines each; failures are raised here anyway.
    worker = options.view_as(beam_options.WorkerOptions)
    worker.default_sdk_harness_log_level = worker.default_sdk_harness_log_level or "CRITICAL"
    return options, True


def _watch_local_workers() -> None:
    """Ends a local run whose worker process dies or is stopped at its start, unlike Beam."""
    from apache_beam.portability import python_urns
    from apache_beam.portability.api import beam_fn_api_pb2
    from apache_beam.runners.portability.fn_api_runner import worker_handlers

    control = worker_handlers.BeamFnControlServicer

    class Watched(worker_handlers.SubprocessSdkWorkerHandler):
        def start_worker(self) -> None:
            super().start_worker()
            threading.Thread(target=self._watch, daemon=True).start()

        def _watch(self) -> None:
            self.worker_thread.join()
            died = beam_fn_api_pb2.InstructionResponse(error="a worker process died.")
            # A regular end closes the connection first.
            while self.control_conn._state != control.DONE_STATE:
                for future in list(self.control_conn._futures_by_id.values()):
                    future.set(died)
                time.sleep(1)

        def stop_worker(self) -> None:
            # A worker that was still starting missed the first signal.
            while self.worker_thread.is_alive():
                self.control_conn.push(control._DONE_MARKER)
                self.worker_thread.join(1)

    worker_handlers.WorkerHandler.register_environment(python_urns.SUBPROCESS_SDK, bytes)(Watched)


def _run(plan: StorePlan, tasks: Iterable[ShardTask], options: Any) -> None:
    """Runs the pipeline to its end; raises UserError if it fails."""
    beam, result, resumes = (
        _import_beam(),
        None,
        "Finished shards are kept; the same command resumes.",
    )
    # A new name, so that a job of an earlier run does not read this list.
    todo = Path(os.path.abspath(plan.path)) / f"todo-{uuid.uuid4().hex[:8]}.jsonl"
    # If this run dies, the folder of shards identifies a store.
    plan.shards.mkdir(parents=True, exist_ok=True)
    for left in todo.parent.glob("todo-*.jsonl"):
        left.unlink(missing_ok=True)
    try:
        with replacing(todo) as temporary, open(temporary, "w", encoding="ascii") as lines:
            lines.writelines(task_to_json(task) + "\n" for task in tasks)
        # In other versions of Beam these parts may have moved.
        with contextlib.suppress(ImportError, AttributeError):
            _watch_local_workers()
        pipeline = beam.Pipeline(options=options)
        unreadable = (clip.clip_id for clip in plan.todo if not os.access(clip.path, os.R_OK))
        folder = todo.parent / "shards"
        job = ShardJob(plan.recipe, folder, package_versions(), frozenset(unreadable))
        write_shards(pipeline, todo, job)
        result = pipeline.run()
        state = str(result.wait_until_finish() or result.state)
    except KeyboardInterrupt:
        if result is not None:
            with contextlib.suppress(Exception):
                result.cancel()
        raise
    except Exception as error:
        logging.info("%s", traceback.format_exc())
        raise UserError(f"the Beam job failed: {_reason(error)} {resumes}") from error
    finally:
        todo.unlink(missing_ok=True)
    if state != "DONE":
        raise UserError(f"the Beam job ended as {state}. {resumes}")


def _reason(error: Exception) -> str:
    """Returns one line about Beam's error: this package's message, or else the last line."""
    text = re.sub(r" \[while running .*?\]", "", str(error))
    own = re.findall(r"musicgenre\.errors\.UserError: (.+)", text)
    lines = [line.strip() for line in (own or text.splitlines()) if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _collect(plan: StorePlan, tasks: Callable[[], Iterator[ShardTask]]) -> None:
    """Checks the workers' shards against their checksums and adds them to the plan."""
    missing = []
    for total, task in enumerate(tasks(), 1):  # noqa: B007
        if record := finished_shard(plan.shards, task, plan.recipe.made_with):
            plan.add(record)
        else:
            missing.append(task)
    if missing:
        raise UserError(
            f"{plan.shards / f'{missing[0].number:05d}.npy'}: {len(missing)} of {total} new "
            "shards, this first, are missing or damaged although the job has ended. Does every "
            "worker see the store's folder under this path? The same command makes them again."
        )
    # Left by workers that were stopped while writing.
    for left in plan.shards.glob(".*.tmp"):
        left.unlink(missing_ok=True)


def _check_worker(task: ShardTask, job: ShardJob) -> None:
    """Raises UserError if this worker would compute other bytes or skip other clips."""
    host = socket.gethostname()
    for name, version in package_versions().items():
        if version != (other := job.versions.get(name)):
            raise UserError(
                f"the worker {host} has {name} {version}, and the machine that started the job "
                f"{other}: install the same requirements.lock on both."
            )
    for clip, source in zip(task.clips, task.sources, strict=True):
        try:
            size = os.stat(clip.path).st_size
        except OSError:
            size = 0
        if size and not os.access(clip.path, os.R_OK) and clip.clip_id not in job.unreadable:
            raise UserError(
                f"{clip.path}: the worker {host} may not read it, and the machine that started the "
                "job may."
            )
        if size != source[1]:
            raise UserError(
                f"{clip.path}: the worker {host} sees {size} bytes, and the machine that started "
                f"the job {source[1]}. All must see the same files under the same paths. If the "
                "file has changed, run the same command again."
            )


def _read_lines(path: str) -> Iterator[str]:
    try:
        with open(path, encoding="ascii") as file:
            yield from file
    except FileNotFoundError:
        raise UserError(
            f"{path}: the worker {socket.gethostname()} does not see the list written there. The "
            "store must be a folder that all workers see under the same path."
        ) from None


@contextlib.contextmanager
def _followed(shards: Path, tasks: Iterable[ShardTask], bar: Any) -> Iterator[None]:
    """Advances the bar as the tasks' shards appear in the folder."""
    pending = {f"{task.number:05d}.json": len(task.clips) for task in tasks}
    done = threading.Event()

    def look() -> None:
        with contextlib.suppress(OSError):
            for name in pending.keys() & set(os.listdir(shards)):
                bar.update(pending.pop(name))

    def follow() -> None:
        while not done.wait(_POLL_SECONDS):
            look()

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        look()
