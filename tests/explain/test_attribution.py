import dataclasses
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
import soundfile
from tiny_model import tiny_model

from musicgenre import models
from musicgenre.audio.features import FeatureSpec, compute_features, mfcc_from_db
from musicgenre.audio.layout import ClipLayout
from musicgenre.errors import UserError
from musicgenre.explain import attribution, moments, sonify, taps
from musicgenre.explain.taps import Explainer
from musicgenre.inference.tagger import Tagger
from musicgenre.models.registry import input_limits

TWO, POOLS = {"filters": (4, 4)}, {"time_pools": (2, 2), "band_pools": (2, 2)}
DENSE = TWO | {"dense": (8,)}
TALL = DENSE | {"kernel_bands": (0, 1), "time_pools": (2, 2), "band_pools": (1, 1)}
ALEXNET = {"widths": (5, 3), "grouped": (2,), "response_norm": (1,), "pool_after": (1, 2)}
MUSICNN = {"temporal_filters": 3, "temporal_widths": (8,), "mid_filters": 4, "mid_layers": 2}
# Fields that make each network small; one that is not here is tested at its own size.
SMALL = {
    "alexnet": DENSE | ALEXNET,
    "conv1d": DENSE,
    "conv2d": DENSE,
    "crnn": TWO | POOLS | {"input_norm": "band", "pad": 4, "units": (3,)},
    "fcn": TWO | POOLS | {"pointwise": (8,)},
    "k1c2": TALL | {"kernel_bands": (1, 1)},
    "k2c1": TALL,
    "k2c2": TWO | POOLS | {"kernel_bands": (3, 3)},
    "musicnn": MUSICNN | {"timbral_filters": 4, "dense": 8},
    "rbm": {"layers": (8,)},
    "resnet": {"filters": 4},
    "sample_level": TWO | {"first_filters": 4, "last_filters": 8},
    "short_chunk": TWO | {"dense": 8},
    "spotify": DENSE,
    "vgg": {"filters": 4},
}


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """Networks run only a few times, so optimised compilation would take most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def base():
    return tiny_model()


def drawn(module, frames, bands):
    """Variables drawn with NumPy, which needs no compiling."""
    generator = np.random.default_rng(0)
    x = jax.ShapeDtypeStruct((1, frames, bands), np.float32)
    shapes = dict(jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), x))
    shapes.pop("intermediates", None)

    def draw(leaf):
        if leaf.ndim == 1:
            return np.float32(generator.uniform(0.2, 0.6, leaf.shape))
        # A little above zero, so that some units are on.
        values = generator.standard_normal(leaf.shape) + 0.2
        return np.float32(values / np.sqrt(np.prod(leaf.shape[:-1])))

    return jax.tree.map(draw, shapes)


def model_of(base, module, variables, frames, spec, mean=-30.0, std=15.0):
    return dataclasses.replace(
        base,
        module=module,
        model={"variables": variables, "norm": {"mean": np.float32(mean), "std": np.float32(std)}},
        layout=ClipLayout(frames),
        features=spec,
        label_names=("a", "b", "c"),
    )


@pytest.mark.parametrize("name", list(models.registered()))
def test_every_model_can_be_explained(name, base):
    fields = SMALL.get(name, {})
    cls = models.registered()[name]
    limits = input_limits(cls, models.registry.hyperparameters(cls) | fields)
    kind = limits.kinds[0] if limits.kinds else "logmel"
    bands = max(24, limits.min_bands)
    frames = max(32, limits.min_frames, -(-limits.min_values // bands))
    options = {"num_classes": 3, "frames": frames, "bands": bands, "kind": kind}
    module = models.build({"name": name} | fields, **options)
    hop, mels = bands if kind == "waveform" else 512, bands if kind == "logmel" else 128
    spec = FeatureSpec(kind=kind, n_mels=mels, hop_length=hop)
    model = model_of(base, module, drawn(module, frames, bands), frames, spec)
    x = -30 + 15 * np.random.default_rng(1).standard_normal((1, frames, bands), np.float32)

    explainer = Explainer(model)
    found = taps.first_filters(explainer)
    assert found
    assert all(np.isfinite(part.kernels).all() and part.kernels.ndim == 3 for part in found)
    expected = {
        "modulation": {"dense1"},
        "musicnn": {"timbral1", "timbral2", "temporal1"},
        "rbm": {"layer1"},
        "resnet": {"stem"},
    }
    assert {part.layer for part in found} == expected.get(name, {"conv1"})
    if name in ("conv1d", "spotify", "k2c1", "rbm"):
        assert found[0].form == "bands" and found[0].kernels.shape[1] == bands
    assert (found[0].form == "waveform") == (kind == "waveform")

    values = explainer.activations(x)
    assert list(values) == list(explainer.taps) and {"input", "embedding", "output"} <= set(values)
    skipped = ("Input", "Output", "Join", "Parameters")
    assert len(values) == sum(layer.kind not in skipped for layer in explainer.layers) + 3
    for name_, value in values.items():
        assert value.shape == (1, *explainer.taps[name_].shape) and np.isfinite(value).all(), name_
    np.testing.assert_allclose(values["input"], (x + 30) / 15, rtol=1e-5, atol=1e-5)
    assert values["output"].shape == (1, 3)

    over = explainer.last_convolution
    last = {"rbm": "input", "musicnn": "mid2", "resnet": "stage2_unit1_conv2", "vgg": "conv5"}
    assert over == last.get(name, over) and len(explainer.taps[over].shape) > 1
    gradients = explainer.gradients(x, "output", 1, over)
    np.testing.assert_allclose(gradients.scores[0], values["output"][0, 1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradients.values, values[over], rtol=1e-3, atol=1e-3)
    assert gradients.inputs.shape == x.shape and np.isfinite(gradients.inputs).all()
    assert np.abs(gradients.inputs).max() > 0 and np.isfinite(gradients.by_values).all()
    assert gradients.by_values.shape == gradients.values.shape
    # Along its own direction the output changes as the derivative says.
    length = float(np.linalg.norm(gradients.inputs))
    step = 0.02 * gradients.inputs / length
    change = [float(explainer.activations(x + sign * step)["output"][0, 1]) for sign in (1, -1)]
    assert change[0] - change[1] == pytest.approx(0.04 * length, rel=0.1)
    image = attribution.grad_cam(gradients.values[0], gradients.by_values[0])
    assert image.shape == explainer.taps[over].shape[:-1] and (image >= 0).all()
    assert attribution.stretched(image, frames, bands).shape == (frames, bands)


class Linear(nn.Module):
    num_classes: int = 3

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(self.num_classes, name="head")(x.reshape(len(x), -1))


class Pooled(nn.Module):
    """A convolution, the mean over time, and a head."""

    filters: int = 2
    width: int = 1

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.filters, (self.width,), use_bias=False, name="conv")(x)
        x = nn.relu(x).mean(axis=1)
        self.sow("intermediates", "embedding", x)
        return nn.Dense(3, use_bias=False, name="head")(x)


SPEC = FeatureSpec(n_mels=4, hop_length=512)


def test_of_a_linear_network_the_attributions_are_weight_times_value(base):
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((5, 4, 3)).astype(np.float32)
    bias = np.float32([1, 2, 3])
    variables = {"params": {"head": {"kernel": weights.reshape(20, 3), "bias": bias}}}
    mean, std = np.float32([-40, -30, -20, -10]), np.float32([5, 10, 20, 40])
    model = model_of(base, Linear(), variables, 5, SPEC, mean, std)
    x = generator.uniform(-79, 0, (5, 4)).astype(np.float32)
    explainer = Explainer(model)
    found = attribution.gradient_times_input(explainer, x, "output", 2)
    weight = weights[:, :, 2]
    np.testing.assert_allclose(found.values, weight * (x - mean) / std, rtol=1e-4, atol=1e-5)
    assert found.values.sum() + 3 == pytest.approx(found.score, abs=1e-4)
    np.testing.assert_array_equal(found.spectral, found.values)
    path = attribution.integrated_gradients(explainer, x, "output", 2, steps=3)
    np.testing.assert_allclose(path.values, weight * (x + 80) / std, rtol=1e-4, atol=1e-5)
    assert path.reference == pytest.approx((weight * (-80 - mean) / std).sum() + 3, abs=1e-3)
    # Its filters are frames x bands, and it has no convolution that Grad-CAM could be drawn of.
    (filters,) = taps.first_filters(explainer)
    assert filters.form == "bands"
    np.testing.assert_array_equal(filters.kernels, weights.transpose(2, 1, 0))
    assert explainer.last_convolution == "input" and "embedding" not in explainer.taps
    assert attribution.strongest_units(explainer, x, 0) == []
    # Over the input, whose bands are the units: each band's mean weight times its value.
    expected = np.maximum((x - mean) / std @ weight.mean(axis=0), 0)
    found = attribution.class_map(explainer, x, "output", 2)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_grad_cam_of_a_network_made_by_hand(base):
    kernel = np.zeros((1, 4, 2), np.float32)
    kernel[0, 0, 0] = kernel[0, 3, 1] = 1  # unit 0 is the first band, unit 1 the last
    head = np.float32([[2, 0, 1], [-1, 1, 0]])
    variables = {"params": {"conv": {"kernel": kernel}, "head": {"kernel": head}}}
    explainer = Explainer(model_of(base, Pooled(), variables, 4, SPEC, 0.0, 1.0))
    x = np.float32([[1, 9, 9, 4], [3, 9, 9, 1], [5, 9, 9, 2], [2, 9, 9, 8]])
    assert explainer.last_convolution == "conv"
    # Every derivative is the weight / 4 frames, so is their mean.
    for label, expected in enumerate(([0, 1.25, 2, 0], [1, 0.25, 0.5, 2])):
        found = attribution.class_map(explainer, x, "output", label)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    # The units' means are 2.75 and 3.75. They contribute 5.5 and -3.75 to label 0, 0 and 3.75 to 1.
    assert attribution.strongest_units(explainer, x, 0) == [0, 1]
    assert attribution.strongest_units(explainer, x, 1, 1) == [1]
    # A unit's score is the maximum over its positions.
    found = explainer.gradients(x[None], "conv", 1)
    assert found.scores.tolist() == [8] and np.argwhere(found.inputs[0]).tolist() == [[3, 3]]
    with pytest.raises(UserError, match=r"layer 'cov': the model has no .* Did you mean 'conv'\?"):
        explainer.gradients(x[None], "cov", 0)
    with pytest.raises(UserError, match="unit 2: the layer 'conv' has 2 units, 0 to 1"):
        explainer.gradients(x[None], "conv", 2)
    with pytest.raises(UserError, match=r"'head': it has no positions .*: input, conv\."):
        attribution.class_map(explainer, x, "output", 0, "head")


def test_grad_cam_weighs_units_by_their_mean_derivative():
    values = np.float32([[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[0, 9], [9, 0]]])
    slopes = np.zeros_like(values)
    slopes[0, 0] = 6, -6
    slopes[2, 1] = 12, 0  # means over 6 positions: 3 and -1
    np.testing.assert_allclose(attribution.grad_cam(values, slopes), [[1, 5], [9, 13], [0, 27]])


def test_maps_are_linear_between_the_centres_of_their_positions():
    line = attribution.stretched(np.float32([0, 1]), 4, 1)
    np.testing.assert_allclose(line[:, 0], [0, 0.25, 0.75, 1])
    both = attribution.stretched(np.float32([[0, 4], [8, 12]]), 2, 4)
    np.testing.assert_allclose(both, [[0, 1, 3, 4], [8, 9, 11, 12]])


@pytest.mark.parametrize("kind", ["logmel", "mfcc"])
def test_integrated_gradients_add_up_to_the_difference(kind, base):
    spec = FeatureSpec(kind=kind, n_mels=12, n_mfcc=6)
    module = Pooled(filters=5, width=3)
    scale = {"logmel": (-40.0, 20.0), "mfcc": (0.0, 60.0)}[kind]
    model = model_of(base, module, drawn(module, 9, spec.bands), 9, spec, *scale)
    db = np.random.default_rng(2).uniform(-80, 0, (9, 12)).astype(np.float32)
    x = db if kind == "logmel" else mfcc_from_db(db, 6)
    explainer = Explainer(model)
    found = attribution.integrated_gradients(explainer, x, "output", 0, steps=200)
    both = np.stack([x, attribution.silence(x, spec)])
    ends = explainer.activations(both, ["output"])["output"][:, 0]
    np.testing.assert_allclose([found.score, found.reference], ends, rtol=1e-5, atol=1e-5)
    difference = ends[0] - ends[1]
    assert abs(difference) > 0.1 and found.values.sum() == pytest.approx(difference, rel=0.01)
    # On mel bands it is the same sum, though other numbers.
    assert found.spectral.shape == (9, 12)
    assert found.spectral.sum() == pytest.approx(found.values.sum(), rel=1e-3)
    few = attribution.integrated_gradients(explainer, x, "output", 0, steps=1)
    assert abs(few.values.sum() - difference) > abs(found.values.sum() - difference)


def test_silence_has_the_features_of_silence():
    quiet = np.full((3, 12), -80, np.float32)
    x = np.random.default_rng(0).uniform(-80, 0, (3, 12)).astype(np.float32)
    np.testing.assert_array_equal(attribution.silence(x, FeatureSpec(n_mels=12)), quiet)
    mfcc = FeatureSpec(kind="mfcc", n_mels=12, n_mfcc=5)
    found = attribution.silence(mfcc_from_db(x, 5), mfcc)
    np.testing.assert_allclose(found, mfcc_from_db(quiet, 5), rtol=1e-5, atol=1e-4)
    found = attribution.silence(x, FeatureSpec(n_mels=12, db_ref="1.0", top_db=50))
    np.testing.assert_array_equal(found, x.max() - 50 + 0 * x)
    assert not attribution.silence(x, FeatureSpec(n_mels=12, compression="log10000")).any()
    # MFCCs go back to the bands that they were made of, where none is left out.
    complete = FeatureSpec(kind="mfcc", n_mels=12, n_mfcc=12)
    np.testing.assert_allclose(
        attribution.spectral_bands(mfcc_from_db(x, 12), complete), x, atol=1e-4
    )


def test_frequency_responses_are_sorted_by_their_peak():
    kernels = np.float32([[1, -1, 0], [1, 0, -1], [2, 2, 0]])
    decibels, hertz = taps.frequency_responses(kernels, 8000)
    assert decibels.shape == (3, 257)
    assert hertz[::64].tolist() == [0, 1000, 2000, 3000, 4000]
    assert hertz[decibels.argmax(axis=1)].tolist() == [0, 2000, 4000]
    # |1 + exp(-iw)| / 2 is cos(w / 2), at a quarter of the rate cos 45 degrees.
    assert decibels[[0, 1], [128, 64]] == pytest.approx(-3.01, abs=0.01)


def tone(seconds, hertz, rate=22050):
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate).astype(np.float32)


def energy_near(samples, hertz, rate=22050):
    """The fraction of a sound's energy within 6 % of a frequency."""
    power = np.abs(np.fft.rfft(samples)) ** 2
    frequency = np.fft.rfftfreq(len(samples), 1 / rate)
    return power[np.abs(frequency - hertz) < 0.06 * hertz].sum() / power.sum()


def test_moments_are_where_the_click_and_the_tone_are(base, tmp_path):
    spec = FeatureSpec(n_mels=16, hop_length=512, db_ref="1.0")
    noise = 1e-3 * np.random.default_rng(0).standard_normal((2, 22050 * 9)).astype(np.float32)
    noise[0, 45000:45020] += 0.8  # a click at 2.04 s
    noise[1, 132300:140300] += 0.3 * tone(8000 / 22050, 2000)  # from 6 to 6.36 s
    paths = [tmp_path / "click.wav", tmp_path / "tone.wav"]
    for path, samples in zip(paths, noise, strict=True):
        soundfile.write(path, samples, 22050)
    band = int(compute_features(tone(1, 2000), spec)[20].argmax())
    kernel = np.zeros((1, 16, 2), np.float32)
    kernel[0, :, 0] = 1 / 16  # all bands, but the one that the tone is in
    kernel[0, band, 1], kernel[0, band, 0] = 1, 0
    kernel[0, [b for b in range(16) if abs(b - band) > 2], 1] = -1 / 8
    head = np.float32([[1, 0, 0], [0, 1, 0]])
    variables = {"params": {"conv": {"kernel": kernel}, "head": {"kernel": head}}}
    explainer = Explainer(model_of(base, Pooled(), variables, 64, spec, -40.0, 15.0))
    failures = []
    units = [("conv", 0), ("conv", 1), ("output", 1)]
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    found = moments.strongest_moments(
        explainer, [broken, *paths], units, count=2, failed=failures.append
    )
    assert len(failures) == 1 and "broken.wav: not a sound file" in failures[0]
    assert [(moment.layer, moment.unit) for moment in found] == [
        unit for unit in units for _ in range(2)
    ]
    click, tones, label = found[0], found[2], found[4]
    hop = 512 / 22050
    assert click.path == str(paths[0]) and click.time == pytest.approx(45010 / 22050, abs=2.5 * hop)
    assert tones.path == str(paths[1]) and 6.0 - hop < tones.time < 6.363 + hop
    # A label is located by the second with most evidence: any that contains the tone.
    assert label.path == str(paths[1]) and label.start < 6.1 < label.end
    assert abs(label.time - 6.18) < 0.5
    assert found[0].activation > found[1].activation
    # The activation is the probability, as the tagger has it.
    windows = Tagger(explainer.model).taggram(paths[1])
    assert label.activation == pytest.approx(float(windows.probabilities[:, 1].max()), rel=1e-5)
    with pytest.raises(UserError, match=r"broken.wav"):
        moments.strongest_moments(explainer, [broken], units)
    # Of equal activations the earlier is kept.
    copy = shutil.copy(paths[0], tmp_path / "copy.wav")
    twins = moments.strongest_moments(explainer, [copy, paths[0]], units[:1], count=1)
    assert [moment.path for moment in twins] == [str(copy)]
    # What is cut out is the file as it is.
    excerpt, rate = sonify.read_excerpt(paths[0], 2.0, 2.1)
    assert excerpt.shape == (2205, 1) and rate == 22050
    assert int(np.abs(excerpt).argmax()) in range(899, 921)


def test_the_window_is_the_most_probable_or_the_one_that_was_asked_for(base, tmp_path):
    generator = np.random.default_rng(3)
    noise = [generator.standard_normal(22050 * 2) * level for level in (0.01, 0.1)]
    samples = np.concatenate([*noise, tone(3, 900), tone(2, 200)])
    path = tmp_path / "song.flac"
    soundfile.write(path, 0.3 * samples, 22050)
    tagger = Tagger(base)
    windows = tagger.taggram(path)
    # 387 frames in windows of 64; the last adds 3.
    mean = np.average(windows.probabilities, axis=0, weights=[1] * 6 + [3 / 64])
    for label in (None, 0, 1, 2):
        chosen = moments.choose_window(base, tagger.network, path, label=label)
        assert chosen.label == (int(mean.argmax()) if label is None else label)
        best = int(windows.probabilities[:, chosen.label].argmax())
        assert chosen.start == pytest.approx(windows.starts[best])
        assert chosen.end == pytest.approx(windows.ends[best])
        np.testing.assert_allclose(chosen.probabilities, windows.probabilities[best], rtol=1e-5)
        np.testing.assert_allclose(chosen.file_probabilities, mean, rtol=1e-5)
        assert chosen.seconds == pytest.approx(9, abs=1e-3)
    at = moments.choose_window(base, tagger.network, path, at=5.0)
    assert at.start <= 5 <= at.end and at.label == int(at.probabilities.argmax())
    with pytest.raises(UserError, match=r"song.flac: 9.5 s is beyond its end; it is 9.0 s long"):
        moments.choose_window(base, tagger.network, path, at=9.5)


@pytest.mark.parametrize(
    "spec",
    [
        FeatureSpec(n_mels=40, hop_length=512),
        FeatureSpec(n_mels=40, hop_length=1710),
        FeatureSpec(n_mels=40, hop_length=512, compression="log10000"),
        FeatureSpec(kind="stft", n_fft=1024, hop_length=256),
        FeatureSpec(kind="mfcc", n_mels=40, n_mfcc=30, hop_length=512),
    ],
    ids=["logmel", "sparse frames", "log10000", "stft", "mfcc"],
)
def test_a_mask_leaves_the_band_that_it_is_over(spec):
    low, high = 500, 4000
    samples = 0.4 * tone(1.0, low) + 0.4 * tone(1.0, high)
    features = compute_features(samples, spec)
    both = sonify.invert(features, spec, iterations=4)
    assert np.isfinite(both).all()
    assert energy_near(both, low) > 0.15 and energy_near(both, high) > 0.15
    assert abs(len(both) - len(samples)) <= spec.hop_length
    assert np.abs(both).max() == pytest.approx(0.9)
    mask = np.zeros_like(attribution.spectral_bands(features, spec))
    only = attribution.spectral_bands(compute_features(tone(1.0, high), spec), spec)
    loudest = only.mean(axis=0).argmax()
    mask[:, max(loudest - 3, 0) : loudest + 4] = 1
    # The sound itself keeps its amplitude and its phase.
    kept, inner = sonify.apply_mask(samples, spec, mask), slice(4000, -4000)
    for masked in (sonify.invert(features, spec, mask, iterations=4), kept):
        assert energy_near(masked, high) > 0.8 and energy_near(masked, low) < 0.01
    assert len(kept) == len(samples)
    assert np.corrcoef(kept[inner], tone(1.0, high)[inner])[0, 1] > 0.99
    unmasked = sonify.apply_mask(samples, spec, np.ones_like(mask))
    assert np.abs(unmasked - samples)[inner].max() < 0.05


def test_a_waveform_is_masked_as_it_is():
    spec = FeatureSpec(kind="waveform", hop_length=100, sample_rate=8000)
    features = tone(1, 440, 8000).reshape(80, 100)
    np.testing.assert_array_equal(sonify.invert(features, spec), features.ravel())
    spectral = np.zeros((80, 100), np.float32)
    spectral[20:40] = 1
    spectral[60:] = -5
    mask = sonify.attribution_mask(spectral, spec)
    assert mask.min() == 0 and mask.max() == 1 and (mask[22:38] == 1).all() and not mask[42:].any()
    part = sonify.apply_mask(features.ravel(), spec, mask)
    np.testing.assert_array_equal(part, sonify.invert(features, spec, mask))
    assert np.square(part[2000:4000]).sum() > 0.9 * np.square(part).sum() and not part[4200:].any()


def test_masks_keep_the_evidence_for_a_unit():
    spectral = np.zeros((60, 40), np.float32)
    spectral[30, 20], spectral[10, 10] = 3, -3
    mask = sonify.attribution_mask(spectral, FeatureSpec(n_mels=40))
    assert mask[30, 20] == 1 == mask.max() and mask[10, 10] == 0 and 0 < mask.sum() < 70
    assert not sonify.attribution_mask(-spectral, FeatureSpec(n_mels=40))[28:33, 18:23].any()
    assert not sonify.attribution_mask(np.zeros((4, 4), np.float32), FeatureSpec(n_mels=4)).any()


def test_sounds_are_written_as_16_bit_files(tmp_path):
    path = sonify.write_sound(tmp_path / "a" / "b.wav", np.float32([0, 0.5, 2, -2]), 8000)
    samples, rate = soundfile.read(path)
    assert rate == 8000 and soundfile.info(path).subtype == "PCM_16"
    np.testing.assert_allclose(samples, [0, 0.5, 1, -1], atol=1e-4)
    with pytest.raises(UserError, match=r"gone.wav: cannot be read from 1.0 s on"):
        sonify.read_excerpt(tmp_path / "gone.wav", 1, 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        sonify.write_sound(tmp_path / "file" / "b.wav", np.zeros(3), 8000)
