"""Figures of a data set, a clip, a network and a trained run: reads them and hands arrays to `evaluation.plots`."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import librosa
import numpy as np

from musicgenre.audio.decode import load_audio
from musicgenre.audio.features import FeatureSpec, compute_features, mel_power
from musicgenre.datasets import Dataset
from musicgenre.datasets.base import SPLITS
from musicgenre.datasets.mtat import TABLE_NAMES, read_table
from musicgenre.errors import UserError
from musicgenre.evaluation import plots
from musicgenre.evaluation.metrics import (
    multi_label_metrics,
    regression_metrics,
    single_label_metrics,
)
from musicgenre.evaluation.report import Evaluation
from musicgenre.models.describe import Layer, describe, settings_text, shape_text, total_parameters
from musicgenre.runs.model import TrainedModel
from musicgenre.store.store import Store
from musicgenre.studies.evaluate import evaluate_model

_FRACTIONS_OF_HZ = (1, 2, 5)
_METRICS = {"single_label": "accuracy", "multi_label": "macro_roc_auc", "regression": "r2"}
_LABELS_IN_A_TITLE = 5


def table_figures(
    path: str | os.PathLike[str], out: str | os.PathLike[str], top: int = 50
) -> list[Path]:
    """Draws how many clips have each tag of MagnaTagATune's label table, all tags and the most frequent.

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
        raise UserError(
            f"{path}: MagnaTagATune's table is named {' or '.join(TABLE_NAMES)}. For a list of your own use "
            "--config.data.dataset=csv with --config."
        )
    table = read_table(path if path.is_dir() else path.parent)
    counts = {"clips": table.tags.sum(axis=0)}
    names = table.tag_names
    where = f"{len(table.clip_ids):,} clips, before any split"
    top = min(top, len(names))
    paths = [Path(out) / "tags_all.png", Path(out) / f"tags_top{top}.png"]
    plots.label_distribution(
        paths[0], names, counts, f"MagnaTagATune's {len(names)} tags · {where}", marked=top
    )
    plots.label_distribution(
        paths[1],
        names,
        counts,
        f"MagnaTagATune's {top} most frequent tags of {len(names)} · {where}",
        most=top,
    )
    return paths


def label_figures(clips: Dataset | Store, out: str | os.PathLike[str], top: int = 50) -> list[Path]:
    """Draws how many clips of each split have each label.

    Args:
      clips: a data set, or the store of one.
      out: folder of the pictures.
      top: where clips have tags, and more than this many are known: how many are in a second picture.

    Returns:
      The path of `labels.png`, for many tags that of `labels_top<top>.png` too; nothing for a regression, which has
      no labels.
    """
    if isinstance(clips, Store):
        about, splits, labels = clips.dataset, clips.splits.tolist(), clips.labels
    else:
        about = {name: getattr(clips, name) for name in ("name", "protocol", "task", "synthetic")}
        splits, labels = [clip.split for clip in clips.clips], [clip.labels for clip in clips.clips]
    if about["task"] == "regression":
        return []
    names = clips.label_names
    counts: dict[str, list[int]] = {}
    for split in SPLITS:
        if split in splits:
            found = Counter(
                label
                for own, clip in zip(splits, labels, strict=True)
                if own == split
                for label in clip
            )
            number = splits.count(split)
            counts[f"{split}, {number:,} clip{'s' if number != 1 else ''}"] = [
                found[name] for name in names
            ]
    tags = about["task"] == "multi_label"
    where = f"{about['name']} · {about['protocol']} · {len(labels):,} clips"
    what = f"{_synthetic(about['synthetic'])}Clips per {'tag' if tags else 'class'} and split"
    paths = [Path(out) / "labels.png"]
    plots.label_distribution(paths[0], names, counts, f"{what} · {where}", by_count=tags)
    if tags and len(names) > top:
        paths.append(Path(out) / f"labels_top{top}.png")
        plots.label_distribution(
            paths[1], names, counts, f"{what}, the {top} most frequent · {where}", most=top
        )
    return paths


def sound_figures(
    path: str | os.PathLike[str],
    spec: FeatureSpec,
    out: str | os.PathLike[str],
    *,
    min_seconds: float = 1.0,
) -> list[Path]:
    """Draws what a front end makes of a sound file.

    Args:
      path: the sound file; all of it is drawn.
      spec: the front end.
      out: folder of the pictures.
      min_seconds: a shorter file is refused.

    Returns:
      The paths of `spectrogram.png`, the features alone, and of `front_end.png`, the steps to them: the waveform,
      for log-mels the mel power, and the features. For waveforms the first one only.

    Raises:
      UserError: the file cannot be used.
    """
    samples = load_audio(
        path, spec.sample_rate, min_seconds=min_seconds, resampler=spec.resampler
    ).samples
    title = f"{Path(path).name} · {spec.describe()}"
    features = compute_features(samples, spec)
    last = feature_panel(features, spec)
    paths = [Path(out) / "spectrogram.png"]
    plots.time_panels(paths[0], [last], title)
    if spec.kind != "waveform":
        steps = [
            plots.TimePanel(samples, 1 / spec.sample_rate, name="waveform", ylabel="amplitude")
        ]
        if spec.kind == "logmel":
            steps.append(_mel_panel(mel_power(samples, spec), spec))
        paths.append(Path(out) / "front_end.png")
        plots.time_panels(paths[1], [*steps, last], f"The front end, step by step · {title}")
    return paths


def feature_panel(features: np.ndarray, spec: FeatureSpec) -> plots.TimePanel:
    """Returns the panel of one clip's features, with its time in seconds and its bands in Hz.

    Args:
      features: `[frames, bands]`, not normalised.
      spec: the front end that they come from.
    """
    hop = spec.hop_length / spec.sample_rate
    features = features.astype(np.float32)
    if spec.kind == "waveform":
        return plots.TimePanel(
            features.ravel(), 1 / spec.sample_rate, name="waveform", ylabel="amplitude"
        )
    if spec.kind == "mfcc":
        # The zeroth is the loudness, far beyond the others; it would take all the colours.
        shown = features[:, 1:] if features.shape[1] > 1 else features
        most = float(np.quantile(np.abs(shown), 0.995)) or 1.0
        return plots.TimePanel(
            features, hop, -hop / 2, "MFCC", "coefficient", unit="value", limits=(-most, most)
        )
    unit = (
        "dB re the clip's maximum"
        if spec.db_ref == "max"
        else f"dB (0 dB is a power of {spec.db_ref})"
    )
    # The same colours for every clip, as far as the front end fixes the scale.
    limits = (-spec.top_db, 0.0) if spec.db_ref == "max" else None
    scale = " in dB"
    if spec.compression == "log10000":
        unit, limits, scale = "log10(10000 x + 1)", None, ""
    if spec.kind == "stft":
        step = spec.sample_rate / spec.n_fft
        ticks = {hz / step: f"{hz:g}" for hz in _round_hz(0, spec.sample_rate / 2)}
        return plots.TimePanel(
            features, hop, -hop / 2, f"STFT, power{scale}", "frequency (Hz)", ticks, unit, limits
        )
    return plots.TimePanel(
        features,
        hop,
        -hop / 2,
        f"mel spectrogram{scale}",
        "frequency (Hz)",
        mel_ticks(spec),
        unit,
        limits,
    )


def mel_ticks(spec: FeatureSpec) -> dict[float, str]:
    """Returns Hz by position on an axis of mel bands, on which the centre of the first band is 0."""
    centres = librosa.mel_frequencies(
        n_mels=spec.n_mels + 2, fmin=spec.fmin, fmax=spec.top_frequency
    )[1:-1]
    ticks: dict[float, str] = {}
    for hz in (1000.0 * 2.0**octave for octave in range(5, -4, -1)):
        position = float(np.interp(hz, centres, np.arange(spec.n_mels)))
        # The low octaves lie close together.
        if centres[0] <= hz <= centres[-1] and (
            not ticks or min(ticks) - position >= spec.n_mels / 18
        ):
            ticks[position] = f"{hz:g}"
    return ticks


def architecture_figure(
    module: nn.Module,
    frames: int,
    bands: int,
    out: str | os.PathLike[str],
    name: str,
    about: str = "",
) -> tuple[Path, list[Layer]]:
    """Draws the layers of a network.

    Args:
      module: the network.
      frames: frames of its input.
      bands: bands of its input.
      out: folder of the picture.
      name: of the network, for the title and the file.
      about: what else the title says.

    Returns:
      The path of `architecture_<name>.png`, and the layers.
    """
    layers = describe(module, frames, bands)
    rows: list[dict[str, Any]] = [
        {
            "name": layer.name,
            "kind": layer.kind,
            "settings": settings_text(layer),
            "input": " and ".join(dict.fromkeys(map(shape_text, layer.inputs))),
            "output": shape_text(layer.output),
            "parameters": layer.parameters,
            "sources": [(source.layer, ", ".join(source.operations)) for source in layer.sources],
        }
        for layer in layers
    ]
    path = Path(out) / f"architecture_{name}.png"
    title = f"{name} · input {frames} x {bands} · {total_parameters(layers):,} parameters"
    plots.architecture(path, rows, f"{title} · {about}" if about else title)
    return path, layers


def run_figures(
    model: TrainedModel,
    store: Store,
    out: str | os.PathLike[str],
    split: str,
    *,
    clip_id: str = "",
    top: int = 50,
) -> list[Path]:
    """Draws a trained run: its learning curves, network and data, its mistakes on a split, and one clip with its labels.

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
    out = Path(out)
    evaluation = evaluate_model(model, store, split, compare_spectrograms=False)
    if clip_id and clip_id not in evaluation.clip_ids:
        raise UserError(
            f"{store.path}: the split {split!r} has no clip {clip_id!r}; its first is {evaluation.clip_ids[0]!r}."
        )
    where = (
        f"{evaluation.dataset} · {evaluation.protocol} · {split} · {len(evaluation.clip_ids):,} clips · {model.workdir.name}, "
        f"step {model.step}"
    )
    synthetic = _synthetic(evaluation.synthetic)
    paths = []
    if evaluation.curves:
        paths.append(out / "learning_curves.png")
        # The curves are those of training and its validation, whatever is evaluated here.
        trained_on = f"{model.dataset['name']} · {model.dataset['protocol']} · {model.workdir.name}"
        plots.learning_curves(
            paths[-1],
            evaluation.curves,
            f"{_synthetic(model.dataset['synthetic'])}Learning curves · {trained_on}",
            metric=_METRICS[model.task],
            evaluated_step=model.step,
        )
    paths.append(_mistakes_figure(evaluation, out, f"{synthetic}{{}} · {where}"))
    path, _ = architecture_figure(
        model.module,
        model.frames,
        model.features.bands,
        out,
        str(model.config.model.name),
        f"{model.features.kind} · {model.workdir.name}",
    )
    paths += [path, *label_figures(store, out, top)]
    row = evaluation.clip_ids.index(clip_id) if clip_id else 0
    index = store.indices(split)[row]
    features = store.gather(np.array([index]))[0, : store.lengths[index]]
    paths.append(out / "clip.png")
    title = f"{synthetic}{evaluation.clip_ids[row]} · {_labels_text(evaluation, row)} · {evaluation.dataset}, {split}"
    plots.time_panels(paths[-1], [feature_panel(features, store.features)], title)
    return paths


def _mistakes_figure(evaluation: Evaluation, out: Path, title: str) -> Path:
    """Draws the confusion matrix, or the measures of each tag or number where clips have several; returns the path."""
    scores, targets, names = (
        np.asarray(evaluation.scores),
        np.asarray(evaluation.targets),
        evaluation.label_names,
    )
    if evaluation.task == "single_label":
        metrics = single_label_metrics(scores, targets, names)
        path = out / "confusion.png"
        plots.confusion_matrix(path, metrics["confusion"], names, title.format("Confusion"))
        return path
    if evaluation.task == "multi_label":
        metrics, measures, what = (
            multi_label_metrics(scores, targets, names),
            {"ROC-AUC": "roc_auc", "PR-AUC": "pr_auc"},
            "tag",
        )
    else:
        metrics, measures, what = (
            regression_metrics(scores, targets, names),
            {"R2": "r2", "correlation": "correlation"},
            "output",
        )
    rows = metrics["per_class"]
    path = out / "per_class.png"
    plots.per_class_bars(
        path,
        names,
        {name: [row[key] for row in rows] for name, key in measures.items()},
        [row["support"] for row in rows],
        title.format(f"Per {what}"),
    )
    return path


def _labels_text(evaluation: Evaluation, row: int) -> str:
    """Returns a clip's true labels and the most probable ones."""
    names, scores = evaluation.label_names, np.asarray(evaluation.scores)[row]
    target = np.asarray(evaluation.targets)[row]
    if evaluation.task == "regression":
        shown = [
            f"{names[i]} {target[i]:.3g} (predicted {scores[i]:.3g})"
            for i in range(min(len(names), _LABELS_IN_A_TITLE))
        ]
        return _listed(shown, len(names))
    if evaluation.task == "single_label":
        best = int(scores.argmax())
        return f"true: {names[int(target)]} · predicted: {names[best]} ({100 * scores[best]:.0f} %)"
    true = [names[i] for i in np.flatnonzero(target).tolist()]
    # As many of the likeliest tags as are true, so that the two lists can be held against each other.
    likely = np.argsort(-scores, kind="stable")[
        : min(max(len(true), 1), _LABELS_IN_A_TITLE)
    ].tolist()
    predicted = ", ".join(f"{names[i]} ({100 * scores[i]:.0f} %)" for i in likely)
    return f"true: {_listed(true[:_LABELS_IN_A_TITLE], len(true)) or 'no tag'} · likeliest: {predicted}"


def _listed(shown: Sequence[str], count: int) -> str:
    return ", ".join(shown) + (f" and {count - len(shown)} more" if count > len(shown) else "")


def _mel_panel(power: np.ndarray, spec: FeatureSpec) -> plots.TimePanel:
    """Returns the panel of mel power; a few loud cells are beyond its colours, or the rest would be black."""
    hop = spec.hop_length / spec.sample_rate
    limits = (0.0, float(np.quantile(power, 0.99)) or 1.0)
    return plots.TimePanel(
        power, hop, -hop / 2, "mel power", "frequency (Hz)", mel_ticks(spec), "power", limits
    )


def _round_hz(low: float, high: float) -> list[float]:
    """Returns about six round frequencies from `low` to `high` at equal distances."""
    wanted = (high - low) / 6
    step = next(
        digit * 10.0**power
        for power in range(6)
        for digit in _FRACTIONS_OF_HZ
        if digit * 10.0**power >= wanted or power == 5
    )
    return [float(hz) for hz in np.arange(np.ceil(low / step) * step, high + 1e-6, step)]


def _synthetic(synthetic: bool) -> str:
    return "SYNTHETIC · " if synthetic else ""
