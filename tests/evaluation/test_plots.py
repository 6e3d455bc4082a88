import struct

import numpy as np
import pytest
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


def axes_of(figure):
    """The axes of a figure after its layout."""
    figure.suptitle("title")
    figure.canvas.draw()
    return figure.axes


def words(texts):
    return [text.get_text() for text in texts]


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
    figure = plots.confusion_matrix(np.eye(classes, dtype=int), names)
    plots.save(figure, tmp_path / "a" / "c.png", "title $y")
    width, height = size(tmp_path / "a" / "c.png")
    assert width < 1900 and height < 1800
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["c.png"]


def test_confusion_matrix_has_numbers_up_to_25_classes():
    for classes in (10, 25, 26):
        figure = plots.confusion_matrix(np.ones((classes, classes), int), ["x"] * classes)
        assert len(figure.axes[0].texts) == (classes**2 if classes <= 25 else 0)
    axes = plots.confusion_matrix([[3, 1], [0, 0]], ["a", "b"]).axes[0]
    assert words(axes.texts) == ["75 %\n3", "25 %\n1", "", ""]
    assert words(axes.get_yticklabels()) == ["a  (4)", "b  (0)"]


def test_per_class_bars_keep_the_label_order_and_the_means_of_the_metrics():
    values = {"z": 0.2, "a": None, "m": 0.6}
    rows = [
        {"label": name, "support": i, "f1": f1, "roc_auc": f1}
        for i, (name, f1) in enumerate(values.items())
    ]
    metrics = {"accuracy": 0.5, "macro_f1": 0.4, "macro_roc_auc": None, "per_class": rows}
    axes, other = plots.per_class_bars(metrics).axes
    assert words(axes.get_yticklabels()) == ["z  (0)", "a  (1)", "m  (2)"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert words(axes.texts) == ["0.20", "n/a", "0.60"]
    assert axes.get_title() == "macro F1 0.400" and other.get_title() == ""


def test_learning_curves_mark_the_evaluated_step():
    rows = [{"step": 10, "train_loss": 2.0}, {"step": 20, "valid_loss": 1.5, "valid_accuracy": 0.4}]
    loss, accuracy = plots.learning_curves(rows, "accuracy", 20).axes
    assert [list(line.get_xdata()) for line in loss.lines] == [[10], [20], [20, 20]]
    assert list(accuracy.lines[0].get_ydata()) == [0.4]
    nothing = plots.learning_curves([{"step": 1}], "accuracy", None).axes
    assert [words(axes.texts) for axes in nothing] == [["not recorded"]] * 2


def test_the_coverage_curve_shows_the_numbers_of_the_table():
    confidence = np.linspace(0.2, 0.9, 60)
    found = risk_coverage(confidence, np.arange(60) % 4 > 0)
    [axes] = axes_of(plots.coverage_curve(found))
    [worst] = axes_of(plots.coverage_curve(risk_coverage(confidence, np.zeros(60))))
    assert list(axes.lines[0].get_ydata()) == found["curve"]["accuracy"]
    assert list(axes.lines[1].get_ydata()) == [0.75, 0.75]
    intervals = [segment[:, 1].tolist() for segment in axes.collections[0].get_segments()]
    assert intervals == [row["wilson"] for row in found["at"]]
    assert words(axes.texts) == [f"{100 * row['accuracy']:.1f} %" for row in found["at"]]
    for one in (axes, worst):
        # The legend and the axis cover nothing.
        legend = one.get_legend().get_window_extent()
        texts = boxes(one.texts)
        assert overlap([legend, *texts]) == 0 and min(box.y0 for box in texts) > 0
        lowest = min(min(line.get_ydata()) for line in one.lines)
        assert legend.y1 < one.transData.transform((0, lowest))[1] + 1


def test_reliability_and_roc_show_the_numbers_of_the_metrics():
    scores, truth = np.array([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]]), np.array([0, 1, 1])
    measured = single_label_metrics(scores, truth, ["a", "b"])
    top, below = plots.reliability_diagram(
        measured["reliability"], measured["ece"], "accuracy", "clips"
    ).axes
    full = [row for row in measured["reliability"] if row["n"]]
    curve = top.lines[-1] if len(top.lines[-1].get_xdata()) == 3 else top.lines[0]
    assert list(curve.get_ydata()) == [row["accuracy"] for row in full]
    assert sum(bar.get_height() for bar in below.patches) == 3
    axes = plots.roc_curves(scores, np.eye(2, dtype=int)[truth], ["a", "b"]).axes[0]
    areas = [f"{row['roc_auc']:.2f}  {row['label']}" for row in measured["per_class"]]
    assert words(axes.get_legend().get_texts()) == areas
    alone = plots.roc_curves(scores[:1], np.array([[1, 0]]), ["a", "b"]).axes[0]
    assert alone.get_legend() is None


def test_a_comparison_has_intervals_values_and_leaks():
    row = {"name": "a", "mean": 0.5, "interval": None, "values": [0.4, 0.6]}
    [axes] = plots.comparison_plot([row], "accuracy", percent=True).axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[40, 60], [50]]
    assert axes.get_xlabel() == "accuracy (%)" and not axes.collections
    leaks = {"clips": 4, "leaks": {"same clip": 1, "near-identical": 0, "same artist": 2}}
    rows = [row | leaks | {"interval": (0.3, 0.7)}]
    left, right = plots.comparison_plot(rows, "accuracy", percent=True).axes
    assert left.collections[0].get_segments()[0][:, 0].tolist() == [30, 70]
    assert [bar.get_width() for bar in right.patches] == [25, 0, 50]


def test_the_same_drawing_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        plots.save(plots.confusion_matrix([[3, 1], [0, 2]], ["x", "y"]), tmp_path / name, "title")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"c\.png"):
        plots.save(plots.new_figure(3, 3), tmp_path / "file" / "c.png", "title")


def test_labels_are_ordered_by_their_clips_and_splits_are_stacked():
    counts = {"train": [3, 10, 0], "test": [4, 1, 2]}
    names = ["a", "b $x$", "c"]
    by_count = plots.label_distribution(names, counts).axes[0]
    assert words(by_count.get_xticklabels()) == ["b $x$", "a", "c"]
    assert [bar.get_height() for bar in by_count.patches] == [10, 3, 0, 1, 4, 2]
    assert [bar.get_y() for bar in by_count.patches] == [0, 0, 0, 10, 3, 0]
    assert words(by_count.texts) == ["11", "7", "2"]
    assert words(by_count.get_legend().get_texts()) == ["train", "test"]
    assert by_count.get_ylabel() == "clips"
    given = plots.label_distribution(names, counts, by_count=False, most=2).axes[0]
    assert words(given.get_xticklabels()) == ["a", "b $x$"]
    assert [bar.get_height() for bar in given.patches] == [3, 10, 4, 1]


@pytest.mark.parametrize("labels", [2, 12, 13, 50, 80, 188])
def test_labels_never_cover_each_other(labels):
    names = [f"a longer label {i}" for i in range(labels)]
    counts = {"clips": np.arange(4000, 4000 + labels)}
    axes = axes_of(plots.label_distribution(names, counts, marked=50))[0]
    ticks = axes.get_xticklabels()
    assert words(ticks) == names[::-1]
    if ticks[0].get_rotation() == 90:  # the box of a slanted text says nothing
        assert overlap(boxes(ticks)) == 0
    assert overlap(boxes(axes.texts)) == 0
    assert len(axes.texts) == (labels if labels <= 60 else 0)
    assert min(box.y0 for box in boxes(ticks)) >= 0
    assert ticks[0].get_fontsize() >= 7


def test_marked_labels_have_their_own_colour():
    axes = plots.label_distribution(["a", "b", "c"], {"clips": [1, 3, 2]}, marked=2).axes[0]
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[0] == colours[1] != colours[2]
    assert words(axes.get_legend().get_texts()) == ["the 2 most frequent", "the other 1"]


def test_time_and_bands_of_a_spectrogram():
    values = np.linspace(-80, 0, 40 * 8).reshape(40, 8)
    values[0, 0] = -90.0
    ticks = {2.0: "250", 5.5: "1000"}
    names = ("mel", "frequency (Hz)", ticks, "dB", (-80.0, 0.0))
    wave = np.zeros(20_000)
    wave[7], wave[12_345] = 0.9, -0.8
    sound = plots.TimePanel(wave, 0.001, name="wave", ylabel="amplitude")
    panels = [sound, plots.TimePanel(values, 0.5, -0.25, *names)]
    line, image, bar = axes_of(plots.time_panels(panels))
    (picture,) = image.get_images()
    # Frames are centred on multiples of half a second, bands on integers.
    assert picture.get_extent() == [-0.25, 19.75, -0.5, 7.5]
    np.testing.assert_array_equal(picture.get_array(), values.T)
    assert picture.get_clim() == (-80, 0) and picture.origin == "lower"
    assert image.get_yticks().tolist() == [2.0, 5.5]
    assert words(image.get_yticklabels()) == ["250", "1000"]
    assert (image.get_ylabel(), image.get_xlabel()) == ("frequency (Hz)", "time (s)")
    assert line.get_ylabel() == "amplitude"
    assert image.get_xlim() == line.get_xlim() == (0, 19.75)
    assert bar.get_ylabel() == "dB" and picture.colorbar.extend == "min"
    # Few points, but no peak is lost, and each is where it was.
    x, y = line.lines[0].get_data()
    assert len(x) == 4000 and (y.max(), y.min()) == (0.9, -0.8)
    assert abs(x[y.argmin()] - 12.345) < 0.011 and abs(x[y.argmax()] - 0.007) < 0.011


def test_fewer_colours_look_the_same(tmp_path):
    values = np.random.default_rng(0).uniform(-80, 0, (120, 32))
    wave = plots.TimePanel(np.sin(np.arange(300.0)), 0.1)
    panels = [wave, plots.TimePanel(values, 0.25, unit="dB")]
    for name in ("few", "again", "all"):
        path = tmp_path / f"{name}.png"
        plots.save(plots.time_panels(panels), path, "title", palette=name != "all")
    few, full = (
        np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"), int)
        for name in ("few", "all")
    )
    assert np.abs(few - full).mean() < 2 and (np.abs(few - full) > 32).mean() < 1e-3
    assert (tmp_path / "few.png").stat().st_size < 0.5 * (tmp_path / "all.png").stat().st_size
    assert (tmp_path / "few.png").read_bytes() == (tmp_path / "again.png").read_bytes()
