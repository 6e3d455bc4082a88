r"""Train a model; the same command resumes a stopped run, bit-exactly.

musicgenre train --config=gtzan_mels_conv1d --workdir=runs/conv1d --config.seed=1

On several hosts, each process runs the same command:

musicgenre train ... --coordinator=host0:1234 --num_processes=4 --process_id=0
"""

from absl import flags

from musicgenre.cli import app
from musicgenre.errors import UserError


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `train` and `pretrain`."""
    app.define_config(values)
    flags.DEFINE_string(
        "workdir", None, "The run's folder: config, metrics, checkpoints.", values, required=True
    )
    flags.DEFINE_enum(
        "parallel",
        "jit",
        ["jit", "pmap", "fsdp"],
        "How a step uses several devices; fsdp shards large parameters and their optimiser state.",
        values,
    )
    flags.DEFINE_bool("progress", True, "Draw a progress bar.", values)
    flags.DEFINE_list("profile_steps", None, "First step and number of steps to trace.", values)
    flags.DEFINE_string(
        "coordinator", None, "address:port of process 0, or auto on a TPU pod or SLURM.", values
    )
    flags.DEFINE_integer("num_processes", None, "Of several hosts.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "This process's number, from 0.", flag_values=values)
    flags.DEFINE_integer(
        "heartbeat_seconds",
        30,
        "A process that is silent for so long counts as lost, and all processes stop.",
        1,
        flag_values=values,
    )


FLAGS = flags.FlagValues()
define_flags(FLAGS)


def main() -> int:
    """Trains, prints the result, and returns the exit code."""
    return run("train", FLAGS)


def run(name: str, values: flags.FlagValues) -> int:
    """Runs `train` or `pretrain` of `musicgenre.training.fit`, and returns the exit code."""
    config = app.get_config(values)
    steps = profile_steps(values.profile_steps)

    import jax

    from musicgenre.runs.workdir import Interrupted
    from musicgenre.training import fit, hosts

    if values.coordinator:
        names = ("coordinator", "num_processes", "process_id", "heartbeat_seconds")
        hosts.join(*(values[name].value for name in names))
    options = {"parallel": values.parallel, "progress": values.progress, "profile_steps": steps}
    with hosts.one_fate():
        try:
            result = getattr(fit, name)(config, values.workdir, **options)
        except Interrupted as stop:
            print(stop)
            return 128 + stop.signal_number
    if jax.process_index() == 0:
        print(result.line())
    return 0


def profile_steps(words: list[str] | None) -> tuple[int, int] | None:
    """Returns the first step and the number of steps to trace; raises UserError for other text."""
    if not words:
        return None
    if len(words) != 2 or not all(word.isdigit() for word in words):
        given = ",".join(words)
        raise UserError(f"--profile_steps={given}: needs a first step and a count, such as 20,5.")
    return int(words[0]), int(words[1])


if __name__ == "__main__":
    app.run(__name__)
