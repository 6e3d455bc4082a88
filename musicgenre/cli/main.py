"""The program `musicgenre`: finds the command that the first word names and runs it."""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from musicgenre import __version__
from musicgenre.cli import app
from musicgenre.errors import USER_ERROR, did_you_mean

# Each group's commands, which are modules of the package named.
COMMANDS = {
    "Data": ("experiments", "download fetch_previews prepare prepare_beam"),
    "Training": ("experiments", "train pretrain ablate"),
    "Evaluation": ("experiments", "evaluate robustness figures"),
    "Your music": ("cli", "tag taggram similar explain embed serve"),
    "Models": ("cli", "bundle export import_musicnn config"),
    "Other names": ("experiments", "predict"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code, see `musicgenre.errors`.

    Args:
      arguments: the command's name, its flags and arguments; those of this process if None.
    """
    name, *words = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h", "help"):
        return app.guarded(lambda: print(_overview()))
    if name == "--version":
        print(f"musicgenre {__version__}")
        return 0
    modules = command_modules()
    if name.replace("-", "_") not in modules:
        print(f"error: no command {name!r}.{did_you_mean(name, modules)}", file=sys.stderr)
        return USER_ERROR
    module = importlib.import_module(modules[name.replace("-", "_")])
    return app.execute(module, ["musicgenre", name], words)


def command_modules() -> dict[str, str]:
    """Returns the module of every command."""
    return {
        name: f"musicgenre.{package}.{name}"
        for package, names in COMMANDS.values()
        for name in names.split()
    }


def _overview() -> str:
    """Returns the commands with the first lines of their docstrings, which are read, not run."""
    modules = command_modules()
    lines = [
        "Music genre classification and tagging with convolutional networks.",
        "",
        "musicgenre <command> [--help] [flags and arguments]",
    ]
    for group, (_, names) in COMMANDS.items():
        lines += ["", f"{group}:"]
        for name in names.split():
            spec = importlib.util.find_spec(modules[name])
            assert spec is not None and spec.origin is not None
            text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
            lines.append(f"  {name:16}{text.splitlines()[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
