import jax
import numpy as np
import pytest

from musicgenre import models
from musicgenre.models.choi_cnn import CHOI_SIZES

NAMES = ("k1c2", "k2c1", "k2c2")


def build(name, frames=1366, bands=96, **fields):
    return models.build({"name": name, **fields}, num_classes=50, frames=frames, bands=bands)


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_sizes(name, parameter_count):
    assert list(CHOI_SIZES[name]) == ["0.1M", "0.25M", "0.5M", "1M", "3M"]
    for label, fields in CHOI_SIZES[name].items():
        expected = pytest.approx(float(label[:-1]) * 1e6, rel=0.04)
        assert parameter_count(build(name, **fields), 1366, 96) == expected
    half_a_million = parameter_count(build(name, **CHOI_SIZES[name]["0.5M"]), 1366, 96)
    assert parameter_count(build(name), 1366, 96) == half_a_million == pytest.approx(5e5, rel=0.007)


def test_the_counts_worked_by_hand(parameter_count):
    # Kernels, a scale and a bias for each filter, the dense layers, the head.
    narrow = 4 * (35 + 35 * 35 + 35 * 69 + 69 * 69) + 2 * (35 + 35 + 69 + 69)
    dense = (96 * 69 * 69 + 69) + (69 * 69 + 69) + (69 * 50 + 50)
    assert parameter_count(build("k1c2"), 1366, 96) == narrow + dense
    tall = 4 * 96 * 106 + 4 * (106 * 106 * 2 + 106 * 212 + 212 * 212) + 2 * (3 * 106 + 2 * 212)
    assert parameter_count(build("k2c1"), 1366, 96) == tall + 2 * (212 * 212 + 212) + 212 * 50 + 50
    square = 9 * (47 + 47 * 95 + 95 * 95 + 95 * 142 + 142 * 190) + 2 * (47 + 95 + 95 + 142 + 190)
    assert parameter_count(build("k2c2"), 1366, 96) == square + 190 * 50 + 50


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("k1c2", [(341, 96, 35), (68, 96, 35), (8, 96, 69), (1, 96, 69)]),
        ("k2c1", [(341, 1, 106), (85, 1, 106), (21, 1, 106), (4, 1, 212), (1, 1, 212)]),
        ("k2c2", [(341, 48, 47), (85, 24, 95), (21, 12, 95), (4, 4, 142), (1, 1, 190)]),
    ],
)
def test_every_shape(name, expected, layer_shapes):
    seen = layer_shapes(build(name), 1366, 96)
    assert [seen[f"dropout{i}"][1:] for i in range(1, len(expected) + 1)] == expected
    assert seen["embedding"] == (2, {"k1c2": 69, "k2c1": 212, "k2c2": 190}[name])


def test_what_a_change_of_one_band_reaches(filled, layer_outputs):
    """In k1c2 its own band alone; in k2c1 the one that is left."""
    own = [False, False, True, False, False, False]
    run = jax.jit(layer_outputs, static_argnums=0)
    for name, layers, expected in (("k1c2", 4, own), ("k2c1", 5, [True])):
        module = build(name, 1280, 6, filters=(2,) * layers)
        x = jax.random.normal(jax.random.key(0), (1, 1280, 6))
        variables = filled(module, 1280, 6)
        inputs = (x, x.at[:, :, 2].add(1.0))
        before, after = (run(module, variables, v)[f"dropout{layers}"] for v in inputs)
        assert (np.abs(after - before).max(axis=(0, 1, 3)) > 1e-6).tolist() == expected
