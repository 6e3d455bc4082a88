"""Figures of a data set, a clip and a trained run: reads them and draws with `evaluation.plots`."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from musicgenre.audio.decode import load_audio
from musicgenre.audio.features import FeatureSpec, compute_features, mel_power
from musicgenre.datasets import Dataset
from musicgenre.datasets.base import SPLITS
from musicgenre.datasets.mtat import TABLE_NAMES, read_table
from musicgenre.errors import UserError
from musicgenre.evaluation import plots
from musicgenre.evaluation.report import Evaluation, label_metrics, main_measures
from musicgenre.inference.spectrogram import feature_panel, mel_ticks
from musicgenre.runs.model import TrainedModel
from musicgenre.store.store import Store
from musicgenre.studies.architecture import architecture_figure
from musicgenre.studies.evaluate import evaluate_model

_LABELS_IN_A_TITLE = 5

PathLike = str | os.PathLike[str]


def table_figures(path: PathLike, out: PathLike, top: int = 50) -> list[Path]:
    """Draws how many clips have each tag of MagnaTagATune's table, all and the `top` most frequent.

    Args:
      path: `annotations_final.csv` or `annotations_final.csv.gz`, or the folder that holds it.
      out: folder of the pictures.
      top: how many tags are the most frequent.

    Returns:
      The paths of `tags_all.png` and `tags_top<top>.png`.

    Raises:
      UserError: there is no such table, or it cannot be used.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such table of tags.")
    if path.is_file() and path.name not in TABLE_NAMES:
        remedy = "For your own list use --config.data.dataset=csv with --config."
        raise UserError(f"{path}: the table is named {' or '.join(TABLE_NAMES)}. {remedy}")
    table = read_table(path if path.is_dir() else path.parent)
    names, counts = table.tag_names, {"clips": table.tags.sum(axis=0)}
    top, n = min(top, len(names)), len(names)
    where = f"{len(table.clip_ids):,} clips, before any split"
    every = plots.label_distribution(names, counts, marked=top)
    frequent = plots.label_distribution(names, counts, most=top)
    title = f"MagnaTagATune's {top} most frequent tags of {n} · {where}"
    return [
        _saved(every, out, "tags_all", f"MagnaTagATune's {n} tags · {where}"),
        _saved(frequent, out, f"tags_top{top}", title),
    ]


def label_figures(clips: Dataset | Store, out: PathLike, top: int = 50) -> list[Path]:
    """Draws how many clips of each split have each label.

    Args:
      clips: a data set, or the store of one.
      out: folder of the pictures.
      top: for more tags than this, a second picture has the most frequent ones.

    Returns:
      The path of `labels.png`, for many tags also that of `labels_top<top>.png`; none for a
      regression, which has no labels.
    """
    if isinstance(clips, Store):
        about, splits, labels = clips.dataset, clips.splits.tolist(), clips.labels
    else:
        about = {name: getattr(clips, name) for name in ("name", "protocol", "task", "synthetic")}
        splits, labels = [clip.split for clip in clips.clips], [clip.labels for clip in clips.clips]
    if about["task"] == "regression":
        return []
    names, counts = clips.label_names, {}
    totals = Counter(
        (split, label) for split, found in zip(splits, labels, strict=True) for label in found
    )
    for split in SPLITS:
        if number := splits.count(split):
            title = f"{split}, {number:,} clip{'s' if number != 1 else ''}"
            counts[title] = [totals[split, name] for name in names]
    tags = about["task"] == "multi_label"
    where = f"{about['name']} · {about['protocol']} · {len(labels):,} clips"
    what = f"{_synthetic(about['synthetic'])}Clips per {'tag' if tags else 'class'} and split"
    figure = plots.label_distribution(names, counts, by_count=tags)
    paths = [_saved(figure, out, "labels", f"{what} · {where}")]
    if tags and len(names) > top:
        figure = plots.label_distribution(names, counts, most=top)
        title = f"{what}, the {top} most frequent · {where}"
        paths.append(_saved(figure, out, f"labels_top{top}", title))
    return paths


def sound_figures(path: PathLike, spec: FeatureSpec, out: PathLike) -> list[Path]:
    """Draws the features of a complete sound file of at least one second by a front end.

    Returns:
      The paths of `spectrogram.png`, the features alone, and of `front_end.png`, the steps to them:
      the waveform, for log-mels the mel power, and the features. For waveforms only the first.

    Raises:
      UserError: the file cannot be used.
    """
    rate = spec.sample_rate
    samples = load_audio(path, rate, min_seconds=1.0, resampler=spec.resampler).samples
    title = f"{Path(path).name} · {spec.describe()}"
    last = feature_panel(compute_features(samples, spec), spec)
    paths = [_saved(plots.time_panels([last]), out, "spectrogram", title)]
    if spec.kind != "waveform":
        steps = [plots.TimePanel(samples, 1 / rate, name="waveform", ylabel="amplitude")]
        if spec.kind == "logmel":
            power, hop = mel_power(samples, spec), spec.hop_length / rate
            # A few loud cells exceed the colours; otherwise the rest would be black.
            limits = (0.0, float(np.quantile(power, 0.99)) or 1.0)
            names = ("mel power", "frequency (Hz)", mel_ticks(spec), "power", limits)
            steps.append(plots.TimePanel(power, hop, -hop / 2, *names))
        figure = plots.time_panels([*steps, last])
        paths.append(_saved(figure, out, "front_end", f"The front end, step by step · {title}"))
    return paths


def run_figures(
    model: TrainedModel,
    store: Store,
    out: PathLike,
    split: str,
    *,
    clip_id: str = "",
    top: int = 50,
) -> list[Path]:
    """Draws a trained run: learning curves, network, data, errors on a split, and one clip.

    Args:
      model: the trained model.
      store: the store that it is evaluated on.
      out: folder of the pictures.
      split: "train", "valid" or "test".
      clip_id: a clip of that split; "" is the first.
      top: see `label_figures`.

    Returns:
      The paths of the pictures.

    Raises:
      UserError: the store does not fit the model, the split is empty or has no such clip.
    """
    evaluation = evaluate_model(model, store, split, compare_spectrograms=False)
    ids, run = evaluation.clip_ids, model.workdir.name
    if clip_id and clip_id not in ids:
        raise UserError(
            f"{store.path}: the split {split!r} has no clip {clip_id!r}; its first is {ids[0]!r}."
        )
    paths = []
    if evaluation.curves:
        metric = main_measures(model.task)[0]
        figure = plots.learning_curves(evaluation.curves, metric, model.step)
        # The curves are those of training and its validation split, not of the evaluated split.
        about = f"{model.dataset['name']} · {model.dataset['protocol']} · {run}"
        title = f"{_synthetic(model.dataset['synthetic'])}Learning curves · {about}"
        paths.append(_saved(figure, out, "learning_curves", title))
    synthetic, features = _synthetic(evaluation.synthetic), model.features
    about = f"{evaluation.dataset} · {evaluation.protocol} · {split} · {len(ids):,} clips"
    title = f"{synthetic}{{}} · {about} · {run}, step {model.step}"
    paths.append(_mistakes_figure(evaluation, out, title))
    shape, name = (model.frames, features.bands), str(model.config.model.name)
    path, _ = architecture_figure(model.module, *shape, out, name, f"{features.kind} · {run}")
    paths += [path, *label_figures(store, out, top)]
    row = ids.index(clip_id) if clip_id else 0
    index = store.indices(split)[row]
    values = store.gather(np.array([index]))[0, : store.lengths[index]]
    figure = plots.time_panels([feature_panel(values, store.features)])
    about = f"{_labels_text(evaluation, row)} · {evaluation.dataset}, {split}"
    return [*paths, _saved(figure, out, "clip", f"{synthetic}{ids[row]} · {about}")]


def _mistakes_figure(evaluation: Evaluation, out: PathLike, title: str) -> Path:
    """Draws the confusion matrix, or without classes the measures of each tag or output."""
    metrics = label_metrics(evaluation)
    if evaluation.task == "single_label":
        figure = plots.confusion_matrix(metrics["confusion"], evaluation.label_names)
        return _saved(figure, out, "confusion", title.format("Confusion"))
    what = "tag" if evaluation.task == "multi_label" else "output"
    return _saved(plots.per_class_bars(metrics), out, "per_class", title.format(f"Per {what}"))


def _labels_text(evaluation: Evaluation, row: int) -> str:
    """Returns a clip's true labels and the most probable ones."""
    names, scores, target = evaluation.label_names, evaluation.scores[row], evaluation.targets[row]
    if evaluation.task == "regression":
        values = zip(names, target, scores, strict=True)
        return _listed([f"{name} {y:.3g} (predicted {guess:.3g})" for name, y, guess in values])
    if evaluation.task == "single_label":
        best = int(scores.argmax())
        return f"true: {names[int(target)]} · predicted: {names[best]} ({100 * scores[best]:.0f} %)"
    true = [names[i] for i in np.flatnonzero(target).tolist()]
    # As many of the most probable tags as are true, so that the two lists can be compared.
    count = min(max(len(true), 1), _LABELS_IN_A_TITLE)
    likely = np.argsort(-scores, kind="stable")[:count].tolist()
    predicted = ", ".join(f"{names[i]} ({100 * scores[i]:.0f} %)" for i in likely)
    return f"true: {_listed(true) or 'no tag'} · most probable: {predicted}"


def _listed(words: Sequence[str]) -> str:
    shown = words[:_LABELS_IN_A_TITLE]
    more = f" and {len(words) - len(shown)} more" if len(words) > len(shown) else ""
    return ", ".join(shown) + more


def _saved(figure: Figure, out: PathLike, name: str, title: str) -> Path:
    path = Path(out) / f"{name}.png"
    plots.save(figure, path, title, palette=True)
    return path


def _synthetic(synthetic: bool) -> str:
    return "SYNTHETIC · " if synthetic else ""
