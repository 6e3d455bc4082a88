"""State, step, loop, optimisers, parallelism, checkpoints and telemetry."""
