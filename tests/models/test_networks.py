"""What every network must do, on small versions of each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from musicgenre import models
from musicgenre.models.registry import input_limits, network_class
from musicgenre.training.transfer import layer_order

# Fields, frames and bands.
SMALL = {
    "alexnet": ({"filters": (4, 6, 4, 4, 2), "dense": (8, 8)}, 60, 57),
    "conv1d": ({"filters": (8, 8, 8), "dense": (16,)}, 240, 12),
    "conv2d": ({"filters": (4, 4, 4), "dense": (16,), "final_pool": 0}, 44, 43),
    "crnn": ({"filters": (2,) * 4, "units": (4, 4), "input_norm": "band"}, 200, 96),
    "fcn": ({"filters": (8, 16), "time_pools": (4, 4), "band_pools": (4, 4)}, 16, 16),
    "k1c2": (
        {"filters": (2, 2), "kernel_bands": (1, 1), "time_pools": (4, 4), "dense": (8,)},
        16,
        4,
    ),
    "k2c1": (
        {"filters": (2, 2), "kernel_bands": (0, 1), "time_pools": (4, 4), "dense": (8,)},
        16,
        4,
    ),
    "k2c2": ({"filters": (4, 8), "kernel_bands": (3, 3), "time_pools": (4, 4)}, 16, 4),
    "modulation": ({"regions": (2,), "windows": (8,), "groups": 3, "cepstra": 5}, 16, 12),
    "musicnn": (
        {"timbral_filters": 3, "temporal_filters": 2, "mid_filters": 4, "dense": 5},
        20,
        12,
    ),
    "rbm": ({"layers": (8, 4)}, 4, 3),
    "resnet": ({"filters": 8}, 20, 16),
    "sample_level": ({"first_filters": 8, "filters": (8, 8), "last_filters": 16}, 9, 9),
    "short_chunk": ({"filters": (4, 4), "dense": 8}, 9, 6),
    "spotify": ({"filters": (4, 4, 4, 6), "dense": (8, 8)}, 110, 6),
    "vgg": ({"filters": 2}, 70, 64),
}
for choi in ("k1c2", "k2c1", "k2c2"):
    SMALL[choi][0]["band_pools"] = (2, 2) if choi == "k2c2" else (1, 1)
# Variants whose code differs from the defaults'.
VARIANTS = [
    ("conv1d", {"pooling": "attention"}),
    ("conv1d", {"pooling": "mean_max", "widths": (2, 4), "batch_norm": True}),
    ("resnet", {"preactivation": False, "bottleneck": True}),
    ("sample_level", {"squeeze_excite": True}),
    ("short_chunk", {"residual": True}),
]
CASES = [(name, {}) for name in SMALL] + VARIANTS


def smallest_input(name, kind=""):
    """Frames, bands and type of a small input that the network takes with its default fields."""
    limits = input_limits(network_class(name))
    kind = kind or (limits.kinds[0] if limits.kinds else "logmel")
    bands = {"waveform": 729, "stft": 257, "mfcc": 20}.get(kind, 128)
    bands = (
        max(bands, limits.min_bands) if kind == "mfcc" else min(bands, limits.max_bands or bands)
    )
    return max(limits.min_frames, -(-limits.min_values // bands)), bands, kind


def test_every_network_has_a_small_version_here():
    built_in = {n for n, c in models.registered().items() if c.__module__.startswith("musicgenre.")}
    assert built_in == SMALL.keys()


@pytest.mark.parametrize("kind", ["", "logmel", "mfcc", "stft"])
@pytest.mark.parametrize("name", SMALL)
def test_the_defaults_honour_the_contract_for_every_type_of_features(name, kind):
    kinds = input_limits(network_class(name)).kinds
    if kind and kinds and kind not in kinds:
        assert kinds == ("waveform",)
        with pytest.raises(models.registry.UserError, match=f"of the type waveform, .* of {kind}"):
            models.build({"name": name}, num_classes=3, frames=647, bands=128, kind=kind)
        return
    frames, bands, kind = smallest_input(name, kind)
    module = models.build({"name": name}, num_classes=7, frames=frames, bands=bands, kind=kind)

    def run(x):
        variables = module.init(jax.random.key(0), x, train=False)
        return models.apply_model(module, variables, x), variables

    shape = jax.ShapeDtypeStruct((2, frames, bands), jnp.float32)
    (logits, embedding), variables = jax.eval_shape(run, shape)
    assert logits.shape == (2, 7) and logits.dtype == jnp.float32
    assert variables["params"]["head"]["kernel"].shape == (embedding.shape[1], 7)
    # Transfer replaces the last layer, whatever its name.
    assert layer_order(module, frames, bands)[-1] == "head"


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_bfloat16_keeps_float32_weights_and_nearly_the_logits(name, changes, check_bfloat16):
    fields, frames, bands = SMALL[name]
    check_bfloat16({"name": name, **fields, **changes}, frames, bands)


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_a_step_lowers_the_loss_of_its_batch_and_reaches_every_parameter(
    name, changes, filled, learn
):
    fields, frames, bands = SMALL[name]
    no_dropout = {f: 0.0 for f in models.resolve({"name": name}) if f.endswith("dropout")}
    no_dropout.pop("output_dropout", None)
    model = {"name": name, **fields, **changes, **no_dropout}
    module = models.build(model, num_classes=3, frames=frames, bands=bands)
    x = np.random.default_rng(1).standard_normal((6, frames, bands), np.float32)
    labels, loss = jnp.arange(6) % 3, optax.softmax_cross_entropy_with_integer_labels
    variables = filled(module, frames, bands)
    learned = learn(module, variables, x, labels, loss, rate=1e-4, steps=2)
    assert learned.losses[1] < learned.losses[0]
    gradients = jax.tree_util.tree_leaves_with_path(learned.first_gradients)
    assert all(np.isfinite(gradient).all() for _, gradient in gradients)
    still = [jax.tree_util.keystr(path) for path, g in gradients if not np.abs(g).max() > 0]
    assert still == []
