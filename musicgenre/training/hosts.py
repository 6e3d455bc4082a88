"""Several processes as one run: how they find each other, and how all of them end when one does before its time.

JAX's processes share one fate: a step that one of them has left cannot be finished by the others. What is lost is the work since
the last checkpoint, from which the same commands go on.
"""

import contextlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator

import jax

from musicgenre.errors import LOST_PROCESS, UserError
from musicgenre.runs.processes import AGAIN, ProcessLost, is_lost

# Exit code of a process that had to stop because another one did.
LOST = LOST_PROCESS
# Process 0 is the meeting place, without which JAX aborts the others: it leaves last, so that each can say why it ends.
_LEADER_WAITS = 2.0
# JAX ends processes that miss another one from within C++, where no Python can say a word. This one reads nothing then.
_WATCHER = "import sys; sys.stdin.read(1) or print(sys.argv[1], file=sys.stderr)"


def join(coordinator: str, processes: int | None, process: int | None, heartbeat: int) -> None:
    """Joins this process with the others; is called before anything else of JAX.

    Args:
      coordinator: address:port of process 0, or "auto" where JAX knows the cluster (a TPU pod, SLURM).
      processes: how many there are.
      process: this one's number, from 0.
      heartbeat: seconds without a sign of life after which a process counts as dead, and the others stop.

    Raises:
      UserError: a number is missing or impossible, or the others were not found in time.
    """
    if coordinator != "auto" and (processes is None or process is None):
        raise UserError(
            "--coordinator needs --num_processes and --process_id, too; only 'auto' finds them out."
        )
    place = {} if coordinator == "auto" else {"coordinator_address": coordinator}
    try:
        jax.distributed.initialize(
            **place,
            num_processes=processes,
            process_id=process,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=60,
        )
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--coordinator={coordinator}, --num_processes={processes}, --process_id={process}: not joined ({reason})."
        ) from error


@contextlib.contextmanager
def one_fate() -> Iterator[None]:
    """Ends the process at once at an exception, with one line about it, where there are several processes.

    Python's ordinary end would wait for the others, which wait for this one. The exit code is 2 after a UserError, LOST after the
    loss of another process, else 1. Should JAX end the process itself, by SIGABRT, or anyone by another signal, a line says so.
    """
    if jax.process_count() == 1:
        yield
        return
    number = f"process {jax.process_index()} of {jax.process_count()}"
    line = f"error: {number} was ended from outside, or because another process has ended. {AGAIN}"
    # In a session of its own, Ctrl-C does not reach it.
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-c", _WATCHER, line], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError):
            line, code = str(error), LOST if is_lost(error) else 2
        elif isinstance(error, Exception) and is_lost(error):
            line, code = str(ProcessLost(error)), LOST
        else:
            traceback.print_exc()
            line, code = f"{number} failed, see above.", 1
        print(f"error: {line}", file=sys.stderr, flush=True)
        _said(watcher)
        if jax.process_index() == 0:
            time.sleep(_LEADER_WAITS)
        os._exit(code)
    _said(watcher)


def _said(watcher: "subprocess.Popen[bytes]") -> None:
    """Tells the watcher that there is nothing left to say."""
    watcher.communicate(b".")
