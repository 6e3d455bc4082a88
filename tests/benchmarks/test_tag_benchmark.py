import importlib
import re

import pytest
import soundfile
from tiny_model import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def benchmark(monkeypatch, model):
    module = importlib.import_module("benchmarks.tag")
    monkeypatch.setattr(module, "load_model", lambda name: model)
    return module


def test_half_the_clips_are_wav_and_half_mp3(benchmark, tmp_path):
    paths = benchmark.write_clips(tmp_path, 3, 1.5)
    found = [soundfile.info(path) for path in paths]
    assert [(info.samplerate, info.channels, info.format) for info in found] == [
        (22050, 1, "WAV"),
        (44100, 2, "MP3"),
        (22050, 1, "WAV"),
    ]
    assert all(info.duration == pytest.approx(1.5, abs=0.06) for info in found)


def test_a_long_file_has_its_length(benchmark, tmp_path):
    info = soundfile.info(benchmark.write_long(tmp_path / "long.wav", 61.5, rate=1000))
    assert (info.frames, info.samplerate) == (61_500, 1000)


def test_the_network_alone_sees_what_tagging_sees(benchmark, tmp_path, monkeypatch):
    """A clip of 4 s is three windows of 64 hops of 512 samples: 12 windows of four clips, a call for each clip."""
    calls = []

    class Counted(benchmark.Network):
        def __call__(self, inputs):
            calls.append(len(inputs))
            return super().__call__(inputs)

    monkeypatch.setattr(benchmark, "Network", Counted)
    run = benchmark.contestants(benchmark.load_model(""), benchmark.write_clips(tmp_path, 4, 4.0))
    assert list(run) == ["tag", "network alone", "decode + features alone"]
    for name, expected in (
        ("tag", [3] * 4),
        ("network alone", [3] * 4),
        ("decode + features alone", []),
    ):
        calls.clear()
        run[name]()
        assert calls == expected, name


def test_memory_is_this_process_and_the_time_the_files(benchmark, tmp_path):
    found = benchmark.tag_long("", benchmark.write_long(tmp_path / "long.wav", 5.0))
    assert 50 < found["before_MB"] <= found["after_MB"] < 20_000 and 0 < found["seconds"] < 5


def test_separate_processes_are_extrapolated(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "run_command", lambda model, paths: 2.0 + 0.02 * len(paths))
    benchmark.report_processes("gtzan", ["a"] * 100, 5)
    printed = capsys.readouterr().out
    assert "one process: 4.0 s, 25.0 files/s" in printed
    assert (
        "2.02 s a file (median of 5, 2.02 to 2.02), so 202 s for 100 (extrapolated): 50.5 times as long"
        in printed
    )
    assert "2.5 to 7 s a call" in printed and "so 62 to 175 times as long" in printed


def test_a_dry_run_prints_every_figure(benchmark, capsys, monkeypatch):
    found = {"seconds": 0.5, "before_MB": 100.0, "after_MB": 120.0}
    monkeypatch.setattr(benchmark, "tag_long", lambda model, path: found)
    assert benchmark.main(["--tiny"]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"[\d.]+ files/s, +\d+ times real time", printed)) == 3
    assert re.search(r"tag over the network alone: [\d.]+ ", printed)
    assert "0.3 min: 100, 120 (1.000 times the first row's); 0.50 s, 40 times real time" in printed
