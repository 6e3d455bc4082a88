import numpy as np
import pytest
from PIL import Image

from musicgenre.evaluation.plots import TimePanel
from musicgenre.explain import plots as drawing
from musicgenre.explain.page import clock


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0:00.0"), (9.96, "0:10.0"), (59.97, "1:00.0"), (3725.04, "62:05.0")]
)
def test_times_are_in_minutes_and_seconds(seconds, words):
    assert clock(seconds) == words


def test_saliency_has_its_colours_where_its_values_are(tmp_path):
    values = np.zeros((60, 20), np.float32)
    values[10:20, 4:9], values[40:50, 12:17] = 1, -1
    quiet = np.full((60, 20), -80, np.float32)
    sound = TimePanel(quiet, 0.1, 0, "spectrogram", "Hz", {}, "dB", (-80, 0))
    line = np.sin(np.arange(600) / 20).astype(np.float32)
    panels = [drawing.MapPanel(values, "map", "logit"), drawing.MapPanel(line, "line", "logit")]
    drawing.saliency(tmp_path / "s.png", sound, panels, "title $x$")
    pixels = np.asarray(Image.open(tmp_path / "s.png").convert("RGB"), int)[:, :-160]
    # The map is the second of three panels; red evidence comes first, then blue.
    middle = pixels[int(0.42 * len(pixels)) : int(0.70 * len(pixels))]
    red, blue = (np.argwhere((middle[..., i] - middle[..., 2 - i]) > 90) for i in (0, 2))
    assert len(red) > 500 and len(blue) > 500
    assert red[:, 1].max() < blue[:, 1].min() and red[:, 0].min() > blue[:, 0].max()


def test_many_layers_and_filters_are_thinned_out(tmp_path, monkeypatch):
    drawn = []

    def save(figure, path, title, **options):
        drawn.append((figure, title))

    monkeypatch.setattr(drawing.plots, "save", save)
    generator = np.random.default_rng(0)
    layers = {f"layer{i}": generator.standard_normal(6) for i in range(89)}
    layers["layer89"] = generator.standard_normal((6, 4, 12))
    drawing.activations(tmp_path / "a.png", layers, "title", span=(0, 1))
    kernels = np.ones((70, 9, 3)) * np.arange(70)[:, None, None]
    drawing.filters(tmp_path / "f.png", kernels, "title", across="time", up="bands", yticks={})
    (figure, title), (filters, strongest) = drawn
    # 72 rows in three columns, the last row shows eight of its units.
    assert title == "title · 72 of 90 layers" and len(figure.axes) == 72
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert len(figure.axes[-1].texts) == 3 + 8
    assert texts[0] == "layer0" and "layer89" in texts
    assert figure.get_figwidth() < 27 and figure.get_figheight() < 19
    assert strongest == "title · the 64 strongest of 70"
    titles = [axes.get_title() for axes in filters.axes if axes.get_title()]
    assert titles == [str(number) for number in range(69, 5, -1)]
