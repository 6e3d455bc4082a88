"""The examples of docstrings and documents run, and every command in the documents parses.

In the pages, a fenced block whose first line reads "```sh not-run: <reason>" is only parsed. One
that reads "```python file=<name>" is written to that file.
"""

import contextlib
import doctest
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import soundfile

from musicgenre.cli import app, main

ROOT = Path(__file__).resolve().parents[1]
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "musicgenre").rglob("*.py")
    if re.search(r"^\s*>>> ", path.read_text(encoding="utf-8"), re.M)
)
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))
PAGES = sorted(
    [*(ROOT / "docs" / "tutorials").glob("*.md"), *(ROOT / "docs" / "how_to").glob("*.md")]
)
WITH_COMMANDS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(sh|python|toml)(.*?)\n(.*?)^```", re.M | re.S)


def commands(text):
    """Yields the words of each `musicgenre` command of a shell block, with $VARIABLES filled in."""
    variables = {}
    for line in text.replace("\\\n", " ").splitlines():
        if assigned := re.fullmatch(r'(\w)="(.*)"', line.strip()):
            variables[assigned[1]] = assigned[2]
            continue
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        if words[:1] == ["musicgenre"] and len(words) > 1:
            yield words[1:]


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """What a page registers is forgotten after it."""
    from musicgenre.datasets import registry as datasets
    from musicgenre.models import registered, registry

    registered()
    for names in (registry._MODELS, datasets._READERS):
        monkeypatch.setattr(names, "_items", dict(names._items))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A current folder with the synthetic music that the pages speak of."""
    from musicgenre.datasets.synthetic import render_clip

    for style in ("lantern", "quartz"):
        for take in range(6):
            samples = render_clip(style, seed=take, seconds=6)
            for path in (f"music/{style}/{take}.flac", f"stems/{style}-{take}.flac"):
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(tmp_path / path, samples, 22050)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    return tmp_path


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_code_of_a_page_runs_in_its_order(path, workplace, capsys):
    scope = {"__name__": "__page__"}
    for language, info, code in BLOCK.findall(path.read_text(encoding="utf-8")):
        if "not-run:" in info or language == "toml":
            continue
        if file := re.search(r"file=(\S+)", info):
            Path(file[1]).write_text(code, encoding="utf-8")
        elif language == "python":
            exec(compile(code, path.name, "exec"), scope)
        else:
            for words in commands(code):
                exit_code = main.main(words)
                assert exit_code == 0, (words, capsys.readouterr().err)


@pytest.mark.parametrize(
    "path", WITH_COMMANDS, ids=lambda path: str(path.relative_to(ROOT).with_suffix(""))
)
def test_every_command_in_a_document_parses(path, monkeypatch, tmp_path):
    """Flags and configs exist; nothing runs. Files that a page writes need not exist here."""
    monkeypatch.chdir(tmp_path)
    for language, _, code in BLOCK.findall(path.read_text(encoding="utf-8")):
        if language != "sh":
            continue
        for name, *words in commands(code):
            if any(
                word.startswith(("--config=my_", "--config=...")) or word == "..." for word in words
            ):
                continue
            module = importlib.import_module(main.command_modules()[name.replace("-", "_")])
            with contextlib.ExitStack() as stack:
                stack.enter_context(app._process(["musicgenre", name], words))
                app._parse(module, words)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_of_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0 and failed == 0


def test_the_readme_network_registers_and_takes_its_input():
    import jax
    import jax.numpy as jnp

    from musicgenre.models import build

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n# my_pkg/my_net.py\n(.*?)```", text, re.S)
    assert code
    exec(code[1], {"__name__": "my_pkg.my_net"})
    module = build({"name": "my_net", "width": 8}, num_classes=3, frames=20, bands=16)
    logits, _ = module.init_with_output(jax.random.key(0), jnp.zeros((2, 20, 16)))
    assert logits.shape == (2, 3)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: None)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    scope = {}
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        # One epoch shows that training runs.
        source = re.sub(
            r"^config\.epochs = \d+$", "config.epochs = 1", "".join(cell["source"]), flags=re.M
        )
        exec(compile(source, f"{path.name}, cell {cell['id']}", "exec"), scope)
        # What the reader sees is what ran, without errors.
        kinds = [output["output_type"] for output in cell["outputs"]]
        assert cell["execution_count"] and "error" not in kinds
    plt.close("all")
