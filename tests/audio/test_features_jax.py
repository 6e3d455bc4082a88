from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicgenre.audio.decode import load_audio
from musicgenre.audio.features import FeatureSpec, compute_features, frame_count, mel_power, to_db
from musicgenre.audio.features_jax import TRANSFORMS, features, frame_waveform, stft_power
from musicgenre.errors import UserError

# Hops that divide the window or not, odd and prime windows, every type, compression and reference.
SPECS = {
    "report": FeatureSpec(),
    "hop1710": FeatureSpec(hop_length=1710),
    "hop longer than the window": FeatureSpec(n_fft=512, hop_length=700, n_mels=40),
    "re 1, 100 dB": FeatureSpec(n_fft=1000, hop_length=300, n_mels=40, db_ref="1.0", top_db=100.0),
    "log10000": FeatureSpec(
        sample_rate=16000, n_fft=512, hop_length=256, n_mels=96, compression="log10000"
    ),
    "mfcc": FeatureSpec(kind="mfcc", n_mfcc=13, n_fft=1024, hop_length=512, n_mels=64),
    "stft": FeatureSpec(kind="stft", n_fft=1024, hop_length=512),
    "odd": FeatureSpec(kind="stft", n_fft=255, hop_length=100),
    "prime": FeatureSpec(n_fft=257, hop_length=64, n_mels=16),
    "waveform": FeatureSpec(kind="waveform", hop_length=243),
}


def signals(samples, rate=22050):
    """Noise, a tone, a fading tone, quiet noise, sound then silence, near silence, silence."""
    time = np.arange(samples) / rate
    noise = np.random.default_rng(0).standard_normal(samples)
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    dying = np.sin(2 * np.pi * 1000 * time) * np.exp(-8 * time)
    half = 0.1 * noise * (np.arange(samples) < samples // 2)
    quiet = 1e-4 * noise, half, 1e-6 * noise, 0 * noise
    return np.stack([0.1 * noise, tone, dying, *quiet]).astype(np.float32)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_features_equal_those_of_numpy(spec):
    batch = signals(30011)
    expected = np.stack([compute_features(clip, spec) for clip in batch])
    found = jax.jit(partial(features, spec=spec))(batch)
    assert found.dtype == jnp.float32 and found.shape == expected.shape
    assert found.shape == (7, frame_count(30011, spec), spec.bands)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 if spec.kind == "mfcc" else 1e-4)


@pytest.mark.parametrize("name", ["report", "odd", "prime"])
def test_the_matrix_products_equal_the_transform(name):
    """Factors 64 x 32, 17 x 15 and 257 x 1, relative to the loudest cell."""
    spec = SPECS[name]
    batch = signals(9000)[:3]
    exact, products, single = (
        np.asarray(jax.jit(partial(stft_power, spec=spec, transform=transform))(batch))
        for transform in ("rfft64", "matmul", "rfft32")
    )
    assert exact.shape == products.shape == (3, frame_count(9000, spec), 1 + spec.n_fft // 2)
    loudest = exact.max(axis=(1, 2), keepdims=True)
    assert np.abs(products - exact).max() > 0 and np.abs((products - exact) / loudest).max() < 1e-6
    assert np.abs((single - exact) / loudest).max() < 1e-6


def test_a_tone_on_a_frequency_has_the_power_of_the_window():
    """A cosine of amplitude 1 on a bin gives 512 / 4 there, half beside it and nothing beyond."""
    spec = FeatureSpec(kind="stft", n_fft=512, hop_length=256)
    tone = np.cos(2 * np.pi * 20 * np.arange(4096) / 512).astype(np.float32)[None]
    for transform in TRANSFORMS:
        power = jax.jit(partial(stft_power, spec=spec, transform=transform))(tone)[0, 4]
        np.testing.assert_allclose(power[19:22], [64.0**2, 128.0**2, 64.0**2], rtol=1e-5)
        assert power[:19].max() < 1e-6 and power[22:].max() < 1e-6


def test_features_of_the_real_clips_equal_those_of_numpy(real_data):
    """Measured over 30 s: at most 2e-5 dB with "auto", and 3e-4 in single precision."""
    clips = sorted((real_data / "gtzan_audio").glob("*/*.au"))
    spec = FeatureSpec()
    assert len(clips) == 8
    run = {name: jax.jit(partial(features, spec=spec, transform=name)) for name in TRANSFORMS}
    for clip in clips:
        # Of one length, so that each transform is compiled once.
        samples = load_audio(clip, 22050).samples[: 29 * 22050]
        expected = compute_features(samples, spec)
        for transform, function in run.items():
            atol = 1e-4 if transform in ("auto", "rfft64") else 1e-3
            np.testing.assert_allclose(function(samples[None])[0], expected, rtol=0, atol=atol)


def test_the_first_frames_alone_set_reference_and_floor():
    """What comes after them is in the last one's window but not in the reference."""
    spec = FeatureSpec(n_fft=512, hop_length=256, n_mels=20)
    clip = signals(8192)[:1].copy()
    clip[:, 6000:] *= 50
    found = jax.jit(partial(features, spec=spec, frames=16))(clip)
    expected = to_db(mel_power(clip[0], spec)[:16], spec)
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-4)
    assert abs(float(found.max())) < 1e-5
    assert jax.jit(partial(features, spec=spec))(clip)[:, :16].max() < -20
    with pytest.raises(UserError, match="34 frames were requested, but the samples make 33"):
        features(clip, spec, frames=34)


def test_waveforms_are_framed_and_padded():
    samples = jnp.arange(1.0, 8.0)[None]
    np.testing.assert_array_equal(frame_waveform(samples, 3), [[[1, 2, 3], [4, 5, 6]]])
    np.testing.assert_array_equal(frame_waveform(samples, 3, frames=1), [[[1, 2, 3]]])
    np.testing.assert_array_equal(frame_waveform(samples, 9), [[[1, 2, 3, 4, 5, 6, 7, 0, 0]]])


@pytest.mark.parametrize("transform", ["auto", "matmul"])
def test_gradients_and_vmap(transform):
    spec = FeatureSpec(sample_rate=8000, n_fft=256, hop_length=100, n_mels=16)
    batch = signals(1500, 8000)[:2] + 0.1 * signals(1500, 8000)[:1]
    run = partial(features, spec=spec, transform=transform)

    @jax.jit
    def loss(x):
        return jnp.square(run(x)).mean()

    gradient = jax.jit(jax.grad(loss))(batch)
    assert gradient.dtype == jnp.float32 and not jax.config.jax_enable_x64
    direction = np.random.default_rng(1).standard_normal(batch.shape).astype(np.float32)
    slope = (loss(batch + 1e-4 * direction) - loss(batch - 1e-4 * direction)) / 2e-4
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=5e-3)
    one_by_one = jax.jit(jax.vmap(lambda clip: run(clip[None])[0]))(batch)
    np.testing.assert_allclose(one_by_one, jax.jit(run)(batch), rtol=0, atol=1e-3)


def test_an_unknown_transform():
    with pytest.raises(UserError, match=r"transform: 'rfft' is not known. Did you mean 'rfft"):
        features(jnp.zeros((1, 4000)), FeatureSpec(), transform="rfft")
