"""GTZAN's audio gives the spectrograms that the published accuracies were measured on."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from musicgenre.audio.features import FeatureSpec
from musicgenre.audio.layout import ClipLayout
from musicgenre.config import clip_layout, dataset_options, feature_spec
from musicgenre.datasets import load_dataset
from musicgenre.datasets.arrays import open_array_file
from musicgenre.datasets.gtzan import GENRES, fault_filtered_lists
from musicgenre.inference.windows import Network
from musicgenre.runs.model import load_model
from musicgenre.store.prepare import prepare_store
from musicgenre.store.store import Store

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("--config.data.allow_missing=True", "--noprogress")


@pytest.fixture
def config():
    from musicgenre.configs import gtzan_modulation

    return gtzan_modulation.get_config()


def prepare(config, root, store):
    config.data.root, config.data.allow_missing = str(root), True
    dataset = load_dataset(dataset_options(config))
    prepare_store(
        dataset, feature_spec(config), clip_layout(config), store, workers=1, progress=False
    )
    return Store.open(store)


def test_features_of_real_clips_equal_the_precomputed_arrays(config, real_data, tmp_path):
    """8-bit steps of 0.31 dB and the store's float16 are the only differences."""
    store = prepare(config, real_data / "gtzan_audio", tmp_path / "store")
    arrays = [
        open_array_file(real_data / f"gtzan_mels/{split}.npz") for split in ("train", "valid")
    ]
    errors = {}
    for number, clip_id in enumerate(store.clip_ids):
        if not store.paths[number].endswith(".au"):
            continue
        file = next(file for file in arrays if clip_id in file.clip_ids)
        row = file.clip_ids.index(clip_id)
        assert store.splits[number] == file.path.stem and store.lengths[number] == 387
        expected = file.spectrogram(row)
        errors[clip_id] = np.abs(store.gather(np.array([number]))[0] - expected)
        with np.load(file.path) as archive:
            exact = archive["db_min_exact"][row]
        # Two clips span under 80 dB, and the lower end of their arrays' scale is an estimate.
        assert errors[clip_id].mean() < (0.1 if exact else 0.7)
        assert errors[clip_id].max() < (0.2 if exact else 1.4)
    assert len(errors) == 8


def tree(folder, seconds):
    """Writes two train clips and one of each other split per genre; jazz.00054 is truncated."""
    chosen = {"jazz.00054": "train"}
    for split, most in (("train", 2), ("valid", 1), ("test", 1)):
        for genre in GENRES:
            ids = [name for name, own in fault_filtered_lists().items() if own == split]
            chosen |= dict.fromkeys([name for name in ids if name.startswith(genre)][:most], split)
    generator = np.random.default_rng(0)
    for clip_id in chosen:
        genre = clip_id.split(".")[0]
        path = folder / genre / f"{clip_id}.{'au' if genre < 'hiphop' else 'wav'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        time = np.arange(int(22050 * seconds)) / 22050
        tone = np.sin(2 * np.pi * 110 * (1 + GENRES.index(genre)) * time)
        noise = 0.05 * generator.standard_normal(len(time))
        soundfile.write(path, 0.2 * tone + noise, 22050, subtype="PCM_16")
    broken = folder / "jazz/jazz.00054.wav"
    broken.write_bytes(broken.read_bytes()[:3000])
    return chosen


def run(script, *flags, cwd):
    command = [sys.executable, ROOT / f"experiments/{script}.py", *flags]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_best_model_trains_from_a_folder_of_audio(tmp_path):
    """The documented sequence of commands, on short synthetic files with GTZAN's names."""
    chosen = tree(tmp_path / "gtzan", 4)
    data = (
        f"--config={ROOT}/configs/gtzan_modulation.py",
        f"--config.data.root={tmp_path}/gtzan",
        *FLAGS,
    )
    printed = run("prepare", *data, cwd=tmp_path)
    assert "40 clips (test 10, train 20, valid 10); 41 computed" in printed
    (store,) = (tmp_path / "stores").iterdir()
    reasons = {entry["clip_id"]: entry["reason"] for entry in Store.open(store).skipped}
    assert "truncated" in reasons["jazz.00054"] and reasons["jazz.00055"] == "not on disk"
    short = ("--config.epochs=1", "--config.eval_every=1", "--config.optimizer.warmup_steps=0")
    run("train", *data, *short, "--config.batch_size=8", "--workdir=run", cwd=tmp_path)
    run("evaluate", "--workdir=run", "--split=valid", cwd=tmp_path)
    (report,) = (tmp_path / "run").rglob("metrics.json")
    assert json.loads(report.read_text())["n"] == 10
    assert len(chosen) == 41


def test_a_longer_or_shorter_clip_keeps_the_hop(config):
    layout, spec = ClipLayout(20, excerpt="spread"), feature_spec(config)
    noise = np.random.default_rng(0).standard_normal(22050 * 5).astype(np.float32)
    longer = layout.features(noise, spec)
    assert longer.shape == (20, 128)
    np.testing.assert_array_equal(longer, layout.features(noise[: 20 * 1710], spec))
    # Of 10 hops there are 10 frames; the 2.5 % that may be missing do not change the number.
    assert len(layout.features(noise[: 10 * 1710], spec)) == 10
    assert len(layout.features(noise[: 20 * 1710 - 800], spec)) == 20
    # At a hop of no more than a quarter of the transform every frame is kept.
    fine = ClipLayout(20, excerpt="spread").features
    dense = FeatureSpec(hop_length=512)
    np.testing.assert_array_equal(
        fine(noise[: 19 * 512], dense), ClipLayout(20).features(noise[: 19 * 512], dense)
    )


def test_the_packaged_model_decides_alike_on_audio_and_on_arrays(config, real_data, tmp_path):
    store = prepare(config, real_data / "gtzan_audio", tmp_path / "store")
    network = Network(load_model("gtzan"))
    full = [number for number, path in enumerate(store.paths) if path.endswith(".au")]
    from_audio, _ = network(store.gather(np.array(full)).astype(np.float32))
    arrays = []
    for number in full:
        file = open_array_file(real_data / f"gtzan_mels/{store.splits[number]}.npz")
        arrays.append(file.spectrogram(file.clip_ids.index(store.clip_ids[number])))
    from_arrays, _ = network(np.stack(arrays))
    assert (from_audio.argmax(axis=1) == from_arrays.argmax(axis=1)).all()
    np.testing.assert_allclose(from_audio, from_arrays, atol=0.03)
