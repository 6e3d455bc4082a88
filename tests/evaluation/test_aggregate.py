import numpy as np
import pytest

from musicgenre.errors import UserError
from musicgenre.evaluation.aggregate import average_by_clip


def test_mean_over_chunks_in_any_order():
    scores = np.array([[0.2, 0.8], [1.0, 0.0], [0.4, 0.6], [0.6, 0.4]], np.float32)
    average = average_by_clip(scores, np.array([1, 0, 1, 1]), 2)
    np.testing.assert_allclose(average, [[1, 0], [0.4, 0.6]], rtol=1e-6)
    assert average.dtype == np.float64


def test_agrees_with_a_loop():
    generator = np.random.default_rng(0)
    index = np.concatenate([np.arange(20), generator.integers(20, size=80)])
    scores = generator.random((100, 7))
    expected = np.stack([scores[index == clip].mean(axis=0) for clip in range(20)])
    np.testing.assert_allclose(average_by_clip(scores, index, 20), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("index", "clips", "message"),
    [
        ([0, 0, 2], 3, "1 of 3 clips have no chunk, the first is clip 1"),
        ([0, 1, 3], 3, "runs from 0 to 3"),
        ([0, 1, -1], 2, "runs from -1 to 1"),
        ([0, 1], 2, r"clip_index \[chunks\]"),
        ([0.0, 1.0, 1.0], 2, "integers"),
    ],
)
def test_refuses(index, clips, message):
    with pytest.raises(UserError, match=message):
        average_by_clip(np.ones((3, 2)), np.array(index), clips)
