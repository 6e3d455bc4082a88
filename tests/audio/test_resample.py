import librosa
import numpy as np
import pytest

from musicgenre.audio.resample import resample, resample_stream


def noise(count):
    return (0.2 * np.random.default_rng(count).standard_normal(count)).astype(np.float32)


def sine(frequency, rate, count):
    return np.sin(2 * np.pi * frequency / rate * np.arange(count)).astype(np.float32)


@pytest.mark.parametrize(
    ("rate", "wanted", "count", "expected"),
    [
        (8000, 11025, 551, [0.0370552, 0.1029609, -0.0281151, -1.1312344, -1.1540844, 0.9696954]),
        (32000, 16000, 200, [0.2024135, 0.0389793, -0.5508436, 0.082849, -0.2004337, -0.2266731]),
    ],
)
def test_kaiser_best_gives_the_values_of_resampy(rate, wanted, count, expected):
    """Those of resampy 0.4.3 at ratios for which the steps through its table are integers."""
    n = np.arange(400)
    resampled = resample(np.where(n % 7 < 3, 1.0, -1.0) * (n % 5) / 4, rate, wanted, "kaiser_best")
    assert len(resampled) == count and resampled.dtype == np.float32
    np.testing.assert_allclose(resampled[[0, 1, 100, 101, 150, -1]], expected, rtol=0, atol=1e-6)


def test_an_impulse_gives_the_filter():
    """At twice the rate, by hand: the windowed sinc at half zero crossings, up to 50."""
    samples = np.zeros(201, np.float32)
    samples[100] = 1
    resampled = resample(samples, 8000, 16000, "kaiser_best")
    values = [0.6308683, 0.9173474, 0.6308683, 0.0815233]
    np.testing.assert_allclose(resampled[199:203], values, rtol=0, atol=1e-7)
    assert len(resampled) == 402 and resampled[101:300].all()
    assert not resampled[:100].any() and not resampled[301:].any()


@pytest.mark.parametrize(
    ("rate", "wanted"), [(44_100, 16_000), (48_000, 16_000), (8_000, 22_050), (44_099, 11_025)]
)
def test_kaiser_best_keeps_a_sine_and_removes_what_folds_back(rate, wanted):
    kept = resample(sine(440, rate, rate // 4), rate, wanted, "kaiser_best")
    inner = slice(len(kept) // 4, -len(kept) // 4)
    np.testing.assert_allclose(kept[inner], sine(440, wanted, len(kept))[inner], rtol=0, atol=1e-6)
    if wanted < rate:
        folded = resample(sine(0.55 * wanted, rate, rate // 4), rate, wanted, "kaiser_best")
        assert np.abs(folded[inner]).max() < 1e-5  # 100 dB below


@pytest.mark.parametrize("resampler", ["soxr_hq", "kaiser_best"])
@pytest.mark.parametrize("rate", [44_100, 22_050, 8_000, 16_000, 192_000, 9_999])
@pytest.mark.parametrize("size", [977, 10_001])
def test_a_stream_gives_the_same_bits(resampler, rate, size):
    samples, wanted = noise(20_007), 16_000
    blocks = (samples[start : start + size] for start in range(0, len(samples), size))
    expected = resample(samples, rate, wanted, resampler)
    streamed = np.concatenate(list(resample_stream(blocks, rate, wanted, resampler)))
    np.testing.assert_array_equal(streamed, expected)
    lengths = {"kaiser_best": 20_007 * wanted // rate, "soxr_hq": -(-20_007 * wanted // rate)}
    assert len(expected) == lengths[resampler]


@pytest.mark.parametrize(
    ("rate", "wanted"), [(22_050, 16_000), (44_100, 22_050), (8_000, 22_050), (44_099, 11_025)]
)
def test_the_default_equals_librosa(rate, wanted):
    samples = noise(5_001)
    expected = librosa.resample(samples, orig_sr=rate, target_sr=wanted, res_type="soxr_hq")
    np.testing.assert_array_equal(resample(samples, rate, wanted), expected)


def test_a_stream_holds_no_more_than_the_filter_reaches():
    """At most a block, a group of 441 samples and 138 samples to each side are pending."""
    taken = made = 0

    def blocks():
        nonlocal taken
        for _ in range(50):
            taken += 1_000
            yield noise(1_000)

    for block in resample_stream(blocks(), 44_100, 16_000, "kaiser_best"):
        made += len(block)
        assert taken - made * 44_100 / 16_000 <= 441 + 139
    assert taken == 50_000 and made == 18_140


@pytest.mark.parametrize("count", [1, 2, 50])
def test_very_short_sounds(count):
    resampled = resample(np.ones(count, np.float32), 44_100, 16_000, "kaiser_best")
    assert len(resampled) == count * 160 // 441
