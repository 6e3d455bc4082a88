import dataclasses
import re

import numpy as np
import pytest
import soundfile

from benchmarks import scale
from musicgenre.audio.features import FeatureSpec
from musicgenre.store.store import Store


def test_what_a_million_tracks_take_is_worked_by_hand():
    gtzan, mtat, million = scale.DATASETS
    # 647 frames of 128 float16 are 165,632 bytes; each of the 7,813 shards has a header.
    size, hours, once, per_month = scale.project(million, 0.09, 128, 0.04, 0.02)
    assert size == 165_632_000_000 + 7_813 * 128
    assert (hours, once) == (25.0, 1.0)
    assert per_month == pytest.approx(165.633000064 * 0.02)
    # MTAT: 628 frames; 203 shards, the last with 7 clips.
    assert scale.project(mtat, 1.0, 128, 0, 0)[0] == 25_863 * 628 * 256 + 203 * 128
    assert scale.project(gtzan, 3.6, 128, 1, 0)[2] == 1.0
    # At 22,050 Hz with a hop of 1,024 a preview has 646 frames, which are padded to GTZAN's 647.
    frames = [1 + round(published.seconds * 22_050) // 1024 for published in scale.DATASETS]
    assert frames == [647, 628, 646]


def test_a_store_of_sparse_shards_is_a_store(tmp_path):
    made = scale.build(tmp_path / "store", 300, 647)
    assert made["clips to do"] == 0
    store = Store.open(tmp_path / "store", verify=True)
    assert len(store) == 300 and store.skipped == [] and len(store.indices("train")) == 240
    assert store.labels[3] == ("tag 03", "tag 10", "tag 23")
    assert not store.gather(np.array([0, 299])).any()
    sizes = [file.stat() for file in (tmp_path / "store/shards").glob("*.npy")]
    assert sum(size.st_size for size in sizes) == 300 * 647 * 128 * 2 + 3 * 128
    assert sum(512 * size.st_blocks for size in sizes) < 100_000
    found = scale.start(tmp_path / "store", 2)
    parts = found["open (s)"] + found["iterator (s)"] + found["batch (s)"]
    assert found["first batch (s)"] == pytest.approx(parts) and parts > 0
    assert 0 <= found["first batch, peak (GB)"] - found["before, peak (GB)"] < 0.5


def test_the_steps_of_a_clip_are_measured(tmp_path):
    short = dataclasses.replace(scale.DATASETS[2], seconds=1.5, frames=32)
    seconds = scale.measure_clip(short, FeatureSpec(), 2, tmp_path)
    assert list(seconds) == ["hash", "decode", "resample", "mel", "write", "process_clip"]
    assert all(len(values) == 2 and min(values) >= 0 for values in seconds.values())
    info = soundfile.info(tmp_path / "clip.mp3")
    assert (info.samplerate, info.channels, info.format) == (44_100, 2, "MP3")
    assert np.load(tmp_path / "shards/00000.npy").shape == (128, 32, 128)


def test_the_tables_are_printed(capsys, monkeypatch):
    steps = {"build": scale.build, "start": scale.start}
    monkeypatch.setattr(scale, "run_step", lambda step, *of: steps[step](*of))
    assert scale.main(["--clips=0", "--entries=100,200", "--frames=8", "--batches=2"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r" +100 clips +200 clips\n +shards \(GB\) +0\.000 +0\.000\n", printed)
    assert re.search(r"clips to do +0\.000 +0\.000\n", printed)
    assert re.search(r"first batch over the first store's +1\.000 +[\d.]+\n", printed)
