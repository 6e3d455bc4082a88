"""The figures of a report as PNG files. They draw through matplotlib's objects, so no display is needed."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from sklearn import metrics as sk

from musicgenre.files import replacing

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"
_CURVES = (BLUE, ORANGE, GREEN, PURPLE, RED, "#56B4E9", "#8C6D00", "#444444", "#8DA0B3", "#7A3E9D")
_INK, _MUTED, _GRID = "#222222", "#6b7280", "#e5e7eb"
_DPI = 130
# With more classes the numbers in the cells of a confusion matrix could not be read.
_MOST_CLASSES_WITH_NUMBERS = 25


def confusion_matrix(
    path: str | os.PathLike[str], confusion: Sequence[Sequence[int]], label_names: Sequence[str], title: str
) -> None:
    """Draws how often clips of each class (rows) are taken for each class (columns).

    The colour is the share of the row; cells hold that share in percent over the count, for up to 25 classes.

    Args:
      path: PNG file.
      confusion: counts, rows are the truth, `[classes, classes]`.
      label_names: `[classes]`.
      title: what was evaluated.
    """
    counts = np.asarray(confusion)
    classes = len(label_names)
    rows = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(rows, 1)
    side = float(np.clip(0.62 * classes, 3.2, 11.5)) + 1.8
    figure = _figure(side + 0.9, side, layout="compressed")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    few = classes <= _MOST_CLASSES_WITH_NUMBERS
    size = 9 if few else 6.5
    axes.set_xticks(
        range(classes),
        [_short(name) for name in label_names],
        fontsize=size,
        rotation=45 if few else 90,
        ha="right" if few else "center",
        rotation_mode="anchor" if few else None,
    )
    axes.set_yticks(range(classes), _with_counts(label_names, rows[:, 0]), fontsize=size)
    axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2 if few else 0.4)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth (clips)")
    if few:
        number = 9 if classes <= 14 else 6.5
        for i, j in np.argwhere(counts > 0):
            axes.text(
                j,
                i,
                f"{100 * share[i, j]:.0f} %\n{counts[i, j]}",
                ha="center",
                va="center",
                fontsize=number,
                color="white" if share[i, j] > 0.55 else _INK,
            )
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0 %", "25 %", "50 %", "75 %", "100 %"])
    bar.outline.set_visible(False)
    bar.set_label("share of the true class", color=_MUTED)
    _save(figure, path, title)


def per_class_bars(
    path: str | os.PathLike[str],
    label_names: Sequence[str],
    measures: Mapping[str, Sequence[float | None]],
    support: Sequence[int],
    title: str,
) -> None:
    """Draws a panel for each measure: a bar for each class, in label order from the top, and their mean.

    Args:
      path: PNG file.
      label_names: `[classes]`.
      measures: values in [0, 1] by name, each `[classes]`; None where one is not defined.
      support: clips of each class, `[classes]`.
      title: what was evaluated.
    """
    classes = len(label_names)
    figure = _figure(3.2 + 3.4 * len(measures), 1.5 + 0.27 * max(classes, 4))
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    positions = np.arange(classes)
    colours = (BLUE, GREEN, PURPLE) * len(measures)
    for axes, (name, values), colour in zip(panels, measures.items(), colours, strict=False):
        known = [value for value in values if value is not None]
        axes.barh(positions, [value or 0 for value in values], color=colour, height=0.68)
        for position, value in zip(positions, values, strict=True):
            axes.text(
                1.13, position, "n/a" if value is None else f"{value:.2f}", ha="right", va="center", fontsize=8.5, color=_MUTED
            )
        if known:
            mean = float(np.mean(known))
            axes.axvline(mean, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.set_title(f"{name}, mean {mean:.3f}", fontsize=10, color=_INK)
        axes.set_xlim(0, 1.14)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_ylim(classes - 0.4, -0.6)
        _tidy(axes, "x")
    panels[0].set_yticks(positions, _with_counts(label_names, support), fontsize=9)
    panels[0].set_ylabel("label (clips)")
    _save(figure, path, title)


def reliability_diagram(
    path: str | os.PathLike[str],
    bins: Sequence[Mapping[str, Any]],
    ece: float,
    title: str,
    *,
    observed: str = "accuracy",
    counted: str = "clips",
) -> None:
    """Draws how often the model is right against how sure it is, and how many clips each bin holds.

    Args:
      path: PNG file.
      bins: `reliability` of the metrics.
      ece: expected calibration error.
      title: what was evaluated.
      observed: what is held against the probability, such as "accuracy" or "share of clips with the tag".
      counted: what the bins hold.
    """
    figure = _figure(5.8, 5.8)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    edges = np.array([row["low"] for row in bins])
    width = bins[0]["high"] - bins[0]["low"]
    full = [row for row in bins if row["n"]]
    top.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), label="perfect calibration")
    top.bar(
        [row["low"] for row in full],
        [row["accuracy"] for row in full],
        width=width * 0.92,
        align="edge",
        color=BLUE,
        alpha=0.85,
        label=observed,
    )
    for row in full:
        top.plot([row["confidence"]] * 2, [row["accuracy"], row["confidence"]], color=RED, linewidth=1.6)
    means = [row["confidence"] for row in full]
    top.plot(means, means, "o", color=RED, markersize=3.5, label="gap to the mean probability")
    top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel=observed)
    top.legend(
        edgecolor="none",
        framealpha=0.9,
        fontsize=8.5,
        loc="upper left",
        title_fontsize=9.5,
        alignment="left",
        title=f"expected calibration error {100 * ece:.1f} %",
    )
    below.bar(edges, [row["n"] for row in bins], width=width * 0.92, align="edge", color=_MUTED)
    below.set(xlabel="probability", ylabel=counted)
    if max(row["n"] for row in bins) > 100 * max(1, min(row["n"] for row in full)):
        below.set_yscale("log")
    _tidy(top, "both")
    _tidy(below, "y")
    _save(figure, path, title)


def learning_curves(
    path: str | os.PathLike[str],
    rows: Sequence[Mapping[str, Any]],
    title: str,
    *,
    metric: str = "accuracy",
    evaluated_step: int | None = None,
) -> None:
    """Draws loss and a metric over steps, of training and validation, and marks the step that was evaluated.

    Args:
      path: PNG file.
      rows: of `metrics.jsonl`: `step` with any of `train_loss`, `valid_loss`, `train_<metric>` and
        `valid_<metric>`.
      title: what was trained.
      metric: the metric of the second panel.
      evaluated_step: the checkpoint's step.
    """
    figure = _figure(9.6, 3.9)
    panels = figure.subplots(1, 2)
    for axes, name in zip(panels, ("loss", metric), strict=True):
        drawn = False
        for key, label, colour, marker in ((f"train_{name}", "training", ORANGE, ""), (f"valid_{name}", "validation", BLUE, "o")):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.4, marker=marker, markersize=3)
                drawn = True
        if evaluated_step is not None:
            axes.axvline(
                evaluated_step, color=RED, linewidth=1.2, linestyle=(0, (4, 3)), label=f"evaluated: step {evaluated_step}"
            )
        if not drawn:
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=_MUTED)
        axes.set_title(measure_name(name), fontsize=10, color=_INK)
        axes.set_xlabel("step")
        _tidy(axes, "both")
        axes.margins(x=0.02)
    panels[0].set_ylim(bottom=0)
    handles, names = panels[0].get_legend_handles_labels()
    if handles:
        panels[0].legend(handles, names, frameon=False, fontsize=8.5)
    _save(figure, path, title)


def roc_curves(
    path: str | os.PathLike[str],
    scores: np.ndarray,
    targets: np.ndarray,
    label_names: Sequence[str],
    title: str,
) -> None:
    """Draws the ROC curve of each label against the rest, for up to ten labels.

    Args:
      path: PNG file.
      scores: `[clips, labels]`.
      targets: 0 or 1, `[clips, labels]`; a label without positives or negatives is left out.
      label_names: `[labels]`.
      title: what was evaluated.
    """
    figure = _figure(5.8, 5.8)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
    for column, (name, colour) in enumerate(zip(label_names, _CURVES, strict=False)):
        truth = targets[:, column]
        if 0 < truth.sum() < len(truth):
            false_alarms, hits, _ = sk.roc_curve(truth, scores[:, column])
            area = sk.auc(false_alarms, hits)
            axes.plot(
                false_alarms,
                hits,
                color=colour,
                linewidth=1.5,
                label=f"{area:.2f}  {_short(name)}",
                linestyle="-" if column % 2 == 0 else (0, (5, 1)),
            )
    axes.set(xlim=(-0.01, 1), ylim=(0, 1.01), xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(edgecolor="none", framealpha=0.9, fontsize=8.5, loc="lower right", title="area, label", alignment="left")
    _tidy(axes, "both")
    _save(figure, path, title)


def comparison_plot(
    path: str | os.PathLike[str],
    rows: Sequence[Mapping[str, Any]],
    title: str,
    *,
    measure: str,
    percent: bool = False,
) -> None:
    """Draws one line for each run or variant: its mean with an interval, and a dot for each seed.

    Args:
      path: PNG file.
      rows: dicts with `name`, `mean`, `interval` ((low, high) or None) and `values` (of each seed, or
        none); drawn from the top in this order.
      title: what is compared.
      measure: name of the number.
      percent: show the numbers in percent.
    """
    factor, digits = (100, 1) if percent else (1, 3)
    figure = _figure(8.6, 1.9 + 0.42 * max(len(rows), 2))
    axes = figure.subplots()
    interval_drawn = dots_drawn = False
    for position, row in enumerate(rows):
        values = factor * np.asarray(row["values"], float)
        # Below the line; dots of equal value would hide each other, so they are spread a little.
        offsets = 0.26 + (np.linspace(-0.07, 0.07, len(values)) if len(values) > 1 else np.zeros(len(values)))
        axes.plot(
            values,
            position + offsets,
            "o",
            color=BLUE,
            alpha=0.75,
            markersize=4.5,
            markeredgewidth=0,
            label=None if dots_drawn or not len(values) else "a seed",
        )
        dots_drawn = dots_drawn or len(values) > 0
        if row["interval"] is not None:
            low, high = (factor * value for value in row["interval"])
            axes.plot(
                [low, high],
                [position] * 2,
                color=RED,
                linewidth=2,
                solid_capstyle="butt",
                label=None if interval_drawn else "95 % interval",
            )
            interval_drawn = True
        axes.plot(
            factor * row["mean"],
            position,
            "D",
            color=RED,
            markersize=6,
            markeredgecolor="white",
            label="value or mean" if position == 0 else None,
        )
        axes.annotate(
            f"{factor * row['mean']:.{digits}f}",
            (1.01, position),
            va="center",
            fontsize=9,
            xycoords=("axes fraction", "data"),
            color=_INK,
        )
    axes.set_yticks(range(len(rows)), [_short(row["name"], 44) for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"{measure} (%)" if percent else measure)
    axes.margins(x=0.08)
    figure.legend(frameon=False, fontsize=8.5, ncols=3, loc="outside lower center")
    _tidy(axes, "x")
    _save(figure, path, title)


def measure_name(key: str) -> str:
    """Returns the name of a measure for people, such as "macro ROC-AUC" for `macro_roc_auc`."""
    names = {
        "macro_roc_auc": "macro ROC-AUC",
        "macro_pr_auc": "macro PR-AUC",
        "macro_f1": "macro F1",
        "micro_f1": "micro F1",
        "top3_accuracy": "top-3 accuracy",
        "nll": "negative log likelihood",
        "ece": "calibration error",
    }
    return names.get(key, key.replace("_", " "))


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _with_counts(label_names: Sequence[str], counts: Sequence[int] | np.ndarray) -> list[str]:
    return [f"{_short(name)}  ({count})" for name, count in zip(label_names, counts, strict=True)]


def _figure(width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained") -> Figure:
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes, grid: Literal["both", "x", "y"]) -> None:
    axes.grid(axis=grid, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.tick_params(colors="#374151", length=3)


def _save(figure: Figure, path: str | os.PathLike[str], title: str) -> None:
    """Sets the title and writes the PNG atomically; its bytes depend on the drawing alone."""
    lines = "\n".join(textwrap.wrap(title, int(11.5 * figure.get_figwidth())))
    figure.suptitle(lines, fontsize=11, fontweight="bold", color=_INK, x=0.01, ha="left")
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
