'''The command line: one module per command, run by `musicgenre <command>` (`musicgenre.cli.main`).

The commands that use a trained model are in this package. The research commands are the files in
`experiments/`, shipped as `musicgenre.experiments`; `python experiments/train.py` and
`musicgenre train` run the same code. A command is a module like this one, listed in
`musicgenre.cli.main.COMMANDS`:

    """Print a greeting, such as for a friend.

    musicgenre greet Ada --times=2
    """

    from absl import flags

    from musicgenre.cli import app

    FLAGS = flags.FlagValues()
    ARGUMENTS = "names: who is greeted"
    _TIMES = flags.DEFINE_integer("times", 1, "Greetings per name.", 1, flag_values=FLAGS)


    def main(names: list[str]) -> int:
        """Greets and returns the exit code."""
        ...
        return 0


    if __name__ == "__main__":
        app.run(__name__)

- The docstring is the help, its first line the entry in the list of commands.
- `FLAGS` holds this command's flags only, so several commands can be imported into one process.
  `app.define_config(FLAGS)` adds `--config`, and `app.get_config(FLAGS)` reads and checks it.
- `ARGUMENTS` describes the arguments that are not flags and are passed to `main`. Without it the
  command takes none, and `main` has no parameters.
- `REPEATED`, a tuple of flag names, lets `--clips a b` stand for `--clips=a --clips=b`.
- `main` returns an exit code of `musicgenre.errors`, or None for 0, and raises `UserError`.
- JAX and other slow imports belong in `main`, so that `--help` and mistakes answer at once.

The last part, `if __name__`, is for the scripts in `experiments/` only.
'''
