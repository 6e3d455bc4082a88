import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from musicgenre import models
from musicgenre.models.describe import (
    Source,
    describe,
    settings_text,
    shape_text,
    table,
    total_parameters,
)


def count(module, frames, bands):
    """The number of parameters that initialisation makes."""
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, frames, bands)), train=False)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def test_the_reports_network():
    """Sizes worked by hand: SAME convolutions halve (rounded up), pools halve (rounded down), 20 frames leave 5 windows."""
    layers = describe(
        models.build({"name": "conv1d"}, num_classes=10, frames=647, bands=128), 647, 128
    )
    assert [
        (layer.name, layer.kind, layer.inputs, layer.output, layer.parameters) for layer in layers
    ] == [
        ("input", "Input", (), (647, 128), 0),
        ("conv1", "Conv", ((647, 128),), (324, 256), 4 * 128 * 256 + 256),
        ("conv2", "Conv", ((162, 256),), (81, 256), 4 * 256 * 256 + 256),
        ("conv3", "Conv", ((40, 256),), (20, 256), 4 * 256 * 256 + 256),
        ("dense1", "Dense", ((1024,),), (2048,), 1024 * 2048 + 2048),
        ("Dropout_0", "Dropout", ((2048,),), (2048,), 0),
        ("head", "Dense", ((2048,),), (10,), 2048 * 10 + 10),
        ("output", "Output", ((10,),), (10,), 0),
    ]
    assert total_parameters(layers) == 2_775_818
    assert layers[1].settings == {"features": 256, "kernel_size": (4,), "strides": (2,)}
    assert settings_text(layers[1]) == "256 features, kernel 4, stride 2"
    assert [source.layer for layer in layers[1:] for source in layer.sources] == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert "ReLU" in layers[4].sources[0].operations and layers[6].sources == (Source(5),)


@pytest.mark.parametrize("name", list(models.registered()))
def test_every_model_is_described(name):
    cls = models.registered()[name]
    limits = (
        cls.input_limits(models.hyperparameters(cls))
        if hasattr(cls, "input_limits")
        else models.InputLimits()
    )
    frames = limits.max_frames or max(limits.min_frames, 187)
    bands = limits.max_bands or max(limits.min_bands, 96, -(-limits.min_values // frames))
    module = models.build({"name": name}, num_classes=7, frames=frames, bands=bands)
    layers = describe(module, frames, bands)
    assert total_parameters(layers) == count(module, frames, bands)
    assert layers[0].output == (frames, bands) and layers[-1].output == (7,)
    heads = [i for i, layer in enumerate(layers) if layer.name == "head"]
    assert len(heads) == 1 and layers[-1].sources[0].layer >= heads[0]
    # Every layer is on a way from the input, and nothing comes from a later one.
    assert all(source.layer < i for i, layer in enumerate(layers) for source in layer.sources)
    assert all(layer.sources for layer in layers[1:] if layer.kind not in ("Parameters", "Embed"))
    assert f"{total_parameters(layers):,} parameters" in table(layers)


class Gate(nn.Module):
    """Squeeze and excitation with a scale of its own."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        weight = nn.sigmoid(nn.Dense(x.shape[-1], name="open")(x.mean(axis=1)))
        return x * weight[:, None] * scale


class Branches(nn.Module):
    num_classes: int = 3

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3,), name="stem")(x)
        sides = [nn.relu(nn.Conv(2, (width,), name=f"side{width}")(x)) for width in (1, 3, 5)]
        joined = jnp.concatenate(sides, axis=-1)
        x = joined + nn.Conv(6, (3,), name="again")(nn.max_pool(joined, (3,), (1,), "SAME"))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = Gate(name="gate")(x)
        shared = nn.Dense(6, name="shared")
        x = nn.tanh(shared(shared(x)))
        return nn.Dense(self.num_classes, name="head")(x.mean(axis=1))


def test_branches_skips_and_shared_layers_come_out_as_they_are():
    layers = describe(Branches(), 20, 5)
    found = {
        i: (layer.name, [(source.layer, *source.operations) for source in layer.sources])
        for i, layer in enumerate(layers)
    }
    assert found == {
        0: ("input", []),
        1: ("stem", [(0,)]),
        2: ("side1", [(1,)]),
        3: ("side3", [(1,)]),
        4: ("side5", [(1,)]),
        5: ("concatenation", [(2, "ReLU"), (3, "ReLU"), (4, "ReLU")]),
        6: ("again", [(5, "max-pool")]),
        7: ("sum", [(5,), (6,)]),
        8: ("norm", [(7,)]),
        9: ("gate", []),
        10: ("gate/open", [(8,)]),
        11: ("product", [(8,), (10, "sigmoid")]),
        12: ("shared", [(11,)]),
        13: ("shared", [(12,)]),
        14: ("head", [(13, "tanh")]),
        15: ("output", [(14,)]),
    }
    assert layers[9].kind == "Parameters" and layers[9].parameters == 6
    assert (layers[12].parameters, layers[13].parameters) == (6 * 6 + 6, 0)
    assert layers[5].kind == "Join" and layers[5].output == (20, 6)
    assert total_parameters(layers) == count(Branches(), 20, 5)


class Lifted(nn.Module):
    num_classes: int = 2

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.remat(nn.Dense)(4, name="saved")(x)
        x = nn.RNN(nn.GRUCell(3), name="gru")(x)
        x = nn.MultiHeadDotProductAttention(num_heads=1, name="attention")(x)
        x = x + nn.Embed(10, 3, name="places")(jnp.arange(10))
        x = nn.Sequential([nn.Dense(3), nn.elu, nn.Dense(5)], name="pair")(x)
        with jax.named_scope("max_pool"):
            x = jnp.where(x[:, ::2] >= x[:, 1::2], x[:, ::2], x[:, 1::2])
        x = nn.Dense(4, name="time_first")(jnp.swapaxes(x, 0, 1))[-1]
        return nn.Dense(self.num_classes, name="head")(x)


def test_modules_of_flax_are_one_layer_each():
    layers = describe(Lifted(), 10, 6)
    assert [(layer.name, layer.kind) for layer in layers[1:-1]] == [
        ("saved", "Dense"),
        ("gru", "GRU"),
        ("attention", "MultiHeadDotProductAttention"),
        ("places", "Embed"),
        ("sum", "Join"),
        ("Dense_0", "Dense"),
        ("Dense_1", "Dense"),
        ("time_first", "Dense"),
        ("head", "Dense"),
    ]
    # Three gates of a GRU: weights of the input with a bias each, of the state with one for the candidate alone.
    assert layers[2].parameters == 3 * (4 * 3 + 3) + 3 * 3 * 3 + 3 and layers[2].settings == {
        "features": 3
    }
    # Query, key, value and output.
    assert layers[3].parameters == 4 * (3 * 3 + 3)
    # It takes no layer's output; what it gives is added to the attention's.
    assert layers[4].sources == () and layers[4].parameters == 30 and layers[5].name == "sum"
    assert layers[7].sources == (Source(6, ("ELU",)),)
    assert layers[8].sources == (Source(7, ("max-pool",)),)
    # The batch is the second axis there.
    assert layers[8].inputs == ((5, -1, 5),) and shape_text(layers[8].output) == "5 x batch x 4"
    assert layers[9].inputs == ((4,),)


class Vast(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(self.num_classes)(nn.Dense(10**7)(x.reshape(len(x), -1)))


def test_nothing_is_computed():
    """These are 400 TB of parameters."""
    layers = describe(Vast(3), 1000, 10_000)
    assert total_parameters(layers) == 10**14 + 10**7 + 3 * 10**7 + 3


def test_a_users_own_module(tmp_path, monkeypatch):
    (tmp_path / "own_layers.py").write_text(
        "import flax.linen as nn\n"
        "from musicgenre.models import register\n\n"
        "class Mix(nn.Module):\n"
        "    width: int\n"
        "    @nn.compact\n"
        "    def __call__(self, x):\n"
        "        return x @ self.param('weight', nn.initializers.normal(), (x.shape[-1], self.width))\n\n"
        "@register('own_layers')\n"
        "class Net(nn.Module):\n"
        "    num_classes: int\n"
        "    def setup(self):\n"
        "        self.mix, self.head = Mix(4), nn.Dense(self.num_classes)\n"
        "    def encode(self, x):\n"
        "        return self.mix(x)\n"
        "    def __call__(self, x, train=False):\n"
        "        x = self.encode(x).mean(axis=1)\n"
        "        self.sow('intermediates', 'embedding', x)\n"
        "        return self.head(x)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = models.build({"name": "", "module": "own_layers"}, num_classes=3, frames=9, bands=5)
    layers = describe(module, 9, 5)
    assert [(layer.name, layer.kind, layer.output, layer.parameters) for layer in layers[1:-1]] == [
        ("mix", "Mix", (9, 4), 20),
        ("head", "Dense", (3,), 15),
    ]
    assert layers[1].settings == {"width": 4} and layers[2].inputs == ((4,),)
    models.registry._MODELS._items.pop("own_layers")
    sys.modules.pop("own_layers")


def test_the_table_has_a_line_for_each_layer():
    lines = table(describe(Branches(), 20, 5)).splitlines()
    assert lines[0].split() == [
        "layer",
        "kind",
        "settings",
        "input",
        "output",
        "parameters",
        "from",
    ]
    assert lines[2 + 3].split() == [
        "3",
        "side3",
        "Conv",
        "2",
        "features,",
        "kernel",
        "3",
        "20",
        "x",
        "6",
        "20",
        "x",
        "2",
        "38",
        "1",
    ]
    assert lines[2 + 5].endswith("2 (ReLU), 3 (ReLU), 4 (ReLU)")
    assert lines[-1] == f"{count(Branches(), 20, 5):,} parameters"
    # Columns are aligned: every output begins where its heading does.
    start = lines[0].index("output")
    assert lines[2 + 1][start:].startswith("20 x 6") and lines[2 + 14][start:].startswith("3 ")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            nn.Conv(8, (7, 51), padding=((3, 3), (0, 0)), use_bias=False),
            "8 features, kernel 7 x 51, padding 3 x 0, no bias",
        ),
        (nn.Conv(8, (3,), strides=1, feature_group_count=2), "8 features, kernel 3, groups 2"),
        (nn.Conv(8, (3,), padding=((1, 2),)), "8 features, kernel 3, padding 1+2"),
        (nn.Dropout(0.25, deterministic=True), "rate 0.25"),
        (nn.BatchNorm(use_running_average=True, momentum=0.9, dtype=jnp.bfloat16), "momentum 0.9"),
    ],
)
def test_settings_in_words(module, words):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return module.clone(parent=self)(
                x[..., None] if isinstance(module, nn.Conv) and len(module.kernel_size) == 2 else x
            )

    assert settings_text(describe(Net(), 60, 60)[1]) == words
