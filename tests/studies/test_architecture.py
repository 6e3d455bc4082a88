import pytest
from matplotlib.patches import Rectangle

from musicgenre import models
from musicgenre.evaluation import plots
from musicgenre.models.describe import Layer, Source, settings_text
from musicgenre.studies.architecture import architecture_figure, draw_layers


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved, with their titles, laid out."""
    figures = []

    def catch(figure, path, title):
        figure.canvas.draw()
        figures.append((figure, title))

    monkeypatch.setattr(plots, "save", catch)
    return figures


def check_readable(figure):
    """Every text is inside the figure and covers no other."""
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    found = [text.get_window_extent() for text in texts]
    width, height = figure.get_size_inches() * figure.dpi
    assert min(box.x0 for box in found) >= 0 and max(box.x1 for box in found) <= width
    assert min(box.y0 for box in found) >= 0 and max(box.y1 for box in found) <= height
    for i, one in enumerate(found):
        for j, other in enumerate(found[:i]):
            beside = one.x0 > other.x1 - 1 or other.x0 > one.x1 - 1
            above = one.y0 > other.y1 - 1 or other.y0 > one.y1 - 1
            assert beside or above, (texts[i].get_text(), texts[j].get_text())


def layer(name, kind, sources, *, settings=None, inputs=(9, 4), output=(9, 4), parameters=0):
    found = tuple(Source(number, operations) for number, operations in sources)
    return Layer(name, kind, settings or {}, (inputs,) if inputs else (), output, parameters, found)


CONV = {"features": 8, "kernel_size": (3,)}
SMALL_NET = [
    layer("input", "Input", [], inputs=()),
    layer("conv", "Conv", [(0, ())], settings=CONV, output=(9, 8), parameters=1104),
    layer("norm", "BatchNorm", [(1, ())], inputs=(9, 8), output=(9, 8), parameters=16),
    layer(
        "left", "Dense", [(2, ("ReLU", "max-pool"))], inputs=(3, 8), output=(3, 2), parameters=18
    ),
    layer("right", "Dense", [(2, ("ReLU",))], inputs=(9, 8), output=(9, 2), parameters=18),
    layer("product", "Join", [(3, ()), (4, ("tanh",))], inputs=(9, 2), output=(9, 2)),
    layer("output", "Output", [(5, ())], inputs=(9, 2), output=(9, 2)),
]


def test_a_network_is_drawn_with_its_shapes_and_branches(tmp_path, drawn):
    draw_layers(tmp_path / "a.png", SMALL_NET, "")
    axes = drawn[0][0].axes[0]
    assert [text.get_text() for text in axes.texts if text.get_text()] == [
        *("0  input   9 x 4", "9 x 4"),
        *("1  conv", f"Conv, {settings_text(SMALL_NET[1])}", "1,104"),
        *("2  norm", "BatchNorm", "16"),
        *("9 x 8", "ReLU, max-pool", "3 x 8"),
        *("3  left", "Dense", "18"),
        # The second branch begins at the norm again, not at the box above it.
        *("from 2 (ReLU)", "9 x 8"),
        *("4  right", "Dense", "18"),
        *("from 3 and 4 (tanh)", "9 x 2"),
        "5  product",
        "9 x 2",
        "6  output",
    ]
    corners = [
        (patch.get_y(), patch.get_height())
        for patch in axes.patches
        if isinstance(patch, Rectangle) and patch.get_width() > 1
    ]
    ends = [y + height for y, height in corners]
    gaps = [round(start - end, 6) for (start, _), end in zip(corners[1:], ends[:-1], strict=True)]
    # The norm joins its convolution; all others have an arrow above them.
    assert gaps[1] == 0 and min(gaps[:1] + gaps[2:]) > 0.2
    # One arrow each for the layers without the norm; a bar begins that of the second branch.
    assert len([text for text in axes.texts if getattr(text, "arrow_patch", None)]) == 5
    assert len(axes.lines) == 1


@pytest.mark.parametrize("blocks", [1, 12, 40])
def test_long_networks_are_folded_and_stay_readable(tmp_path, drawn, blocks):
    layers = [layer("input", "Input", [], inputs=())]
    settings = {"features": 64, "kernel_size": (7, 7), "strides": (2, 2), "padding": (3, 3)}
    for block in range(blocks):
        path, last = f"encoder/stage{block}/a_long_name_of_a_block_{block}", len(layers) - 1
        conv = {"settings": settings, "parameters": 12_345_678}
        layers += [
            layer(f"{path}/conv", "Conv", [(last, ())], **conv),
            layer(f"{path}/norm", "BatchNorm", [(last + 1, ())], parameters=12_345),
            layer("sum", "Join", [(last, ()), (last + 2, ())]),
        ]
    layers.append(layer("output", "Output", [(len(layers) - 1, ())]))
    draw_layers(tmp_path / "a.png", layers, "A network")
    [(figure, _)] = drawn
    width, height = figure.get_size_inches()
    assert blocks == 1 or 0.5 < width / height < 2.5
    check_readable(figure)


@pytest.mark.parametrize(
    ("fields", "frames", "bands"),
    [
        ({"name": "conv1d"}, 647, 128),
        ({"name": "resnet", "blocks": (2, 2, 2, 2)}, 647, 128),
        ({"name": "musicnn"}, 187, 96),
    ],
)
def test_networks_of_this_package_are_drawn_readably(tmp_path, drawn, fields, frames, bands):
    module = models.build(fields, num_classes=50, frames=frames, bands=bands)
    name = fields["name"]
    path, layers = architecture_figure(module, frames, bands, tmp_path, name, "an experiment")
    assert path == tmp_path / f"architecture_{name}.png"
    [(figure, title)] = drawn
    total = sum(layer.parameters for layer in layers)
    about = f"{name} · input {frames} x {bands} · {total:,} parameters"
    assert title == f"{about} · an experiment"
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert all(any(text.startswith(f"{i}  ") for text in texts) for i in range(len(layers)))
    check_readable(figure)
