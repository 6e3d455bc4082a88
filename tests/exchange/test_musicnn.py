import json
import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tf_writer as tf

from musicgenre import models
from musicgenre.audio.decode import load_audio
from musicgenre.audio.features import FeatureSpec, compute_features, mel_power
from musicgenre.cli.main import main
from musicgenre.errors import UserError
from musicgenre.exchange import musicnn as musicnn_import
from musicgenre.exchange.musicnn import Source, available, import_models, read_model
from musicgenre.inference.tagger import Tagger
from musicgenre.inference.windows import score_files
from musicgenre.runs.model import load_model

CONFIGURATION = """# Setup
SR = 16000
FFT_HOP = 256
FFT_SIZE = 512
N_MELS = 64
BATCH_SIZE = 1  # (size of the batch)
open({marker!r}, "w").write("this file was run")
MTT_LABELS = ['guitar', 'no vocals', 'slow']
MSD_LABELS = ['rock','00s', "Hip-Hop", 'sad']
"""
WORDS = CONFIGURATION.format(marker="marker")
SETTINGS = {"n_frames": 66, "xInput": 66, "yInput": 64, "pre_processing": "logC"}
LABELS = {"MTT": ("guitar", "no vocals", "slow"), "MSD": ("rock", "00s", "Hip-Hop", "sad")}
SIZES = {
    "timbral_filters": 3,
    "temporal_filters": 2,
    "temporal_widths": (6, 4, 3),
    "mid_filters": 4,
    "dense": 5,
}
# The name of each layer here, by the original's name of its variables.
MUSICNN = {
    "conv2d": "timbral1",
    "conv2d_1": "timbral2",
    "conv2d_2": "temporal1",
    "conv2d_3": "temporal2",
    "conv2d_4": "temporal3",
    "conv2d_5": "mid1",
    "conv2d_6": "mid2",
    "conv2d_7": "mid3",
    "dense": "dense1",
    "dense_1": "head",
    "batch_normalization": "input_norm",
    "batch_normalization_1": "timbral1_norm",
    "batch_normalization_2": "timbral2_norm",
    "batch_normalization_3": "temporal1_norm",
    "batch_normalization_4": "temporal2_norm",
    "batch_normalization_5": "temporal3_norm",
    "batch_normalization_6": "mid1_norm",
    "batch_normalization_7": "mid2_norm",
    "batch_normalization_8": "mid3_norm",
    "batch_normalization_9": "pool_norm",
    "batch_normalization_10": "dense1_norm",
}
VGG = {
    "1CNN": "conv1",
    "2CNN": "conv2",
    "3CNN": "conv3",
    "4CNN": "conv4",
    "5CNN": "conv5",
    "dense": "head",
    "batch_normalization": "input_norm",
    "batch_normalization_1": "conv1_norm",
    "batch_normalization_2": "conv2_norm",
    "batch_normalization_3": "conv3_norm",
    "batch_normalization_4": "conv4_norm",
    "batch_normalization_5": "conv5_norm",
}


def network(name):
    """A small network of one of the original's two architectures, with random variables."""
    fields = {"name": "vgg", "filters": 2} if name.endswith("vgg") else {"name": "musicnn", **SIZES}
    module = models.build(fields, num_classes=len(LABELS[name[:3]]), frames=66, bands=64)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 66, 64))))
    generator = np.random.default_rng(len(name) + ord(name[1]))
    variables = jax.tree.map(
        lambda leaf: generator.uniform(0.1, 0.4, leaf.shape).astype(np.float32), dict(shapes)
    )
    variables.pop("intermediates", None)
    return module, variables


def original(name, variables):
    """The variables under the original's names and in its shapes, as a checkpoint has them."""
    found = {"beta1_power": np.float32(0), "beta2_power": np.float32(0)}
    for theirs, ours in (VGG if name.endswith("vgg") else MUSICNN).items():
        params = variables["params"][ours]
        if ours.endswith("_norm"):
            stats = variables["batch_stats"][ours]
            leaves = {"gamma": params["scale"], "beta": params["bias"]}
            found |= {
                f"{theirs}/moving_mean": stats["mean"],
                f"{theirs}/moving_variance": stats["var"],
            }
        else:
            kernel = params["kernel"]
            leaves = {
                "kernel": kernel[:, :, None] if ours.startswith("mid") else kernel,
                "bias": params["bias"],
            }
        for leaf, value in leaves.items():
            found |= {
                f"{theirs}/{leaf}": value,
                f"{theirs}/{leaf}/Adam": value * 0,
                f"{theirs}/{leaf}/Adam_1": value * 0,
            }
    return found


def make_package(
    root,
    names=("MTT_musicnn", "MSD_musicnn", "MTT_vgg", "MSD_vgg"),
    change=lambda name, variables: None,
):
    """Writes `<root>/musicnn` and its licence; returns the package's folder."""
    package = root / "musicnn"
    for name in names:
        variables = original(name, network(name)[1])
        change(name, variables)
        tf.write_checkpoint(package / name, variables, per_block=20)
        (package / name / "config.json").write_text(json.dumps(SETTINGS))
    (package / "configuration.py").write_text(CONFIGURATION.format(marker=str(root / "marker")))
    (package / "MTT_vgg").mkdir(exist_ok=True)
    (package / "MTT_vgg" / "experiment.result").write_text(
        "Experiment: ['x']\nAUC: 0.90302\nAUC: 0.38226"
    )
    notes = root / "musicnn-0.1.0.dist-info"
    notes.mkdir()
    (notes / "LICENSE.md").write_text(
        "Copyright of the weights' makers. Permission to use, copy ...\n"
    )
    return package


def make_wheel(package, path):
    with zipfile.ZipFile(path, "w") as archive:
        for folder in (package, package.parent / "musicnn-0.1.0.dist-info"):
            for file in sorted(folder.rglob("*")):
                archive.write(file, file.relative_to(package.parent))
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return make_package(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def wheel(package):
    return make_wheel(package, package.parent / "musicnn-0.1.0-py3-none-any.whl")


@pytest.mark.parametrize("name", ["MTT_musicnn", "MSD_musicnn", "MTT_vgg", "MSD_vgg"])
def test_an_imported_model_has_the_originals_weights_and_front_end(wheel, tmp_path, name):
    (path,) = import_models(Source(wheel), [name], tmp_path)
    assert path == tmp_path / f"{name}.safetensors"
    model = load_model(path)
    module, variables = network(name)
    x = np.random.default_rng(0).standard_normal((2, 66, 64), np.float32)
    apply = jax.jit(models.apply_model, static_argnums=0)
    for ours, expected in zip(
        apply(model.module, model.model["variables"], x), apply(module, variables, x), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)
    jax.tree.map(np.testing.assert_array_equal, model.model["variables"], variables)
    # The network gets the features as they are.
    np.testing.assert_array_equal(model.model["norm"]["mean"], np.zeros((1, 64)))
    np.testing.assert_array_equal(model.model["norm"]["std"], np.ones((1, 64)))
    assert model.label_names == LABELS[name[:3]] and model.task == "multi_label"
    assert model.features == FeatureSpec(
        sample_rate=16000,
        n_fft=512,
        hop_length=256,
        n_mels=64,
        compression="log10000",
        resampler="kaiser_best",
    )
    assert (model.frames, model.layout.frames, model.config.model.name) == (
        66,
        66,
        name.split("_")[1],
    )
    assert model.dataset["name"] == {"MTT": "mtat", "MSD": "msd"}[name[:3]]
    assert "Permission to use, copy" in model.card and "- Licence: ISC" in model.card
    assert ("ROC-AUC 0.9030, PR-AUC 0.3823" in model.card) == (name == "MTT_vgg")
    assert not (wheel.parent / "marker").exists(), "configuration.py was run"


def test_a_wheel_and_an_unpacked_package_give_the_same_models(package, wheel, tmp_path):
    (tmp_path / "downloaded").mkdir()
    (tmp_path / "downloaded" / wheel.name).write_bytes(wheel.read_bytes())
    sources = [Source(path) for path in (package, package.parent, wheel, tmp_path / "downloaded")]
    for source in sources:
        assert available(source) == ["MTT_musicnn", "MSD_musicnn", "MTT_vgg", "MSD_vgg"]
        model = read_model(source, "MTT_vgg")
        jax.tree.map(np.testing.assert_array_equal, model.model["variables"], network("MTT_vgg")[1])
        assert source.notice().startswith("Copyright of the weights")
    (package.parent / "musicnn-0.1.0.dist-info" / "LICENSE.md").rename(tmp_path / "LICENSE.md")
    assert "Universitat Pompeu Fabra" in Source(package).notice()
    (tmp_path / "LICENSE.md").rename(package.parent / "musicnn-0.1.0.dist-info" / "LICENSE.md")


def test_the_command(wheel, tmp_path, capsys):
    assert main(["import-musicnn", str(wheel), "--out", str(tmp_path / "all")]) == 0
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == [
        f"{name}.safetensors" for name in ("MSD_musicnn", "MSD_vgg", "MTT_musicnn", "MTT_vgg")
    ]
    assert capsys.readouterr().out.count(".safetensors: 0.0") == 4
    assert (
        main(["import-musicnn", str(wheel), "--out", str(tmp_path / "one"), "--models", "MTT_vgg"])
        == 0
    )
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["MTT_vgg.safetensors"]
    capsys.readouterr()
    assert (
        main(["import-musicnn", str(wheel), "--out", str(tmp_path / "none"), "--models", "MTT_vg"])
        == 2
    )
    assert "'MTT_vg' is not a model of musicnn. Did you mean 'MTT_vgg'?" in capsys.readouterr().err
    assert main(["import-musicnn", str(tmp_path / "absent.whl")]) == 2
    assert "no such file or folder. Fetch it with: pip download" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_absent_models_are_named(tmp_path, capsys):
    package = make_package(tmp_path / "site", names=("MSD_vgg",))
    assert main(["import-musicnn", str(package), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert [
        name for name in ("MTT_musicnn", "MSD_musicnn", "MTT_vgg") if f"holds no {name}." in out
    ] == ["MTT_musicnn", "MSD_musicnn", "MTT_vgg"]
    with pytest.raises(UserError, match=r"MTT_musicnn/config.json: no such file"):
        read_model(Source(package), "MTT_musicnn")


def change(key, value):
    def apply(name, variables):
        if value is None:
            del variables[key]
        else:
            variables[key] = value

    return apply


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("3CNN/bias", None, "MTT_vgg: the variable '3CNN/bias' is missing"),
        ("1CNN/kernel", None, "MTT_vgg: no kernel '1CNN/kernel' of 4 axes"),
        ("6CNN/bias", np.zeros(2, np.float32), "this network has no variable '6CNN/bias'"),
        (
            "2CNN/kernel",
            np.zeros((3, 3, 2, 3), np.float32),
            r"'2CNN/kernel' has the shape \[3, 3, 2, 3\] where .* \[3, 3, 2, 2\]",
        ),
        (
            "dense/kernel",
            np.zeros((2, 50), np.float32),
            r"'dense/kernel' has the shape \[2, 50\] where this network has \[2, 3\]",
        ),
        (
            "5CNN/bias",
            np.array([0, np.nan], np.float32),
            "the variable '5CNN/bias' holds non-finite values",
        ),
    ],
)
def test_weights_of_another_network(tmp_path, key, value, message):
    package = make_package(tmp_path / "site", names=("MTT_vgg",), change=change(key, value))
    with pytest.raises(UserError, match=message):
        read_model(Source(package), "MTT_vgg")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("configuration.py", "SR = 16000\nFFT_HOP =", "configuration.py is not Python"),
        (
            "configuration.py",
            "SR = 16000",
            "configuration.py: FFT_HOP must be a positive number, not None",
        ),
        (
            "configuration.py",
            WORDS.replace("16000", "True"),
            "configuration.py: SR must be a positive number, not True",
        ),
        ("configuration.py", WORDS.replace("'slow'", "'guitar'"), "MTT_LABELS holds a label twice"),
        (
            "configuration.py",
            WORDS.replace("['rock'", "list(range(3)) + ['rock'"),
            "MSD_LABELS must be a list of labels",
        ),
        ("MTT_vgg/config.json", "{", "MTT_vgg/config.json is not JSON"),
        ("MTT_vgg/config.json", "[]", "n_frames must be a positive number, not None"),
        (
            "MTT_vgg/config.json",
            json.dumps(SETTINGS | {"n_frames": 0}),
            "n_frames must be a positive number, not 0",
        ),
        (
            "MTT_vgg/config.json",
            json.dumps(SETTINGS | {"n_frames": 40}),
            "needs at least 66 frames, but its input is 40",
        ),
        (
            "MTT_vgg/config.json",
            json.dumps(SETTINGS | {"n_frames": 187}),
            r"'dense/kernel' has the shape \[2, 3\] where .*\[4, 3\]",
        ),
        (
            "MTT_vgg/config.json",
            json.dumps(SETTINGS | {"pre_processing": "dB"}),
            "pre_processing must be 'logC', not 'dB'",
        ),
        ("MTT_vgg/.index", "", "MTT_vgg/.index: not the index of a TensorFlow checkpoint"),
        ("MTT_vgg/.data-00000-of-00001", "", "ends at byte .* of 0"),
    ],
)
def test_damaged_files(tmp_path, file, content, message):
    package = make_package(tmp_path / "site", names=("MTT_vgg",))
    (package / file).write_text(content)
    with pytest.raises(UserError, match=message):
        read_model(Source(package), "MTT_vgg")


def test_other_files_and_damaged_wheels_are_refused(package, wheel, tmp_path, monkeypatch):
    (tmp_path / "text.whl").write_text("no archive")
    with pytest.raises(UserError, match=r"text.whl: not a wheel \(File is not a zip file\)"):
        Source(tmp_path / "text.whl")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(UserError, match=r"other.whl: holds no musicnn/configuration.py"):
        Source(tmp_path / "other.whl")
    with pytest.raises(UserError, match=r"holds no musicnn/configuration.py, and 0 wheels"):
        Source(tmp_path)
    for version in ("0.1.0", "0.1.1"):
        (tmp_path / f"musicnn-{version}.whl").write_bytes(b"")
    with pytest.raises(UserError, match="and 2 wheels"):
        Source(tmp_path)
    with zipfile.ZipFile(tmp_path / "bare.whl", "w") as archive:
        archive.writestr("musicnn/configuration.py", "")
    with pytest.raises(UserError, match="holds none of the models MTT_musicnn"):
        available(Source(tmp_path / "bare.whl"))
    damaged = bytearray(wheel.read_bytes())
    data = (package / "MTT_vgg" / ".data-00000-of-00001").read_bytes()
    damaged[damaged.index(data) + 10] ^= 1
    (tmp_path / "damaged.whl").write_bytes(damaged)
    with pytest.raises(
        UserError, match=r"musicnn/MTT_vgg/.data-00000-of-00001: cannot be read \(Bad CRC-32"
    ):
        read_model(Source(tmp_path / "damaged.whl"), "MTT_vgg")
    monkeypatch.setattr(musicnn_import, "_LARGEST", 400)
    with pytest.raises(UserError, match=r"MTT_vgg.*: more than 400 bytes"):
        read_model(Source(wheel), "MTT_vgg")
    with pytest.raises(UserError, match=r"MTT_vgg.*: more than 400 bytes"):
        read_model(Source(package), "MTT_vgg")


def test_member_names_cannot_escape_the_output_folder(wheel, tmp_path):
    """A member outside the package is never written; two members of one name are refused."""
    evil = tmp_path / "deep" / "evil.whl"
    evil.parent.mkdir()
    evil.write_bytes(wheel.read_bytes())
    with zipfile.ZipFile(evil, "a") as archive:
        archive.writestr("../../escaped.txt", "x")
        archive.writestr("musicnn/../../escaped.txt", "x")
    list(import_models(Source(evil), ["MTT_vgg"], tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "MTT_vgg.safetensors",
        "evil.whl",
    ]
    with zipfile.ZipFile(evil, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("musicnn/configuration.py", "")
    with pytest.raises(UserError, match="two of its members have the same name"):
        Source(evil)


JORAM = "joram-moments_of_clarity-08-solipsism-59-88"
CLIPS = {
    JORAM: f"mtat/{JORAM}.mp3",
    "blues.00000": "gtzan_audio/blues/blues.00000.au",
    "classical.00000": "gtzan_audio/classical/classical.00000.au",
    "metal.00000": "gtzan_audio/metal/metal.00000.au",
}


@pytest.fixture(scope="module")
def published():
    """The wheel that people download, where the environment says where it is."""
    path = os.environ.get("MUSICGENRE_MUSICNN_WHEEL", "")
    if not path:
        pytest.skip("MUSICGENRE_MUSICNN_WHEEL does not name the wheel of musicnn 0.1.0")
    return Source(path)


def windows(features, frames=187):
    """Windows without overlap; what is left over at the end is dropped, as in the original."""
    count = len(features) // frames
    return features[: count * frames].reshape(count, frames, -1)


def top(scores, number=5):
    return set(np.argsort(-scores.mean(axis=0))[:number].tolist())


@pytest.mark.parametrize("name", ["MTT_musicnn", "MSD_musicnn", "MTT_vgg"])
def test_the_published_weights_give_the_originals_scores(real_data, published, name):
    """Taggram and features that the original computed on four clips.

    With its rounding of the power to float16 they are equal up to rounding errors, unless the clip
    was resampled. Without it, as in this front end, and with float16 features, as a file is tagged,
    they differ by a few 1e-4.
    """
    model = read_model(published, name)
    spec = model.features
    assert spec.describe() == (
        "logmel 96 bands, 16000 Hz by kaiser_best, n_fft 512, hop 256, 0-8000 Hz, "
        "log10(10000 x + 1) of the power"
    )
    apply = jax.jit(models.apply_model, static_argnums=0)

    def compare(clip, x, reference, features):
        logits, embedding = apply(
            model.module, model.model["variables"], jnp.pad(x, ((0, 10 - len(x)), (0, 0), (0, 0)))
        )
        scores = np.asarray(jax.nn.sigmoid(logits))[: len(x)]
        if "pool5" in reference:
            distance = np.abs(
                np.asarray(embedding)[: len(x)].reshape(-1, 128) - reference["pool5"]
            ).max()
        else:
            # All rows of the file are the first window's, a slip of the original.
            distance = np.abs(np.asarray(embedding)[0] - reference["penultimate"][0]).max()
        difference = np.abs(scores - reference["taggram"])
        print(
            f"{name} {clip:20.20s} {features:24s} {difference.max():.1e} "
            f"{difference.mean():.1e} {distance:.1e}"
        )
        return difference.max(), distance, top(scores) == top(reference["taggram"])

    for clip, path in CLIPS.items():
        with np.load(real_data / "musicnn" / f"{clip}.{name}.npz", allow_pickle=False) as file:
            reference = {key: file[key] for key in file.files}
        assert tuple(reference["tags"].tolist()) == model.label_names
        samples = load_audio(real_data / path, spec.sample_rate, resampler=spec.resampler).samples

        power = mel_power(samples, spec).astype(np.float16).astype(np.float32)
        x = windows(np.log10(np.float32(10000) * power + np.float32(1)))
        assert len(x) == len(reference["taggram"])
        difference, distance, same = compare(clip, x, reference, "original's rounding")
        if clip == JORAM:
            assert difference < 1e-5 and distance < 1e-4
        assert difference < 1e-3 and same

        difference, distance, same = compare(
            clip, windows(compute_features(samples, spec)), reference, "this front end"
        )
        assert difference < 1e-3 and distance < 3e-3 and same

        # The last window, which ends with the file, has no counterpart in the original.
        (scored,) = score_files(model, [real_data / path], keep_windows=True)
        scores = scored.windows.probabilities[: len(x)]
        difference = np.abs(scores - reference["taggram"]).max()
        print(f"{name} {clip:20.20s} as a file is tagged      {difference:.1e}")
        assert difference < 1e-3 and top(scores) == top(reference["taggram"])


def test_the_tags_that_the_documentation_shows(real_data, published, tmp_path):
    """The first ten tags that musicnn's own page lists for this clip, from the bundle."""
    (path,) = import_models(published, ["MTT_musicnn"], tmp_path)
    labels = [tag.label for tag in Tagger.load(path).tag(real_data / CLIPS[JORAM], top=10)]
    assert labels[:5] == ["techno", "electronic", "synth", "fast", "beat"]
    assert set(labels) == {*labels[:5], "drums", "no vocals", "no vocal", "dance", "ambient"}


def test_all_four_published_models_are_read(published):
    expected = {
        "MTT_musicnn": 787_159,
        "MSD_musicnn": 787_159,
        "MTT_vgg": 605_748,
        "MSD_vgg": 605_748,
    }
    assert available(published) == list(expected)
    for name, parameters in expected.items():
        model = read_model(published, name)
        assert (
            sum(leaf.size for leaf in jax.tree.leaves(model.model["variables"]["params"]))
            == parameters
        )
        assert len(model.label_names) == 50 and model.frames == 187
        first = {"MTT": ("guitar", "classical", "slow"), "MSD": ("rock", "pop", "alternative")}[
            name[:3]
        ]
        assert model.label_names[:3] == first
        reported = {
            "MTT_musicnn": ".9067",
            "MSD_musicnn": ".8802",
            "MTT_vgg": ".9030",
            "MSD_vgg": ".8768",
        }[name]
        assert f"ROC-AUC 0{reported}, PR-AUC 0." in model.card
        # Noise is not silence to any of them.
        x = np.abs(np.random.default_rng(0).standard_normal((1, 187, 96), np.float32))
        logits, _ = models.apply_model(model.module, model.model["variables"], x)
        assert np.isfinite(logits).all() and np.ptp(np.asarray(logits)) > 1
