import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicgenre import models
from musicgenre.errors import UserError
from musicgenre.models.layers import avg_pool_time, max_pool_time

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


@pytest.mark.parametrize("name", list(models.registered()))
def test_every_model_honours_the_contract(name):
    module = models.build({"name": name}, num_classes=7, frames=647, bands=128)
    x = jax.random.normal(jax.random.key(0), (3, 647, 128))
    variables = module.init(jax.random.key(1), x, train=False)
    logits, embedding = models.apply_model(module, {k: v for k, v in variables.items() if k != "intermediates"}, x)
    assert logits.shape == (3, 7) and logits.dtype == jnp.float32
    assert embedding.ndim == 2 and len(embedding) == 3
    half = models.build({"name": name}, num_classes=7, frames=647, bands=128, dtype="bfloat16")
    out, _ = models.apply_model(half, {k: v for k, v in variables.items() if k != "intermediates"}, x)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, logits, atol=0.2)


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
        ({"name": "conv1d", "filtres": (1,)}, "model.filtres is not a field of the model 'conv1d'. Did you mean 'filters'"),
        ({"name": "conv1d", "width": "wide"}, "model.width of 'conv1d' must be int like 4, not 'wide'"),
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
    np.testing.assert_allclose(avg_pool_time(x, window), nn.avg_pool(x, (window,), (window,)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("frames", "window"), [(97, 2), (81, 2), (24, 4), (33, 3)])
def test_pool_gradients_equal_flax_after_batch_norm_at_real_width(frames, window):
    """At 128 channels after normalisation, where a reduction over a reshaped axis goes wrong under jit."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), (8, frames, 128), jnp.float64)

        def loss(pool, x, scale):
            normal = (x - x.mean((0, 1))) / jnp.sqrt(x.var((0, 1)) + 1e-5) * scale
            return (pool(nn.relu(normal)) ** 2 * jnp.arange(128)).sum()

        scale = jnp.linspace(0.5, 2.0, 128)
        ours = jax.jit(jax.grad(lambda x, s: loss(lambda v: max_pool_time(v, window), x, s), (0, 1)))(x, scale)
        flax = jax.jit(jax.grad(lambda x, s: loss(lambda v: nn.max_pool(v, (window,), (window,)), x, s), (0, 1)))(x, scale)
        ours, flax = jax.tree.map(np.asarray, (ours, flax))
        single = jax.jit(jax.grad(lambda x, s: loss(lambda v: max_pool_time(v, window), x, s), (0, 1)))(
            x.astype(jnp.float32), scale.astype(jnp.float32)
        )
    for one, other, low in zip(ours, flax, single, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9 * np.abs(other).max())
        assert np.linalg.norm(low - other) < 1e-4 * np.linalg.norm(other)
