"""Where a trace's time went: the operations that took longest, each with the layer that it belongs to.

python experiments/train.py --config=configs/synthetic.py --workdir=runs/synthetic --profile_steps=20,5
python -m benchmarks.trace runs/synthetic/profile

It reads the newest `*.xplane.pb` below the folder, which JAX writes, and needs nothing but JAX: the durations come by
`jax.profiler.ProfileData`, the layers from the compiled programs that the file holds (OpenXLA's `xplane.proto` and `hlo.proto`).
Each moment counts for one operation, the one that began last: a loop without what runs in it, and of operations at the same time
the later. On a CPU an operation lasts until XLA's mark of its end, since its event ends where threads have taken the work over.
"Typical" is each instruction's median times how often it ran: a step that other work interrupted does not count there.
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

# What a fusion is named by.
HEAVY = ("/conv_general_dilated", "/dot_general")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a kind of operation in one place.

    Attributes:
      place: in the network.
      operation: its primitive.
      count: how often it ran.
      seconds: its own, in all.
      typical: the same without outliers: of each instruction, the median times the count.
    """

    place: str
    operation: str
    count: int
    seconds: float
    typical: float


def newest(folder: Path) -> Path:
    """Returns the newest trace at or below a folder.

    Raises:
      FileNotFoundError: there is none.
    """
    files = (
        [folder]
        if folder.is_file()
        else sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    )
    if not files:
        raise FileNotFoundError(
            f"{folder}: no *.xplane.pb there. Train with --profile_steps=20,5 and name <workdir>/profile."
        )
    return files[-1]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields (number, value) of each field of a protocol buffer message: bytes, or an int."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        yield key >> 3, message[at : at + size]
        at += size


def _numbers(packed: bytes | int) -> list[int]:
    """Returns the numbers of a repeated field, packed or one by one."""
    if isinstance(packed, int):
        return [packed]
    numbers, value, shift = [], 0, 0
    for byte in packed:
        value, shift = value | (byte & 0x7F) << shift, shift + 7
        if byte < 0x80:
            numbers.append(value)
            value = shift = 0
    return numbers


def _all(messages: Iterable[Any], *path: int) -> list[Any]:
    """Returns the messages at a path of field numbers."""
    found = list(messages)
    for number in path:
        found = [value for message in found for key, value in _fields(message) if key == number]
    return found


def op_names(file: Path) -> dict[tuple[str, str], str]:
    """Returns the JAX name of each instruction of the programs in a trace, by (program, instruction).

    A program is such as "jit_train_step(7)": others may have the same name, and another number. A name is such as
    "jit(train_step)/transpose(jvp(Conv1D))/conv_0/conv_general_dilated". A fusion goes by the convolution or product in it,
    where it has one, and else by its result.
    """
    names = {}
    # XSpace.planes, XPlane.event_metadata, its value; of that its name and stats, XStat.bytes_value, HloProto.hlo_module.
    metadata = _all([file.read_bytes()], 1, 4, 2)
    programs = [
        (b"".join(_all([entry], 2)).decode(), module)
        for entry in metadata
        for module in _all([entry], 5, 6, 1)
    ]
    for program, module in programs:
        inside: dict[int, list[str]] = {}  # names of the instructions of a computation
        called: dict[str, set[int]] = {}
        for computation in _all([module], 3):
            named = inside.setdefault(
                next((value for key, value in _fields(computation) if key == 5), 0), []
            )
            for instruction in _all([computation], 2):
                name, opcode = _all([instruction], 1)[0].decode(), _all([instruction], 2)[0]
                if operation := _all([instruction], 7, 2):
                    names[program, name] = operation[0].decode()
                    named.append(names[program, name])
                if opcode == b"fusion":
                    called[name] = {
                        number for ids in _all([instruction], 38) for number in _numbers(ids)
                    }
        for name, computations in called.items():
            heavy = [
                op for number in computations for op in inside.get(number, []) if op.endswith(HEAVY)
            ]
            if heavy:
                names[program, name] = heavy[0]
    return names


def place(op_name: str) -> tuple[str, str]:
    """Returns a JAX name's place in the network, with the way through it, and its primitive."""
    *path, primitive = op_name.split("/")
    way = "backward" if "transpose(" in op_name else "forward" if "jvp(" in op_name else ""
    inside = [
        part
        for part in path
        if "(" not in part and part not in ("while", "body", "closed_call", "cond")
    ]
    return " ".join([way, "/".join(inside)]).strip() or "the rest of the step", primitive


def own_times(events: Iterable[tuple[float, float, Any]]) -> Iterator[tuple[Any, float]]:
    """Yields (what, own duration) for events (start, duration, what): each moment is that of the event that began last."""
    open_events: list[list[Any]] = []  # end, own time, what
    for start, duration, what in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_events and open_events[-1][0] <= start:
            _, own, done = open_events.pop()
            yield done, own
        if open_events:
            open_events[-1][1] -= min(duration, open_events[-1][0] - start)
        open_events.append([start + duration, duration, what])
    yield from ((what, own) for _, own, what in open_events)


def operations(file: Path) -> list[Row]:
    """Returns the operations of compiled programs in a trace, typically longest first; see the module for what is counted."""
    names = op_names(file)
    durations: dict[tuple[str, str], list[float]] = collections.defaultdict(
        list
    )  # seconds of each instruction of a program
    for plane in ProfileData.from_file(str(file)).planes:
        started, ends = [], {}
        for event in (event for line in plane.lines for event in line.events):
            stats = dict(event.stats)
            if "hlo_op" in stats:
                instruction = (
                    f"{stats.get('hlo_module')}({stats.get('program_id')})",
                    stats["hlo_op"],
                )
                started.append((event.start_ns, event.duration_ns, stats.get("_p"), instruction))
            elif event.name.startswith("end: "):
                ends[stats.get("_c")] = event.start_ns
        events = [
            (start, max(duration, ends.get(mark, 0) - start), instruction)
            for start, duration, mark, instruction in started
        ]
        for instruction, own in own_times(events):
            durations[instruction].append(own / 1e9)
    alike: dict[tuple[str, str], list[list[float]]] = collections.defaultdict(list)
    for instruction, seconds in durations.items():
        # A copy that XLA put in has no name in JAX.
        named = names.get(instruction)
        alike[
            place(named) if named else ("XLA's own", re.sub(r"[.\d]+$", "", instruction[1]))
        ].append(seconds)
    rows = [
        Row(
            *where,
            sum(map(len, lists)),
            sum(map(sum, lists)),
            sum(statistics.median(some) * len(some) for some in lists),
        )
        for where, lists in alike.items()
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
    total = sum(row.typical for row in rows)
    print(f"{'share':>6} {'typical ms':>10} {'in all ms':>10} {'times':>6}  where: operation")
    lines = [(f"{row.place}: {row.operation}", [row]) for row in rows[: options.top]]
    if rest := rows[options.top :]:
        lines.append((f"{len(rest)} more", rest))
    for what, some in [*lines, ("together", rows)]:
        typical, seconds, count = (
            sum(getattr(row, name) for row in some) for name in ("typical", "seconds", "count")
        )
        print(
            f"{typical / total:>6.1%} {1e3 * typical:>10.1f} {1e3 * seconds:>10.1f} {count:>6}  {what}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
