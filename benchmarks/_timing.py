"""Alternating timing, tables, memory and flags, shared by the benchmarks."""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TINY = ("tiny", False, "tiny sizes: shows that it runs; the figures mean nothing")
# Times by name, one number per round: `[rounds]` seconds per unit of work.
Times = dict[str, np.ndarray]


def alternate(
    functions: Mapping[str, Callable[[], object]], *, rounds: int, units: int = 1, warmup: int = 1
) -> tuple[Times, Times]:
    """Times functions alternately, so that other work on the machine slows all of them alike.

    Args:
      functions: by name; each returns only when its work is done.
      rounds: how often each is timed; the order is reversed from one round to the next.
      units: units of work per call; times are per unit.
      warmup: calls of each that are not timed, for compilation.

    Returns:
      Wall-clock times, and processor times of this process, by name in the order given.
    """
    wall, cpu = ({name: np.zeros(rounds) for name in functions} for _ in range(2))
    for _ in range(warmup):
        for function in functions.values():
            function()
    for number in range(rounds):
        for name in list(functions)[:: -1 if number % 2 else 1]:
            start, cpu_start = time.perf_counter(), time.process_time()
            functions[name]()
            wall[name][number] = (time.perf_counter() - start) / units
            cpu[name][number] = (time.process_time() - cpu_start) / units
    return wall, cpu


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Median and quartiles over the rounds of one time over another."""

    median: float
    low: float
    high: float

    def line(
        self, what: str, *, at_most: float | None = None, at_least: float | None = None
    ) -> str:
        """Returns one line; with a target, whether the median meets it."""
        text = f"  {what}: {self.median:.3f} (quartiles {self.low:.3f} to {self.high:.3f})"
        if at_most is not None:
            text += f"; target: at most {at_most:g}, {verdict(self.median <= at_most)}"
        if at_least is not None:
            text += f"; target: at least {at_least:g}, {verdict(self.median >= at_least)}"
        return text


def ratio(one: np.ndarray, other: np.ndarray) -> Ratio:
    """Compares round by round, which cancels what slowed both in a round."""
    low, median, high = np.percentile(one / other, [25, 50, 75]).tolist()
    return Ratio(median, low, high)


def verdict(met: bool) -> str:
    """Returns "met" or "missed"."""
    return "met" if met else "missed"


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints aligned columns, the first one to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *cells in lines:
        right = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        print("  " + "  ".join([f"{first:<{widths[0]}}", *right]).rstrip(), flush=True)


def print_timings(times: Times, **more: Callable[[float], str]) -> None:
    """Prints the times in milliseconds; `more` are columns computed from the median in seconds."""
    rows = []
    for name, seconds in times.items():
        low, median, high = (f"{1e3 * q:.3f}" for q in np.percentile(seconds, [25, 50, 75]))
        extra = [function(float(np.median(seconds))) for function in more.values()]
        rows.append([name, median, f"{low} to {high}", f"{1e3 * seconds.min():.3f}", *extra])
    print_table(["", "median ms", "quartiles", "fastest", *more], rows)


def flags(
    description: str | None, *options: tuple[str, bool | int | float | str, str | None]
) -> argparse.ArgumentParser:
    """Returns a parser whose help keeps the description's lines and shows defaults.

    Args:
      description: what the benchmark measures.
      *options: a flag's name, default (which gives its type) and help text; None hides it.
    """

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=description, formatter_class=Formatter)
    for name, default, text in options:
        how: dict[str, Any] = {"default": default, "help": text or argparse.SUPPRESS}
        how |= {"action": "store_true"} if default is False else {"type": type(default)}
        parser.add_argument(f"--{name}", **how)
    return parser


def usable_cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_mb(field: str = "VmHWM") -> float:
    """Returns this process's peak memory ("VmHWM") or, on Linux, current one ("VmRSS"), MB."""
    status = Path("/proc/self/status")
    if status.is_file():
        # On Linux getrusage's peak starts from the parent process's.
        values = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(values[field].split()[0]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def in_new_process(benchmark: str, *arguments: str) -> dict[str, float]:
    """Runs a benchmark in a new process and returns the JSON object on its last line."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def machine(packages: Sequence[str] = ("jax", "jaxlib", "flax", "numpy")) -> str:
    """Returns what the figures depend on: processor, cores, threads, load, versions, devices."""
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} (absent)")
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "XLA_FLAGS")
    threads = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    text = (
        f"{_processor()}, {usable_cores()} usable cores, load {load}, "
        f"threads {' '.join(threads) or 'by default'}\n"
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )
    if "jax" in packages:
        import jax

        types = ", ".join(sorted({device.device_kind for device in jax.devices()}))
        text += f"\nJAX devices: {len(jax.devices())} x {types} ({jax.default_backend()})"
    return text


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
