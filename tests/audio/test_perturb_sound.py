from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile

from musicgenre.audio import perturb_sound as transforms
from musicgenre.audio.perturb_sound import (
    EQ_CENTRES,
    Equaliser,
    equalise,
    limit_band,
    quantise,
    random_equalisers,
    sound_transforms,
    through_file,
    through_mp3,
    white_noise,
)
from musicgenre.datasets.synthetic import STYLES, render_clip
from musicgenre.errors import UserError

RATE = 22050


def tone(frequency, seconds=2.0):
    time = np.arange(round(seconds * RATE)) / RATE
    return (0.4 * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def level(samples):
    """dB of the inner half, where no filter still rings."""
    inner = samples[len(samples) // 4 : -len(samples) // 4].astype(np.float64)
    return 10 * np.log10(np.mean(inner**2))


def peak_frequency(samples):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 8 * len(samples)))
    return np.argmax(spectrum) * RATE / (8 * len(samples))


def change(name, samples, rate=RATE):
    (made,) = (made for made in sound_transforms(rate)[0] if made.name == name)
    return made.apply(samples, np.random.default_rng(0))


def test_an_equaliser_gives_its_gains_and_moves_nothing_in_time():
    # At 62.5, 125, 250, 500, 1000, 2000 ... Hz, and halfway between two in octaves.
    equaliser = Equaliser(np.array([0, 0, 0, 2.0, -6.0, 4.0, 0, 0, 0]))
    frequencies = np.array([0.0, 500, 1000, 1000 * 2**0.5, 2000, 20000])
    np.testing.assert_allclose(equaliser.response(frequencies), [0, 2, -6, -1, 4, 0], atol=1e-9)
    for frequency, gain in ((500, 2.0), (1000, -6.0), (2000 / 2**0.5, -1.0), (9000, 0.0)):
        changed = equalise(tone(frequency), RATE, equaliser)
        assert level(changed) - level(tone(frequency)) == pytest.approx(gain, abs=0.1), frequency
    click = np.zeros(RATE, np.float32)
    click[9000] = 1
    changed = equalise(click, RATE, equaliser)
    assert (
        np.argmax(np.abs(changed)) == 9000 and changed.dtype == np.float32 and len(changed) == RATE
    )
    np.testing.assert_allclose(
        changed[8000:9000], changed[9001:10001][::-1], atol=1e-6
    )  # zero phase


def test_random_equalisers_are_reproducible_and_within_their_limit():
    few, many = random_equalisers(2, 3.0, 5), random_equalisers(30, 3.0, 5)
    np.testing.assert_array_equal(few[1].gains, many[1].gains)
    gains = np.array([equaliser.gains for equaliser in many])
    assert 2.5 < np.abs(gains).max() <= 3.0 and abs(gains.mean()) < 0.4
    assert not np.allclose(random_equalisers(1, 3.0, 6)[0].gains, few[0].gains)
    np.testing.assert_allclose(Equaliser.tilt(3.0).response(EQ_CENTRES), np.linspace(-3, 3, 9))


@pytest.mark.parametrize(
    ("kind", "beyond", "within"), [("lowpass", 4000, 1000), ("highpass", 1000, 4000)]
)
def test_band_limits_attenuate_as_a_butterworth_filter(kind, beyond, within):
    """Butterworth: 3.01 dB at the cutoff, at least 48.2 dB an octave beyond, none within."""
    tones = [tone(frequency) for frequency in (2000, beyond, within)]
    at = [level(limit_band(x, RATE, kind, 2000)) - level(x) for x in tones]
    assert at[0] == pytest.approx(-3.01, abs=0.02)
    # The filter's digital form is steeper towards half the rate, and flatter towards 0.
    assert -60 < at[1] < -46 and at[2] == pytest.approx(0.0, abs=0.02)


def test_noise_and_rounding():
    clip = tone(440)
    noise = white_noise(clip, np.random.default_rng(0), 20) - clip
    assert level(clip) - level(noise) == pytest.approx(20, abs=0.2)
    rounded = quantise(clip, np.random.default_rng(0), 8)
    np.testing.assert_array_equal(rounded * 128, np.round(rounded * 128))
    error = (rounded - clip) * 128
    # A step squared over 12 of rounding and twice that of the dither: half a step.
    assert np.sqrt(np.mean(error**2)) == pytest.approx(0.5, abs=0.01) and abs(error.mean()) < 0.01
    clipped = quantise(np.array([1.5, -1.5], np.float32), np.random.default_rng(0), 8)
    assert clipped.tolist() == [127 / 128, -1.0]


def test_silence_and_a_later_beginning():
    clip = np.arange(1, 22051, dtype=np.float32)
    silent = change("silence of 0.5 s first", clip)
    assert len(silent) == 22050 and not silent[:11025].any() and silent[11025] == 1
    assert change("begins 0.02 s later", clip).tolist() == clip[441:].tolist()


@pytest.mark.parametrize(
    ("name", "pitch", "beat", "length"),
    [
        ("tempo +2 %", 440.0, 2.04, round(4 * RATE / 1.02)),
        ("tempo -2 %", 440.0, 1.96, 4 * RATE),
        ("speed +2 %", 448.8, 2.04, round(4 * RATE / 1.02)),
        ("pitch +0.5 semitone", 440 * 2 ** (0.5 / 12), 2.0, 4 * RATE),
    ],
)
def test_tempo_speed_and_pitch(name, pitch, beat, length):
    """A tone that swells twice a second."""
    swell = 0.6 + 0.4 * np.sin(4 * np.pi * np.arange(4 * RATE) / RATE)
    changed = change(name, tone(440, 4.0) * swell.astype(np.float32))
    assert abs(len(changed) - length) <= 1 and changed.dtype == np.float32
    assert peak_frequency(changed) == pytest.approx(pitch, abs=0.1)
    envelope = np.abs(scipy.signal.hilbert(changed))[RATE // 4 : -RATE // 4]
    assert peak_frequency(envelope - envelope.mean()) == pytest.approx(beat, abs=0.02)


@pytest.mark.parametrize("kbits", [64, 128])
def test_an_mp3_has_its_bit_rate_and_is_as_long_and_early_as_the_clip(kbits, monkeypatch):
    sizes = []
    write = soundfile.write

    def watched(path, *arguments, **named):
        write(path, *arguments, **named)
        sizes.append(Path(path).stat().st_size)

    monkeypatch.setattr(transforms.soundfile, "write", watched)
    clip = render_clip(next(iter(STYLES)), seed=0, seconds=5)
    decoded = through_mp3(clip, RATE, kbits)
    assert 8 * sizes[0] / 5 == pytest.approx(1000 * kbits, rel=0.03)
    assert decoded.shape == clip.shape
    alike = np.fft.irfft(np.fft.rfft(decoded, 1 << 18) * np.conj(np.fft.rfft(clip, 1 << 18)))
    assert np.argmax(alike) == 0
    assert 10 * np.log10(np.mean(clip**2) / np.mean((decoded - clip) ** 2)) > 8
    with pytest.raises(UserError, match="22050 Hz has 8 to 160 kbit/s"):
        through_mp3(clip, RATE, 320)


def test_a_file_of_another_rate_and_two_channels_preserves_the_clip():
    clip = tone(440, 1.0)
    how = {"channels": 2, "file_rate": 44100, "format": "WAV", "subtype": "FLOAT"}
    again = through_file(clip, RATE, ".wav", **how)
    np.testing.assert_allclose(again[2000:-2000], clip[2000:-2000], atol=1e-3)
    assert again.shape == clip.shape


@pytest.mark.parametrize("rate", [22050, 12000])
def test_every_change_gives_sound_of_no_greater_length(rate):
    clip = render_clip(next(iter(STYLES)), 0, 2.0, 22050)[: 2 * rate]
    made, missing = sound_transforms(rate)
    names = [each.name for each in [*made, *missing]]
    assert len(names) == len(set(names)) == 34
    # At 12 kHz there is nothing above 6 kHz, and an mp3 has 64 kbit/s at most.
    lost = set() if rate == 22050 else {"nothing above 8000 Hz", "mp3, 128 kbit/s"}
    assert {gone.name for gone in missing} == lost
    assert {transform.irrelevant for transform in made} == {True, False}
    for transform in made:
        changed = transform.apply(clip, np.random.default_rng(0))
        assert 0 < len(changed) <= len(clip) and changed.dtype == np.float32, transform.name
        assert np.isfinite(changed).all(), transform.name
        assert not np.array_equal(changed, clip), transform.name


def test_what_libsndfile_cannot_write_is_named(monkeypatch):
    write = soundfile.write

    def no_mp3(path, *arguments, **named):
        if named["format"] == "MP3":
            raise soundfile.LibsndfileError(0, "unknown format")
        write(path, *arguments, **named)

    monkeypatch.setattr(transforms.soundfile, "write", no_mp3)
    made, missing = sound_transforms(RATE)
    assert [gone.name for gone in missing] == ["mp3, 128 kbit/s", "mp3, 64 kbit/s"]
    assert "cannot write it" in missing[0].reason and len(made) == 32
