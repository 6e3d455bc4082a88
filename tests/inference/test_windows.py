import dataclasses
import itertools

import numpy as np
import pytest
import soundfile
from tiny_model import tiny_model

from musicgenre.audio.decode import load_audio, stream_audio
from musicgenre.audio.features import FeatureSpec, frame_waveform, mel_power, stft_power
from musicgenre.audio.resample import resample
from musicgenre.datasets.base import Clip
from musicgenre.errors import UserError
from musicgenre.inference import windows
from musicgenre.inference.spectrogram import overview
from musicgenre.inference.windows import (
    FileWindows,
    Network,
    file_inputs,
    score_file,
    score_files,
    stream_power,
    stream_windows,
)
from musicgenre.store.prepare import Recipe


def noise(count, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


def in_blocks(samples, size):
    return [samples[start : start + size] for start in range(0, len(samples), size)]


@pytest.mark.parametrize(
    "fields",
    [
        {"n_fft": 2048, "hop_length": 1024},
        {"n_fft": 2048, "hop_length": 1710},
        {"n_fft": 512, "hop_length": 700},
        {"n_fft": 2047, "hop_length": 300},
        {"n_fft": 1024, "hop_length": 256, "kind": "stft"},
        {"n_fft": 2048, "hop_length": 512, "kind": "mfcc"},
    ],
)
@pytest.mark.parametrize(
    ("count", "size"), [(50_000, 3_001), (20_480, 1_024), (700, 100), (30_000, 30_000)]
)
def test_frames_of_a_stream_are_those_of_the_whole_file(fields, count, size):
    spec = FeatureSpec(n_mels=16, n_mfcc=8, **fields)
    samples = noise(count)
    full = (stft_power if spec.kind == "stft" else mel_power)(samples, spec)
    parts = list(stream_power(in_blocks(samples, size), spec))
    np.testing.assert_allclose(np.concatenate(parts), full, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(("count", "size"), [(5_000, 333), (64, 10), (640, 64)])
def test_a_waveform_is_framed_alike_in_blocks(count, size):
    samples = noise(count)
    spec = FeatureSpec(kind="waveform", hop_length=100)
    framed = np.concatenate(list(stream_power(in_blocks(samples, size), spec)))
    np.testing.assert_array_equal(framed, frame_waveform(samples, 100))


@pytest.mark.parametrize(
    ("hops", "starts", "lengths", "weights"),
    [
        (10, [0], [11], [11 / 64]),  # with the frame that is centred on the end
        (63, [0], [64], [1]),
        (64, [0], [64], [1]),
        (65, [0, 1], [64, 64], [1, 1 / 64]),
        (128, [0, 64], [64, 64], [1, 1]),
        (200, [0, 64, 128, 136], [64] * 4, [1, 1, 1, 8 / 64]),
    ],
)
def test_windows_are_consecutive_and_the_last_ends_with_the_file(hops, starts, lengths, weights):
    model = tiny_model()
    samples = noise(512 * hops + 100)
    found = list(stream_windows(in_blocks(samples, 5_000), model.features, model))
    assert [window.start for window in found] == starts
    assert [window.length for window in found] == lengths
    assert [window.weight for window in found] == weights
    assert {window.inputs.shape for window in found} == {(64, 16)}
    assert found[0].inputs.dtype == np.float16


def test_a_step_makes_windows_overlap():
    model = tiny_model()
    found = list(stream_windows([noise(512 * 100)], model.features, model, step=10))
    assert [window.start for window in found] == [0, 10, 20, 30, 36]
    # All count equally but the last, which advances by 6 frames of a step's 10.
    assert [window.weight for window in found] == [1, 1, 1, 1, 0.6]
    full = file_inputs(noise(512 * 100), model, step=10)
    np.testing.assert_array_equal(full[2], found[2].inputs)
    with pytest.raises(UserError, match="65 frames must be at least 1 and at most a window's 64"):
        list(stream_windows([noise(512 * 100)], model.features, model, step=65))


def test_a_model_of_crops_uses_those_of_its_evaluation_or_consecutive_ones():
    model = tiny_model(data__frames=160, data__crop_frames=60, data__eval_chunks=3)
    samples = noise(512 * 400)  # clips at 0, 160 and 240
    found = list(stream_windows([samples], model.features, model))
    assert [w.start for w in found] == [0, 50, 100, 160, 210, 260, 240, 290, 340]
    # The crops of a clip count equally; half of the last clip is new.
    assert [w.weight for w in found] == [1] * 6 + [0.5] * 3
    row = list(stream_windows([samples], model.features, model, step=60))
    assert [w.start for w in row] == [0, 60, 100, 160, 220, 260, 300, 340]
    assert [w.weight for w in row] == [1, 1, 40 / 60, 1, 1, 40 / 60, 40 / 60, 40 / 60]
    assert sum(w.weight for w in row) * 60 == pytest.approx(400)
    # The dB reference is the clip's, not the crop's, as in training.
    power = mel_power(samples, model.features)
    clip = 10 * np.log10(power[:160]) - 10 * np.log10(power[:160].max())
    np.testing.assert_allclose(row[1].inputs, clip[60:120], atol=0.04)


@pytest.mark.parametrize(
    ("name", "rate", "seconds"),
    [("a.wav", 22050, 1.2), ("b.flac", 44100, 9.3), ("c.mp3", 32000, 5.0), ("d.ogg", 8000, 4.0)],
)
def test_streamed_probabilities_equal_those_of_the_whole_file(
    tmp_path, monkeypatch, name, rate, seconds
):
    monkeypatch.setattr(windows, "BLOCK", 4_001)
    path = tmp_path / name
    channels = [noise(int(rate * seconds), seed) for seed in range(2)]
    soundfile.write(path, np.stack(channels, axis=1), rate)
    model = tiny_model()
    network = Network(model)
    samples = load_audio(path, 22050).samples
    inputs = file_inputs(samples, model)
    full = np.concatenate([network(inputs[i : i + 8])[0] for i in range(0, len(inputs), 8)])
    scores = next(score_files(model, [path], network=network, keep_windows=True))
    assert len(scores.windows.starts) == len(inputs)
    np.testing.assert_allclose(scores.windows.probabilities, full, atol=1e-5)
    weights = [w.weight for w in stream_windows([samples], model.features, model)]
    mean = np.average(full, axis=0, weights=weights)
    np.testing.assert_allclose(scores.probabilities, mean, atol=1e-5)
    assert scores.windows.ends[-1] == pytest.approx(seconds, abs=0.06)
    assert scores.embedding.shape == (16,)


@pytest.mark.parametrize(
    ("hops", "mean"),
    [
        (580, (36 + 9 * 40 / 60) / (9 + 40 / 60)),  # such as 29 s in windows of 3 s
        (540, 36 / 9),  # exactly divisible: every window counts in full
        (61, (1 / 60) / (1 + 1 / 60)),
        (60, 0),
        (30, 0),  # shorter than a window
    ],
)
def test_a_file_is_the_mean_of_its_windows_weighted_by_what_they_add(hops, mean):
    model = tiny_model(data__frames=60)
    count = itertools.count()

    def numbered(inputs):
        numbers = np.float32([[next(count)] for _ in inputs])
        return numbers, 10 * numbers

    found = score_file(FileWindows("any", model, blocks=[noise(512 * hops)]), numbered)
    np.testing.assert_allclose(found.probabilities, [mean], rtol=1e-6)
    np.testing.assert_allclose(found.embedding, [10 * mean], rtol=1e-6)
    assert found.windows is None and next(count) == -(-hops // 60)


def test_no_more_of_a_long_file_is_held_than_a_clip_and_two_blocks():
    model = tiny_model()
    given, held = 0, []

    def blocks():
        nonlocal given
        for _ in range(400):
            given += 8_192
            yield noise(8_192)

    made = 0
    for window in stream_windows(blocks(), model.features, model):
        made += 1
        held.append(given - 512 * window.start)
    assert made == 400 * 16 / 64
    # A window requires its own samples, the reach of the transform, and the rest of a block.
    assert max(held) <= 512 * 64 + 2048 + 2 * 8_192


def test_decoding_pauses_while_enough_windows_wait(tmp_path, monkeypatch):
    path = tmp_path / "long.wav"
    soundfile.write(path, noise(512 * 64 * 60), 22050)
    taken = []

    def counted(*arguments, **keywords):
        for block in stream_audio(*arguments, **keywords):
            taken.append(len(block))
            yield block

    monkeypatch.setattr(windows, "stream_audio", counted)
    monkeypatch.setattr(windows, "BLOCK", 4_096)
    model = tiny_model()
    network = Network(model)
    seen = []

    def slow(inputs):
        seen.append(sum(taken))
        return network(inputs)

    scores = next(score_files(model, [path], network=slow))
    assert not scores.error and len(seen) == 8
    # The first call has 8 windows; 16 more may wait, one is being made, a block may be half used.
    assert max(seen[:2]) <= (16 + 16 + 2) * 512 * 64 + 3 * 4_096
    assert sum(taken) == 512 * 64 * 60


def test_closing_the_iterator_early_leaves_no_thread(tmp_path):
    for number in range(6):
        soundfile.write(tmp_path / f"{number}.wav", noise(512 * 64 * 40, number), 22050)
    model = tiny_model()
    scores = score_files(model, sorted(tmp_path.glob("*.wav")))
    assert next(scores).path.endswith("0.wav")
    scores.close()  # would hang here


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"no music" * 40, "not a sound file"),
        (np.zeros(44_100, np.float32), "silent"),
        (noise(2_000), "too short"),
        (
            np.where(np.arange(441_000) % 400_000 == 9, np.nan, noise(441_000)),
            "2 of its samples are not finite",
        ),
        ("cut", "truncated"),
    ],
)
def test_a_stream_reports_the_same_errors_as_reading_the_file_at_once(tmp_path, content, message):
    path = tmp_path / "bad.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        soundfile.write(path, noise(300_000), 22050)
        path.write_bytes(path.read_bytes()[:300_000])
    else:
        soundfile.write(path, content, 22050, subtype="FLOAT")
    with pytest.raises(UserError, match=message) as error:
        load_audio(path, 22050)
    with pytest.raises(UserError, match=message) as streamed:
        list(stream_audio(path, 16000, block=1_000))
    scores = next(score_files(tiny_model(), [path]))
    assert str(error.value) == str(streamed.value) == scores.error and scores.probabilities is None


@pytest.mark.parametrize("resampler", ["soxr_hq", "kaiser_best"])
@pytest.mark.parametrize(
    ("rate", "wanted"), [(44_100, 22_050), (8_000, 22_050), (48_000, 16_000), (192_000, 22_050)]
)
def test_resampling_a_stream_is_bit_exact(tmp_path, rate, wanted, resampler):
    path = tmp_path / "any.wav"
    soundfile.write(path, noise(int(2.01 * rate) + 7), rate, subtype="FLOAT")
    blocks = list(stream_audio(path, wanted, block=10_001, resampler=resampler))
    full = load_audio(path, wanted, resampler=resampler).samples
    np.testing.assert_array_equal(np.concatenate(blocks), full)


def test_every_reader_of_a_file_uses_the_models_resampler(tmp_path):
    """The readers are scores, the picture of a long file, and a clip of a store."""
    path = tmp_path / "any.wav"
    samples = noise(44_100 * 2)
    soundfile.write(path, samples, 44_100, subtype="FLOAT")
    model = tiny_model(features__sample_rate=16_000)
    inputs, pictures, clips = {}, {}, {}
    for name in ("soxr_hq", "kaiser_best"):
        features = dataclasses.replace(model.features, resampler=name)
        own = dataclasses.replace(model, features=features)
        resampled = resample(samples, 44_100, 16_000, name)
        inputs[name] = file_inputs(resampled, own)
        (scores,) = score_files(own, [path], keep_windows=True)
        np.testing.assert_array_equal(scores.windows.probabilities, Network(own)(inputs[name])[0])
        pictures[name] = overview(path, own.features)[0]
        np.testing.assert_allclose(pictures[name], mel_power(resampled, own.features), rtol=1e-4)
        clips[name] = Recipe(own.features, own.layout)(Clip("any", path, (), "train")).features
        np.testing.assert_array_equal(clips[name], inputs[name][0])
    for made in (inputs, pictures, clips):
        assert not np.array_equal(made["soxr_hq"], made["kaiser_best"])


@pytest.mark.parametrize("frames", [403, 417])
def test_an_overview_averages_frames_of_the_whole_file(tmp_path, frames):
    path = tmp_path / "long.wav"
    soundfile.write(path, noise(512 * frames), 22050, subtype="FLOAT")
    spec = tiny_model().features
    power, seconds = overview(path, spec, most=100)
    full = mel_power(load_audio(path, 22050).samples, spec)
    assert 50 <= len(power) <= 100
    together = round(seconds * 22050 / 512)
    assert together == 8
    expected = full[: len(power) * 8].reshape(-1, 8, 16).mean(axis=1)
    np.testing.assert_allclose(power, expected, rtol=1e-4)
