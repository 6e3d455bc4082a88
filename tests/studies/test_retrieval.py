import dataclasses
import json

import numpy as np
import pytest
from tiny_model import tiny_model

from musicgenre.config import store_path
from musicgenre.errors import UserError
from musicgenre.evaluation.retrieval import precision_at_k
from musicgenre.inference.windows import Network
from musicgenre.runs.model import load_model
from musicgenre.store.store import Store
from musicgenre.studies.evaluate import store_of_arrays
from musicgenre.studies.retrieval import clip_embeddings, neighbour_report, neighbour_table


def test_the_report_on_a_split(small_config):
    model = tiny_model()
    store = Store.open(store_path(small_config))
    model = dataclasses.replace(model, features=store.features, layout=store.layout)
    indices = store.indices("valid")
    embeddings = clip_embeddings(model, store, "valid")
    expected = np.concatenate(
        [Network(model)(store.gather(indices[i : i + 3]))[1] for i in range(0, 9, 3)]
    )
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    report = neighbour_report(model, store, "valid", ks=(1, 2))
    labels = np.array([int(str(store.clip_ids[i]).split(".")[1]) % 3 for i in indices])
    plain = [precision_at_k(expected, labels, k) for k in (1, 2)]
    assert [(row["k"], row["filtered"]) for row in report["measures"]] == [
        (1, False),
        (2, False),
    ]  # no group is known
    for row, found in zip(report["measures"], plain, strict=True):
        assert (
            row["precision"] == found["precision"]
            and row["interval"][0] <= row["precision"] <= row["interval"][1]
        )
        assert row["chance"] == pytest.approx(2 / 8)
    assert json.loads(json.dumps(report)) == report and report["n"] == report["without_group"] == 9
    table = neighbour_table(report).splitlines()
    assert (
        table[2].startswith(f"| 1 | all others | {100 * plain[0]['precision']:.1f} % | ")
        and "| 25.0 % | 100.0 % |" in table[2]
    )
    assert table[-3].startswith(
        f"| {store.label_names[0]} | 3 | {100 * plain[0]['per_class']['precision'][0]:.1f} % |"
    )
    with pytest.raises(UserError, match="Prepare the clips with the model's front end"):
        neighbour_report(
            dataclasses.replace(model, layout=dataclasses.replace(model.layout, frames=65)),
            store,
            "valid",
        )
    with pytest.raises(UserError, match="no clips in the split 'x'"):
        neighbour_report(model, store, "x")
    store.dataset["task"] = "multi_label"
    with pytest.raises(UserError, match="needs one label per clip"):
        neighbour_report(model, store, "valid")


def test_precision_of_the_packaged_model_on_real_clips(real_data, tmp_path):
    """A quarter of the validation clips, so that it is quick: every fourth clip of the file."""
    with np.load(real_data / "gtzan_mels" / "valid.npz") as arrays:
        np.savez(
            tmp_path / "valid.npz",
            **{name: a if name == "genres" else a[::4] for name, a in arrays.items()},
        )
    model = load_model("gtzan")
    store = store_of_arrays(model, tmp_path / "valid.npz", "valid", tmp_path / "store")
    plain, filtered = neighbour_report(model, store, "valid", ks=(1,))["measures"]
    assert plain["n"] == 50 and plain["precision"] > plain["chance"] and filtered["filtered"]
    assert (
        plain["ceiling"] == 1 > filtered["ceiling"] and filtered["precision"] <= plain["precision"]
    )
