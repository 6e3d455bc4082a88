"""The figures of an explanation: a network's filters, its activations, and evidence for a label."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.ndimage
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.ticker import MaxNLocator

from musicgenre.evaluation import plots
from musicgenre.evaluation.plots import BLUE, INK, MUTED, TICKS, PathLike, TimePanel, short

# Blue is evidence against a unit, red is evidence for it.
_SIGNED = colormaps["RdBu_r"]
_FOR = LinearSegmentedColormap.from_list("for", _SIGNED(np.linspace(0.5, 1.0, 128)))
# The spectrogram behind the colours is grey and no darker than this.
_BEHIND = LinearSegmentedColormap.from_list("behind", ["#ffffff", "#8b9099"])
_IMAGE: dict[str, Any] = {"origin": "lower", "aspect": "auto", "interpolation": "nearest"}
_FRAME = {"color": "#d1d5db", "linewidth": 0.6}
# Most rows per column of the activations, most columns, and most units of a layer's picture.
_ROWS, _COLUMNS, _UNITS = 24, 3, 8
# Most labels that are named below their bars, and most filters of a picture.
_NAMED, _FILTERS = 12, 64


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
    path: PathLike,
    kernels: np.ndarray,
    title: str,
    *,
    across: str,
    up: str,
    yticks: Mapping[float, str],
) -> None:
    """Draws kernels as small images with one colour scale, those with most energy first.

    Args:
      path: PNG file.
      kernels: `[filters, bands, frames]`, the lowest band and the earliest frame first.
      title: names the layer and the network.
      across: name of an image's horizontal axis.
      up: name of its vertical axis.
      yticks: labels by band, at the left edge.
    """
    bands, width = kernels.shape[1:]
    # Small patches have square cells; kernels that span many bands are tall images.
    square = max(bands, width) <= 16
    high, wide = (1.35, 1.35 if width > 32 else 0.62) if bands > 16 or width <= 32 else (0.5, 2.2)
    if square:
        high, wide = (max(0.78 * extent / max(bands, width), 0.2) for extent in (bands, width))
    columns = max(min(len(kernels), int(8.2 / (wide + 0.12))), 1)
    # The figure is at most slightly higher than wide.
    most = min(_FILTERS, columns * max(int(11.0 / (high + 0.27)), 1))
    order = np.argsort(-np.square(kernels).sum(axis=(1, 2)), kind="stable")[:most].tolist()
    count, limit = len(order), _limit(kernels[order], 0.998)
    rows = -(-count // columns)
    columns = -(-count // rows)
    tall = rows * (high + 0.27)
    figure = plots.new_figure(max(columns * (wide + 0.12) + 1.7, 4.6), tall + 1.0)
    grid: Any = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    scale = ScalarMappable(Normalize(-limit, limit), _SIGNED)
    options = _IMAGE | {"aspect": "equal" if square else "auto"}
    for axes, number in zip(grid, order, strict=False):
        axes.imshow(kernels[number], cmap=scale.cmap, norm=scale.norm, **options)
        axes.set_title(str(number), fontsize=6.5, color=MUTED, pad=2)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(**_FRAME)
    for axes in grid[count:]:
        axes.set_axis_off()
    for axes in grid[:count:columns]:
        axes.set_yticks(list(yticks), list(yticks.values()), fontsize=6)
        axes.tick_params(colors=TICKS, length=2, pad=1)
    figure.supxlabel(f"{across} · each filter is numbered", fontsize=9, color=INK)
    figure.supylabel(up, fontsize=9, color=INK)
    look: dict[str, Any] = {"extend": "both", "fraction": 0.035, "pad": 0.02, "aspect": 24}
    plots.colour_bar(figure, grid, scale, "weight", shrink=min(1.0, 4.0 / tall), **look)
    more = f" · the {count} strongest of {len(kernels)}" if count < len(kernels) else ""
    plots.save(figure, path, f"{title}{more}")


def frequency_responses(
    path: PathLike, decibels: np.ndarray, hertz: np.ndarray, title: str
) -> None:
    """Draws the magnitude responses of filters, one column per filter.

    `decibels`, `[filters, bins]`, are below each filter's peak and sorted by peak frequency;
    `hertz`, `[bins]`, are at least two and evenly spaced.
    """
    figure = plots.new_figure(8.4, 4.4)
    axes = figure.subplots()
    half = float(hertz[1] - hertz[0]) / 2
    extent = (0.5, len(decibels) + 0.5, float(hertz[0]) - half, float(hertz[-1]) + half)
    image = axes.imshow(decibels.T, cmap="magma", vmin=-30, vmax=0, extent=extent, **_IMAGE)
    axes.set(xlabel="filters, by peak frequency", ylabel="frequency (Hz)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.tick_params(colors=TICKS, length=3)
    axes.spines[:].set_visible(False)
    plots.colour_bar(figure, axes, image, "dB re each filter's peak", extend="min")
    plots.save(figure, path, title, palette=True)


def activations(
    path: PathLike,
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
    names, most = list(layers), _ROWS * _COLUMNS
    if len(names) > most:
        names = [names[i] for i in np.linspace(0, len(names) - 1, most).round().astype(int)]
        title = f"{title} · {most} of {len(layers)} layers"
    columns = -(-len(names) // _ROWS)
    rows = -(-len(names) // columns)
    wide, high = 8.6 * columns, 0.7 * rows + 0.95
    figure = plots.new_figure(wide, high, layout=None)
    sides = {"left": 2.05 / wide, "right": 1 - 0.2 / wide}
    sides |= {"bottom": 0.45 / high, "top": 1 - 0.5 / high}
    space = sides | {"hspace": 0.25, "wspace": 0.36}
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw=space).T.ravel().tolist()
    for axes, name in zip(grid, names, strict=False):
        _activation_row(axes, name, layers[name], labels if name == names[-1] else ())
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    text = (
        f"left to right: {span[0]:.1f} to {span[1]:.1f} s, or units of a layer without time · "
        "bottom to top: bands, or units · dark to bright: the range on the left"
    )
    figure.text(sides["left"], 0.16 / high, text, fontsize=6.8, color=MUTED, va="center")
    plots.save(figure, path, title, palette=True)


def _activation_row(axes: Axes, name: str, values: np.ndarray, labels: Sequence[str]) -> None:
    """Draws one layer, with its name, shape and range to the left."""
    low, top = float(values.min()), float(values.max())
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(**_FRAME)
    look: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 7.5, "va": "center"}
    lines = (short(name, 30), " x ".join(map(str, values.shape)), f"{low:.3g} … {top:.3g}")
    for height, text, colour in zip((0.8, 0.48, 0.16), lines, (INK, MUTED, MUTED), strict=True):
        axes.text(-0.31, height, text, color=colour, **look)
    if values.ndim == 1:
        axes.stairs(values, fill=True, color=BLUE)
        axes.set_xlim(0, len(values))
        axes.axhline(0, color="#9ca3af", linewidth=0.6)
        if len(values) == len(labels) <= _NAMED:
            named = [short(label, 12) for label in labels]
            axes.set_xticks(np.arange(len(labels)) + 0.5, named, fontsize=7)
            axes.tick_params(colors=TICKS, length=0, pad=2)
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


def saliency(path: PathLike, sound: TimePanel, maps: Sequence[MapPanel], title: str) -> None:
    """Draws a spectrogram, and below it maps of the evidence for and against a unit.

    The spectrogram, `[frames, bands]`, and the maps share frames and bands. Colours end at the
    99.5th percentile. Signed maps are smoothed over neighbouring cells.
    """
    heights = [2.0] + [2.0 if panel.values.ndim == 2 else 1.2 for panel in maps]
    figure = plots.new_figure(9.6, 0.9 + 1.08 * sum(heights))
    column = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    image = sound.draw(column[0])
    assert image is not None
    plots.colour_bar(figure, column[0], image, sound.unit)
    for axes, panel in zip(column[1:], maps, strict=True):
        if panel.values.ndim == 1:
            _curve(axes, panel, sound)
            continue
        dataclasses.replace(sound, name=panel.name).draw(axes)
        axes.images[0].set_cmap(_BEHIND)
        scale, colours = _over(panel)
        axes.imshow(colours.transpose(1, 0, 2), extent=image.get_extent(), **_IMAGE)
        extend = "both" if panel.signed else "max"
        bar = plots.colour_bar(figure, axes, scale, panel.unit, extend=extend)
        bar.ax.yaxis.set_major_locator(MaxNLocator(4))
        bar.ax.ticklabel_format(axis="y", scilimits=(-2, 3))
    column[-1].set_xlim(max(sound.start, 0), sound.end)
    plots.time_axis(column[-1], sound.end)
    plots.save(figure, path, title)


def _over(panel: MapPanel) -> tuple[ScalarMappable, np.ndarray]:
    """Returns a map's colour scale, and its colours `[frames, bands, 4]`."""
    values = scipy.ndimage.gaussian_filter(panel.values, 1) if panel.signed else panel.values
    limit = _limit(values, 0.995)
    norm = Normalize(-limit if panel.signed else 0, limit)
    scale = ScalarMappable(norm, _SIGNED if panel.signed else _FOR)
    colours = scale.cmap(norm(values))
    # Weak evidence, and a map without signs, leave the spectrogram visible.
    opacity = np.clip(np.abs(values) / limit, 0, 1) ** 0.6
    colours[..., 3] = opacity if panel.signed else 0.8 * opacity
    return scale, colours


def _limit(values: np.ndarray, fraction: float) -> float:
    """Returns the end of a colour scale that covers this fraction of the values."""
    return float(np.quantile(np.abs(values), fraction)) or float(np.abs(values).max()) or 1.0


def _curve(axes: Axes, panel: MapPanel, sound: TimePanel) -> None:
    """Draws the evidence for and against a unit over time, as two sums that do not cancel."""
    count = len(panel.values)
    bounds = np.linspace(0, count, min(1200, count) + 1).astype(int)
    edges = sound.start + (sound.end - sound.start) * bounds / count
    for sign, colour in ((1, _SIGNED(0.88)), (-1, _SIGNED(0.1))):
        positive = np.maximum(sign * panel.values.astype(np.float64), 0)
        axes.stairs(sign * np.add.reduceat(positive, bounds[:-1]), edges, fill=True, color=colour)
    plots.style_axes(axes)
    axes.set_title(panel.name, fontsize=10, color=INK, loc="left")
    axes.set_ylabel(panel.unit)
    axes.yaxis.set_major_locator(MaxNLocator(4))
