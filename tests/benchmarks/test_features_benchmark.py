import importlib
import re

import numpy as np
import pytest

from musicgenre.audio.features import FeatureSpec, compute_features
from musicgenre.store.store import Store


@pytest.fixture
def benchmark():
    return importlib.import_module("benchmarks.features")


def test_both_sides_compute_the_same(benchmark):
    clips = benchmark.made_up_clips(2.0, 22050)
    assert {len(samples) for samples in clips.values()} == {44100}
    lines, speed, error = benchmark.compare(clips, FeatureSpec(), 1)
    assert len(lines) == 4 and speed > 0 and error < 1e-4
    for kind in ("mfcc", "stft"):
        spec = FeatureSpec(kind=kind)
        found = benchmark.librosa_features(clips["noise"], spec)
        np.testing.assert_allclose(found, compute_features(clips["noise"], spec), rtol=0, atol=2e-3)


def test_a_difference_is_seen(benchmark, monkeypatch):
    clips = {"noise": benchmark.made_up_clips(1.0, 22050)["noise"]}
    monkeypatch.setattr(
        benchmark,
        "compute_features",
        lambda samples, spec: compute_features(samples, spec) + np.float32(0.25),
    )
    assert benchmark.compare(clips, FeatureSpec(), 1)[2] == pytest.approx(0.25, abs=1e-4)


def test_processor_time_is_counted_for_each_call(benchmark, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(benchmark.time, "process_time", lambda: clock[0])

    def takes(seconds):
        def run():
            clock[0] += seconds

        return run

    processor = benchmark.in_turns({"a": takes(6.0), "b": takes(3.0)}, rounds=2, units=3)[1]
    assert processor["a"].seconds == (2.0, 2.0) and processor["b"].seconds == (1.0, 1.0)


def test_the_parts_are_those_of_the_whole(benchmark, monkeypatch, tmp_path):
    """Step by step the clips become the rows that the store has."""
    kind = benchmark.Kind("mp3", 44100, 2)
    preparing = benchmark.Preparing(
        benchmark.write_clips(tmp_path / "clips", kind, 6, 1.5), 44100, 1.5, tmp_path
    )
    assert list(preparing.parts()) == ["decode", "resample", "mel", "write", "hash"]
    for part in preparing.parts().values():
        part()
    rows = np.load(tmp_path / "rows.npy")
    assert rows.shape == (6, FeatureSpec().frames(1.5), 128)
    benchmark.prepare_store(
        preparing.dataset,
        FeatureSpec(),
        preparing.layout,
        tmp_path / "kept",
        workers=1,
        progress=False,
    )
    np.testing.assert_array_equal(rows, np.load(tmp_path / "kept/shards/00000.npy"))
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
    assert list(benchmark.Preparing(preparing.dataset, 22050, 1.5, tmp_path).parts()) == [
        "decode",
        "mel",
        "write",
        "hash",
    ]


def test_a_dry_run_prints_every_figure(benchmark, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "free_cores", lambda processes: 1.5)
    monkeypatch.setattr(benchmark, "KINDS", benchmark.KINDS[:1])
    prepare = benchmark.Preparing.prepare
    monkeypatch.setattr(
        benchmark.Preparing, "prepare", lambda self, workers, clips=0: prepare(self, 1, clips)
    )
    assert benchmark.main(["--tiny", f"--real={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"bars: at least 2 times, (NOT )?met; at most 0\.0001 dB, met", printed)
    assert re.search(
        r"rate over that of the parts, processor time: [\d.]+ .*bar: at least 0\.9, ", printed
    )
    assert re.search(r"12 clips with the start: [\d.]+ .*bar: at least 1\.9, ", printed)
    assert re.search(
        r"second 6 clips alone, without the start: -?[\d.]+ .*bar: at least 1\.9, ", printed
    )
    assert (
        "two busy loops get 1.50 cores" in printed
        and printed.count("times as fast (quartiles") == 12
    )
