import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from musicgenre.audio.features import FeatureSpec, compute_features
from musicgenre.config import store_path
from musicgenre.datasets.base import Clip, Dataset
from musicgenre.errors import UserError
from musicgenre.evaluation import plots
from musicgenre.evaluation.report import Evaluation
from musicgenre.inference.spectrogram import feature_panel, mel_ticks
from musicgenre.runs.model import load_model
from musicgenre.store.store import Store
from musicgenre.studies import figures
from musicgenre.training.fit import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved, with their titles, by the name of the file."""
    found = {}
    monkeypatch.setattr(
        plots,
        "save",
        lambda figure, path, title, **kwargs: found.update(
            {Path(path).name: SimpleNamespace(axes=figure.axes, title=title)}
        ),
    )
    return found


def labels(axes):
    return [text.get_text() for text in axes.get_xticklabels()]


def heights(axes):
    return [bar.get_height() for bar in axes.patches]


def small_table(folder):
    """Three tags of four clips, not in the order of their frequency."""
    rows = ['"clip_id"\t"slow"\t"guitar"\t"no voice"\t"mp3_path"']
    for i, tags in enumerate(("1\t1\t0", "0\t1\t0", "1\t1\t0", "0\t0\t1")):
        rows.append(f"{i}\t{tags}\t{i}/artist-album-01-title-{i}-29.mp3")
    path = folder / "annotations_final.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_the_tags_of_a_table(tmp_path, drawn):
    paths = figures.table_figures(small_table(tmp_path), tmp_path / "out", top=2)
    assert paths == [tmp_path / "out" / "tags_all.png", tmp_path / "out" / "tags_top2.png"]
    assert labels(drawn["tags_all.png"].axes[0]) == ["guitar", "slow", "no voice"]
    assert heights(drawn["tags_all.png"].axes[0]) == [3, 2, 1]
    assert labels(drawn["tags_top2.png"].axes[0]) == ["guitar", "slow"]
    assert "4 clips, before any split" in drawn["tags_top2.png"].title
    with pytest.raises(UserError, match=r"nowhere\.csv: no such table"):
        figures.table_figures(tmp_path / "nowhere.csv", tmp_path)
    (tmp_path / "tags.csv").write_text("")
    with pytest.raises(UserError, match=r"tags\.csv: .*annotations_final\.csv.*data\.dataset=csv"):
        figures.table_figures(tmp_path / "tags.csv", tmp_path)


def test_the_tags_of_magnatagatune(real_data, tmp_path, drawn):
    """Figures 1 and 2 of the report. Its counts are those of the published table."""
    figures.table_figures(real_data / "mtat" / "annotations_final.csv.gz", tmp_path)
    every, top = drawn["tags_all.png"].axes[0], drawn["tags_top50.png"].axes[0]
    assert (len(heights(every)), len(heights(top))) == (188, 50)
    assert labels(top)[:3] == ["guitar", "classical", "slow"] and heights(top)[:3] == [
        4852,
        4272,
        3547,
    ]
    assert labels(top)[-1] == "choral" and heights(top)[-1] == 490
    assert heights(every) == sorted(heights(every), reverse=True) and heights(every)[
        :50
    ] == heights(top)


def dataset(task, clips, names=("x", "y", "z"), synthetic=False):
    made = tuple(Clip(f"{i}", Path("a"), own, split) for i, (split, own) in enumerate(clips))
    return Dataset("mine", Path("/"), "my split", task, names, made, synthetic=synthetic)


def test_clips_per_class_and_split(tmp_path, drawn):
    clips = [("train", ("z",)), ("train", ("x",)), ("train", ("z",)), ("test", ("y",))]
    assert figures.label_figures(dataset("single_label", clips, synthetic=True), tmp_path) == [
        tmp_path / "labels.png"
    ]
    axes = drawn["labels.png"].axes[0]
    # Classes stay in the order of the model's outputs; train is below test.
    assert labels(axes) == ["x", "y", "z"] and heights(axes) == [1, 0, 2, 0, 1, 0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "train, 3 clips",
        "test, 1 clip",
    ]
    assert (
        drawn["labels.png"].title
        == "SYNTHETIC · Clips per class and split · mine · my split · 4 clips"
    )


def test_tags_are_ordered_by_frequency(tmp_path, drawn):
    clips = [("train", ("y", "z")), ("valid", ("z",)), ("valid", ())]
    found = figures.label_figures(dataset("multi_label", clips), tmp_path, top=2)
    assert [path.name for path in found] == ["labels.png", "labels_top2.png"]
    assert labels(drawn["labels.png"].axes[0]) == ["z", "y", "x"]
    assert heights(drawn["labels.png"].axes[0]) == [1, 1, 0, 1, 0, 0]
    assert labels(drawn["labels_top2.png"].axes[0]) == ["z", "y"]
    assert figures.label_figures(dataset("regression", [("train", ())], ()), tmp_path) == []


@pytest.mark.parametrize("kind", ["logmel", "stft"])
def test_a_tone_appears_at_its_frequency(tmp_path, drawn, kind):
    spec = FeatureSpec(kind=kind, n_mels=64, hop_length=512)
    samples = np.zeros(3 * 22050)
    samples[22050:44100] = 0.5 * np.sin(2 * np.pi * 2000 * np.arange(22050) / 22050)
    soundfile.write(tmp_path / "tone.wav", samples, 22050)
    paths = figures.sound_figures(tmp_path / "tone.wav", spec, tmp_path)
    assert [path.name for path in paths] == ["spectrogram.png", "front_end.png"]
    axes = drawn["spectrogram.png"].axes[0]
    (image,) = axes.get_images()
    values = image.get_array()
    loudest = values.max(axis=1).argmax()
    ticks = dict(
        zip([text.get_text() for text in axes.get_yticklabels()], axes.get_yticks(), strict=True)
    )
    assert abs(ticks["2000"] - loudest) <= 0.6
    # It sounds from the first to the second second.
    frames = np.flatnonzero(values[loudest] > -20)
    left, right = image.get_extent()[:2]
    seconds = left + (frames + 0.5) * (right - left) / values.shape[1]
    assert abs(seconds[0] - 1) < 0.06 and abs(seconds[-1] - 2) < 0.06
    assert axes.get_ylabel() == "frequency (Hz)" and axes.get_xlabel() == "time (s)"
    assert drawn["spectrogram.png"].axes[1].get_ylabel() == "dB re the clip's maximum"
    names = [
        axes.get_title(loc="left")
        for axes in drawn["front_end.png"].axes
        if axes.get_title(loc="left")
    ]
    assert names == (
        ["waveform", "mel power", "mel spectrogram in dB"]
        if kind == "logmel"
        else ["waveform", "STFT, power in dB"]
    )
    assert (
        "tone.wav" in drawn["spectrogram.png"].title and "hop 512" in drawn["spectrogram.png"].title
    )


def test_ticks_of_mel_bands_by_hand():
    """Slaney's scale: 15 mels at 1000 Hz and log(6.4) / 27 for each above: 8000 Hz has 45.245."""
    spec = FeatureSpec(sample_rate=16000, n_mels=40)
    step = (15 + 27 * np.log(8) / np.log(6.4)) / 41
    expected = {
        15 / step - 1: "1000",
        (15 + 27 * np.log(2) / np.log(6.4)) / step - 1: "2000",
        7.5 / step - 1: "500",
    }
    ticks = mel_ticks(spec)
    for position, text in expected.items():
        near = min(ticks, key=lambda found: abs(found - position))
        assert ticks[near] == text and abs(near - position) < 0.02
    assert list(ticks.values()) == ["4000", "2000", "1000", "500", "250"]


def test_cepstra_and_waveforms_have_their_own_axes(tmp_path, drawn):
    samples = 0.3 * np.random.default_rng(0).standard_normal(22050).astype(np.float32)
    cepstrum = FeatureSpec(kind="mfcc", n_mfcc=13)
    panel = feature_panel(compute_features(samples, cepstrum), cepstrum)
    assert (
        panel.ylabel == "coefficient" and not panel.yticks and panel.limits[0] == -panel.limits[1]
    )
    # The zeroth coefficient, the loudness, does not take all the colours.
    assert np.abs(panel.values[:, 0]).min() > 2 * panel.limits[1]
    wave = FeatureSpec(kind="waveform", hop_length=256)
    panel = feature_panel(compute_features(samples, wave), wave)
    np.testing.assert_array_equal(panel.values, samples[: 22050 // 256 * 256])
    assert panel.seconds == 1 / 22050 and panel.start == 0
    soundfile.write(tmp_path / "a.wav", samples, 22050)
    assert [path.name for path in figures.sound_figures(tmp_path / "a.wav", wave, tmp_path)] == [
        "spectrogram.png"
    ]


@pytest.fixture
def run(small_config, tmp_path):
    train(small_config, tmp_path / "run", progress=False)
    return tmp_path / "run"


def test_the_figures_of_a_run(run, small_config, tmp_path, drawn):
    model, store = load_model(run), Store.open(store_path(small_config))
    paths = figures.run_figures(model, store, tmp_path / "out", "test", clip_id="test.4")
    names = [
        "learning_curves.png",
        "confusion.png",
        "architecture_conv1d.png",
        "labels.png",
        "clip.png",
    ]
    assert [path.name for path in paths] == names == list(drawn)
    assert (
        drawn["confusion.png"].title
        == "Confusion · arrays · files given · test · 9 clips · run, step 12"
    )
    texts = [text.get_text() for text in drawn["confusion.png"].axes[0].texts]
    assert sum(int(text.split("\n")[1]) for text in texts if text) == 9
    assert [line.get_xdata()[-1] for line in drawn["learning_curves.png"].axes[0].lines] == [
        12,
        12,
        12,
    ]
    assert heights(drawn["labels.png"].axes[0]) == [8, 8, 8, 3, 3, 3, 3, 3, 3]
    # test.4 is of the second class, whose bands 5 to 9 are loud.
    assert drawn["clip.png"].title.startswith("test.4 · true: middle · predicted: ")
    values = drawn["clip.png"].axes[0].get_images()[0].get_array()
    assert values.shape == (16, 64) and sorted(np.argsort(values.mean(axis=1))[-5:]) == [
        5,
        6,
        7,
        8,
        9,
    ]
    with pytest.raises(UserError, match=r"the split 'test' has no clip 'train\.0'"):
        figures.run_figures(model, store, tmp_path / "out", "test", clip_id="train.0")


def test_the_labels_of_a_tagged_clip_and_the_numbers_of_a_regression(tmp_path, drawn):
    def evaluation(task, scores, targets):
        clips = [str(i) for i in range(len(scores))]
        return Evaluation(
            "",
            "mine",
            "p",
            "test",
            task,
            ["x", "y", "z"],
            clips,
            clips,
            [None] * len(clips),
            np.array(scores),
            np.array(targets),
        )

    tags = evaluation("multi_label", [[0.9, 0.2, 0.8], [0.1, 0.7, 0.3]], [[1, 0, 1], [0, 0, 0]])
    assert figures._labels_text(tags, 0) == "true: x, z · most probable: x (90 %), z (80 %)"
    assert figures._labels_text(tags, 1) == "true: no tag · most probable: y (70 %)"
    assert figures._mistakes_figure(tags, tmp_path, "{} of mine") == tmp_path / "per_class.png"
    assert drawn["per_class.png"].title == "Per tag of mine"
    assert [text.get_text() for text in drawn["per_class.png"].axes[0].texts] == [
        "1.00",
        "n/a",
        "1.00",
    ]
    numbers = evaluation(
        "regression", [[0.5, 1.0, 2.0], [1.5, 3.0, -1.0]], [[0.5, 2.0, 1.0], [1.5, 3.0, -1.25]]
    )
    assert (
        figures._labels_text(numbers, 0)
        == "x 0.5 (predicted 0.5), y 2 (predicted 1), z 1 (predicted 2)"
    )
    figures._mistakes_figure(numbers, tmp_path, "{} of mine")
    assert drawn["per_class.png"].axes[0].get_title().startswith("r2 ")
    assert drawn["per_class.png"].axes[0].texts[0].get_text() == "1.00"


def script(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "figures.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def test_one_command_draws_all(run, tmp_path):
    table = small_table(tmp_path)
    done = script(f"--workdir={run}", "--split=test", f"--tags={table}", "--model=conv1d")
    assert done.returncode == 0, done.stderr
    assert "dense1" in done.stdout and "2,775,818 parameters" in done.stdout
    written = [Path(line) for line in done.stdout.splitlines() if line.endswith(".png")]
    assert sorted({path.name for path in written}) == sorted(
        path.name for path in (run / "figures").iterdir()
    )
    assert {path.name for path in written} >= {
        "confusion.png",
        "clip.png",
        "tags_all.png",
        "tags_top3.png",
    }
    assert all(path.stat().st_size > 5_000 for path in written)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to draw: give --workdir, --config, --clip, --tags or --model"),
        (["--model=conv1d", "--frames=20"], "needs at least 235 frames"),
    ],
)
def test_mistakes_are_one_clear_line(arguments, message, tmp_path):
    done = script(*arguments, f"--out={tmp_path}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message in done.stderr and not list(tmp_path.iterdir())
