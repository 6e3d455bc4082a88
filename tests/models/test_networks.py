"""What every network must do, on small versions of each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from musicgenre import models
from musicgenre.errors import UserError
from musicgenre.models.fcn import FCN_SIZES
from musicgenre.models.registry import input_limits, network_class
from musicgenre.training.transfer import layer_order

CHOI = dict(filters=(2, 2), kernel_bands=(1, 1), time_pools=(4, 4), band_pools=(1, 1), dense=(8,))
ALEXNET = dict(filters=(4, 6, 4, 4, 2), dense=(8, 8))
MUSICNN = dict(timbral_filters=3, temporal_filters=2, mid_filters=4, dense=5)
SAMPLES = dict(first_filters=8, filters=(8, 8), last_filters=16)
# Fields, frames and bands.
SMALL = {
    "alexnet": (ALEXNET, 60, 57),
    "conv1d": (dict(filters=(8, 8, 8), dense=(16,)), 240, 12),
    "conv2d": (dict(filters=(4, 4, 4), dense=(16,), final_pool=0), 44, 43),
    "crnn": (dict(filters=(2,) * 4, units=(4, 4), input_norm="band"), 200, 96),
    "fcn": (dict(filters=(8, 16), time_pools=(4, 4), band_pools=(4, 4)), 16, 16),
    "k1c2": (CHOI, 16, 4),
    "k2c1": (CHOI | {"kernel_bands": (0, 1)}, 16, 4),
    "k2c2": (CHOI | dict(filters=(4, 8), kernel_bands=(3, 3), band_pools=(2, 2), dense=()), 16, 4),
    "modulation": (dict(regions=(2,), windows=(8,), groups=3, cepstra=5), 16, 12),
    "musicnn": (MUSICNN, 20, 12),
    "rbm": (dict(layers=(8, 4)), 4, 3),
    "resnet": (dict(filters=8), 20, 16),
    "sample_level": (SAMPLES, 9, 9),
    "short_chunk": (dict(filters=(4, 4), dense=8), 9, 6),
    "spotify": (dict(filters=(4, 4, 4, 6), dense=(8, 8)), 110, 6),
    "vgg": (dict(filters=2), 70, 64),
}
# Variants that run other code than the defaults.
VARIANTS = [
    ("conv1d", {"pooling": "attention"}),
    ("conv1d", {"pooling": "mean_max", "widths": (2, 4), "batch_norm": True}),
    ("resnet", {"preactivation": False, "bottleneck": True}),
    ("sample_level", {"squeeze_excite": True}),
    ("short_chunk", {"residual": True}),
]
CASES = [(name, {}) for name in SMALL] + VARIANTS
# The smallest inputs that a network takes; worked by hand where it pools.
SMALLEST = [
    # One last window: 3, then 2 x 2 + 3 = 7, 6 x 2 + 3 = 15, 14 x 4 + 1 = 57.
    ("alexnet", ALEXNET, 57, 57),
    ("conv1d", dict(filters=(2, 2, 2), dense=(4,)), 235, 3),
    # 43 frames leave 22, 11, 6, 3, 2 and 1.
    *[("conv1d", dict(filters=(2, 2, 2), pooling=p), 43, 3) for p in ("mean", "attention")],
    ("conv2d", dict(filters=(2, 2, 2), dense=(4,)), 235, 43),
    ("conv2d", dict(filters=(2, 2, 2), dense=(), final_pool=0), 43, 43),
    # 22 + 2 x 37 = 96 = 2 x 3 x 4 x 4.
    *[("crnn", dict(filters=(2, 2, 2, 2), input_norm=norm), 22, 96) for norm in ("band", "none")],
    ("fcn", dict(filters=(2, 2, 2, 2)), 1280, 96),
    ("k1c2", dict(filters=(2,) * 4), 1280, 1),
    ("k2c1", dict(filters=(2,) * 5), 1280, 1),
    ("k2c2", dict(filters=(2,) * 5), 1280, 96),
    ("modulation", dict(hidden=(4,)), 64, 32),
    ("modulation", dict(regions=(1,), windows=(2,), groups=0, cepstra=0, hidden=(4,)), 2, 1),
    # Two tenths of fewer than five bands is no band at all; one frame is enough.
    ("musicnn", MUSICNN | {"timbral_heights": (0.2, 0.7)}, 1, 5),
    ("musicnn", MUSICNN, 1, 3),
    *[("rbm", dict(layers=layers), 1, 1) for layers in ((4,), (), (2, 2, 2))],
    *[("resnet", dict(filters=2, preactivation=p), 1, 1) for p in (False, True)],
    ("sample_level", SAMPLES, 27, 1),
    ("sample_level", SAMPLES, 9, 3),
    ("short_chunk", dict(filters=(2,) * 7), 128, 128),
    ("short_chunk", dict(filters=(2,) * 7, residual=True), 1, 1),
    # One last position: 4, then 4 x 2 + 3 = 11, 11 x 2 + 3 = 25, 25 x 4 + 3 = 103.
    ("spotify", dict(filters=(4, 4, 4, 6), dense=(8, 8)), 103, 1),
    ("vgg", dict(filters=2), 66, 63),
]
REFUSED = [
    ("alexnet", {}, 56, 57, "at least 57 frames, but"),
    ("alexnet", {}, 57, 56, "at least 57 bands, but"),
    ("conv1d", {}, 234, 128, "at least 235 frames.*234 frames x 128 bands"),
    *[("conv1d", {"pooling": p}, 42, 3, "at least 43 frames") for p in ("mean", "mean_max")],
    ("conv2d", {}, 234, 43, "at least 235 frames.*234 frames x 43 bands"),
    ("conv2d", {}, 235, 42, "at least 43 bands.*235 frames x 42 bands"),
    ("crnn", {}, 1365, 96, "exactly 1366 frames, but its input is 1365 frames x 96 bands"),
    ("crnn", {}, 1367, 96, "exactly 1366 frames, but its input is 1367 frames x 96 bands"),
    ("crnn", {}, 1366, 95, "at least 96 bands.*1366 frames x 95 bands"),
    *[("crnn", {"input_norm": n}, 21, 96, "at least 22 frames") for n in ("band", "none")],
    ("fcn", {}, 1279, 95, "at least 1280 frames and at least 96 bands.*1279 frames x 95 bands"),
    ("fcn", FCN_SIZES["report"], 599, 128, "at least 600 frames.*599 frames x 128 bands"),
    *[(name, {}, 1279, 96, "at least 1280 frames") for name in ("k1c2", "k2c1", "k2c2")],
    ("k2c2", {}, 1280, 95, "at least 96 bands.*1280 frames x 95 bands"),
    ("modulation", {}, 63, 128, "at least 64 frames.*63 frames x 128 bands"),
    ("modulation", {}, 64, 31, "at least 32 bands.*64 frames x 31 bands"),
    ("musicnn", {"timbral_heights": (0.2, 0.7)}, 1, 4, "at least 5 bands.*1 frames x 4 bands"),
    ("musicnn", {}, 187, 2, "at least 3 bands"),
    ("musicnn", {}, 0, 3, "at least 1 frames.*0 frames x 3 bands"),
    ("sample_level", {}, 59_048, 1, "at least 59049 values.*59048 frames x 1 bands"),
    ("short_chunk", {}, 127, 128, "at least 128 frames.*127 frames x 128 bands"),
    ("short_chunk", {}, 128, 127, "at least 128 bands.*128 frames x 127 bands"),
    ("spotify", {}, 102, 1, "at least 103 frames.*102 frames x 1 bands"),
    ("vgg", {}, 65, 63, "at least 66 frames.*65 frames x 63 bands"),
    ("vgg", {}, 66, 62, "at least 63 bands.*66 frames x 62 bands"),
]
WRONG_FIELDS = [
    ("alexnet", {"widths": (11, 5)}, r"\(11, 5\) of 'alexnet' must have a width for each of the 5"),
    ("alexnet", {"pool_after": (1, 6)}, "pool_after=.* must name convolutions from 1 to 5"),
    ("alexnet", {"response_norm": (0,)}, "response_norm=.* must name convolutions from 1 to 5"),
    ("alexnet", {"filters": (4, 7, 4, 4, 2)}, "grouped=.* must name later .* an even number"),
    ("alexnet", {"filters": (5, 6, 4, 4, 2)}, "grouped=.* must name later .* an even number"),
    ("alexnet", {"grouped": (1,)}, "grouped=.* must name later convolutions"),
    ("conv1d", {"pooling": "maen"}, "pooling='maen' of 'conv1d' must be one of flatten, mean, "),
    ("conv1d", {"widths": (2, 2)}, r"widths=\(2, 2\) of 'conv1d' must be different numbers"),
    ("conv1d", {"widths": (0,)}, r"widths=\(0,\) .* each at least 1"),
    ("conv1d", {"widths": (2.5,)}, r"widths=\(2.5,\) .* each at least 1"),
    ("conv1d", {"widths": (2, 4, 8)}, r"divide by the number of model.widths=\(2, 4, 8\)"),
    ("crnn", {"input_norm": "bands"}, "input_norm='bands' of 'crnn' must be one of time, band, "),
    ("crnn", {"filters": (8, 8)}, "the same length"),
    ("fcn", {"filters": (8, 8)}, r"'fcn'.*filters=\(8, 8\), model.time_pools=\(4, 5, 8, 8\).*same"),
    ("k2c2", {"filters": (8,)}, r"'k2c2'.*model.filters=\(8,\)"),
    ("k2c1", {"band_pools": (1, 1, 2, 1, 1)}, "must be 1 from the convolution on that covers all"),
    ("modulation", {"windows": (64, 32)}, "one per layer"),
    ("modulation", {"windows": (64, 32, 31)}, r"\(64, 32, 31\) of 'modulation' must be even"),
    ("modulation", {"regions": (4, 4, 0)}, "model.regions"),
    ("modulation", {"rate_edges": (1, 2)}, r"rate_edges=\(1, 2\) of .* must rise from 0"),
    ("modulation", {"scale_edges": (0, 2, 2)}, "model.scale_edges"),
    ("modulation", {"floors": (50.0, 0.0)}, r"floors=\(50.0, 0.0\) of .* must be above 0"),
    ("modulation", {"contrasts": (-8.0,)}, "model.contrasts"),
    *[
        ("musicnn", {"timbral_heights": (0.4, height)}, rf"{height}\) of .* above 0 and at most 1")
        for height in (0.0, -0.4, 1.5)
    ],
    *[("resnet", {"blocks": blocks}, "at least one unit for each") for blocks in ((), (1, 0))],
]


def build(name, fields, frames, bands, **options):
    model = {"name": name, **fields}
    return models.build(model, num_classes=3, frames=frames, bands=bands, **options)


def smallest_input(name, kind=""):
    """Frames, bands and type of a small input that the network takes with its default fields."""
    limits = input_limits(network_class(name))
    kind = kind or (limits.kinds[0] if limits.kinds else "logmel")
    bands = {"waveform": 729, "stft": 257, "mfcc": 20}.get(kind, 128)
    if kind == "mfcc":
        bands = max(bands, limits.min_bands)
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
        with pytest.raises(UserError, match=f"of the type waveform, .* of {kind}"):
            build(name, {}, 647, 128, kind=kind)
        return
    frames, bands, kind = smallest_input(name, kind)
    module = build(name, {}, frames, bands, kind=kind)

    def run(x):
        variables = module.init(jax.random.key(0), x, train=False)
        return models.apply_model(module, variables, x), variables

    shape = jax.ShapeDtypeStruct((2, frames, bands), jnp.float32)
    (logits, embedding), variables = jax.eval_shape(run, shape)
    assert logits.shape == (2, 3) and logits.dtype == jnp.float32
    assert variables["params"]["head"]["kernel"].shape == (embedding.shape[1], 3)
    # Transfer replaces the last layer under any name.
    assert layer_order(module, frames, bands)[-1] == "head"


@pytest.mark.parametrize(("name", "fields", "frames", "bands"), SMALLEST, ids=str)
def test_the_smallest_inputs_run(name, fields, frames, bands, filled, apply):
    module = build(name, fields, frames, bands)
    variables = filled(module, frames, bands)
    logits, _ = apply(module, variables, np.ones((2, frames, bands), np.float32))
    assert logits.shape == (2, 3) and np.isfinite(logits).all()


@pytest.mark.parametrize(("name", "fields", "frames", "bands", "message"), REFUSED, ids=str)
def test_too_small_an_input_is_refused_with_both_shapes(name, fields, frames, bands, message):
    with pytest.raises(UserError, match=message):
        build(name, fields, frames, bands)


@pytest.mark.parametrize(("name", "fields", "message"), WRONG_FIELDS, ids=str)
def test_invalid_fields_are_named(name, fields, message):
    with pytest.raises(UserError, match=message):
        build(name, fields, 1366, 128)


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
    module = build(name, fields | changes | no_dropout, frames, bands)
    x = np.random.default_rng(1).standard_normal((6, frames, bands), np.float32)
    labels, loss = jnp.arange(6) % 3, optax.softmax_cross_entropy_with_integer_labels
    variables = filled(module, frames, bands)
    learned = learn(module, variables, x, labels, loss, rate=1e-4, steps=2)
    assert learned.losses[1] < learned.losses[0]
    gradients = jax.tree_util.tree_leaves_with_path(learned.first_gradients)
    assert all(np.isfinite(gradient).all() for _, gradient in gradients)
    still = [jax.tree_util.keystr(path) for path, g in gradients if not np.abs(g).max() > 0]
    assert still == []
