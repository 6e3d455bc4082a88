import numpy as np
import pytest

from musicgenre.audio.features import FeatureSpec, compute_features
from musicgenre.audio.perturb_mels import (
    band_gains,
    begin_later,
    change_pitch,
    change_tempo,
    mel_transforms,
    reference,
    silence_before,
    white_noise,
)
from musicgenre.audio.perturb_sound import sound_transforms
from musicgenre.datasets.synthetic import STYLES, render_clip

SPEC = FeatureSpec(hop_length=1710)


def test_reference_and_floor_are_the_front_ends():
    db = np.array([[-10.0, -95.0], [-30.0, -60.0]])
    assert reference(db, SPEC).tolist() == [[0, -80], [-20, -50]]
    assert reference(db, SPEC, -0.5).tolist() == [[-0.5, -80.5], [-20.5, -50.5]]
    assert reference(db, FeatureSpec(db_ref="1.0", top_db=70)).tolist() == [[-10, -80], [-30, -60]]


def test_a_filters_gain_is_averaged_over_each_band():
    power = np.ones(1025)
    np.testing.assert_allclose(band_gains(power / 4, SPEC), -6.0206, atol=1e-3)
    power[:512] = 0  # nothing below 5.5 kHz
    gains = band_gains(power, SPEC)
    assert gains[0] == -120 and gains[-1] == pytest.approx(0.0, abs=1e-6)


def test_spectrograms_change_like_those_of_changed_sound():
    """Filters and noise, which leave every frame where it is."""
    sound = render_clip(list(STYLES)[2], 0, 5.0)
    sound = sound + (1e-3 * np.random.default_rng(0).standard_normal(len(sound))).astype(np.float32)
    before = compute_features(sound, SPEC)
    of_sound = {transform.name: transform for transform in sound_transforms(SPEC.sample_rate)[0]}
    checked = 0
    for transform in mel_transforms(SPEC)[0]:
        name = transform.name
        if name.startswith(("begins", "silence", "tempo", "speed", "pitch")):
            continue
        assert of_sound[name].irrelevant == transform.irrelevant
        there = compute_features(of_sound[name].apply(sound, np.random.default_rng(0)), SPEC)
        here = transform.apply(before, np.random.default_rng(1))
        assert here.dtype == np.float32 and here.max() == 0 and here.min() >= -80
        # If one strong tone sets the reference, its own change shifts the whole clip.
        shift = np.median(there - here)
        # Noise is drawn separately; a steep filter cuts through the narrowest bands.
        allowed = {"noise": 0.6, "nothing below 100 Hz": 0.25}
        fraction = allowed.get("noise" if name.startswith("noise") else name, 0.08)
        assert abs(shift) < 1.5, name
        limit = max(fraction * np.abs(there - before).mean(), 1e-4)
        assert np.abs(there - here - shift).mean() < limit, name
        checked += 1
    assert checked == 16


def test_noise_is_as_strong_and_varies_as_in_sound():
    """Noise of 0 dB on white noise has its power and spread in narrow and wide bands."""
    generator = np.random.default_rng(0)
    spec = FeatureSpec(hop_length=2048)
    sound = generator.standard_normal(2048 * 400).astype(np.float32)
    alone = compute_features(sound, spec)
    silent = np.full_like(alone, -200.0)
    silent[0] = alone.mean()  # all the power is in one frame of 401
    made = white_noise(silent, generator, spec, 0.0)[1:]
    level = 10 * np.log10(np.mean(10 ** (made / 10)))
    assert level == pytest.approx(alone.mean() - 10 * np.log10(len(alone)), abs=0.2)
    powers = [10 ** (db[1:-1] / 10) for db in (made, alone)]
    spread = [power.std(axis=0) / power.mean(axis=0) for power in powers]
    for bands in (slice(0, 40), slice(40, 80), slice(80, 128)):
        assert spread[0][bands].mean() == pytest.approx(spread[1][bands].mean(), rel=0.04), bands


@pytest.mark.parametrize("frequency", [330.0, 700.0, 2500.0])
def test_transposing_moves_a_tone_to_the_band_of_the_transposed_one(frequency):
    def bands(hertz):
        return compute_features(np.sin(2 * np.pi * hertz * np.arange(22050) / 22050), SPEC)

    for semitones in (-5.0, 0.5, 12.0):
        there = bands(frequency * 2 ** (semitones / 12))[6]
        here = change_pitch(bands(frequency), SPEC, semitones)[6]
        assert abs(int(np.argmax(there)) - int(np.argmax(here))) <= 1
    same = change_pitch(bands(frequency), SPEC, 0.0)
    np.testing.assert_allclose(same, bands(frequency), atol=1e-4)


def test_time_runs_in_whole_frames():
    db = np.repeat(np.arange(387.0)[:, None], 2, axis=1)
    faster, slower = change_tempo(db, 1.02), change_tempo(db, 0.98)
    assert len(faster) == 379 and faster[[0, 50, 378], 0].tolist() == [0, 51, 386]
    assert len(slower) == 387 and slower[[0, 50, 386], 0].tolist() == [0, 49, 378]
    assert begin_later(db, 6)[0, 0] == 6
    later = silence_before(db - 386, 6, 80.0)
    assert later.shape == db.shape and later[-1, 0] == -6
    assert later[:7, 0].tolist() == [-80] * 6 + [-386]
    assert len(begin_later(db[:3], 26)) == 1 and len(silence_before(db[:3], 26, 80.0)) == 3
    later, silent = (
        made.apply((db - 386) / 10, np.random.default_rng(0))
        for made in mel_transforms(SPEC)[0]
        if made.name in ("begins 0.5 s later", "silence of 0.5 s first")
    )
    # 11,025 samples are 6.4 hops.
    assert len(later) == 381
    assert (silent[:6] == silent.min()).all() and silent[6, 0] > silent.min()


def test_what_needs_the_sound_is_named():
    made, missing = mel_transforms(SPEC)
    assert len(made) == 25
    assert {"polarity", "mp3, 64 kbit/s", "8 bit"} <= {gone.name for gone in missing}
    assert len(missing) == 9
    assert all("needs the sound" in gone.reason for gone in missing)
