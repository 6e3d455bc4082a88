import struct

import numpy as np
import pytest

from musicgenre.errors import UserError
from musicgenre.evaluation import plots
from musicgenre.evaluation.metrics import single_label_metrics


def size(path):
    """Width and height of a PNG file, from its header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("classes", [1, 2, 10, 26, 50])
def test_confusion_matrix_of_any_size(tmp_path, classes):
    names = [f"genre $x$ {i}" for i in range(classes)]
    plots.confusion_matrix(tmp_path / "a" / "c.png", np.eye(classes, dtype=int), names, "title $y")
    width, height = size(tmp_path / "a" / "c.png")
    assert width < 1900 and height < 1800
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["c.png"]


def test_confusion_matrix_has_numbers_up_to_25_classes(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path, title: drawn.append(len(figure.axes[0].texts)))
    for classes in (10, 25, 26):
        plots.confusion_matrix(tmp_path / "c.png", np.ones((classes, classes), int), ["x"] * classes, "")
    assert drawn == [100, 625, 0]


def test_per_class_bars_keep_the_label_order(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path, title: figures.append(figure))
    plots.per_class_bars(tmp_path / "b.png", ["z", "a", "m"], {"F1": [0.2, None, 0.6]}, [3, 0, 5], "")
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["z  (3)", "a  (0)", "m  (5)"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert [text.get_text() for text in axes.texts] == ["0.20", "n/a", "0.60"]
    assert axes.get_title() == "F1, mean 0.400"


def test_learning_curves_mark_the_evaluated_step(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path, title: figures.append(figure))
    rows = [{"step": 10, "train_loss": 2.0}, {"step": 20, "valid_loss": 1.5, "valid_accuracy": 0.4}]
    plots.learning_curves(tmp_path / "l.png", rows, "", evaluated_step=20)
    loss, accuracy = figures[0].axes
    assert [list(line.get_xdata()) for line in loss.lines] == [[10], [20], [20, 20]]
    assert list(accuracy.lines[0].get_ydata()) == [0.4]


def test_the_other_figures_are_drawn(tmp_path):
    scores = np.array([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]])
    measured = single_label_metrics(scores, np.array([0, 1, 1]), ["a", "b"])
    plots.reliability_diagram(tmp_path / "r.png", measured["reliability"], measured["ece"], "title")
    plots.roc_curves(tmp_path / "o.png", scores, np.eye(2, dtype=int)[[0, 1, 1]], ["a", "b"], "title")
    plots.roc_curves(tmp_path / "p.png", scores[:1], np.array([[1, 0]]), ["a", "b"], "one clip")
    plots.learning_curves(tmp_path / "l.png", [{"step": 1, "learning_rate": 0.1}], "nothing recorded")
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
