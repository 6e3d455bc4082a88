import librosa
import numpy as np
import pytest
import soundfile

from musicgenre.audio.decode import load_audio
from musicgenre.errors import UserError


def tone(rate, seconds=2.0):
    return np.float32(0.5) * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("extension", ["wav", "au", "flac", "ogg", "mp3", "aiff"])
def test_every_format_gives_the_same_tone(tmp_path, extension):
    path = tmp_path / f"tone.{extension}"
    soundfile.write(path, tone(22050), 22050)
    samples, rate = load_audio(path, 22050)
    assert rate == 22050 and samples.dtype == np.float32 and samples.ndim == 1
    assert abs(len(samples) / 22050 - 2.0) < 0.06
    middle = samples[5000:30000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert abs(spectrum.argmax() * 22050 / len(middle) - 440) < 2
    assert abs(np.sqrt(np.mean(middle**2)) - 0.5 / np.sqrt(2)) < 0.01


@pytest.mark.parametrize(("rate", "channels"), [(192_000, 1), (8_000, 2), (48_000, 8), (44_100, 2)])
def test_any_rate_and_channel_count_equals_librosa(tmp_path, rate, channels):
    path = tmp_path / "many.wav"
    scale = np.linspace(0.2, 1.0, channels)
    soundfile.write(path, tone(rate)[:, None] * scale, rate, subtype="FLOAT")
    samples = load_audio(path, 22050).samples
    reference, _ = librosa.load(path, sr=22050, mono=True)
    assert len(samples) == 44100
    np.testing.assert_allclose(samples, reference, atol=1e-6)
    assert abs(np.abs(samples[1000:-1000]).max() - 0.5 * scale.mean()) < 2e-3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.wav", b"", "empty file"),
        ("text.mp3", b"this is no music\n" * 50, "not a sound file"),
        ("half.wav", None, "truncated .*88200 bytes of sound, 44078 are present"),
        ("half.au", None, "truncated"),
        ("half.aiff", None, "truncated"),
        ("half.flac", None, "not a sound file|truncated"),
        ("half.mp3", None, "truncated"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    if content is None:
        soundfile.write(path, tone(22050), 22050)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_audio(path, 22050)
    assert str(path) in str(error.value)


def test_a_length_left_open_by_a_pipe_is_accepted(tmp_path):
    path = tmp_path / "streamed.wav"
    soundfile.write(path, tone(22050), 22050)
    content = bytearray(path.read_bytes())
    content[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert len(load_audio(path, 22050).samples) == 44100


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (tone(22050, 0.1), r"too short \(0.10 s; at least 1 s"),
        (np.zeros(44100, np.float32), "silent"),
        (np.where(np.arange(44100) == 77, np.nan, tone(22050)), "1 of its samples are not finite"),
    ],
)
def test_unusable_sound_is_refused(tmp_path, samples, message):
    path = tmp_path / "odd.wav"
    soundfile.write(path, samples, 22050, subtype="FLOAT")
    with pytest.raises(UserError, match=message):
        load_audio(path, 22050)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.wav: no such file"):
        load_audio(tmp_path / "gone.wav", 22050)


def test_the_real_mp3_decodes_to_its_length(real_data):
    samples = load_audio(next((real_data / "mtat").glob("*.mp3")), 16000).samples
    assert abs(len(samples) / 16000 - 29.1) < 0.1
