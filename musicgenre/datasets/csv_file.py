"""One's own music listed in a CSV file: path, label, labels or targets, and optionally split and group."""

import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from musicgenre.datasets.base import SPLIT_ALIASES, Clip, Dataset, Skipped, make_dataset
from musicgenre.datasets.folder import fractions_text
from musicgenre.datasets.registry import register
from musicgenre.datasets.splits import group_split
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

    Columns: `path` (relative to the file's folder, or absolute), `label`, `labels` (tags separated by "|") or `targets`
    (the numbers of a regression separated by "|", as many on each line), and optionally `split`, `group` (what must not be
    split apart) and `clip_id` (otherwise the path).

    Args:
      path: the file.
      task: "single_label", "multi_label" or "regression"; "" goes by the column's name.
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
    tags = column == "labels"
    task = task or _TASK_OF[column]
    if (task == "regression") != (column == "targets"):
        raise UserError(
            f"{path}, line 1: a regression needs the column targets, and only a regression; data.task={task!r} does not fit."
        )
    skipped, clips = [], []
    size = 0
    seen: dict[Path, int] = {}
    for line, row in rows:
        file = path.parent / row["path"]
        labels = (
            tuple(dict.fromkeys(part.strip() for part in row[column].split("|") if part.strip()))
            if tags
            else (row[column],)
        )
        values: tuple[float, ...] = ()
        if task == "regression":
            labels, values = (), _numbers(row[column], f"{path}, line {line}")
            size = size or len(values)
            if len(values) != size:
                raise UserError(
                    f"{path}, line {line}: {len(values)} targets where the lines before have {size}."
                )
        if not row["path"] or (not all(labels) or (not labels and task == "single_label")):
            raise UserError(f"{path}, line {line}: empty {'path' if not row['path'] else column}.")
        if task == "single_label" and len(labels) != 1:
            raise UserError(
                f"{path}, line {line}: {len(labels)} labels ({row[column]}) where the task is single_label."
            )
        if file in seen:
            raise UserError(f"{path}, line {line}: {row['path']} is already on line {seen[file]}.")
        seen[file] = line
        split = row.get("split", "")
        if "split" in header and split.lower() not in SPLIT_ALIASES:
            raise UserError(f"{path}, line {line}: split {split!r} is not train, valid or test.")
        clip_id = row.get("clip_id") or row["path"]
        if not file.is_file():
            if not allow_missing:
                raise UserError(
                    f"{path}, line {line}: {file} is not on disk. Add it, or go on without such files with "
                    "--config.data.allow_missing=True."
                )
            skipped.append(Skipped(clip_id, str(file), "not on disk"))
            continue
        clips.append(
            Clip(
                clip_id,
                file,
                labels,
                SPLIT_ALIASES.get(split.lower(), ""),
                row.get("group") or None,
                values=values,
            )
        )
    protocol = "splits of the file"
    if "split" not in header and clips:
        parts = group_split(
            [clip.labels[0] if clip.labels else "" for clip in clips],
            [clip.group for clip in clips],
            seed,
            fractions,
        )
        clips = [
            dataclasses.replace(clip, split=part) for clip, part in zip(clips, parts, strict=True)
        ]
        protocol = f"grouped, {fractions_text(fractions)}, seed {seed}"
    names = tuple(sorted({label for clip in clips for label in clip.labels}))
    if task == "regression":
        names = tuple(f"target{number + 1}" for number in range(size))
    return make_dataset(
        Dataset(
            "csv", path, protocol, task, names, tuple(clips), tuple(skipped), group_name="group"
        )
    )


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Returns (line number, fields) of each row after the header, checked for its columns."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Set --config.data.root to a CSV file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(text.splitlines(), delimiter=delimiter)
    header = [name.strip() for name in next(reader, [])]
    for name in header:
        if name not in COLUMNS and (hint := did_you_mean(name, COLUMNS)).startswith(" Did"):
            raise UserError(f"{path}, line 1: unknown column {name!r}.{hint}")
    if "path" not in header or sum(name in header for name in _TASK_OF) != 1:
        raise UserError(
            f"{path}, line 1: the header must name the columns path and label (or labels, or targets), not {', '.join(header)!r}."
        )
    rows = []
    for fields in reader:
        if not fields:
            continue
        if len(fields) != len(header):
            raise UserError(
                f"{path}, line {reader.line_num}: {len(fields)} fields where the header has {len(header)}."
            )
        rows.append(
            (
                reader.line_num,
                {name: field.strip() for name, field in zip(header, fields, strict=True)},
            )
        )
    if not rows:
        raise UserError(f"{path}: no rows below the header.")
    return rows


def _numbers(text: str, where: str) -> tuple[float, ...]:
    """Returns the numbers of a field such as "0.5|-1.25"."""
    try:
        numbers = tuple(float(part) for part in text.split("|"))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"{where}: targets {text!r} must be finite numbers separated by '|'.")
    return numbers
