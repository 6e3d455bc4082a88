"""Sound files to labels with probabilities."""

import collections
import csv
import dataclasses
import io
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from musicgenre.audio.decode import load_audio
from musicgenre.audio.features import compute_features
from musicgenre.errors import UserError
from musicgenre.inference.model import TrainedModel
from musicgenre.pipeline.loader import chunk_starts
from musicgenre.training.step import make_score_step

# Inputs of one call of the network; smaller files fill it up, so that it compiles once.
_BATCH = 8
# Files that are decoded while the network works.
_FILES_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model says of a file: probabilities `[classes]`, or the reason why it says nothing."""

    path: str
    probabilities: np.ndarray | None
    error: str = ""


def predict_files(model: TrainedModel, paths: Iterable[str | Path], *, min_seconds: float = 1.0) -> Iterator[Prediction]:
    """Yields a prediction for each file, in order. A file that cannot be used yields its reason; the rest goes on.

    A file longer than the model's clips is cut into windows of that length, evenly spaced from its start to its end
    and overlapping as little as they can, whose probabilities are averaged.

    Args:
      model: a trained model.
      paths: sound files.
      min_seconds: shorter files are refused.
    """
    score = jax.jit(make_score_step(model.module, model.task))

    def prepare(path: str | Path) -> np.ndarray | str:
        try:
            samples = load_audio(path, model.features.sample_rate, min_seconds=min_seconds).samples
        except UserError as error:
            return str(error)
        return file_inputs(samples, model)

    with ThreadPoolExecutor(_FILES_AHEAD) as pool:
        for path, inputs in _ahead(pool, prepare, paths):
            if isinstance(inputs, str):
                yield Prediction(str(path), None, inputs)
                continue
            scores = []
            for start in range(0, len(inputs), _BATCH):
                part = inputs[start : start + _BATCH]
                filled = np.concatenate([part, np.zeros((_BATCH - len(part), *part.shape[1:]), part.dtype)])
                scores.append(np.asarray(score(model.model, filled))[: len(part)])
            yield Prediction(str(path), np.concatenate(scores).mean(axis=0))


def file_inputs(samples: np.ndarray, model: TrainedModel) -> np.ndarray:
    """Returns the network's inputs for one file, float16 `[inputs, frames, bands]`, of its samples `[samples]`.

    They pass through float16 and the same layout as the clips of the store that the model was trained on.
    """
    size = model.layout.frames * model.features.hop_length
    windows = math.ceil(len(samples) / size)
    inputs = []
    for start in np.round(np.linspace(0, max(len(samples) - size, 0), windows)).astype(int):
        features, length = model.layout.fit(compute_features(samples[start : start + size], model.features))
        chunks = int(model.config.data.eval_chunks) if model.config.data.crop_frames else 1
        inputs += [features[first : first + model.frames] for first in chunk_starts(length, model.frames, chunks)]
    return np.stack(inputs).astype(np.float16)


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[str | Path], np.ndarray | str], paths: Iterable[str | Path]
) -> Iterator[tuple[str | Path, np.ndarray | str]]:
    """Yields (path, result) in order, working on the next few paths meanwhile."""
    queue = iter(paths)
    waiting: collections.deque[tuple[str | Path, Future[np.ndarray | str]]] = collections.deque(
        (path, pool.submit(function, path)) for path in itertools.islice(queue, _FILES_AHEAD)
    )
    while waiting:
        path, future = waiting.popleft()
        waiting.extend((path, pool.submit(function, path)) for path in itertools.islice(queue, 1))
        yield path, future.result()


def render(
    predictions: Iterable[Prediction], label_names: tuple[str, ...], form: str, top: int, task: str = "single_label"
) -> Iterator[str]:
    """Yields the lines of a table, a JSON array or a CSV file.

    Args:
      predictions: from `predict_files`; those without probabilities are left out of the table and have an `error` in the
        other forms.
      label_names: `[classes]`.
      form: "table", "json" or "csv".
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
                f"{label_names[i]} {scores[i]:.4g}" if regression else f"{label_names[i]} {100 * scores[i]:.1f} %" for i in order
            )
            yield f"{prediction.path}  " + "  ".join(shown)
        elif form == "json":
            entry: dict[str, object] = {"path": prediction.path}
            if scores is None:
                entry["error"] = prediction.error
            elif regression:
                entry["values"] = {label_names[i]: round(float(scores[i]), 6) for i in order}
            else:
                entry["labels"] = [{"label": label_names[i], "probability": round(float(scores[i]), 6)} for i in order]
            yield separator + json.dumps(entry, ensure_ascii=False)
            separator = ","
        elif form == "csv":
            first = [] if regression else ["" if scores is None else label_names[order[0]]]
            values = [""] * len(label_names) if scores is None else [f"{score:.6f}" for score in scores]
            yield _csv_line([prediction.path, *first, *values, prediction.error])
    if form == "json":
        yield "]"


def _csv_line(values: list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(values)
    return buffer.getvalue()
