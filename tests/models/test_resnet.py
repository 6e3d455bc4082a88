import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicgenre import models
from musicgenre.models.resnet import RESNET_SIZES

# torchvision's parameters with 3 channels and 1000 classes. Here the first convolution has one
# channel.
PUBLISHED = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}
TWO_CHANNELS = 2 * 7 * 7 * 64


def build(frames=387, bands=128, classes=10, **fields):
    model = {"name": "resnet", **fields}
    return models.build(model, num_classes=classes, frames=frames, bands=bands)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_counts(name, parameter_count):
    original, identity = (
        parameter_count(build(64, 64, 1000, preactivation=p, **RESNET_SIZES[name]), 64, 64)
        for p in (False, True)
    )
    assert original + TWO_CHANNELS == PUBLISHED[name]
    # Identity units only lack the normalisation of the shortcuts: those of three stages, for
    # bottlenecks of the first one as well.
    shortcuts = (256, 512, 1024, 2048) if RESNET_SIZES[name]["bottleneck"] else (128, 256, 512)
    assert original - identity == 2 * sum(shortcuts)


def test_the_reports_count_worked_by_hand(parameter_count):
    stem = 49 * 64 + 2 * 64
    first = 2 * 9 * 64 * 64 + 2 * 64  # its input is normalised by the stem
    second = 2 * 64 + 9 * 64 * 128 + 2 * 128 + 9 * 128 * 128 + 64 * 128
    by_hand = stem + first + second + 2 * 128 + 128 * 10 + 10
    assert parameter_count(build(), 64, 64) == by_hand == 308_426
    assert RESNET_SIZES["report"].items() <= models.resolve({"name": "resnet"}).items()


@pytest.mark.parametrize("preactivation", [False, True])
def test_every_shape_of_resnet50(preactivation, layer_shapes):
    seen = layer_shapes(build(preactivation=preactivation, **RESNET_SIZES["resnet50"]), 387, 128)
    assert seen["stem"] == (2, 194, 64, 64)
    extents = [(97, 32), (49, 16), (25, 8), (13, 4)]
    for i, extent in enumerate(extents, start=1):
        assert seen[f"stage{i}_unit3_conv3"] == (2, *extent, 128 * 2**i)
    assert seen["stage2_unit1_conv1"] == (2, 97, 32, 128)
    assert seen["stage2_unit1_conv2"] == (2, 49, 16, 128)
    assert seen["embedding"] == (2, 2048)
    shortcuts = [name for name in seen if name.endswith("_shortcut")]
    assert shortcuts == [f"stage{i}_unit1_shortcut" for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_the_network_is_the_one_described(
    preactivation, bottleneck, filled, apply, numpy_conv, numpy_norm
):
    """Two units of two stages, worked with NumPy."""
    module = build(21, 14, preactivation=preactivation, bottleneck=bottleneck, filters=2)
    variables = filled(module, 21, 14)
    x = np.random.default_rng(1).standard_normal((1, 21, 14)).astype(np.float32)
    p = variables["params"]

    def norm(y, name):
        return numpy_norm(y, variables, f"{name}_norm")

    def relu(y):
        return np.maximum(y, 0)

    y = relu(norm(numpy_conv(x[0][:, :, None], p["stem"]["kernel"], 2), "stem"))
    y = np.pad(y, ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(y, (3, 3), axis=(0, 1))
    y = windows[::2, ::2].max(axis=(3, 4))
    for stage, stride in ((1, 1), (2, 2)):
        name = f"stage{stage}_unit1"
        z = start = relu(norm(y, f"{name}_in")) if preactivation and stage == 2 else y
        steps = [1, stride, 1] if bottleneck else [stride, 1]
        for i, step in enumerate(steps, start=1):
            z = numpy_conv(z, p[f"{name}_conv{i}"]["kernel"], step)
            if i < len(steps):
                z = relu(norm(z, f"{name}_conv{i}"))
        if f"{name}_shortcut" in p:
            y = numpy_conv(start, p[f"{name}_shortcut"]["kernel"], stride)
            y = y if preactivation else norm(y, f"{name}_shortcut")
        y = y + z if preactivation else relu(y + norm(z, f"{name}_conv{len(steps)}"))
    y = (relu(norm(y, "last")) if preactivation else y).mean(axis=(0, 1))
    logits, _ = apply(module, variables, x)
    np.testing.assert_allclose(logits[0], y @ p["head"]["kernel"] + p["head"]["bias"], atol=2e-5)


def test_an_identity_unit_whose_last_kernel_is_zero_lets_its_input_through(filled, apply):
    module = build(33, 20, blocks=(1, 3), filters=4)
    x = jax.random.normal(jax.random.key(0), (2, 33, 20))
    variables = filled(module, 33, 20)
    for unit in (2, 3):
        kernel = variables["params"][f"stage2_unit{unit}_conv2"]["kernel"]
        variables["params"][f"stage2_unit{unit}_conv2"]["kernel"] = jnp.zeros_like(kernel)
    short = build(33, 20, blocks=(1, 1), filters=4)
    fewer = {
        collection: {k: v for k, v in tree.items() if "unit2" not in k and "unit3" not in k}
        for collection, tree in variables.items()
    }
    np.testing.assert_array_equal(apply(module, variables, x)[0], apply(short, fewer, x)[0])
