import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from musicgenre import models
from musicgenre.errors import UserError

# Compiled as a whole, which is faster than each operation on its own.
apply = jax.jit(models.apply_model, static_argnums=0)
FULL = {"name": "sample_level"}
# A 3^2 model: 27 samples leave one position.
TINY = {"name": "sample_level", "first_filters": 2, "filters": (3, 2), "last_filters": 4, "excite_ratio": 2}


def drawn(module, frames, bands):
    """Variables drawn with NumPy, which needs no compiling: kernels of unit gain, all else between 0.1 and 0.4."""
    generator = np.random.default_rng(0)

    def draw(leaf):
        if len(leaf.shape) > 1:
            return np.float32(generator.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])))
        return np.float32(generator.uniform(0.1, 0.4, leaf.shape))

    return jax.tree.map(draw, dict(jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, frames, bands))))))


def shapes(module, frames, hop):
    """Shapes of the parameters and of every layer's output."""
    x = jnp.zeros((2, frames, hop))
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), x))
    _, state = jax.eval_shape(lambda v: module.apply(v, x, capture_intermediates=True, mutable=["intermediates"]), variables)
    return variables["params"], state["intermediates"]


def test_the_papers_sizes():
    """Each convolution sees what the pool before it leaves: 59,049 / 3 = 19,683, and a third of it each time."""
    params, layers = shapes(models.build(FULL, num_classes=50, frames=81, bands=729), 81, 729)
    filters = (128, 128, 128, 256, 256, 256, 256, 256, 256, 512, 512)
    lengths = (19_683, 19_683, 6_561, 2_187, 729, 243, 81, 27, 9, 3, 1)
    found = [layers[f"conv{i + 1}"]["__call__"][0].shape for i in range(11)]
    assert found == [(2, *sizes) for sizes in zip(lengths, filters, strict=True)]
    assert layers["embedding"][0].shape == (2, 512)
    assert params["conv1"]["kernel"].shape == (3, 1, 128) and params["conv11"]["kernel"].shape == (1, 512, 512)


def test_parameters_counted_by_hand():
    params, _ = shapes(models.build(FULL, num_classes=50, frames=81, bands=729), 81, 729)
    ours = sum(leaf.size for leaf in jax.tree.leaves(params))
    # The authors' convolutions with their biases, layer by layer, and the dense layer.
    convolutions = 512 + 2 * 49_280 + 98_560 + 5 * 196_864 + 393_728 + 262_656
    assert convolutions + 512 * 50 + 50 == 1_863_986
    channels = 3 * 128 + 6 * 256 + 2 * 512
    theirs = 1_863_986 + 2 * channels
    assert ours == theirs - channels == 1_866_930
    assert abs(ours / theirs - 1) < 0.005


def test_squeeze_and_excitation_counted_by_hand():
    """For c channels c x 16c + 16c and 16c x c + c."""
    module = models.build(FULL | {"squeeze_excite": True}, num_classes=50, frames=81, bands=729)
    params, _ = shapes(module, 81, 729)
    added = sum(32 * c * c + 17 * c for c in (128, 128, 256, 256, 256, 256, 256, 256, 512))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 1_866_930 + added == 23_926_194


@pytest.mark.parametrize("squeeze_excite", [False, True])
@pytest.mark.parametrize("samples", [27, 60])
def test_the_network_is_the_one_described(squeeze_excite, samples):
    """Worked with NumPy; 60 samples leave two positions, whose mean is taken, and six samples that are dropped."""
    module = models.build(TINY | {"squeeze_excite": squeeze_excite}, num_classes=2, frames=samples, bands=1)
    x = np.random.default_rng(0).standard_normal((1, samples, 1), np.float32)
    variables = drawn(module, samples, 1)
    p, s = (jax.tree.map(np.asarray, variables[key]) for key in ("params", "batch_stats"))

    def layer(x, name, stride=1):
        kernel = p[name]["kernel"]
        padded = np.pad(x, ((len(kernel) // 2,) * 2, (0, 0))) if stride == 1 else x
        starts = range(0, len(padded) - len(kernel) + 1, stride)
        out = np.array([np.einsum("tc,tco->o", padded[t : t + len(kernel)], kernel) for t in starts])
        scale = p[f"{name}_norm"]["scale"] / np.sqrt(s[f"{name}_norm"]["var"] + 1e-5)
        return np.maximum((out - s[f"{name}_norm"]["mean"]) * scale + p[f"{name}_norm"]["bias"], 0)

    def pool(x):
        whole = len(x) // 3
        return x[: whole * 3].reshape(whole, 3, -1).max(axis=1)

    def dense(x, name):
        return x @ p[name]["kernel"] + p[name]["bias"]

    y = layer(x[0], "conv1", stride=3)
    for number in (2, 3):
        y = pool(layer(y, f"conv{number}"))
        if squeeze_excite:
            hidden = np.maximum(dense(y.mean(axis=0), f"squeeze{number}"), 0)
            assert hidden.shape == (2 * y.shape[1],)
            y = y / (1 + np.exp(-dense(hidden, f"excite{number}")))
    assert len(y) == samples // 27
    expected = layer(y, "conv4").mean(axis=0)
    logits, embedding = apply(module, variables, x)
    np.testing.assert_allclose(embedding[0], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(logits[0], dense(expected, "head"), rtol=1e-4, atol=1e-6)


def test_frames_are_joined_to_the_waveform():
    module = models.build(TINY, num_classes=2, frames=9, bands=3)
    x = np.random.default_rng(0).standard_normal((2, 27), np.float32)
    variables = drawn(module, 9, 3)
    logits = [apply(module, variables, x.reshape(2, frames, 27 // frames))[0] for frames in (1, 3, 9, 27)]
    for other in logits[1:]:
        np.testing.assert_array_equal(other, logits[0])
    assert not np.allclose(logits[0], apply(module, variables, x.reshape(2, 9, 3).swapaxes(1, 2))[0])


def test_fewest_samples_and_the_kind_of_features():
    module = models.build(FULL, num_classes=3, frames=59_049, bands=1, kind="waveform")
    assert jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), jnp.ones((2, 59_049, 1)))[0]).shape == (2, 3)
    with pytest.raises(UserError, match=r"at least 59049 values.*59048 frames x 1 bands of waveform"):
        models.build(FULL, num_classes=3, frames=59_048, bands=1, kind="waveform")
    with pytest.raises(UserError, match="features of the kind waveform, but its input is 647 frames x 128 bands of logmel"):
        models.build(FULL, num_classes=3, frames=647, bands=128, kind="logmel")
    module = models.build(TINY, num_classes=3, frames=9, bands=3, kind="waveform")
    logits, _ = apply(module, drawn(module, 9, 3), np.ones((2, 9, 3), np.float32))
    assert logits.shape == (2, 3) and np.isfinite(logits).all()
    with pytest.raises(UserError, match="at least 27 values"):
        models.build(TINY, num_classes=3, frames=13, bands=2)


def test_bfloat16():
    x = np.random.default_rng(1).standard_normal((2, 9, 9), np.float32)
    module = models.build(TINY | {"squeeze_excite": True}, num_classes=3, frames=9, bands=9)
    half = models.build(TINY | {"squeeze_excite": True}, num_classes=3, frames=9, bands=9, dtype="bfloat16")
    variables = drawn(module, 9, 9)
    logits, low = apply(module, variables, x)[0], apply(half, variables, x)[0]
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, logits, atol=0.05 * float(jnp.abs(logits).max()))


@pytest.mark.parametrize("squeeze_excite", [False, True])
def test_it_learns_the_labels_of_one_batch(squeeze_excite):
    """Nine waveforms of noise in three classes."""
    model = TINY | {"first_filters": 8, "filters": (8, 8), "last_filters": 16, "dropout": 0.0, "squeeze_excite": squeeze_excite}
    module = models.build(model, num_classes=3, frames=9, bands=9)
    x = np.random.default_rng(1).standard_normal((9, 9, 9), np.float32)
    labels = jnp.arange(9) % 3
    variables = drawn(module, 9, 9)
    optimizer = optax.adam(1e-2)

    def loss(params, stats):
        logits, updated = module.apply(
            {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats", "intermediates"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated["batch_stats"]

    @jax.jit
    def train(params, stats):
        def step(carry, _):
            params, stats, state = carry
            (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(params, stats)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), stats, state), value

        return jax.lax.scan(step, (params, stats, optimizer.init(params)), None, length=200)

    (params, stats, _), losses = train(variables["params"], variables["batch_stats"])
    assert losses[0] > 0.5 and losses[-1] < 0.01
    logits, _ = apply(module, {"params": params, "batch_stats": stats}, x)
    np.testing.assert_array_equal(logits.argmax(axis=1), labels)
