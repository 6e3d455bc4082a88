import itertools

import flax.linen as nn
import jax.numpy as jnp
import pytest

from musicgenre import models
from musicgenre.models.describe import Source, describe, settings_text, table, total_parameters
from musicgenre.models.registry import input_limits


def names(layers):
    """Name and sources of each layer but the ends."""
    sources = [[(s.layer, *s.operations) for s in layer.sources] for layer in layers]
    return {i: (layers[i].name, sources[i]) for i in range(1, len(layers) - 1)}


def test_the_reports_network():
    """By hand: SAME convolutions halve (rounded up), pools halve (rounded down)."""
    module = models.build({"name": "conv1d"}, num_classes=10, frames=647, bands=128)
    layers = describe(module, 647, 128)
    found = [(layer.name, layer.kind, layer.inputs, layer.output) for layer in layers]
    assert found == [
        ("input", "Input", (), (647, 128)),
        ("conv1", "Conv", ((647, 128),), (324, 256)),
        ("conv2", "Conv", ((162, 256),), (81, 256)),
        ("conv3", "Conv", ((40, 256),), (20, 256)),
        ("dense1", "Dense", ((1024,),), (2048,)),
        ("Dropout_0", "Dropout", ((2048,),), (2048,)),
        ("head", "Dense", ((2048,),), (10,)),
        ("output", "Output", ((10,),), (10,)),
    ]
    convolutions = [4 * 128 * 256 + 256, 4 * 256 * 256 + 256, 4 * 256 * 256 + 256]
    dense = [1024 * 2048 + 2048, 0, 2048 * 10 + 10]
    assert [layer.parameters for layer in layers] == [0, *convolutions, *dense, 0]
    assert total_parameters(layers) == 2_775_818
    assert layers[1].settings == {"features": 256, "kernel_size": (4,), "strides": (2,)}
    assert settings_text(layers[1]) == "features 256, kernel_size 4, strides 2"
    assert [source.layer for layer in layers[1:] for source in layer.sources] == list(range(7))
    assert layers[6].sources == (Source(5),)
    assert layers[4].sources == (Source(3, ("ReLU", "max-pool", "mean-pool")),)


@pytest.mark.parametrize("name", list(models.registered()))
def test_every_model_is_described(name, parameter_count):
    limits = input_limits(models.registered()[name])
    frames = limits.max_frames or max(limits.min_frames, 187)
    bands = limits.max_bands or max(limits.min_bands, 96, -(-limits.min_values // frames))
    module = models.build({"name": name}, num_classes=7, frames=frames, bands=bands)
    layers = describe(module, frames, bands)
    assert total_parameters(layers) == parameter_count(module, frames, bands)
    assert layers[0].output == (frames, bands) and layers[-1].output == (7,)
    heads = [i for i, layer in enumerate(layers) if layer.name == "head"]
    assert [source.layer for source in layers[-1].sources] == heads
    # Every layer is reached from the input, and no source comes later.
    assert all(source.layer < i for i, layer in enumerate(layers) for source in layer.sources)
    assert all(layer.sources for layer in layers[1:] if layer.kind != "Parameters")


class Gate(nn.Module):
    """Squeeze and excitation with its own scale."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        weight = nn.sigmoid(nn.Dense(x.shape[-1], name="open")(x.mean(axis=1)))
        return x * weight[:, None] * scale


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3,), name="stem")(x)
        sides = [nn.relu(nn.Conv(2, (width,), name=f"side{width}")(x)) for width in (1, 3)]
        joined = jnp.concatenate(sides, axis=-1)
        x = joined + nn.Conv(4, (3,), name="again")(nn.max_pool(joined, (3,), (1,), "SAME"))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = Gate(name="gate")(x)
        shared = nn.Dense(4, name="shared")
        x = nn.tanh(shared(shared(x)))
        return nn.Dense(3, name="head")(x.mean(axis=1))


def test_branches_skips_and_shared_layers_are_described(parameter_count):
    layers = describe(Branches(), 20, 5)
    assert names(layers) == {
        1: ("stem", [(0,)]),
        2: ("side1", [(1,)]),
        3: ("side3", [(1,)]),
        4: ("again", [(2, "ReLU", "max-pool"), (3, "ReLU", "max-pool")]),
        5: ("norm", [(2, "ReLU"), (3, "ReLU"), (4,)]),
        6: ("gate", []),
        7: ("gate/open", [(5,)]),
        8: ("shared", [(5,), (7, "sigmoid")]),
        9: ("shared", [(8,)]),
        10: ("head", [(9, "tanh")]),
    }
    gate = layers[6]
    assert (gate.kind, gate.parameters, gate.settings) == ("Parameters", 4, {"of": "Gate"})
    assert (layers[8].parameters, layers[9].parameters) == (4 * 4 + 4, 0)
    assert total_parameters(layers) == parameter_count(Branches(), 20, 5)


class Lifted(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.remat(nn.Dense)(4, name="saved")(x)
        x = nn.RNN(nn.GRUCell(3), name="gru")(x)
        x = nn.MultiHeadDotProductAttention(num_heads=1, name="attention")(x)
        x = x + nn.Embed(10, 3, name="places")(jnp.arange(10))
        x = nn.Sequential([nn.Dense(3), nn.elu, nn.Dense(5)], name="pair")(x)
        return nn.Dense(2, name="head")(x[:, -1])


def test_each_flax_module_is_one_layer():
    layers = describe(Lifted(), 10, 6)
    assert [(layer.name, layer.kind) for layer in layers[1:-1]] == [
        ("saved", "Dense"),
        ("gru", "GRU"),
        ("attention", "MultiHeadDotProductAttention"),
        ("places", "Embed"),
        ("Dense_0", "Dense"),
        ("Dense_1", "Dense"),
        ("head", "Dense"),
    ]
    # A GRU's three gates: weights of the input with a bias each; of the state with one bias.
    assert layers[2].parameters == 3 * (4 * 3 + 3) + 3 * 3 * 3 + 3
    assert layers[2].settings == {"features": 3} and layers[2].sources == (Source(1),)
    assert layers[3].parameters == 4 * (3 * 3 + 3)
    assert layers[4].sources == () and layers[4].parameters == 30
    assert layers[5].sources == (Source(3), Source(4))
    assert layers[6].sources == (Source(5, ("ELU",)),)


def test_nothing_is_computed():
    """These are 400 TB of parameters."""

    class Vast(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(3)(nn.Dense(10**7)(x.reshape(len(x), -1)))

    assert total_parameters(describe(Vast(), 1000, 10_000)) == 10**14 + 10**7 + 3 * 10**7 + 3


def test_a_users_module_is_named_after_its_class_and_methods_are_followed():
    class Mix(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            shape = (x.shape[-1], self.width)
            return x @ self.param("weight", nn.initializers.normal(), shape)

    class Net(nn.Module):
        def setup(self):
            self.mix, self.head = Mix(4), nn.Dense(3)

        def encode(self, x):
            return self.mix(x)

        def __call__(self, x, train=False):
            return self.head(self.encode(x).mean(axis=1))

    mix, head = describe(Net(), 9, 5)[1:-1]
    assert (mix.name, mix.kind, mix.settings, mix.output) == ("mix", "Mix", {"width": 4}, (9, 4))
    assert (mix.parameters, head.parameters, head.inputs) == (20, 15, ((4,),))


def test_the_table_has_an_aligned_line_for_each_layer(parameter_count):
    lines = table(describe(Branches(), 20, 5)).splitlines()
    heading = ["layer", "type", "settings", "input", "output", "parameters", "from"]
    assert lines[0].split() == heading and set(lines[1]) == {"-", " "}
    columns = [*(lines[0].index(word) for word in heading), None]
    cells = [lines[2 + 4][a:b].strip() for a, b in itertools.pairwise(columns)]
    assert cells[:4] == ["again", "Conv", "features 4, kernel_size 3", "20 x 4"]
    assert cells[4:] == ["20 x 4", "52", "2 (ReLU, max-pool), 3 (ReLU, max-pool)"]
    assert lines[-1] == f"{parameter_count(Branches(), 20, 5):,} parameters"
    assert len(lines) == 2 + 12 + 1


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Conv(8, (7, 51), use_bias=False), "features 8, kernel_size 7 x 51, use_bias False"),
        (nn.Conv(8, (3,), padding=((3, 0),)), "features 8, kernel_size 3, padding 3+0"),
        (nn.Conv(8, (3,), strides=2), "features 8, kernel_size 3, strides 2"),
        (nn.Dropout(0.25, deterministic=True), "rate 0.25"),
        (nn.BatchNorm(use_running_average=True, momentum=0.9, dtype=jnp.bfloat16), "momentum 0.9"),
    ],
)
def test_settings_in_words(module, words):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            image = isinstance(module, nn.Conv) and len(module.kernel_size) == 2
            return module.clone(parent=self)(x[..., None] if image else x)

    assert settings_text(describe(Net(), 60, 60)[1]) == words
