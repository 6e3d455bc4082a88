"""One config per experiment; its docstring has the command and the result."""
