"""Predictions as text: a table, JSON or CSV."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from musicgenre.inference.windows import FileScores


def ranked(values: np.ndarray, task: str) -> list[int]:
    """Returns the labels' numbers, the most probable first; a regression's outputs in order."""
    if task == "regression":
        return list(range(len(values)))
    return np.argsort(-values, kind="stable").tolist()


def render(
    predictions: Iterable[FileScores],
    label_names: Sequence[str],
    form: str,
    top: int,
    task: str = "single_label",
) -> Iterator[str]:
    """Yields the lines of a table, a JSON array, JSON lines or a CSV file.

    Args:
      predictions: the scores of files. Files with an error are left out of the table and have the
        field `error` in the other formats.
      label_names: `[classes]`.
      form: "table", "json", "jsonl" (one object per line) or "csv".
      top: labels per file in a table and in JSON; CSV has one column per label.
      task: for a "regression" all numbers are shown, in the order of the model's outputs.
    """
    regression = task == "regression"
    if form == "csv":
        yield csv_line(["path", *([] if regression else ["label"]), *label_names, "error"])
    if form == "json":
        yield "["
    separator = ""
    for prediction in predictions:
        scores = prediction.probabilities
        order = [] if scores is None else ranked(scores, task)
        shown = order if regression else order[:top]
        pairs = [] if scores is None else [(label_names[i], float(scores[i])) for i in shown]
        if form == "csv":
            first = [] if regression else [label_names[order[0]] if order else ""]
            values = [""] * len(label_names) if scores is None else [f"{p:.6f}" for p in scores]
            yield csv_line([prediction.path, *first, *values, prediction.error])
        elif form == "table" and pairs:
            cells = [
                f"{name} {value:.4g}" if regression else f"{name} {100 * value:.1f} %"
                for name, value in pairs
            ]
            yield "  ".join([prediction.path, *cells])
        elif form in ("json", "jsonl"):
            entry: dict[str, object] = {"path": prediction.path}
            if scores is None:
                entry["error"] = prediction.error
            elif regression:
                entry["values"] = {name: round(value, 6) for name, value in pairs}
            else:
                entry["labels"] = [
                    {"label": name, "probability": round(value, 6)} for name, value in pairs
                ]
            yield separator + json_line(entry)
            separator = "," if form == "json" else ""
    if form == "json":
        yield "]"


def json_line(entry: dict[str, object]) -> str:
    """Returns an object as JSON; file names that are not UTF-8 are escaped, so that it is valid."""
    text = json.dumps(entry, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(entry)
    return text


def csv_line(values: Iterable[str]) -> str:
    """Returns a line of a CSV file without its line break."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(values)
    return buffer.getvalue()
