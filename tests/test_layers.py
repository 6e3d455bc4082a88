"""Imports only point down, and functions stay short enough to read."""

import ast
import itertools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "musicgenre"
# Lowest first. Packages of one layer do not import each other.
LAYERS = (
    ("errors",),
    ("files", "registry"),
    ("audio", "datasets", "models", "evaluation"),
    ("store",),
    ("config",),
    ("runs",),
    ("training",),
    ("inference",),
    ("studies", "explain", "exchange"),
    ("cli", "web"),
    ("experiments",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# What a file may import against the rule, and why.
ALLOWED = {("cli", "web"): "serve starts the page", ("files", "registry"): ""}
FILES = sorted(PACKAGE.rglob("*.py"))


def package_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported_packages(path):
    """Returns the packages of ours that a file imports, inside functions and for types as well."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "musicgenre" and len(parts) > 1 and parts[1] in LEVEL:
                yield parts[1]


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if package_of(path) not in ("__init__", "__main__")],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_imports_point_down(path):
    here = package_of(path)
    assert here in LEVEL, f"{here} has no layer: add it to LAYERS"
    for there in set(imported_packages(path)) - {here}:
        if (here, there) not in ALLOWED:
            assert LEVEL[there] < LEVEL[here], f"{here} imports {there}, which is not below it"


def test_no_function_is_longer_than_a_hundred_lines():
    long = []
    for path in itertools.chain(FILES, (PACKAGE.parent / "experiments").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if lines > 100:
                    long.append(f"{path.name}:{node.name} {lines}")
    assert long == []
