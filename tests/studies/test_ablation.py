import csv

import numpy as np
import pytest

from musicgenre.config import base_config, dataset_options
from musicgenre.datasets import load_dataset
from musicgenre.errors import UserError
from musicgenre.evaluation.audit import AuditSide, audit
from musicgenre.evaluation.intervals import bootstrap_mean
from musicgenre.studies.ablation import expand, folds_row, run_folds
from musicgenre.training.fit import TrainResult
from musicgenre.training.telemetry import read_rows

VARIANTS = [
    ("segments", {"data.protocol": "segment_leaked", "data.frames": 32}),
    ("artists", {"data.protocol": "artist_kfold"}),
    ("as_given", {"data.protocol": "files"}),
]


def arrays_config(**data):
    config = base_config()
    config.data.update({"dataset": "arrays", "root": "somewhere"} | data)
    return config


def test_every_variant_is_trained_equally_often():
    expanded = expand(arrays_config(), VARIANTS, [0, 1], folds=3)
    runs = {
        name: [(c.data.fold, c.data.folds, c.seed) for c in configs]
        for name, _, configs in expanded
    }
    assert (
        runs["artists"]
        == [(0, 3, 0), (0, 3, 1), (1, 3, 0), (1, 3, 1), (2, 3, 0), (2, 3, 1)]
        == runs["segments"]
    )
    assert runs["as_given"] == [(0, 10, seed) for seed in range(6)]
    [(_, _, configs)] = expand(
        arrays_config(),
        [("tuned", VARIANTS[1][1] | {"init_from": "runs/{fold}/{seed}"})],
        [4, 5],
        folds=2,
    )
    assert [c.init_from for c in configs] == ["runs/0/4", "runs/0/5", "runs/1/4", "runs/1/5"]
    assert [
        (c.data.folds, c.seed)
        for _, _, configs in expand(arrays_config(), VARIANTS[1:2], [4])
        for c in configs
    ] == [(10, 4)]


@pytest.mark.parametrize(
    ("config", "variants", "message"),
    [
        (
            arrays_config(),
            VARIANTS[2:],
            "no variant has a split that is made of folds.*data.protocol=artist_kfold",
        ),
        (base_config(), [("plain", {})], "no variant has a split that is made of folds"),
        (arrays_config(store="one"), VARIANTS, "each fold needs its own store"),
        (
            arrays_config(),
            [("typo", {"data.protokol.x": 1})],
            "'typo': config.data.protokol.x does not exist",
        ),
    ],
)
def test_folds_that_cannot_be_are_one_clear_line(config, variants, message):
    with pytest.raises(UserError, match=message):
        expand(config, variants, [0], folds=2)


@pytest.fixture
def by_artists(small_config, small_arrays):
    """Clips by eleven artists, three each, one of each class; the last artist is not known."""
    folder = small_arrays / "by artist"
    folder.mkdir()
    for split, first in (("train", 0), ("valid", 8)):
        with np.load(small_arrays / f"{split}.npz") as there:
            values = {name: there[name] for name in there.files}
        names = [f"artist {first + row // 3}" for row in range(len(values["label"]))]
        values["group"] = np.array(["" if name == "artist 10" else name for name in names])
        np.savez(folder / f"{split}.npz", **values)
    small_config.data.root = str(folder)
    small_config.data.files.test = ""
    small_config.data.stores_root = str(folder / "stores")
    small_config.model.filters = (8,)
    small_config.data.frames = 32
    return small_config


def test_one_table_of_accuracy_and_leaks_over_the_folds(by_artists, tmp_path):
    out = tmp_path / "ablation"
    [row] = run_folds(by_artists, VARIANTS[:1], out, [0], 2, steps=9, progress=False)

    # In each of two folds there are 33 segments to train on, which are 5 steps an epoch.
    assert (row.folds, row.trainings, row.steps, row.trained) == (2, 2, (10, 10), 33)
    assert (row.clips, row.unknown) == (66, 6)

    # Counted again from the data sets themselves.
    leaked = {"same clip": 0, "near-identical": 0, "same artist": 0}
    for config in expand(by_artists, VARIANTS[:1], [0], folds=2)[0][2]:
        clips = load_dataset(dataset_options(config)).clips
        trained = [
            (clip.clip_id.split("#")[0], clip.group) for clip in clips if clip.split == "train"
        ]
        for clip in (clip for clip in clips if clip.split == "valid"):
            own = clip.clip_id.split("#")[0]
            leaked["same clip"] += own in [other for other, _ in trained]
            leaked["same artist"] += clip.group in [
                group for other, group in trained if other != own
            ]
    assert min(leaked["same clip"], leaked["same artist"]) > 20 and row.leaks == leaked

    # The accuracy is that of the predictions, and of the training's own last evaluation.
    right, groups = [], []
    for number in range(2):
        run = out / "segments" / f"fold{number}" / "seed0"
        with open(run / "held_out.csv", newline="") as file:
            lines = list(csv.DictReader(file))
        values = [line["label"] == line["predicted"] for line in lines]
        last = [line for line in read_rows(run) if "valid_accuracy" in line][-1]
        assert row.values[number] == pytest.approx(np.mean(values)) == last["valid_accuracy"]
        right += values
        groups += [line["group"] or None for line in lines]
    assert len(right) == 66 and row.mean == pytest.approx(np.mean(right))
    assert row.std == pytest.approx(np.std(row.values, ddof=1))
    assert row.interval == pytest.approx(bootstrap_mean(np.array(right), groups))

    with open(out / "ablation.csv", newline="") as file:
        [cells] = csv.DictReader(file)
    assert (
        cells["variant"] == "segments"
        and cells["overrides"] == "data.protocol=segment_leaked, data.frames=32"
    )
    assert float(cells["accuracy"]) == row.mean and cells["same clip in training"] == str(
        leaked["same clip"]
    )
    fraction = f"{100 * leaked['same clip'] / 66:.1f} %"
    assert fraction in (out / "ablation.md").read_text().splitlines()[2]
    assert (out / "variants.png").stat().st_size > 10_000

    # The same call trains and scores nothing again.
    files = {path: path.stat().st_mtime_ns for path in out.rglob("held_out.csv")}
    assert len(files) == 2
    assert run_folds(by_artists, VARIANTS[:1], out, [0], 2, steps=9, progress=False) == [row]
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_a_clip_that_several_trainings_held_out_counts_as_their_mean(tmp_path):
    """Two trainings of a fixed split: one clip is right in both, one in one, one in none."""
    held_out = [
        [
            {"clip_id": name, "group": group, "label": "a", "predicted": predicted}
            for name, group, predicted in run
        ]
        for run in (
            [("x", "A", "a"), ("y", "A", "b"), ("z", "", "b")],
            [("x", "A", "a"), ("y", "A", "a"), ("z", "", "b")],
        )
    ]
    results = [
        TrainResult(tmp_path, step, False, "accuracy", 0.5, 0.5, step, False) for step in (7, 9)
    ]
    sides = [
        AuditSide(["x", "y", "z"], ["1", "2", "3"], ["A", "A", None]),
        AuditSide(["u", "v"], ["3", "4"], ["A", "B"]),
    ]
    row = folds_row("fixed", {}, results, [audit(*sides)], held_out)
    assert row.mean == pytest.approx(0.5) and row.values == pytest.approx([1 / 3, 2 / 3])
    assert row.std == pytest.approx(np.sqrt(1 / 18))
    assert (row.folds, row.trainings, row.clips, row.steps, row.trained) == (1, 2, 3, (7, 9), 2)
    # z has the content of u; x and y share an artist with u; z's artist is not known.
    assert row.leaks == {"same clip": 1, "near-identical": 0, "same artist": 2} and row.unknown == 1
    # Two groups, of 2 clips with 1.5 right and of 1 with none: a draw gives 0.75, 0.5 or 0.
    assert row.interval == (0.0, 0.75)
