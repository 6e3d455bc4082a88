import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicgenre import models
from musicgenre.config import (
    base_config,
    check_config,
    feature_spec,
    from_plain,
    store_path,
    to_plain,
)
from musicgenre.errors import UserError
from musicgenre.studies.ablation import expand
from musicgenre.training.optimisers import make_optimizer
from musicgenre.training.state import create_state
from musicgenre.training.step import make_train_step

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs").rglob("*.py"))


def load(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    spec = importlib.util.spec_from_file_location("some_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_every_config_and_variant_builds_its_network(path, monkeypatch):
    module = load(path, monkeypatch)
    assert f"--config={path.relative_to(ROOT)}" in module.__doc__
    configs = [module.get_config()]
    if hasattr(module, "sweep"):
        expanded = expand(configs[0], module.sweep(), [0, 1])
        configs += [config for _, _, variants in expanded for config in variants]
        assert {config.seed for config in configs} == {0, 1}
        # Each override takes effect: no two variants are the same.
        assert len({str(to_plain(variants[0])) for _, _, variants in expanded}) == len(expanded)
    for config in configs:
        check_config(config)
        frames, bands = config.data.crop_frames or config.data.frames, feature_spec(config).bands
        network = models.build(
            config.model.to_dict(),
            num_classes=10,
            frames=frames,
            bands=bands,
            kind=config.features.kind,
        )
        x = jnp.zeros((2, frames, bands))
        logits = jax.eval_shape(
            lambda x, network=network: network.init_with_output(jax.random.key(0), x, train=False)[
                0
            ],
            x,
        )
        assert logits.shape == (2, 10)


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parent.name == "configs"], ids=lambda path: path.stem
)
def test_every_config_takes_one_step(path, monkeypatch):
    config = load(path, monkeypatch).get_config()
    task, classes = {
        "mtat": ("multi_label", 50),
        "msd": ("multi_label", 50),
        "csv": (config.data.task, 40),
    }.get(config.data.dataset, ("single_label", 10))
    frames, bands = config.data.crop_frames or config.data.frames, feature_spec(config).bands
    module = models.build(
        config.model.to_dict(),
        num_classes=classes,
        frames=frames,
        bands=bands,
        kind=config.features.kind,
    )
    config.optimizer.warmup_steps = 0  # at whose first step the rate is 0
    optimizer = make_optimizer(config.optimizer, 100)
    norm = {"mean": np.zeros((1, bands), np.float32), "std": np.ones((1, bands), np.float32)}
    state = create_state(
        module, optimizer, norm, seed=0, frames=frames, bands=bands, ema=config.ema_decay > 0
    )
    step = make_train_step(
        module,
        optimizer,
        seed=0,
        class_weights=jnp.ones(classes),
        task=task,
        loss=config.loss.name,
        ema_decay=config.ema_decay,
    )
    generator = np.random.default_rng(0)
    y = (
        np.array([3, 7], np.int32)
        if task == "single_label"
        else np.eye(classes, dtype=np.float32)[[3, 7]]
    )
    batch = {
        "x": generator.standard_normal((2, frames, bands)).astype(np.float16),
        "y": y,
        "mask": np.ones(2, np.float32),
    }
    # Kept on the host, so that the step can take over the state's buffers.
    before = np.asarray(state.params["head"]["bias"])
    new, metrics = jax.jit(step, donate_argnums=0)(state, batch)
    # Before the first step a classifier knows nothing: its loss is near that of equal probabilities.
    chance = np.log(classes) if task == "single_label" else np.log(2)
    assert int(new.step) == 1 and np.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0
    assert np.isfinite(metrics["loss"]) and (task == "regression" or metrics["loss"] < 4 * chance)
    assert np.abs(np.asarray(new.params["head"]["bias"]) - before).max() > 0


def test_the_base_is_the_reports():
    config = base_config()
    check_config(config)
    assert (
        feature_spec(config).describe()
        == "logmel 128 bands, 22050 Hz, n_fft 2048, hop 1024, 0-11025 Hz, dB re max, top 80 dB"
    )
    assert (
        config.batch_size,
        config.optimizer.name,
        config.optimizer.learning_rate,
        config.optimizer.decay_rate,
    ) == (32, "adam", 1e-3, 0.01)


def test_plain_configs_come_back_whole():
    config = base_config()
    config.model.filters = (1, 2)
    assert from_plain(to_plain(config)).to_dict() == config.to_dict()


def test_the_stores_place_differs_for_what_it_is_made_from():
    places = set()
    for field, value in (
        ("seed", 3),
        ("features.hop_length", 512),
        ("data.frames", 100),
        ("data.protocol", "random"),
        ("data.root", "elsewhere"),
        ("data.split_seed", 1),
    ):
        config = base_config()
        config.update_from_flattened_dict({field: value})
        places.add(store_path(config))
    assert len(places) == 6
    same = base_config()
    same.optimizer.name = "sgd"
    assert store_path(same) == store_path(base_config()) in places


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 0, "config.batch_size must be at least 1, not 0"),
        ("batch_size", "8", "config.batch_size must be int like 32, not '8'"),
        ("ema_decay", 1.0, "config.ema_decay must be at least 0 and below 1"),
        ("optimizer.accumulate", 5, "does not divide by optimizer.accumulate"),
        ("optimizer.learning_rate", -1.0, "config.optimizer.learning_rate must be above 0"),
        ("data.pad", "mirror", "data.pad must be"),
        ("data.normalise_clips", -1, "config.data.normalise_clips must not be negative, but is -1"),
        ("features.n_fft", 0, "features.n_fft must be at least 1"),
        ("optimizer.schedule", "kosine", "Did you mean 'cosine'"),
    ],
)
def test_values_out_of_range_are_named(field, value, message):
    config = base_config()
    *parents, leaf = field.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    with node.ignore_type():
        node[leaf] = value
    with pytest.raises(UserError, match=message):
        check_config(config)
