import csv
import dataclasses
import json

import numpy as np
import pytest

from musicgenre.errors import UserError
from musicgenre.evaluation import audit as module
from musicgenre.evaluation.audit import NEAR_IDENTICAL, AuditSide, audit, fingerprint_spectrogram

FRAMES, BANDS = 387, 128


def music(seed, frames=FRAMES):
    """A synthetic log-mel in dB: notes that come and go in a few bands, over noise."""
    generator = np.random.default_rng(seed)
    spectrogram = generator.normal(-60, 3, (frames, BANDS))
    for _ in range(60):
        start, length = generator.integers(frames), generator.integers(8, 50)
        band, width = generator.integers(BANDS), generator.integers(2, 12)
        spectrogram[start : start + length, band : band + width] += generator.uniform(15, 45)
    return spectrogram


def disguised(spectrogram, shift):
    """The same recording 6 dB softer, with a tilt of 8 dB, noise, and a later start."""
    generator = np.random.default_rng(99)
    moved = np.concatenate([spectrogram[shift:], spectrogram[:shift][::-1]])
    return (
        moved - 6 + np.linspace(-4, 4, spectrogram.shape[1]) + generator.normal(0, 1.5, moved.shape)
    )


def side(*clips, prefix, groups=None):
    """A side of synthetic clips, every id, hash and artist different."""
    ids = [f"{prefix}{i}" for i in range(len(clips))]
    return AuditSide(
        ids,
        [f"hash {i}" for i in ids],
        groups or [f"artist {i}" for i in ids],
        np.stack([fingerprint_spectrogram(clip) for clip in clips]),
    )


def test_unrelated_clips_pass():
    result = audit(
        side(*map(music, range(20)), prefix="e"), side(*map(music, range(20, 60)), prefix="t")
    )
    assert result.clean
    assert result.findings == ()
    assert result.closest < NEAR_IDENTICAL - 0.1
    assert result.summary()[0] == "no leak found: 20 evaluated clips against 40 trained on"


@pytest.mark.parametrize("shift", [0, 3, 8, 16])
@pytest.mark.parametrize("copy_is_trained_on", [True, False])
def test_finds_a_softer_shifted_copy(shift, copy_is_trained_on):
    one = [music(i) for i in range(10)]
    other = [*(music(i) for i in range(10, 20)), disguised(one[4], shift)]
    sides = [side(*one, prefix="a"), side(*other, prefix="b")]
    result = audit(*(sides if copy_is_trained_on else sides[::-1]))
    assert [(f.kind, f.severity, f.pairs, f.clips) for f in result.findings] == [
        ("near-identical", "same recording", 1, 1)
    ]
    pair = result.findings[0].examples[0]
    assert {pair.evaluated, pair.trained} == {"a4", "b10"}
    assert result.closest > 0.8
    assert not result.clean


def test_gain_and_equalisation_do_not_change_the_fingerprint():
    spectrogram = music(0)
    expected = fingerprint_spectrogram(spectrogram)
    changed = fingerprint_spectrogram(spectrogram + np.linspace(-20, 5, BANDS))
    np.testing.assert_allclose(changed, expected, atol=2e-4)
    assert expected.dtype == np.float32
    assert np.linalg.norm(expected) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (647, 20), (2000, 229)])
def test_fingerprints_of_any_size(shape):
    spectrogram = np.random.default_rng(0).normal(-40, 10, shape)
    fingerprint = fingerprint_spectrogram(spectrogram)
    assert fingerprint.shape == (2048,)
    assert np.isfinite(fingerprint).all()


def test_padding_is_ignored():
    spectrogram = music(0, frames=80)
    padded = np.concatenate([spectrogram, np.full((300, BANDS), -80.0)])
    np.testing.assert_array_equal(
        fingerprint_spectrogram(padded), fingerprint_spectrogram(spectrogram[:80])
    )


def test_silence_matches_nothing():
    silence = np.full((FRAMES, BANDS), -80.0)
    assert not fingerprint_spectrogram(silence).any()
    assert audit(side(silence, prefix="e"), side(silence, prefix="t")).clean


def test_a_pair_is_reported_once_under_its_strongest_type():
    clips = [music(i) for i in range(4)]
    evaluated = side(*clips, prefix="e")
    trained = dataclasses.replace(
        side(*clips[:3], music(9), prefix="t"),
        clip_ids=["e0", "t1", "t2", "t3"],
        content_hashes=["hash e0", "hash e1", "other", None],
        groups=["artist e0", "artist e1", "artist e2", "artist e3"],
    )
    result = audit(evaluated, trained)
    assert {f.kind: [(p.evaluated, p.trained) for p in f.examples] for f in result.findings} == {
        "same clip": [("e0", "e0")],
        "same content": [("e1", "t1")],
        "near-identical": [("e2", "t2")],
        "same artist": [("e3", "t3")],
    }
    assert result.without_hash == 1


def test_counts_are_exact_where_examples_are_not(monkeypatch):
    evaluated = AuditSide([f"e{i}" for i in range(30)], [""] * 30, ["x"] * 20 + [None] * 10)
    trained = AuditSide([f"t{i}" for i in range(5)], [None] * 5, ["x", "x", "x", "y", None])
    monkeypatch.setattr(module, "MAX_EXAMPLES", 4)
    result = audit(evaluated, trained, group_name="track")
    (finding,) = result.findings
    counts = (finding.pairs, finding.clips, len(finding.examples))
    assert finding.kind == "same track" and counts == (60, 20, 4)
    assert finding.examples[0].detail == "track x, 3 training clips"
    assert result.summary() == [
        "LEAK: 30 evaluated clips against 5 trained on",
        "same track: 20 of 30 evaluated clips (60 pairs)",
        "spectrograms not compared: no fingerprints",
        "content not compared for 35 clips without a hash",
        "track unknown for 10 of 30 evaluated clips",
        "track unknown for 1 of 5 training clips",
    ]
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["clean"] is False


def test_blocks_do_not_change_the_result(monkeypatch):
    one, other = (
        side(*map(music, range(7)), prefix="e"),
        side(*map(music, range(5, 12)), prefix="t"),
    )
    expected = audit(one, other)
    monkeypatch.setattr(module, "_PAIRS_PER_BLOCK", 14)
    assert audit(one, other).findings == expected.findings
    assert expected.findings[0].pairs == 2


def test_refusals():
    with pytest.raises(UserError, match=r"\[frames, bands\]"):
        fingerprint_spectrogram(np.zeros(5))
    with pytest.raises(UserError, match="NaN"):
        fingerprint_spectrogram(np.full((5, 5), np.nan))
    with pytest.raises(UserError, match="1 clip ids but 2 groups"):
        AuditSide(["a"], ["h"], [None, None])
    with pytest.raises(UserError, match=r"must have the shape \(1, 2048\), not \(1, 5\)"):
        AuditSide(["b"], ["i"], [None], np.zeros((1, 5), np.float32))


def test_real_clips_and_their_copies(real_data):
    with open(real_data / "gtzan_splits" / "artist_groups.csv", encoding="utf-8") as handle:
        artists = {row["clip_id"]: row["artist_group"] for row in csv.DictReader(handle)}
    sides, clips = {}, {}
    for split in ("train", "valid"):
        arrays = np.load(real_data / "gtzan_mels" / f"{split}.npz")
        floor = arrays["db_min"][:, None, None]
        decibel = floor * (1 - (arrays["spectrogram"].astype(np.float32) + 0.5) / 256)
        clips[split] = decibel.transpose(0, 2, 1)
        ids = [str(clip) for clip in arrays["clip_id"]]
        sides[split] = AuditSide(
            ids,
            ids,
            [artists.get(clip) for clip in ids],
            np.stack([fingerprint_spectrogram(clip) for clip in clips[split]]),
        )
    result = audit(sides["valid"], sides["train"])
    # The fault-filtered lists share no artist and no replica.
    assert result.clean
    assert result.closest < 0.5
    assert (result.unknown_groups, result.unknown_groups_trained) == (4, 32)
    copies = np.stack([fingerprint_spectrogram(disguised(clip, 4)) for clip in clips["valid"]])
    names = [f"copy of {clip}" for clip in sides["valid"].clip_ids]
    (finding,) = audit(
        sides["valid"], AuditSide(names, names, [None] * len(names), copies)
    ).findings
    assert (finding.pairs, finding.clips) == (197, 197)
    assert all(pair.trained == f"copy of {pair.evaluated}" for pair in finding.examples)


def test_unknown_training_clips_never_pass_as_no_leak():
    few = AuditSide(["a", "b"], ["1", "2"], ["x", None])
    nothing = audit(few, AuditSide([], [], []), unknown="m.safetensors does not list them")
    assert nothing.summary() == [
        "training clips unknown: m.safetensors does not list them; leakage cannot be ruled out"
    ]
    assert not nothing.clean and not nothing.findings and nothing.to_dict()["clean"] is False
    some = audit(
        few, AuditSide(["c"], ["3"], ["y"]), unknown="its source does not list them"
    ).summary()
    assert (
        some[1] == "nothing found among the training clips that are known: "
        "2 evaluated clips against 1 trained on"
    )
    leak = audit(
        few, AuditSide(["c"], ["2"], ["y"]), unknown="its source does not list them"
    ).summary()
    assert leak[0] == "LEAK: 2 evaluated clips against 1 trained on" and leak[1].startswith(
        "training clips unknown"
    )
    assert leak[2] == "same content: 1 of 2 evaluated clips (1 pair)"
    assert not any("no leak" in line for line in (*nothing.summary(), *some, *leak))
