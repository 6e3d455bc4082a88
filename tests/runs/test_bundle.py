import dataclasses
import json
import struct

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from scipy.special import expit, softmax
from tiny_model import tiny_model

from musicgenre.errors import UserError
from musicgenre.inference.windows import Network
from musicgenre.runs import bundle as bundle_module
from musicgenre.runs.bundle import model_card, packaged_models, save_bundle
from musicgenre.runs.model import load_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def bundle(model, tmp_path):
    save_bundle(model, tmp_path / "tiny.safetensors", "# A card\n")
    return tmp_path / "tiny.safetensors"


def inputs(seed=0):
    return np.random.default_rng(seed).normal(-30, 15, (8, 64, 16)).astype(np.float16)


def test_a_bundle_gives_the_same_model_bit_for_bit(model, bundle):
    loaded = load_model(bundle)
    for name in ("step", "which", "measure", "label_names", "task", "features", "layout", "frames"):
        assert getattr(loaded, name) == getattr(model, name), name
    assert loaded.card == "# A card\n" and loaded.workdir == bundle
    assert jax.tree.structure(loaded.model) == jax.tree.structure(model.model)
    jax.tree.map(np.testing.assert_array_equal, loaded.model, model.model)
    for one, other in zip(Network(loaded)(inputs()), Network(model)(inputs()), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_a_temperature_divides_the_logits(task, tmp_path):
    plain = tiny_model(task)
    save_bundle(dataclasses.replace(plain, temperature=12.5), tmp_path / "tiny.safetensors")
    loaded = load_model(tmp_path / "tiny.safetensors")
    assert (
        loaded.temperature == 12.5
        and "- Temperature: 12.5" in model_card(loaded)
        and "Temperature" not in model_card(plain)
    )
    network = jax.jit(lambda x: plain.module.apply(plain.model["variables"], x, train=False))
    logits = np.asarray(network((inputs().astype(np.float32) + 30) / 15), np.float64)
    expected = {
        "single_label": softmax(logits / 12.5, axis=1),
        "multi_label": expit(logits / 12.5),
    }[task]
    found, embedding = Network(loaded)(inputs())
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    before, same = Network(plain)(inputs())
    assert np.abs(found - before).max() > 0.1
    np.testing.assert_array_equal(same, embedding)


def test_a_model_without_a_temperature_has_none_in_its_notes(model, bundle):
    with safe_open(bundle, "np") as file:
        assert "temperature" not in json.loads(file.metadata()["musicgenre"])
    assert load_model(bundle).temperature == 1
    with pytest.raises(UserError, match="a regression has none"):
        dataclasses.replace(tiny_model("regression"), temperature=2.0)


def test_a_bundle_of_the_first_schema_is_read_and_its_training_clips_are_unknown(model, bundle):
    changed_notes(bundle, schema=1)
    loaded = load_model(bundle)
    jax.tree.map(np.testing.assert_array_equal, loaded.model, model.model)
    assert loaded.trained_on.unknown == "tiny.safetensors does not list them"
    assert len(loaded.trained_on) == 0


def test_a_bundle_holds_no_path_of_this_machine(bundle):
    assert b"private" not in bundle.read_bytes()
    loaded = load_model(bundle)
    assert (
        loaded.config.data.root == ""
        and loaded.dataset["root"] == ""
        and loaded.dataset["name"] == "example"
    )


def test_half_precision_halves_the_size_and_nearly_keeps_the_probabilities(model, bundle, tmp_path):
    save_bundle(model, tmp_path / "half.safetensors", half=True)
    arrays = load_file(tmp_path / "half.safetensors")
    full = load_file(bundle)
    dtypes = {name: array.dtype for name, array in arrays.items()}
    assert {dtypes[name] for name in dtypes if "batch_stats" in name} == {np.dtype("float32")}
    assert dtypes["variables/params/head/kernel"] == dtypes["norm/mean"] == np.float16
    assert sum(a.nbytes for a in arrays.values()) < 0.6 * sum(a.nbytes for a in full.values())
    loaded = load_model(tmp_path / "half.safetensors")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.model)} == {np.dtype("float32")}
    difference = np.abs(Network(loaded)(inputs())[0] - Network(model)(inputs())[0]).max()
    assert 0 < difference < 5e-3


def test_values_that_float16_cannot_hold_stay_float32(tmp_path):
    model = tiny_model()
    params = model.model["variables"]["params"]
    params["head"]["bias"] = np.array([1e5, 0.0, -1.0], np.float32)
    kernel = next(name for name in params if "kernel" in params[name] and name != "head")
    params[kernel]["kernel"] = params[kernel]["kernel"] * 1e-7
    save_bundle(model, tmp_path / "half.safetensors", half=True)
    arrays = load_file(tmp_path / "half.safetensors")
    assert (
        arrays["variables/params/head/bias"].dtype
        == arrays[f"variables/params/{kernel}/kernel"].dtype
        == np.float32
    )
    assert (
        load_model(tmp_path / "half.safetensors").model["variables"]["params"]["head"]["bias"][0]
        == 1e5
    )


def changed_notes(path, **changes):
    """Writes other notes into a bundle; a value of None removes one."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    notes = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["musicgenre"]) | changes
    notes = {key: value for key, value in notes.items() if value is not None}
    save_file(load_file(path), path, metadata={"musicgenre": json.dumps(notes)})


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cut short"),
        (lambda path: path.write_bytes(b""), "not a readable model"),
        (lambda path: path.write_text("no model at all, but some text"), "not a readable model"),
        (lambda path: save_file({"a": np.zeros(3)}, path), "holds other arrays and no model"),
        (flipped, "its arrays do not match their SHA-256"),
        (lambda path: changed_notes(path, schema=3), "does not read schema 3"),
        (
            lambda path: changed_notes(path, temperature=-1),
            "a temperature must be a number above 0, not -1",
        ),
        (lambda path: changed_notes(path, label_names=None), "its notes lack 'label_names'"),
        (
            lambda path: changed_notes(path, label_names=["one", "two"]),
            r"has the shape \[3\] where .* has \[2\]",
        ),
        (lambda path: changed_notes(path, features={"bands": 3}), "features.bands is not a field"),
        (
            lambda path: save_file({}, path, metadata={"musicgenre": "{"}),
            "its notes cannot be read",
        ),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_by_name(bundle, damage, message):
    damage(bundle)
    with pytest.raises(UserError, match=message) as error:
        load_model(bundle)
    assert "tiny.safetensors" in str(error.value) or "features.bands" in str(error.value)


def test_bundle_names_and_packaged_names(model, bundle, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"must be named mine\.safetensors"):
        save_bundle(model, tmp_path / "mine.bin")
    assert not (tmp_path / "mine.bin").exists()
    with pytest.raises(UserError, match="a bundle holds one checkpoint"):
        load_model(bundle, "40")
    monkeypatch.setattr(bundle_module, "WEIGHTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert list(packaged_models()) == ["tiny"]
    (tmp_path / "tiny").mkdir()  # a folder of music, say
    assert load_model("tiny").workdir == bundle
    with pytest.raises(
        UserError, match=r"tinny: no such workdir, bundle or packaged model\. Did you mean 'tiny'"
    ):
        load_model("tinny")


def test_the_card_states_data_measure_labels_and_remarks(model):
    card = model_card(model, "Test: 12 of 290.")
    for words in (
        "# conv1d on example",
        "split: random",
        "accuracy 0.5000 on the validation split (last checkpoint, step 7)",
        "1.49 s windows (64 frames x 16 bands)",
        "logmel 16 bands, 22050 Hz",
        "low, middle, high/est",
        "Test: 12 of 290.",
    ):
        assert words in card
    assert "synthetic audio" not in card
