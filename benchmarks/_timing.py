"""Timing for the benchmarks: what is compared takes turns, so that other work on the machine touches all of it alike."""

import dataclasses
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one contestant, one number a round, each per unit of work."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return float(np.median(self.seconds))

    def line(self) -> str:
        """One line: the median, the quartiles and the fastest round, in milliseconds."""
        low, high = np.percentile(self.seconds, [25, 75])
        return (
            f"  {self.name:<28} median {1e3 * self.median:10.3f} ms   quartiles {1e3 * low:.3f} to {1e3 * high:.3f}   "
            f"fastest {1e3 * min(self.seconds):.3f}   {len(self.seconds)} rounds"
        )


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One contestant's time over another's, round by round: what both met in a round cancels.

    Attributes:
      median: over the rounds.
      low: first quartile.
      high: third quartile.
    """

    median: float
    low: float
    high: float

    def line(
        self, what: str, *, at_most: float | None = None, at_least: float | None = None
    ) -> str:
        """One line, with the bar and whether it is met by the median."""
        text = f"  {what}: {self.median:.3f} (quartiles {self.low:.3f} to {self.high:.3f})"
        if at_most is not None:
            text += f"; bar: at most {at_most:g}, {'met' if self.median <= at_most else 'NOT met'}"
        if at_least is not None:
            text += (
                f"; bar: at least {at_least:g}, {'met' if self.median >= at_least else 'NOT met'}"
            )
        return text


def alternate(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int, units: int = 1, warmup: int = 1
) -> dict[str, Timing]:
    """Times functions in turns.

    Args:
      contestants: functions by name; each must return only when its work is done.
      rounds: how often each is timed. The order is reversed from one round to the next.
      units: pieces of work that one call does; times are for one piece.
      warmup: calls of each that are not timed, in which programs are compiled.

    Returns:
      A timing by name, in the order given.
    """
    names = list(contestants)
    for _ in range(warmup):
        for name in names:
            contestants[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            start = time.perf_counter()
            contestants[name]()
            seconds[name].append((time.perf_counter() - start) / units)
    return {name: Timing(name, tuple(values)) for name, values in seconds.items()}


def ratio(one: Timing, other: Timing) -> Ratio:
    """Returns the time of `one` over that of `other`, of each round by itself."""
    values = np.array(one.seconds) / np.array(other.seconds)
    low, median, high = np.percentile(values, [25, 50, 75])
    return Ratio(float(median), float(low), float(high))


def machine(packages: Sequence[str] = ("jax", "jaxlib", "flax", "numpy")) -> str:
    """Returns what the figures depend on, as a line or two: processor, cores, threads, load, versions, and JAX's devices."""
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} (absent)")
    threads = [
        f"{name}={os.environ[name]}"
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "XLA_FLAGS")
        if name in os.environ
    ]
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [
        f"{_processor()}, {cores} cores usable, {load}, threads {' '.join(threads) or 'as the libraries choose'}",
        f"Python {platform.python_version()}, {', '.join(versions)}",
    ]
    if "jax" in packages:
        import jax

        kinds = {device.device_kind for device in jax.devices()}
        lines.append(
            f"JAX devices: {len(jax.devices())} x {', '.join(sorted(kinds))} ({jax.default_backend()})"
        )
    return "\n".join(lines)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
