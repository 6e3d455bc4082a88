import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicgenre import models
from musicgenre.errors import UserError
from musicgenre.models.choi_cnn import CHOI_SIZES

NAMES = ("k1c2", "k2c1", "k2c2")


def build(name, frames=1366, bands=96, **fields):
    return models.build({"name": name, **fields}, num_classes=50, frames=frames, bands=bands)


def size(module):
    init = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 1366, 96)), train=False))
    return sum(leaf.size for leaf in jax.tree.leaves(init["params"]))


def layers(module, variables, x):
    return module.apply(variables, x, train=False, capture_intermediates=True, mutable=["intermediates"])[1]["intermediates"]


def filled(module, frames, bands, seed=0):
    """Variables of random numbers, so that every bias and normalisation does something; kernels are scaled by their inputs."""
    x = jnp.zeros((1, frames, bands))
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False))
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 2.0, leaf.shape).astype(np.float32)
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.3
        return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, variables)


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_sizes(name):
    assert list(CHOI_SIZES[name]) == ["0.1M", "0.25M", "0.5M", "1M", "3M"]
    for label, fields in CHOI_SIZES[name].items():
        assert size(build(name, **fields)) == pytest.approx(float(label[:-1]) * 1e6, rel=0.04)
    assert size(build(name)) == size(build(name, **CHOI_SIZES[name]["0.5M"])) == pytest.approx(5e5, rel=0.007)


def test_the_counts_worked_by_hand():
    # Kernels, a scale and a bias for each filter, the dense layers, the head.
    narrow = 4 * (35 + 35 * 35 + 35 * 69 + 69 * 69) + 2 * (35 + 35 + 69 + 69)
    assert size(build("k1c2")) == narrow + (96 * 69 * 69 + 69) + (69 * 69 + 69) + (69 * 50 + 50)
    tall = 4 * 96 * 106 + 4 * (106 * 106 * 2 + 106 * 212 + 212 * 212) + 2 * (3 * 106 + 2 * 212)
    assert size(build("k2c1")) == tall + 2 * (212 * 212 + 212) + 212 * 50 + 50
    square = 9 * (47 + 47 * 95 + 95 * 95 + 95 * 142 + 142 * 190) + 2 * (47 + 95 + 95 + 142 + 190)
    assert size(build("k2c2")) == square + 190 * 50 + 50


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("k1c2", [(341, 96, 35), (68, 96, 35), (8, 96, 69), (1, 96, 69)]),
        ("k2c1", [(341, 1, 106), (85, 1, 106), (21, 1, 106), (4, 1, 212), (1, 1, 212)]),
        ("k2c2", [(341, 48, 47), (85, 24, 95), (21, 12, 95), (4, 4, 142), (1, 1, 190)]),
    ],
)
def test_every_shape(name, expected):
    module = build(name)
    x = jnp.zeros((1, 1366, 96))
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False))
    seen = jax.eval_shape(lambda v: layers(module, v, x), variables)
    assert [seen[f"dropout{i}"]["__call__"][0].shape[1:] for i in range(1, len(expected) + 1)] == expected
    assert seen["embedding"][0].shape == (1, {"k1c2": 69, "k2c1": 212, "k2c2": 190}[name])


def test_what_a_change_of_one_band_reaches():
    """In k1c2 its own band alone; in k2c1 the one that is left."""
    for name, fields in (("k1c2", {"filters": (2, 2, 2, 2)}), ("k2c1", {"filters": (2, 2, 2, 2, 2)})):
        module = build(name, 1280, 6, **fields)
        x = jax.random.normal(jax.random.key(0), (1, 1280, 6))
        variables = filled(module, 1280, 6)
        run = jax.jit(lambda x, module=module, variables=variables: layers(module, variables, x))
        last = f"dropout{len(fields['filters'])}"
        before, after = (np.asarray(run(v)[last]["__call__"][0]) for v in (x, x.at[:, :, 2].add(1.0)))
        changed = np.abs(after - before).max(axis=(0, 1, 3)) > 1e-6
        assert changed.tolist() == ([False, False, True, False, False, False] if name == "k1c2" else [True])


@pytest.mark.parametrize(("name", "bands"), [("k1c2", 1), ("k2c1", 1), ("k2c2", 96)])
def test_the_smallest_input_runs_and_one_below_is_refused(name, bands):
    with pytest.raises(UserError, match=rf"at least 1280 frames, but its input is 1279 frames x {bands} bands"):
        build(name, 1279, bands)
    filters = {"filters": (2,) * len(CHOI_SIZES[name]["1M"]["filters"])}
    module = build(name, 1280, bands, **filters)
    logits = jax.jit(lambda v, x: module.apply(v, x))(filled(module, 1280, bands), jnp.ones((2, 1280, bands)))
    assert logits.shape == (2, 50) and np.isfinite(logits).all()
    if bands > 1:
        with pytest.raises(UserError, match=r"at least 96 bands.*1280 frames x 95 bands"):
            build(name, 1280, 95)


def test_fields_that_do_not_go_together_are_named():
    with pytest.raises(UserError, match=r"'k2c2'.*model.filters=\(8,\)"):
        build("k2c2", filters=(8,))
    with pytest.raises(UserError, match=r"model.band_pools must be 1 from the convolution on that sees all bands"):
        build("k2c1", band_pools=(1, 1, 2, 1, 1))
