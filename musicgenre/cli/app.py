"""How every main in `experiments/` starts and ends: flags, the config flag, messages and exit codes."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from musicgenre.config import check_config
from musicgenre.errors import UserError

# Exit codes: input that cannot be used; some of several files failed; stopped by the user (128 + SIGINT).
USER_ERROR, PARTIAL, INTERRUPTED = 2, 3, 130


def define_config_flag(default: str | None = None) -> None:
    """Defines `--config`, a file with `get_config()`, and `--config.a.b=value` for each of its fields."""
    config_flags.DEFINE_config_file(
        "config",
        default,
        "A config file such as configs/synthetic.py. Any field follows as --config.a.b=value: see "
        "musicgenre/config.py for all of them.",
        lock_config=False,
        accept_new_attributes=True,
    )


def get_config() -> ConfigDict:
    """Returns the checked config that the flags describe.

    Raises:
      UserError: no config was given, or a field is unknown or has a wrong value.
    """
    config = flags.FLAGS.config
    if config is None:
        raise UserError("--config is needed, such as --config=configs/synthetic.py.")
    check_config(config)
    return config


def run(main: Callable[..., int | None], *, takes_files: bool = False) -> None:
    """Parses the flags, runs `main` and exits.

    Args:
      main: is called without arguments, or with the list of those that are no flags if it `takes_files`.
      takes_files: allow arguments that are no flags.

    The exit code is what `main` returns (None is 0), 2 after a UserError or a bad flag, 130 after Ctrl-C. Errors that a
    user can mend print one line and no traceback.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        # A user's own module (--config.model.module) is found from the current folder, as with `python -m`.
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        logging.set_verbosity(logging.WARNING)
        try:
            rest = app.parse_flags_with_usage(list(argv))
        except (
            UserError,
            ImportError,
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
            OSError,
        ) as error:
            # A KeyError shows its message in quotes; the config library's messages have several lines.
            message = " ".join(str(error.args[0] if error.args else type(error).__name__).split())
            _die(f"the flags cannot be used: {message}", USER_ERROR)
        if len(rest) > 1 and not takes_files:
            _die(f"unexpected argument {rest[1]!r}: flags are written --name=value.", USER_ERROR)
        return rest

    def guarded(argv: Sequence[str]) -> int:
        logging.use_absl_handler()
        try:
            return (main(list(argv[1:])) if takes_files else main()) or 0
        except UserError as error:
            _die(str(error), USER_ERROR)
        except KeyboardInterrupt:
            _die("stopped.", INTERRUPTED)
        except BrokenPipeError:
            # The reader of our output has gone (`| head`); there is nobody left to tell.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            if error.filename is None:
                raise
            logging.debug("%s", traceback.format_exc())
            _die(f"{error.filename}: {error.strerror}.", USER_ERROR)
        return 0

    app.run(guarded, flags_parser=parse)


def _die(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
