"""The command `musicgenre`: one sub-command for each module of `musicgenre.cli`."""

import argparse
import importlib
import os
import pkgutil
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import musicgenre.cli
from musicgenre import __version__
from musicgenre.errors import UserError

# Exit codes, those of `experiments/` (`musicgenre.cli.app`): input that cannot be used; some of several files failed; stopped by
# Ctrl-C (128 + SIGINT).
USER_ERROR, PARTIAL, INTERRUPTED = 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
      arguments: what follows the command's name; those of this process if None.
    """
    # Names of files that are no text go out as the bytes that came in.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")
    # A user's own module (config.model.module) is found from the current folder, as with `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    parsed = build_parser().parse_args(
        [_underscored(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    )
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        code: int = parsed.run(parsed)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("error: stopped.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {os.fsdecode(error.filename)}: {error.strerror}.", file=sys.stderr)
        return USER_ERROR
    finally:
        signal.signal(signal.SIGTERM, before)
    return code


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands: one for each module of `musicgenre.cli` that has `add_arguments` and `run`."""
    parser = argparse.ArgumentParser(
        "musicgenre", description="Genres and tags of music, by a trained model."
    )
    parser.add_argument("--version", action="version", version=f"musicgenre {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    for found in pkgutil.iter_modules(musicgenre.cli.__path__):
        if found.name in ("app", "files", "main"):
            continue
        module: Any = importlib.import_module(f"musicgenre.cli.{found.name}")
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(
            found.name.replace("_", "-"),
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _underscored(word: str) -> str:
    """Returns an option with `_` for `-` in its name, so that `--dry-run` and `--dry_run` are the same."""
    if not word.startswith("--") or word == "--":
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _terminate(number: int, frame: Any) -> NoReturn:
    """Ends as after Ctrl-C, so that no temporary file is left behind."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
