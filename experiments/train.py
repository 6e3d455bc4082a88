r"""Train a model; the same command resumes a stopped run, bit-exactly.

musicgenre train --config=gtzan_mels_conv1d --workdir=runs/conv1d --config.seed=1

On several hosts, each process runs the same command:

musicgenre train ... --coordinator=host0:1234 --num_processes=4 --process_id=0
"""

from absl import flags

from musicgenre.cli import app
from musicgenre.errors import UserError

FLAGS = flags.FlagValues()
app.define_config(FLAGS)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: config, metrics, checkpoints.", FLAGS, required=True
)
_PARALLEL = flags.DEFINE_enum(
    "parallel",
    "jit",
    ["jit", "pmap", "fsdp"],
    "How a step uses several devices; fsdp shards large parameters and their optimiser state.",
    FLAGS,
)
_PROGRESS = flags.DEFINE_bool("progress", True, "Draw a progress bar.", FLAGS)
_PROFILE = flags.DEFINE_list(
    "profile_steps", None, "First step and number of steps to trace, such as 20,5.", FLAGS
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "address:port of process 0, or 'auto' on a TPU pod or SLURM.", FLAGS
)
_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Number of processes, on several hosts.", flag_values=FLAGS
)
_PROCESS = flags.DEFINE_integer(
    "process_id", None, "This process's number, from 0.", flag_values=FLAGS
)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds",
    30,
    "A process that is silent for so long counts as lost, and all processes stop.",
    lower_bound=1,
    flag_values=FLAGS,
)


def main() -> int:
    """Trains, prints the result, and returns the exit code."""
    import jax

    from musicgenre.runs.workdir import Interrupted
    from musicgenre.training import hosts
    from musicgenre.training.fit import train

    config = app.get_config(FLAGS)
    steps = profile_steps(_PROFILE.value)
    if _COORDINATOR.value:
        hosts.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _HEARTBEAT.value)
    options = {"parallel": _PARALLEL.value, "progress": _PROGRESS.value, "profile_steps": steps}
    with hosts.one_fate():
        try:
            result = train(config, _WORKDIR.value, **options)
        except Interrupted as stop:
            print(stop)
            return 128 + stop.signal_number
    if jax.process_index() == 0:
        print(result.line())
    return 0


def profile_steps(values: list[str] | None) -> tuple[int, int] | None:
    """Returns the first step and the number of steps to trace.

    Raises:
      UserError: the flag does not have two numbers.
    """
    if not values:
        return None
    if len(values) != 2 or not all(value.isdigit() for value in values):
        raise UserError(
            f"--profile_steps={','.join(values)}: needs a first step and a count, such as 20,5."
        )
    return int(values[0]), int(values[1])


if __name__ == "__main__":
    app.run(__name__)
