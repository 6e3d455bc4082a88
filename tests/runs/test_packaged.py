"""The weights that come with the package."""

import jax
import numpy as np
import pytest

from musicgenre import Tagger
from musicgenre.datasets.arrays import open_array_file
from musicgenre.datasets.gtzan import GENRES
from musicgenre.runs.bundle import packaged_models
from musicgenre.runs.model import load_model
from musicgenre.runs.provenance import clips_of, compact
from musicgenre.studies.evaluate import store_of_arrays
from musicgenre.training.step import make_score_step


def test_the_card_of_the_packaged_model_states_data_and_results():
    model = load_model("gtzan")
    assert "gtzan" in packaged_models() and model.workdir.stat().st_size < 6.5e6
    assert model.label_names == GENRES and (model.frames, model.features.hop_length) == (387, 1710)
    facts = (
        "442 clips",
        "197 clips",
        "64.0 %",
        "65.3 % ± 1.2",
        "Temperature: 0.5052",
        "has not been evaluated",
    )
    for words in (*facts, ", ".join(GENRES)):
        assert words in model.card.replace("\n", " ")


def test_the_packaged_model_lists_its_training_clips(real_data, tmp_path):
    """Ids, hashes, groups and fingerprints are those of a store of the arrays."""
    model = load_model("gtzan")
    listed = model.trained_on
    assert (len(listed), listed.unknown, listed.fingerprints.shape) == (442, "", (442, 2048))
    store = store_of_arrays(model, real_data / "gtzan_mels" / "train.npz", "train", tmp_path / "s")
    expected = clips_of(store, store.indices("train")).with_fingerprints()
    assert (listed.clip_ids, listed.hashes) == (expected.clip_ids, expected.hashes)
    assert listed.groups == expected.groups
    difference = listed.fingerprints.astype(int) - compact(expected.fingerprints)
    assert np.abs(difference).max() <= 1  # another machine may round a value up


def test_its_accuracy_matches_its_card(real_data):
    """126 of the 197 clips of the valid list; another machine's rounding may turn a clip or two."""
    model = load_model("gtzan")
    file = open_array_file(real_data / "gtzan_mels" / "valid.npz")
    score = jax.jit(make_score_step(model.module, model.task))
    right = 0
    for start in range(0, len(file.clip_ids), 16):
        rows = range(start, min(start + 16, len(file.clip_ids)))
        x = np.stack([file.spectrogram(row) for row in rows]).astype(np.float16)
        chosen = np.asarray(score(model.model, x)).argmax(axis=1)
        right += sum(
            model.label_names[c] == file.labels[row] for c, row in zip(chosen, rows, strict=True)
        )
    assert abs(right - 126) <= 2


def test_the_packaged_model_tags_audio(real_data):
    [tag, *_] = Tagger.load("gtzan").tag(real_data / "gtzan_audio" / "metal" / "metal.00000.au")
    assert tag.label == "metal" and tag.probability == pytest.approx(0.949, abs=0.02)
