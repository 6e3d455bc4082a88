import dataclasses
import functools
import json
import os
import signal
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from musicgenre import models
from musicgenre.cli.main import main
from musicgenre.config import base_config, store_path, to_plain
from musicgenre.errors import UserError
from musicgenre.runs import workdir
from musicgenre.runs.model import load_model
from musicgenre.store.store import Store
from musicgenre.training import fit as loop
from musicgenre.training.augment import Augmentation
from musicgenre.training.fit import pretrain
from musicgenre.training.objectives.simclr import SimCLR, draw_views
from musicgenre.training.objectives.simclr import nt_xent as nt_xent_unjitted
from musicgenre.training.parallel import Parallel
from musicgenre.training.run import Run
from musicgenre.training.state import create_state
from musicgenre.training.telemetry import read_rows
from musicgenre.training.transfer import layer_order, start_from

NORM = {"mean": jnp.zeros((1, 4)), "std": jnp.ones((1, 4))}


def losses_by_the_definition(z, temperature):
    """-log(exp(s_ij) / sum over k != i of exp(s_ik)) of every row, one pair after the other."""
    z = np.asarray(z, np.float64)
    losses = []
    for i in range(len(z)):
        j = i + 1 if i % 2 == 0 else i - 1
        s = [
            z[i] @ z[k] / np.linalg.norm(z[i]) / np.linalg.norm(z[k]) / temperature
            for k in range(len(z))
        ]
        losses.append(-np.log(np.exp(s[j]) / sum(np.exp(s[k]) for k in range(len(z)) if k != i)))
    return np.array(losses)


nt_xent = jax.jit(nt_xent_unjitted)


def clips(count):
    return jnp.repeat(jnp.arange(count), 2)


def test_the_loss_is_the_definition():
    z = jax.random.normal(jax.random.key(0), (10, 6)) * jnp.arange(1, 11)[:, None]
    losses, nearest = nt_xent(z, clips(5), 0.3)
    np.testing.assert_allclose(losses, losses_by_the_definition(z, 0.3), rtol=1e-5)
    unit = np.asarray(z) / np.linalg.norm(z, axis=1, keepdims=True)
    similarity = unit @ unit.T - 9 * np.eye(10)
    np.testing.assert_array_equal(nearest, similarity.argmax(axis=1) == np.arange(10) ^ 1)


def test_losses_by_hand():
    """Two orthogonal clips: the other view at a cosine of 1, the other clip's two at 0."""
    z = jnp.array([[3.0, 0], [1, 0], [0, 2], [0, 5]])
    losses, nearest = nt_xent(z, clips(2), 1.0)
    np.testing.assert_allclose(losses, np.log(1 + 2 / np.e), rtol=1e-6)
    np.testing.assert_allclose(nt_xent(z, clips(2), 0.5)[0], np.log(1 + 2 / np.e**2), rtol=1e-5)
    assert nearest.all()
    # All alike: as good as chance, and no view counts as found.
    losses, nearest = nt_xent(jnp.ones((8, 3)), clips(4), 0.1)
    np.testing.assert_allclose(losses, np.log(7), rtol=1e-5)
    assert not nearest.any()
    # Two clips that swap their views: the other clip's is nearer.
    losses, nearest = nt_xent(z[jnp.array([0, 2, 1, 3])], clips(2), 1.0)
    np.testing.assert_allclose(losses, np.log(2 + np.e), rtol=1e-6)
    assert not nearest.any()


def test_the_loss_does_not_depend_on_the_order_of_views_and_clips():
    z = jax.random.normal(jax.random.key(1), (12, 5))
    losses, nearest = nt_xent(z, clips(6), 0.5)
    swapped = np.arange(12) ^ 1
    np.testing.assert_allclose(nt_xent(z[swapped], clips(6), 0.5)[0], losses[swapped], rtol=1e-5)
    order = np.array([8, 9, 2, 3, 0, 1, 10, 11, 4, 5, 6, 7])
    moved, found = nt_xent(z[order], clips(6), 0.5)
    np.testing.assert_allclose(moved, losses[order], rtol=1e-5)
    np.testing.assert_array_equal(found, nearest[order])


def test_random_embeddings_are_at_chance():
    z = jax.random.normal(jax.random.key(2), (20, 128, 4000))
    losses, nearest = jax.vmap(lambda z: nt_xent(z, clips(64), 1.0))(z)
    # Cosines have a standard deviation of 1 / sqrt(4000) = 0.016. Of 2560 views, 1/127 are found:
    # 20.2 +- 4.5.
    np.testing.assert_allclose(losses, np.log(127), atol=0.08)
    assert 3 / 2560 < float(nearest.mean()) < 38 / 2560


def test_a_repeated_clip_is_no_negative_and_padding_does_not_count():
    """The loss of the other rows is as without these."""
    z = jax.random.normal(jax.random.key(3), (8, 5))
    twice, _ = nt_xent(z, jnp.array([4, 4, 7, 7, 9, 9, 4, 4]), 0.5)
    np.testing.assert_allclose(twice[:2], losses_by_the_definition(z[:6], 0.5)[:2], rtol=1e-5)
    np.testing.assert_allclose(
        twice[6:], losses_by_the_definition(z[jnp.array([6, 7, 2, 3, 4, 5])], 0.5)[:2], rtol=1e-5
    )
    np.testing.assert_allclose(twice[2:6], losses_by_the_definition(z, 0.5)[2:6], rtol=1e-5)
    filled, nearest = nt_xent(z, jnp.array([4, 4, 7, 7, 9, 9, -1, -1]), 0.5)
    np.testing.assert_allclose(filled[:6], losses_by_the_definition(z[:6], 0.5), rtol=1e-5)
    np.testing.assert_array_equal(nearest[:6], nt_xent(z[:6], clips(3), 0.5)[1])


def views_of(frames, augmentation=None):
    return jax.jit(functools.partial(draw_views, frames=frames, augmentation=augmentation))


def counted(count, frames, bands=4):
    """Clips whose cells hold 100 x clip + frame; float16 represents these exactly."""
    values = 100 * np.arange(count)[:, None, None] + np.arange(frames)[:, None]
    return jnp.asarray(np.broadcast_to(values, (count, frames, bands)), jnp.float16)


def test_views_are_windows_of_their_clip():
    x, length = counted(6, 40), jnp.array([40, 12, 40, 40, 30, 40])
    views = views_of(12)
    starts = []
    for seed in range(60):
        result = np.asarray(views(x, None, length, jax.random.key(seed), NORM))
        assert result.shape == (12, 12, 4) and result.dtype == np.float32
        clip, frame = np.divmod(result[:, :, 0], 100)
        assert (
            clip == np.repeat(np.arange(6), 2)[:, None]
        ).all()  # rows 2c and 2c + 1 are clip c's
        assert (np.diff(frame, axis=1) == 1).all() and (result == result[:, :, :1]).all()
        starts.append(frame[:, 0].astype(int))
    starts = np.array(starts)
    assert (starts[:, 2:4] == 0).all()  # 12 of 12 frames can be used
    # Windows start at every frame, and never reach past what can be used.
    assert set(starts[:, [0, 1, 4, 5, 6, 7, 10, 11]].ravel()) == set(range(29))
    assert set(starts[:, 8:10].ravel()) == set(range(19))
    pairs = starts[:, [0, 4, 6, 10]], starts[:, [1, 5, 7, 11]]
    assert (pairs[0] == pairs[1]).mean() < 0.1  # by chance 1 in 29
    assert (
        abs(np.corrcoef(pairs[0].ravel(), pairs[1].ravel())[0, 1]) < 0.25
    )  # 240 pairs: four standard deviations


def test_resident_clips_give_the_same_views():
    x, chosen = counted(6, 40), jnp.array([5, 0, 3])
    length = jnp.array([40, 25, 40])
    for augmentation in (None, Augmentation(frames=12, time_stretch=0.2, gain=6.0)):
        views = views_of(12, augmentation)
        some = views(x[chosen], None, length, jax.random.key(4), NORM)
        np.testing.assert_array_equal(views(x, chosen, length, jax.random.key(4), NORM), some)


def test_views_are_augmented_independently():
    x, length = counted(4, 100), jnp.full(4, 100)
    key = jax.random.key(0)
    views = views_of(20, Augmentation(frames=20, time_stretch=0.5, gain=40.0))
    result = np.asarray(views(x, None, length, key, NORM))
    rates = np.diff(result[:, :, 0], axis=1)
    np.testing.assert_allclose(rates, np.broadcast_to(rates[:, :1], rates.shape), atol=0.1)
    rates = rates.mean(axis=1)
    assert (rates > 0.66).all() and (rates < 1.51).all() and len(set(np.round(rates, 3))) == 8
    # Complete clips differ by the augmentation alone: here by their level.
    views = views_of(100, Augmentation(frames=100, gain=40.0))
    views = np.asarray(views(x, None, length, key, NORM))
    levels = (views - np.repeat(np.asarray(x, np.float32), 2, axis=0)).reshape(8, -1)
    np.testing.assert_allclose(levels, np.broadcast_to(levels[:, :1], levels.shape), atol=1e-3)
    assert (np.abs(levels[:, 0]) < 40).all() and (
        np.abs(levels[::2, 0] - levels[1::2, 0]) > 0.5
    ).all()


def small_learner(module=None, ema_decay=0.0):
    """SimCLR on a run of 5 clips of 30 frames that has no store."""
    fields = {"name": "conv1d", "filters": (4,), "dense": (8,), "stride": 1, "batch_norm": True}
    module = module or models.build(fields, num_classes=3, frames=16, bands=4)
    config = base_config()
    config.update_from_flattened_dict(
        {
            "batch_size": 5,
            "ema_decay": ema_decay,
            "pretrain.projection": 6,
            "optimizer.name": "sgd",
            "optimizer.schedule": "constant",
            "optimizer.learning_rate": 0.5,
        }
    )
    run = types.SimpleNamespace(
        config=config,
        frames=16,
        clips=np.arange(5),
        epoch_steps=1,
        store=types.SimpleNamespace(layout=types.SimpleNamespace(frames=30), bands=4),
        spread=Parallel.create("jit", jax.devices()[:1]),
        module=lambda: module,
        initial=lambda: {"norm": NORM, "seed": 0, "frames": 16, "bands": 4},
    )
    objective = SimCLR(run)
    return objective.create_state(False), objective.step(0)


def test_a_step_moves_the_network_and_the_projection_but_no_head():
    state, step = small_learner(ema_decay=0.75)
    assert jax.tree.map(jnp.shape, state.opt_state["projection"]) == {
        "dense1": {"kernel": (8, 8), "bias": (8,)},
        "dense2": {"kernel": (8, 6), "bias": (6,)},
    }
    x = jax.random.normal(jax.random.key(0), (5, 30, 4))
    batch = {"x": x, "clip": jnp.arange(5), "length": jnp.full(5, 30)}
    step = jax.jit(step)
    new, metrics = step(state, batch)
    assert 0 < float(metrics["loss"]) < 2 * np.log(9) and 0 <= float(metrics["nearest"]) <= 1
    moved = {name: distance(new.params[name], state.params[name]) for name in state.params}
    assert moved.pop("head") == 0 and min(moved.values()) > 1e-4
    assert distance(new.opt_state["projection"], state.opt_state["projection"]) > 1e-4
    assert (new.collections["batch_stats"]["norm1"]["mean"] != 0).any()
    average = jax.tree.map(
        lambda old, now: 0.75 * np.asarray(old) + 0.25 * np.asarray(now), state.params, new.params
    )
    assert distance(new.ema, average) < 1e-6
    # A step depends on the seed and its number alone.
    again, _ = step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, again.params, new.params)
    other, _ = step(dataclasses.replace(state, step=state.step + 1), batch)
    assert distance(other.params, new.params) > 1e-4


def distance(one, other):
    return max(
        np.abs(np.asarray(a) - np.asarray(b)).max()
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    )


class Silent(nn.Module):
    num_classes: int = 3

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(self.num_classes, name="head")(x.mean(axis=1))


def test_a_network_without_embedding_is_refused():
    with pytest.raises(
        UserError,
        match=r'the model Silent has no embedding to learn.*self.sow\("intermediates", "embedding"',
    ):
        small_learner(Silent())


@pytest.fixture
def config(small_config, small_arrays, prepared):
    """Clips with a different spectrum each, under noise and at any level."""
    generator = np.random.default_rng(1)
    folder = small_arrays / "spectra"
    folder.mkdir()
    for split, count in (("train", 24), ("valid", 9)):
        spectrum = 8 * generator.standard_normal((count, 16, 1))
        noise = 4 * generator.standard_normal((count, 16, 64))
        arrays = dict(np.load(small_arrays / f"{split}.npz"))
        arrays["spectrogram"] = np.clip(-40 + spectrum + noise, -80, 0).astype(np.float32)
        np.savez(folder / f"{split}.npz", **arrays)
    small_config.data.root = str(folder)
    small_config.data.files.test = ""
    small_config.data.crop_frames = 24
    small_config.model.stride = 1
    small_config.augment.gain = 20.0
    small_config.optimizer.schedule = "constant"
    small_config.optimizer.learning_rate = 3e-3
    small_config.pretrain.projection = 16
    small_config.pretrain.temperature = 0.2
    small_config.pretrain.epochs = 4
    small_config.eval_every = 2
    prepared(small_config)
    return small_config


def parameters(workdir):
    return jax.tree.map(np.asarray, load_model(workdir).model)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def rows_of(workdir):
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in read_rows(workdir)
    ]


def test_an_epoch_is_a_row_and_a_line(config, tmp_path, capsys):
    """All clips are in every batch, so the loss of the views falls."""
    config.pretrain.epochs = config.eval_every = 8
    config.batch_size = 24
    result = pretrain(config, tmp_path / "run", progress=False)
    rows, said = read_rows(tmp_path / "run"), capsys.readouterr().out.splitlines()
    (measures,) = result.measures
    assert result.step == 8 and [row["epoch"] for row in rows] == list(range(1, 9))
    assert rows[0]["train_chance"] == pytest.approx(1 / 47)
    assert rows[-1]["valid_chance"] == pytest.approx(1 / 17)
    assert "valid_loss" not in rows[0] and "valid_loss" in rows[-1]
    assert measures["train_loss"] < rows[0]["train_loss"] < np.log(47) / 0.2
    assert len(said) == 8 and said[0].startswith("epoch 1 of 8: train loss ")
    assert said[0].endswith("(chance 2.1%)")
    nearest = f"{measures['valid_nearest']:.1%}"
    loss = measures["valid_loss"]
    assert f"; valid loss {loss:.3f}, other view nearest {nearest} (chance 5.9%)" in said[-1]
    assert f"--config.init_from={tmp_path / 'run'}" in result.line()


def test_training_copies_all_but_the_head_and_records_the_clips(config, tmp_path):
    pretrain(config, tmp_path / "pre", progress=False)
    config.seed, config.epochs, config.eval_every = 1, 1, 1
    config.init_from = str(tmp_path / "pre")
    model = load_model(tmp_path / "pre")
    there = parameters(tmp_path / "pre")["variables"]["params"]
    fresh = create_state(
        model.module, optax.identity(), NORM, seed=1, frames=24, bands=16, ema=False
    )
    layers = layer_order(model.module, 24, 16)
    taken = start_from(
        fresh, layers, config.init_from, model=model.config.model.to_dict(), features=model.features
    )
    assert layers == ["conv1", "conv2", "dense1", "head"]
    for layer in layers[:-1]:
        assert_same(taken.params[layer], there[layer])
        assert (np.asarray(fresh.params[layer]["kernel"]) != there[layer]["kernel"]).any()
    assert_same(taken.params["head"], fresh.params["head"])
    assert (taken.params["head"]["kernel"] != there["head"]["kernel"]).any()

    # A linear probe: the head alone learns.
    config.optimizer.transferred_rate = 0.0
    loop.train(config, tmp_path / "probe", progress=False)
    after = parameters(tmp_path / "probe")["variables"]["params"]
    assert_same(
        {name: after[name] for name in layers[:-1]}, {name: there[name] for name in layers[:-1]}
    )
    assert after["head"]["bias"].any()
    # The clips that pretraining saw count as trained on.
    record = json.loads((tmp_path / "probe" / "train_clips.json").read_text())
    assert record["init_from"]["clip_id"] == []  # no clips beyond the run's own
    seen = load_model(tmp_path / "probe").trained_on
    assert sorted(seen.clip_ids) == sorted(f"train.{row}" for row in range(24))


CONFIG = """
import json
from musicgenre.config import from_plain

def get_config():
    return from_plain(json.loads('''{plain}'''))
"""


def test_a_stopped_pretraining_is_finished_by_the_command_bit_exactly(
    config, tmp_path, monkeypatch, capsys
):
    """Stopped within an epoch, whose measures are the mean of the steps before and after."""
    config.ema_decay = 0.9
    expected = pretrain(config, tmp_path / "uninterrupted", progress=False)
    assert expected.step == 12
    place_batch, seen = Parallel.place_batch, []

    def placed(self, batch):
        seen.append(0)
        if len(seen) == 6:  # placed while step 5 runs
            os.kill(os.getpid(), signal.SIGTERM)
        return place_batch(self, batch)

    monkeypatch.setattr(Parallel, "place_batch", placed)
    with pytest.raises(workdir.Interrupted, match="stopped by SIGTERM after step 5;"):
        pretrain(config, tmp_path / "cut", progress=False)
    assert load_model(tmp_path / "cut").step == 5
    monkeypatch.undo()
    capsys.readouterr()
    plain = json.dumps(to_plain(config))
    (tmp_path / "some_config.py").write_text(CONFIG.format(plain=plain))
    flags = [f"--config={tmp_path / 'some_config.py'}", f"--workdir={tmp_path / 'cut'}"]
    assert main(["pretrain", *flags, "--noprogress"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"epoch {n} of 4" for n in (2, 3, 4)]
    assert last == expected.line().replace("uninterrupted", "cut")
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "uninterrupted")
    assert_same(parameters(tmp_path / "uninterrupted"), parameters(tmp_path / "cut"))
    # Calling it again does nothing.
    assert pretrain(config, tmp_path / "uninterrupted", progress=False) == expected


@pytest.mark.parametrize(("batch_size", "size"), [(4, 4), (20, 9)])
def test_each_validation_clip_counts_once(config, batch_size, size):
    """Nine clips in batches of four: the last one is the ninth clip beside the first three."""
    config.batch_size = batch_size
    seen = []

    def measure(model, head, batch, number):
        seen.append((int(number), np.asarray(batch["clip"]).tolist(), batch["x"].shape))
        return jnp.stack([batch["clip"], batch["clip"] == 8], axis=-1).astype(jnp.float32)

    config.model = ConfigDict(models.resolve(config.model.to_dict()))
    store, spread = Store.open(store_path(config)), Parallel.create("jit", jax.devices()[:1])
    objective = SimCLR(Run(config, store, Path(), spread))
    objective._measure = measure
    measures = objective.evaluate(small_learner()[0], 1)
    chance = 1 / (2 * size - 1)
    assert measures == pytest.approx({"loss": 4.0, "nearest": 1 / 9, "chance": chance})
    assert all(shape == (size, 64, 16) for _, _, shape in seen)
    if size == 4:
        assert [(number, row) for number, row, _ in seen] == [
            (0, [0, 1, 2, 3]),
            (1, [4, 5, 6, 7]),
            (2, [8, 0, 1, 2]),
        ]


def test_without_a_validation_split_and_for_another_network(config, tmp_path, prepared):
    """The method chooses the objective: a stack of Boltzmann machines, a sigmoid network, too."""
    config.data.files.valid = ""
    config.model = ConfigDict({"name": "rbm", "module": "", "layers": (12,)})
    config.pretrain.method = "simclr"
    config.pretrain.epochs = 1
    prepared(config)
    result = pretrain(config, tmp_path / "run", progress=False)
    assert (
        set(result.measures[0]) == {"train_loss", "train_nearest", "train_chance"}
        and "valid loss" not in result.line()
    )
    # A run without labels does not resume as a run with labels.
    with pytest.raises(UserError, match=r"stage: pretrain -> \(absent\). Choose another --workdir"):
        loop.train(config, tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pretrain.momentum": 0.9}, "config.pretrain.momentum=0.9 has no effect on .* 'simclr'"),
        ({"init_from": "elsewhere"}, "config.init_from='elsewhere' has no effect"),
        ({"distill.teachers": ("gtzan",)}, r"config.distill.teachers=\('gtzan',\) has no effect"),
        ({"patience": 3}, "config.patience=3 has no effect"),
        ({"select_metric": "loss"}, "config.select_metric='loss' has no effect"),
        ({"data.eval_chunks": 3}, "config.data.eval_chunks=3: views are drawn at random"),
        ({"optimizer.layer_decay": 0.5}, "config.optimizer.layer_decay=0.5: has no effect"),
        ({"optimizer.accumulate": 2}, "config.optimizer.accumulate=2: each view is compared"),
        ({"augment.mixup": 0.2}, "config.augment.mixup=0.2: makes one clip of two"),
        (
            {"augment.gain": 0.0, "data.crop_frames": 64},
            "views of a clip would be the same: .*crop_frames below the 64 frames",
        ),
        ({"augment.gain": 0.0, "data.crop_frames": 0}, "views of a clip would be the same"),
        (
            {"batch_size": 1},
            "config.batch_size=1: a batch compares from 2 to all 24 training clips",
        ),
        (
            {"batch_size": 25},
            "config.batch_size=25: a batch compares from 2 to all 24 training clips",
        ),
        ({"data.crop_frames": 65}, "crop_frames=65 is not between 1 and the store's 64"),
        ({"pretrain.temperature": 0.0}, "config.pretrain.temperature must be above 0, not 0.0"),
        ({"pretrain.projection": 0}, "config.pretrain.projection must be at least 1, not 0"),
        ({"pretrain.method": "simclear"}, "no objective 'simclear'. Did you mean 'simclr'"),
        (
            {"optimizer.learning_rate": 1e30},
            r"the training loss became nan at step \d+.*optimizer.learning_rate",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_mistakes_are_named(config, tmp_path, fields, message):
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        pretrain(config, tmp_path / "run", progress=False)


def test_pmap_and_a_misspelt_field_give_clear_messages(config, tmp_path):
    with pytest.raises(UserError, match="--parallel=pmap: simclr compares all clips of a batch"):
        pretrain(config, tmp_path / "run", progress=False, parallel="pmap")
    config.pretrain.projektion = 3
    with pytest.raises(
        UserError, match=r"not a field of the objective 'simclr'.*'pretrain.projection'"
    ):
        pretrain(config, tmp_path / "run", progress=False)
