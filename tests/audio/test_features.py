import dataclasses

import librosa
import numpy as np
import pytest
import scipy.fft

from musicgenre.audio import features
from musicgenre.audio.decode import load_audio
from musicgenre.audio.features import (
    FeatureSpec,
    compress,
    compute_features,
    frame_waveform,
    mel_power,
    stft_power,
)
from musicgenre.errors import UserError


def librosa_mel(samples, spec):
    fields = {name: getattr(spec, name) for name in ("n_fft", "hop_length", "n_mels", "fmin")}
    fields |= {"sr": spec.sample_rate, "fmax": spec.top_frequency}
    return librosa.feature.melspectrogram(y=samples, **fields)


def librosa_log_mel(samples, spec):
    reference = np.max if spec.db_ref == "max" else float(spec.db_ref)
    return librosa.power_to_db(librosa_mel(samples, spec), ref=reference, top_db=spec.top_db).T


def fading_in(count):
    noise = np.random.default_rng(0).standard_normal(count).astype(np.float32)
    return noise * np.linspace(0, 1, count, dtype=np.float32)


MUSICNN = FeatureSpec(
    sample_rate=16000, n_fft=512, hop_length=256, n_mels=96, compression="log10000"
)
RANGED = dataclasses.replace(
    MUSICNN, compression="db", fmin=30.0, fmax=7000.0, db_ref="1.0", top_db=100.0
)
SPECS = [FeatureSpec(), FeatureSpec(hop_length=1710), RANGED]


@pytest.mark.parametrize("spec", SPECS, ids=["report", "hop1710", "16kHz"])
@pytest.mark.parametrize("seconds", [0.01, 0.7, 5.0])
def test_log_mel_equals_librosa(spec, seconds):
    time = np.arange(int(seconds * spec.sample_rate)) / spec.sample_rate
    noise = 1e-4 * np.random.default_rng(0).standard_normal(len(time))
    samples = (np.sin(2 * np.pi * 440 * time) * np.exp(-3 * time) + noise).astype(np.float32)
    ours = compute_features(samples, spec)
    assert ours.shape == (spec.frames(seconds), spec.n_mels)
    np.testing.assert_allclose(ours, librosa_log_mel(samples, spec), rtol=0, atol=1e-4)


def test_log_mel_equals_librosa_on_the_real_clips(real_data):
    clips = sorted((real_data / "gtzan_audio").glob("*/*.au"))
    assert len(clips) == 8
    for clip in clips:
        samples = load_audio(clip, 22050).samples
        for spec in SPECS[:2]:
            ours, expected = compute_features(samples, spec), librosa_log_mel(samples, spec)
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("clip_id", ["jazz.00000", "reggae.00000", "rock.00000"])
def test_the_arrays_equal_the_features_of_their_audio(real_data, clip_id):
    """The arrays keep every 3.34th frame at hop 512, in order, to their quantisation."""
    with np.load(real_data / "gtzan_mels" / "train.npz", allow_pickle=False) as file:
        row = file["clip_id"].tolist().index(clip_id)
        level = (file["spectrogram"][row].astype(np.float32) + 0.5) / 256
        stored = file["db_min"][row] * (1 - level)
    path = real_data / "gtzan_audio" / clip_id.split(".")[0] / f"{clip_id}.au"
    samples = load_audio(path, 22050).samples
    ours = compute_features(samples, FeatureSpec(hop_length=512)).T
    distance = np.stack([np.abs(stored[:, [frame]] - ours).mean(axis=0) for frame in range(387)])
    assert distance.min(axis=1).mean() < 0.1
    assert set(np.diff(distance.argmin(axis=1))) == {3, 4}


def test_quiet_cells_beside_loud_ones_equal_librosa():
    """Noise 60 to 80 dB below a tone, which single precision changes by more than 1e-3 dB."""
    spec = FeatureSpec()
    time = np.arange(3 * 22050) / 22050
    noise = np.random.default_rng(0).standard_normal(len(time))
    samples = (0.9 * np.sin(2 * np.pi * 6000 * time) + 1e-3 * noise).astype(np.float32)
    expected = librosa_log_mel(samples, spec)
    assert ((expected > -80) & (expected < -60)).mean() > 0.9
    np.testing.assert_allclose(compute_features(samples, spec), expected, rtol=0, atol=2e-5)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(samples, 1024), 2048)[::1024]
    spectrum = scipy.fft.rfft(frames * np.hanning(2049)[:-1].astype(np.float32))
    single = features.to_db(np.abs(spectrum) ** 2 @ features.mel_filters(spec), spec)
    assert np.abs(single - expected).max() > 1e-3


@pytest.mark.parametrize("kind", ["logmel", "stft"])
@pytest.mark.parametrize("frames", [1, 53, 54, 55, 215, 216, 217, 290])
def test_blocks_of_frames_are_contiguous(kind, frames):
    """Signals that end within, at and beyond a block and a part, against one transform."""
    assert features._PART == 54 and features._BLOCK == 216
    spec = FeatureSpec(kind=kind, n_fft=64, hop_length=20, n_mels=12)
    samples = np.random.default_rng(0).standard_normal(20 * (frames - 1) + 7).astype(np.float32)
    cut = np.lib.stride_tricks.sliding_window_view(np.pad(samples, 32), 64)[::20]
    expected = np.abs(np.fft.rfft(cut * np.hanning(65)[:64])) ** 2
    found = stft_power(samples, spec) if kind == "stft" else mel_power(samples, spec)
    assert found.shape == (frames, spec.bands) and found.dtype == np.float32
    if kind == "logmel":
        expected = expected @ features.mel_filters(spec)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hop", [100, 256, 300])
def test_the_size_of_blocks_does_not_matter(monkeypatch, hop):
    spec = FeatureSpec(kind="stft", n_fft=256, hop_length=hop)
    samples = np.random.default_rng(0).standard_normal(4000)
    power = stft_power(samples, spec)
    expected = np.abs(librosa.stft(samples.astype(np.float32), n_fft=256, hop_length=hop)).T ** 2
    np.testing.assert_allclose(power, expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(features, "_PART", 3)
    monkeypatch.setattr(features, "_BLOCK", 6)
    np.testing.assert_array_equal(stft_power(samples, spec), power)


BANKS = [
    *SPECS,
    FeatureSpec(sample_rate=12000, n_fft=511, n_mels=96),
    FeatureSpec(n_mels=20, fmax=800.0),
    FeatureSpec(n_mels=17, fmin=2000.0, fmax=9000.0),
    FeatureSpec(n_fft=256, n_mels=100),
]


@pytest.mark.filterwarnings("ignore:(8|9) of 100 mel bands", "ignore:Empty filters")
@pytest.mark.parametrize("spec", BANKS)
def test_the_filter_bank_equals_librosas_and_its_groups_leave_nothing_out(spec):
    """Some bands of a short transform are empty."""
    fields = {"sr": spec.sample_rate, "fmin": spec.fmin, "fmax": spec.top_frequency}
    bank = librosa.filters.mel(n_fft=spec.n_fft, n_mels=spec.n_mels, **fields)
    ours = features.mel_filters(spec)
    assert ours.dtype == np.float32 and ours.flags.c_contiguous
    np.testing.assert_allclose(ours, bank.T, rtol=2e-7, atol=1e-11)
    together = np.zeros_like(ours)
    for bands, bins, filters in features._mel_groups(spec):
        together[bins, bands] += filters
    np.testing.assert_array_equal(together, ours)
    if spec.n_mels > 20:
        assert sum(filters.size for _, _, filters in features._mel_groups(spec)) < 0.6 * ours.size


def test_the_mel_scale_by_hand():
    """15 mels to 1 kHz and 27 more to 6.4 kHz."""
    found = features.mel_frequencies(0, 6400, 15)[[1, 5, 14]]
    np.testing.assert_allclose(found, [200, 1000, 6400], rtol=1e-12)


def test_silent_bands_are_reported():
    message = r"8 of 100 mel bands .* lower features.n_mels or raise features.n_fft"
    with pytest.warns(UserWarning, match=message):
        features.mel_filters(FeatureSpec(n_fft=256, n_mels=100, top_db=79.0))


def test_mfcc_equals_librosa():
    spec = FeatureSpec(kind="mfcc", n_mfcc=13)
    samples = np.random.default_rng(1).standard_normal(22050).astype(np.float32)
    log_mel = librosa_log_mel(samples, dataclasses.replace(spec, kind="logmel"))
    reference = librosa.feature.mfcc(S=log_mel.T, n_mfcc=13).T
    ours = compute_features(samples, spec)
    assert ours.shape == (22, 13)
    np.testing.assert_allclose(ours, reference, atol=2e-3)


def test_a_sine_lands_in_its_band():
    spec = FeatureSpec()
    time = np.arange(22050) / 22050
    power = mel_power(np.sin(2 * np.pi * 1000 * time).astype(np.float32), spec)
    edges = librosa.mel_frequencies(n_mels=130, fmin=0, fmax=11025)
    band = int(power[10].argmax())
    assert edges[band] < 1000 < edges[band + 2]


def test_frames_and_samples_are_inverse():
    spec = FeatureSpec()
    assert spec.frames(30.0) == 646
    assert spec.frames(spec.samples(647) / 22050) == 647


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compression": "log1000"}, "features.compression: 'log1000'.*Did you mean 'log10000'"),
        (
            {"compression": "log10000", "kind": "mfcc"},
            "compression='log10000' is for log-mels and the STFT, not .*'mfcc'",
        ),
        ({"compression": "log10000", "kind": "waveform"}, "not for features.kind='waveform'"),
        ({"resampler": "kaiser_fast"}, "'kaiser_fast' is not known.*Did you mean 'kaiser_best'"),
        ({"top_db": 0.0}, "features.top_db must be positive, not 0"),
        ({"hop_lenght": 512}, "features.hop_lenght.*Did you mean 'hop_length'"),
        ({"kind": "logmell"}, "features.kind: 'logmell'.*Did you mean 'logmel'"),
        ({"n_mels": 0}, "features.n_mels must be at least 1, not 0"),
        ({"fmin": 12000.0}, "features.fmin=12000"),
        ({"db_ref": "loud"}, "features.db_ref must be 'max' or a positive number, not 'loud'"),
        ({"kind": "mfcc", "n_mfcc": 200}, "n_mfcc=200 exceeds features.n_mels=128"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        FeatureSpec.from_dict(fields)


def test_fingerprint_tells_specs_apart():
    assert FeatureSpec().fingerprint == FeatureSpec.from_dict(FeatureSpec().to_dict()).fingerprint
    assert FeatureSpec().fingerprint != FeatureSpec(hop_length=512).fingerprint


def test_stft_equals_librosa():
    spec = FeatureSpec(kind="stft", sample_rate=12000, n_fft=512, hop_length=256)
    samples = fading_in(7000)
    power = np.abs(librosa.stft(samples, n_fft=512, hop_length=256)) ** 2
    ours = compute_features(samples, spec)
    assert ours.shape == (spec.frames(7000 / 12000), spec.bands) == (28, 257)
    expected = librosa.power_to_db(power, ref=np.max, top_db=80.0).T
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3)


def test_a_framed_waveform_is_the_samples():
    spec = FeatureSpec(kind="waveform", sample_rate=1000, hop_length=7)
    samples = np.arange(33, dtype=np.float32)
    framed = compute_features(samples, spec)
    assert framed.shape == (spec.frames(0.033), spec.bands) == (4, 7) and framed.dtype == np.float32
    np.testing.assert_array_equal(framed.ravel(), samples[:28])
    assert spec.samples(4) == 28 and spec.describe() == "waveform, 1000 Hz, frames of 7 samples"
    np.testing.assert_array_equal(frame_waveform(samples[:3], 7), [[0, 1, 2, 0, 0, 0, 0]])


@pytest.mark.parametrize("kind", ["logmel", "stft"])
def test_log10000_is_that_of_the_power(kind):
    """As in musicnn: log10(10000 x + 1) of librosa's power, of each cell on its own."""
    spec, samples = dataclasses.replace(MUSICNN, kind=kind), fading_in(9000)
    stft = np.abs(librosa.stft(samples, n_fft=512, hop_length=256)) ** 2
    power = (stft if kind == "stft" else librosa_mel(samples, spec)).T
    ours = compute_features(samples, spec)
    assert ours.dtype == np.float32 and ours.shape == (spec.frames(9000 / 16000), spec.bands)
    expected = np.log10(10000 * power.astype(np.float64) + 1)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    # No cell depends on another, so neither the loudness of the clip nor these fields matter.
    for other in ({"db_ref": "1.0"}, {"top_db": 20.0}):
        changed = compute_features(samples, dataclasses.replace(spec, **other))
        np.testing.assert_array_equal(changed, ours)
    assert not compute_features(np.zeros(2000, np.float32), spec).any()


def test_values_of_log10000_by_hand():
    spec = FeatureSpec(compression="log10000")
    power = np.array([[0.0, 1e-4, 9.9e-3, 0.9999, 100.0]], np.float32)
    np.testing.assert_allclose(compress(power, spec), [[0, np.log10(2), 2, 4, 6]], atol=1e-6)


def test_the_rounding_of_the_original_musicnn_is_small():
    """It rounds the power to float16; the largest change is the one in the docstring."""
    power = (2.0 ** np.linspace(-30, 10, 400_001)).astype(np.float32)[None]
    rounded = power.astype(np.float16).astype(np.float32)
    change = np.abs(compress(power, MUSICNN) - compress(rounded, MUSICNN)).max()
    assert 2.0e-4 < change < 2.2e-4


@pytest.mark.parametrize(
    ("fields", "described"),
    [
        (
            {"compression": "log10000"},
            "logmel 128 bands, 22050 Hz, n_fft 2048, hop 1024, 0-11025 Hz, "
            "log10(10000 x + 1) of the power",
        ),
        (
            {"resampler": "kaiser_best"},
            "logmel 128 bands, 22050 Hz by kaiser_best, n_fft 2048, hop 1024, 0-11025 Hz, "
            "dB re max, top 80 dB",
        ),
        (
            {"kind": "waveform", "resampler": "kaiser_best"},
            "waveform, 22050 Hz by kaiser_best, frames of 1024 samples",
        ),
    ],
)
def test_every_field_is_part_of_the_description_and_the_fingerprint(fields, described):
    spec = FeatureSpec(**fields)
    assert spec.describe() == described
    assert FeatureSpec.from_dict(spec.to_dict()) == spec != FeatureSpec()
    assert spec.fingerprint != FeatureSpec().fingerprint


def test_specs_saved_before_a_field_existed_stay_valid():
    """Specs without these fields keep their meaning and fingerprint."""
    values = FeatureSpec().to_dict()
    assert "resampler" not in values and FeatureSpec().fingerprint == "6e4898e1"
    assert FeatureSpec.from_dict(values | {"resampler": "soxr_hq"}) == FeatureSpec()
    del values["compression"]
    assert FeatureSpec.from_dict(values) == FeatureSpec()
