import itertools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft

from musicgenre import models
from musicgenre.models.modulation import (
    Modulation,
    band_correlations,
    bin_matrix,
    loudness_views,
    modulation_spectrum,
    sounding,
    standard_deviation,
)

# A small front: 2 blocks of 6 bands in windows of 8 frames, one block of 12 in windows of 4.
SMALL = {
    "regions": (2, 1),
    "windows": (8, 4),
    "scale_edges": (0, 1, 3),
    "rate_edges": (0, 1, 2, 4),
    "groups": 3,
    "cepstra": 5,
}
features = jax.jit(Modulation(10, **SMALL).features)
three_views = jax.jit(Modulation(10, **SMALL, floors=(20.0,), contrasts=(8.0,)).features)


def unweighted(function):
    """A function of clips, weights and sizes, with weights of 1, compiled."""
    return jax.jit(
        lambda x, *sizes: function(x, jnp.ones(x.shape[:2]), *sizes), static_argnums=(1, 2, 3, 4)
    )


spectrum, views = unweighted(modulation_spectrum), unweighted(loudness_views)
correlations = unweighted(band_correlations)


def build(frames=64, bands=128, dtype="float32", **fields):
    model = {"name": "modulation", **fields}
    return models.build(model, num_classes=10, frames=frames, bands=bands, dtype=dtype)


def clips(batch=2, frames=21, bands=13):
    return np.float32(np.random.default_rng(0).normal(-40, 10, (batch, frames, bands)))


def binned(values, edges, axis):
    """Means between edges, with NumPy; the last bin takes the rest."""
    size = values.shape[axis]
    ends = [edge for edge in edges if edge < size] + [size]
    parts = [values.take(range(a, b), axis).mean(axis) for a, b in itertools.pairwise(ends)]
    return np.stack(parts, axis)


def worked_spectrum(x, regions, window, scale_edges, rate_edges):
    """The spectrum of one clip in float64, by SciPy's DCT and NumPy's FFT, window by window."""
    width = x.shape[1] // regions
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    found = []
    for r in range(regions):
        block = scipy.fft.dct(x[:, r * width : (r + 1) * width], norm="ortho", axis=1)
        starts = range(0, len(x) - window + 1, window // 2)
        windows = np.stack([block[s : s + window] * hann[:, None] for s in starts])
        magnitude = np.abs(np.fft.rfft(windows, axis=1)).mean(axis=0)
        found.append(np.log(binned(binned(magnitude.T, scale_edges, 0), rate_edges, 1) + 0.1))
    return np.stack(found)


def test_the_front_is_the_one_described():
    """All features of a clip in float64; 21 frames and 13 bands have a remainder everywhere."""
    x = clips()
    got = [np.asarray(block) for block in features(x)]
    for row, clip in enumerate(np.float64(x)):
        clip = clip - clip.max()
        difference = np.diff(clip, axis=0)
        edges = SMALL["scale_edges"], SMALL["rate_edges"]
        level = clip[:, :12].reshape(21, 3, 4).mean(axis=2)
        expected = [
            clip.mean(axis=0),
            np.log(difference.std(axis=0) + 0.1),
            worked_spectrum(clip, 2, 8, *edges).ravel(),
            worked_spectrum(clip, 1, 4, *edges).ravel(),
            # The floor under the variance takes about 1 % of a correlation of levels this lively.
            np.corrcoef(level.T)[np.triu_indices(3, 1)]
            * np.prod(np.sqrt([level.var(0) / (level.var(0) + 0.05)]), axis=0).mean(),
            scipy.fft.dct(difference, norm="ortho", axis=1)[:, :5].std(axis=0),
        ]
        for block, want in zip(got, expected, strict=True):
            np.testing.assert_allclose(block[row], want, atol=2e-3, rtol=1e-4)
    assert [block.shape for block in got] == [(2, n) for n in (13, 13, 2 * 3 * 4, 3 * 3, 3, 5)]


def test_a_regular_beat_has_its_rate_and_a_regular_comb_its_scale():
    edges = tuple(range(17))
    time, band = np.arange(128), np.arange(32)
    # 5 cycles in each window of 32 frames, alike on all bands: rate 5, scale 0.
    beat = np.tile(np.cos(2 * np.pi * 5 * time / 32)[None, :, None], (1, 1, 32)).astype(np.float32)
    found = np.asarray(spectrum(20 * beat, 1, 32, edges, edges))[0, 0]
    assert np.unravel_index(found.argmax(), found.shape) == (0, 5)
    # A Hann window sums to 16 and a cosine has half of it; the DCT of a constant 20 over 32 bands
    # is 20 * sqrt(32).
    np.testing.assert_allclose(np.exp(found[0, 5]), 20 * np.sqrt(32) * 8 + 0.1, rtol=1e-3)
    # Its neighbours get half of the amplitude, the next ones nothing.
    np.testing.assert_allclose(np.exp(found[0, [4, 6]]), 20 * np.sqrt(32) * 4 + 0.1, rtol=1e-3)
    np.testing.assert_allclose(found[0, [3, 7]], np.log(0.1), atol=0.02)
    # The 7th DCT pattern, still over time: scale 7 (3.5 cycles over the bands), rate 0.
    comb = np.tile(np.float32(np.cos(np.pi * 7 * (band + 0.5) / 32)), (1, 128, 1))
    found = np.asarray(spectrum(20 * comb, 1, 32, edges, edges))[0, 0]
    assert np.unravel_index(found.argmax(), found.shape) == (7, 0)
    # A pattern on the upper half of the bands is found in the upper of two regions.
    half = np.concatenate([np.zeros_like(beat[:, :, :16]), beat[:, :, :16]], axis=2)
    found = np.asarray(spectrum(20 * half, 2, 32, edges, edges))[0]
    assert found[1].argmax() == 5 and found[1].max() > 5 and found[0].max() < -2


def test_views_count_loudness_differently():
    """In float64: noise power of -10 dB, and the distance from the mean under a tanh."""
    x = clips(2, 9, 3)
    plain, floor, contrast = (np.asarray(view) for view in views(x, (10.0,), (4.0,)))
    under = np.float64(x) - np.float64(x).max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(plain, under, atol=1e-4)
    np.testing.assert_allclose(floor, 10 * np.log10(10 ** (under / 10) + 0.1), atol=1e-4)
    level = under - under.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(contrast, 4 * np.tanh(level / 4), atol=1e-4)
    # The loudest value stays within half a dB of 0; nothing sinks below the floor, however quiet.
    assert 0.4 < floor.max() < 0.42 and floor.min() >= -10
    silence = views(np.array([[[0.0], [-400.0], [-np.float32(1e30)]]], np.float32), (50.0,), (8.0,))
    np.testing.assert_allclose(silence[1][0, :, 0], [0, -50, -50], atol=1e-3)
    assert np.isfinite(silence[2]).all() and np.abs(silence[2]).max() <= 8


def test_each_view_has_its_features():
    x = clips()
    several = three_views(x)
    assert len(several) == 18
    for got, plain in zip(several, features(x), strict=False):
        np.testing.assert_allclose(got, plain, atol=1e-3)
    parts = (several[6:12], several[12:])
    for view, blocks in zip(views(x, (20.0,), (8.0,))[1:], parts, strict=True):
        np.testing.assert_allclose(blocks[0], view.mean(axis=1), atol=1e-4)
        expected = spectrum(view, 2, 8, (0, 1, 3), (0, 1, 2, 4)).reshape(2, -1)
        np.testing.assert_allclose(blocks[2], expected, atol=1e-3)
        np.testing.assert_allclose(blocks[4], correlations(view, 3), atol=1e-3)


def test_neither_level_nor_position_in_time_matters():
    x = clips(1, 64, 12)
    for block, louder in zip(features(x), features(x + 12.5), strict=True):
        np.testing.assert_allclose(block, louder, atol=1e-3)
    # A beat of 2 cycles per window gives the same from any frame on; a slower one does not.
    time = np.arange(48)
    edges = ((0, 1, 2), (0, 1, 2, 3))

    def beat(cycles, shift):
        level = 20 * np.cos(2 * np.pi * cycles * (time + shift) / 8)
        return spectrum(np.tile(np.float32(level)[None, :, None], (1, 1, 12)), 2, 8, *edges)

    for shift in (1, 2.5, 7):
        np.testing.assert_allclose(beat(2, shift), beat(2, 0), atol=1e-3)
    assert np.abs(beat(1.5, 0) - beat(2, 0)).max() > 0.1


def test_silence_around_a_clip_does_not_count():
    x = clips(2, 40, 12)
    quiet = np.tile(x.max(axis=(1, 2), keepdims=True) - 79, (1, 8, 12))
    with_silence = np.concatenate([quiet, x, quiet[:, :4]], axis=1)
    np.testing.assert_array_equal(sounding(with_silence), [[0.0] * 8 + [1.0] * 40 + [0.0] * 4] * 2)
    # The silence is a multiple of half a window, so that the windows inside are the same.
    for block, plain in zip(three_views(with_silence), three_views(x), strict=True):
        np.testing.assert_allclose(block, plain, atol=1e-3)
    # A rest inside counts, and so does a clip that is all silence.
    rest = np.concatenate([x[:, :20], quiet, x[:, 20:]], axis=1)
    assert np.asarray(sounding(rest)).all() and np.asarray(sounding(quiet)).all()
    # Sound shorter than a window is taken together with the silence around it.
    short = np.concatenate([np.tile(quiet, (1, 6, 1)), x[:, :4]], axis=1)
    found = three_views(short)
    assert all(np.isfinite(block).all() for block in found)
    under = short - short.max(axis=(1, 2), keepdims=True)
    expected = spectrum(under, 2, 8, (0, 1, 3), (0, 1, 2, 4)).reshape(2, -1)
    np.testing.assert_allclose(found[2], expected, atol=1e-3)


def test_bands_that_move_together_correlate():
    x = np.random.default_rng(0).standard_normal((1, 400, 3)).astype(np.float32) * 10
    x[:, :, 1] = 3 * x[:, :, 0]
    x[:, :, 2] = -x[:, :, 0] + 7
    np.testing.assert_allclose(correlations(x, 3)[0], [1, -1, -1], atol=2e-3)
    # Constant bands have a correlation of zero rather than an undefined one.
    np.testing.assert_allclose(correlations(np.ones((1, 400, 3), np.float32), 3)[0], 0)
    found = jax.jit(standard_deviation)(x, np.ones((1, 400)))[0]
    np.testing.assert_allclose(found, x[0].std(axis=0), rtol=1e-5)


def test_bins_average_and_the_last_one_takes_the_remainder():
    expected = [[1, 0, 0], *[[0, 1 / 2, 0]] * 2, *[[0, 0, 1 / 3]] * 3]
    np.testing.assert_allclose(bin_matrix((0, 1, 3, 7, 9), 6), expected)


def test_the_sizes(variable_shapes, count, parameter_count, layer_shapes):
    shapes = variable_shapes(build(387), 387, 128)
    # Bands, their onsets, 4 x 10 x 11, 4 x 10 x 9 and 13 x 9 modulations, 32 * 31 / 2 correlations,
    # 40 cepstra.
    size = 128 + 128 + 440 + 360 + 117 + 496 + 40
    assert size == 1709 and shapes["batch_stats"]["feature_norm"]["mean"].shape == (size,)
    assert count(shapes["params"]) == size * 256 + 256 + 256 * 10 + 10 == 440_330
    # A floor and a contrast make three views of it.
    three = build(387, floors=(50.0,), contrasts=(8.0,))
    assert parameter_count(three, 387, 128) == 3 * size * 256 + 2826
    # As many parameters for any length, so that a model trained on windows scores complete clips.
    assert variable_shapes(build(64), 64, 128) == shapes
    assert layer_shapes(build(hidden=(8, 6)), 64, 128)["embedding"] == (2, 6)
    assert layer_shapes(build(hidden=()), 64, 128)["embedding"] == (2, size)


def test_each_type_of_feature_has_the_same_weight(filled):
    """In training a feature's variance is its weight, and each block has the same in total."""
    module = build(16, 12, **SMALL, hidden=(), dropout=0.0, input_dropout=0.0)
    variables = filled(module, 16, 12)
    x = clips(64, 16, 12)
    options = {"train": True, "mutable": ["batch_stats", "intermediates"]}
    updated = jax.jit(lambda x: module.apply(variables, x, **options)[1])(x)
    embedding = np.asarray(updated["intermediates"]["embedding"][0])
    assert np.abs(embedding.mean(axis=0)).max() < 1e-3
    ends = np.cumsum([12, 12, 24, 9, 3, 5])
    totals = [part.sum() for part in np.split(embedding.var(axis=0), ends[:-1])]
    np.testing.assert_allclose(totals, ends[-1] / 6, rtol=1e-2)
    # The running statistics move a hundredth of the way.
    old, new = variables["batch_stats"]["feature_norm"], updated["batch_stats"]["feature_norm"]
    raw = np.concatenate([np.asarray(block) for block in features(x)], axis=1)
    expected = 0.99 * old["mean"] + 0.01 * raw.mean(axis=0)
    np.testing.assert_allclose(new["mean"], expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_finite_even_of_silence(filled):
    module = build(16, 12, **SMALL, hidden=(16,), floors=(20.0,), contrasts=(8.0,))
    variables = filled(module, 16, 12)
    gradient = jax.jit(jax.grad(lambda x: models.apply_model(module, variables, x)[0].sum()))
    assert np.isfinite(gradient(np.zeros((2, 16, 12), np.float32))).all()
    found = np.asarray(gradient(clips(2, 16, 12)))
    assert np.isfinite(found).all() and (np.abs(found).max(axis=(1, 2)) > 0).all()


def test_a_clips_logits_do_not_depend_on_its_batch(filled, apply):
    """A CPU takes four clips at once and then the rest; seven are one such part and three."""
    module = build(16, 12, **SMALL, hidden=(4,))
    variables, x = filled(module, 16, 12), clips(7, 16, 12)
    logits = np.asarray(apply(module, variables, x)[0])
    np.testing.assert_allclose(logits[:4], apply(module, variables, x[:4])[0], atol=1e-4)
    np.testing.assert_allclose(logits[3:], apply(module, variables, x[3:])[0], atol=1e-4)
    assert np.ptp(logits, axis=0).min() > 0.01


def test_the_front_stays_in_float32(filled, apply):
    """Rounding dB to bfloat16 would move features by tenths; only later layers are rounded."""
    full, half = (build(16, 12, dtype, hidden=(), **SMALL) for dtype in ("float32", "bfloat16"))
    variables, x = filled(full, 16, 12), clips(2, 16, 12)
    one, other = (np.asarray(apply(module, variables, x)[1]) for module in (full, half))
    np.testing.assert_array_equal(other, one.astype(jnp.bfloat16).astype(np.float32))
