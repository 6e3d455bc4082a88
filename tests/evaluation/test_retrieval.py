import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from musicgenre.errors import UserError
from musicgenre.evaluation.retrieval import precision_at_k


def on_circle(*degrees):
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_worked_by_hand_with_and_without_groups():
    # Neighbours, nearest first: 0: 1 2 3 4; 1: 0 2 3 4; 2: 1 0 3 4; 3: 4 2 1 0; 4: 3 2 1 0.
    embeddings = on_circle(0, 10, 25, 60, 90) * np.array([[1], [5], [0.1], [2], [1]])
    labels = np.array([0, 0, 1, 1, 1])
    found = precision_at_k(embeddings, labels, 2)
    np.testing.assert_allclose(found["by_query"], [0.5, 0.5, 0, 1, 1])
    assert found["precision"] == pytest.approx(0.6) and found["macro_precision"] == pytest.approx(
        (0.5 + 2 / 3) / 2
    )
    assert found["per_class"]["precision"] == pytest.approx([0.5, 2 / 3]) and found["per_class"][
        "n"
    ] == [2, 3]
    # At random: 1 of 4 others for class 0, 2 of 4 for class 1. At best one of the two for class 0.
    assert found["chance"] == pytest.approx((2 * 0.25 + 3 * 0.5) / 5) and found["per_class"][
        "ceiling"
    ] == [0.5, 1]
    assert (found["n"], found["left_out"], found["k"]) == (5, 0, 2)
    # Clips 3 and 4 are one artist's: 3: 2 1; 4: 2 1. The unknown ones are nobody's.
    found = precision_at_k(embeddings, labels, 2, [None, "x", None, "y", "y"])
    np.testing.assert_allclose(found["by_query"], [0.5, 0.5, 0, 0.5, 0.5])
    assert found["per_class"]["chance"] == pytest.approx([0.25, (0.5 + 1 / 3 + 1 / 3) / 3])
    assert found["per_class"]["ceiling"] == pytest.approx([0.5, (1 + 0.5 + 0.5) / 3])


def test_equals_scikit_learn_on_many_clips():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 1100)  # more than one block of queries
    embeddings = generator.standard_normal((1100, 8)) + 0.8 * np.eye(8)[labels]
    nearest = (
        NearestNeighbors(n_neighbors=11, metric="cosine")
        .fit(embeddings)
        .kneighbors(embeddings)[1][:, 1:]
    )
    expected = (labels[nearest] == labels[:, None]).mean(axis=1)
    found = precision_at_k(embeddings, labels, 10)
    np.testing.assert_allclose(found["by_query"], expected)
    assert (
        found["precision"] == pytest.approx(expected.mean())
        and found["precision"] > 0.3 > found["chance"] > 0.2
    )


def test_clips_whose_group_leaves_too_few_are_left_out_and_counted():
    embeddings, labels = on_circle(0, 10, 20, 30), np.array([0, 0, 0, 2])
    found = precision_at_k(embeddings, labels, 2, ["a", "a", "a", "b"])
    assert found["left_out"] == 3 and found["n"] == 1
    assert np.isnan(found["by_query"][:3]).all() and found["by_query"][3] == 0
    assert found["per_class"] == {
        "n": [0, 0, 1],
        "precision": [None, None, 0],
        "chance": [None, None, 0],
        "ceiling": [None, None, 0],
    }
    with pytest.raises(UserError, match="k=2: no clip has that many"):
        precision_at_k(embeddings, labels, 2, ["a", "a", "b", "b"][:0] + ["a"] * 4)


def test_equal_embeddings_and_zeros_count_once():
    found = precision_at_k(np.array([[1.0, 0], [1, 0], [0, 0]]), np.array([0, 0, 0]), 2)
    assert found["precision"] == 1 and found["chance"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "at least 1 and less than the 4 clips, not 0"),
        ({"k": 4}, "less than the 4 clips"),
        ({"labels": np.zeros(3, int)}, r"\[4, 2\] and \[3\]"),
        ({"labels": np.zeros(4)}, "integers"),
        ({"labels": np.array([0, 1, -1, 0])}, "at least 0"),
        ({"groups": ["a"]}, "1 groups for 4 clips"),
        ({"embeddings": np.array([[1.0, 0], [np.nan, 1], [0, 1], [1, 1]])}, "clip 1 is not finite"),
        ({"embeddings": np.zeros(4)}, r"must be \[clips, d\]"),
    ],
)
def test_unusable_input_is_refused(changes, message):
    arguments = {
        "embeddings": on_circle(0, 10, 20, 30),
        "labels": np.array([0, 0, 1, 1]),
        "k": 1,
    } | changes
    with pytest.raises(UserError, match=message):
        precision_at_k(**arguments)
