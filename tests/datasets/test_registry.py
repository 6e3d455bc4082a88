import sys

import pytest

from musicgenre import datasets
from musicgenre.config import base_config, dataset_options
from musicgenre.datasets import Clip, Dataset, extra_fields, load_dataset, register
from musicgenre.datasets import registry as module
from musicgenre.errors import UserError
from musicgenre.registry import Registry

READER = """
from musicgenre.datasets import Clip, Dataset, register

@register("tones")
def read(root, *, seed: int = 1, depth: int = 2, names=("low", "high")):
    clips = [Clip(f"{i}", f"{root}/{i}.wav", (names[i % 2],), "train") for i in range(depth)]
    return Dataset("tones", root, f"seed {seed}", "single_label", tuple(names), tuple(clips))
"""


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """Readers of a test are forgotten after it."""
    registry = Registry("data set", "musicgenre.datasets")
    registry._items = dict(module._READERS._items)
    monkeypatch.setattr(module, "_READERS", registry)


@pytest.fixture
def user_package(tmp_path, monkeypatch):
    """A folder on the path with a module `tones_reader`, removed from memory after the test."""
    (tmp_path / "tones_reader.py").write_text(READER)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("tones_reader", None)


def test_a_data_set_of_an_installed_package_is_found_by_its_name(user_package):
    info = user_package / "tones-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tones\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[musicgenre.datasets]\ntones = tones_reader:read\nother = tones_reader:missing\n"
    )
    assert "tones_reader" not in sys.modules and "tones" in datasets.dataset_names()
    assert extra_fields("tones") == {"depth": 2, "names": ("low", "high")}
    dataset = load_dataset({"dataset": "tones", "root": "/music", "seed": 5, "depth": 3})
    assert dataset.protocol == "seed 5" and len(dataset.clips) == 3
    with pytest.raises(UserError, match="'other' of tones_reader:missing cannot be imported"):
        load_dataset({"dataset": "other", "root": "/music"})


def test_a_reader_gets_the_config_fields_that_it_names_and_fields_of_its_own():
    seen = []

    @register("mine", needs_root=False)
    def read(root, *, seed, layout, top_k=10, protocol="by day", depth=2):
        seen.append((root, seed, layout, top_k, protocol, depth))
        clips = (Clip("b", "b.wav", ("x",), "train"), Clip("a", "a.wav", ("x",), "train"))
        return Dataset("mine", root, protocol, "single_label", ("x",), clips)

    config = base_config()
    config.data.dataset = "mine"
    config.data.split_seed = 7
    dataset = load_dataset({**dataset_options(config), "depth": 4})
    assert seen == [("", 7, "mel_time", 50, "by day", 4)]
    assert [clip.clip_id for clip in dataset.clips] == ["a", "b"]
    config.data.protocol = "by hour"
    assert load_dataset(dataset_options(config)).protocol == "by hour"
    assert extra_fields("mine") == {"depth": 2} and extra_fields("gtzan") == {}
    with pytest.raises(UserError, match=r"data\.dept is not a field of .*'mine'\. Did you mean"):
        load_dataset({**dataset_options(config), "dept": 4})


def test_readers_that_cannot_be_registered():
    with pytest.raises(ValueError, match="two data sets are registered as 'gtzan'"):
        register("gtzan")(lambda root: None)
    for read, message in (
        (lambda root, *, depth: None, "its option 'depth' needs a default"),
        (lambda root, *, pad="zero": None, "'pad' is a field of config.data with another meaning"),
        (lambda root, **options: None, "must name its options"),
    ):
        with pytest.raises(ValueError, match=message):
            register("mine")(read)


def test_what_a_reader_returns_is_checked():
    register("nothing")(lambda root: None)
    with pytest.raises(
        UserError, match="reader of 'nothing' returned NoneType, not a musicgenre Dataset"
    ):
        load_dataset({"dataset": "nothing", "root": "x"})
    clip = Clip("a", "a.wav", ("y",), "train")
    register("wrong")(lambda root: Dataset("wrong", root, "", "single_label", ("x",), (clip,)))
    with pytest.raises(UserError, match="label 'y' is not one of the data set's labels"):
        load_dataset({"dataset": "wrong", "root": "x"})


def test_a_missing_root_and_an_unknown_name_say_what_to_do():
    config = base_config()
    with pytest.raises(UserError, match=r"'gtzan' needs its folder: set --config\.data\.root="):
        load_dataset(dataset_options(config))
    with pytest.raises(UserError, match=r"no data set 'gtzn'\. Did you mean 'gtzan'"):
        load_dataset({"dataset": "gtzn", "root": ""})
    with pytest.raises(UserError, match=r"no files\. Set --config\.data\.files\.train="):
        load_dataset({"dataset": "arrays", "root": "", "files": {}})


def test_the_names_of_options_are_those_of_the_config():
    fields = set(base_config().data) | {"seed", "layout"}
    assert fields == {*module.CONFIG_OPTIONS, *module.RESERVED}
    options = dataset_options(base_config()).keys()
    assert options == {*module.CONFIG_OPTIONS, "dataset", "root"}
