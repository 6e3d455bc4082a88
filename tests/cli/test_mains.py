import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from musicgenre.runs.bundle import save_bundle
from musicgenre.runs.model import load_model
from musicgenre.runs.provenance import UNKNOWN

ROOT = Path(__file__).resolve().parents[2]


def run(script, *arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments" / script), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def csv_rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("mains")


@pytest.fixture(scope="module")
def flags_of_a_small_run(place):
    return [
        f"--config={ROOT}/configs/synthetic.py",
        f"--config.data.root={place}/audio",
        f"--config.data.stores_root={place}/stores",
        "--config.data.clips_per_style=5",
        "--config.data.seconds=2.0",
        "--config.data.frames=86",
        "--config.epochs=2",
        "--config.model.filters=(8, 8)",
        "--config.model.dense=(16,)",
        "--noprogress",
    ]


@pytest.fixture(scope="module")
def trained(place, flags_of_a_small_run):
    prepared = run("prepare.py", *flags_of_a_small_run, cwd=place)
    assert prepared.returncode == 0, prepared.stderr
    assert (
        "SYNTHETIC" in prepared.stdout
        and "50 clips (test 10, train 30, valid 10); 50 computed" in prepared.stdout
    )
    done = run("train.py", *flags_of_a_small_run, f"--workdir={place}/run", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "trained 2 steps; validation accuracy" in done.stdout
    return place / "run"


def test_from_nothing_to_a_report(trained, place):
    done = run("evaluate.py", f"--workdir={trained}", "--split=test", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stdout and "10 clips" in done.stdout
    out = trained / "evaluation-test"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["n"] == 10 and metrics["synthetic"] and metrics["split"] == "test"
    assert (out / "report.html").stat().st_size > 20_000
    assert len((out / "predictions.csv").read_text().splitlines()) == 11


def test_prepare_can_trust_the_shards_that_are_there(trained, place, flags_of_a_small_run):
    copy = place / "copy"
    shutil.copytree(next((place / "stores").iterdir()), copy)
    shard = copy / "shards/00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    done = run(
        "prepare.py", *flags_of_a_small_run, f"--config.data.store={copy}", "--noverify", cwd=place
    )
    assert (
        done.returncode == 0 and "50 clips (test 10, train 30, valid 10); 0 computed" in done.stdout
    ), done.stderr


def test_several_seeds_have_a_common_report(trained, place, flags_of_a_small_run):
    done = run(
        "train.py", *flags_of_a_small_run, "--config.seed=1", f"--workdir={place}/run1", cwd=place
    )
    assert done.returncode == 0, done.stderr
    workdirs = [f"--workdir={trained}", f"--workdir={place}/run1"]
    done = run(
        "evaluate.py",
        *workdirs,
        "--split=valid",
        f"--out={place}/seeds",
        "--temperature=test",
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((place / "seeds" / "summary.json").read_text())
    assert summary["measures"]["accuracy"]["n"] == 2
    metrics = json.loads((place / "seeds" / "ensemble" / "metrics.json").read_text())
    assert (
        metrics["config"]["seed"] == [0, 1]
        and metrics["accuracy"] == summary["ensemble"]["accuracy"]
    )
    assert f"ensemble of 2 (mean of their scores), valid: {metrics['headline']}" in done.stdout
    assert metrics["calibration"]["fitted_on"].startswith("fitted on test (10 clips of ")
    assert done.stdout.count("temperature ") == 3
    tables = [
        csv_rows(place / "seeds" / name / "predictions.csv")
        for name in ("run0", "run1", "ensemble")
    ]
    one, other, both = (float(rows[0]["p_pulsar"]) for rows in tables)
    assert both == pytest.approx((one + other) / 2, abs=2e-6) and one != other
    done = run("evaluate.py", f"--workdir={trained}", f"--workdir={place}/run1", cwd=place)
    assert done.returncode == 2 and "--out" in done.stderr


def test_predict_tells_the_good_from_the_bad(trained, place):
    files = sorted((place / "audio").rglob("*.wav"))[:2]
    bad = place / "bad.wav"
    bad.write_bytes(b"RIFF")
    good = run("predict.py", f"--workdir={trained}", *files, "--format=json", cwd=place)
    assert good.returncode == 0, good.stderr
    assert [entry["path"] for entry in json.loads(good.stdout)] == [str(path) for path in files]
    assert "SYNTHETIC" in good.stderr
    mixed = run(
        "predict.py",
        f"--workdir={trained}",
        files[0],
        bad,
        f"--out={place}/labels.csv",
        "--format=csv",
        cwd=place,
    )
    assert (
        mixed.returncode == 3
        and "bad.wav" in mixed.stderr
        and "1 files predicted, 1 failed" in mixed.stderr
    )
    assert len((place / "labels.csv").read_text().splitlines()) == 3
    assert run("predict.py", f"--workdir={trained}", bad, cwd=place).returncode == 2
    assert "no files" in run("predict.py", f"--workdir={trained}", cwd=place).stderr


def test_the_ablation_makes_one_table_and_resumes(trained, place, flags_of_a_small_run):
    config = place / "sweep.py"
    config.write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('synthetic', '{ROOT}/configs/synthetic.py')\n"
        "module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
        "get_config = module.get_config\n"
        "def sweep():\n    yield 'plain', {}\n    yield 'dropped', {'model.dropout': 0.9}\n"
    )
    flags = [
        f"--config={config}",
        *flags_of_a_small_run[1:],
        f"--workdir={place}/ablation",
        "--seeds=2",
    ]
    done = run("ablate.py", *flags, cwd=place)
    assert done.returncode == 0, done.stderr
    table = (place / "ablation" / "ablation.csv").read_text()
    assert len(table.splitlines()) == 3 and "model.dropout=0.9" in table
    assert (place / "ablation" / "variants.png").stat().st_size > 5_000
    again = run("ablate.py", *flags, cwd=place)
    assert again.returncode == 0 and (place / "ablation" / "ablation.csv").read_text() == table


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (
            "train.py",
            ["--config.optimizer.learning_rat=1.0"],
            "config.optimizer.learning_rat is not a field.*Did you mean.*learning_rate",
        ),
        (
            "train.py",
            ["--config.optimzer.name=adam"],
            'the flags cannot be used: .*Did you mean "optimizer" instead of "optimzer"',
        ),
        ("train.py", ["--config.batch_size=many"], "batch_size"),
        (
            "train.py",
            ["--config.model.filtres=(3,)"],
            "model.filtres is not a field.*Did you mean 'filters'",
        ),
        ("train.py", ["--config.optimizer.name=adamm"], "Did you mean 'adam'"),
        (
            "train.py",
            ["--config.data.stores_root=nowhere"],
            "no finished spectrogram store.*prepare.py",
        ),
        ("train.py", ["--config.data.crop_frames=40"], "normalise=band"),
        (
            "prepare.py",
            ["--config.data.dataset=gtzam"],
            "no data set 'gtzam'. Did you mean 'gtzan'",
        ),
        ("prepare.py", ["--config.data.dataset=gtzan", "--config.data.root="], "data.root"),
        ("prepare.py", ["stray"], "unexpected argument 'stray'"),
    ],
)
def test_mistakes_are_one_clear_line(
    trained, place, flags_of_a_small_run, script, arguments, message
):
    workdir = [f"--workdir={place}/other"] if script == "train.py" else []
    done = run(script, *flags_of_a_small_run, *workdir, *arguments, cwd=place)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert not (place / "other" / "checkpoints").exists()


@pytest.mark.parametrize(
    "script", sorted(path.name for path in (ROOT / "experiments").glob("*.py"))
)
def test_help_says_what_it_does_and_how(script):
    done = run(script, "--help")
    assert done.returncode == 1  # absl's status for help
    assert f"python experiments/{script}" in done.stdout


def test_leakage_can_be_fatal(trained, place):
    done = run(
        "evaluate.py",
        f"--workdir={trained}",
        f"--store={next((place / 'stores').iterdir())}",
        "--split=valid",
        "--fatal_leakage",
        cwd=place,
    )
    assert done.returncode == 0, done.stderr


def test_leakage_that_cannot_be_known_is_fatal_too(trained, place):
    """A bundle of version 0.1 does not list its training clips."""
    bundle, out = place / "run.safetensors", place / "evaluated"
    save_bundle(dataclasses.replace(load_model(trained), trained_on=UNKNOWN), bundle)
    store = next((place / "stores").iterdir())
    done = run(
        "evaluate.py",
        f"--workdir={bundle}",
        f"--store={store}",
        f"--out={out}",
        "--fatal_leakage",
        cwd=place,
    )
    assert (
        done.returncode == 4
        and "not known to be" in done.stderr
        and (out / "report.html").is_file()
    )
    assert "training clips unknown: " in done.stdout and "no leak" not in done.stdout
