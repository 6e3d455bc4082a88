import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from musicgenre import models
from musicgenre.config import base_config, check_config
from musicgenre.errors import UserError
from musicgenre.training.augment import (
    Augmentation,
    band_limit,
    beta,
    cutmix,
    equalise,
    following,
    gather_windows,
    mask,
    pitch_shift,
    time_shuffle,
    time_stretch,
    window_frames,
)
from musicgenre.training.state import create_state
from musicgenre.training.step import make_train_step

NORM = {"mean": np.full((1, 8), -40.0, np.float32), "std": np.full((1, 8), 10.0, np.float32)}
EVERYTHING = {
    "time_stretch": 0.2,
    "time_shuffle": 3,
    "pitch_shift": 1.5,
    "gain": 6.0,
    "eq": 4.0,
    "noise": 1.0,
    "low_pass": 0.5,
    "high_pass": 0.25,
    "mixup": 0.4,
    "cutmix": 1.0,
    "time_masks": 2,
    "band_masks": 1,
    "band_mask_share": 0.25,
}


def clips(size=6, frames=40, bands=8):
    return (-40 + 10 * np.random.default_rng(0).standard_normal((size, frames, bands))).astype(
        np.float16
    )


def batch(size=6, frames=40, **more):
    return {
        "x": clips(size, frames),
        "y": (np.arange(size) % 3).astype(np.int32),
        "mask": np.ones(size, np.float32),
    } | more


def augmented(key=0, size=6, frames=40, **fields):
    given = batch(
        size, frames, offset=np.zeros(size, np.int32), length=np.full(size, frames, np.int32)
    )
    # Zeros everywhere except in `mean`, so masked cells differ from the rest.
    return given["x"], jax.jit(Augmentation(frames=frames, **fields))(
        given, jax.random.key(key), {"mean": np.full((1, 8), 500.0)}
    )


def test_a_shift_by_one_band_moves_it_and_by_half_a_band_averages():
    x = clips().astype(np.float32)
    got = np.asarray(pitch_shift(x, jnp.array([1.0, -2.0, 0.5, 0.0, 20.0, 0.25])))
    np.testing.assert_array_equal(got[0, :, 1:], x[0, :, :-1])
    np.testing.assert_array_equal(got[0, :, 0], x[0, :, 0])
    np.testing.assert_array_equal(got[1, :, :-2], x[1, :, 2:])
    np.testing.assert_array_equal(got[1, :, -2:], np.repeat(x[1, :, -1:], 2, axis=1))
    np.testing.assert_allclose(got[2, :, 1:], (x[2, :, 1:] + x[2, :, :-1]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(got[3], x[3])
    np.testing.assert_array_equal(got[4], np.repeat(x[4, :, :1], 8, axis=1))
    np.testing.assert_allclose(got[5, :, 3], 0.75 * x[5, :, 3] + 0.25 * x[5, :, 2], rtol=1e-6)


def test_a_stretched_ramp_is_a_steeper_or_flatter_ramp():
    ramp = np.tile(np.arange(50.0, dtype=np.float32)[None, :, None], (5, 1, 2))
    rate = np.array([1.0, 1.25, 0.5, 1.25, 2.0], np.float32)
    first = np.array([3, 3, 3, 30, 0], np.int32)
    got = np.asarray(time_stretch(ramp, rate, first, np.array([50, 50, 50, 50, 24], np.int32), 20))[
        :, :, 0
    ]
    time = np.arange(20)
    np.testing.assert_allclose(got[0], 3 + time)
    np.testing.assert_allclose(got[1], 3 + 1.25 * time)
    np.testing.assert_allclose(got[2], 3 + 0.5 * time)
    # 19 frames at 1.25 span 24: the clip ends at 49, so they begin at 25 rather than 30.
    np.testing.assert_allclose(got[3], 25 + 1.25 * time)
    # Too short a clip is played to its last frame, 23, and back.
    np.testing.assert_allclose(got[4], np.where(2 * time <= 23, 2 * time, 46 - 2 * time))


def test_the_window_holds_the_fastest_clip():
    assert window_frames(256, 1000, 0.0) == 256
    assert (
        window_frames(21, 1000, 0.25) == 27
    )  # 20 steps of 1.25 frames: 26 frames, and one to spare
    assert window_frames(256, 260, 0.5) == 260
    # A window is bit-identical to that part of the clip.
    x = clips(1, 400)[:, :, :1].astype(np.float32)
    for start, rate in ((0, 1.25), (100, 1.2499), (370, 1.25), (373, 0.8)):
        start_of_window = min(start, 400 - 27)
        full = time_stretch(x, jnp.array([rate]), jnp.array([start]), jnp.array([400]), 21)
        window = x[:, start_of_window : start_of_window + 27]
        part = time_stretch(
            window, jnp.array([rate]), jnp.array([start - start_of_window]), jnp.array([27]), 21
        )
        np.testing.assert_array_equal(full, part)


def test_segments_are_permuted_without_loss():
    x = np.arange(10.0)[None, :, None] * np.ones((2, 1, 1))
    got = np.asarray(time_shuffle(x, jnp.array([[2, 0, 1], [0, 1, 2]])))[:, :, 0]
    # Bounds 0, 3, 7, 10.
    assert got[0].tolist() == [7, 8, 9, 0, 1, 2, 3, 4, 5, 6]
    assert got[1].tolist() == list(range(10))


def test_the_equaliser_draws_straight_lines_between_its_points():
    x = np.zeros((2, 3, 5), np.float32)
    got = np.asarray(equalise(x, jnp.array([[-2.0, 2.0], [1.0, 1.0]])))
    np.testing.assert_allclose(got[0], np.tile([-2, -1, 0, 1, 2], (3, 1)), atol=1e-6)
    np.testing.assert_allclose(got[1], 1.0)
    three = np.asarray(equalise(x[:1], jnp.array([[0.0, 4.0, 0.0]])))
    np.testing.assert_allclose(three[0, 0], [0, 2, 4, 2, 0], atol=1e-6)


def test_a_band_limit_falls_in_straight_lines_to_the_floor():
    x = np.full((3, 2, 8), -10.0, np.float32)
    x[:, 0, 4] = 0.0
    slope = jnp.array([[10.0, 3.0], [10.0, 3.0], [1.0, 1.0]])
    got = np.asarray(
        band_limit(x, jnp.array([2.0, 0.0, 0.0]), jnp.array([7.0, 3.5, 7.0]), slope, 25.0)
    )
    np.testing.assert_allclose(
        got[0], [[-25, -20, -10, -10, 0, -10, -10, -10], [-25, -20, -10, -10, -10, -10, -10, -10]]
    )
    # Band 4 is half a band beyond the edge; the floor is relative to it.
    np.testing.assert_allclose(got[1, 0], [-10, -10, -10, -10, -1.5, -14.5, -17.5, -20.5])
    np.testing.assert_allclose(got[1, 1], [-10, -10, -10, -10, -11.5, -14.5, -17.5, -20.5])
    np.testing.assert_array_equal(got[2], x[2])


def test_both_ends_are_limited_independently_up_to_their_fraction():
    size = 800
    flat = batch(size) | {"x": np.zeros((size, 40, 8), np.float16)}
    limit = jax.jit(
        Augmentation(
            frames=40, low_pass=0.5, high_pass=0.25, pass_share=0.5, top_db=6.0, probability=0.1
        )
    )
    got = np.asarray(limit(flat, jax.random.key(0), NORM)["x"])
    assert (got == got[:, :1]).all() and got.max() == 0.0 and got.min() == -6.0
    # Of eight bands the upper four and the lower two can change; no edge is further in.
    # Half of the time an end is limited. A band loses level where the edge is further in: uniformly
    # from 0 to 4 bands at the top, from 0 to 2 at the bottom.
    lost = (got[:, 0] < 0).mean(axis=0)
    np.testing.assert_allclose(lost, [1 / 2, 1 / 4, 0, 0, 1 / 8, 2 / 8, 3 / 8, 1 / 2], atol=0.06)
    np.testing.assert_allclose((got[:, 0, [0, 7]] < 0).all(axis=1).mean(), 1 / 4, atol=0.05)


def test_masks_and_cuts_are_at_the_recorded_positions():
    x = np.ones((2, 6, 4), np.float32)
    got = np.asarray(mask(x, jnp.array([1, 4]), jnp.array([2, 0]), jnp.float32(9), axis=1))
    assert got[0, :, 0].tolist() == [1, 9, 9, 1, 1, 1] and (got[1] == 1).all()
    got = np.asarray(
        mask(x, jnp.array([3, 0]), jnp.array([1, 4]), jnp.arange(4.0)[None, None], axis=2)
    )
    assert got[0, 0].tolist() == [1, 1, 1, 3] and got[1, 2].tolist() == [0, 1, 2, 3]
    cut, share = cutmix(x, 5 * x, jnp.array([0, 5]), jnp.array([3, 1]))
    np.testing.assert_allclose(share, [0.5, 5 / 6], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(cut).mean(axis=(1, 2)), [3.0, 10 / 6], rtol=1e-6)
    assert np.asarray(following(np.arange(3), None)).tolist() == [1, 2, 0]


def test_windows_come_from_the_right_clip_and_frame():
    x = clips()
    got = gather_windows(x, np.array([4, 0, 4]), np.array([0, 7, 20]), 20)
    for row, (clip, start) in enumerate(((4, 0), (0, 7), (4, 20))):
        np.testing.assert_array_equal(got[row], x[clip, start : start + 20])
    np.testing.assert_array_equal(gather_windows(x, np.array([2]), np.array([0]), 40)[0], x[2])


def test_mixing_weights_follow_the_beta_distribution():
    for alpha in (0.2, 1.0, 3.0):
        got = np.asarray(beta(jax.random.uniform(jax.random.key(1), (4000,)), alpha))
        assert scipy.stats.kstest(got, scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.01
        np.testing.assert_allclose(got.var(), 1 / (4 * (2 * alpha + 1)), rtol=0.1)


def test_masks_cover_half_of_their_widest_on_average_each_to_its_own_width():
    _, got = augmented(size=400, time_masks=1, time_mask_share=0.5)
    masked = (np.asarray(got["x"]) == 500.0).all(axis=2)
    widths = masked.sum(axis=1)
    assert set(widths) == set(range(21))  # half of 40 frames, and none at all
    np.testing.assert_allclose(
        widths.mean(), 10, atol=0.9
    )  # three standard deviations of the mean of 400
    # One piece each; apart from the edges all frames are masked equally often.
    assert (np.abs(np.diff(masked.astype(int), axis=1)).sum(axis=1) <= 2).all()
    assert masked.any(axis=0).all()
    _, got = augmented(size=400, band_masks=2, band_mask_share=0.25, probability=0.5)
    widths = (np.asarray(got["x"]) == 500.0).all(axis=1).sum(axis=1)
    assert widths.max() == 4
    # Either two masks of 0, 1 or 2 bands (one in nine clips has none), or nothing.
    np.testing.assert_allclose((widths > 0).mean(), 0.5 * 8 / 9, atol=0.075)


@pytest.mark.parametrize(
    "fields",
    [{"gain": 6.0}, {"eq": 4.0, "eq_points": 2}, {"noise": 2.0}],
    ids=["gain", "eq", "noise"],
)
def test_changes_of_level_have_their_range_and_shape(fields):
    x, got = augmented(size=300, **fields)
    change = np.asarray(got["x"]) - x
    if "gain" in fields:
        np.testing.assert_allclose(np.ptp(change, axis=(1, 2)), 0, atol=2e-5)
        level = change.mean(axis=(1, 2))
        assert 5.8 < np.abs(level).max() <= 6.001 and abs(level.mean()) < 0.7
    elif "eq" in fields:
        np.testing.assert_allclose(
            np.diff(change, n=2, axis=2), 0, atol=3e-5
        )  # a tilt is a straight line
        assert 3.9 < np.abs(change).max() <= 4.001
        assert np.abs(np.corrcoef(change[:, 0, 0], change[:, 0, -1])[0, 1]) < 0.2
    else:
        std = change.std(axis=(1, 2))
        assert std.max() < 2.3 and std.min() < 0.1
        np.testing.assert_allclose(std.mean(), 1.0, atol=0.12)


def test_without_normalisation_masks_are_filled_with_the_clips_mean():
    x, got = augmented(size=20, time_masks=1, time_mask_share=0.9, clip_mean=True)
    got = np.asarray(got["x"])
    masked = (got != x).all(axis=2)
    assert masked.any()
    for row in np.flatnonzero(masked.any(axis=1)):
        np.testing.assert_allclose(
            got[row][masked[row]], x[row].astype(np.float32).mean(), rtol=1e-5
        )


def test_mixed_clips_are_weighted_sums():
    x, got = augmented(mixup=0.4)
    x, share = x.astype(np.float32), np.asarray(got["mix"])
    assert ((share > 0) & (share < 1)).all()
    expected = share[:, None, None] * x + (1 - share[:, None, None]) * np.roll(x, -1, axis=0)
    np.testing.assert_allclose(got["x"], expected, rtol=1e-5)
    assert np.asarray(got["y_other"]).tolist() == [1, 2, 0, 1, 2, 0]
    x, got = augmented(cutmix=1.0)
    own = (np.asarray(got["x"]) == x).all(axis=2)
    np.testing.assert_array_equal(np.asarray(got["x"])[~own], np.roll(x, -1, axis=0)[~own])
    np.testing.assert_allclose(own.mean(axis=1), got["mix"], atol=1e-6)
    # Both: either, for the chosen fraction of the clips.
    x, got = augmented(size=400, mixup=1.0, cutmix=1.0, mix_share=0.5)
    full = (np.asarray(got["x"]) == x).all(axis=(1, 2))
    cut = ((np.asarray(got["x"]) == x).all(axis=2).sum(axis=1) > 0) & ~full
    np.testing.assert_allclose([full.mean(), cut.mean()], [0.5, 0.25], atol=0.07)
    np.testing.assert_array_equal(np.asarray(got["mix"])[full], 1.0)


def test_the_key_decides_and_each_clip_has_its_own():
    fields = {"time_stretch": 0.2, "noise": 1.0, "mixup": 0.4}
    _, one = augmented(0, **fields)
    _, again = augmented(0, **fields)
    _, other = augmented(1, **fields)
    np.testing.assert_array_equal(one["x"], again["x"])
    assert (np.asarray(one["x"]) != np.asarray(other["x"])).mean() > 0.8
    same = jax.jit(Augmentation(frames=40, gain=6.0))(
        batch() | {"x": np.zeros((6, 40, 8), np.float16)}, jax.random.key(0), NORM
    )
    assert len(set(np.asarray(same["x"])[:, 0, 0].tolist())) == 6
    # Another augmentation does not change what the others draw.
    _, more = augmented(0, gain=6.0, time_masks=1)
    _, less = augmented(0, time_masks=1)
    np.testing.assert_array_equal(np.asarray(more["x"]) == 500.0, np.asarray(less["x"]) == 500.0)


def test_augmentations_with_probability_zero_change_nothing():
    fields = {name: value for name, value in EVERYTHING.items() if name not in ("mixup", "cutmix")}
    x, got = augmented(probability=1e-9, pass_share=1e-9, **fields)
    np.testing.assert_array_equal(got["x"], x)
    x, got = augmented(mixup=1.0, cutmix=1.0, mix_share=1e-9)
    np.testing.assert_array_equal(got["x"], x)
    np.testing.assert_array_equal(got["mix"], 1.0)


def test_switched_off_augmentation_is_none():
    config = base_config()
    assert Augmentation.from_config(config, 647) is None
    config.augment.eq = 1.0
    config.features.top_db = 60.0
    assert Augmentation.from_config(config, 647) == Augmentation(frames=647, eq=1.0, top_db=60.0)
    config.data.normalise = "none"
    assert Augmentation.from_config(config, 647).clip_mean


def stepped(task, y, augmentation=None, norm=NORM, **options):
    """The metrics and the gradient, as the parameters' change, of one step on six clips."""
    network = {"name": "conv1d", "filters": (4,), "dense": (8,), "dropout": 0.0}
    module = models.build(network, num_classes=3, frames=40, bands=8)
    optimizer = optax.sgd(1.0)
    state = create_state(module, optimizer, norm, seed=0, frames=40, bands=8, ema=False)
    step = make_train_step(
        module, optimizer, seed=0, task=task, augmentation=augmentation, **options
    )
    new, metrics = jax.jit(step)(state, batch() | {"y": y})
    return (
        module,
        state,
        metrics,
        jax.tree.map(lambda a, b: np.asarray(a - b), state.params, new.params),
    )


@pytest.mark.parametrize("task", ["single_label", "multi_label", "regression"])
def test_a_mixed_batch_has_the_loss_and_gradient_of_its_soft_labels(task):
    weights = jnp.ones(3)
    y = (np.arange(6) % 3).astype(np.int32)
    targets = np.eye(3, dtype=np.float32)[y] * (2.5 if task == "regression" else 1.0)
    augmentation = Augmentation(frames=40, mixup=0.7)
    module, state, metrics, gradient = stepped(
        task,
        y if task == "single_label" else targets,
        augmentation,
        class_weights=weights,
        label_smoothing=0.1,
    )
    key = jax.random.fold_in(jax.random.key(0), 0)
    mixed = jax.jit(augmentation)(batch(), key, NORM)
    share = np.asarray(mixed["mix"])[:, None]
    soft = share * targets + (1 - share) * np.roll(targets, -1, axis=0)
    if task != "regression":
        np.testing.assert_allclose(soft.sum(axis=1), 1.0, rtol=1e-6)

    def loss(params):
        logits = module.apply({"params": params}, (mixed["x"] + 40.0) / 10.0, train=False)
        if task == "single_label":
            return optax.softmax_cross_entropy(logits, 0.9 * soft + 0.1 / 3).mean()
        if task == "multi_label":
            return optax.sigmoid_binary_cross_entropy(logits, 0.9 * soft + 0.05).mean()
        return jnp.square(logits - soft).mean()

    value, expected = jax.jit(jax.value_and_grad(loss))(state.params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradient, expected)
    if task == "single_label":
        logits = jax.jit(lambda x: module.apply({"params": state.params}, x, train=False))(
            (mixed["x"] + 40.0) / 10.0
        )
        best = np.asarray(logits).argmax(axis=1)
        np.testing.assert_allclose(metrics["accuracy"], soft[np.arange(6), best].mean(), rtol=1e-5)


def test_parts_of_a_batch_are_augmented_like_the_full_batch():
    y = (np.arange(6) % 3).astype(np.int32)
    augmentation = Augmentation(frames=40, gain=6.0, mixup=0.4)
    _, _, one, full = stepped("single_label", y, augmentation, class_weights=jnp.ones(3))
    _, _, other, parts = stepped(
        "single_label", y, augmentation, class_weights=jnp.ones(3), accumulate=3
    )
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), full, parts)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"augment.gain": -1.0}, "config.augment.gain must be at least 0, not -1.0"),
        ({"augment.noise": float("nan")}, "config.augment.noise must be at least 0, not nan"),
        (
            {"augment.mix_share": 0.0},
            "config.augment.mix_share must be above 0 and at most 1, not 0.0",
        ),
        ({"augment.probability": 1.5}, "config.augment.probability must be above 0 and at most 1"),
        ({"augment.eq_points": 1}, "config.augment.eq_points must be at least 2"),
        (
            {"augment.time_stretch": 1.5},
            "config.augment.time_stretch must be at least 0 and at most 1",
        ),
        (
            {"augment.time_shuffle": 1},
            "time_shuffle=1 must be 0 .off. or from 2 segments to the 647 frames",
        ),
        (
            {"augment.pitch_shift": 128.0},
            "config.augment.pitch_shift=128.0 must be below the 128 bands",
        ),
        (
            {"augment.time_masks": 1, "augment.time_mask_share": 0.001},
            "time_mask_share=0.001 of 647 frames is less than one",
        ),
        (
            {"augment.pitch_shift": 1.0, "features.kind": "stft"},
            "augment.pitch_shift=1.0 is for features.kind=logmel, not 'stft'",
        ),
        (
            {"augment.band_masks": 1, "features.kind": "mfcc"},
            "augment.band_masks=1 is for features.kind=logmel or stft, not",
        ),
        (
            {"augment.gain": 1.0, "features.compression": "log10000"},
            "augment.gain=1.0 is in dB.*compression='log10000' is not",
        ),
        (
            {"augment.time_shuffle": 4, "data.normalise": "position"},
            "augment.time_shuffle=4 needs a normalisation.*normalise=band",
        ),
        (
            {"augment.mixup": 1.0, "batch_size": 1},
            "augment.mixup=1.0 mixes.*config.batch_size must be at least 2",
        ),
        (
            {"data.on_device": "allways"},
            "config.data.on_device='allways' is not known. Did you mean 'always'",
        ),
        ({"steps_per_call": 0}, "config.steps_per_call must be at least 1"),
    ],
)
def test_impossible_settings_are_named(fields, message):
    config = base_config()
    config.data.normalise = "band"
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        check_config(config)
