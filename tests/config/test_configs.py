import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicgenre import models
from musicgenre.config import (
    base_config,
    check_config,
    dataset_options,
    differences,
    feature_spec,
    from_plain,
    store_path,
    to_plain,
)
from musicgenre.datasets import load_dataset
from musicgenre.errors import UserError
from musicgenre.studies.ablation import expand
from musicgenre.training.optimisers import make_optimizer
from musicgenre.training.state import create_state
from musicgenre.training.step import make_train_step

ROOT = Path(__file__).resolve().parents[2]
# Names as --config takes them, such as "synthetic" and "ablations/report_knobs".
NAMES = sorted(
    path.relative_to(ROOT / "configs").with_suffix("").as_posix()
    for path in (ROOT / "configs").rglob("*.py")
    if path.name != "__init__.py"
)
EXPERIMENTS = [name for name in NAMES if not name.startswith("ablations/")]
# Configs whose step compiles in a few seconds.
QUICK = ("gtzan_mels_rbm", "gtzan_modulation", "spotify_factors", "synthetic")
# Configs that exist on GTZAN's audio and on the precomputed arrays.
TWO_SOURCES = [
    name
    for name in NAMES
    if name.startswith(("gtzan_m", "ablations/")) and name != "ablations/gtzan_protocols"
]


def load(name):
    """Returns the module of a config."""
    return importlib.import_module(f"musicgenre.configs.{name.replace('/', '.')}")


def build(config, classes):
    """Returns a config's network and the shape of its input without the batch."""
    shape = config.data.crop_frames or config.data.frames, feature_spec(config).bands
    network = models.build(
        config.model.to_dict(),
        num_classes=classes,
        frames=shape[0],
        bands=shape[1],
        kind=config.features.kind,
    )
    return network, shape


@pytest.mark.parametrize("name", NAMES)
def test_every_config_and_variant_builds_its_network(name):
    module = load(name)
    assert f"--config={name}" in module.__doc__
    assert "shared/" not in module.__doc__ and "../" not in str(module.get_config())
    configs = [module.get_config()]
    if hasattr(module, "sweep"):
        expanded = expand(configs[0], module.sweep(), [0, 1])
        configs += [config for _, _, variants in expanded for config in variants]
        assert {config.seed for config in configs} == {0, 1}
        # Each override takes effect: no two variants are the same.
        assert len({str(to_plain(variants[0])) for _, _, variants in expanded}) == len(expanded)
    built = set()
    for config in configs:
        check_config(config)
        network, shape = build(config, 10)
        if (network, shape) in built:
            continue
        built.add((network, shape))
        logits = jax.eval_shape(
            lambda x, network=network: network.init_with_output(jax.random.key(0), x)[0],
            jnp.zeros((2, *shape)),
        )
        assert logits.shape == (2, 10)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_config_takes_one_step(name):
    config = load(name).get_config()
    task, classes = {
        "mtat": ("multi_label", 50),
        "msd": ("multi_label", 50),
        "csv": (config.data.task, 40),
    }.get(config.data.dataset, ("single_label", 10))
    network, (frames, bands) = build(config, classes)
    config.optimizer.warmup_steps = 0  # the rate is 0 in the first step of a warm-up
    optimizer = make_optimizer(config.optimizer, 100)
    norm = {"mean": np.zeros((1, bands), np.float32), "std": np.ones((1, bands), np.float32)}
    ema = config.ema_decay

    def initial():
        return create_state(
            network, optimizer, norm, seed=0, frames=frames, bands=bands, ema=ema > 0
        )

    step = make_train_step(
        network,
        optimizer,
        seed=0,
        class_weights=jnp.ones(classes),
        task=task,
        loss=config.loss.name,
        ema_decay=ema,
    )
    y = np.array([3, 7], np.int32)
    batch = {
        "x": np.random.default_rng(0).standard_normal((2, frames, bands)).astype(np.float16),
        "y": y if task == "single_label" else np.eye(classes, dtype=np.float32)[y],
        "mask": np.ones(2, np.float32),
    }
    if name not in QUICK:
        # The step is traced, which finds wrong shapes and types, and not compiled.
        state = jax.eval_shape(initial)
        new, metrics = jax.eval_shape(step, state, batch)
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
        assert metrics["loss"].shape == metrics["grad_norm"].shape == ()
        return
    state = initial()
    # Copied to the host, since the step reuses the state's buffers.
    before = np.asarray(state.params["head"]["bias"])
    new, metrics = jax.jit(step, donate_argnums=0)(state, batch)
    # An untrained classifier's loss is near that of equal probabilities.
    chance = np.log(classes) if task == "single_label" else np.log(2)
    assert int(new.step) == 1 and np.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0
    assert np.isfinite(metrics["loss"]) and (task == "regression" or metrics["loss"] < 4 * chance)
    assert np.abs(np.asarray(new.params["head"]["bias"]) - before).max() > 0


@pytest.mark.parametrize("name", TWO_SOURCES)
def test_audio_and_arrays_differ_in_the_source_of_the_spectrograms_alone(name):
    module = load(name)
    audio, arrays = (to_plain(module.get_config(source)) for source in ("audio", "arrays"))
    assert to_plain(module.get_config()) == audio
    assert differences(audio, arrays) == [
        "data.dataset: gtzan -> arrays",
        "data.excerpt: spread -> start",
        "data.files.train:  -> train.npz",
        "data.files.valid:  -> valid.npz",
    ]
    with pytest.raises(UserError, match="array"):
        module.get_config("array")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_missing_data_folder_is_one_clear_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load(name).get_config()
    if config.data.dataset == "synthetic":
        return
    for source in [config, load(name).get_config("arrays")] if name in TWO_SOURCES else [config]:
        assert source.data.root == ""
        with pytest.raises(UserError, match=r"[Ss]et --config\.data\.root="):
            load_dataset(dataset_options(source))


def test_sizes_and_sources_of_the_residual_network_combine():
    get_config = load("gtzan_mels_resnet").get_config
    assert to_plain(get_config("report")) == to_plain(get_config())
    assert get_config("arrays").data.dataset == "arrays"
    sized = get_config("resnet50-arrays")
    assert sized.data.dataset == "arrays"
    assert sized.model.to_dict() == get_config("resnet50").model.to_dict()
    for wrong in ("resnet51", "resnet50-array", "resnet51-arrays"):
        with pytest.raises(UserError, match=r"Did you mean .(resnet50|arrays)"):
            get_config(wrong)


def test_the_base_config_is_the_reports():
    config = base_config()
    check_config(config)
    assert (
        feature_spec(config).describe()
        == "logmel 128 bands, 22050 Hz, n_fft 2048, hop 1024, 0-11025 Hz, dB re max, top 80 dB"
    )
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.decay_rate) == ("adam", 1e-3, 0.01)
    assert config.batch_size == 32


def test_plain_configs_round_trip():
    config = base_config()
    config.model.filters = (1, 2)
    assert from_plain(to_plain(config)).to_dict() == config.to_dict()


def test_the_stores_path_depends_on_what_the_store_is_made_from():
    paths = set()
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
        paths.add(store_path(config))
    assert len(paths) == 6
    same = base_config()
    same.optimizer.name = "sgd"
    assert store_path(same) == store_path(base_config()) in paths


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 0, "config.batch_size must be at least 1, not 0"),
        ("batch_size", "8", "config.batch_size must be int like 32, not '8'"),
        ("ema_decay", 1.0, "config.ema_decay must be at least 0 and below 1"),
        ("optimizer.accumulate", 5, "does not divide by optimizer.accumulate"),
        ("optimizer.learning_rate", -1.0, "config.optimizer.learning_rate must be above 0"),
        ("data.pad", "mirror", "data.pad must be"),
        ("data.normalise_clips", -1, "config.data.normalise_clips must be at least 0, not -1"),
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
