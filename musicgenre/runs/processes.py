"""How an error tells that another process of the run has gone."""

import re

import jax

from musicgenre.errors import UserError

AGAIN = "Start all processes again with the same commands: the run goes on from the last whole checkpoint."


class ProcessLost(UserError):
    """A step failed because another process has gone, or by this process's own fault, of which the message tells."""

    def __init__(self, error: Exception) -> None:
        reason = str(error).splitlines()[0][:200]
        super().__init__(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on ({reason}). Most likely another process has "
            f"ended; its own output says why. {AGAIN}"
        )


def is_lost(error: BaseException) -> bool:
    """Returns whether an error is of a step or an agreement of several processes, one of which has gone."""
    if isinstance(error, ProcessLost):
        return True
    # XLA raises some of them as a ValueError that begins with its status, "UNKNOWN: Gloo AllGather failed".
    status = isinstance(error, ValueError) and re.match("[A-Z_]+: ", str(error))
    return jax.process_count() > 1 and (
        isinstance(error, jax.errors.JaxRuntimeError) or bool(status)
    )
