"""A user's own music listed in a CSV file with labels or targets, optionally splits and groups."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from musicgenre.datasets.base import SPLIT_ALIASES, Clip, Dataset, Skipped
from musicgenre.datasets.registry import register
from musicgenre.datasets.splits import fractions_text, split_clips
from musicgenre.errors import UserError, did_you_mean

COLUMNS = ("path", "label", "labels", "targets", "split", "group", "clip_id")
# The column that holds the truth, and the task that it implies.
_TASK_OF = {"label": "single_label", "labels": "multi_label", "targets": "regression"}


@register("csv")
def load_csv(
    path: str | Path,
    *,
    task: str = "",
    seed: int = 42,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    allow_missing: bool = False,
) -> Dataset:
    """Reads a CSV file (UTF-8; comma, semicolon or tab) with a header.

    Columns: `path` (relative to the file's folder, or absolute); `label`, `labels` (tags separated
    by "|") or `targets` (numbers separated by "|", equally many on each line); optionally `split`,
    `group` (what a split must keep together) and `clip_id` (otherwise the path).

    Args:
      path: the file.
      task: "single_label", "multi_label" or "regression"; "" is that of the column's name.
      seed: of the split, where the file has none.
      fractions: of train, valid and test.
      allow_missing: list files that are not on disk as skipped, instead of an error.

    Raises:
      UserError: naming the file, line and column of what cannot be used.
    """
    path = Path(path)
    rows = _rows(path)
    header = list(rows[0][1])
    column = next(name for name in _TASK_OF if name in header)
    task = task or _TASK_OF[column]
    if (task == "regression") != (column == "targets"):
        raise UserError(f"{path}, line 1: the column {column} does not fit data.task={task!r}.")
    skipped, clips = list[Skipped](), list[Clip]()
    size, seen = 0, dict[Path, int]()
    for line, row in rows:
        where = f"{path}, line {line}"
        labels, values = _truth(row[column], column, task, where)
        size = size or len(values)
        if len(values) != size:
            raise UserError(f"{where}: {len(values)} targets where the lines before have {size}.")
        if not row["path"]:
            raise UserError(f"{where}: empty path.")
        file = path.parent / row["path"]
        if seen.setdefault(file, line) != line:
            raise UserError(f"{where}: {row['path']} is already on line {seen[file]}.")
        split = SPLIT_ALIASES.get(row.get("split", "").lower(), "")
        if "split" in header and not split:
            raise UserError(f"{where}: split {row['split']!r} is not train, valid or test.")
        clip_id = row.get("clip_id") or row["path"]
        if file.is_file():
            clips.append(Clip(clip_id, file, labels, split, row.get("group") or None, None, values))
        elif allow_missing:
            skipped.append(Skipped(clip_id, str(file), "not on disk"))
        else:
            raise UserError(f"{where}: {file} is not on disk; see --config.data.allow_missing.")
    protocol = "splits of the file"
    if "split" not in header and clips:
        clips = split_clips(clips, seed, fractions)
        protocol = f"grouped, {fractions_text(fractions)}, seed {seed}"
    names = tuple(sorted({label for clip in clips for label in clip.labels}))
    if task == "regression":
        names = tuple(f"target{number + 1}" for number in range(size))
    return Dataset("csv", path, protocol, task, names, clips, skipped, group_name="group")


def _truth(
    text: str, column: str, task: str, where: str
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Returns the labels and the targets of a line, such as ("rock", "slow") or (0.5, -1.25)."""
    if task == "regression":
        try:
            numbers = tuple(map(float, text.split("|")))
        except ValueError:
            numbers = (math.nan,)
        if not all(map(math.isfinite, numbers)):
            raise UserError(f"{where}: targets {text!r} must be finite numbers separated by '|'.")
        return (), numbers
    parts = [part.strip() for part in text.split("|")] if column == "labels" else [text]
    labels = tuple(dict.fromkeys(filter(None, parts)))
    if not labels and (task == "single_label" or column == "label"):
        raise UserError(f"{where}: empty {column}.")
    if task == "single_label" and len(labels) != 1:
        raise UserError(f"{where}: {len(labels)} labels ({text}) where the task is single_label.")
    return labels, ()


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Returns (line number, fields) of each row after the header, checked for its columns."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--config.data.root={path} is no readable UTF-8 file ({error})."
        ) from error
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(text.splitlines(), delimiter=delimiter)
    header = [name.strip() for name in next(reader, [])]
    for name in header:
        if name not in COLUMNS and (hint := did_you_mean(name, COLUMNS)).startswith(" Did"):
            raise UserError(f"{path}, line 1: unknown column {name!r}.{hint}")
    if "path" not in header or sum(name in header for name in _TASK_OF) != 1:
        found = ", ".join(header)
        raise UserError(
            f"{path}, line 1: it must name path and label (or labels, or targets), not {found!r}."
        )
    rows = []
    for fields in filter(None, reader):
        where = f"{path}, line {reader.line_num}"
        if len(fields) != len(header):
            raise UserError(f"{where}: {len(fields)} fields where the header has {len(header)}.")
        rows.append((reader.line_num, dict(zip(header, map(str.strip, fields), strict=True))))
    if not rows:
        raise UserError(f"{path}: no rows below the header.")
    return rows
