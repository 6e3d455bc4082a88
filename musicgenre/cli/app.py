"""How every command starts and ends: flags, configs by name, messages, exit codes, signals."""

import contextlib
import difflib
import importlib.util
import inspect
import itertools
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from musicgenre import __version__
from musicgenre.errors import USER_ERROR, UserError


def define_config(flag_values: flags.FlagValues) -> None:
    """Defines `--config`, and `--config.a.b=value` for each of its fields."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "A shipped config by name, such as gtzan_conv1d, or the path of a file with get_config(). "
        "A text after a colon is passed to get_config: mtat_fcn4:fcn5. Any field can follow as "
        "--config.a.b=value; `musicgenre config` lists them.",
        flag_values=flag_values,
        lock_config=False,
        accept_new_attributes=True,
    )


def get_config(flag_values: flags.FlagValues) -> ConfigDict:
    """Returns the checked config that the flags describe.

    Raises:
      UserError: no config was given, or a field is unknown or has a wrong value.
    """
    from musicgenre.config import check_config

    config = flag_values.config
    if config is None:
        raise UserError("--config is needed, such as --config=synthetic.")
    check_config(config)
    return config


def config_file(name: str) -> str:
    """Returns the path of a config file, with the part after a colon if there is one.

    The name is a path, or that of a shipped config such as "ablations/gtzan_networks".

    Raises:
      UserError: there is no such file or config.
    """
    path, colon, argument = name.partition(":")
    if os.path.isfile(path):
        return name
    shipped = config_folder() / f"{path}.py"
    if path and shipped.is_file():
        return f"{shipped}{colon}{argument}"
    known = config_names()
    near = difflib.get_close_matches(Path(path).stem, known, n=3)
    hint = f"The nearest: {', '.join(near)}." if near else f"Shipped: {', '.join(known)}."
    raise UserError(f"--config={name}: no such file or shipped config. {hint}")


def config_folder() -> Path:
    """Returns the folder of the shipped configs."""
    spec = importlib.util.find_spec("musicgenre.configs")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def config_names() -> list[str]:
    """Returns the names of the shipped configs, such as "ablations/gtzan_networks"."""
    folder = config_folder()
    paths = [*folder.glob("*.py"), *folder.glob("ablations/*.py")]
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in paths)
    return sorted(name for name in names if not name.endswith("__init__"))


def command_line() -> str:
    """Returns the command that runs, for reports."""
    program = [] if Path(sys.argv[0]).name == "musicgenre" else ["python"]
    return shlex.join([*program, *sys.argv])


def run(name: str) -> NoReturn:
    """Runs the script that is the module `name`, with this process's arguments, and exits."""
    sys.exit(execute(sys.modules[name], [sys.argv[0]], sys.argv[1:]))


def execute(command: Any, program: Sequence[str], words: Sequence[str]) -> int:
    """Runs a command's module and returns its exit code, see `musicgenre.errors`.

    The words of the command line are those of `program`, then the flags and arguments in `words`.
    """

    def run() -> int | None:
        options = list(itertools.takewhile(lambda word: word != "--", words))
        if any(word in ("--help", "-h", "--helpfull", "--helpshort") for word in options):
            print(help_text(command))
            return 0
        if "--version" in options:
            print(f"musicgenre {__version__}")
            return 0
        rest = _parse(command, words)
        logging.use_absl_handler()
        return command.main(rest) if hasattr(command, "ARGUMENTS") else command.main()

    if "verbosity" not in command.FLAGS:
        command.FLAGS["verbosity"] = flags.FLAGS["verbosity"]
    # A user's own module (config.module) is found in the current folder.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with _process(program, words):
        return guarded(run)


def guarded(function: Callable[[], int | None]) -> int:
    """Calls a function and returns its exit code; expected errors end with one line."""
    # File names that are not valid text go out as the bytes that came in.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        code = function() or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        return _fail(str(error), USER_ERROR)
    except KeyboardInterrupt:
        return _fail("stopped.", 128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        logging.debug("%s", traceback.format_exc())
        return _fail(f"{os.fsdecode(error.filename)}: {error.strerror}.", USER_ERROR)


@contextlib.contextmanager
def _process(program: Sequence[str], words: Sequence[str]) -> Iterator[None]:
    """Sets `sys.argv`, which `--config` looks for its fields in, and the handler of SIGTERM."""

    def terminate(number: int, frame: Any) -> NoReturn:
        # As an exception, so that no temporary file stays behind.
        raise SystemExit(128 + number)

    argv, handler = sys.argv, signal.signal(signal.SIGTERM, terminate)
    sys.argv = [*program, *words]
    try:
        yield
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)


def _parse(command: Any, words: Sequence[str]) -> list[str]:
    """Parses the flags and returns the other arguments.

    Raises:
      UserError: a flag is unknown, missing or has a wrong value.
    """
    values: flags.FlagValues = command.FLAGS
    # A command may run several times in one process, as in tests.
    for name in [name for name in values if name.startswith("config.")]:
        delattr(values, name)
    values.unparse_flags()
    logging.set_verbosity(logging.WARNING)
    # Grain's worker processes read absl's global flags.
    flags.FLAGS.mark_as_parsed()
    try:
        rest: list[str] = values(["", *_normalised(words, getattr(command, "REPEATED", ()))])[1:]
    except UserError:
        raise
    except flags.IllegalFlagValueError as error:
        if missing := re.match(r"flag --(\w+)=None: ", str(error)):
            # absl adds a line to the help of repeated flags.
            words = values[missing[1]].help.partition(";\n")[0]
            raise UserError(f"--{missing[1]} is needed: {words}") from None
        raise UserError(str(error).removeprefix("flag ")) from None
    except (flags.Error, ImportError, LookupError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, flags.UnrecognizedFlagError) and error.flagname[:7] == "config.":
            raise UserError("--config is needed before its fields --config.a.b=...") from None
        # A KeyError shows its message in quotes; the config library's messages have several lines.
        message = " ".join(str(error.args[0] if error.args else type(error).__name__).split())
        raise UserError(f"the flags cannot be used: {message}") from None
    if rest and not hasattr(command, "ARGUMENTS"):
        raise UserError(f"unexpected argument {rest[0]!r}: flags are written --name=value.")
    return rest


def _normalised(words: Sequence[str], repeated: Sequence[str]) -> list[str]:
    """Returns the words with `_` for `-` in flag names, configs as paths, and repeated flags."""
    result: list[str] = []
    open_flag = ""  # the repeated flag that takes the words that follow
    remaining = iter(words)
    for word in remaining:
        if word == "--":
            return [*result, word, *remaining]
        if not word.startswith("--"):
            result.append(f"--{open_flag}={word}" if open_flag else word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        open_flag = name if name in repeated and not equals else ""
        if name == "config":
            value = value if equals else next(remaining, "")
            result.append(f"--config={config_file(value)}")
        elif not open_flag:
            result.append(f"--{name}{equals}{value}")
    return result


def help_text(command: Any) -> str:
    """Returns a command's docstring and its flags."""
    lines = [inspect.cleandoc(command.__doc__), ""]
    if hasattr(command, "ARGUMENTS"):
        lines += [flags.text_wrap(command.ARGUMENTS, indent="  ", firstline_indent=""), ""]
    values: flags.FlagValues = command.FLAGS
    lines.append("flags:")
    for name in sorted(set(values) - {"v"}):
        flag = values[name]
        default = f" (default: {flag.default_as_str})" if flag.default else ""
        words = " ".join(flag.help.split()).replace(".;", ";")
        text = f"--{'[no]' if flag.boolean else ''}{name}: {words}{default}"
        lines.append(flags.text_wrap(text, indent="      ", firstline_indent="  "))
    return "\n".join(lines)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
