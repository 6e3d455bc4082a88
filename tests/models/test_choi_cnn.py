import jax
import numpy as np
import pytest

from musicgenre import models
from musicgenre.errors import UserError
from musicgenre.models.choi_cnn import CHOI_SIZES

NAMES = ("k1c2", "k2c1", "k2c2")


def build(name, frames=1366, bands=96, **fields):
    return models.build({"name": name, **fields}, num_classes=50, frames=frames, bands=bands)


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_sizes(name, parameter_count):
    assert list(CHOI_SIZES[name]) == ["0.1M", "0.25M", "0.5M", "1M", "3M"]
    for label, fields in CHOI_SIZES[name].items():
        assert parameter_count(build(name, **fields), 1366, 96) == pytest.approx(
            float(label[:-1]) * 1e6, rel=0.04
        )
    half_a_million = parameter_count(build(name, **CHOI_SIZES[name]["0.5M"]), 1366, 96)
    assert parameter_count(build(name), 1366, 96) == half_a_million == pytest.approx(5e5, rel=0.007)


def test_the_counts_worked_by_hand(parameter_count):
    # Kernels, a scale and a bias for each filter, the dense layers, the head.
    narrow = 4 * (35 + 35 * 35 + 35 * 69 + 69 * 69) + 2 * (35 + 35 + 69 + 69)
    assert parameter_count(build("k1c2"), 1366, 96) == narrow + (96 * 69 * 69 + 69) + (
        69 * 69 + 69
    ) + (69 * 50 + 50)
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
    for name, fields in (
        ("k1c2", {"filters": (2, 2, 2, 2)}),
        ("k2c1", {"filters": (2, 2, 2, 2, 2)}),
    ):
        module = build(name, 1280, 6, **fields)
        x = jax.random.normal(jax.random.key(0), (1, 1280, 6))
        variables = filled(module, 1280, 6)
        run = jax.jit(
            lambda x, module=module, variables=variables: layer_outputs(module, variables, x)
        )
        last = f"dropout{len(fields['filters'])}"
        before, after = (np.asarray(run(v)[last]) for v in (x, x.at[:, :, 2].add(1.0)))
        changed = np.abs(after - before).max(axis=(0, 1, 3)) > 1e-6
        assert changed.tolist() == (
            [False, False, True, False, False, False] if name == "k1c2" else [True]
        )


@pytest.mark.parametrize(("name", "bands"), [("k1c2", 1), ("k2c1", 1), ("k2c2", 96)])
def test_the_smallest_input_runs_and_one_below_is_refused(name, bands, check_runs):
    with pytest.raises(
        UserError, match=rf"at least 1280 frames, but its input is 1279 frames x {bands} bands"
    ):
        build(name, 1279, bands)
    filters = {"filters": (2,) * len(CHOI_SIZES[name]["1M"]["filters"])}
    check_runs(build(name, 1280, bands, **filters), (2, 1280, bands), (2, 50))
    if bands > 1:
        with pytest.raises(UserError, match=r"at least 96 bands.*1280 frames x 95 bands"):
            build(name, 1280, 95)


def test_fields_that_do_not_go_together_are_named():
    with pytest.raises(UserError, match=r"'k2c2'.*model.filters=\(8,\)"):
        build("k2c2", filters=(8,))
    with pytest.raises(
        UserError, match=r"model.band_pools must be 1 from the convolution on that covers all bands"
    ):
        build("k2c1", band_pools=(1, 1, 2, 1, 1))
