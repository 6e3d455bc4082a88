import numpy as np
import pytest

from musicgenre.errors import UserError
from musicgenre.evaluation.intervals import bootstrap, bootstrap_mean, seeds_summary, wilson


def test_wilson_published_value():
    # 8 of 10: (p + z²/2n ± z sqrt(p q / n + z² / 4n²)) / (1 + z²/n) with z = 1.959964.
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_wilson_stays_within_bounds():
    low, high = wilson(10, 10)
    assert high == 1.0
    assert low == pytest.approx(10 / (10 + 1.959964**2), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0, 1 - low))


def test_bootstrap_of_the_mean_agrees_with_the_normal_interval():
    correct = np.arange(400) % 2
    low, high = bootstrap_mean(correct, resamples=4000)
    half = 1.96 * np.sqrt(0.25 / 400)
    assert low == pytest.approx(0.5 - half, abs=0.005)
    assert high == pytest.approx(0.5 + half, abs=0.005)


def test_resampling_groups_is_wider_where_groups_agree():
    # 100 artists of 10 clips, all right or all wrong: the 1,000 clips say no more than 100 would.
    correct = np.repeat(np.arange(100) % 2, 10)
    groups = [f"artist {i // 10}" for i in range(1000)]
    by_clip = bootstrap_mean(correct, resamples=4000)
    by_group = bootstrap_mean(correct, groups, resamples=4000)
    ratio = (by_group[1] - by_group[0]) / (by_clip[1] - by_clip[0])
    assert ratio == pytest.approx(np.sqrt(10), rel=0.08)


def test_clips_of_unknown_group_stand_alone():
    correct = np.arange(50) % 2
    assert bootstrap_mean(correct, [None] * 50) == bootstrap_mean(correct)
    # A group that happens to be called like an unknown clip's number is no unknown clip.
    values = np.array([0, 1, 1, 0])
    assert bootstrap_mean(values, [None, "0", "0", None]) == bootstrap_mean(
        values, ["a", "b", "b", "c"]
    )


def test_generic_bootstrap_equals_the_fast_one():
    values = np.random.default_rng(1).random(60)
    groups = [str(i // 4) for i in range(60)]

    def statistics(counts):
        return counts @ values / counts.sum(), counts.sum()

    both = bootstrap(statistics, 60, groups, resamples=500, seed=7)
    assert both[0] == pytest.approx(
        bootstrap_mean(values, groups, resamples=500, seed=7), abs=1e-12
    )
    assert both[1] == (60, 60)


def test_same_seed_same_interval():
    values = np.random.default_rng(1).random(60)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_bootstrap_without_an_answer_is_none():
    assert bootstrap_mean(np.ones(5), ["one"] * 5) is None
    assert bootstrap(lambda counts: [float("nan")], 5, resamples=20) == [None]


def test_seeds_summary_by_hand():
    summary = seeds_summary([0.4, 0.5, 0.6])
    # t(.975, 2) = 4.302653; half = 4.302653 * .1 / sqrt(3).
    assert summary["mean"] == pytest.approx(0.5)
    assert summary["std"] == pytest.approx(0.1)
    assert summary["interval"] == pytest.approx([0.5 - 0.2484138, 0.5 + 0.2484138], abs=1e-6)
    assert summary["values"] == [0.4, 0.5, 0.6]


def test_one_seed_has_no_standard_deviation():
    assert seeds_summary([0.4]) == {
        "n": 1,
        "mean": 0.4,
        "std": None,
        "interval": None,
        "values": [0.4],
    }


def test_refusals():
    with pytest.raises(UserError, match="3 of 2 clips"):
        wilson(3, 2)
    with pytest.raises(UserError, match="2 groups for 3 clips"):
        bootstrap_mean(np.ones(3), ["a", "b"])
    with pytest.raises(UserError, match="at least one clip"):
        bootstrap_mean(np.ones(0))
    with pytest.raises(UserError, match="finite number"):
        seeds_summary([0.4, float("nan")])
