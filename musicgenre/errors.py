"""The exception that a user's mistake raises, near-miss suggestions, and exit codes."""

import difflib
from collections.abc import Iterable

# Exit codes. 0 is success, 1 an internal error with its traceback, 128 + n the end by signal n.
USER_ERROR = 2  # flags or input that cannot be used
PARTIAL = 3  # some of several files failed, or running the command again gets more
LEAKAGE = 4  # `evaluate --fatal_leakage` found leaks, or does not know the training clips
LOST_PROCESS = 5  # another process of a run on several hosts is lost


class UserError(Exception):
    """Input that cannot be used. The message names the file, field or value and says what to do.

    Commands print the message without a traceback and exit with `USER_ERROR`.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the nearest of `known`, or a list of what is known."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Known: {', '.join(known)}." if known else ""
