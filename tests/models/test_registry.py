import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicgenre import models
from musicgenre.errors import UserError
from musicgenre.models.layers import avg_pool_time, global_max, max_pool, max_pool_time
from musicgenre.models.registry import input_limits
from musicgenre.training.transfer import layer_order

OWN = """
import flax.linen as nn
from musicgenre.models import register

@register("my_net")
class MyNet(nn.Module):
    num_classes: int
    width: int = 4

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(self.width)(x.mean(axis=1)))
        self.sow("intermediates", "embedding", x)
        return nn.Dense(self.num_classes)(x)
"""


def smallest_input(name, kind=""):
    """Frames, bands and kind of a small input that the model takes with its default fields."""
    cls = models.registered()[name]
    limits = input_limits(cls)
    kind = kind or (limits.kinds[0] if limits.kinds else "logmel")
    bands = {"waveform": 729, "stft": 257, "mfcc": 20}.get(kind, 128)
    bands = (
        max(bands, limits.min_bands) if kind == "mfcc" else min(bands, limits.max_bands or bands)
    )
    return max(limits.min_frames, -(-limits.min_values // bands)), bands, kind


@pytest.mark.parametrize("name", list(models.registered()))
def test_every_model_honours_the_contract(name):
    frames, bands, kind = smallest_input(name)
    module = models.build({"name": name}, num_classes=7, frames=frames, bands=bands, kind=kind)
    x = jax.random.normal(jax.random.key(0), (2, frames, bands))
    variables = jax.jit(lambda x: module.init(jax.random.key(1), x, train=False))(x)
    variables = {k: v for k, v in variables.items() if k != "intermediates"}
    logits, embedding = jax.jit(lambda v, x: models.apply_model(module, v, x))(variables, x)
    assert logits.shape == (2, 7) and logits.dtype == jnp.float32
    assert embedding.ndim == 2 and len(embedding) == 2 and np.isfinite(embedding).all()
    assert variables["params"]["head"]["kernel"].shape == (embedding.shape[1], 7)
    # Transfer renews the last layer, whatever its name.
    assert layer_order(module, frames, bands)[-1] == "head"
    # In bfloat16, which keeps the parameters' type.
    half = models.build(
        {"name": name}, num_classes=7, frames=frames, bands=bands, kind=kind, dtype="bfloat16"
    )
    out, _ = jax.jit(lambda v, x: models.apply_model(half, v, x))(variables, x)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(
        out, logits, atol=0.05 * max(1.0, float(np.abs(logits).max())) + 0.05
    )


@pytest.mark.parametrize("kind", ["logmel", "mfcc", "stft"])
@pytest.mark.parametrize("name", list(models.registered()))
def test_every_spectral_input_serves_every_model(name, kind):
    cls = models.registered()[name]
    kinds = input_limits(cls).kinds
    if kinds and kind not in kinds:
        assert kinds == ("waveform",)
        with pytest.raises(
            UserError, match=f"needs .*features of the kind waveform, but its input is .* of {kind}"
        ):
            models.build({"name": name}, num_classes=3, frames=647, bands=128, kind=kind)
        return
    frames, bands, _ = smallest_input(name, kind)
    module = models.build({"name": name}, num_classes=3, frames=frames, bands=bands, kind=kind)
    shape = jax.ShapeDtypeStruct((2, frames, bands), jnp.float32)
    logits = jax.eval_shape(
        lambda x: module.init_with_output(jax.random.key(0), x, train=False)[0], shape
    )
    assert logits.shape == (2, 3)


def test_a_users_own_module_needs_no_edit_here(tmp_path, monkeypatch):
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "my_net.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    resolved = models.resolve({"name": "conv1d", "module": "my_pkg.my_net", "width": 8})
    assert resolved == {"name": "my_net", "module": "my_pkg.my_net", "width": 8}
    module = models.build(resolved, num_classes=3, frames=10, bands=5)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 10, 5)), train=False)
    assert variables["params"]["Dense_0"]["kernel"].shape == (5, 8)
    with pytest.raises(UserError, match="has no field dtype"):
        models.build(resolved, num_classes=3, frames=10, bands=5, dtype="bfloat16")
    sys.modules.pop("my_pkg.my_net")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "conv1"}, "no model 'conv1'. Did you mean 'conv1d'"),
        (
            {"name": "conv1d", "filtres": (1,)},
            "model.filtres is not a field of the model 'conv1d'. Did you mean 'filters'",
        ),
        (
            {"name": "conv1d", "width": "wide"},
            "model.width of 'conv1d' must be int like 4, not 'wide'",
        ),
        ({"name": "conv1d", "batch_norm": 1}, "model.batch_norm of 'conv1d' must be bool"),
        ({"name": "conv1d", "filters": (1.5,)}, "model.filters of 'conv1d' must be tuple"),
        ({"name": "x", "module": "no.such.module"}, "model.module='no.such.module': no module"),
        ({"name": "x", "module": "json"}, "registers no model"),
    ],
)
def test_mistakes_name_the_field_and_the_nearest_one(model, message):
    with pytest.raises(UserError, match=message):
        models.build(model, num_classes=2, frames=647, bands=128)


def test_a_name_is_taken_only_once():
    class Other(nn.Module):
        num_classes: int

    with pytest.raises(ValueError, match="two models are registered as 'conv1d'"):
        models.register("conv1d")(Other)


@pytest.mark.parametrize("window", [2, 3, 4, 5])
def test_pools_equal_flax(window):
    x = jax.random.normal(jax.random.key(0), (2, 23, 6))
    np.testing.assert_array_equal(max_pool_time(x, window), nn.max_pool(x, (window,), (window,)))
    np.testing.assert_allclose(
        avg_pool_time(x, window), nn.avg_pool(x, (window,), (window,)), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(("frames", "window"), [(97, 2), (81, 2), (24, 4), (33, 3)])
def test_pool_gradients_equal_flax_after_batch_norm_at_real_width(frames, window):
    """At 128 channels after normalisation, where a reduction over a reshaped axis goes wrong under jit."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), (8, frames, 128), jnp.float64)

        def loss(pool, x, scale):
            normal = (x - x.mean((0, 1))) / jnp.sqrt(x.var((0, 1)) + 1e-5) * scale
            return (pool(nn.relu(normal)) ** 2 * jnp.arange(128)).sum()

        scale = jnp.linspace(0.5, 2.0, 128)
        ours = jax.jit(
            jax.grad(lambda x, s: loss(lambda v: max_pool_time(v, window), x, s), (0, 1))
        )(x, scale)
        flax = jax.jit(
            jax.grad(
                lambda x, s: loss(lambda v: nn.max_pool(v, (window,), (window,)), x, s), (0, 1)
            )
        )(x, scale)
        ours, flax = jax.tree.map(np.asarray, (ours, flax))
        single = jax.jit(
            jax.grad(lambda x, s: loss(lambda v: max_pool_time(v, window), x, s), (0, 1))
        )(x.astype(jnp.float32), scale.astype(jnp.float32))
    for one, other, low in zip(ours, flax, single, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9 * np.abs(other).max())
        assert np.linalg.norm(low - other) < 1e-4 * np.linalg.norm(other)


@pytest.mark.parametrize("window", [(2, 2), (3, 4), (4, 1), (1, 5), (7, 11)])
def test_pools_over_frames_and_bands_equal_flax(window):
    x = jax.random.normal(jax.random.key(0), (2, 23, 11, 6))
    np.testing.assert_array_equal(max_pool(x, window), nn.max_pool(x, window, window))


@pytest.mark.parametrize("extent", [(1, 1), (2, 1), (5, 3), (8, 4), (13, 7)])
def test_the_global_maximum_equals_flax(extent):
    x = jax.random.normal(jax.random.key(0), (2, *extent, 6))
    np.testing.assert_array_equal(global_max(x), nn.max_pool(x, extent)[:, 0, 0])


@pytest.mark.parametrize("window", [(2, 2), (3, 4), (4, 1)])
def test_of_equal_maxima_the_first_gets_the_gradient(window):
    # Few different values, so that most windows hold their maximum more than once.
    x = jax.random.randint(jax.random.key(0), (2, 13, 9, 3), 0, 3).astype(jnp.float32)
    weights = jax.random.normal(jax.random.key(1), nn.max_pool(x, window, window).shape)
    ours, flax = (
        jax.jit(jax.grad(lambda x, pool=pool: (pool(x) * weights).sum()))(x)
        for pool in (lambda v: max_pool(v, window), lambda v: nn.max_pool(v, window, window))
    )
    np.testing.assert_array_equal(ours, flax)
    # In the global maximum one of them gets it, and all of it.
    gradient = np.asarray(jax.jit(jax.grad(lambda x: global_max(x).sum()))(x)).reshape(2, -1, 3)
    assert (np.count_nonzero(gradient, axis=1) == 1).all() and gradient.sum() == 6


@pytest.mark.parametrize(
    ("frames", "bands", "window"),
    [(23, 9, (2, 2)), (20, 15, (4, 5)), (17, 8, (8, 4)), (15, 7, None), (6, 4, None)],
)
def test_gradients_over_frames_and_bands_equal_flax_after_batch_norm_at_real_width(
    frames, bands, window
):
    """As above, in two dimensions; None stands for the global maximum."""
    whole = (frames, bands)
    ours = global_max if window is None else lambda v: max_pool(v, window)
    flax = (
        (lambda v: nn.max_pool(v, whole)[:, 0, 0])
        if window is None
        else lambda v: nn.max_pool(v, window, window)
    )
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), (4, frames, bands, 128), jnp.float64)
        scale = jnp.linspace(0.5, 2.0, 128)

        def loss(pool, x, scale):
            normal = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5) * scale
            return (pool(nn.relu(normal)) ** 2 * jnp.arange(128)).sum()

        def gradients(pool, *arguments):
            return jax.tree.map(
                np.asarray, jax.jit(jax.grad(lambda x, s: loss(pool, x, s), (0, 1)))(*arguments)
            )

        double, reference = gradients(ours, x, scale), gradients(flax, x, scale)
        single = gradients(ours, x.astype(jnp.float32), scale.astype(jnp.float32))
    for one, other, low in zip(double, reference, single, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9 * np.abs(other).max())
        assert np.linalg.norm(low - other) < 1e-4 * np.linalg.norm(other)
