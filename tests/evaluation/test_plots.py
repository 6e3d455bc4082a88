import struct

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

from musicgenre.errors import UserError
from musicgenre.evaluation import plots
from musicgenre.evaluation.calibration import risk_coverage
from musicgenre.evaluation.metrics import single_label_metrics


def size(path):
    """Width and height of a PNG file, from its header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved, in order, laid out."""
    figures = []

    def catch(figure, path, title, **kwargs):
        figure.suptitle(title)
        figure.canvas.draw()
        figures.append(figure)

    monkeypatch.setattr(plots, "save", catch)
    return figures


def boxes(texts):
    return [text.get_window_extent() for text in texts if text.get_visible() and text.get_text()]


def overlap(found):
    """The number of pairs of boxes that share more than the width of a line."""
    return sum(
        one.x0 < other.x1 - 1
        and other.x0 < one.x1 - 1
        and one.y0 < other.y1 - 1
        and other.y0 < one.y1 - 1
        for i, one in enumerate(found)
        for other in found[:i]
    )


@pytest.mark.parametrize("classes", [1, 2, 10, 26, 50])
def test_confusion_matrix_of_any_size(tmp_path, classes):
    names = [f"genre $x$ {i}" for i in range(classes)]
    plots.confusion_matrix(tmp_path / "a" / "c.png", np.eye(classes, dtype=int), names, "title $y")
    width, height = size(tmp_path / "a" / "c.png")
    assert width < 1900 and height < 1800
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["c.png"]


def test_confusion_matrix_has_numbers_up_to_25_classes(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        plots, "save", lambda figure, path, title: drawn.append(len(figure.axes[0].texts))
    )
    for classes in (10, 25, 26):
        plots.confusion_matrix(
            tmp_path / "c.png", np.ones((classes, classes), int), ["x"] * classes, ""
        )
    assert drawn == [100, 625, 0]


def test_per_class_bars_keep_the_label_order(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path, title: figures.append(figure))
    plots.per_class_bars(
        tmp_path / "b.png", ["z", "a", "m"], {"F1": [0.2, None, 0.6]}, [3, 0, 5], ""
    )
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["z  (3)", "a  (0)", "m  (5)"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert [text.get_text() for text in axes.texts] == ["0.20", "n/a", "0.60"]
    assert axes.get_title() == "F1, mean 0.400"


def test_learning_curves_mark_the_evaluated_step(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path, title: figures.append(figure))
    rows = [{"step": 10, "train_loss": 2.0}, {"step": 20, "valid_loss": 1.5, "valid_accuracy": 0.4}]
    plots.learning_curves(tmp_path / "l.png", rows, "", evaluated_step=20)
    loss, accuracy = figures[0].axes
    assert [list(line.get_xdata()) for line in loss.lines] == [[10], [20], [20, 20]]
    assert list(accuracy.lines[0].get_ydata()) == [0.4]


def test_the_coverage_curve_shows_what_the_table_says(tmp_path, drawn):
    confidence = np.linspace(0.2, 0.9, 60)
    found = risk_coverage(confidence, np.arange(60) % 4 > 0)
    plots.coverage_curve(tmp_path / "c.png", found, "")
    plots.coverage_curve(tmp_path / "c.png", risk_coverage(confidence, np.zeros(60)), "")
    axes, worst = (figure.axes[0] for figure in drawn)
    assert list(axes.lines[0].get_ydata()) == found["curve"]["accuracy"] and list(
        axes.lines[1].get_ydata()
    ) == [0.75, 0.75]
    assert [list(line.get_ydata()) for line in axes.lines[2::2]] == [
        row["wilson"] for row in found["at"]
    ]
    assert [text.get_text() for text in axes.texts] == [
        f"{100 * row['accuracy']:.1f} %" for row in found["at"]
    ]
    for one in (axes, worst):
        # Nothing lies under the legend or the axis.
        legend = one.get_legend().get_window_extent()
        assert (
            overlap([legend, *boxes(one.texts)]) == 0
            and min(box.y0 for box in boxes(one.texts)) > 0
        )
        assert (
            legend.y1
            < one.transData.transform((0, min(min(line.get_ydata()) for line in one.lines)))[1] + 1
        )


def test_the_other_figures_are_drawn(tmp_path):
    scores = np.array([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]])
    measured = single_label_metrics(scores, np.array([0, 1, 1]), ["a", "b"])
    plots.reliability_diagram(tmp_path / "r.png", measured["reliability"], measured["ece"], "title")
    plots.roc_curves(
        tmp_path / "o.png", scores, np.eye(2, dtype=int)[[0, 1, 1]], ["a", "b"], "title"
    )
    plots.roc_curves(tmp_path / "p.png", scores[:1], np.array([[1, 0]]), ["a", "b"], "one clip")
    plots.learning_curves(
        tmp_path / "l.png", [{"step": 1, "learning_rate": 0.1}], "nothing recorded"
    )
    plots.comparison_plot(
        tmp_path / "c.png",
        [{"name": "a", "mean": 0.5, "interval": None, "values": [0.5]}],
        "title",
        measure="accuracy",
        percent=True,
    )
    for name in "roplc":
        assert min(size(tmp_path / f"{name}.png")) > 250


def test_the_same_drawing_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        plots.confusion_matrix(tmp_path / name, [[3, 1], [0, 2]], ["x", "y"], "title")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"c\.png"):
        plots.confusion_matrix(tmp_path / "file" / "c.png", [[1]], ["x"], "title")


def test_labels_are_ordered_by_their_clips_and_splits_lie_on_each_other(tmp_path, drawn):
    counts = {"train": [3, 10, 0], "test": [4, 1, 2]}
    plots.label_distribution(tmp_path / "l.png", ["a", "b $x$", "c"], counts, "")
    plots.label_distribution(
        tmp_path / "l.png", ["a", "b $x$", "c"], counts, "", by_count=False, most=2
    )
    by_count, given = (figure.axes[0] for figure in drawn)
    assert [text.get_text() for text in by_count.get_xticklabels()] == ["b $x$", "a", "c"]
    assert [bar.get_height() for bar in by_count.patches] == [10, 3, 0, 1, 4, 2]
    assert [bar.get_y() for bar in by_count.patches] == [0, 0, 0, 10, 3, 0]
    assert [text.get_text() for text in by_count.texts] == ["11", "7", "2"]
    assert [text.get_text() for text in by_count.get_legend().get_texts()] == ["train", "test"]
    assert by_count.get_ylabel() == "clips"
    assert [text.get_text() for text in given.get_xticklabels()] == ["a", "b $x$"]
    assert [bar.get_height() for bar in given.patches] == [3, 10, 4, 1]


@pytest.mark.parametrize("labels", [2, 12, 13, 50, 80, 188])
def test_labels_never_cover_each_other(tmp_path, drawn, labels):
    names = [f"a longer label {i}" for i in range(labels)]
    plots.label_distribution(
        tmp_path / "l.png", names, {"clips": np.arange(4000, 4000 + labels)}, "", marked=50
    )
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == names[::-1]
    ticks = axes.get_xticklabels()
    if ticks[0].get_rotation() == 90:  # the box of a slanted text says nothing
        assert overlap(boxes(ticks)) == 0
    assert overlap(boxes(axes.texts)) == 0
    assert len(axes.texts) == (labels if labels <= 60 else 0)
    assert min(box.y0 for box in boxes(ticks)) >= 0
    assert ticks[0].get_fontsize() >= 7


def test_the_labels_that_are_used_have_a_colour_of_their_own(tmp_path, drawn):
    plots.label_distribution(
        tmp_path / "l.png", ["a", "b", "c"], {"clips": [1, 3, 2]}, "", marked=2
    )
    axes = drawn[0].axes[0]
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[0] == colours[1] != colours[2]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "the 2 most frequent",
        "the other 1",
    ]


def test_time_and_bands_of_a_spectrogram(tmp_path, drawn):
    values = np.linspace(-80, 0, 40 * 8).reshape(40, 8)
    values[0, 0] = -90.0
    panel = plots.TimePanel(
        values, 0.5, -0.25, "mel", "frequency (Hz)", {2.0: "250", 5.5: "1000"}, "dB", (-80.0, 0.0)
    )
    wave = np.zeros(20_000)
    wave[7], wave[12_345] = 0.9, -0.8
    plots.time_panels(
        tmp_path / "s.png",
        [plots.TimePanel(wave, 0.001, name="wave", ylabel="amplitude"), panel],
        "",
    )
    line, image = drawn[0].axes[:2]
    (picture,) = image.get_images()
    # Frames are centred on multiples of half a second, bands on whole numbers.
    assert picture.get_extent() == [-0.25, 19.75, -0.5, 7.5]
    np.testing.assert_array_equal(picture.get_array(), values.T)
    assert (
        picture.get_cmap().name == "magma"
        and picture.get_clim() == (-80, 0)
        and picture.origin == "lower"
    )
    assert image.get_yticks().tolist() == [2.0, 5.5]
    assert [text.get_text() for text in image.get_yticklabels()] == ["250", "1000"]
    assert (image.get_ylabel(), image.get_xlabel(), line.get_ylabel()) == (
        "frequency (Hz)",
        "time (s)",
        "amplitude",
    )
    assert image.get_xlim() == line.get_xlim() == (0, 19.75)
    bar = drawn[0].axes[2]
    assert bar.get_ylabel() == "dB" and picture.colorbar.extend == "min"
    # Few points, but no peak is lost, and each is where it was.
    x, y = line.lines[0].get_data()
    assert len(x) == 4000 and (y.max(), y.min()) == (0.9, -0.8)
    assert abs(x[y.argmin()] - 12.345) < 0.011 and abs(x[y.argmax()] - 0.007) < 0.011


def layer(name, kind, sources, *, settings="", inputs="9 x 4", output="9 x 4", parameters=0):
    return {
        "name": name,
        "kind": kind,
        "settings": settings,
        "input": inputs,
        "output": output,
        "parameters": parameters,
        "sources": sources,
    }


SMALL_NET = [
    layer("input", "Input", [], inputs=""),
    layer(
        "conv", "Conv", [(0, "")], settings="8 features, kernel 3", output="9 x 8", parameters=1104
    ),
    layer("norm", "BatchNorm", [(1, "")], inputs="9 x 8", output="9 x 8", parameters=16),
    layer("left", "Dense", [(2, "ReLU, max-pool")], inputs="3 x 8", output="3 x 2", parameters=18),
    layer("right", "Dense", [(2, "ReLU")], inputs="9 x 8", output="9 x 2", parameters=18),
    layer("product", "Join", [(3, ""), (4, "tanh")], inputs="9 x 2", output="9 x 2"),
    layer("output", "Output", [(5, "")], inputs="9 x 2", output="9 x 2"),
]


def test_a_network_is_drawn_with_its_shapes_and_branches(tmp_path, drawn):
    plots.architecture(tmp_path / "a.png", SMALL_NET, "")
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.texts if text.get_text()] == [
        *("0  input   9 x 4", "9 x 4"),
        *("1  conv", "Conv, 8 features, kernel 3", "1,104"),
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
    # Arrows: one each for six layers without the norm. A short bar begins that of the second branch.
    assert (
        len([text for text in axes.texts if hasattr(text, "arrow_patch") and text.arrow_patch]) == 5
    )
    assert len(axes.lines) == 1


@pytest.mark.parametrize("blocks", [1, 12, 40])
def test_long_networks_are_folded_and_stay_readable(tmp_path, drawn, blocks):
    layers = [layer("input", "Input", [], inputs="")]
    for block in range(blocks):
        path = f"encoder/stage{block}/a_long_name_of_a_block_{block}"
        settings = "64 features, kernel 7 x 7, stride 2 x 2, padding 3 x 3, groups 2, no bias"
        layers.append(
            layer(
                f"{path}/conv",
                "Conv",
                [(len(layers) - 1, "")],
                settings=settings,
                parameters=12_345_678,
            )
        )
        layers.append(
            layer(f"{path}/norm", "BatchNorm", [(len(layers) - 1, "")], parameters=12_345)
        )
        layers.append(layer("sum", "Join", [(len(layers) - 3, ""), (len(layers) - 1, "")]))
    layers.append(layer("output", "Output", [(len(layers) - 1, "")]))
    plots.architecture(tmp_path / "a.png", layers, "A network")
    figure = drawn[0]
    width, height = figure.get_size_inches()
    assert blocks == 1 or 0.5 < width / height < 2.5
    found = boxes(figure.axes[0].texts)
    # In a block: a shape, four texts in the convolution, three in the norm, two above the sum and its name.
    assert len(found) == 11 * blocks + 3
    assert overlap(found) == 0
    assert min(box.x0 for box in found) >= 0 and max(box.x1 for box in found) <= width * figure.dpi
    assert min(box.y0 for box in found) >= 0 and max(box.y1 for box in found) <= height * figure.dpi


def test_few_colours_look_the_same(tmp_path, monkeypatch):
    values = np.random.default_rng(0).uniform(-80, 0, (120, 32))
    panels = [
        plots.TimePanel(np.sin(np.arange(300.0)), 0.1),
        plots.TimePanel(values, 0.25, unit="dB"),
    ]
    plots.time_panels(tmp_path / "few.png", panels, "title")
    plots.time_panels(tmp_path / "again.png", panels, "title")
    save = plots.save
    monkeypatch.setattr(
        plots, "save", lambda figure, path, title, palette: save(figure, path, title)
    )
    plots.time_panels(tmp_path / "all.png", panels, "title")
    few, full = (
        np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"), int)
        for name in ("few", "all")
    )
    assert np.abs(few - full).max() <= 64 and np.abs(few - full).mean() < 2
    assert (tmp_path / "few.png").stat().st_size < 0.5 * (tmp_path / "all.png").stat().st_size
    assert (tmp_path / "few.png").read_bytes() == (tmp_path / "again.png").read_bytes()
