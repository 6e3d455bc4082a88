"""Sound files to labels with probabilities."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from musicgenre.inference.windows import Network, score_files
from musicgenre.runs.model import TrainedModel


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model says of a file: probabilities `[classes]`, or the reason why it says nothing."""

    path: str
    probabilities: np.ndarray | None
    error: str = ""


def predict_files(
    model: TrainedModel,
    paths: Iterable[str | Path],
    *,
    min_seconds: float = 1.0,
    network: Network | None = None,
) -> Iterator[Prediction]:
    """Yields a prediction for each file, in order. A file that cannot be used yields its reason; the rest goes on.

    A file longer than the model's clips is cut into consecutive windows of that length, the last of which ends where the file
    does; their probabilities are averaged. See `musicgenre.inference.windows`.

    Args:
      model: a trained model.
      paths: sound files.
      min_seconds: shorter files are refused.
      network: the model's, where it is used more than once.
    """
    for scores in score_files(model, paths, min_seconds=min_seconds, network=network):
        yield Prediction(scores.path, scores.probabilities, scores.error)


def render(
    predictions: Iterable[Prediction],
    label_names: tuple[str, ...],
    form: str,
    top: int,
    task: str = "single_label",
) -> Iterator[str]:
    """Yields the lines of a table, a JSON array, JSON lines or a CSV file.

    Args:
      predictions: from `predict_files`; those without probabilities are left out of the table and have an `error` in the
        other forms.
      label_names: `[classes]`.
      form: "table", "json", "jsonl" (one object a line) or "csv".
      top: labels shown per file in a table and in JSON; CSV has a column for each label.
      task: of a "regression" all numbers are shown, in the order of the model's outputs.
    """
    regression = task == "regression"
    if form == "csv":
        yield _csv_line(["path", *([] if regression else ["label"]), *label_names, "error"])
    if form == "json":
        yield "["
    separator = ""
    for prediction in predictions:
        scores = prediction.probabilities
        if regression or scores is None:
            order = list(range(len(label_names)))
        else:
            order = np.argsort(-scores, kind="stable")[:top].tolist()
        if form == "table" and scores is not None:
            shown = (
                f"{label_names[i]} {scores[i]:.4g}"
                if regression
                else f"{label_names[i]} {100 * scores[i]:.1f} %"
                for i in order
            )
            yield f"{prediction.path}  " + "  ".join(shown)
        elif form in ("json", "jsonl"):
            entry: dict[str, object] = {"path": prediction.path}
            if scores is None:
                entry["error"] = prediction.error
            elif regression:
                entry["values"] = {label_names[i]: round(float(scores[i]), 6) for i in order}
            else:
                entry["labels"] = [
                    {"label": label_names[i], "probability": round(float(scores[i]), 6)}
                    for i in order
                ]
            yield separator + _json(entry)
            separator = "," if form == "json" else ""
        elif form == "csv":
            first = [] if regression else ["" if scores is None else label_names[order[0]]]
            values = (
                [""] * len(label_names) if scores is None else [f"{score:.6f}" for score in scores]
            )
            yield _csv_line([prediction.path, *first, *values, prediction.error])
    if form == "json":
        yield "]"


def _json(entry: dict[str, object]) -> str:
    text = json.dumps(entry, ensure_ascii=False)
    try:
        text.encode()
    except (
        UnicodeEncodeError
    ):  # a file's name that is no text; escaped, it is valid JSON and Python reads it back
        return json.dumps(entry)
    return text


def _csv_line(values: list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(values)
    return buffer.getvalue()
