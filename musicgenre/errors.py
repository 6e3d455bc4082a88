"""The one exception that a user's mistake raises, and the near-miss suggestion that goes with it."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Input that cannot be used. The message names the file, field or value and says what to do.

    The mains in `experiments/` print the message without a traceback and exit with status 2.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the nearest of `known`, or a list of what is known."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Known: {', '.join(known)}." if known else ""
