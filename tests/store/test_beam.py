import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from threadpoolctl import threadpool_info, threadpool_limits

pytest.importorskip("apache_beam")

from musicgenre.audio.features import FeatureSpec
from musicgenre.audio.layout import ClipLayout
from musicgenre.config import base_config, clip_layout, dataset_options, feature_spec
from musicgenre.datasets import load_dataset
from musicgenre.datasets.base import Clip
from musicgenre.errors import UserError
from musicgenre.files import read_json
from musicgenre.store import beam, prepare
from musicgenre.store.beam import prepare_store_beam
from musicgenre.store.prepare import Recipe, ShardTask, StorePlan, prepare_store
from musicgenre.store.store import Store

ROOT = Path(__file__).resolve().parents[2]
SPEC = FeatureSpec(sample_rate=8000, n_fft=256, hop_length=128, n_mels=20)
LAYOUT = ClipLayout(frames=60)
# Beam's local runner in this process: quick to start.
HERE = ["--runner=DirectRunner", "--direct_running_mode=in_memory", "--direct_num_workers=1"]


RESUMES = " Finished shards are kept"


def sound(path, seed, seconds=1.2):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).standard_normal(int(8000 * seconds))
    soundfile.write(path, 0.1 * samples, 8000)
    return path


@pytest.fixture
def without_pipeline(monkeypatch):
    """Runs the tasks of a job here, in order; starting a pipeline takes seconds."""

    def run(plan, tasks, options):
        job = beam.ShardJob(plan.recipe, plan.shards, beam.package_versions())
        for task in list(tasks):
            beam.make_shard(beam.task_to_json(task), job)

    monkeypatch.setattr(beam, "_run", run)


@pytest.fixture
def dataset(tmp_path):
    """Eleven clips in two classes, one of them not a sound file and one too short."""
    for number in range(11):
        split = "train" if number < 7 else "valid"
        sound(tmp_path / "music" / split / "ab"[number % 2] / f"{number:02d}.wav", number)
    (tmp_path / "music/train/a/04.wav").write_bytes(b"no sound at all")
    sound(tmp_path / "music/train/b/05.wav", 5, 0.5)
    options = {"dataset": "folder", "root": str(tmp_path / "music")}
    return load_dataset(options | {"seed": 0, "fractions": (0.7, 0.15, 0.15)})


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def expected(dataset, tmp_path, monkeypatch):
    """The single-machine store in shards of three, as bytes by file."""
    monkeypatch.setattr(prepare, "CLIPS_PER_SHARD", 3)
    prepare_here(dataset, tmp_path / "one")
    return content(tmp_path / "one")


def prepare_here(dataset, path):
    return prepare_store(dataset, SPEC, LAYOUT, path, workers=1, progress=False)


def make(dataset, path, flags=HERE, **options):
    options = {"clips_per_shard": 3, "progress": False} | options
    return prepare_store_beam(dataset, SPEC, LAYOUT, path, flags, **options)


def content(folder, read=Path.read_bytes):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): read(path) for path in files}


def times(folder):
    return content(folder, lambda path: path.stat().st_mtime_ns)


def task_and_job(dataset, path, shard=0):
    plan = StorePlan(dataset, Recipe(SPEC, LAYOUT), path)
    job = beam.ShardJob(plan.recipe, plan.shards, beam.package_versions())
    return list(plan.tasks(3))[shard], job


@pytest.mark.parametrize(
    "flags",
    [HERE, ["--direct_running_mode=multi_threading", "--direct_num_workers=2"], ()],
    ids=["in_memory", "two threads", "two processes"],
)
def test_the_bytes_equal_those_of_one_machine(dataset, expected, store, flags):
    summary = make(dataset, store, flags)
    assert content(store) == expected
    names = [re.sub("-[0-9a-f]{8}", "", name) for name in sorted(expected)]
    shards = [f"shards/0000{n}.{end}" for n in range(4) for end in ("json", "npy")]
    assert names == ["clips.safetensors", "manifest.json", *shards, "skipped.jsonl"]
    assert (summary.clips, summary.computed, summary.reused) == (9, 11, 0)
    assert [entry["clip_id"] for entry in summary.skipped] == ["train/a/04", "train/b/05"]
    reasons = [entry["reason"] for entry in summary.skipped]
    assert "not a sound file" in reasons[0] and "too short (0.50 s" in reasons[1]
    assert "2 skipped" in summary.lines()[0]
    assert Store.open(store).gather(np.array([0])).shape == (1, 60, 20)


@pytest.mark.usefixtures("without_pipeline")
def test_a_second_run_changes_no_file_and_starts_no_job(dataset, store, monkeypatch):
    make(dataset, store)
    before = times(store)
    monkeypatch.setattr(beam, "_run", lambda *_: pytest.fail("a job was started"))
    summary = make(dataset, store)
    assert (summary.computed, summary.reused) == (0, 11)
    assert prepare_here(dataset, store).computed == 0
    assert times(store) == before


def test_a_failed_run_resumes_and_ends_at_the_same_bytes(dataset, expected, store, monkeypatch):
    process = prepare.Recipe.__call__

    def fails(recipe, clip):
        if clip.clip_id == "train/a/06":
            raise MemoryError("no memory for this clip")
        return process(recipe, clip)

    monkeypatch.setattr(prepare.Recipe, "__call__", fails)
    message = rf"the Beam job failed: .*no memory for this clip.*{RESUMES}"
    with pytest.raises(UserError, match=message):
        make(dataset, store)
    assert os.listdir(store) == ["shards"]
    monkeypatch.setattr(prepare.Recipe, "__call__", process)
    make(dataset, store)
    assert content(store) == expected


def test_only_the_shards_that_a_dead_run_lacks_are_made(dataset, expected, store):
    make(dataset, store)
    # As a run leaves it whose workers had finished two of four shards and begun a third.
    for name in ("manifest.json", "shards/00000.json", "shards/00000.npy", "shards/00002.json"):
        (store / name).unlink()
    (store / "shards/.00002.npy.0a1b2c3d.tmp").write_bytes(b"half")
    (store / "todo-0a1b2c3d.jsonl").write_text("{}\n")
    before = times(store)
    summary = make(dataset, store)
    assert (summary.computed, summary.reused) == (6, 5)
    assert content(store) == expected
    kept = [name for name in before if "00001" in name or "00003" in name]
    assert len(kept) == 4 and all(times(store)[name] == before[name] for name in kept)


@pytest.mark.usefixtures("without_pipeline")
def test_a_changed_clip_takes_a_new_number_despite_a_gap(dataset, store, tmp_path):
    make(dataset, store)
    for name in ("00000.json", "00000.npy"):
        (store / "shards" / name).unlink()
    sound(tmp_path / "music/valid/b/07.wav", 70, 1.5)
    assert make(dataset, store).computed == 4
    names = sorted(path.name for path in store.glob("shards/*.json"))
    assert names == [f"0000{n}.json" for n in range(1, 6)]
    # In a gap below its stale entry it would count as changed again and again.
    assert make(dataset, store).computed == 0
    prepare_here(dataset, tmp_path / "fresh")
    grown, fresh = Store.open(store), Store.open(tmp_path / "fresh")
    np.testing.assert_array_equal(grown.gather(np.arange(9)), fresh.gather(np.arange(9)))


@pytest.mark.usefixtures("without_pipeline")
def test_a_shard_that_the_workers_lost_is_named(dataset, expected, store, monkeypatch):
    run = beam._run

    def loses(plan, *rest):
        run(plan, *rest)
        (plan.shards / "00001.npy").write_bytes(b"")

    monkeypatch.setattr(beam, "_run", loses)
    message = r"00001\.npy: 1 of 4 new shards, this first, are missing or damaged"
    with pytest.raises(UserError, match=message):
        make(dataset, store)
    assert not (store / "manifest.json").exists()
    monkeypatch.setattr(beam, "_run", run)
    assert make(dataset, store).computed == 3
    assert content(store) == expected


def test_repeating_a_task_is_harmless(dataset, expected, store):
    task, job = task_and_job(dataset, store, shard=1)
    line = beam.task_to_json(task)
    assert beam.make_shard(line, job) == 1
    assert content(job.shards)["00001.npy"] == expected["shards/00001.npy"]
    before = times(job.shards)
    assert beam.make_shard(line, job) == 1
    assert times(job.shards) == before
    damaged = expected["shards/00001.npy"][:-1] + b"\xff"
    (job.shards / "00001.npy").write_bytes(damaged)
    beam.make_shard(line, job)
    names = ("00001.json", "00001.npy")
    assert content(job.shards) == {name: expected[f"shards/{name}"] for name in names}


def test_a_task_is_restored_from_its_line():
    clips = (
        Clip("é/1", Path("/music/é ß/1.wav"), ("a", "b"), "train", "artist"),
        Clip("2", Path("/arrays/x.npz"), (), "test", row=7, values=(0.25, -1e-9)),
    )
    sources = ["/music/é ß/1.wav", 10, 1795501916100386381, None], ["/arrays/x.npz", 5, 6, 7]
    line = beam.task_to_json(task := ShardTask(3, clips, sources))
    assert line.isascii() and "\n" not in line
    assert beam.task_from_json(line) == task


def test_a_worker_that_would_make_other_bytes_refuses(dataset, store, monkeypatch):
    task, job = task_and_job(dataset, store)
    line = beam.task_to_json(task)
    other = dataclasses.replace(job, versions=job.versions | {"librosa": "0.1"})
    version = re.escape(job.versions["librosa"])
    with pytest.raises(UserError, match=rf"has librosa {version}, and the machine .* 0\.1"):
        beam.make_shard(line, other)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("00.wav"))
    with pytest.raises(UserError, match=r"00\.wav: the worker .* may not read it"):
        beam.make_shard(line, job)
    # A file that nobody may read is skipped as on one machine; here root may, so it is computed.
    permitted = dataclasses.replace(job, unreadable=frozenset({task.clips[0].clip_id}))
    assert beam.make_shard(line, permitted) == 0
    (job.shards / "00000.json").unlink()
    monkeypatch.undo()
    size = task.clips[1].path.stat().st_size
    task.clips[1].path.unlink()
    message = rf"sees 0 bytes, and the machine that started the job {size}\."
    with pytest.raises(UserError, match=message):
        beam.make_shard(line, job)
    assert sorted(os.listdir(job.shards)) == ["00000.npy"]


def test_workers_compute_in_one_thread(dataset, store, monkeypatch):
    seen = []
    process = prepare.Recipe.__call__

    def record(*arguments):
        seen.extend(pool["num_threads"] for pool in threadpool_info())
        return process(*arguments)

    monkeypatch.setattr(prepare.Recipe, "__call__", record)
    task, job = task_and_job(dataset, store)
    with threadpool_limits(2):
        beam.make_shard(beam.task_to_json(task), job)
        assert {pool["num_threads"] for pool in threadpool_info()} == {2}
    assert seen and set(seen) == {1}


def test_counters_give_the_numbers_of_clips_and_shards(dataset, store, tmp_path):
    from apache_beam import Pipeline
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    plan = StorePlan(dataset, Recipe(SPEC, LAYOUT), store)
    todo = tmp_path / "todo.jsonl"
    todo.write_text("".join(beam.task_to_json(task) + "\n" for task in plan.tasks(3)))
    job = beam.ShardJob(plan.recipe, plan.shards, beam.package_versions())

    def counters():
        pipeline = Pipeline(runner=FnApiRunner())
        beam.write_shards(pipeline, todo, job)
        result = pipeline.run()
        result.wait_until_finish()
        found = {each.key.metric: each.committed for each in result.metrics().query()["counters"]}
        return {m.name: count for m, count in found.items() if m.namespace == beam.NAMESPACE}

    assert counters() == {"clips_computed": 9, "clips_skipped": 2, "shards_written": 4}
    assert counters() == {"shards_found": 4}


@pytest.mark.usefixtures("without_pipeline")
def test_the_bar_follows_the_shards(dataset, store, monkeypatch, capsys):
    monkeypatch.setattr(beam, "_POLL_SECONDS", 0.01)
    make(dataset, store, progress=True)
    assert "prepare: 100%" in capsys.readouterr().err


def test_an_absent_beam_is_named_with_the_extra(dataset, store, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    message = r"Apache Beam cannot be imported.*pip install 'musicgenre\[scale\]'"
    with pytest.raises(UserError, match=message):
        make(dataset, store)
    assert not store.exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--runer=X", "--runer is not a flag of Beam's local runner. Did you mean 'runner'"),
        ("--direct_num_worker=2", "Did you mean 'direct_num_workers'"),
        ("--direct_num_workers=many", "argument --direct_num_workers: invalid int value: 'many'"),
        ("stray", "unexpected argument 'stray': Beam's flags follow after --"),
        ("--runner=NoRunner", "the Beam job failed: Unexpected pipeline runner: NoRunner"),
    ],
)
def test_wrong_flags_are_one_clear_line(dataset, store, flag, message):
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        make(dataset, store, [flag])
    assert "\n" not in str(raised.value)


def test_paths_that_other_machines_cannot_see_are_refused(dataset, store):
    for path in ("gs://bucket/store", Path("s3://bucket/store")):
        message = r"object stores are not supported.*--config\.data\.store"
        with pytest.raises(UserError, match=message):
            make(dataset, path)
    clips = (dataclasses.replace(dataset.clips[0], path=Path("music/x.wav")), *dataset.clips[1:])
    message = r"music/x\.wav: a relative path means another file on another machine"
    with pytest.raises(UserError, match=message):
        make(dataclasses.replace(dataset, clips=clips), store, ["--runner=FlinkRunner"])
    message = r"nowhere/todo\.jsonl: the worker .* does not see the list"
    with pytest.raises(UserError, match=message):
        next(beam._read_lines("nowhere/todo.jsonl"))


@pytest.mark.skipif(
    not Path("/proc/self/stat").is_file(), reason="looks for the worker's process in /proc"
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_process_that_dies_ends_the_run(dataset, store):
    """Beam by itself would wait for it forever."""
    killed, errors = [], []

    def is_worker(process):
        try:
            command = (process / "cmdline").read_bytes()
            session = (process / "stat").read_text().rpartition(")")[2].split()[3]
        except OSError:
            return False
        found = b"sdk_worker_main" in command and b"sh\0-c" not in command
        return found and session == str(os.getsid(0))

    def kill():
        for _ in range(3000):
            for process in filter(is_worker, Path("/proc").glob("[0-9]*")):
                os.kill(int(process.name), signal.SIGKILL)
                killed.append(process.name)
                return
            time.sleep(0.01)

    def run():
        try:
            make(dataset, store, [*beam.LOCAL_FLAGS[1:], "--direct_num_workers=1"])
        except UserError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=target, daemon=True) for target in (kill, run)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert killed and re.search(rf"the Beam job failed: .*{RESUMES}", errors[0])
    assert not (store / "manifest.json").exists()


def test_the_main_passes_beams_flags_on(dataset, store, tmp_path):
    config = base_config()
    own = {
        "data.dataset": "folder",
        "data.root": str(tmp_path / "music"),
        "data.frames": 30,
        "features.sample_rate": 8000,
        "features.n_mels": 20,
    }
    config.update_from_flattened_dict(own)
    parts = load_dataset(dataset_options(config)), feature_spec(config), clip_layout(config)
    prepare_store(*parts, tmp_path / "one", workers=1, progress=False)
    main = [sys.executable, ROOT / "experiments/prepare_beam.py"]
    main += [f"--config={ROOT}/configs/gtzan_conv1d.py", f"--config.data.store={store}"]
    main += [*(f"--config.{name}={value}" for name, value in own.items()), "--noprogress"]
    main += ["--", "--runner=DirectRunner", "--direct_running_mode=multi_threading"]
    done = subprocess.run(main, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "9 clips (train 5, valid 4); 11 computed, 0 already there, 2 skipped." in done.stdout
    assert "skipped train/b/05: " in done.stdout
    assert content(store) == content(tmp_path / "one")
    assert read_json(store / "manifest.json")["dataset"]["root"] == str(tmp_path / "music")
