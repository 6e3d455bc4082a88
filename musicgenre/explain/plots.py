"""The figures of an explanation: a network's filters, its activations, and evidence for a label."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.ndimage
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from musicgenre.evaluation.plots import BLUE, INK, MUTED, TimePanel, new_figure, save, short

_TICKS = "#374151"
# Blue is evidence against a unit, red is evidence for it.
_SIGNED = colormaps["RdBu_r"]
_FOR = LinearSegmentedColormap.from_list("for", _SIGNED(np.linspace(0.5, 1.0, 128)))
# The spectrogram behind the colours is grey and no darker than this.
_BEHIND = LinearSegmentedColormap.from_list("behind", ["#ffffff", "#8b9099"])
_IMAGE: dict[str, Any] = {"origin": "lower", "aspect": "auto", "interpolation": "nearest"}
# Most rows per column of the activations, most columns, and most units of a layer's picture.
_ROWS, _COLUMNS, _UNITS = 24, 3, 8
# Most labels that are named below their bars.
_NAMED = 12


@dataclasses.dataclass(frozen=True, eq=False)
class MapPanel:
    """A map that `saliency` draws below a spectrogram.

    Attributes:
      values: `[frames, bands]`, drawn in colours over the spectrogram; `[n]`, drawn as a line over
        the same time.
      name: its title.
      unit: name of the colour bar or of the vertical axis.
      signed: whether it has negative values, evidence against the unit.
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
    """Draws kernels as small images with one colour scale, the strongest first.

    Args:
      path: PNG file.
      kernels: `[filters, bands, frames]`, the lowest band and the earliest frame first.
      title: names the layer and the network.
      across: name of an image's horizontal axis.
      up: name of its vertical axis.
      yticks: labels by band, at the left edge.
      most: draws at most this many, those with the greatest energy.
    """
    bands, width = kernels.shape[1:]
    # Small patches have square cells; kernels that span many bands are tall images.
    square = max(bands, width) <= 16
    high, wide = (1.35, 1.35 if width > 32 else 0.62) if bands > 16 or width <= 32 else (0.5, 2.2)
    if square:
        high, wide = (max(0.78 * extent / max(bands, width), 0.2) for extent in (bands, width))
    columns = max(min(len(kernels), int(8.2 / (wide + 0.12))), 1)
    # The figure is at most slightly higher than wide.
    most = min(most, columns * max(int(11.0 / (high + 0.27)), 1))
    order = np.argsort(-np.square(kernels).sum(axis=(1, 2)), kind="stable")[:most].tolist()
    count, limit = len(order), _limit(kernels[order], 0.998)
    rows = -(-count // columns)
    columns = -(-count // rows)
    figure = new_figure(max(columns * (wide + 0.12) + 1.7, 4.6), rows * (high + 0.27) + 1.0)
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in grid[count:]:
        axes.set_axis_off()
    options = _IMAGE | {"aspect": "equal" if square else "auto"}
    for index, (axes, number) in enumerate(zip(grid, order, strict=False)):
        axes.imshow(kernels[number], cmap=_SIGNED, vmin=-limit, vmax=limit, **options)
        axes.set_title(str(number), fontsize=6.5, color=MUTED, pad=2)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color="#d1d5db", linewidth=0.6)
        if yticks and index % columns == 0:
            axes.set_yticks(list(yticks), list(yticks.values()), fontsize=6)
            axes.tick_params(colors=_TICKS, length=2, pad=1)
    figure.supxlabel(f"{across} · each filter is numbered", fontsize=9, color=INK)
    figure.supylabel(up, fontsize=9, color=INK)
    _colour_bar(
        figure,
        ScalarMappable(Normalize(-limit, limit), _SIGNED),
        grid,
        "weight",
        extend="both",
        fraction=0.035,
        pad=0.02,
        aspect=24,
        shrink=min(1.0, 4.0 / (rows * (high + 0.27))),
    )
    more = f" · the {count} strongest of {len(kernels)}" if count < len(kernels) else ""
    save(figure, path, f"{title}{more}")


def frequency_responses(
    path: str | os.PathLike[str], decibels: np.ndarray, hertz: np.ndarray, title: str
) -> None:
    """Draws the magnitude responses of filters, one column per filter.

    Args:
      path: PNG file.
      decibels: below each filter's peak, `[filters, bins]`, sorted by peak frequency.
      hertz: `[bins]`.
      title: names the layer and the network.
    """
    figure = new_figure(8.4, 4.4)
    axes = figure.subplots()
    half = float(hertz[1] - hertz[0]) / 2 if len(hertz) > 1 else 0.5
    extent = (0.5, len(decibels) + 0.5, float(hertz[0]) - half, float(hertz[-1]) + half)
    image = axes.imshow(decibels.T, cmap="magma", vmin=-30, vmax=0, extent=extent, **_IMAGE)
    axes.set(xlabel="filters, by peak frequency", ylabel="frequency (Hz)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.tick_params(colors=_TICKS, length=3)
    axes.spines[:].set_visible(False)
    _colour_bar(figure, image, axes, "dB re each filter's peak", extend="min")
    save(figure, path, title, palette=True)


def activations(
    path: str | os.PathLike[str],
    layers: Mapping[str, np.ndarray],
    title: str,
    *,
    span: tuple[float, float],
    labels: Sequence[str] = (),
) -> None:
    """Draws the outputs of every layer for one input, one row per layer, from the input on.

    A layer with positions in time and bands shows the eight units that vary most, next to each
    other; one with time alone, all units; one without, a step per unit. Each row has its own
    colours, from its smallest value (dark) to its largest (bright), printed to its left.

    Args:
      path: PNG file.
      layers: values by name, in the network's order: `[units]`, `[steps, units]` or
        `[steps, heights, units]`.
      title: names the network and the file.
      span: first and last second of the input.
      labels: names of the last layer's units, shown below them if there are few.
    """
    names = list(layers)
    if len(names) > _ROWS * _COLUMNS:
        picked = np.linspace(0, len(names) - 1, _ROWS * _COLUMNS).round().astype(int)
        names = [names[i] for i in picked.tolist()]
        title = f"{title} · {len(names)} of {len(layers)} layers"
    columns = -(-len(names) // _ROWS)
    rows = -(-len(names) // columns)
    wide, high = 8.6 * columns, 0.7 * rows + 0.95
    figure = new_figure(wide, high, layout=None)
    grid = figure.subplots(rows, columns, squeeze=False).T.ravel().tolist()
    figure.subplots_adjust(
        left=2.05 / wide,
        right=1 - 0.2 / wide,
        bottom=0.45 / high,
        top=1 - 0.5 / high,
        hspace=0.25,
        wspace=0.36,
    )
    for axes, name in zip(grid, names, strict=False):
        _activation_row(axes, name, layers[name], labels if name == names[-1] else ())
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    text = (
        f"left to right: {span[0]:.1f} to {span[1]:.1f} s, or units of a layer without time · "
        "bottom to top: bands, or units · dark to bright: the range on the left"
    )
    figure.text(2.05 / wide, 0.16 / high, text, fontsize=6.8, color=MUTED, va="center")
    save(figure, path, title, palette=True)


def _activation_row(axes: Axes, name: str, values: np.ndarray, labels: Sequence[str]) -> None:
    """Draws one layer, with its name, shape and range to the left."""
    low, top = float(values.min()), float(values.max())
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color="#d1d5db", linewidth=0.6)
    lines = (short(name, 30), " x ".join(map(str, values.shape)), f"{low:.3g} … {top:.3g}")
    for line, text in enumerate(lines):
        where: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 7.5, "va": "center"}
        axes.text(-0.31, 0.8 - 0.32 * line, text, color=MUTED if line else INK, **where)
    if values.ndim == 1:
        steps = np.append(values, values[-1])
        axes.fill_between(np.arange(len(steps)), steps, step="post", color=BLUE, linewidth=0)
        axes.set_xlim(0, len(values))
        axes.axhline(0, color="#9ca3af", linewidth=0.6)
        if len(values) == len(labels) <= _NAMED:
            named = [short(label, 12) for label in labels]
            axes.set_xticks(np.arange(len(labels)) + 0.5, named, fontsize=7)
            axes.tick_params(colors=_TICKS, length=0, pad=2)
        return
    if values.ndim > 2:
        # The units next to each other, with gaps between them.
        units = values.reshape(*values.shape[:2], -1)
        spread = units.reshape(-1, units.shape[2]).std(axis=0)
        shown = np.sort(np.argsort(-spread, kind="stable")[:_UNITS]).tolist()
        each = len(units) + max(len(units) // 12, 1)
        values = np.full((len(shown) * each, units.shape[1]), np.nan)
        for i, unit in enumerate(shown):
            values[i * each : i * each + len(units)] = units[:, :, unit]
            box = {"facecolor": "#00000088", "edgecolor": "none", "pad": 0.8}
            axes.text(i * each, 0, unit, fontsize=5.5, color="white", bbox=box)
    axes.imshow(values.T, cmap="magma", vmin=low, vmax=top, **_IMAGE)


def saliency(
    path: str | os.PathLike[str], sound: TimePanel, maps: Sequence[MapPanel], title: str
) -> None:
    """Draws a spectrogram, and below it on the same axes the evidence for and against a unit.

    Colours end at the 99.5th percentile. Signed maps are smoothed over neighbouring cells.

    Args:
      path: PNG file.
      sound: the spectrogram, `[frames, bands]`.
      maps: on the same frames and bands.
      title: names the label and the file.
    """
    heights = [2.0] + [2.0 if panel.values.ndim == 2 else 1.2 for panel in maps]
    figure = new_figure(9.6, 0.9 + 1.08 * sum(heights))
    column = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    low, top = sound.limits or (float(sound.values.min()), float(sound.values.max()))
    end = sound.start + len(sound.values) * sound.seconds
    options = _IMAGE | {"extent": (sound.start, end, -0.5, sound.values.shape[1] - 0.5)}
    image = column[0, 0].imshow(sound.values.T, cmap="magma", vmin=low, vmax=top, **options)
    _colour_bar(figure, image, column[0, 0], sound.unit)
    for axes, panel in zip(column[1:, 0], maps, strict=True):
        if panel.values.ndim == 1:
            _curve(axes, panel, sound.start, end)
            continue
        axes.imshow(sound.values.T, cmap=_BEHIND, vmin=low, vmax=top, **options)
        norm, colours, colour_map = _over(panel)
        axes.imshow(colours.transpose(1, 0, 2), **options)
        bar = _colour_bar(
            figure,
            ScalarMappable(norm, colour_map),
            axes,
            panel.unit,
            extend="both" if panel.signed else "max",
        )
        bar.ax.yaxis.set_major_locator(MaxNLocator(4))
        bar.ax.ticklabel_format(axis="y", scilimits=(-2, 3))
    for axes, name in zip(column[:, 0], [sound.name, *(panel.name for panel in maps)], strict=True):
        axes.set_title(name, fontsize=10, color=INK, loc="left")
        if axes.images:
            if sound.yticks:
                axes.set_yticks(list(sound.yticks), list(sound.yticks.values()))
            axes.set_ylabel(sound.ylabel)
            axes.spines[:].set_visible(False)
        axes.tick_params(colors=_TICKS, length=3)
        axes.set_xlim(max(sound.start, 0), end)
    bottom = column[-1, 0]
    bottom.set_xlabel("time (s)")
    if end > 300:
        bottom.set_xlabel("time (min:s)")
        bottom.xaxis.set_major_formatter(
            lambda value, _: f"{int(value) // 60}:{int(value) % 60:02d}"
        )
    save(figure, path, title)


def _over(panel: MapPanel) -> tuple[Normalize, np.ndarray, Any]:
    """Returns a map's scale, its colours `[frames, bands, 4]` and its colour map."""
    values, colour_map = panel.values, _SIGNED if panel.signed else _FOR
    if panel.signed:
        values = scipy.ndimage.gaussian_filter(values, 1)
    limit = _limit(values, 0.995)
    norm = Normalize(-limit if panel.signed else 0, limit)
    colours = colour_map(norm(values))
    # Weak evidence, and a map without signs, leave the spectrogram visible.
    opacity = np.clip(np.abs(values) / limit, 0, 1) ** 0.6
    colours[..., 3] = opacity if panel.signed else 0.8 * opacity
    return norm, colours, colour_map


def _limit(values: np.ndarray, fraction: float) -> float:
    """Returns the end of a colour scale that covers this fraction of the values."""
    return float(np.quantile(np.abs(values), fraction)) or float(np.abs(values).max()) or 1.0


def _curve(axes: Axes, panel: MapPanel, start: float, end: float) -> None:
    """Draws the evidence for and against a unit over time, as two sums that do not cancel."""
    bounds = np.linspace(0, len(panel.values), min(1200, len(panel.values)) + 1).astype(int)[:-1]
    times = start + (end - start) * bounds / max(len(panel.values), 1)
    for sign, colour in ((1, _SIGNED(0.88)), (-1, _SIGNED(0.1))):
        sums = np.add.reduceat(np.maximum(sign * panel.values.astype(np.float64), 0), bounds)
        axes.fill_between(times, sign * sums, step="post", color=colour, linewidth=0)
    axes.axhline(0, color="#9ca3af", linewidth=0.6)
    axes.set_ylabel(panel.unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _colour_bar(figure: Figure, image: ScalarMappable, axes: Any, name: str, **options: Any) -> Any:
    """Adds a colour bar without a frame."""
    bar = figure.colorbar(image, ax=axes, **{"pad": 0.012, "fraction": 0.045} | options)
    bar.outline.set_visible(False)
    bar.set_label(name, color=MUTED)
    bar.ax.tick_params(colors=_TICKS, length=3)
    return bar
