"""The research commands, from synthetic audio to reports, in this process."""

import contextlib
import csv
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from musicgenre.cli.main import main
from musicgenre.runs.bundle import save_bundle
from musicgenre.runs.model import load_model
from musicgenre.runs.provenance import UNKNOWN


class Done(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


def run(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Done(code, out.getvalue(), err.getvalue())


def csv_rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="module")
def small(folder):
    """The flags of a small experiment."""
    return [
        "--config=synthetic",
        f"--config.data.root={folder}/audio",
        f"--config.data.stores_root={folder}/stores",
        "--config.data.clips_per_style=5",
        "--config.data.seconds=2.0",
        "--config.data.frames=86",
        "--config.epochs=2",
        "--config.model.filters=(8, 8)",
        "--config.model.dense=(16,)",
        "--noprogress",
    ]


@pytest.fixture(scope="module")
def store(folder, small):
    done = run("prepare", *small, "--workers=1")
    assert done.code == 0, done.err
    assert "SYNTHETIC" in done.out
    assert "50 clips (test 10, train 30, valid 10); 50 computed" in done.out
    return next((folder / "stores").iterdir())


@pytest.fixture(scope="module")
def trained(folder, small, store):
    done = run("train", *small, f"--workdir={folder}/run")
    assert done.code == 0, done.err
    assert "trained 2 steps; validation accuracy" in done.out
    return folder / "run"


def test_a_report_of_one_run(trained):
    done = run("evaluate", f"--workdir={trained}", "--split=test", "--neighbours=1")
    assert done.code == 0, done.err
    assert "SYNTHETIC" in done.out and "10 clips" in done.out
    out = trained / "evaluation-test"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["n"] == 10 and metrics["synthetic"] and metrics["split"] == "test"
    assert (out / "report.html").stat().st_size > 20_000
    assert len((out / "predictions.csv").read_text().splitlines()) == 11
    assert (out / "neighbours.json").is_file()


def test_prepare_can_trust_existing_shards(folder, store, small):
    copy = folder / "copy"
    shutil.copytree(store, copy)
    shard = copy / "shards/00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for flag, computed in (("--noverify", 0), ("--verify", 50)):
        done = run("prepare", *small, f"--config.data.store={copy}", "--workers=1", flag)
        assert done.code == 0, done.err
        assert f"50 clips (test 10, train 30, valid 10); {computed} computed" in done.out


def test_several_seeds_have_a_common_report(trained, folder, small):
    other = f"--workdir={folder}/run1"
    done = run("train", *small, "--config.seed=1", other)
    assert done.code == 0, done.err
    out = folder / "seeds"
    workdirs = [f"--workdir={trained}", other]
    done = run("evaluate", *workdirs, "--split=valid", f"--out={out}", "--temperature=test")
    assert done.code == 0, done.err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["measures"]["accuracy"]["n"] == 2
    metrics = json.loads((out / "ensemble" / "metrics.json").read_text())
    assert metrics["config"]["seed"] == [0, 1]
    assert metrics["accuracy"] == summary["ensemble"]["accuracy"]
    assert f"ensemble of 2 (mean of their scores), valid: {metrics['headline']}" in done.out
    assert metrics["calibration"]["fitted_on"].startswith("fitted on test (10 clips of ")
    assert done.out.count("temperature ") == 3
    names = ("run0", "run1", "ensemble")
    tables = [csv_rows(out / name / "predictions.csv") for name in names]
    one, two, both = (float(rows[0]["p_pulsar"]) for rows in tables)
    assert both == pytest.approx((one + two) / 2, abs=2e-6) and one != two
    done = run("evaluate", *workdirs)
    assert done.code == 2 and "--out" in done.err


def test_predict_is_another_name_of_tag(trained, folder, store):
    good, other = sorted((folder / "audio").rglob("*.wav"))[:2]
    bad = folder / "bad.wav"
    bad.write_bytes(b"RIFF")
    done = run("predict", f"--workdir={trained}", good, other, "--format=json")
    assert done.code == 0, done.err
    assert [entry["path"] for entry in json.loads(done.out)] == [str(good), str(other)]
    assert "SYNTHETIC" in done.err
    assert run("tag", f"--model={trained}", good, other, "--format=json") == done
    table = folder / "labels.csv"
    mixed = run("predict", f"--workdir={trained}", good, bad, f"--out={table}", "--format=csv")
    assert mixed.code == 3 and "bad.wav" in mixed.err and "1 file done, 1 failed" in mixed.err
    assert len(table.read_text().splitlines()) == 3
    assert run("predict", f"--workdir={trained}", bad).code == 2
    assert "no files" in run("predict", f"--workdir={trained}").err


def test_an_ablation_makes_one_table_and_resumes(folder, small, store):
    config = folder / "sweep.py"
    config.write_text(
        "from musicgenre.configs.synthetic import get_config\n"
        "def sweep():\n    yield 'plain', {}\n    yield 'dropped', {'model.dropout': 0.9}\n"
    )
    out = folder / "ablation"
    flags = [f"--config={config}", *small[1:], f"--workdir={out}", "--config.epochs=1", "--seeds=2"]
    done = run("ablate", *flags)
    assert done.code == 0, done.err
    table = (out / "ablation.csv").read_text()
    assert len(table.splitlines()) == 3 and "model.dropout=0.9" in table
    assert (out / "variants.png").stat().st_size > 5_000
    again = run("ablate", *flags)
    assert again.code == 0 and (out / "ablation.csv").read_text() == table
    done = run("ablate", *flags, "--only=droped")
    assert done.code == 2 and "no variant of " in done.err and "'dropped'" in done.err


def test_what_is_no_ablation_is_refused(folder, small):
    done = run("ablate", *small, f"--workdir={folder}/none")
    assert done.code == 2 and "configs/synthetic.py: has no sweep()." in done.err
    flags = ["--config=ablations/report_knobs", f"--workdir={folder}/none", "--steps=9"]
    done = run("ablate", *flags)
    assert done.code == 2 and "--steps goes with --folds" in done.err
    assert not (folder / "none").exists()


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (
            "train",
            ["--config.optimizer.learning_rat=1.0"],
            "config.optimizer.learning_rat is not a field.*Did you mean.*learning_rate",
        ),
        (
            "train",
            ["--config.optimzer.name=adam"],
            'the flags cannot be used: .*Did you mean "optimizer" instead of "optimzer"',
        ),
        ("train", ["--config.batch_size=many"], "batch_size"),
        (
            "train",
            ["--config.model.filtres=(3,)"],
            "model.filtres is not a field.*Did you mean 'filters'",
        ),
        ("train", ["--config.optimizer.name=adamm"], "Did you mean 'adam'"),
        ("train", ["--config.data.stores_root=nowhere"], "no finished spectrogram store.*prepare"),
        ("train", ["--config.data.crop_frames=40"], "normalise=band"),
        ("train", ["--profile_steps=20"], "--profile_steps=20: needs a first step and a count"),
        ("prepare", ["--config.data.dataset=gtzam"], "no data set 'gtzam'. Did you mean 'gtzan'"),
        ("prepare", ["--config.data.dataset=gtzan", "--config.data.root="], "data.root"),
    ],
)
def test_mistakes_are_one_clear_line(folder, small, store, command, arguments, message):
    workdir = [f"--workdir={folder}/other"] if command == "train" else []
    done = run(command, *small, *workdir, *arguments)
    assert done.code == 2 and re.search(message, done.err) and len(done.err.splitlines()) == 1
    assert not (folder / "other" / "checkpoints").exists()


def test_leakage_can_be_fatal(trained, folder, store):
    flags = [f"--store={store}", "--fatal_leakage"]
    done = run("evaluate", f"--workdir={trained}", "--split=valid", *flags)
    assert done.code == 0, done.err
    bundle, out = folder / "run.safetensors", folder / "evaluated"
    save_bundle(dataclasses.replace(load_model(trained), trained_on=UNKNOWN), bundle)
    done = run("evaluate", f"--workdir={bundle}", f"--out={out}", *flags)
    assert done.code == 4 and "not known to be" in done.err and (out / "report.html").is_file()
    assert "training clips unknown: " in done.out and "no leak" not in done.out


def test_figures_are_drawn_and_named(trained, folder, small, tmp_path):
    done = run("figures", *small[:-1], f"--out={tmp_path}", "--top=2")
    assert done.code == 0, done.err
    paths = [line for line in done.out.splitlines() if line.endswith(".png")]
    assert paths and all(Path(path).is_file() for path in paths)
    done = run("figures", f"--workdir={trained}", "--config=synthetic")
    assert done.code == 2 and "give only one of the two" in done.err
