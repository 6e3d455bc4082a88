import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from tiny_model import tiny_model

from musicgenre import models
from musicgenre.config import base_config
from musicgenre.errors import UserError
from musicgenre.runs.bundle import save_bundle
from musicgenre.runs.model import load_model
from musicgenre.store.store import Store
from musicgenre.studies.evaluate import evaluate_model
from musicgenre.training.fit import train
from musicgenre.training.optimisers import make_optimizer
from musicgenre.training.state import create_state
from musicgenre.training.transfer import layer_order, layer_rates, start_from


def changed(config, **fields):
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in fields.items()}
    )
    return config


def params(workdir, step="last"):
    return jax.tree.map(np.asarray, load_model(workdir, step).model["variables"]["params"])


@pytest.fixture
def source(small_config, tmp_path):
    """A finished run with batch normalisation."""
    config = changed(small_config, model__batch_norm=True, epochs=2)
    train(config, tmp_path / "source", progress=False)
    return config


def test_layers_come_in_the_order_of_their_calls():
    module = models.build(
        {"name": "conv1d", "batch_norm": True}, num_classes=10, frames=387, bands=128
    )
    order = ["conv1", "norm1", "conv2", "norm2", "conv3", "norm3", "dense1", "head"]
    assert layer_order(module, 387, 128) == order


def test_rates_by_hand():
    layers = ["a", "b", "head"]
    rates = layer_rates(layers, True, 0.1, 0.5)
    assert rates == pytest.approx({"a": 0.025, "b": 0.05, "head": 1.0})
    assert layer_rates(layers, False, 0.1, 1.0) == {"a": 1.0, "b": 1.0, "head": 1.0}


def test_an_adam_step_is_scaled_layer_by_layer():
    config = ConfigDict(
        base_config().optimizer.to_dict() | {"schedule": "constant", "learning_rate": 0.1}
    )
    tree = {"a": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2))}}
    optimizer = make_optimizer(config, 10, {"a": 0.25, "head": 1.0})
    updates, _ = optimizer.update(tree, optimizer.init(tree), tree)
    # Adam's first step is the rate for any gradient.
    np.testing.assert_allclose(updates["a"]["kernel"], -0.025, rtol=1e-4)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.1, rtol=1e-4)
    plain = make_optimizer(config, 10, {"a": 1.0, "head": 1.0})
    assert jax.tree.structure(plain.init(tree)) == jax.tree.structure(
        optax.adam(lambda _: 0.1).init(tree)
    )


def test_a_frozen_body_stays_and_a_new_head_learns(source, tmp_path):
    config = changed(
        source, init_from=str(tmp_path / "source"), optimizer__transferred_rate=0.0, seed=1
    )
    train(config, tmp_path / "run", progress=False)
    before, after = params(tmp_path / "source"), params(tmp_path / "run")
    for layer in set(before) - {"head"}:
        jax.tree.map(np.testing.assert_array_equal, before[layer], after[layer])
    assert np.abs(before["head"]["kernel"] - after["head"]["kernel"]).max() > 0


def test_batch_normalisation_statistics_are_copied_and_the_input_normalisation_is_not(tmp_path):
    there = tiny_model()
    save_bundle(there, tmp_path / "tiny.safetensors")
    norm = {"mean": np.float32([[1.0] * 16]), "std": np.float32([[2.0] * 16])}
    fresh = create_state(there.module, optax.sgd(0.1), norm, seed=3, frames=64, bands=16, ema=True)
    layers = layer_order(there.module, 64, 16)
    model = there.config.model.to_dict()
    source = tmp_path / "tiny.safetensors"
    state = start_from(fresh, layers, source, model=model, features=there.features)
    saved = there.model["variables"]
    assert state.collections.keys() == {"batch_stats"}
    jax.tree.map(
        np.testing.assert_array_equal, state.collections["batch_stats"], saved["batch_stats"]
    )
    for tree in (state.params, state.ema):
        for layer in layers[:-1]:
            jax.tree.map(np.testing.assert_array_equal, tree[layer], saved["params"][layer])
        np.testing.assert_array_equal(tree["head"]["kernel"], fresh.params["head"]["kernel"])
    np.testing.assert_array_equal(state.norm["mean"], norm["mean"])


def test_a_slow_body_changes_less_than_a_free_one(source, tmp_path):
    moved = {}
    for rate in (0.1, 1.0):
        config = changed(
            source, init_from=str(tmp_path / "source"), optimizer__transferred_rate=rate, epochs=1
        )
        train(config, tmp_path / str(rate), progress=False)
        difference = (
            params(tmp_path / "source")["conv1"]["kernel"]
            - params(tmp_path / str(rate))["conv1"]["kernel"]
        )
        moved[rate] = float(np.linalg.norm(difference))
    assert 0 < moved[0.1] < moved[1.0]


def test_a_run_resumes_without_its_source_which_the_audit_still_counts(source, tmp_path):
    config = changed(source, init_from=str(tmp_path / "source"), epochs=2)
    train(config, tmp_path / "run", progress=False)
    (tmp_path / "source" / "checkpoints").rename(tmp_path / "elsewhere")
    again = train(config, tmp_path / "run", progress=False)
    assert again.step == 6
    # The other run was trained on a clip that is evaluated here.
    record = json.loads((tmp_path / "run" / "train_clips.json").read_text())
    store = Store.open(record["store"])
    clip = int(store.indices("valid")[0])
    record["init_from"]["clip_id"].append(str(store.clip_ids[clip]))
    record["init_from"]["sha256"].append(str(store.hashes[clip]))
    record["init_from"]["group"].append(None)
    model = load_model(tmp_path / "run")
    assert evaluate_model(model, store, "valid").audit.clean
    (tmp_path / "run" / "train_clips.json").write_text(json.dumps(record))
    audit = evaluate_model(load_model(tmp_path / "run"), store, "valid").audit
    assert not audit.clean and audit.findings[0].clips == 1


def test_a_bundle_is_a_source_of_unknown_clips(small_config, tmp_path, caplog):
    """Everything except the head (five labels there, three here) is copied; no audit is clean."""
    bundle = tmp_path / "tags.safetensors"
    there = tiny_model(
        "multi_label", tuple("abcde"), features__compression="log10000", features__top_db=60.0
    )
    save_bundle(there, bundle)
    config = changed(
        small_config,
        model__batch_norm=True,
        init_from=str(bundle),
        optimizer__transferred_rate=0.0,
        epochs=1,
    )
    with caplog.at_level("WARNING", "absl"):
        train(config, tmp_path / "run", progress=False)
    assert "training clips unknown: tags.safetensors does not list them" in caplog.text
    assert (
        "other features (there -> here): compression: log10000 -> db; top_db: 60.0 -> 80.0"
        in caplog.text
    )
    model = load_model(tmp_path / "run")
    before, after = (m.model["variables"]["params"] for m in (there, model))
    for layer in set(before) - {"head"}:
        jax.tree.map(np.testing.assert_array_equal, before[layer], after[layer])
    assert before["head"]["bias"].shape == (5,) and after["head"]["bias"].shape == (3,)

    store = Store.open(json.loads((tmp_path / "run" / "train_clips.json").read_text())["store"])
    audit = evaluate_model(model, store, "valid").audit
    assert not audit.clean and not audit.findings
    assert audit.summary()[:2] == [
        "training clips unknown: tags.safetensors does not list them; leakage cannot be ruled out",
        "nothing found among the training clips that are known: "
        "9 evaluated clips against 24 trained on",
    ]


def test_a_source_of_another_size_is_named(source, tmp_path):
    config = changed(source, init_from=str(tmp_path / "source"), model__filters=(8, 32))
    message = r"its layer conv2/kernel has the shape \(4, 8, 16\) where \(4, 8, 32\) is needed"
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "config.init_from: 'nowhere': no such workdir, bundle or packaged model"),
        ("gtzam", "Did you mean 'gtzan'"),
        ("stores", "stores: no checkpoint found there"),
        ("train.npz", "train.npz: not a readable model"),
        ("gtzan", "config.init_from='gtzan' holds the model 'modulation', not 'conv1d'"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(
    small_config, tmp_path, monkeypatch, source, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        train(changed(small_config, init_from=source), tmp_path / "run", progress=False)


def test_a_rate_without_a_source_is_refused(small_config, tmp_path):
    with pytest.raises(
        UserError, match=r"transferred_rate has no effect without config\.init_from"
    ):
        train(
            changed(small_config, optimizer__transferred_rate=0.5), tmp_path / "run", progress=False
        )
