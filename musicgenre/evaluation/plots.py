"""Figures of reports as PNG files, by matplotlib and scikit-learn's displays; no screen is needed.

Each function returns a figure, which `save` gives a title and writes. `new_figure`, `style_axes`,
`colour_bar` and `save` give all figures of the package one look.
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
from matplotlib.ticker import MaxNLocator, PercentFormatter
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
_HEADING: dict[str, Any] = {"fontsize": 10, "color": INK}
_DPI = 130
_TAGGRAM_COLUMNS = 2000
# Numbers in more cells of a confusion matrix, or above more bars, are too small to read.
_MOST_CLASSES_WITH_NUMBERS, _MOST_BARS_WITH_NUMBERS = 25, 60


def confusion_matrix(confusion: Sequence[Sequence[int]], label_names: Sequence[str]) -> Figure:
    """Draws how often clips of each class (rows) are predicted as each class (columns).

    The colour is the fraction of the row. For up to 25 classes, cells show it above the count, the
    entry of `confusion` `[classes, classes]`.
    """
    counts, classes = np.asarray(confusion), len(label_names)
    rows = counts.sum(axis=1)
    fraction = counts / np.maximum(rows, 1)[:, None]
    few = classes <= _MOST_CLASSES_WITH_NUMBERS
    side = float(np.clip(0.62 * classes, 3.2, 11.5)) + 1.8
    figure = new_figure(side + 0.9, side, layout="compressed")
    axes = figure.subplots()
    shown = ConfusionMatrixDisplay(fraction, display_labels=[short(name) for name in label_names])
    look: dict[str, Any] = {"cmap": "Blues", "im_kw": {"vmin": 0, "vmax": 1}, "colorbar": False}
    look |= {"xticks_rotation": "vertical", "text_kw": {"fontsize": 9 if classes <= 14 else 6.5}}
    shown.plot(ax=axes, include_values=few, **look)
    for cell, text in np.ndenumerate(shown.text_) if few else ():
        percent = f"{100 * fraction[cell]:.0f} %\n{counts[cell]}"
        text.set(text=percent if counts[cell] else "", color="w" if fraction[cell] > 0.5 else INK)
    axes.set_yticks(range(classes), _with_counts(label_names, rows))
    axes.tick_params(labelsize=9 if few else 6.5, length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted", ylabel="truth (clips)")
    look = {"fraction": 0.046, "pad": 0.03, "format": PercentFormatter(1, symbol=" %")}
    colour_bar(figure, axes, shown.im_, "fraction of the true class", **look)
    return figure


def per_class_bars(metrics: Mapping[str, Any]) -> Figure:
    """Draws two measures of each class, tag or output as bars, and their means as dashed lines."""
    rows = metrics["per_class"]
    panels = {"f1": "macro_f1", "roc_auc": "macro_roc_auc"}
    if "r2" in metrics:
        panels = {"r2": "r2", "correlation": "correlation"}
    elif "tags" in metrics:
        panels = {"roc_auc": "macro_roc_auc", "pr_auc": "macro_pr_auc"}
    height = 1.5 + 0.27 * max(len(rows), 4)
    figure, drawn = _subplots(10.0, height, 1, 2, grid="x", sharey=True)
    look: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 8.5, "color": MUTED}
    for axes, (key, mean), colour in zip(drawn, panels.items(), (BLUE, GREEN), strict=True):
        axes.barh(range(len(rows)), [row[key] or 0 for row in rows], 0.68, color=colour)
        for position, row in enumerate(rows):
            axes.text(1.13, position, "n/a" if row[key] is None else f"{row[key]:.2f}", **look)
        if metrics[mean] is not None:
            axes.axvline(metrics[mean], color=INK, **_DASHED)
            axes.set_title(f"{measure_name(mean)} {metrics[mean]:.3f}", **_HEADING)
        axes.set(xlim=(0, 1.14), xticks=[0, 0.25, 0.5, 0.75, 1], ylim=(len(rows) - 0.4, -0.6))
    names = _with_counts([row["label"] for row in rows], [row["support"] for row in rows])
    drawn[0].set_yticks(range(len(rows)), names, fontsize=9)
    drawn[0].set_ylabel("label (clips)")
    return figure


def reliability_diagram(
    bins: Sequence[Mapping[str, Any]], ece: float, observed: str, counted: str
) -> Figure:
    """Draws what is observed ("accuracy") against mean probability, and what is counted ("clips").

    `bins` and `ece` are `reliability` and the expected calibration error of the metrics.
    """
    figure, (top, below) = _subplots(5.8, 5.8, 2, sharex=True, height_ratios=[3.2, 1])
    full = [row for row in bins if row["n"]]
    truth, mean = (np.array([row[key] for row in full]) for key in ("accuracy", "confidence"))
    CalibrationDisplay(truth, mean, None, estimator_name=observed).plot(ax=top, color=BLUE)
    top.vlines(mean, truth, mean, color=RED, linewidth=1.6, label="gap to the mean probability")
    top.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="", ylabel=observed)
    heading = f"expected calibration error {100 * ece:.1f} %"
    _legend(top, loc="upper left", title=heading, title_fontsize=9.5, alignment="left")
    lows, counts = [row["low"] for row in bins], [row["n"] for row in bins]
    below.bar(lows, counts, 0.92 / len(bins), align="edge", color=MUTED)
    below.set(xlabel="probability", ylabel=counted)
    below.grid(False, axis="x")
    if max(counts) > 100 * min(row["n"] for row in full):
        below.set_yscale("log")
    return figure


def coverage_curve(abstention: Mapping[str, Any]) -> Figure:
    """Draws accuracy against coverage, from `musicgenre.evaluation.calibration.risk_coverage`."""
    figure, axes = _subplots(5.8, 4.8)
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
    look: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 8.5, "color": INK}
    look["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for row, bottom in zip(rows, low, strict=True):
        text, point = f"{100 * row['accuracy']:.1f} %", (row["coverage"], bottom)
        axes.annotate(text, point, (0, -4), textcoords="offset points", **look)
    # Room for the legend below everything that is drawn.
    bottom = max(np.floor(10 * min(*accuracy, *low) - 2) / 10, -0.2)
    axes.set(xlim=(0, 1.01), ylim=(bottom, 1.02), yticks=np.arange(max(bottom, 0), 1.05, 0.1))
    axes.set(xlabel="coverage (fraction of clips not abstained on)", ylabel="accuracy on these")
    _legend(axes, loc="lower left")
    return figure


def learning_curves(
    rows: Sequence[Mapping[str, Any]], metric: str, evaluated_step: int | None
) -> Figure:
    """Draws the loss and a metric of training and validation, from the rows of `metrics.jsonl`.

    The line at `evaluated_step` marks the checkpoint.
    """
    figure, panels = _subplots(9.6, 3.9, 1, 2)
    curves = {"train": ("training", ORANGE, ""), "valid": ("validation", BLUE, "o")}
    for axes, name in zip(panels, ("loss", metric), strict=True):
        for split, (label, colour, marker) in curves.items():
            key = f"{split}_{name}"
            if points := [(row["step"], row[key]) for row in rows if row.get(key) is not None]:
                look = {"color": colour, "marker": marker, "markersize": 3, "linewidth": 1.4}
                axes.plot(*zip(*points, strict=True), label=label, **look)
        if not axes.lines:
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=MUTED)
        if evaluated_step is not None:
            label = f"evaluated: step {evaluated_step}"
            axes.axvline(evaluated_step, color=RED, label=label, **_DASHED)
        axes.set_title(measure_name(name), **_HEADING)
        axes.set_xlabel("step")
        axes.margins(x=0.02)
    panels[0].set_ylim(bottom=0)
    if panels[0].lines:
        _legend(panels[0])
    return figure


def roc_curves(scores: np.ndarray, targets: np.ndarray, label_names: Sequence[str]) -> Figure:
    """Draws the ROC curve of each label against the rest, for up to ten labels.

    Scores and targets (0 or 1) are `[clips, labels]`; labels without positives or negatives are
    left out.
    """
    figure, axes = _subplots(5.8, 5.8)
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
    return figure


def comparison_plot(
    rows: Sequence[Mapping[str, Any]], measure: str, *, percent: bool, each: str = "one seed"
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
    columns, width, height = (2, 10.5, 0.62) if leaks else (1, 8.6, 0.42)
    height = 1.9 + height * max(len(rows), 2)
    figure, drawn = _subplots(width, height, 1, columns, grid="x", sharey=True, squeeze=False)
    axes, right = drawn[0][0], drawn[0][-1]
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
    look = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 9, "color": INK}
    for y, mean in enumerate(means):
        axes.annotate(f"{mean:.{digits}f}", (1.01, y), **look)
    axes.set_yticks(positions, [short(row["name"], 44) for row in rows], fontsize=9)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=f"{measure} (%)" if percent else measure)
    axes.margins(x=0.08)
    for number, leak in enumerate(leaks):
        counts = [100 * row["leaks"][leak] / row["clips"] for row in rows]
        look = {"color": (PURPLE, ORANGE, BLUE)[number], "label": f"{leak} in training"}
        bars = right.barh(positions + 0.26 * (number - 1), counts, 0.22, **look)
        right.bar_label(bars, fmt=" {:.0f}", fontsize=7.5, color=INK)
        right.set(xlabel="held-out clips (%)", xlim=(0, 112))
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
      most: how many labels are drawn, from the first; 0 draws all.
      marked: how many labels keep their colour, while the others are grey; 0 marks none.
    """
    table = np.array([list(values) for values in counts.values()], int)
    order = np.argsort(-table.sum(axis=0) * by_count, kind="stable")[: most or None]
    table, names = table[:, order], [short(label_names[i]) for i in order]
    totals, n, few = table.sum(axis=0), len(names), len(names) <= 12
    # Font size and inches per label: rotated, it takes the height of a line.
    size, room = (9.0, 0.36) if n <= 30 else (8.0, 0.168) if n <= 80 else (7.0, 0.115)
    figure, axes = _subplots(max(6.5, 1.6 + n * room), 5.2, grid="y")
    bottom = np.zeros(n, int)
    for split, row, colour in zip(counts, table, (BLUE, ORANGE, GREEN), strict=False):
        colours = [_LINE if 0 < marked <= i else colour for i in range(n)]
        bars = axes.bar(range(n), row, bottom=bottom, width=0.78, color=colours, label=split)
        bottom = bottom + row
    handles, words = axes.get_legend_handles_labels()
    if 0 < marked < n:
        handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in (BLUE, _LINE)]
        words = [f"the {marked} most frequent", f"the other {n - marked}"]
    if len(handles) > 1:
        above = {"bbox_to_anchor": (0, 1.0), "ncols": len(words)}
        axes.legend(handles, words, frameon=False, fontsize=9, loc="lower left", **above)
    if n <= _MOST_BARS_WITH_NUMBERS:
        look: dict[str, Any] = {"fontsize": 8.5 if few else 7, "rotation": 0 if few else 90}
        axes.bar_label(bars, [f"{total:,}" for total in totals], color=MUTED, padding=3, **look)
    slanted: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(n), names, fontsize=size, **(slanted if few else {"rotation": 90}))
    axes.set(xlim=(-0.7, n - 0.3), ylim=(0, 1.12 * max(1, *totals)), ylabel="clips")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
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
      height: of an image, relative to the panel of a line.
    """

    values: np.ndarray
    seconds: float
    start: float = 0.0
    name: str = ""
    ylabel: str = ""
    yticks: Mapping[float, str] = dataclasses.field(default_factory=dict)
    unit: str = ""
    limits: tuple[float, float] | None = None
    height: float = 2.6

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
            low, high = self.limits or (None, None)
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
        axes.set_title(self.name, loc="left", **_HEADING)
        return image


def time_panels(panels: Sequence[TimePanel]) -> Figure:
    """Draws panels below each other over one time axis, such as a waveform and its spectrogram."""
    heights = [1.0 if panel.values.ndim == 1 else panel.height for panel in panels]
    figure = new_figure(8.4, 1.1 + 1.1 * sum(heights))
    rows = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(rows, panels, strict=True):
        if (image := panel.draw(axes)) is not None:
            low, high = image.get_clim()
            beyond = panel.values.min() < low, panel.values.max() > high
            extend = {(False, False): "neither", (True, False): "min", (False, True): "max"}
            colour_bar(figure, axes, image, panel.unit, extend=extend.get(beyond, "both"))
        axes.set_xlim(max(panel.start, 0), panel.end)
    time_axis(rows[-1], max(panel.end for panel in panels))
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

    Each moment has the colour of the window whose middle is nearest. The labels with the highest
    values are drawn, in the order of their means.

    Args:
      sound: the spectrogram.
      starts: of the windows, growing, in seconds, `[windows]`.
      ends: `[windows]`.
      scores: `[windows, labels]`; probabilities, or a regression's outputs.
      label_names: `[labels]`.
      most: how many labels are drawn.
      unit: of the scores; the colours of "probability" cover 0 to 1, others the range.
    """
    chosen = np.argsort(-scores.max(axis=0), kind="stable")[:most]
    chosen = chosen[np.argsort(scores[:, chosen].mean(axis=0), kind="stable")]
    middles = (starts + ends) / 2
    seconds = ends[-1] / _TAGGRAM_COLUMNS
    times = seconds * (np.arange(_TAGGRAM_COLUMNS) + 0.5)
    nearest = np.searchsorted((middles[1:] + middles[:-1]) / 2, times)
    below = TimePanel(
        scores[nearest][:, chosen],
        seconds,
        name=f"{unit} over {len(starts)} window{'s' if len(starts) != 1 else ''}",
        yticks={row: short(label_names[label]) for row, label in enumerate(chosen.tolist())},
        unit=unit,
        limits=(0.0, 1.0) if unit == "probability" else (float(scores.min()), float(scores.max())),
        height=0.21 * len(chosen) + 0.45,
    )
    figure = time_panels([sound, below])
    # White lines separate the rows without a grid over the times.
    rows = np.arange(1, len(chosen)) - 0.5
    figure.axes[1].hlines(rows, 0, ends[-1], color="white", linewidth=1.2)
    return figure


def short(name: str, most: int = 28) -> str:
    """Returns a name, cut to the available length."""
    return name if len(name) <= most else name[: most - 1] + "…"


def new_figure(width: float, height: float, layout: Any = "constrained") -> Figure:
    """Returns an empty figure, in inches, that needs no screen."""
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _subplots(
    width: float, height: float, rows: int = 1, columns: int = 1, *, grid: Any = "both", **how: Any
) -> tuple[Figure, Any]:
    figure = new_figure(width, height)
    drawn = figure.subplots(rows, columns, **how)
    for axes in np.ravel(drawn):
        style_axes(axes, grid)
    return figure, drawn


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
