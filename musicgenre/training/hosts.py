"""Several processes as one run: how they join, and how all end when one of them does.

The others cannot finish a step that one of them has left. The work since the last checkpoint is
lost; the same commands resume from there.
"""

import contextlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax

from musicgenre.errors import LOST_PROCESS, UserError
from musicgenre.runs.processes import AGAIN, ProcessLost, is_lost

LOST = LOST_PROCESS  # exit code of a process that had to stop because another one did
# JAX aborts the others when process 0 is gone, so it leaves last and each can say why it ends.
_LEADER_WAITS = 2.0
# JAX ends a process that misses another one from C++, where Python cannot print. Then this one's
# input closes, and it prints.
_WATCHER = "import sys; sys.stdin.read(1) or print(sys.argv[1], file=sys.stderr)"


def join(coordinator: str, processes: int | None, process: int | None, heartbeat: int) -> None:
    """Joins this process, number `process` of `processes`. Call it before anything else of JAX.

    `coordinator` is address:port of process 0, or "auto" if JAX knows the cluster (TPU pod, SLURM).
    After `heartbeat` seconds without a sign of life a process counts as dead.

    Raises:
      UserError: a number is missing or impossible, or the others were not found in time.
    """
    address = None if coordinator == "auto" else coordinator
    if address and (processes is None or process is None):
        raise UserError(
            "--coordinator needs --num_processes and --process_id as well; only 'auto' finds them."
        )
    timeouts: Any = {"heartbeat_timeout_seconds": heartbeat, "shutdown_timeout_seconds": 60}
    try:
        jax.distributed.initialize(address, processes, process, **timeouts)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UserError(
            f"--coordinator={coordinator}, --num_processes={processes}, --process_id={process}: "
            f"not joined ({str(error).splitlines()[0]})."
        ) from error


@contextlib.contextmanager
def one_fate() -> Iterator[None]:
    """With several processes, ends this one at once at an exception, with one line about it.

    Python's ordinary exit would wait for the others, which wait for this one. The exit code is 2
    after a UserError, LOST after the loss of another process, else 1. If JAX or a signal ends the
    process, a line says so.
    """
    if jax.process_count() == 1:
        yield
        return
    number = f"process {jax.process_index()} of {jax.process_count()}"
    line = f"error: {number} was ended from outside, or because another process has ended. {AGAIN}"
    # Ctrl-C does not reach it in its own session.
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-c", _WATCHER, line], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) and is_lost(error):
            code = LOST
            line = str(error if isinstance(error, UserError) else ProcessLost(error))
        elif isinstance(error, UserError):
            line, code = str(error), 2
        else:
            traceback.print_exc()
            line, code = f"{number} failed, see above.", 1
        print(f"error: {line}", file=sys.stderr, flush=True)
        watcher.communicate(b".")  # keeps it silent
        if jax.process_index() == 0:
            time.sleep(_LEADER_WAITS)
        os._exit(code)
    watcher.communicate(b".")
