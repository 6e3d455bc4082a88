"""The installed package: the wheel holds all of the tree and works from an empty folder.

`make wheel-test` does the same in a fresh environment with its dependencies.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from musicgenre import __version__

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--config=synthetic",
    "--config.data.clips_per_style=5",
    "--config.data.seconds=2.0",
    "--config.data.frames=86",
    "--config.epochs=1",
    "--config.batch_size=8",
    "--config.model.filters=(8, 8)",
    "--config.model.dense=(16,)",
    "--noprogress",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the tree, since a build leaves files in its folder."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("musicgenre", "configs", "experiments"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder / "dist", folder)
    (path,) = (folder / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder that the wheel is installed in."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--target", folder, wheel)
    return folder


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, *map(str, arguments), "--no-deps"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_every_file_of_the_tree(wheel):
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if name.startswith("musicgenre/")}
    files = [path for path in (ROOT / "musicgenre").rglob("*") if path.is_file()]
    for folder in ("configs", "experiments"):
        files += (ROOT / folder).rglob("*.py")
    names = [path.relative_to(ROOT) for path in files if "__pycache__" not in path.parts]
    expected = {name.as_posix().removeprefix("musicgenre/") for name in names}
    assert held == {f"musicgenre/{name}" for name in expected}
    assert {"musicgenre/py.typed", "musicgenre/weights/gtzan.safetensors"} < held
    assert {
        "musicgenre/configs/ablations/gtzan_networks.py",
        "musicgenre/web/static/page.js",
    } < held


def test_the_version_is_in_one_place(wheel):
    assert wheel.name.startswith(f"musicgenre-{__version__}-")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"] and "version" not in project


def test_from_an_empty_folder_to_labels(installed, tmp_path):
    def python(*words):
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(*words):
        return python("-m", "musicgenre", *words)

    # No file of the clone is used.
    code = "import musicgenre.configs as c, musicgenre.cli.app as a; print(c.__file__, a.__file__)"
    assert python("-c", code).count(f"{installed}/musicgenre/c") == 2
    assert run("--version") == f"musicgenre {__version__}\n"
    assert re.search(r"^  train  +Train a model", run(), re.MULTILINE)
    assert "50 clips" in run("prepare", *SMALL, "--workers=1")
    assert "validation accuracy" in run("train", *SMALL, "--workdir=run")
    report = run("evaluate", "--workdir=run", "--split=test").splitlines()[-1]
    assert report == "report: run/evaluation-test/report.html"
    sound = next(tmp_path.rglob("*.wav"))
    assert run("tag", sound, "--workdir=run", "--top=1").startswith(f"{sound}  ")
