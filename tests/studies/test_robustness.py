import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny_model import tiny_model

from musicgenre.audio.perturb_sound import sound_transforms
from musicgenre.errors import UserError
from musicgenre.evaluation.robustness import measure
from musicgenre.inference.windows import score_files
from musicgenre.runs.bundle import save_bundle
from musicgenre.runs.model import load_model
from musicgenre.runs.provenance import TrainedOn
from musicgenre.studies.evaluate import evaluate_model, store_of_arrays
from musicgenre.studies.robustness import array_windows, find_sounds, probe_arrays, probe_sounds

ROOT = Path(__file__).resolve().parents[2]
LABELS = ("low", "middle", "high")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "tiny.safetensors"
    save_bundle(tiny_model(labels=LABELS), path)
    return load_model(path)


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """Two files of each of two labels, one of them broken."""
    root = tmp_path_factory.mktemp("music")
    for number, name in enumerate(("low/a.wav", "low/album/b.flac", "middle/c.wav")):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * np.random.default_rng(number).standard_normal(22050 * 2), 22050)
    (root / "middle" / "broken.wav").write_bytes(b"RIFF")
    return root


def test_unchanged_sounds_get_the_scores_of_tagging(model, music):
    clips = find_sounds([music])
    assert [(clip.clip_id, clip.label, clip.group) for clip in clips] == [
        ("low/a.wav", "low", None),
        ("low/album/b.flac", "low", "low/album"),
        ("middle/broken.wav", "middle", None),
        ("middle/c.wav", "middle", None),
    ]
    tested = probe_sounds(model, clips, tries=2)
    assert tested.clip_ids == [
        "low/a.wav",
        "low/album/b.flac",
        "middle/c.wav",
    ] and tested.targets.tolist() == [0, 0, 1]
    assert [row["clip_id"] for row in tested.skipped] == [
        "middle/broken.wav"
    ] and "decoded" in tested.skipped[0]["reason"]
    expected = [
        p.probabilities
        for p in score_files(model, [clip.path for clip in clips])
        if p.probabilities is not None
    ]
    np.testing.assert_allclose(tested.before, expected, atol=1e-6)
    assert tested.equalised.shape == (2, 3, 3)
    outcomes = {outcome.name: outcome for outcome in tested.outcomes}
    assert len(outcomes) == len(sound_transforms(22050)[0]) == len(tested.outcomes)
    # The level does not change dB below the maximum; a filter does. The first tries are gentle.
    np.testing.assert_allclose(outcomes["level -20 dB"].scores, tested.before, atol=1e-3)
    assert np.abs(outcomes["nothing above 4000 Hz"].scores - tested.before).max() > 0.01
    np.testing.assert_allclose(
        tested.equalised[1], outcomes["gentle equaliser 2, ±3 dB"].scores, atol=1e-6
    )
    assert (
        tested.facts["clips"] == "3 sound files: low 2, middle 1" and tested.group_name == "folder"
    )
    again = probe_sounds(model, clips[:1], tries=2)
    for one, other in zip(tested.outcomes, again.outcomes, strict=True):
        np.testing.assert_allclose(other.scores[0], one.scores[0], atol=1e-6, err_msg=one.name)


def test_of_a_long_file_the_middle_is_taken(model, music, tmp_path):
    noise = 0.1 * np.random.default_rng(0).standard_normal(22050 * 6)
    soundfile.write(tmp_path / "long.wav", noise, 22050, subtype="FLOAT")
    soundfile.write(tmp_path / "middle.wav", noise[2 * 22050 : 4 * 22050], 22050, subtype="FLOAT")
    long, middle = find_sounds([tmp_path / "long.wav", tmp_path / "middle.wav"], labelled=False)
    found = probe_sounds(model, [long, middle], tries=0, seconds=2.0)
    np.testing.assert_allclose(found.before[0], found.before[1], atol=1e-6)
    assert (
        found.targets is None
        and found.equalised.shape == (0, 2, 3)
        and measure(found)["accuracy"] is None
    )


def test_labels_splits_and_gtzans_names(model, tmp_path):
    for name in ("train/low/a.wav", "test/low/b.wav", "test/classical/classical.00000.15s.flac"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    clips = find_sounds([tmp_path], split="test")
    assert [(clip.label, clip.group) for clip in clips] == [
        ("classical", "artist 9"),
        ("low", None),
    ]
    assert len(find_sounds([tmp_path])) == 3
    assert find_sounds([tmp_path / "test" / "low"])[0].label == "low"
    with pytest.raises(UserError, match=r"does not know the label 'classical'.*--nolabels"):
        probe_sounds(model, clips)
    with pytest.raises(UserError, match="gone: no such file or folder"):
        find_sounds([tmp_path / "gone"])
    with pytest.raises(UserError, match="no sound files in this folder for the split 'valid'"):
        find_sounds([tmp_path], split="valid")
    with pytest.raises(UserError, match=r"no clip can be used\. The first of 1: .*empty file"):
        probe_sounds(model, clips[1:])


def test_unchanged_arrays_get_the_scores_of_an_evaluation(model, small_arrays, tmp_path):
    file = small_arrays / "valid.npz"
    tested = probe_arrays(model, file, tries=3)
    expected = evaluate_model(
        model, store_of_arrays(model, file, "valid", tmp_path / "store"), "valid"
    )
    assert tested.clip_ids == list(expected.clip_ids)
    np.testing.assert_allclose(tested.before, expected.scores, atol=1e-6)
    np.testing.assert_array_equal(tested.targets, expected.targets)
    outcomes = {outcome.name: outcome for outcome in tested.outcomes}
    np.testing.assert_allclose(outcomes["level +6 dB"].scores, tested.before, atol=1e-3)
    assert np.abs(outcomes["nothing below 300 Hz"].scores - tested.before).max() > 0.01
    np.testing.assert_allclose(
        tested.equalised[2], outcomes["gentle equaliser 3, ±3 dB"].scores, atol=1e-6
    )
    assert (
        tested.equalised.shape == (3, 9, 3)
        and "9 spectrograms of valid.npz: low 3" in tested.facts["clips"]
    )


def test_a_clip_that_is_no_number_is_skipped(model, small_arrays, tmp_path):
    with np.load(small_arrays / "valid.npz") as file:
        fields = dict(file)
    fields["spectrogram"][4, 3, 3] = np.nan
    np.savez(tmp_path / "some.npz", **fields)
    tested = probe_arrays(model, tmp_path / "some.npz", tries=0)
    assert len(tested.clip_ids) == 8 and [row["clip_id"] for row in tested.skipped] == ["valid.4"]


def test_crops_are_those_of_an_evaluation():
    model = tiny_model(data__frames=100, data__crop_frames=64, data__eval_chunks=3)
    db = np.repeat(np.arange(82.0)[:, None], 16, axis=1)
    inputs, weights = array_windows(db, model)
    assert weights.tolist() == [1, 1, 1]
    assert inputs.shape == (3, 64, 16) and inputs[:, 0, 0].tolist() == [
        0,
        9,
        18,
    ]  # the last ends with the clip


def test_models_and_files_that_do_not_fit(model, small_arrays):
    file = small_arrays / "valid.npz"
    with pytest.raises(
        UserError, match=r"valid\.0: the model does not know the label 'low'\. Did you mean 'lo'"
    ):
        probe_arrays(dataclasses.replace(model, label_names=("lo", "middle", "high")), file)
    with pytest.raises(UserError, match="16 bands, but the model was trained on 20"):
        probe_arrays(
            dataclasses.replace(model, features=dataclasses.replace(model.features, n_mels=20)),
            file,
        )
    with pytest.raises(UserError, match="a regression makes no decisions"):
        probe_arrays(dataclasses.replace(model, task="regression"), file)
    with pytest.raises(UserError, match=r"holds log-mels in dB.*--audio"):
        probe_arrays(
            dataclasses.replace(model, features=dataclasses.replace(model.features, kind="stft")),
            file,
        )


def test_a_model_of_tags_needs_no_labels(model, music):
    tags = dataclasses.replace(model, task="multi_label")
    tested = probe_sounds(tags, find_sounds([music / "low"]), tries=1)
    assert (
        tested.targets is None
        and "without labels" in tested.facts["clips"]
        and len(tested.clip_ids) == 2
    )


def test_a_run_reports_which_clips_it_was_trained_on(model, music):
    clips = find_sounds([music])[:2]
    trained_on = TrainedOn(["low/a.wav", "other"], ["", ""], [None, None])
    run = dataclasses.replace(model, trained_on=trained_on)
    assert probe_sounds(run, clips, tries=0).notes[0].startswith("By their names, 1 of these 2 ")
    assert (
        "training clips of the model are not known" in probe_sounds(model, clips, tries=0).notes[0]
    )


def test_the_command(model, small_arrays, tmp_path):
    with np.load(small_arrays / "valid.npz") as file:
        fields = {name: values[:3] if name != "genres" else values for name, values in file.items()}
    fields["spectrogram"][1, 3, 3] = np.inf
    np.savez(tmp_path / "some.npz", **fields)
    flags = [
        f"--workdir={model.workdir}",
        f"--arrays={tmp_path}/some.npz",
        f"--out={tmp_path}/out",
        "--noprogress",
        "--tries=1",
    ]
    script = str(ROOT / "experiments" / "robustness.py")
    done = subprocess.run(
        [sys.executable, script, *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert (
        "valid.1 has values that are not finite" in done.stderr and "Traceback" not in done.stderr
    )
    assert "keep their decision" in done.stdout and "not made: polarity" in done.stdout
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"robustness.md", "robustness.json", "robustness.png", "report.html"}
    assert (
        "experiments/robustness.py --workdir=" in (tmp_path / "out" / "robustness.md").read_text()
    )
