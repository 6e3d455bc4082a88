"""What several commands share: file arguments, the model, tallies of failed files, output."""

import glob
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from musicgenre.errors import PARTIAL, USER_ERROR, UserError

if TYPE_CHECKING:
    from musicgenre.inference.tagger import Tagger
    from musicgenre.runs.model import TrainedModel

FILES = (
    "files: sound files, folders (all sound files below them), patterns such as 'music/*.mp3', or "
    "- for a list on standard input"
)


def define_model(flag_values: flags.FlagValues) -> None:
    """Defines `--model`, `--checkpoint` and `--min_seconds`."""
    flags.DEFINE_string(
        "model", "gtzan", "A packaged model's name, a run's folder or a bundle.", flag_values
    )
    define_checkpoint(flag_values)
    flags.DEFINE_float(
        "min_seconds", 1.0, "Shorter files are refused.", 0.0, flag_values=flag_values
    )


def define_checkpoint(flag_values: flags.FlagValues) -> None:
    """Defines `--checkpoint`."""
    flags.DEFINE_string("checkpoint", "last", "Of a run: last, best or a step.", flag_values)


def load_tagger(flag_values: flags.FlagValues) -> "Tagger":
    """Loads the model that the flags name, with a warning if it was trained on synthetic audio."""
    from musicgenre.inference.tagger import Tagger

    values = flag_values
    tagger = Tagger.load(values.model, values.checkpoint, min_seconds=values.min_seconds)
    warn_if_synthetic(tagger.model)
    return tagger


def warn_if_synthetic(model: "TrainedModel") -> None:
    """Prints a warning if a model was trained on synthetic audio."""
    if model.dataset.get("synthetic"):
        text = "this model was trained on synthetic audio; its labels mean nothing for real music."
        print(f"SYNTHETIC: {text}", file=sys.stderr)


def named(words: Sequence[str], *names: str) -> Sequence[str]:
    """Returns the arguments, one for each name.

    Raises:
      UserError: there are more or fewer.
    """
    if len(words) < len(names):
        raise UserError(f"missing argument: {names[len(words)]} (see --help).")
    if len(words) > len(names):
        raise UserError(f"unexpected argument {words[len(names)]!r} (see --help).")
    return words


class Tally:
    """Counts files, and reports on standard error those that fail."""

    def __init__(self) -> None:
        self.done = self.failed = 0

    def fail(self, message: str) -> None:
        """Reports one file, or one argument without files."""
        self.failed += 1
        print(f"error: {message}", file=sys.stderr, flush=True)

    def exit_code(self) -> int:
        """Returns 0, or after a line with the counts PARTIAL if some failed, USER_ERROR if all."""
        if not self.failed:
            return 0
        files = "file" if self.done == 1 else "files"
        print(f"{self.done} {files} done, {self.failed} failed", file=sys.stderr)
        return PARTIAL if self.done else USER_ERROR


def expand(arguments: Sequence[str], tally: Tally) -> list[str]:
    """Returns the files that arguments stand for, each once, in their order.

    A folder stands for all sound files below it, a pattern for its matches, and "-" for the lines
    of standard input (or its parts between zero bytes, as of `find -print0`), each read as an
    argument. Arguments without files are reported to `tally`. Missing files are returned;
    their reader reports them.

    Raises:
      UserError: there are no arguments, or the list on standard input is empty.
    """
    if not arguments:
        raise UserError("no files: name sound files or folders.")
    listed = _with_lists(arguments)
    files = dict.fromkeys(file for argument in listed for file in _expanded(argument, tally))
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
    return [file for match in matches for file in _expanded(match, tally)]


def write_lines(lines: Iterable[str], out: str) -> None:
    """Prints lines one by one, or writes them to the file `out` if it is not empty."""
    from musicgenre.files import replacing

    if not out:
        for line in lines:
            print(line, flush=True)
        return
    with (
        replacing(out) as path,
        open(path, "w", encoding="utf-8", errors="surrogateescape") as file,
    ):
        file.writelines(line + "\n" for line in lines)


def write_npz(out: str | Path, arrays: Mapping[str, Any]) -> None:
    """Writes named arrays to an .npz file, atomically."""
    import numpy as np

    from musicgenre.files import replacing

    with replacing(out) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
