"""What several commands share: the files that they are given, the model, and what is said of files that cannot be used."""

import argparse
import glob
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from musicgenre.errors import UserError

if TYPE_CHECKING:
    from musicgenre.inference.tagger import Tagger


def add_files(parser: argparse.ArgumentParser) -> None:
    """Adds the files and `--min_seconds`."""
    parser.add_argument(
        "files",
        nargs="+",
        help="sound files, folders (all sound files below), patterns such as 'music/*.mp3', or - for a list on stdin",
    )
    parser.add_argument(
        "--min_seconds",
        type=float,
        default=1.0,
        help="shorter files are refused (default: %(default)s)",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds `--model` and `--checkpoint`."""
    parser.add_argument(
        "--model",
        default="gtzan",
        help="a model of this package, a run's folder, or a .safetensors file (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoint", default="last", help="of a run: last, best or a step (default: %(default)s)"
    )


def load_tagger(arguments: argparse.Namespace) -> "Tagger":
    """Loads the model that the arguments name, and says so where it was trained on made-up audio."""
    from musicgenre.inference.tagger import Tagger

    tagger = Tagger.load(arguments.model, arguments.checkpoint, min_seconds=arguments.min_seconds)
    if tagger.model.dataset.get("synthetic"):
        print(
            "SYNTHETIC: this model was trained on made-up audio; its labels mean nothing for real music.",
            file=sys.stderr,
        )
    return tagger


class Tally:
    """Counts files, and says on standard error which cannot be used and why."""

    def __init__(self) -> None:
        self.done = 0
        self.failed = 0

    def fail(self, message: str) -> None:
        """Reports one file, or one argument that gives none."""
        self.failed += 1
        print(f"error: {message}", file=sys.stderr, flush=True)

    def exit_code(self) -> int:
        """Returns 0, or 3 where some failed, or 2 where all did, after a line that says how many."""
        if not self.failed:
            return 0
        print(f"{self.done} files done, {self.failed} failed", file=sys.stderr)
        return 3 if self.done else 2


def expand(arguments: Iterable[str], tally: Tally) -> list[str]:
    """Returns the files that arguments mean, each once, in their order.

    A folder means all sound files below it, a pattern what it matches, and "-" the lines of standard input (or what lies between
    zero bytes, as of `find -print0`), each read as an argument. What gives no file is reported. A file that does not exist is
    returned: whoever reads it says so.

    Args:
      arguments: as they were typed.
      tally: is told what gives no file.

    Raises:
      UserError: nothing at all is left, and nothing was reported.
    """
    files: dict[str, None] = {}
    for argument in _with_lists(arguments):
        found = _expanded(argument, tally)
        files.update(dict.fromkeys(found))
    if not files and not tally.failed:
        raise UserError("the list on standard input is empty.")
    return list(files)


def _with_lists(arguments: Iterable[str]) -> Iterator[str]:
    for argument in arguments:
        if argument != "-":
            yield argument
            continue
        content = sys.stdin.buffer.read()
        lines = content.split(b"\0") if b"\0" in content else content.splitlines()
        yield from (os.fsdecode(line) for line in lines if line.strip())


def _expanded(argument: str, tally: Tally) -> list[str]:
    from musicgenre.datasets.base import find_audio

    if os.path.isdir(argument):
        found = [str(path) for path in find_audio(Path(argument))]
        if not found:
            tally.fail(f"{argument}: no sound files in this folder.")
        return found
    if os.path.lexists(argument) or not glob.has_magic(argument):
        return [argument]
    matches = sorted(glob.glob(argument, recursive=True))
    if not matches:
        tally.fail(f"{argument}: no file matches this pattern.")
    return [
        file
        for match in matches
        for file in (_expanded(match, tally) if os.path.isdir(match) else [match])
    ]
