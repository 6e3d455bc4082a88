"""Clips to a spectrogram store on several machines: an Apache Beam pipeline that writes what `prepare_store` writes.

The machine that starts the job plans which clips become which shard. Workers compute whole shards and write them into
the store's folder. When the job has ended the first machine checks every new shard and writes the manifest. So the
store is the same to the byte as the one that `prepare_store` makes of the same clips, and a run that died goes on from
the shards that are there.

The sound files and the store must lie in folders that all machines see under the same paths (NFS, say). Object stores
(gs://, s3://) are not supported unless they are mounted as folders. One run at a time may write a store: cancel a job
that is still running somewhere before the command is started again.
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

# Beam's flags where none are given: two processes on this machine.
LOCAL_FLAGS = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")
# Beam's counters, in this namespace: clips_computed, clips_skipped, shards_written, shards_found.
NAMESPACE = "musicgenre.prepare"
# Other versions of these may give other bytes.
_PACKAGES = ("musicgenre", "librosa", "numpy", "scipy", "soundfile", "soxr")
_LOCAL_RUNNERS = ("", "direct", "switchingdirect", "bundlebaseddirect", "fnapi")
_POLL_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """What a worker needs besides its clips.

    Attributes:
      recipe: how clips become rows.
      shards: the folder of the shards, an absolute path.
      versions: of the packages that the bytes depend on, where the job was started.
      unreadable: ids of clips whose files may not be read there either.
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
    """Writes the store of a data set, or brings an existing one up to date, with the workers of a Beam runner.

    Args:
      dataset: the clips; their paths must be absolute unless the runner is Beam's local one.
      spec: the front end.
      layout: frames per clip, padding and excerpt.
      path: the store's folder, which all workers see under this path; made if missing.
      beam_flags: the runner and its options as Beam's own flags, `--name=value`; none means two local processes.
      min_seconds: shorter sound files are skipped.
      array_layout: order of the axes of array files, "mel_time" or "time_mel".
      clips_per_shard: clips of one shard. With another number than the default the shards differ from `prepare_store`'s.
      progress: draw a progress bar; it follows the finished shards.
      verify: compare the shards that earlier runs have written with their checksums, not only their sizes.

    Raises:
      UserError: as `prepare_store`; also: Apache Beam is not installed, a flag cannot be used, a path is no shared
        folder's, or the job failed. Shards that were finished are kept then.
    """
    _import_beam()
    options, local = _options(beam_flags or LOCAL_FLAGS)
    if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):
        raise UserError(
            f"{path}: the store must be a folder that all workers see; object stores are not supported. Mount it, or "
            "choose a shared folder with --config.data.store=..."
        )
    relative = next((clip.path for clip in dataset.clips if not clip.path.is_absolute()), None)
    if relative is not None and not local:
        raise UserError(
            f"{relative}: a relative path means another file on another machine. Give --config.data.root as an absolute "
            "path (in a CSV file, the column path), under which all workers see the files."
        )
    plan = StorePlan(
        dataset,
        Recipe(spec, layout, array_layout, min_seconds),
        path,
        verify=verify,
        progress=progress,
    )
    # Made anew each time they are gone through: all tasks of a large data set at once would fill the memory.
    tasks = functools.partial(plan.tasks, clips_per_shard, fill_gaps=True)
    if plan.todo:
        with progress_bar(plan, progress) as bar, _followed(plan.shards, tasks(), bar):
            _run(plan, tasks(), options)
        _collect(plan, tasks)
    return plan.finish()


def write_shards(pipeline: Any, todo: Path, job: ShardJob) -> Any:
    """Adds the steps to a Beam pipeline: read the tasks, spread them over the workers, write a shard for each.

    Args:
      pipeline: the `beam.Pipeline`.
      todo: a file with one task a line, as `task_to_json` writes it. The tasks travel through the shuffle, not in the
        job's graph, whose size runners limit.
      job: what all tasks have in common.

    Returns:
      A PCollection of the numbers of the shards.
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
    """Computes and writes the shard of one task: what a worker does.

    Repeating it is harmless: a shard that is there, sound and of the same clips is left as it is.

    Args:
      line: the task, from `task_to_json`.
      job: what all tasks have in common.

    Returns:
      The shard's number.

    Raises:
      UserError: this worker has other versions of the packages, does not see the files, or cannot write the shard.
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
    clips = [dataclasses.asdict(clip) | {"path": str(clip.path)} for clip in task.clips]
    return json.dumps({"number": task.number, "clips": clips, "sources": task.sources})


def task_from_json(line: str) -> ShardTask:
    """Returns the task of `task_to_json`'s line."""
    fields = json.loads(line)
    clips = [
        Clip(
            **clip
            | {
                "path": Path(clip["path"]),
                "labels": tuple(clip["labels"]),
                "values": tuple(clip["values"]),
            }
        )
        for clip in fields["clips"]
    ]
    return ShardTask(fields["number"], tuple(clips), tuple(fields["sources"]))


def package_versions() -> dict[str, str]:
    """Returns the versions of the packages that the store's bytes depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _import_beam() -> ModuleType:
    """Returns the module `apache_beam`.

    Raises:
      UserError: it is not installed.
    """
    root = logging.getLogger()
    level = root.level
    try:
        # It warns that Google's clients are absent, which only its own sources and sinks would need.
        root.setLevel(logging.ERROR)
        import apache_beam
    except ImportError as error:
        raise UserError(
            f"Apache Beam cannot be imported ({error}). Install it with pip install 'musicgenre[scale]', or run "
            "musicgenre prepare, which needs none and uses all cores of this machine."
        ) from error
    finally:
        root.setLevel(level)
    return apache_beam


def _options(flags: Sequence[str]) -> tuple[Any, bool]:
    """Returns Beam's options, and whether the runner is the local one.

    Raises:
      UserError: a flag is not written `--name=value`, has a wrong value, or is unknown. A cluster's runner may know
        more flags than Beam's Python side, so there Beam judges them.
    """
    from apache_beam.options.pipeline_options import (
        PipelineOptions,
        StandardOptions,
        TypeOptions,
        WorkerOptions,
    )

    for flag in flags:
        if not flag.startswith("--") or flag == "--":
            raise UserError(
                f"unexpected argument {flag!r}: Beam's flags follow after -- and are written --name=value."
            )
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            options = PipelineOptions(list(flags))
            given = options.get_all_options(retain_unknown_options=True)
    except SystemExit:
        reason = (printed.getvalue().strip().splitlines() or ["unknown"])[-1].partition("error: ")[
            2
        ]
        raise UserError(
            f"Beam's flags cannot be used: {reason or 'see the documentation of the runner'}."
        ) from None
    known = PipelineOptions([]).get_all_options()
    runner = (
        str(options.view_as(StandardOptions).runner or "")
        .rpartition(".")[2]
        .lower()
        .removesuffix("runner")
    )
    local = runner in _LOCAL_RUNNERS
    unknown = sorted(set(given) - set(known))
    if local and unknown:
        names = ["runner", *(name for name in known if name.startswith("direct_"))]
        raise UserError(
            f"--{unknown[0]} is not a flag of Beam's local runner.{did_you_mean(unknown[0], names)}"
        )
    if local:
        # Otherwise DirectRunner first tries to download another runner, Prism, which knows no --direct_num_workers.
        options.view_as(TypeOptions).allow_unsafe_triggers = True
        # Its worker processes write a dozen lines each about themselves otherwise, and what fails is raised here anyway.
        worker = options.view_as(WorkerOptions)
        worker.default_sdk_harness_log_level = worker.default_sdk_harness_log_level or "CRITICAL"
    return options, local


def _watch_local_workers() -> None:
    """Lets a local run end when a worker process dies (killed for its memory, say), or when it is stopped at its start.

    Beam waits forever in both cases.
    """
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
            # A worker that was still starting has missed the word to end.
            while self.worker_thread.is_alive():
                self.control_conn.push(control._DONE_MARKER)
                self.worker_thread.join(1)

    worker_handlers.WorkerHandler.register_environment(python_urns.SUBPROCESS_SDK, bytes)(Watched)


def _run(plan: StorePlan, tasks: Iterable[ShardTask], options: Any) -> None:
    """Runs the pipeline to its end.

    Raises:
      UserError: it failed.
    """
    beam = _import_beam()
    # The name is a new one: a job of an earlier run must not read this list in place of its own.
    todo = Path(os.path.abspath(plan.path)) / f"todo-{uuid.uuid4().hex[:8]}.jsonl"
    # A folder with shards is known for a store if this run dies.
    plan.shards.mkdir(parents=True, exist_ok=True)
    for left in todo.parent.glob("todo-*.jsonl"):
        left.unlink(missing_ok=True)
    result = None
    try:
        with replacing(todo) as temporary, open(temporary, "w", encoding="ascii") as lines:
            lines.writelines(task_to_json(task) + "\n" for task in tasks)
        # Beam may have moved these parts in another version; then it works as it does by itself.
        with contextlib.suppress(ImportError, AttributeError):
            _watch_local_workers()
        pipeline = beam.Pipeline(options=options)
        unreadable = frozenset(
            clip.clip_id for clip in plan.todo if not os.access(clip.path, os.R_OK)
        )
        write_shards(
            pipeline,
            todo,
            ShardJob(plan.recipe, todo.parent / "shards", package_versions(), unreadable),
        )
        result = pipeline.run()
        state = str(result.wait_until_finish() or result.state)
    except KeyboardInterrupt:
        if result is not None:
            with contextlib.suppress(Exception):
                result.cancel()
        raise
    except Exception as error:
        logging.info("%s", traceback.format_exc())
        raise UserError(
            f"the Beam job failed: {_reason(error)} What was finished is kept; the same command goes on."
        ) from error
    finally:
        todo.unlink(missing_ok=True)
    if state != "DONE":
        raise UserError(
            f"the Beam job ended as {state}. What was finished is kept; the same command goes on."
        )


def _reason(error: Exception) -> str:
    """Returns one line of what Beam raised: our own message where there is one, or the last line of what it says."""
    text = re.sub(r" \[while running .*?\]", "", str(error))
    own = re.findall(r"musicgenre\.errors\.UserError: (.+)", text)
    lines = [line.strip() for line in (own or text.splitlines()) if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _collect(plan: StorePlan, tasks: Callable[[], Iterator[ShardTask]]) -> None:
    """Checks the shards that workers have written against their checksums, and adds them to the plan.

    Raises:
      UserError: some are not there, or are damaged.
    """
    missing = []
    for total, task in enumerate(tasks(), 1):  # noqa: B007
        record = finished_shard(plan.shards, task, plan.recipe.made_with)
        if record is None:
            missing.append(task)
        else:
            plan.add(record)
    if missing:
        raise UserError(
            f"{plan.shards / f'{missing[0].number:05d}.npy'}: {len(missing)} of {total} new shards, this first, are missing "
            "or damaged although the job has ended. Does every worker see the store's folder under this path? The same "
            "command makes them again."
        )
    # Workers that were stopped while they wrote have left these.
    for left in plan.shards.glob(".*.tmp"):
        left.unlink(missing_ok=True)


def _check_worker(task: ShardTask, job: ShardJob) -> None:
    """Refuses to work where the result would differ: a missing mount must not become a list of skipped clips.

    Raises:
      UserError: the versions of the packages or the sizes of the files are not those where the job was started.
    """
    host = socket.gethostname()
    versions = package_versions()
    if versions != job.versions:
        name = next(name for name in versions if versions[name] != job.versions.get(name))
        raise UserError(
            f"the worker {host} has {name} {versions[name]}, and the machine that started the job "
            f"{job.versions.get(name)}: install the same requirements.lock on both."
        )
    for clip, source in zip(task.clips, task.sources, strict=True):
        try:
            size = os.stat(clip.path).st_size
        except OSError:
            size = 0
        if size and not os.access(clip.path, os.R_OK) and clip.clip_id not in job.unreadable:
            raise UserError(
                f"{clip.path}: the worker {host} may not read it, and the machine that started the job may."
            )
        if size != source[1]:
            raise UserError(
                f"{clip.path}: the worker {host} sees {size} bytes, and the machine that started the job {source[1]}. All "
                "must see the same files under the same paths. If the file has changed, run the same command again."
            )


def _read_lines(path: str) -> Iterator[str]:
    """Yields the tasks of the list."""
    try:
        with open(path, encoding="ascii") as file:
            yield from file
    except FileNotFoundError:
        raise UserError(
            f"{path}: the worker {socket.gethostname()} does not see the list that was written there. The store must "
            "be a folder that all workers see under the same path."
        ) from None


@contextlib.contextmanager
def _followed(shards: Path, tasks: Iterable[ShardTask], bar: Any) -> Iterator[None]:
    """Moves the bar as the tasks' shards appear in the folder, whichever machine writes them."""
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
