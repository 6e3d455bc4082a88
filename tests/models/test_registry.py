import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from musicgenre import models
from musicgenre.errors import UserError
from musicgenre.models import registry

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


@pytest.fixture(autouse=True)
def registry_as_before(monkeypatch):
    registry.registered()
    monkeypatch.setattr(registry._MODELS, "_items", dict(registry._MODELS._items))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder on the path for modules, which are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def test_a_users_own_module_needs_no_edit_here(folder):
    (folder / "my_pkg").mkdir()
    (folder / "my_pkg" / "my_net.py").write_text(OWN)
    resolved = models.resolve({"name": "conv1d", "module": "my_pkg.my_net", "width": 8})
    assert resolved == {"name": "my_net", "module": "my_pkg.my_net", "width": 8}
    module = models.build(resolved, num_classes=3, frames=10, bands=5)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 10, 5)), train=False)
    assert variables["params"]["Dense_0"]["kernel"].shape == (5, 8)
    with pytest.raises(UserError, match="has no field dtype"):
        models.build(resolved, num_classes=3, frames=10, bands=5, dtype="bfloat16")


@pytest.mark.parametrize("decorated", [True, False])
def test_an_installed_packages_network_is_found_by_its_name(folder, decorated):
    """An entry point, whose module is imported when its name is used."""
    (folder / "my_plugin.py").write_text(OWN if decorated else OWN.replace("@register", "# "))
    info = folder / "my_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.0\n")
    points = "[musicgenre.models]\nmy_net = my_plugin:MyNet\nmy_broken = my_missing:Net\n"
    (info / "entry_points.txt").write_text(points)
    with pytest.raises(UserError, match=r"no model 'my_nte'\. Did you mean 'my_net'"):
        models.resolve({"name": "my_nte"})
    assert "my_plugin" not in sys.modules
    module = models.build({"name": "my_net", "width": 2}, num_classes=3, frames=10, bands=5)
    assert (type(module).__module__, module.width) == ("my_plugin", 2)
    with pytest.raises(UserError, match="my_missing"):
        models.resolve({"name": "my_broken"})


def test_a_module_with_several_networks_asks_which(folder):
    (folder / "my_two.py").write_text(OWN + OWN.replace("my_net", "my_other").replace("MyNet", "B"))
    assert models.resolve({"name": "my_other", "module": "my_two"})["name"] == "my_other"
    with pytest.raises(UserError, match=r"registers my_net, my_other: say which with model.name"):
        models.resolve({"name": "conv1d", "module": "my_two"})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "conv1"}, "no model 'conv1'. Did you mean 'conv1d'"),
        (
            {"name": "conv1d", "filtres": (1,)},
            "model.filtres is not a field of the model 'conv1d'. Did you mean 'filters'",
        ),
        ({"name": "conv1d", "width": "wide"}, "model.width of 'conv1d' must be int like 4, not 'w"),
        ({"name": "conv1d", "width": True}, "model.width of 'conv1d' must be int"),
        ({"name": "conv1d", "dropout": False}, "model.dropout of 'conv1d' must be float"),
        ({"name": "conv1d", "batch_norm": 1}, "model.batch_norm of 'conv1d' must be bool"),
        ({"name": "conv1d", "filters": (1.5,)}, "model.filters of 'conv1d' must be tuple"),
        ({"name": "x", "module": "no.such.module"}, "model.module='no.such.module': no module"),
        ({"name": "x", "module": "json"}, "registers no model"),
    ],
)
def test_mistakes_name_the_field_and_the_nearest_one(model, message):
    with pytest.raises(UserError, match=message):
        models.build(model, num_classes=2, frames=647, bands=128)


def test_values_take_the_type_of_the_default():
    fields = {"name": "conv1d", "filters": 8, "dropout": 1, "widths": [2, 4]}
    resolved = models.resolve(fields)
    assert [resolved[name] for name in ("filters", "dropout", "widths")] == [(8,), 1.0, (2, 4)]
    assert isinstance(resolved["dropout"], float)


class NoClasses(nn.Module):
    width: int = 1


class NoDefault(nn.Module):
    num_classes: int
    width: int


class NNXNoClasses(nnx.Module):
    def __init__(self, *, rngs): ...


class NNXNoRngs(nnx.Module):
    def __init__(self, num_classes): ...


class NNXNoDefault(nnx.Module):
    def __init__(self, num_classes, width, *, rngs): ...


class NNXRest(nnx.Module):
    def __init__(self, num_classes, *, rngs, **rest): ...


class NNXNoTrain(nnx.Module):
    def __init__(self, num_classes, *, rngs): ...

    def __call__(self, x): ...


def a_function(): ...


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (a_function, "not a_function"),
        (int, "not int"),
        (nn.Dense(3), "not an instance of Dense"),
        (NoClasses, r"NoClasses needs a field num_classes: int"),
        (NoDefault, r"NoDefault: the field width needs a default"),
        (NNXNoClasses, "NNXNoClasses: its constructor needs an argument num_classes"),
        (NNXNoRngs, "NNXNoRngs: its constructor needs an argument rngs"),
        (NNXNoDefault, "NNXNoDefault: the argument width of its constructor needs a default"),
        (NNXRest, r"NNXRest: its constructor must name its arguments instead of \*rest"),
        (NNXNoTrain, r"NNXNoTrain needs a method __call__\(self, x, train=False\)"),
    ],
)
def test_what_cannot_be_a_network_gives_one_line(thing, message):
    with pytest.raises(UserError, match=message) as caught:
        models.register("mine")(thing)
    assert "\n" not in str(caught.value) and "mine" not in models.registered()


def test_a_name_is_required_and_unique():
    class Other(nn.Module):
        num_classes: int

    with pytest.raises(UserError, match=r'write @register\("name"\) above .*Other'):
        models.register(Other)
    with pytest.raises(ValueError, match="two models are registered as 'conv1d'"):
        models.register("conv1d")(Other)
