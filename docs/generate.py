"""An MkDocs hook that adds the reference pages made from the code: commands, fields and API."""

import importlib
import pkgutil

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import musicgenre
from musicgenre.cli import app
from musicgenre.cli.main import COMMANDS, command_modules
from musicgenre.config import reference

# Packages whose modules make up the API reference, in the order of the data flow.
PACKAGES = (
    "audio",
    "datasets",
    "models",
    "evaluation",
    "store",
    "config",
    "runs",
    "training",
    "inference",
    "studies",
    "explain",
    "exchange",
)


def api_page() -> list[str]:
    """Returns the lines of the API page: one entry per module."""
    lines = ["# API", "", "Modules in the order of the data flow; imports only point up this page."]
    for package in PACKAGES:
        path = [f"{musicgenre.__path__[0]}/{package}"]
        lines += ["", f"## musicgenre.{package}"]
        for module in pkgutil.walk_packages(path, f"musicgenre.{package}."):
            if not module.ispkg and module.name != "musicgenre.store.beam":
                lines += ["", f"::: {module.name}", "    options:", "      heading_level: 3"]
    return lines


def commands_page() -> list[str]:
    """Returns the lines of the commands page: the help of every command."""
    lines = ["# Commands", "", "`musicgenre <command> --help` prints these texts."]
    modules = command_modules()
    for group, (_, names) in COMMANDS.items():
        lines += ["", f"## {group}"]
        for name in names.split():
            text = app.help_text(importlib.import_module(modules[name]))
            lines += ["", f"### musicgenre {name}", "", "```text", text, "```"]
    return lines


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages to the site."""
    pages = {
        "reference/config.md": list(reference.markdown()),
        "reference/commands.md": commands_page(),
        "reference/api.md": api_page(),
    }
    for path, lines in pages.items():
        files.append(File.generated(config, path, content="\n".join(lines) + "\n"))
    return files
