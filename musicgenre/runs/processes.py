"""Errors of a run on several processes when one of them has died."""

import re

import jax

from musicgenre.errors import UserError

AGAIN = (
    "Start all processes again with the same commands: "
    "the run resumes from the last complete checkpoint."
)


class ProcessLost(UserError):
    """A step failed because another process has died, or because of this process's own error."""

    def __init__(self, error: Exception) -> None:
        reason = str(error).splitlines()[0][:200]
        super().__init__(
            f"process {jax.process_index()} of {jax.process_count()} cannot continue ({reason}). "
            f"Most likely another process has ended; its own output says why. {AGAIN}"
        )


def is_lost(error: BaseException) -> bool:
    """Returns whether an error comes from a process that has died."""
    if isinstance(error, ProcessLost):
        return True
    # XLA raises some as a ValueError that begins with a status: "UNKNOWN: Gloo AllGather failed".
    status = isinstance(error, ValueError) and bool(re.match("[A-Z_]+: ", str(error)))
    return jax.process_count() > 1 and (status or isinstance(error, jax.errors.JaxRuntimeError))
