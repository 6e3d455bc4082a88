import re

import pytest
import soundfile
from tiny_model import tiny_model

from benchmarks import tag
from benchmarks._clips import MP3, WAV, write_clips


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def benchmark(monkeypatch, model):
    monkeypatch.setattr(tag, "load_model", lambda name: model)
    return tag


def test_half_the_clips_are_wav_and_half_mp3(tmp_path):
    paths = write_clips(tmp_path, (WAV, MP3), 10, 1.5)
    found = [soundfile.info(path) for path in paths]
    expected = [(22050, 1, "WAV"), (44100, 2, "MP3")] * 5
    assert [(info.samplerate, info.channels, info.format) for info in found] == expected
    assert all(info.duration == pytest.approx(1.5, abs=0.06) for info in found)
    # Four styles, then copies.
    assert len({path.read_bytes() for path in paths}) == 8


def test_a_long_file_has_its_length(benchmark, tmp_path):
    info = soundfile.info(tag.write_long(tmp_path / "long.wav", 61.5, rate=1000))
    assert (info.frames, info.samplerate) == (61_500, 1000)


def test_the_network_alone_gets_the_inputs_of_tagging(benchmark, tmp_path, monkeypatch):
    """A clip of 4 s is three windows of 64 hops of 512 samples, and one call."""
    calls = []

    class Counted(benchmark.Network):
        def __call__(self, inputs):
            calls.append(len(inputs))
            return super().__call__(inputs)

    monkeypatch.setattr(benchmark, "Network", Counted)
    paths = write_clips(tmp_path, (WAV, MP3), 4, 4.0)
    run = benchmark.contestants(benchmark.load_model(""), paths)
    expected_calls = {"tag": 4, "network alone": 4, "decode + features alone": 0}
    assert list(run) == list(expected_calls)
    for name, count in expected_calls.items():
        calls.clear()
        run[name]()
        assert calls == [3] * count, name


def test_memory_is_of_this_process_and_time_of_the_file(benchmark, tmp_path):
    found = benchmark.tag_long("", tag.write_long(tmp_path / "long.wav", 5.0))
    assert 50 < found["before_MB"] <= found["after_MB"] < 20_000 and 0 < found["seconds"] < 5


def test_separate_processes_are_extrapolated(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "run_command", lambda model, paths: 2.0 + 0.02 * len(paths))
    benchmark.report_processes("gtzan", ["a"] * 100, 5)
    printed = capsys.readouterr().out
    assert "one process: 4.0 s, 25.0 files/s" in printed
    assert "2.02 s per file (median of 5, 2.02 to 2.02), 202 s for 100 (extrapolated)" in printed
    assert ": 50.5 times as long" in printed
    assert "2.5 to 7 s per call): 62 to 175 times as long" in printed


def test_a_dry_run_prints_every_figure(benchmark, capsys, monkeypatch):
    found = {"seconds": 0.5, "before_MB": 100.0, "after_MB": 120.0}
    monkeypatch.setattr(benchmark, "tag_long", lambda model, path: found)
    assert benchmark.main(["--tiny"]) == 0
    printed = capsys.readouterr().out
    for name in ("tag", "network alone", "decode \\+ features alone"):
        assert re.search(rf"\n  {name}( +[\d.]+){{2}} to [\d.]+( +[\d.]+){{3}}\n", printed), name
    assert re.search(r"tag over the network alone: [\d.]+ ", printed)
    assert re.search(r"0\.3 min +100 +120 +1\.000 +0\.50 +40\n", printed)
