import dataclasses
import json
import shutil
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import soundfile
from ml_collections import ConfigDict
from tiny_model import tiny_model

from musicgenre.config import (
    base_config,
    check_config,
    clip_layout,
    dataset_options,
    feature_spec,
    store_path,
)
from musicgenre.datasets import load_dataset
from musicgenre.errors import UserError
from musicgenre.runs import workdir
from musicgenre.runs.bundle import save_bundle
from musicgenre.runs.model import load_model
from musicgenre.runs.provenance import TrainedOn
from musicgenre.runs.workdir import Interrupted
from musicgenre.store.loader import train_batches
from musicgenre.store.prepare import prepare_store
from musicgenre.store.store import Store
from musicgenre.studies.ablation import run_folds
from musicgenre.studies.evaluate import evaluate_model
from musicgenre.training.augment import Augmentation
from musicgenre.training.fit import train
from musicgenre.training.losses import clip_losses, soft_losses
from musicgenre.training.objectives.distillation import (
    cross_fitted,
    distils,
    read_teachers,
    softened,
)
from musicgenre.training.state import create_state
from musicgenre.training.step import make_train_step
from musicgenre.training.telemetry import read_rows

ROOT = Path(__file__).resolve().parents[3]
GENRES = ("low", "middle", "high")
NORM = {"mean": np.full((1, 8), -40.0, np.float32), "std": np.full((1, 8), 10.0, np.float32)}


def changed(config, **fields):
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in fields.items()}
    )
    return config


def parameters(workdir):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_model(workdir).model)]


def same(one, other):
    return all(
        np.array_equal(a, b) for a, b in zip(parameters(one), parameters(other), strict=True)
    )


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """A folder with 12 + 6 clips of three genres, and a network trained on each half of the 12."""
    data_folder = tmp_path_factory.mktemp("distill")
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("valid", 6)):
        label = np.arange(count) % 3
        spectrogram = -40 + 8 * generator.standard_normal((count, 16, 64))
        for row, number in enumerate(label):
            spectrogram[row, 5 * number : 5 * number + 5] += 8
        ids = np.array([f"{split}.{row:02d}" for row in range(count)])
        values = np.clip(spectrogram, -80, 0).astype(np.float32)
        np.savez(
            data_folder / f"{split}.npz",
            spectrogram=values,
            label=label,
            genres=np.array(GENRES),
            clip_id=ids,
        )
    config = student(data_folder)
    prepare(config)
    for fold in range(2):
        half = changed(
            config,
            data__protocol="random_kfold",
            data__folds=2,
            data__fold=fold,
            data__files__valid="",
            epochs=6,
        )
        prepare(half)
        train(half, data_folder / f"half{fold}", progress=False)
    return data_folder


def student(data_folder, **fields):
    """The config of a small network on the clips of `data_folder`."""
    config = base_config()
    config.data.dataset = "arrays"
    config.data.root = str(data_folder)
    config.data.files = ConfigDict({"train": "train.npz", "valid": "valid.npz", "test": ""})
    config.data.stores_root = str(data_folder / "stores")
    config.data.frames = 64
    config.data.normalise = "band"
    config.features.n_mels = 16
    config.features.hop_length = 512
    config.model = ConfigDict({"name": "conv1d", "module": "", "filters": (8,), "dense": (8,)})
    config.batch_size = 6
    config.epochs = config.eval_every = 2
    return changed(config, **fields)


def halves(data_folder):
    return (str(data_folder / "half0"), str(data_folder / "half1"))


def prepare(config):
    dataset = load_dataset(dataset_options(config))
    prepare_store(
        dataset,
        feature_spec(config),
        clip_layout(config),
        store_path(config),
        workers=1,
        progress=False,
    )


def test_soft_losses_by_hand():
    logits = jnp.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    targets = np.array([[0.5, 0.3, 0.2], [0.0, 0.9, 0.1]])
    weights = np.array([1.0, 2.0, 3.0])
    log_p = np.asarray(logits) - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    got = soft_losses(logits, jnp.asarray(targets), jnp.asarray(weights), task="single_label")
    np.testing.assert_allclose(got, -(weights * targets * log_p).sum(axis=1), rtol=1e-6)
    p = 1 / (1 + np.exp(-np.asarray(logits)))
    each = -(weights * targets * np.log(p) + (1 - targets) * np.log(1 - p))
    got = soft_losses(logits, jnp.asarray(targets), jnp.asarray(weights), task="multi_label")
    np.testing.assert_allclose(got, each.mean(axis=1), rtol=1e-6)
    # With certain teachers it is the loss of the labels, weighted by class.
    y, tags = jnp.array([2, 1]), jnp.array([[1.0, 0, 1], [0, 0, 1]])
    for task, hard, soft in (("single_label", y, jnp.eye(3)[y]), ("multi_label", tags, tags)):
        expected = clip_losses(logits, hard, jnp.asarray(weights), 0.0, task=task)
        np.testing.assert_allclose(
            soft_losses(logits, soft, jnp.asarray(weights), task=task), expected, rtol=1e-6
        )


def test_softened_by_hand():
    # The square roots of 0.64 and 0.36 are 0.8 and 0.6.
    np.testing.assert_allclose(
        softened([[0.64, 0.36]], 2.0, "single_label"), [[0.8 / 1.4, 0.6 / 1.4]]
    )
    np.testing.assert_allclose(softened([[0.2, 0.8]], 0.5, "single_label"), [[1 / 17, 16 / 17]])
    np.testing.assert_allclose(
        softened([[0.64, 0.36, 0.0, 1.0]], 2.0, "multi_label"), [[0.8 / 1.4, 0.6 / 1.4, 0.0, 1.0]]
    )
    logits = np.array([[3.0, -1.0, 0.5], [-2.0, 0.0, 400.0]])
    for temperature in (0.1, 3.0):
        for task, say in (("single_label", jax.nn.softmax), ("multi_label", jax.nn.sigmoid)):
            got = softened(say(logits), temperature, task)
            # Above 16 or so a tag's float32 is 1, and nothing can soften it.
            rows = slice(0, 1 if task == "multi_label" or temperature == 3 else 2)
            np.testing.assert_allclose(
                got[rows], say(logits[rows] / temperature), rtol=1e-4, atol=1e-7
            )
            assert np.isfinite(got).all()
    assert softened(np.array([0.3, 0.7]), 1.0, "single_label").tolist() == [0.3, 0.7]


def test_a_clip_is_taught_by_those_that_did_not_train_on_it():
    scores = np.array(
        [
            [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]],
            [[0.1, 0.9], [0.4, 0.6], [0.5, 0.5]],
            [[0.3, 0.7]] * 3,
        ]
    )
    # Clip 0 has teacher 0 alone, clip 1 teachers 1 and 2, clip 2 all, since every one has seen it.
    seen = np.array([[False, True, True], [True, False, True], [True, False, True]])
    np.testing.assert_allclose(cross_fitted(scores, seen), [[0.9, 0.1], [0.35, 0.65], [0.5, 0.5]])
    # A clip is known by its id or its content; a teacher of unknown clips may have seen any.
    teacher = TrainedOn(["a"], ["#1"], [None])
    clips = (["a", "b", "c", "d"], ["#2", "#1", "#3", ""])
    assert teacher.has_seen(*clips).tolist() == [True, True, False, False]
    assert dataclasses.replace(teacher, unknown="x does not list them").has_seen(*clips).all()


class Net(nn.Module):
    """The smallest network: compiled fast."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3, name="head")(jnp.abs(x).mean(axis=1))


def soft_step(task, teacher, *, weight=0.3, augmentation=None, accumulate=1):
    """A step on six clips, with what an independent computation needs."""
    module = Net()
    optimizer = optax.sgd(1.0)
    state = create_state(module, optimizer, NORM, seed=0, frames=40, bands=8, ema=False)
    y = (np.arange(6) % 3).astype(np.int32)
    labels = np.eye(3, dtype=np.float32)[y]
    x = (-40 + 10 * np.random.default_rng(0).standard_normal((6, 40, 8))).astype(np.float16)
    batch = {
        "x": x,
        "y": y if task == "single_label" else labels,
        "mask": np.ones(6, np.float32),
        "teacher": teacher,
    }
    step = make_train_step(
        module,
        optimizer,
        seed=0,
        class_weights=jnp.ones(3),
        task=task,
        label_smoothing=0.1,
        teachers_weight=weight,
        augmentation=augmentation,
        accumulate=accumulate,
    )
    new, metrics = jax.jit(step)(state, batch)
    gradient = jax.tree.map(lambda a, b: np.asarray(a - b), state.params, new.params)
    return module, state.params, batch, labels, metrics, gradient


@pytest.mark.parametrize(
    ("task", "mixed"), [("single_label", True), ("single_label", False), ("multi_label", True)]
)
def test_the_loss_is_the_cross_entropy_against_labels_and_teachers(task, mixed):
    teacher = np.random.default_rng(1).dirichlet(np.ones(3), 6).astype(np.float32)
    augmentation = Augmentation(frames=40, mixup=0.7) if mixed else None
    module, params, batch, labels, metrics, gradient = soft_step(
        task, teacher, augmentation=augmentation
    )
    smooth = 0.9 * labels + (0.1 / 3 if task == "single_label" else 0.05)
    targets, x = 0.7 * smooth + 0.3 * teacher, batch["x"].astype(np.float32)
    if mixed:
        both = jax.jit(augmentation)(batch, jax.random.fold_in(jax.random.key(0), 0), NORM)
        share, x = np.asarray(both["mix"])[:, None], both["x"]
        assert np.ptp(share) > 0.1
        targets = share * targets + (1 - share) * np.roll(targets, -1, axis=0)

    def loss(params):
        logits = module.apply({"params": params}, (x + 40.0) / 10.0, train=False)
        if task == "single_label":
            return -(targets * jax.nn.log_softmax(logits)).sum(axis=1).mean()
        p = 1 / (1 + jnp.exp(-logits))
        return -(targets * jnp.log(p) + (1 - targets) * jnp.log(1 - p)).mean()

    value, expected = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradient, expected)
    if mixed and task == "single_label":
        *_, in_parts, parts = soft_step(task, teacher, augmentation=augmentation, accumulate=3)
        np.testing.assert_allclose(in_parts["loss"], value, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), parts, expected)


def test_batches_have_the_rows_of_their_clips(data_folder):
    # The training clips of a half do not come first in its store.
    store = Store.open(
        json.loads((data_folder / "half0" / "train_clips.json").read_text())["store"]
    )
    assert store.indices("train").tolist() != list(range(6))
    teacher = np.arange(18, dtype=np.float32).reshape(6, 3)
    settings = {"batch_size": 4, "steps": 4, "seed": 1, "teacher": teacher}
    clips = store.gather(store.indices("train"))
    for batch, named in zip(
        train_batches(store, **settings),
        train_batches(store, resident=True, **settings),
        strict=True,
    ):
        np.testing.assert_array_equal(batch["teacher"], teacher[named["clip"]])
        np.testing.assert_array_equal(batch["teacher"], named["teacher"])
        np.testing.assert_array_equal(batch["x"], clips[named["clip"]])
    second = list(train_batches(store, process_index=1, process_count=2, **settings))
    np.testing.assert_array_equal(batch["teacher"][2:], second[-1]["teacher"])


def test_teachers_of_two_folds_teach_what_they_had_not_seen(data_folder, tmp_path, capsys, caplog):
    config = student(data_folder, distill__teachers=halves(data_folder), distill__temperature=2.0)
    with caplog.at_level("WARNING", "absl"):
        train(config, tmp_path / "run", progress=False)
    assert (
        "12 of 12 training clips are taught by teachers that did not train on them, 0 by all 2"
        in capsys.readouterr().out
    )
    assert "config.distill" not in caplog.text
    targets, store = np.load(tmp_path / "run" / "teachers.npy"), Store.open(store_path(config))
    assert targets.dtype == np.float32
    ids = store.clip_ids[store.indices("train")].tolist()
    taught = []
    for folder in halves(data_folder):
        own = Store.open(json.loads((Path(folder) / "train_clips.json").read_text())["store"])
        held_out = evaluate_model(load_model(folder), own, "valid", compare_spectrograms=False)
        roots = np.sqrt(held_out.scores)
        rows = [ids.index(clip_id) for clip_id in held_out.clip_ids]
        np.testing.assert_allclose(
            targets[rows], roots / roots.sum(axis=1, keepdims=True), atol=1e-6
        )
        taught += rows
    assert sorted(taught) == list(range(12))
    notes = json.loads((tmp_path / "run" / "teachers.json").read_text())
    assert (notes["clips_taught_by_others"], notes["clips_taught_by_all"], notes["steps"]) == (
        12,
        0,
        [6, 6],
    )
    # All that the teachers trained on are clips that the run has, too.
    record = json.loads((tmp_path / "run" / "train_clips.json").read_text())
    assert (record["teachers"]["clip_id"], record["teachers"]["unknown"]) == ([], "")
    assert evaluate_model(load_model(tmp_path / "run"), store, "valid").audit.clean


def test_if_every_teacher_trained_on_a_clip_all_teach_it_with_a_warning(
    data_folder, tmp_path, capsys, caplog
):
    config = student(data_folder, distill__teachers=halves(data_folder)[:1])
    with caplog.at_level("WARNING", "absl"):
        train(config, tmp_path / "run", progress=False)
    assert (
        "6 of 12 training clips are taught by teachers that did not train on them, 6 by all 1"
        in capsys.readouterr().out
    )
    assert (
        "every teacher trained, or may have trained, on 6 of the 12 training clips" in caplog.text
    )
    scores = evaluate_model(
        load_model(halves(data_folder)[0]), Store.open(store_path(config)), "train"
    ).scores
    np.testing.assert_allclose(np.load(tmp_path / "run" / "teachers.npy"), scores, atol=1e-6)


def test_switched_off_it_is_bit_exactly_plain_training(data_folder, tmp_path):
    """Without teachers and with teachers of weight zero; with a weight, results differ."""
    for name, fields in {
        "plain": {"distill.weight": 0.9, "distill.temperature": 3.0},
        "weightless": {"distill.teachers": halves(data_folder), "distill.weight": 0.0},
        "taught": {"distill.teachers": halves(data_folder)},
    }.items():
        config = student(data_folder, **fields)
        train(config, tmp_path / name, progress=False)
        assert distils(config) == (tmp_path / name / "teachers.npy").exists() == (name == "taught")
    assert same(tmp_path / "plain", tmp_path / "weightless")
    assert not same(tmp_path / "plain", tmp_path / "taught")


def test_a_stopped_run_resumes_bit_exactly_without_its_teachers(data_folder, tmp_path, monkeypatch):
    teachers = tmp_path / "teacher"
    shutil.copytree(data_folder / "half0", teachers)
    config = student(data_folder, distill__teachers=(str(teachers), halves(data_folder)[1]))
    train(config, tmp_path / "uninterrupted", progress=False)
    monkeypatch.setattr(workdir._Signals, "received", lambda self, step: 15 if step == 3 else None)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", progress=False)
    monkeypatch.undo()
    shutil.rmtree(teachers)
    assert train(config, tmp_path / "cut", progress=False).step == 4
    assert same(tmp_path / "uninterrupted", tmp_path / "cut")
    assert [row["step"] for row in read_rows(tmp_path / "cut") if "valid_loss" in row] == [4]

    # The teachers' predictions must not be lost or changed during a run.
    saved = (tmp_path / "cut" / "teachers.npy").read_bytes()
    (tmp_path / "cut" / "teachers.npy").write_bytes(saved[:-4] + bytes(4))
    with pytest.raises(
        UserError, match=r"teachers\.npy: not the teachers' predictions \(SHA-256\)"
    ):
        train(config, tmp_path / "cut", progress=False)
    (tmp_path / "cut" / "teachers.npy").unlink()
    with pytest.raises(UserError, match=r"teachers\.npy: not the teachers' predictions"):
        train(config, tmp_path / "cut", progress=False)
    (tmp_path / "cut" / "teachers.npy").write_bytes(saved)
    notes = json.loads((tmp_path / "cut" / "teachers.json").read_text())
    (tmp_path / "cut" / "teachers.json").write_text(json.dumps(notes | {"temperature": 4.0}))
    with pytest.raises(UserError, match=r"teachers\.json: its temperature is not that of this run"):
        train(config, tmp_path / "cut", progress=False)
    (tmp_path / "cut" / "teachers.json").unlink()
    teachers.symlink_to(data_folder / "half0")
    with pytest.raises(
        UserError, match=r"teachers\.json: no such list of teachers, which this run has learnt from"
    ):
        train(config, tmp_path / "cut", progress=False)


def test_the_audit_counts_the_teachers_training_clips(data_folder, tmp_path, caplog):
    """One of the teachers of a student has seen the clips that the student is evaluated on."""
    half = {
        "data.protocol": "random_kfold",
        "data.folds": 2,
        "data.files.valid": "",
        "epochs": 1,
        "eval_every": 1,
    }
    config = student(data_folder, **half, **{"distill.teachers": halves(data_folder)})
    with caplog.at_level("WARNING", "absl"):
        train(config, tmp_path / "leaky", progress=False)
    assert "teachers were trained on 6 of the 6 clips of the valid split" in caplog.text
    store = Store.open(store_path(config))
    audit = evaluate_model(load_model(tmp_path / "leaky"), store, "valid").audit
    assert audit.trained == 12 and [(found.kind, found.clips) for found in audit.findings] == [
        ("same clip", 6)
    ]
    # As a teacher it counts its own teachers' clips; the teacher of its own half adds none.
    again = read_teachers(
        changed(config, distill__teachers=(str(tmp_path / "leaky"), halves(data_folder)[0])), store
    )
    assert [len(teacher.trained_on) for teacher in again] == [12, 6]
    # A table over folds shows it, too: each fold's clips trained the other fold's teacher.
    base = student(
        data_folder,
        **{"data.protocol": "random_kfold", "data.files.valid": "", "epochs": 1, "eval_every": 1},
    )
    variants = [("taught", {"distill.teachers": halves(data_folder)})]
    (row,) = run_folds(base, variants, tmp_path / "folds", [0], 2, steps=1, progress=False)
    assert row.leaks == {"same clip": 12, "near-identical": 0, "same artist": 0}
    assert (row.steps, row.trained) == ((1, 1), 12)


def test_clips_are_collected_from_every_source_of_a_run():
    def record(*ids, **others):
        return {
            "clip_id": list(ids),
            "sha256": [f"#{i}" for i in ids],
            "group": [None] * len(ids),
            **others,
        }

    alone = TrainedOn.from_json(record("a", "b"))
    assert (alone.clip_ids, alone.hashes, alone.unknown) == (["a", "b"], ["#a", "#b"], "")
    teachers = record("c", unknown="the teacher 'x' does not list them")
    joined = TrainedOn.from_json(
        record("a", init_from=record("b", "a", init_from=None), teachers=teachers)
    )
    assert (joined.clip_ids, joined.hashes) == (["a", "b", "c"], ["#a", "#b", "#c"])
    assert joined.unknown == (
        "the model that this run started from does not list them; "
        "the teacher 'x' does not list them"
    )


def test_a_bundle_teaches_tags_although_its_clips_are_unknown(tmp_path, prepared, caplog):
    """A list of tones with tags, and a teacher that had a temperature given."""
    generator = np.random.default_rng(0)
    lines = ["path,labels,split"]
    for number in range(9):
        tags = [tag for bit, tag in enumerate("abc") if number >> bit & 1 or number == 8]
        soundfile.write(tmp_path / f"{number}.wav", 0.1 * generator.standard_normal(40_000), 22050)
        lines.append(f"{number}.wav,{'|'.join(tags)},{'valid' if number % 3 == 2 else 'train'}")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    teacher = dataclasses.replace(tiny_model("multi_label", ("a", "b", "c")), temperature=2.0)
    save_bundle(teacher, tmp_path / "tags.safetensors")
    config = student(
        tmp_path,
        distill__teachers=(str(tmp_path / "tags.safetensors"),),
        epochs=1,
        loss__class_weights="balanced",
    )
    config.data.dataset, config.data.root = "csv", str(tmp_path / "list.csv")
    prepared(config)
    with caplog.at_level("WARNING", "absl"):
        train(config, tmp_path / "run", progress=False)
    assert "tags.safetensors does not list them; no audit can say that nothing leaks" in caplog.text
    assert "every teacher trained, or may have trained, on 6 of the 6 training clips" in caplog.text
    store = Store.open(store_path(config))
    assert store.task == "multi_label" and store.label_names == ("a", "b", "c")
    scores = evaluate_model(load_model(tmp_path / "tags.safetensors"), store, "train").scores
    np.testing.assert_allclose(np.load(tmp_path / "run" / "teachers.npy"), scores, atol=1e-6)
    audit = evaluate_model(load_model(tmp_path / "run"), store, "valid").audit
    assert not audit.clean and "tags.safetensors does not list them" in audit.summary()[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distill.weight": 1.5}, r"distill\.weight must be at least 0 and at most 1, not 1\.5"),
        ({"distill.weight": -0.1}, r"config\.distill\.weight must be at least 0 and at most 1"),
        ({"distill.temperature": 0.0}, r"config\.distill\.temperature must be above 0, not 0\.0"),
        (
            {"distill.teachers": ("gtzan", "")},
            r"config\.distill\.teachers takes the names of models, .* not ''",
        ),
        (
            {"distill.teachers": (3,)},
            r"config\.distill\.teachers takes the names of models, .* not 3",
        ),
    ],
)
def test_values_out_of_range_are_named(fields, message):
    config = base_config()
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        check_config(config)


def test_teachers_that_do_not_fit_are_named(data_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models_of = {
        "genres": tiny_model(labels=("low", "high", "middle")),
        "frames": tiny_model(labels=GENRES, data__frames=80),
        "front": tiny_model(labels=GENRES, features__top_db=60.0),
        "tags": tiny_model("multi_label", GENRES),
    }
    for name, model in models_of.items():
        save_bundle(model, tmp_path / f"{name}.safetensors")
    for source, message in {
        "genres.safetensors": "labels: low, high, middle -> low, middle, high. Choose another",
        "frames.safetensors": "'frames.safetensors' does not fit the store .*: frames: 80 -> 64",
        "front.safetensors": "does not fit the store .*: features.top_db: 60.0 -> 80.0",
        "tags.safetensors": "does not fit the store .*: task: multi_label -> single_label",
        "nowhere": "config.distill.teachers: 'nowhere': no such workdir, bundle or packaged model",
        "gtzam": "Did you mean 'gtzan'",
        str(data_folder): "no checkpoint found there",
        str(data_folder / "train.npz"): "train.npz: not a readable model",
    }.items():
        with pytest.raises(UserError, match=message):
            train(
                student(data_folder, distill__teachers=(halves(data_folder)[0], source)),
                tmp_path / "run",
                progress=False,
            )
    # The workdir is still usable with a corrected config.
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"needs the cross entropy: leave config\.loss\.name empty"):
        train(
            student(data_folder, distill__teachers=halves(data_folder), loss__name="mse"),
            tmp_path / "run",
            progress=False,
        )
    with pytest.raises(UserError, match="a regression has no probabilities to learn from"):
        read_teachers(
            student(data_folder, distill__teachers=halves(data_folder)),
            types.SimpleNamespace(task="regression"),
        )
