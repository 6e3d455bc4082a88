import re

import numpy as np
import pytest

from benchmarks import features as benchmark
from benchmarks._clips import FileType
from musicgenre.audio.features import FeatureSpec, compute_features
from musicgenre.store.store import Store


def test_both_sides_compute_the_same():
    clips = benchmark.synthetic_clips(2.0, 22050)
    assert {len(samples) for samples in clips.values()} == {44100}
    rows, speed, error = benchmark.compare(clips, FeatureSpec(), 1)
    assert len(rows) == 4 and speed > 0 and error < 1e-4
    for kind in ("mfcc", "stft"):
        spec = FeatureSpec(kind=kind)
        found = benchmark.librosa_features(clips["noise"], spec)
        np.testing.assert_allclose(found, compute_features(clips["noise"], spec), rtol=0, atol=2e-3)


def test_a_difference_is_seen(monkeypatch):
    clips = {"noise": benchmark.synthetic_clips(1.0, 22050)["noise"]}

    def shifted(samples, spec):
        return compute_features(samples, spec) + np.float32(0.25)

    monkeypatch.setattr(benchmark, "compute_features", shifted)
    assert benchmark.compare(clips, FeatureSpec(), 1)[2] == pytest.approx(0.25, abs=1e-4)


def test_the_steps_make_the_rows_of_the_store(monkeypatch, tmp_path):
    dataset = benchmark.make_clips(tmp_path / "clips", FileType("mp3", 44100, 2), 6, 1.5)
    preparing = benchmark.Preparing(dataset, 44100, 1.5, tmp_path)
    steps = preparing.steps()
    assert list(steps) == ["decode", "resample", "mel", "write", "hash"]
    for step in steps.values():
        step()
    rows = np.load(tmp_path / "rows.npy")
    assert rows.shape == (6, FeatureSpec().frames(1.5), 128)
    monkeypatch.setattr(benchmark.shutil, "rmtree", lambda folder: None)
    preparing.prepare(1)
    np.testing.assert_array_equal(rows, np.load(tmp_path / "store/shards/00000.npy"))
    monkeypatch.undo()
    benchmark.shutil.rmtree(tmp_path / "store")
    made = []
    monkeypatch.setattr(
        benchmark.shutil, "rmtree", lambda folder: made.append(Store.open(folder).clip_ids.tolist())
    )
    preparing.prepare(1, 8)
    assert made == [[f"{number:05d}" for number in range(8)]]
    monkeypatch.undo()
    benchmark.shutil.rmtree(tmp_path / "store")
    preparing.prepare(1, 5)
    assert not (tmp_path / "store").exists()
    same_rate = benchmark.Preparing(dataset, 22050, 1.5, tmp_path)
    assert list(same_rate.steps()) == ["decode", "mel", "write", "hash"]


def test_a_dry_run_prints_every_figure(capsys, monkeypatch):
    monkeypatch.delenv("MUSICGENRE_REAL_DATA", raising=False)
    monkeypatch.setattr(benchmark, "FILE_TYPES", benchmark.FILE_TYPES[:1])
    prepare = benchmark.Preparing.prepare
    monkeypatch.setattr(
        benchmark.Preparing, "prepare", lambda self, workers, clips=0: prepare(self, 1, clips)
    )
    assert benchmark.main(["--tiny"]) == 0
    printed = capsys.readouterr().out
    for pattern in (
        r"targets: at least 2 times, (met|missed); at most 0\.0001 dB, met",
        r"rate over that of the steps, processor time: [\d.]+ .*target: at least 0\.9, ",
        r"12 clips including start-up: [\d.]+ .*target: at least 1\.9, ",
        r"6 further clips alone: -?[\d.]+ .*target: at least 1\.9, ",
    ):
        assert re.search(pattern, printed), pattern
    names = ("synthetic music", "noise", "decaying tone", "tone over noise")
    assert [printed.count(f"\n  {name}  ") for name in names] == [3] * 4
