"""Draws the layers of a network as boxes from top to bottom, in columns where it is long."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from musicgenre.evaluation import plots
from musicgenre.models.describe import Layer, describe, settings_text, shape_text, total_parameters

# In inches: a column, a box, the margin on its left, the arrow's position in it, a line of text.
_COLUMN, _BOX, _MARGIN, _ARROW, _LINE = 3.9, 3.3, 0.3, 0.45, 0.155
# Colours of a box and of the bar on its left by words in the layer's type; the first match.
_COLOURS = {
    ("norm", "dropout"): ("#eef0f3", "#eef0f3"),
    ("conv",): ("#cfe5f3", plots.BLUE),
    ("dense", "einsum"): ("#cdebe1", plots.GREEN),
    ("attention",): ("#fae0d2", plots.RED),
    ("gru", "lstm", "rnn", "bidirectional"): ("#f3e0ec", plots.PURPLE),
    ("input", "output", "join", "parameters"): ("#ffffff", "#ffffff"),
    ("",): ("#fbecc9", plots.ORANGE),
}
_TEXT: dict[str, Any] = {"va": "center", "fontsize": 7.5, "color": plots.TICKS}
_ARROWHEAD = {"arrowstyle": "-|>", "color": plots.INK, "shrinkA": 0, "shrinkB": 0}


def architecture_figure(
    module: nn.Module,
    frames: int,
    bands: int,
    out: str | os.PathLike[str],
    name: str,
    about: str = "",
) -> tuple[Path, list[Layer]]:
    """Draws the layers of a network: number, name, type, settings and parameters of each in a box.

    An arrow has the shape that it carries, the operations on the way, and the shape that arrives if
    it differs. If a layer's input is not the output of the box above, the arrow begins at a bar and
    names the layers it comes from.

    Args:
      module: the network.
      frames: of its input.
      bands: of its input.
      out: folder of the picture.
      name: of the network, for the title and the file.
      about: end of the title.

    Returns:
      The path of `architecture_<name>.png`, and the layers.
    """
    layers = describe(module, frames, bands)
    path = Path(out) / f"architecture_{name}.png"
    title = f"{name} · input {frames} x {bands} · {total_parameters(layers):,} parameters"
    draw_layers(path, layers, f"{title} · {about}" if about else title)
    return path, layers


def draw_layers(path: str | os.PathLike[str], layers: Sequence[Layer], title: str) -> None:
    """Draws layers, from `musicgenre.models.describe.describe`, as a PNG file."""
    heights = [_arrow_height(layers, i) + _box_height(layer) for i, layer in enumerate(layers)]
    total = sum(heights)
    # One column while it fits on a page, then so many that the picture is a little wider than high.
    columns = 1 if total <= 9 else max(2, round((1.3 * total / _COLUMN) ** 0.5))
    folded: list[list[int]] = [[]]
    used = 0.0
    for i, height in enumerate(heights):
        middle = used + height / 2
        if folded[-1] and middle > total * len(folded) / columns and not _joined(layers, i):
            folded.append([])
        folded[-1].append(i)
        used += height
    high = max(sum(heights[i] for i in column) for column in folded) + 0.35
    wide = _COLUMN * len(folded)
    head = 0.35 + 0.19 * len(plots.wrapped_title(title, wide))
    figure = plots.new_figure(wide, high + head, layout=None)
    axes = figure.add_axes((0, 0, 1, high / (high + head)))
    axes.set(xlim=(0, wide), ylim=(high, 0))
    axes.set_axis_off()
    for number, column in enumerate(folded):
        y, left = 0.05, number * _COLUMN + _MARGIN
        for i in column:
            _draw_arrow(axes, layers, i, left + _ARROW, y, number > 0 and i == column[0])
            y += _arrow_height(layers, i)
            _draw_box(axes, i, layers[i], left, y)
            y += _box_height(layers[i])
    plots.save(figure, path, title)


def _joined(layers: Sequence[Layer], i: int) -> bool:
    """Returns whether a layer, such as dropout, follows the one above without an arrow."""
    above = [(source.layer, source.operations) for source in layers[i].sources] == [(i - 1, ())]
    plain = any(word in layers[i].kind.lower() for word in ("norm", "dropout"))
    return above and plain and layers[i].output == layers[i - 1].output


def _arrow_lines(layers: Sequence[Layer], i: int) -> list[str]:
    """Returns the text at the arrow into a layer."""
    sources = layers[i].sources
    if not sources or _joined(layers, i):
        return []
    carried = list(dict.fromkeys(shape_text(layers[source.layer].output) for source in sources))
    before = carried if len(carried) == 1 else []
    if [source.layer for source in sources] == [i - 1]:
        lines = [*before, *textwrap.wrap(", ".join(sources[0].operations), 40)]
    else:
        *names, last = [
            str(source.layer) + (f" ({', '.join(source.operations)})" if source.operations else "")
            for source in sources
        ]
        text = f"from {', '.join(names)} and {last}" if names else f"from {last}"
        lines = [*textwrap.wrap(text, 40), *before]
    taken = " and ".join(dict.fromkeys(map(shape_text, layers[i].inputs)))
    return lines if carried == [taken] else [*lines, taken]


def _arrow_height(layers: Sequence[Layer], i: int) -> float:
    joined = not i or _joined(layers, i)
    return 0.0 if joined else 0.1 + _LINE * max(1, len(_arrow_lines(layers, i)))


def _words(layer: Layer) -> list[str]:
    """Returns the lines below the name of a layer; the ends of the network and joins have none."""
    if layer.kind in ("Input", "Output", "Join"):
        return []
    text = ", ".join(filter(None, (layer.kind, settings_text(layer))))
    # A line ends after a comma: the other spaces do not break.
    bound = text.replace(" ", "\xa0").replace(",\xa0", ", ")
    return [line.replace("\xa0", " ") for line in textwrap.wrap(bound, 56)]


def _box_height(layer: Layer) -> float:
    return 0.26 + _LINE * len(_words(layer))


def _draw_arrow(
    axes: Axes, layers: Sequence[Layer], i: int, x: float, y: float, begins: bool
) -> None:
    lines = _arrow_lines(layers, i)
    if not lines:
        return
    if begins and not lines[0].startswith("from"):
        lines[0] = f"from {i - 1}: {lines[0]}"
    if begins or all(source.layer != i - 1 for source in layers[i].sources):
        axes.plot([x - 0.08, x + 0.08], [y, y], color=plots.INK, linewidth=1)
    axes.annotate("", (x, y + _arrow_height(layers, i)), (x, y), arrowprops=_ARROWHEAD)
    for number, line in enumerate(lines):
        axes.text(x + 0.16, y + 0.05 + _LINE * (number + 0.5), line, **_TEXT)


def _draw_box(axes: Axes, i: int, layer: Layer, left: float, y: float) -> None:
    words, kind, height = _words(layer), layer.kind.lower(), _box_height(layer)
    fill, edge = next(c for names, c in _COLOURS.items() if any(name in kind for name in names))
    axes.add_patch(Rectangle((left, y), _BOX, height, fc=fill, ec="#9ca3af", linewidth=0.8))
    axes.add_patch(Rectangle((left, y), 0.06, height, fc=edge, linewidth=0))
    most = 30 - len(str(i))
    name = layer.name if len(layer.name) <= most else "…" + layer.name[1 - most :]
    shape = f"   {shape_text(layer.output)}" if layer.kind == "Input" else ""
    weight = "bold" if words else "normal"
    look = _TEXT | {"fontsize": 8.5, "color": plots.INK, "fontweight": weight}
    axes.text(left + 0.13, y + 0.14, f"{i}  {name}{shape}", **look)
    for number, line in enumerate(words):
        axes.text(left + 0.13, y + 0.3 + _LINE * number, line, **_TEXT)
    if layer.parameters:
        axes.text(left + _BOX - 0.07, y + 0.14, f"{layer.parameters:,}", ha="right", **_TEXT)
