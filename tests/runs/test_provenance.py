import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_model import tiny_model

from musicgenre import models
from musicgenre.errors import UserError
from musicgenre.runs.bundle import save_bundle
from musicgenre.runs.model import load_model
from musicgenre.runs.provenance import TrainedOn, clips_of, compact, read_workdir
from musicgenre.runs.workdir import claim_workdir
from musicgenre.store.store import Store
from musicgenre.studies.evaluate import evaluate_model
from musicgenre.training.fit import train


def test_a_bundle_is_audited_without_its_training_store(small_config, tmp_path):
    config = ConfigDict(small_config.to_dict())
    config.epochs = 1
    train(config, tmp_path / "run", progress=False)
    run = load_model(tmp_path / "run")
    (path,) = (tmp_path / "stores").iterdir()
    expected = evaluate_model(run, Store.open(path), "valid").audit
    assert expected.clean and expected.fingerprints_compared and expected.trained == 24
    save_bundle(run, tmp_path / "run.safetensors")
    assert str(tmp_path).encode() not in (tmp_path / "run.safetensors").read_bytes()

    store = Store.open(path.rename(tmp_path / "moved"))
    assert not evaluate_model(run, store, "valid").audit.fingerprints_compared
    bundle = load_model(tmp_path / "run.safetensors")
    for field in ("clip_ids", "hashes", "groups", "unknown"):
        assert getattr(bundle.trained_on, field) == getattr(run.trained_on, field)
    found = evaluate_model(bundle, store, "valid").audit
    assert found.closest == pytest.approx(expected.closest, abs=2e-3)  # the fingerprints are int8
    assert dataclasses.replace(found, closest=0) == dataclasses.replace(expected, closest=0)
    # Every type of trace alone reveals all 24 clips.
    ids, hashes = [f"renamed {i}" for i in range(24)], [""] * 24
    for changes, kind in (
        ({}, "same clip"),
        ({"clip_ids": ids}, "same content"),
        ({"clip_ids": ids, "hashes": hashes}, "near-identical"),
    ):
        trained_on = dataclasses.replace(bundle.trained_on, **changes)
        changed = dataclasses.replace(bundle, trained_on=trained_on)
        (finding,) = evaluate_model(changed, store, "train").audit.findings
        assert (finding.kind, finding.clips) == (kind, 24)


def test_a_run_records_the_training_clips_of_its_initial_model_and_teachers(small_config, tmp_path):
    """Its fingerprints are taken from the bundle, its own from the store."""
    prints = np.random.default_rng(0).standard_normal((2, 2048)).astype(np.float32)
    before = TrainedOn(["a", "train.0"], ["#a", "#b"], ["x", None], fingerprints=prints)
    save_bundle(
        dataclasses.replace(tiny_model(), trained_on=before), tmp_path / "first.safetensors"
    )
    (path,) = (tmp_path / "stores").iterdir()
    store = Store.open(path)
    config = ConfigDict(small_config.to_dict())
    config.model = ConfigDict(models.resolve(config.model.to_dict()))
    config.init_from = str(tmp_path / "first.safetensors")
    claim_workdir(tmp_path / "run", config, store, [TrainedOn(["t"], ["#t"], [None])])
    claim_workdir(tmp_path / "run", config, store)  # a resumed run is the same run
    own = clips_of(store, store.indices("train"))
    found = read_workdir(tmp_path / "run")
    assert found.clip_ids == [*own.clip_ids, "a", "t"] and found.hashes[24:] == ["#a", "#t"]
    assert found.groups[24:] == ["x", None] and found.unknown == ""
    # The teacher's clip is in no source.
    assert found.with_fingerprints().fingerprints is None
    claim_workdir(tmp_path / "untaught", config, store)
    found = read_workdir(tmp_path / "untaught").with_fingerprints().fingerprints
    np.testing.assert_array_equal(found[:24], own.with_fingerprints().fingerprints)
    np.testing.assert_array_equal(found[24], compact(prints)[0])


def test_compact_fingerprints_have_the_same_cosines():
    """The audit's threshold is 0.8; the closest of different clips have 0.76."""
    generator = np.random.default_rng(0)
    prints = generator.standard_normal((40, 2048)).astype(np.float32)
    prints[0] = 0
    copies = prints + np.linspace(0, 2, 40)[:, None] * generator.standard_normal(prints.shape)
    small = compact(prints)
    assert small.dtype == np.int8 and not small[0].any() and np.abs(small[1:]).max() == 127

    def cosines(rows):
        rows = rows[1:].astype(np.float64)
        product = (rows * copies[1:]).sum(axis=1)
        return product / np.linalg.norm(rows, axis=1) / np.linalg.norm(copies[1:], axis=1)

    np.testing.assert_allclose(cosines(small), cosines(prints), rtol=0, atol=1e-3)


def test_a_run_without_a_record_is_unknown_and_a_damaged_record_is_named(tmp_path):
    assert read_workdir(tmp_path).unknown == f"{tmp_path.name} does not list them"
    assert TrainedOn(["a"], ["#"], [None]).has_seen(["b", "a", "c"], ["", "", "#"]).tolist() == [
        False,
        True,
        True,
    ]
    (tmp_path / "train_clips.json").write_text('{"clip_id": []}')
    with pytest.raises(UserError, match=r"train_clips.json: not a list of training clips"):
        read_workdir(tmp_path)
