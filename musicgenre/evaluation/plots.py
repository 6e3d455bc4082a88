"""The figures of a report as PNG files. They draw through matplotlib's objects, so no display is needed."""

import dataclasses
import functools
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image
from sklearn import metrics as sk

from musicgenre.files import replacing

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"
_CURVES = (BLUE, ORANGE, GREEN, PURPLE, RED, "#56B4E9", "#8C6D00", "#444444", "#8DA0B3", "#7A3E9D")
INK, MUTED, _GRID = "#222222", "#6b7280", "#e5e7eb"
_DPI = 130
# With more classes the numbers in the cells of a confusion matrix could not be read.
_MOST_CLASSES_WITH_NUMBERS = 25
# Labels from which on bars are too many for a number above each.
_MOST_BARS_WITH_NUMBERS = 60
# Of the drawing of a network, in inches: a column, a box in it, the margin on its left, where the arrows are in a box, and a
# line of text.
_COLUMN, _BOX, _MARGIN, _ARROW, _LINE = 3.9, 3.3, 0.3, 0.45, 0.155
# Its boxes' colours by what a layer is, and the bar on their left.
_FILLS = {
    "conv": "#cfe5f3",
    "dense": "#cdebe1",
    "norm": "#eef0f3",
    "dropout": "#eef0f3",
    "recurrent": "#f3e0ec",
    "attention": "#fae0d2",
    "other": "#fbecc9",
    "none": "#ffffff",
}
_EDGES = {"conv": BLUE, "dense": GREEN, "recurrent": PURPLE, "attention": RED, "other": ORANGE}


def confusion_matrix(
    path: str | os.PathLike[str],
    confusion: Sequence[Sequence[int]],
    label_names: Sequence[str],
    title: str,
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
    figure = new_figure(side + 0.9, side, layout="compressed")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    few = classes <= _MOST_CLASSES_WITH_NUMBERS
    size = 9 if few else 6.5
    axes.set_xticks(
        range(classes),
        [short(name) for name in label_names],
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
                color="white" if share[i, j] > 0.55 else INK,
            )
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0 %", "25 %", "50 %", "75 %", "100 %"])
    bar.outline.set_visible(False)
    bar.set_label("share of the true class", color=MUTED)
    save(figure, path, title)


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
    figure = new_figure(3.2 + 3.4 * len(measures), 1.5 + 0.27 * max(classes, 4))
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    positions = np.arange(classes)
    colours = (BLUE, GREEN, PURPLE) * len(measures)
    for axes, (name, values), colour in zip(panels, measures.items(), colours, strict=False):
        known = [value for value in values if value is not None]
        axes.barh(positions, [value or 0 for value in values], color=colour, height=0.68)
        for position, value in zip(positions, values, strict=True):
            axes.text(
                1.13,
                position,
                "n/a" if value is None else f"{value:.2f}",
                ha="right",
                va="center",
                fontsize=8.5,
                color=MUTED,
            )
        if known:
            mean = float(np.mean(known))
            axes.axvline(mean, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.set_title(f"{name}, mean {mean:.3f}", fontsize=10, color=INK)
        axes.set_xlim(0, 1.14)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_ylim(classes - 0.4, -0.6)
        _tidy(axes, "x")
    panels[0].set_yticks(positions, _with_counts(label_names, support), fontsize=9)
    panels[0].set_ylabel("label (clips)")
    save(figure, path, title)


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
    figure = new_figure(5.8, 5.8)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    edges = np.array([row["low"] for row in bins])
    width = bins[0]["high"] - bins[0]["low"]
    full = [row for row in bins if row["n"]]
    top.plot(
        [0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="perfect calibration"
    )
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
        top.plot(
            [row["confidence"]] * 2, [row["accuracy"], row["confidence"]], color=RED, linewidth=1.6
        )
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
    below.bar(edges, [row["n"] for row in bins], width=width * 0.92, align="edge", color=MUTED)
    below.set(xlabel="probability", ylabel=counted)
    if max(row["n"] for row in bins) > 100 * max(1, min(row["n"] for row in full)):
        below.set_yscale("log")
    _tidy(top, "both")
    _tidy(below, "y")
    save(figure, path, title)


def coverage_curve(path: str | os.PathLike[str], abstention: Mapping[str, Any], title: str) -> None:
    """Draws the accuracy on the surest clips against their share, with intervals where it is told in numbers.

    Args:
      path: PNG file.
      abstention: from `musicgenre.evaluation.calibration.risk_coverage`.
      title: what was evaluated.
    """
    figure = new_figure(5.8, 4.8)
    axes = figure.subplots()
    coverage, accuracy = abstention["curve"]["coverage"], abstention["curve"]["accuracy"]
    axes.plot(
        coverage,
        accuracy,
        color=BLUE,
        linewidth=1.8,
        label=f"surest clips first (AURC {abstention['aurc']:.3f})",
    )
    everything = f"all clips: {100 * accuracy[-1]:.1f} %"
    axes.plot(
        [0, 1],
        [accuracy[-1]] * 2,
        color=MUTED,
        linewidth=1,
        linestyle=(0, (4, 3)),
        label=everything,
    )
    for number, row in enumerate(abstention["at"]):
        low, high = row["wilson"]
        axes.plot(
            [row["coverage"]] * 2,
            [low, high],
            color=RED,
            linewidth=1.6,
            label=None if number else "95 % Wilson interval",
        )
        axes.plot(
            row["coverage"], row["accuracy"], "o", color=RED, markersize=5, markeredgecolor="white"
        )
        axes.annotate(
            f"{100 * row['accuracy']:.1f} %",
            (row["coverage"], low),
            (0, -4),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8.5,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    # The axis leaves room for the legend below all that is drawn.
    lowest = min(*accuracy, *(row["wilson"][0] for row in abstention["at"]))
    axes.set_ylim(max(np.floor(10 * lowest - 2) / 10, -0.2), 1.02)
    axes.set_yticks([tick for tick in np.linspace(0, 1, 11) if tick >= axes.get_ylim()[0] - 1e-9])
    axes.set(
        xlim=(0, 1.01),
        xlabel="coverage: share of the clips that are named",
        ylabel="accuracy on these",
    )
    axes.legend(edgecolor="none", framealpha=0.9, fontsize=8.5, loc="lower left")
    _tidy(axes, "both")
    save(figure, path, title)


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
    figure = new_figure(9.6, 3.9)
    panels = figure.subplots(1, 2)
    for axes, name in zip(panels, ("loss", metric), strict=True):
        drawn = False
        for key, label, colour, marker in (
            (f"train_{name}", "training", ORANGE, ""),
            (f"valid_{name}", "validation", BLUE, "o"),
        ):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    label=label,
                    linewidth=1.4,
                    marker=marker,
                    markersize=3,
                )
                drawn = True
        if evaluated_step is not None:
            axes.axvline(
                evaluated_step,
                color=RED,
                linewidth=1.2,
                linestyle=(0, (4, 3)),
                label=f"evaluated: step {evaluated_step}",
            )
        if not drawn:
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=MUTED)
        axes.set_title(measure_name(name), fontsize=10, color=INK)
        axes.set_xlabel("step")
        _tidy(axes, "both")
        axes.margins(x=0.02)
    panels[0].set_ylim(bottom=0)
    handles, names = panels[0].get_legend_handles_labels()
    if handles:
        panels[0].legend(handles, names, frameon=False, fontsize=8.5)
    save(figure, path, title)


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
    figure = new_figure(5.8, 5.8)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
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
                label=f"{area:.2f}  {short(name)}",
                linestyle="-" if column % 2 == 0 else (0, (5, 1)),
            )
    axes.set(
        xlim=(-0.01, 1),
        ylim=(0, 1.01),
        xlabel="false positive rate",
        ylabel="true positive rate",
        aspect="equal",
    )
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            edgecolor="none",
            framealpha=0.9,
            fontsize=8.5,
            loc="lower right",
            title="area, label",
            alignment="left",
        )
    _tidy(axes, "both")
    save(figure, path, title)


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
    figure = new_figure(8.6, 1.9 + 0.42 * max(len(rows), 2))
    axes = figure.subplots()
    interval_drawn = dots_drawn = False
    for position, row in enumerate(rows):
        values = factor * np.asarray(row["values"], float)
        # Below the line; dots of equal value would hide each other, so they are spread a little.
        offsets = 0.26 + (
            np.linspace(-0.07, 0.07, len(values)) if len(values) > 1 else np.zeros(len(values))
        )
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
            color=INK,
        )
    axes.set_yticks(range(len(rows)), [short(row["name"], 44) for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"{measure} (%)" if percent else measure)
    axes.margins(x=0.08)
    figure.legend(frameon=False, fontsize=8.5, ncols=3, loc="outside lower center")
    _tidy(axes, "x")
    save(figure, path, title)


def folds_plot(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draws the accuracy of each row with its interval and trainings on the left, and what leaked on the right.

    Args:
      path: PNG file.
      rows: `name`, `mean` (accuracy over all clips), `interval` (low and high, or None), `values` (accuracy of each training),
        `clips` (how many were held out) and `leaks` (how many of them by kind, three kinds).
      title: heading.
    """
    figure = new_figure(10.5, 1.9 + 0.62 * max(len(rows), 2))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for position, row in enumerate(rows):
        first = position == 0
        values = 100 * np.array(row["values"])
        offsets = 0.22 + (np.linspace(-0.1, 0.1, len(values)) if len(values) > 1 else np.zeros(1))
        left.plot(
            values,
            position + offsets,
            "o",
            color=BLUE,
            alpha=0.6,
            markersize=4,
            label="a training" if first else None,
        )
        if row["interval"] is not None:
            ends = [100 * end for end in row["interval"]]
            left.plot(
                ends,
                [position] * 2,
                color=RED,
                linewidth=2,
                label="95 % interval over artists" if first else None,
            )
        left.plot(
            100 * row["mean"],
            position,
            "D",
            color=RED,
            markersize=6,
            label="all clips held out" if first else None,
        )
        left.annotate(
            f"{100 * row['mean']:.1f}",
            (100 * row["mean"], position - 0.16),
            ha="center",
            va="bottom",
            fontsize=9,
            color=INK,
        )
        for number, ((kind, count), colour) in enumerate(
            zip(row["leaks"].items(), (PURPLE, ORANGE, BLUE), strict=True)
        ):
            place, share = position + 0.26 * (number - 1), 100 * count / row["clips"]
            right.barh(
                place, share, 0.22, color=colour, label=f"{kind} in training" if first else None
            )
            right.annotate(f" {share:.0f}", (share, place), va="center", fontsize=7.5, color=INK)
    left.set_yticks(range(len(rows)), [short(row["name"], 40) for row in rows], fontsize=9)
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_xlabel("accuracy (%)")
    right.set_xlabel("held-out clips (%)")
    right.set_xlim(0, 112)
    for axes in (left, right):
        _tidy(axes, "x")
    figure.legend(frameon=False, fontsize=8.5, ncols=3, loc="outside lower center")
    save(figure, path, title)


def label_distribution(
    path: str | os.PathLike[str],
    label_names: Sequence[str],
    counts: Mapping[str, Sequence[int]],
    title: str,
    *,
    by_count: bool = True,
    most: int = 0,
    marked: int = 0,
) -> None:
    """Draws how many clips have each label: a bar a label, labels on the x axis, the splits on top of each other.

    Args:
      path: PNG file.
      label_names: `[labels]`.
      counts: clips with each label, `[labels]`, by split; a single one, such as "clips", where there are no splits.
      title: what was counted.
      by_count: the most frequent first; otherwise in the order given.
      most: draw only so many labels, the first ones; 0 draws all.
      marked: the first so many in another colour, as those that are used; 0 marks none. For a single split.
    """
    table = np.array([list(values) for values in counts.values()], int).reshape(
        len(counts), len(label_names)
    )
    totals = table.sum(axis=0)
    order = np.argsort(-totals, kind="stable") if by_count else np.arange(len(label_names))
    order = order[: most or len(order)]
    table, totals, names = table[:, order], totals[order], [label_names[i] for i in order]
    # Font size and inches a label: it lies on its side, so that it takes the height of a line.
    size, room = (
        (9.0, 0.36) if len(names) <= 30 else (8.0, 0.168) if len(names) <= 80 else (7.0, 0.115)
    )
    figure = new_figure(max(6.5, 1.6 + len(names) * room), 5.2)
    axes = figure.subplots()
    positions = np.arange(len(names))
    bottom = np.zeros(len(names), int)
    for (split, values), colour in zip(
        zip(counts, table, strict=True), (BLUE, ORANGE, GREEN, PURPLE), strict=False
    ):
        colours = [colour if not marked or i < marked else "#9ca3af" for i in positions]
        axes.bar(positions, values, bottom=bottom, width=0.78, color=colours, label=split)
        bottom = bottom + values
    handles, words = axes.get_legend_handles_labels()
    if marked and marked < len(names):
        handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in (BLUE, "#9ca3af")]
        words = [f"the {marked} most frequent", f"the other {len(names) - marked}"]
    if len(handles) > 1:
        axes.legend(
            handles,
            words,
            frameon=False,
            fontsize=9,
            ncols=len(words),
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
        )
    if len(names) <= _MOST_BARS_WITH_NUMBERS:
        for position, total in zip(positions, totals, strict=True):
            axes.annotate(
                f"{total:,}",
                (position, total),
                (0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7 if len(names) > 12 else 8.5,
                rotation=90 if len(names) > 12 else 0,
                color=MUTED,
            )
        axes.margins(y=0.12)
    axes.set_xticks(
        positions,
        [short(name) for name in names],
        fontsize=size,
        rotation=90 if len(names) > 12 else 35,
    )
    if len(names) <= 12:
        for text in axes.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.set_ylabel("clips")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    _tidy(axes, "y")
    axes.tick_params(axis="x", length=0)
    save(figure, path, title, palette=True)


@dataclasses.dataclass(frozen=True, eq=False)
class TimePanel:
    """Something over time that `time_panels` draws.

    Attributes:
      values: `[n]`, drawn as a line, or `[n, bands]`, drawn as an image with the first band at the bottom.
      seconds: from one value or frame to the next.
      start: where the first begins, seconds; a frame that is centred on 0 begins half a hop before it.
      name: what it is.
      ylabel: name of the vertical axis.
      yticks: labels by position, in bands (the first band's centre is 0); matplotlib's own if empty.
      unit: name of the colour bar, such as "dB".
      limits: values of the first and the last colour; the smallest and the largest if None.
    """

    values: np.ndarray
    seconds: float
    start: float = 0.0
    name: str = ""
    ylabel: str = ""
    yticks: Mapping[float, str] = dataclasses.field(default_factory=dict)
    unit: str = ""
    limits: tuple[float, float] | None = None


def time_panels(path: str | os.PathLike[str], panels: Sequence[TimePanel], title: str) -> None:
    """Draws panels below each other over one time axis, such as a waveform and its spectrogram.

    Args:
      path: PNG file.
      panels: from the top.
      title: of which clip.
    """
    heights = [1.0 if panel.values.ndim == 1 else 2.6 for panel in panels]
    figure = new_figure(8.4, 1.1 + 1.1 * sum(heights))
    column = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[
        :, 0
    ]
    for axes, panel in zip(column, panels, strict=True):
        count = len(panel.values)
        end = panel.start + count * panel.seconds
        if panel.values.ndim == 1:
            axes.plot(
                *_envelope(panel.values, panel.seconds, panel.start), color=BLUE, linewidth=0.6
            )
            _tidy(axes, "both")
        else:
            image = _spectrogram(axes, panel)
            low, high = image.get_clim()
            beyond = {
                (False, False): "neither",
                (True, False): "min",
                (False, True): "max",
                (True, True): "both",
            }
            bar = figure.colorbar(
                image,
                ax=axes,
                pad=0.012,
                fraction=0.045,
                extend=beyond[bool(panel.values.min() < low), bool(panel.values.max() > high)],
            )
            bar.outline.set_visible(False)
            bar.set_label(panel.unit, color=MUTED)
            bar.ax.tick_params(colors="#374151", length=3)
            axes.tick_params(colors="#374151", length=3)
            axes.spines[:].set_visible(False)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if panel.yticks:
            axes.set_yticks(list(panel.yticks), list(panel.yticks.values()))
        axes.set_ylabel(panel.ylabel)
        if panel.name:
            axes.set_title(panel.name, fontsize=10, color=INK, loc="left")
        axes.set_xlim(max(panel.start, 0), end)
    column[-1].set_xlabel("time (s)")
    save(figure, path, title, palette=True)


def taggram(
    path: str | os.PathLike[str],
    sound: TimePanel,
    starts: np.ndarray,
    ends: np.ndarray,
    scores: np.ndarray,
    label_names: Sequence[str],
    title: str,
    *,
    most: int = 15,
    unit: str = "probability",
) -> None:
    """Draws a spectrogram and, below it on the same time axis, what a model says of each window.

    The labels stand in the order of their means, the highest at the top. Each moment has the colour of the window whose middle
    is nearest.

    Args:
      path: PNG file.
      sound: the spectrogram, `[n, bands]`.
      starts: of the windows, seconds `[windows]`, growing.
      ends: `[windows]`.
      scores: `[windows, labels]`; probabilities, or a regression's outputs.
      label_names: `[labels]`.
      title: of which file.
      most: labels that are drawn: those that reach the highest values.
      unit: name of the scores; "probability" has the colours of 0 to 1, others those of their range.
    """
    shown = np.argsort(-scores.max(axis=0), kind="stable")[:most]
    shown = shown[np.argsort(scores[:, shown].mean(axis=0), kind="stable")]
    middles = (starts + ends) / 2
    edges = np.concatenate([starts[:1], (middles[1:] + middles[:-1]) / 2, ends[-1:]])
    height = 0.23 * len(shown) + 0.5
    figure = new_figure(8.4, 3.4 + height)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, height])
    image = _spectrogram(above, sound)
    end = sound.start + len(sound.values) * sound.seconds
    if sound.yticks:
        above.set_yticks(list(sound.yticks), list(sound.yticks.values()))
    above.set_ylabel(sound.ylabel)
    above.set_title(sound.name, fontsize=10, color=INK, loc="left")
    limits = (0.0, 1.0) if unit == "probability" else (float(scores.min()), float(scores.max()))
    mesh = below.pcolormesh(
        edges,
        np.arange(len(shown) + 1) - 0.5,
        scores[:, shown].T,
        cmap="magma",
        vmin=limits[0],
        vmax=limits[1],
        rasterized=True,
    )
    # White lines keep the rows apart without a grid over the times.
    below.hlines(np.arange(len(shown) - 1) + 0.5, 0, edges[-1], color="white", linewidth=1.2)
    below.set_yticks(np.arange(len(shown)), [short(label_names[i]) for i in shown.tolist()])
    below.set_title(
        f"{unit} over {len(starts)} window{'s' if len(starts) != 1 else ''}",
        fontsize=10,
        color=INK,
        loc="left",
    )
    for axes, drawn, name in ((above, image, sound.unit), (below, mesh, unit)):
        bar = figure.colorbar(drawn, ax=axes, pad=0.012, fraction=0.045)
        bar.outline.set_visible(False)
        bar.set_label(name, color=MUTED)
        bar.ax.tick_params(colors="#374151", length=3)
        axes.tick_params(colors="#374151", length=3)
        axes.spines[:].set_visible(False)
    below.tick_params(axis="y", length=0)
    below.set_xlim(0, max(end, edges[-1]))
    minutes = end > 300
    below.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 3, 6, 10] if minutes else [1, 2, 5, 10]))
    if minutes:
        below.xaxis.set_major_formatter(
            lambda value, _: f"{int(value) // 60}:{int(value) % 60:02d}"
        )
    below.set_xlabel("time (min:s)" if minutes else "time (s)")
    save(figure, path, title, palette=True)


def architecture(
    path: str | os.PathLike[str], layers: Sequence[Mapping[str, Any]], title: str
) -> None:
    """Draws a network as boxes from the top to the bottom, folded into columns where it is long.

    A box has the layer's number, name, kind, settings and parameters; its colour goes by the kind. An arrow says the shape that
    it carries, what is done on the way and the shape that arrives where it differs. A box whose input is not the output of
    the box before it has an arrow of its own that begins at the number of the layer it comes from. What
    `musicgenre.models.describe` finds is drawn so.

    Args:
      path: PNG file.
      layers: dicts with `name`, `kind` ("Conv", say; "Input", "Output", "Join" and "Parameters" are drawn plainly), `settings`,
        `input` and `output` (texts), `parameters` (a number) and `sources` (pairs of a layer's index and a text of what is
        done on the way), in the order of their calls.
      title: which network, on which input.
    """
    stacks = _stacks(layers)
    heights = [
        _arrow_height(layers, stack[0]) + sum(_box_height(layers[i]) for i in stack)
        for stack in stacks
    ]
    total = sum(heights)
    # One column while it fits on a page, then such that the picture is a little wider than high.
    columns = 1 if total <= 9 else max(2, round((1.3 * total / _COLUMN) ** 0.5))
    folded: list[list[int]] = [[]]
    used = 0.0
    for number, height in enumerate(heights):
        if folded[-1] and used + height / 2 > total * len(folded) / columns:
            folded.append([])
        folded[-1].append(number)
        used += height
    tall = max(sum(heights[number] for number in column) for column in folded) + 0.35
    wide = _COLUMN * len(folded)
    head = 0.35 + 0.19 * len(_wrapped(title, wide))
    figure = new_figure(wide, tall + head, layout=None)
    axes = figure.add_axes((0, 0, 1, tall / (tall + head)))
    axes.set(xlim=(0, wide), ylim=(tall, 0))
    axes.set_axis_off()
    ends: dict[int, tuple[float, float]] = {}  # where the boxes end
    for place, column in enumerate(folded):
        left, y = place * _COLUMN + _MARGIN, 0.05
        for number in column:
            stack = stacks[number]
            first_in_column = place > 0 and number == column[0]
            y = _draw_arrow(axes, layers, stack[0], left, y, ends if first_in_column else None)
            for i in stack:
                y = _draw_box(axes, i, layers[i], left, y)
            ends[stack[-1]] = (left + _ARROW, y)
    save(figure, path, title)


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
        "brier": "Brier score",
    }
    return names.get(key, key.replace("_", " "))


def _stacks(layers: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Returns the layers that are drawn without a gap: what normalises or drops joins what it is applied to."""
    stacks: list[list[int]] = []
    for i, layer in enumerate(layers):
        direct = i > 0 and [tuple(source) for source in layer["sources"]] == [(i - 1, "")]
        if (
            direct
            and layer["output"] == layers[i - 1]["output"]
            and _group(layer["kind"]) in ("norm", "dropout")
        ):
            stacks[-1].append(i)
        else:
            stacks.append([i])
    return stacks


def _group(kind: str) -> str:
    """Returns what the colour of a layer goes by."""
    words = {
        "norm": "norm",
        "dropout": "dropout",
        "conv": "conv",
        "dense": "dense",
        "einsum": "dense",
        "attention": "attention",
        "gru": "recurrent",
        "lstm": "recurrent",
        "rnn": "recurrent",
        "bidirectional": "recurrent",
    }
    if kind in ("Input", "Output", "Parameters", "Join"):
        return "none"
    return next((group for word, group in words.items() if word in kind.lower()), "other")


def _arrow_lines(layers: Sequence[Mapping[str, Any]], i: int) -> tuple[list[str], bool]:
    """Returns what is written beside the arrow into a layer, and whether it comes from the layer before."""
    if not layers[i]["sources"]:
        return [], False
    if len(layers[i]["sources"]) == 1 and layers[i]["sources"][0][0] == i - 1:
        shape, done = layers[i - 1]["output"], layers[i]["sources"][0][1]
        lines = [shape, *textwrap.wrap(done, 40)]
        return lines + ([layers[i]["input"]] if layers[i]["input"] != shape else []), True
    *texts, last = [
        f"{source}{f' ({done})' if done else ''}" for source, done in layers[i]["sources"]
    ]
    shapes = list(dict.fromkeys(layers[source]["output"] for source, _ in layers[i]["sources"]))
    lines = textwrap.wrap(f"from {', '.join(texts)}{' and ' if texts else ''}{last}", 40)
    if len(shapes) == 1:
        lines.append(shapes[0])
    if shapes != [layers[i]["input"]]:
        lines.append(layers[i]["input"])
    return lines, any(source == i - 1 for source, _ in layers[i]["sources"])


def _arrow_height(layers: Sequence[Mapping[str, Any]], i: int) -> float:
    lines, _ = _arrow_lines(layers, i)
    return 0.1 + _LINE * max(1, len(lines)) if i else 0.0


def _is_strip(layer: Mapping[str, Any]) -> bool:
    """Whether a layer is drawn as one line."""
    return layer["kind"] != "Parameters" and _group(layer["kind"]) in ("norm", "dropout", "none")


def _words(layer: Mapping[str, Any]) -> list[str]:
    """Returns the lines under the name of a layer that is no strip."""
    text = ", ".join(filter(None, (layer["kind"], layer["settings"])))
    # A line ends after a comma: what belongs together has spaces that do not break.
    bound = text.replace(" ", "\xa0").replace(",\xa0", ", ")
    return [line.replace("\xa0", " ") for line in textwrap.wrap(bound, 56)]


def _box_height(layer: Mapping[str, Any]) -> float:
    return 0.25 if _is_strip(layer) else 0.27 + _LINE * len(_words(layer))


def _draw_arrow(
    axes: Axes,
    layers: Sequence[Mapping[str, Any]],
    i: int,
    left: float,
    y: float,
    ends: Mapping[int, tuple[float, float]] | None,
) -> float:
    """Draws the arrow into a layer with its text, and returns where the layer's box begins.

    `ends` has where the boxes end, if the one before is in another column.
    """
    lines, from_before = _arrow_lines(layers, i)
    bottom = y + _arrow_height(layers, i)
    x = left + _ARROW
    if not lines:
        return bottom
    if not from_before:
        # It begins at its text, not at the box above.
        axes.plot([x - 0.08, x + 0.08], [y + 0.05, y + 0.05], color=INK, linewidth=1)
    elif ends:
        column_x, end = ends[i - 1]
        gutter = column_x - _ARROW + (_COLUMN + _BOX) / 2
        way = [
            (column_x, end),
            (column_x, end + 0.12),
            (gutter, end + 0.12),
            (gutter, 0.02),
            (x, 0.02),
            (x, y + 0.05),
        ]
        axes.plot(*zip(*way, strict=True), color=INK, linewidth=1)
    style = {"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (x, bottom), (x, y + (0 if from_before else 0.05)), arrowprops=style)
    for number, line in enumerate(lines):
        axes.text(
            x + 0.16,
            y + 0.05 + _LINE * (number + 0.5),
            line,
            va="center",
            fontsize=7.5,
            color="#374151",
        )
    return bottom


def _draw_box(axes: Axes, i: int, layer: Mapping[str, Any], left: float, y: float) -> float:
    """Draws a layer and returns where its box ends."""
    group, height = _group(layer["kind"]), _box_height(layer)
    axes.add_patch(
        Rectangle(
            (left, y), _BOX, height, facecolor=_FILLS[group], edgecolor="#9ca3af", linewidth=0.8
        )
    )
    if group in _EDGES:
        axes.add_patch(Rectangle((left, y), 0.06, height, facecolor=_EDGES[group], linewidth=0))
    name = _tail(layer["name"], (26 if _is_strip(layer) else 30) - len(str(i)))
    start, end, middle = (
        left + 0.13,
        left + _BOX - 0.07,
        y + (height / 2 if _is_strip(layer) else 0.145),
    )
    if not _is_strip(layer):
        axes.text(
            start, middle, f"{i}  {name}", va="center", fontsize=8.5, color=INK, fontweight="bold"
        )
        for number, line in enumerate(_words(layer)):
            axes.text(
                start, y + 0.31 + _LINE * number, line, va="center", fontsize=7.5, color="#374151"
            )
    elif group == "none":
        # An end of the network, or a place where arrays meet.
        shape = f"   {layer['output']}" if layer["kind"] == "Input" else ""
        axes.text(start, middle, f"{i}  {name}{shape}", va="center", fontsize=8.5, color=INK)
    else:
        axes.text(start, middle, f"{i}  {name}", va="center", fontsize=8, color=INK)
        what = (
            layer["kind"]
            if group == "norm"
            else ", ".join(filter(None, (layer["kind"], layer["settings"])))
        )
        axes.text(left + 1.98, middle, short(what, 20), va="center", fontsize=7, color="#374151")
    if layer["parameters"]:
        axes.text(
            end,
            middle,
            f"{layer['parameters']:,}",
            ha="right",
            va="center",
            fontsize=7.5,
            color=MUTED,
        )
    return y + height


def _tail(name: str, most: int) -> str:
    """Returns a path, without its beginning where it is long."""
    return name if len(name) <= most else "…" + name[1 - most :]


def _envelope(
    values: np.ndarray, seconds: float, start: float, most: int = 4000
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a line, x and y, that looks like `[n]` values but has few points: the extremes of each stretch."""
    if len(values) <= most:
        return start + seconds * np.arange(len(values)), values
    bounds = np.linspace(0, len(values), most // 2 + 1).astype(int)[:-1]
    extremes = np.stack(
        [np.minimum.reduceat(values, bounds), np.maximum.reduceat(values, bounds)], axis=1
    )
    return start + seconds * np.repeat(bounds, 2), extremes.ravel()


def _spectrogram(axes: Axes, panel: TimePanel) -> AxesImage:
    """Draws a panel's `[n, bands]`."""
    low, high = panel.limits or (float(panel.values.min()), float(panel.values.max()))
    end = panel.start + len(panel.values) * panel.seconds
    return axes.imshow(
        panel.values.T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        interpolation="nearest",
        vmin=low,
        vmax=high,
        extent=(panel.start, end, -0.5, panel.values.shape[1] - 0.5),
    )


def short(name: str, most: int = 28) -> str:
    """Returns a name that is cut to the room there is."""
    return name if len(name) <= most else name[: most - 1] + "…"


def _with_counts(label_names: Sequence[str], counts: Sequence[int] | np.ndarray) -> list[str]:
    return [f"{short(name)}  ({count})" for name, count in zip(label_names, counts, strict=True)]


def new_figure(
    width: float, height: float, layout: Literal["constrained", "compressed"] | None = "constrained"
) -> Figure:
    """Returns an empty figure, in inches, that is drawn without a display."""
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes, grid: Literal["both", "x", "y"]) -> None:
    axes.grid(axis=grid, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.tick_params(colors="#374151", length=3)


def _wrapped(title: str, inches: float) -> list[str]:
    return textwrap.wrap(title, int(10.5 * inches))


def save(
    figure: Figure, path: str | os.PathLike[str], title: str, *, palette: bool = False
) -> None:
    """Sets the title and writes the PNG atomically; its bytes depend on the drawing alone.

    With a `palette` the file of a large or noisy picture has a third of the bytes; it has magma's colours, the greys and the
    first four of the curves.
    """
    lines = _wrapped(title, figure.get_figwidth())
    heading = figure.suptitle(
        "\n".join(lines), fontsize=11, fontweight="bold", color=INK, x=0.01, ha="left"
    )
    if figure.get_layout_engine() is None:
        heading.set_y(1 - 0.12 / figure.get_figheight())
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
        if palette:
            with Image.open(temporary) as image:
                few = image.convert("RGB").quantize(palette=_palette(), dither=Image.Dither.NONE)
            few.save(temporary, format="png", optimize=True)


@functools.cache
def _palette() -> Image.Image:
    """Returns an image with a palette of 256 colours."""
    shades = [np.linspace(1, to_rgb(colour), 9)[1:] for colour in (BLUE, ORANGE, GREEN, PURPLE)]
    greys = np.repeat(np.linspace(0, 1, 24)[:, None], 3, axis=1)
    colours = np.concatenate([colormaps["magma"](np.linspace(0, 1, 200))[:, :3], greys, *shades])
    image = Image.new("P", (1, 1))
    image.putpalette(np.round(255 * colours).astype(np.uint8).tobytes())
    return image
