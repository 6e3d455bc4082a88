r"""Trains a model. The same command goes on where it was stopped, to the bit.

python experiments/train.py --config=configs/gtzan_mels_conv1d.py --workdir=runs/conv1d --config.seed=1
"""

import jax
from absl import flags

from musicgenre.cli import app
from musicgenre.errors import UserError
from musicgenre.runs.workdir import Interrupted
from musicgenre.training import hosts
from musicgenre.training.fit import train
from musicgenre.training.parallel import KINDS

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: config, metrics and checkpoints.", required=True
)
_PARALLEL = flags.DEFINE_enum(
    "parallel",
    "jit",
    KINDS,
    "How a step is spread over the devices; fsdp cuts large parameters and their optimiser's state up to save memory.",
)
_PROGRESS = flags.DEFINE_bool("progress", True, "Draw a progress bar.")
_PROFILE = flags.DEFINE_list(
    "profile_steps", None, "First step and number of steps to trace into <workdir>/profile: 20,5."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "Several hosts: address:port of process 0, or 'auto' on a TPU pod or SLURM.",
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several hosts: how many processes.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Several hosts: this one's number, from 0.")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds",
    30,
    "Several hosts: without a sign of life for so long, a process counts as dead, and all stop.",
    1,
)


def main() -> int:
    """Trains, prints how it ended, and returns the exit code."""
    config = app.get_config()
    if _COORDINATOR.value:
        hosts.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _HEARTBEAT.value)
    steps = None
    if _PROFILE.value:
        if len(_PROFILE.value) != 2 or not all(value.isdigit() for value in _PROFILE.value):
            raise UserError(
                f"--profile_steps takes a first step and a count, such as 20,5, not {','.join(_PROFILE.value)!r}."
            )
        steps = (int(_PROFILE.value[0]), int(_PROFILE.value[1]))
    with hosts.one_fate():
        try:
            result = train(
                config,
                _WORKDIR.value,
                parallel=_PARALLEL.value,
                progress=_PROGRESS.value,
                profile_steps=steps,
            )
        except Interrupted as stop:
            print(stop)
            return 128 + stop.signal_number
    if jax.process_index() == 0:
        print(result.line())
    return 0


if __name__ == "__main__":
    app.define_config_flag()
    app.run(main)
