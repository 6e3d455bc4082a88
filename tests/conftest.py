"""Shared settings and fixtures; data are generated on the fly."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from absl import flags, logging
from ml_collections import ConfigDict

from musicgenre.config import base_config, clip_layout, dataset_options, feature_spec, store_path
from musicgenre.datasets import load_dataset
from musicgenre.store.prepare import PrepareSummary, prepare_store

os.environ.setdefault("MPLBACKEND", "Agg")
# Many tests train the same small network: compile it once a session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="musicgenre-xla-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

flags.FLAGS.mark_as_parsed()
logging.set_verbosity(logging.WARNING)

# Names the folder of real clips and arrays; without it the tests marked `real` are skipped.
REAL_DATA = "MUSICGENRE_REAL_DATA"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test that takes real data, so that `pytest -m real` runs these alone."""
    for item in items:
        if "real_data" in getattr(item, "fixturenames", ()):
            item.add_marker("real")


@pytest.fixture
def real_data() -> Path:
    """The folder of real clips and arrays that MUSICGENRE_REAL_DATA names."""
    folder = os.environ.get(REAL_DATA, "")
    if not folder:
        pytest.skip(f"{REAL_DATA} names no folder of real data")
    if not Path(folder).is_dir():
        pytest.fail(f"{REAL_DATA}={folder}: no such folder")
    return Path(folder).resolve()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an untrained model of three labels."""
    from tiny_model import tiny_model

    from musicgenre.runs.bundle import save_bundle

    path = tmp_path_factory.mktemp("bundle") / "tiny.safetensors"
    save_bundle(tiny_model(), path)
    return path


@pytest.fixture
def small_arrays(tmp_path: Path) -> Path:
    """A folder with arrays of three easy classes: 24 + 9 + 9 clips of 64 frames x 16 mel bands."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("valid", 9), ("test", 9)):
        label = np.arange(count) % 3
        spectrogram = -40 + 8 * generator.standard_normal((count, 16, 64))
        for row, number in enumerate(label):
            spectrogram[row, 5 * number : 5 * number + 5] += 12
        np.savez(
            tmp_path / f"{split}.npz",
            spectrogram=np.clip(spectrogram, -80, 0).astype(np.float32),
            label=label,
            genres=np.array(["low", "middle", "high"]),
            clip_id=np.array([f"{split}.{row}" for row in range(count)]),
        )
    return tmp_path


@pytest.fixture
def prepared() -> Callable[[ConfigDict], PrepareSummary]:
    """A function that prepares the store of a config."""

    def prepare(config: ConfigDict) -> PrepareSummary:
        dataset = load_dataset(dataset_options(config))
        return prepare_store(
            dataset,
            feature_spec(config),
            clip_layout(config),
            store_path(config),
            workers=1,
            progress=False,
        )

    return prepare


@pytest.fixture
def small_config(
    small_arrays: Path, tmp_path: Path, prepared: Callable[[ConfigDict], PrepareSummary]
) -> ConfigDict:
    """A config of a small network on `small_arrays`, whose store is prepared."""
    config = base_config()
    config.data.dataset = "arrays"
    config.data.root = str(small_arrays)
    config.data.files = ConfigDict({"train": "train.npz", "valid": "valid.npz", "test": "test.npz"})
    config.data.stores_root = str(tmp_path / "stores")
    config.data.frames = 64
    config.data.normalise = "band"
    config.features.n_mels = 16
    config.features.hop_length = 512
    config.model = ConfigDict({"name": "conv1d", "module": "", "filters": (8, 16), "dense": (16,)})
    config.batch_size = 8
    config.epochs = 4
    config.log_every = 2
    prepared(config)
    return config
