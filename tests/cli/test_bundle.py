import json

import numpy as np
import pytest
from safetensors import safe_open

from musicgenre.cli.main import main
from musicgenre.runs.model import load_model


def metrics(path, **changes):
    """What an evaluation of the tiny model with --temperature leaves, as far as it is read."""
    found = {"ece": 0.2, "nll": 1.0, "brier": 0.5}
    values = {
        "config": {"seed": load_model(path).config.seed},
        "checkpoint": {"step": 7},
        "calibration": {
            "temperature": 1.25,
            "fitted_on": "fitted on valid (197 clips of gtzan)",
            "before": found,
            "after": found | {"ece": 0.1},
            "cross_fitted": None,
        },
    }
    file = path.parent / "metrics.json"
    file.write_text(json.dumps(values | changes))
    return file


def test_a_temperature_from_an_evaluation_or_a_number(bundle, tmp_path, capsys):
    out = tmp_path / "calibrated.safetensors"
    assert main(["bundle", str(bundle), str(out), f"--temperature={metrics(bundle)}"]) == 0
    assert "Temperature: 1.25" in capsys.readouterr().out
    model = load_model(out)
    assert model.temperature == 1.25
    line = "fitted on valid (197 clips of gtzan): calibration error before 20.0 %, after 10.0 %"
    assert line in model.card
    # A bundle of it keeps the temperature, unless another is given.
    again = tmp_path / "again.safetensors"
    assert main(["bundle", str(out), str(again)]) == 0 and load_model(again).temperature == 1.25
    assert main(["bundle", str(out), str(again), "--temperature=0.8"]) == 0
    assert load_model(again).temperature == 0.8
    assert main(["bundle", str(out), str(again), "--temperature=1"]) == 0
    assert load_model(again).temperature == 1
    assert np.array_equal(load_model(again).model["norm"]["mean"], model.model["norm"]["mean"])
    with safe_open(again, "np") as file:
        assert "temperature" not in json.loads(file.metadata()["musicgenre"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": None}, "metrics.json: holds no temperature"),
        ({"checkpoint": {"step": 8}}, "another checkpoint than step 7"),
        ({"config": {"seed": 99}}, "the evaluation of another model"),
        ({"config": {"seed": 0, "models": ["a", "b"]}}, "the evaluation of another model"),
    ],
)
def test_another_evaluation_is_refused(bundle, tmp_path, capsys, changes, message):
    out = tmp_path / "calibrated.safetensors"
    words = ["bundle", str(bundle), str(out), f"--temperature={metrics(bundle, **changes)}"]
    assert main(words) == 2
    assert message in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("0", "must be a number above 0, not 0.0"),
        ("nan", "must be a number above 0, not nan"),
        ("lukewarm", "lukewarm: no such number or metrics.json"),
    ],
)
def test_what_is_no_temperature_is_refused(bundle, tmp_path, capsys, asked, message):
    words = ["bundle", str(bundle), str(tmp_path / "x.safetensors"), f"--temperature={asked}"]
    assert main(words) == 2
    assert message in capsys.readouterr().err
