"""Figures of reports as PNG files, by matplotlib and scikit-learn's displays; no screen is needed.

Each function returns a figure, which `save` gives a title and writes. `new_figure`, `style_axes`,
`colour_bar`, `time_axis` and `save` give all figures of the package one look.
"""

import dataclasses
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import ConfusionMatrixDisplay, RocCurveDisplay

from musicgenre.evaluation.render import measure_name
from musicgenre.files import replacing

PathLike = str | os.PathLike[str]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"
INK, MUTED, TICKS, _GRID, _LINE = "#222222", "#6b7280", "#374151", "#e5e7eb", "#9ca3af"
# Ten curves of one picture: colours, alternating solid and dashed.
_CURVES = cycler(
    color=[BLUE, ORANGE, GREEN, PURPLE, RED, "#56B4E9", "#8C6D00", "#444444", "#8DA0B3", "#7A3E9D"],
    linestyle=["-", (0, (5, 1))] * 5,
)
_DASHED: dict[str, Any] = {"linewidth": 1, "linestyle": (0, (4, 3))}
_DPI = 130
# With more classes, the numbers in the cells of a confusion matrix are too small to read; with more
# labels, so are the numbers above the bars.
_MOST_CLASSES_WITH_NUMBERS, _MOST_BARS_WITH_NUMBERS = 25, 60


def confusion_matrix(confusion: Sequence[Sequence[int]], label_names: Sequence[str]) -> Figure:
    """Draws how often clips of each class (rows) are predicted as each class (columns).

    The colour is the fraction of the row. For up to 25 classes, cells show it above the count.

    Args:
      confusion: counts, rows are the truth, `[classes, classes]`.
      label_names: `[classes]`.
    """
    counts, classes = np.asarray(confusion), len(label_names)
    rows = counts.sum(axis=1, keepdims=True)
    fraction = counts / np.maximum(rows, 1)
    few = classes <= _MOST_CLASSES_WITH_NUMBERS
    side = float(np.clip(0.62 * classes, 3.2, 11.5)) + 1.8
    figure = new_figure(side + 0.9, side, layout="compressed")
    axes = figure.subplots()
    shown = ConfusionMatrixDisplay(fraction, display_labels=[short(name) for name in label_names])
    shown.plot(
        ax=axes,
        cmap="Blues",
        include_values=few,
        colorbar=False,
        im_kw={"vmin": 0, "vmax": 1},
        text_kw={"fontsize": 9 if classes <= 14 else 6.5},
        xticks_rotation="vertical",
    )
    for cell, text in np.ndenumerate(shown.text_) if few else ():
        percent = f"{100 * fraction[cell]:.0f} %\n{counts[cell]}"
        text.set_text(percent if counts[cell] else "")
    axes.set_yticks(range(classes), _with_counts(label_names, rows[:, 0]))
    axes.tick_params(labelsize=9 if few else 6.5, length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted", ylabel="truth (clips)")
    bar = colour_bar(
        figure, axes, shown.im_, "fraction of the true class", fraction=0.046, pad=0.03
    )
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0 %", "25 %", "50 %", "75 %", "100 %"])
    return figure


def per_class_bars(metrics: Mapping[str, Any]) -> Figure:
    """Draws two measures of each class, tag or output as bars, in label order from the top.

    Args:
      metrics: from `musicgenre.evaluation.metrics`; its means are the dashed lines.
    """
    rows = metrics["per_class"]
    panels = {"f1": "macro_f1", "roc_auc": "macro_roc_auc"}
    if "r2" in metrics:
        panels = {"r2": "r2", "correlation": "correlation"}
    elif "tags" in metrics:
        panels = {"roc_auc": "macro_roc_auc", "pr_auc": "macro_pr_auc"}
    figure = new_figure(10.0, 1.5 + 0.27 * max(len(rows), 4))
    positions = np.arange(len(rows))
    drawn = figure.subplots(1, len(panels), sharey=True)
    for axes, (key, mean), colour in zip(drawn, panels.items(), (BLUE, GREEN), strict=True):
        axes.barh(positions, [row[key] or 0 for row in rows], color=colour, height=0.68)
        for position, row in zip(positions, rows, strict=True):
            text = "n/a" if row[key] is None else f"{row[key]:.2f}"
            axes.text(1.13, position, text, ha="right", va="center", fontsize=8.5, color=MUTED)
        if metrics[mean] is not None:
            axes.axvline(metrics[mean], color=INK, **_DASHED)
            heading = f"{measure_name(mean)} {metrics[mean]:.3f}"
            axes.set_title(heading, fontsize=10, color=INK)
        axes.set(xlim=(0, 1.14), xticks=[0, 0.25, 0.5, 0.75, 1], ylim=(len(rows) - 0.4, -0.6))
        style_axes(axes, "x")
    names = _with_counts([row["label"] for row in rows], [row["support"] for row in rows])
    drawn[0].set_yticks(positions, names, fontsize=9)
    drawn[0].set_ylabel("label (clips)")
    return figure


def reliability_diagram(
    bins: Sequence[Mapping[str, Any]],
    ece: float,
    observed: str = "accuracy",
    counted: str = "clips",
) -> Figure:
    """Draws observed frequency against mean probability in bins, and the number of clips in each.

    Args:
      bins: `reliability` of the metrics.
      ece: expected calibration error.
      observed: what is compared with the probability, such as "accuracy".
      counted: what the bins hold.
    """
    figure = new_figure(5.8, 5.8)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    full = [row for row in bins if row["n"]]
    truth, mean = (np.array([row[key] for row in full]) for key in ("accuracy", "confidence"))
    CalibrationDisplay(truth, mean, None, estimator_name=observed).plot(ax=top, color=BLUE)
    top.vlines(mean, truth, mean, color=RED, linewidth=1.6, label="gap to the mean probability")
    top.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="", ylabel=observed)
    heading = f"expected calibration error {100 * ece:.1f} %"
    _legend(top, loc="upper left", title=heading, title_fontsize=9.5, alignment="left")
    width = bins[0]["high"] - bins[0]["low"]
    counts = [row["n"] for row in bins]
    below.bar([row["low"] for row in bins], counts, 0.92 * width, align="edge", color=MUTED)
    below.set(xlabel="probability", ylabel=counted)
    if max(counts) > 100 * max(1, min(row["n"] for row in full)):
        below.set_yscale("log")
    style_axes(top)
    style_axes(below, "y")
    return figure


def coverage_curve(abstention: Mapping[str, Any]) -> Figure:
    """Draws the accuracy on the most confident clips against the fraction that they are of all.

    Args:
      abstention: from `musicgenre.evaluation.calibration.risk_coverage`.
    """
    figure = new_figure(5.8, 4.8)
    axes = figure.subplots()
    coverage, accuracy = abstention["curve"]["coverage"], abstention["curve"]["accuracy"]
    name = f"by confidence (AURC {abstention['aurc']:.3f})"
    axes.plot(coverage, accuracy, color=BLUE, linewidth=1.8, label=name)
    name = f"all clips: {100 * accuracy[-1]:.1f} %"
    axes.plot([0, 1], [accuracy[-1]] * 2, color=MUTED, label=name, **_DASHED)
    rows = abstention["at"]
    at = [row["coverage"] for row in rows]
    low, high = np.array([row["wilson"] for row in rows]).T
    axes.vlines(at, low, high, color=RED, linewidth=1.6, label="95 % Wilson interval")
    axes.plot(at, [row["accuracy"] for row in rows], "o", color=RED, markeredgecolor="white")
    for row in rows:
        axes.annotate(
            f"{100 * row['accuracy']:.1f} %",
            (row["coverage"], row["wilson"][0]),
            (0, -4),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8.5,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    # Room for the legend below everything that is drawn.
    bottom = max(np.floor(10 * min(*accuracy, *low) - 2) / 10, -0.2)
    axes.set(xlim=(0, 1.01), ylim=(bottom, 1.02))
    axes.set_yticks([tick for tick in np.linspace(0, 1, 11) if tick >= bottom - 1e-9])
    axes.set(xlabel="coverage (fraction of clips not abstained on)", ylabel="accuracy on these")
    _legend(axes, loc="lower left")
    style_axes(axes)
    return figure


def learning_curves(
    rows: Sequence[Mapping[str, Any]],
    *,
    metric: str = "accuracy",
    evaluated_step: int | None = None,
) -> Figure:
    """Draws loss and a metric over steps, of training and validation, and marks the evaluated step.

    Args:
      rows: of `metrics.jsonl`: `step` with any of `train_loss`, `valid_loss`, `train_<metric>` and
        `valid_<metric>`.
      metric: the metric of the second panel.
      evaluated_step: the checkpoint's step.
    """
    figure = new_figure(9.6, 3.9)
    panels = figure.subplots(1, 2)
    curves = {"train": ("training", ORANGE, ""), "valid": ("validation", BLUE, "o")}
    for axes, name in zip(panels, ("loss", metric), strict=True):
        for key, (label, colour, marker) in curves.items():
            key = f"{key}_{name}"
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                look = {"color": colour, "marker": marker, "markersize": 3, "linewidth": 1.4}
                axes.plot(*zip(*points, strict=True), label=label, **look)
        if not axes.lines:
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=MUTED)
        if evaluated_step is not None:
            label = f"evaluated: step {evaluated_step}"
            axes.axvline(evaluated_step, color=RED, label=label, **_DASHED)
        axes.set_title(measure_name(name), fontsize=10, color=INK)
        axes.set_xlabel("step")
        style_axes(axes)
        axes.margins(x=0.02)
    panels[0].set_ylim(bottom=0)
    if panels[0].lines:
        _legend(panels[0])
    return figure


def roc_curves(scores: np.ndarray, targets: np.ndarray, label_names: Sequence[str]) -> Figure:
    """Draws the ROC curve of each label against the rest, for up to ten labels.

    Args:
      scores: `[clips, labels]`.
      targets: 0 or 1, `[clips, labels]`; a label without positives or negatives is left out.
      label_names: `[labels]`.
    """
    figure = new_figure(5.8, 5.8)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=MUTED, **_DASHED)
    for column, (name, look) in enumerate(zip(label_names, _CURVES, strict=False)):
        truth = targets[:, column]
        if 0 < truth.sum() < len(truth):
            shown = RocCurveDisplay.from_predictions(truth, scores[:, column], ax=axes)
            shown.line_.set(**look, label=f"{shown.roc_auc:.2f}  {short(name)}")
    axes.set(xlim=(-0.01, 1), ylim=(0, 1.01), aspect="equal")
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    if len(axes.lines) > 1:
        _legend(axes, loc="lower right", title="area, label", alignment="left")
    style_axes(axes)
    return figure


def comparison_plot(
    rows: Sequence[Mapping[str, Any]],
    measure: str,
    *,
    percent: bool = False,
    each: str = "one seed",
) -> Figure:
    """Draws a row for each run or variant, from the top: interval, mean, and below them its values.

    Args:
      rows: dicts with `name`, `mean`, `interval` ((low, high) or None) and `values` (may be empty);
        with `leaks` (clips by type of leak, up to three types) and `clips` (held-out clips), their
        fractions are drawn to the right.
      measure: name of the number.
      percent: show the numbers in percent.
      each: what one of the values is.
    """
    factor, digits = (100, 1) if percent else (1, 3)
    leaks = list(rows[0].get("leaks", ()))
    figure = new_figure(10.5 if leaks else 8.6, 1.9 + (0.62 if leaks else 0.42) * max(len(rows), 2))
    axes, *more = figure.subplots(1, 2 if leaks else 1, sharey=True, squeeze=False)[0]
    positions = np.arange(len(rows))
    limits = factor * np.array([row["interval"] or (np.nan, np.nan) for row in rows], float)
    values = [factor * np.asarray(row["values"], float) for row in rows]
    # Equal values would hide each other, so they are spread a little.
    spread = [np.linspace(-0.07, 0.07, len(own)) if len(own) > 1 else 0 * own for own in values]
    dots = [y + 0.26 + own for y, own in zip(positions, spread, strict=True)]
    if any(map(len, values)):
        look = {"color": BLUE, "alpha": 0.7, "markersize": 4.5, "markeredgewidth": 0}
        axes.plot(np.concatenate(values), np.concatenate(dots), "o", label=each, **look)
    if np.isfinite(limits).any():
        axes.hlines(positions, *limits.T, color=RED, linewidth=2, label="95 % interval")
    means = factor * np.array([row["mean"] for row in rows])
    axes.plot(means, positions, "D", color=RED, markeredgecolor="white", label="value or mean")
    for y, mean in zip(positions, means, strict=True):
        look = {"va": "center", "fontsize": 9, "color": INK}
        axes.annotate(f"{mean:.{digits}f}", (1.01, y), xycoords=("axes fraction", "data"), **look)
    axes.set_yticks(positions, [short(row["name"], 44) for row in rows], fontsize=9)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=f"{measure} (%)" if percent else measure)
    axes.margins(x=0.08)
    style_axes(axes, "x")
    for number, leak in enumerate(leaks):
        counts = [100 * row["leaks"][leak] / row["clips"] for row in rows]
        look = {"color": (PURPLE, ORANGE, BLUE)[number], "label": f"{leak} in training"}
        bars = more[0].barh(positions + 0.26 * (number - 1), counts, 0.22, **look)
        more[0].bar_label(bars, fmt=" {:.0f}", fontsize=7.5, color=INK)
        more[0].set(xlabel="held-out clips (%)", xlim=(0, 112))
        style_axes(more[0], "x")
    figure.legend(frameon=False, fontsize=8.5, ncols=3, loc="outside lower center")
    return figure


def label_distribution(
    label_names: Sequence[str],
    counts: Mapping[str, Sequence[int]],
    *,
    by_count: bool = True,
    most: int = 0,
    marked: int = 0,
) -> Figure:
    """Draws how many clips have each label: one bar per label, the splits on top of each other.

    Args:
      label_names: `[labels]`.
      counts: clips with each label, `[labels]`, by split; one entry, "clips" say, without splits.
      by_count: the most frequent first; otherwise in the order given.
      most: draw only the first so many labels; 0 draws all.
      marked: the first so many keep their colour, the others are grey; 0 marks none. For one split.
    """
    table = np.array([list(values) for values in counts.values()], int)
    table = table.reshape(len(counts), len(label_names))
    order = np.argsort(-table.sum(axis=0), kind="stable") if by_count else np.arange(table.shape[1])
    order = order[: most or None]
    table, names = table[:, order], [short(label_names[i]) for i in order]
    n, few = len(names), len(names) <= 12
    # Font size and inches per label: rotated, it takes the height of a line.
    size, room = (9.0, 0.36) if n <= 30 else (8.0, 0.168) if n <= 80 else (7.0, 0.115)
    figure = new_figure(max(6.5, 1.6 + n * room), 5.2)
    axes = figure.subplots()
    below = np.cumsum(table, axis=0) - table
    for split, row, bottom, colour in zip(
        counts, table, below, (BLUE, ORANGE, GREEN), strict=False
    ):
        colours = [_LINE if 0 < marked <= i else colour for i in range(n)]
        bars = axes.bar(range(n), row, bottom=bottom, width=0.78, color=colours, label=split)
    handles, words = axes.get_legend_handles_labels()
    if 0 < marked < n:
        handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in (BLUE, _LINE)]
        words = [f"the {marked} most frequent", f"the other {n - marked}"]
    if len(handles) > 1:
        above = {"bbox_to_anchor": (0, 1.0), "ncols": len(words)}
        axes.legend(handles, words, frameon=False, fontsize=9, loc="lower left", **above)
    if n <= _MOST_BARS_WITH_NUMBERS:
        look: dict[str, Any] = {"fontsize": 8.5 if few else 7, "rotation": 0 if few else 90}
        look |= {"color": MUTED, "padding": 3}
        axes.bar_label(bars, [f"{total:,}" for total in table.sum(axis=0)], **look)
    slanted: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(n), names, fontsize=size, **(slanted if few else {"rotation": 90}))
    highest = max(1, int(table.sum(axis=0).max()))
    axes.set(xlim=(-0.7, n - 0.3), ylim=(0, 1.12 * highest), ylabel="clips")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    style_axes(axes, "y")
    axes.tick_params(axis="x", length=0)
    return figure


@dataclasses.dataclass(frozen=True, eq=False)
class TimePanel:
    """Something over time that `time_panels` draws.

    Attributes:
      values: `[n]`, drawn as a line, or `[n, bands]`, an image with the first band at the bottom.
      seconds: from one value or frame to the next.
      start: where the first begins, in seconds; a frame centred on 0 begins half a hop before it.
      name: what it is.
      ylabel: name of the vertical axis.
      yticks: labels by position, in bands (the first band's centre is 0); if empty, automatic.
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

    @property
    def end(self) -> float:
        """Returns where the last value ends, in seconds."""
        return self.start + len(self.values) * self.seconds

    def draw(self, axes: Axes) -> AxesImage | None:
        """Draws the values with the names of the axes; returns the image, or None for a line."""
        image = None
        if self.values.ndim == 1:
            axes.plot(*_envelope(self.values, self.seconds, self.start), color=BLUE, linewidth=0.6)
            style_axes(axes)
        else:
            low, high = self.limits or (float(self.values.min()), float(self.values.max()))
            extent = (self.start, self.end, -0.5, self.values.shape[1] - 0.5)
            look: dict[str, Any] = {"cmap": "magma", "vmin": low, "vmax": high, "extent": extent}
            look |= {"origin": "lower", "aspect": "auto", "interpolation": "nearest"}
            image = axes.imshow(self.values.T, **look)
            axes.tick_params(colors=TICKS, length=3)
            axes.spines[:].set_visible(False)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if self.yticks:
            axes.set_yticks(list(self.yticks), list(self.yticks.values()))
        axes.set_ylabel(self.ylabel)
        axes.set_title(self.name, fontsize=10, color=INK, loc="left")
        return image


def time_panels(panels: Sequence[TimePanel]) -> Figure:
    """Draws panels below each other over one time axis, such as a waveform and its spectrogram.

    Args:
      panels: from the top.
    """
    heights = [1.0 if panel.values.ndim == 1 else 2.6 for panel in panels]
    figure = new_figure(8.4, 1.1 + 1.1 * sum(heights))
    column = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[
        :, 0
    ]
    for axes, panel in zip(column, panels, strict=True):
        if (image := panel.draw(axes)) is not None:
            low, high = image.get_clim()
            beyond = panel.values.min() < low, panel.values.max() > high
            extend = {(False, False): "neither", (True, False): "min", (False, True): "max"}
            colour_bar(figure, axes, image, panel.unit, extend=extend.get(beyond, "both"))
        axes.set_xlim(max(panel.start, 0), panel.end)
    time_axis(column[-1], max(panel.end for panel in panels))
    return figure


def taggram(
    sound: TimePanel,
    starts: np.ndarray,
    ends: np.ndarray,
    scores: np.ndarray,
    label_names: Sequence[str],
    *,
    most: int = 15,
    unit: str = "probability",
) -> Figure:
    """Draws a spectrogram and, below it, the model's predictions for each window over time.

    Labels are in the order of their means, the highest at the top. Each moment has the colour of
    the window whose middle is nearest.

    Args:
      sound: the spectrogram, `[n, bands]`.
      starts: of the windows, seconds `[windows]`, growing.
      ends: `[windows]`.
      scores: `[windows, labels]`; probabilities, or a regression's outputs.
      label_names: `[labels]`.
      most: labels that are drawn: those that reach the highest values.
      unit: name of the scores; the colours of "probability" are those of 0 to 1, else their range.
    """
    shown = np.argsort(-scores.max(axis=0), kind="stable")[:most]
    shown = shown[np.argsort(scores[:, shown].mean(axis=0), kind="stable")]
    middles = (starts + ends) / 2
    edges = np.concatenate([starts[:1], (middles[1:] + middles[:-1]) / 2, ends[-1:]])
    height = 0.23 * len(shown) + 0.5
    figure = new_figure(8.4, 3.4 + height)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, height])
    if (image := sound.draw(above)) is not None:
        colour_bar(figure, above, image, sound.unit)
    limits = (0.0, 1.0) if unit == "probability" else (float(scores.min()), float(scores.max()))
    rows = np.arange(len(shown) + 1) - 0.5
    look: dict[str, Any] = {"cmap": "magma", "vmin": limits[0], "vmax": limits[1]}
    mesh = below.pcolormesh(edges, rows, scores[:, shown].T, rasterized=True, **look)
    colour_bar(figure, below, mesh, unit)
    # White lines separate the rows without a grid over the times.
    below.hlines(rows[1:-1], 0, edges[-1], color="white", linewidth=1.2)
    below.set_yticks(np.arange(len(shown)), [short(label_names[i]) for i in shown.tolist()])
    name = f"{unit} over {len(starts)} window{'s' if len(starts) != 1 else ''}"
    below.set_title(name, fontsize=10, color=INK, loc="left")
    below.tick_params(colors=TICKS, length=3)
    below.tick_params(axis="y", length=0)
    below.spines[:].set_visible(False)
    below.set_xlim(0, max(sound.end, edges[-1]))
    time_axis(below, sound.end)
    return figure


def short(name: str, most: int = 28) -> str:
    """Returns a name, cut to the available length."""
    return name if len(name) <= most else name[: most - 1] + "…"


def new_figure(
    width: float, height: float, layout: Literal["constrained", "compressed"] | None = "constrained"
) -> Figure:
    """Returns an empty figure, in inches, that needs no screen."""
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """Gives axes the look of all figures: a light grid, two spines, grey ticks."""
    axes.grid(axis=grid, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.tick_params(colors=TICKS, length=3)


def colour_bar(
    figure: Figure, axes: Axes, image: ScalarMappable, name: str, **options: Any
) -> Colorbar:
    """Draws the colour bar of an image; `options` are those of `Figure.colorbar`."""
    bar = figure.colorbar(image, ax=axes, **{"pad": 0.012, "fraction": 0.045} | options)
    bar.outline.set_visible(False)
    bar.set_label(name, color=MUTED)
    bar.ax.tick_params(colors=TICKS, length=3)
    return bar


def time_axis(axes: Axes, end: float) -> None:
    """Labels the horizontal axis of `end` seconds: in seconds up to five minutes, else in min:s."""
    minutes = end > 300
    if minutes:
        axes.xaxis.set_major_formatter(lambda value, _: f"{int(value) // 60}:{int(value) % 60:02d}")
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 3, 6, 10] if minutes else [1, 2, 5, 10]))
    axes.set_xlabel("time (min:s)" if minutes else "time (s)")


def save(figure: Figure, path: PathLike, title: str, *, palette: bool = False) -> None:
    """Sets the title and writes the PNG atomically; its bytes depend on the drawing alone.

    With `palette`, 256 colours are kept, so that the file of a noisy picture is much smaller.
    """
    lines = wrapped_title(title, figure.get_figwidth())
    look: dict[str, Any] = {"fontsize": 11, "fontweight": "bold", "color": INK}
    heading = figure.suptitle("\n".join(lines), x=0.01, ha="left", **look)
    if figure.get_layout_engine() is None:
        heading.set_y(1 - 0.12 / figure.get_figheight())
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
        if palette:
            with Image.open(temporary) as image:
                few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
            few.save(temporary, format="png", optimize=True)


def wrapped_title(title: str, inches: float) -> list[str]:
    """Returns the lines of a title that fit a figure of this width."""
    return textwrap.wrap(title, int(10.5 * inches))


def _legend(axes: Axes, **options: Any) -> None:
    axes.legend(edgecolor="none", framealpha=0.9, fontsize=8.5, **options)


def _with_counts(label_names: Sequence[str], counts: Sequence[int] | np.ndarray) -> list[str]:
    return [f"{short(name)}  ({count})" for name, count in zip(label_names, counts, strict=True)]


def _envelope(
    values: np.ndarray, seconds: float, start: float, most: int = 4000
) -> tuple[np.ndarray, np.ndarray]:
    """Returns x and y of a line of few points that looks like `[n]` values: local extremes."""
    if len(values) <= most:
        return start + seconds * np.arange(len(values)), values
    bounds = np.linspace(0, len(values), most // 2 + 1).astype(int)[:-1]
    extremes = [np.minimum.reduceat(values, bounds), np.maximum.reduceat(values, bounds)]
    return start + seconds * np.repeat(bounds, 2), np.stack(extremes, axis=1).ravel()
