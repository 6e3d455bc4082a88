"""The examples of docstrings and documents run, and give what they say."""

import doctest
import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "musicgenre").rglob("*.py")
    if re.search(r"^\s*>>> ", path.read_text(encoding="utf-8"), re.M)
)
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_of_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0 and failed == 0


def test_the_readme_network_of_ones_own(tmp_path: Path) -> None:
    """README's module registers, and takes what README says that it takes."""
    import jax
    import jax.numpy as jnp

    from musicgenre.models import registry

    code = re.search(
        r"```python\n# my_pkg/my_net.py\n(.*?)```",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.S,
    )
    assert code
    scope: dict[str, object] = {"__name__": "my_pkg.my_net"}
    before = dict(registry._MODELS._items)
    try:
        exec(code[1], scope)
        module = registry.build({"name": "my_net", "width": 8}, num_classes=3, frames=20, bands=16)
        logits, _ = module.init_with_output(jax.random.key(0), jnp.zeros((2, 20, 16)))
        assert logits.shape == (2, 3)
    finally:
        registry._MODELS._items.clear()
        registry._MODELS._items.update(before)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: None)
    cells = [
        cell
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    scope: dict[str, object] = {}
    for cell in cells:
        # One epoch shows that training runs.
        source = re.sub(
            r"^config\.epochs = \d+$", "config.epochs = 1", "".join(cell["source"]), flags=re.M
        )
        exec(compile(source, f"{path.name}, cell {cell['id']}", "exec"), scope)
        # What the reader sees is what ran, without errors.
        assert cell["execution_count"] and all(
            output["output_type"] != "error" for output in cell["outputs"]
        )
    plt.close("all")
