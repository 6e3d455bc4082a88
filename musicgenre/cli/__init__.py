"""The sub-commands of `musicgenre`, one module each.

A module's name is the command's, its docstring the help. `add_arguments(parser)` says what it takes, `run(arguments)` does it
and returns the exit code. A module whose name begins with `_` is no command. A module imports what is heavy (JAX, the model) in
`run`, so that `--help` and a mistake answer at once.
"""
