"""The figures and the pages of an explanation: a network's filters, its activations, and what speaks for a label."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.ndimage
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from musicgenre.evaluation.plots import BLUE, INK, MUTED, TimePanel, new_figure, save, short
from musicgenre.evaluation.report import rendered
from musicgenre.files import write_text

_TICKS = "#374151"
# From blue, which speaks against, over white to red, which speaks for.
_SIGNED = colormaps["RdBu_r"]
_FOR = LinearSegmentedColormap.from_list("for", _SIGNED(np.linspace(0.5, 1.0, 128)))
# Loud cells of a spectrogram behind colours are grey and no darker.
_BEHIND = LinearSegmentedColormap.from_list("behind", ["#ffffff", "#8b9099"])
# Of the activations, in inches: a row, the gap below it, the text on its left, its picture; rows of a column, columns.
_ROW, _GAP, _TEXT, _PICTURE = 0.56, 0.14, 2.05, 6.3
_ROWS, _COLUMNS = 24, 3
# Pictures of one layer's units side by side.
_UNITS = 8
# Labels up to which each is written below its bar.
_NAMED = 12


@dataclasses.dataclass(frozen=True, eq=False)
class MapPanel:
    """What lies over a spectrogram in `saliency`.

    Attributes:
      values: `[frames, bands]`, drawn in colours over the spectrogram; `[n]`, drawn as a line over the same time.
      name: what it is.
      unit: name of the colour bar or the vertical axis.
      signed: it has values below zero, which speak against.
    """

    values: np.ndarray
    name: str
    unit: str
    signed: bool = True


def filters(
    path: str | os.PathLike[str],
    kernels: np.ndarray,
    title: str,
    *,
    across: str,
    up: str,
    yticks: Mapping[float, str] | None = None,
    most: int = 64,
) -> None:
    """Draws kernels as small images of one colour scale, the strongest first.

    Args:
      path: PNG file.
      kernels: `[filters, bands, frames]`, the lowest band and the earliest frame first.
      title: which layer of which network.
      across: what lies along the horizontal axis of an image.
      up: what lies along its vertical axis.
      yticks: labels by band, at the left edge.
      most: filters that are drawn: those with the greatest energy.
    """
    bands, width = kernels.shape[1:]
    # Tall images for kernels that span many bands, square cells for small patches.
    square = max(bands, width) <= 16
    high, wide = (
        (0.78 * bands / max(bands, width), 0.78 * width / max(bands, width))
        if square
        else (1.35, 0.62)
    )
    if square:
        high, wide = max(high, 0.2), max(wide, 0.2)
    elif width > 32:
        wide = 1.35 if bands > 16 else 2.2
        high = 1.35 if bands > 16 else 0.5
    columns = max(min(len(kernels), int(8.2 / (wide + 0.12))), 1)
    # No more than a picture that is somewhat higher than wide holds.
    most = min(most, columns * max(int(11.0 / (high + 0.27)), 1))
    order = np.argsort(-np.square(kernels).sum(axis=(1, 2)), kind="stable")[:most]
    count, limit = len(order), _limit(kernels[order], 0.998)
    # Of the numbers of columns that are about as many, the one that leaves the fewest places empty.
    columns = min(
        range(columns, max(columns * 2 // 3, 1) - 1, -1), key=lambda number: -count % number
    )
    rows = -(-count // columns)
    figure = new_figure(max(columns * (wide + 0.12) + 1.7, 4.6), rows * (high + 0.27) + 1.0)
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.ravel()):
        if place >= count:
            axes.set_axis_off()
            continue
        number = int(order[place])
        axes.imshow(
            kernels[number],
            origin="lower",
            aspect="equal" if square else "auto",
            cmap=_SIGNED,
            vmin=-limit,
            vmax=limit,
            interpolation="nearest",
        )
        axes.set_title(str(number), fontsize=6.5, color=MUTED, pad=2)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color="#d1d5db", linewidth=0.6)
        if yticks and place % columns == 0:
            axes.set_yticks(list(yticks), list(yticks.values()), fontsize=6)
            axes.tick_params(colors=_TICKS, length=2, pad=1)
    figure.supxlabel(f"{across} · above each filter, its number", fontsize=9, color=INK)
    figure.supylabel(up, fontsize=9, color=INK)
    bar = figure.colorbar(
        ScalarMappable(Normalize(-limit, limit), _SIGNED),
        ax=list(grid.ravel()),
        fraction=0.035,
        pad=0.02,
        extend="both",
        aspect=24,
        shrink=min(1.0, 4.0 / (rows * (high + 0.27))),
    )
    _quiet(bar, "weight")
    more = f" · the {count} strongest of {len(kernels)}" if count < len(kernels) else ""
    save(figure, path, f"{title}{more}")


def frequency_responses(
    path: str | os.PathLike[str], decibels: np.ndarray, hertz: np.ndarray, title: str
) -> None:
    """Draws how strongly filters pass each frequency, a column a filter.

    Args:
      path: PNG file.
      decibels: below each filter's peak, `[filters, bins]`, sorted by the frequency of their peak.
      hertz: `[bins]`.
      title: which layer of which network.
    """
    figure = new_figure(8.4, 4.4)
    axes = figure.subplots()
    step = float(hertz[1] - hertz[0]) if len(hertz) > 1 else 1.0
    image = axes.imshow(
        decibels.T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=-30,
        vmax=0,
        interpolation="nearest",
        extent=(0.5, len(decibels) + 0.5, float(hertz[0]) - step / 2, float(hertz[-1]) + step / 2),
    )
    axes.set(xlabel="filters, by the frequency that they pass best", ylabel="frequency (Hz)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.tick_params(colors=_TICKS, length=3)
    axes.spines[:].set_visible(False)
    _quiet(
        figure.colorbar(image, ax=axes, pad=0.012, fraction=0.045, extend="min"),
        "dB re each filter's peak",
    )
    save(figure, path, title, palette=True)


def activations(
    path: str | os.PathLike[str],
    layers: Mapping[str, np.ndarray],
    title: str,
    *,
    span: tuple[float, float],
    labels: Sequence[str] = (),
) -> None:
    """Draws what every layer returns for one input, a row a layer, from the input on.

    Of a layer with positions in time and bands, the eight units that vary most are drawn side by side; of one with time alone,
    all units below each other; of one without, a step for each unit. A row has its own colours, from its smallest value (dark)
    to its largest (bright), which are written beside it.

    Args:
      path: PNG file.
      layers: values by name, in the order of the network: `[units]`, `[steps, units]` or `[steps, heights, units]`.
      title: of which network and file.
      span: first and last second of the input.
      labels: names of the last layer's units, written below them where there are few.
    """
    names = list(layers)
    if len(names) > _ROWS * _COLUMNS:
        names = [
            names[i]
            for i in np.linspace(0, len(names) - 1, _ROWS * _COLUMNS).round().astype(int).tolist()
        ]
        title = f"{title} · {len(names)} of {len(layers)} layers"
    columns = -(-len(names) // _ROWS)
    rows = -(-len(names) // columns)
    wide, head, foot = columns * (_TEXT + _PICTURE + 0.25), 0.5, 0.45
    high = head + rows * (_ROW + _GAP) + foot
    figure = new_figure(wide, high, layout=None)
    for place, name in enumerate(names):
        column, row = divmod(place, rows)
        left = column * (_TEXT + _PICTURE + 0.25) + 0.1
        bottom = high - head - row * (_ROW + _GAP) - _ROW
        values = layers[name]
        shape = " x ".join(map(str, values.shape))
        figure.text(
            left / wide,
            (bottom + _ROW * 0.80) / high,
            short(name, 30),
            fontsize=8,
            color=INK,
            va="center",
            weight="bold",
        )
        figure.text(
            left / wide,
            (bottom + _ROW * 0.47) / high,
            shape,
            fontsize=7.5,
            color=MUTED,
            va="center",
        )
        low, top = float(values.min()), float(values.max())
        figure.text(
            left / wide,
            (bottom + _ROW * 0.17) / high,
            f"{low:.3g} … {top:.3g}",
            fontsize=7.5,
            color=MUTED,
            va="center",
        )
        box = (left + _TEXT - 0.1, bottom, _PICTURE, _ROW)
        if values.ndim == 1:
            axes = _axes(figure, box, wide, high)
            axes.fill_between(
                np.arange(len(values) + 1),
                np.append(values, values[-1]),
                step="post",
                color=BLUE,
                linewidth=0,
            )
            axes.set_xlim(0, len(values))
            axes.axhline(0, color="#9ca3af", linewidth=0.6)
            if name == names[-1] and len(values) == len(labels) <= _NAMED:
                axes.set_xticks(
                    np.arange(len(labels)) + 0.5, [short(label, 12) for label in labels], fontsize=7
                )
                axes.tick_params(colors=_TICKS, length=0, pad=2)
        elif values.ndim == 2:
            _image(_axes(figure, box, wide, high), values.T, low, top)
        else:
            grid = values.reshape(*values.shape[:2], -1)
            spread = grid.reshape(-1, grid.shape[2]).std(axis=0)
            shown = np.sort(np.argsort(-spread, kind="stable")[:_UNITS])
            each = (_PICTURE - 0.06 * (len(shown) - 1)) / len(shown)
            for i, unit in enumerate(shown.tolist()):
                axes = _axes(figure, (box[0] + i * (each + 0.06), bottom, each, _ROW), wide, high)
                _image(axes, grid[:, :, unit].T, low, top)
                axes.text(
                    0.02, 0.95, unit, transform=axes.transAxes, fontsize=5.5, color="white", va="top", ha="left",
                    bbox={"facecolor": "#00000088", "edgecolor": "none", "pad": 0.8},
                )  # fmt: skip
    for column in range(columns):
        left = (column * (_TEXT + _PICTURE + 0.25) + _TEXT) / wide
        text = (
            f"left to right: {span[0]:.1f} to {span[1]:.1f} s, or units where a layer has no time · "
            "bottom to top: bands, or units · dark to bright: the range on the left"
        )
        figure.text(left, 0.16 / high, text, fontsize=6.8, color=MUTED, va="center")
    save(figure, path, title, palette=True)


def saliency(
    path: str | os.PathLike[str], sound: TimePanel, maps: Sequence[MapPanel], title: str
) -> None:
    """Draws a spectrogram, and below it on the same axes what speaks for a label and what against it.

    Colours reach their ends at the 99.5th percentile. The values of cells are smoothed over their neighbours, for the eye.

    Args:
      path: PNG file.
      sound: the spectrogram, `[frames, bands]`.
      maps: on the same frames and bands.
      title: which label of which file.
    """
    heights = [2.0] + [2.0 if panel.values.ndim == 2 else 1.2 for panel in maps]
    figure = new_figure(9.6, 0.9 + 1.08 * sum(heights))
    column = figure.subplots(len(maps) + 1, 1, sharex=True, squeeze=False, height_ratios=heights)[
        :, 0
    ]
    low, top = sound.limits or (float(sound.values.min()), float(sound.values.max()))
    end = sound.start + len(sound.values) * sound.seconds
    extent = (sound.start, end, -0.5, sound.values.shape[1] - 0.5)
    options: dict[str, Any] = {
        "origin": "lower",
        "aspect": "auto",
        "interpolation": "nearest",
        "extent": extent,
    }
    image = column[0].imshow(sound.values.T, cmap="magma", vmin=low, vmax=top, **options)
    column[0].set_title(sound.name, fontsize=10, color=INK, loc="left")
    _quiet(figure.colorbar(image, ax=column[0], pad=0.012, fraction=0.045), sound.unit)
    for axes, panel in zip(column[1:], maps, strict=True):
        axes.set_title(panel.name, fontsize=10, color=INK, loc="left")
        if panel.values.ndim == 1:
            _curve(axes, panel, sound.start, end)
            continue
        values = (
            scipy.ndimage.gaussian_filter(panel.values.astype(np.float64), 1.0)
            if panel.signed
            else panel.values
        )
        limit = _limit(values, 0.995)
        axes.imshow(sound.values.T, cmap=_BEHIND, vmin=low, vmax=top, **options)
        norm, colours = (
            (Normalize(-limit, limit), _SIGNED) if panel.signed else (Normalize(0, limit), _FOR)
        )
        over = colours(norm(values))
        # What lies over whole stretches lets the spectrogram through.
        over[..., 3] = np.clip(np.abs(values) / limit, 0, 1) ** 0.6 * (1.0 if panel.signed else 0.8)
        axes.imshow(over.transpose(1, 0, 2), **options)
        bar = figure.colorbar(
            ScalarMappable(norm, colours),
            ax=axes,
            pad=0.012,
            fraction=0.045,
            extend="both" if panel.signed else "max",
        )
        _quiet(bar, panel.unit)
        bar.ax.yaxis.set_major_locator(MaxNLocator(4))
        bar.ax.ticklabel_format(axis="y", scilimits=(-2, 3))
    for axes in column:
        if axes.images:
            if sound.yticks:
                axes.set_yticks(list(sound.yticks), list(sound.yticks.values()))
            axes.set_ylabel(sound.ylabel)
            axes.spines[:].set_visible(False)
        axes.tick_params(colors=_TICKS, length=3)
        axes.set_xlim(max(sound.start, 0), end)
    minutes = end > 300
    if minutes:
        column[-1].xaxis.set_major_formatter(
            lambda value, _: f"{int(value) // 60}:{int(value) % 60:02d}"
        )
    column[-1].set_xlabel("time (min:s)" if minutes else "time (s)")
    save(figure, path, title)


class Link(NamedTuple):
    """A cell of a table that leads to another page."""

    text: str
    href: str


class Sound(NamedTuple):
    """A sound file beside the page, to be played in it."""

    name: str
    src: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
      heading: its title.
      text: what to know of what is shown, a paragraph each.
      figures: address of each picture, and what it shows in words.
      sounds: sounds to be played.
      columns: of its table.
      rows: of its table.
      numbers: how many of the last columns are numbers.
      listing: text of a fixed width, shown on demand.
    """

    heading: str
    text: Sequence[str] = ()
    figures: Sequence[tuple[str, str]] = ()
    sounds: Sequence[Sound] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str | Link | Sound]] = ()
    numbers: int = 0
    listing: str = ""


def page(
    path: str | os.PathLike[str],
    title: str,
    facts: Mapping[str, str],
    sections: Sequence[Section],
    *,
    synthetic: bool = False,
    up: str = "",
) -> None:
    """Writes a page of an explanation; pictures and sounds lie beside it.

    Args:
      path: HTML file.
      title: its heading.
      facts: short ones, by name, below the heading.
      sections: its parts.
      synthetic: the model was trained on made-up audio; the page says so at the top.
      up: address of the page that leads to this one, or "".
    """
    write_text(
        path,
        rendered(
            "explain.html.j2",
            title=title,
            facts=facts,
            sections=sections,
            synthetic=synthetic,
            up=up,
        ),
    )


def _limit(values: np.ndarray, share: float) -> float:
    """Returns the end of a colour scale that so large a share of the values lies within."""
    return float(np.quantile(np.abs(values), share)) or float(np.abs(values).max()) or 1.0


def _axes(figure: Figure, box: tuple[float, float, float, float], wide: float, high: float) -> Axes:
    """Returns axes without ticks at a place in inches."""
    left, bottom, width, height = box
    axes = figure.add_axes((left / wide, bottom / high, width / wide, height / high))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color="#d1d5db", linewidth=0.6)
    return axes


def _image(axes: Axes, values: np.ndarray, low: float, top: float) -> None:
    axes.imshow(
        values,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=low,
        vmax=top,
        interpolation="nearest",
    )


def _curve(axes: Axes, panel: MapPanel, start: float, end: float) -> None:
    """Draws what speaks for and what against over time, as two sums that do not cancel out."""
    most = 1200
    bounds = np.linspace(0, len(panel.values), min(most, len(panel.values)) + 1).astype(int)[:-1]
    times = start + (end - start) * bounds / max(len(panel.values), 1)
    for sign, colour in ((1, _SIGNED(0.88)), (-1, _SIGNED(0.1))):
        sums = np.add.reduceat(np.maximum(sign * panel.values.astype(np.float64), 0), bounds)
        axes.fill_between(times, sign * sums, step="post", color=colour, linewidth=0)
    axes.axhline(0, color="#9ca3af", linewidth=0.6)
    axes.set_ylabel(panel.unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _quiet(bar: Any, name: str) -> None:
    bar.outline.set_visible(False)
    bar.set_label(name, color=MUTED)
    bar.ax.tick_params(colors=_TICKS, length=3)
