"""Where the time of a trace went: the slowest operations, each with its layer.

    musicgenre train --config=synthetic --workdir=runs/synthetic --profile_steps=20,5
    python -m benchmarks.trace runs/synthetic/profile

Reads the newest `*.xplane.pb` below the folder, which JAX writes, with JAX alone: the durations by
`jax.profiler.ProfileData`, the layers from the compiled programs in the file (OpenXLA's
`xplane.proto` and `hlo.proto`). Each moment counts for one operation, the one that began last: a
loop does not count what runs in it. On a CPU an operation lasts until XLA's mark of its end, since
its event ends when threads have taken the work over. "Typical" is the median of each instruction
times how often it ran, which ignores steps that other work interrupted.
"""

import argparse
import collections
import dataclasses
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

from benchmarks._timing import print_table

# A fusion is named after one of these, if it has one.
HEAVY = ("/conv_general_dilated", "/dot_general")
CONTROL_FLOW = ("while", "body", "closed_call", "cond")


@dataclasses.dataclass(frozen=True)
class Row:
    """All runs of one operation in one layer.

    Attributes:
      layer: and whether it runs forward or backward.
      operation: its primitive.
      count: how often it ran.
      seconds: total of its own time.
      typical: total without outliers: per instruction, the median times the count.
    """

    layer: str
    operation: str
    count: int
    seconds: float
    typical: float


def newest(folder: Path) -> Path:
    """Returns the newest trace in a folder and its subfolders; a file is returned as it is.

    Raises:
      FileNotFoundError: there is none.
    """
    if folder.is_file():
        return folder
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(
            f"{folder} has no *.xplane.pb. Train with --profile_steps=20,5 and name "
            "<workdir>/profile."
        )
    return files[-1]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Returns a number of a protocol buffer message and the position after it."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields (number, value) of each field of a message: bytes, or an int."""
    at = 0
    value: bytes | int
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
        else:
            size, at = _varint(message, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def _numbers(packed: bytes | int) -> Iterator[int]:
    """Yields the numbers of a repeated field, packed or single."""
    if isinstance(packed, int):
        yield packed
        return
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield value


def _all(message: bytes, *path: int) -> list[Any]:
    """Returns the values at a path of field numbers."""
    found: list[Any] = [message]
    for number in path:
        found = [value for part in found for key, value in _fields(part) if key == number]
    return found


def op_names(file: Path) -> dict[tuple[str, str], str]:
    """Returns the JAX name of each instruction of the programs in a trace.

    Keys are (program, instruction), such as ("jit_train_step(7)", "fusion.3"): programs of the same
    name have different numbers. A name is such as
    "jit(train_step)/transpose(jvp(Conv1D))/conv_0/conv_general_dilated". A fusion is named after
    the convolution or product in it, or else its result.
    """
    names = {}
    # XSpace.planes, XPlane.event_metadata, its value.
    for metadata in _all(file.read_bytes(), 1, 4, 2):
        program = b"".join(_all(metadata, 2)).decode()
        # XEventMetadata.stats, XStat.bytes_value, HloProto.hlo_module.
        for module in _all(metadata, 5, 6, 1):
            inside: dict[int, list[str]] = {}  # names of the instructions of a computation
            called: dict[str, list[int]] = {}  # computations of a fusion
            for computation in _all(module, 3):
                named = inside.setdefault(next(iter(_all(computation, 5)), 0), [])
                for instruction in _all(computation, 2):
                    name = _all(instruction, 1)[0].decode()
                    if operation := _all(instruction, 7, 2):
                        names[program, name] = operation[0].decode()
                        named.append(names[program, name])
                    if _all(instruction, 2) == [b"fusion"]:
                        ids = _all(instruction, 38)
                        called[name] = [number for packed in ids for number in _numbers(packed)]
            for name, numbers in called.items():
                inner = (op for number in numbers for op in inside.get(number, []))
                if heavy := [op for op in inner if op.endswith(HEAVY)]:
                    names[program, name] = heavy[0]
    return names


def layer_of(op_name: str) -> tuple[str, str]:
    """Returns the layer of a JAX name, with its direction, and the primitive."""
    *path, primitive = op_name.split("/")
    way = "backward" if "transpose(" in op_name else "forward" if "jvp(" in op_name else ""
    layers = [part for part in path if "(" not in part and part not in CONTROL_FLOW]
    return f"{way} {'/'.join(layers)}".strip() or "the rest of the step", primitive


def own_times(events: Iterable[tuple[float, float, Any]]) -> Iterator[tuple[Any, float]]:
    """Yields (name, own duration) of events (start, duration, name).

    Each moment counts for the event that began last.
    """
    running: list[list[Any]] = []  # end, own time, name
    for start, duration, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while running and running[-1][0] <= start:
            _, own, ended = running.pop()
            yield ended, own
        if running:
            running[-1][1] -= min(duration, running[-1][0] - start)
        running.append([start + duration, duration, name])
    yield from ((name, own) for _, own, name in running)


def operations(file: Path) -> list[Row]:
    """Returns the operations of compiled programs in a trace, the typically slowest first."""
    names = op_names(file)
    # Seconds of each instruction of a program.
    durations: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for plane in ProfileData.from_file(str(file)).planes:
        started, ends = [], {}
        for event in (event for line in plane.lines for event in line.events):
            stats = dict(event.stats)
            if "hlo_op" in stats:
                program = f"{stats.get('hlo_module')}({stats.get('program_id')})"
                instruction = (program, stats["hlo_op"])
                started.append((event.start_ns, event.duration_ns, stats.get("_p"), instruction))
            elif event.name.startswith("end: "):
                ends[stats.get("_c")] = event.start_ns
        events = (
            (start, max(duration, ends.get(mark, 0) - start), instruction)
            for start, duration, mark, instruction in started
        )
        for instruction, own in own_times(events):
            durations[instruction].append(own / 1e9)
    alike: dict[tuple[str, str], list[list[float]]] = collections.defaultdict(list)
    for instruction, seconds in durations.items():
        if name := names.get(instruction):
            alike[layer_of(name)].append(seconds)
        else:  # such as a copy that XLA has added
            alike["XLA's own", re.sub(r"[.\d]+$", "", instruction[1])].append(seconds)
    rows = [
        Row(
            *key,
            count=sum(map(len, lists)),
            seconds=sum(map(sum, lists)),
            typical=sum(statistics.median(some) * len(some) for some in lists),
        )
        for key, lists in alike.items()
    ]
    return sorted(rows, key=lambda row: row.typical, reverse=True)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="<workdir>/profile, or one *.xplane.pb")
    parser.add_argument("--top", type=int, default=15, help="lines (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        rows = operations(newest(options.folder))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    groups = [(f"{row.layer}: {row.operation}", [row]) for row in rows[: options.top]]
    if rest := rows[options.top :]:
        groups.append((f"{len(rest)} more", rest))
    total, lines = sum(row.typical for row in rows), []
    for name, group in [*groups, ("total", rows)]:
        typical, seconds = (sum(row.typical for row in group), sum(row.seconds for row in group))
        times = [f"{typical / total:.1%}", f"{1e3 * typical:.1f}", f"{1e3 * seconds:.1f}"]
        lines.append([name, *times, str(sum(row.count for row in group))])
    print_table(["layer: operation", "typical", "typical ms", "total ms", "runs"], lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
