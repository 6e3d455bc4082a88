import dataclasses
import re

import pytest

from musicgenre import models
from musicgenre.config import base_config, check_config, flatten, reference, sections
from musicgenre.config.fields import documented_fields
from musicgenre.errors import UserError


def test_every_field_of_the_base_config_is_in_the_reference_with_its_default_and_meaning():
    texts = {
        field.name: field for _, fields in reference.section_texts().values() for field in fields
    }
    base = dict(flatten(base_config()))
    assert texts.keys() == base.keys()
    for name, field in texts.items():
        assert field.default == base[name]
        assert re.match(r"\S.*\S$", field.meaning), f"{name} has no meaning"


def test_every_network_field_has_a_meaning():
    for name, cls in models.registered().items():
        if not cls.__module__.startswith("musicgenre."):
            continue
        meanings = {field: meaning for field, _, meaning in documented_fields(cls)}
        assert [f for f in models.hyperparameters(cls) if not meanings.get(f)] == [], name


def test_sections_are_frozen_and_check_themselves():
    with pytest.raises(
        UserError, match=r"config.optimizer.b1 must be at least 0 and below 1, not 1"
    ):
        sections.Optimizer(b1=1.0)
    with pytest.raises(UserError, match=r"config.loss.name='mce' is not known. Did you mean 'mse'"):
        sections.Loss(name="mce")
    with pytest.raises(dataclasses.FrozenInstanceError):
        sections.Loss().name = "mse"


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0])
def test_a_nan_or_an_out_of_range_number_is_refused(value):
    with pytest.raises(UserError, match=r"config.optimizer.learning_rate must be above 0"):
        sections.Optimizer(learning_rate=value)


def test_an_integer_may_stand_for_a_float_but_a_bool_may_not():
    assert sections.Optimizer(learning_rate=1).learning_rate == 1
    with pytest.raises(UserError, match=r"config.optimizer.learning_rate must be float like 0.001"):
        sections.Optimizer(learning_rate=True)


def test_a_missing_and_an_unknown_field_are_named():
    config = base_config()
    del config.optimizer.eps
    with pytest.raises(UserError, match=r"config.optimizer.eps is missing"):
        check_config(config)
    config = base_config()
    config.optimizer.learning_rat = 0.1
    with pytest.raises(UserError, match=r"learning_rat is not a field.*'optimizer.learning_rate'"):
        check_config(config)


def test_the_listing_marks_what_a_config_changes_and_shows_its_networks_fields():
    config = base_config()
    config.batch_size = 8
    config.model.name = "conv2d"
    lines = list(reference.listing(config.to_dict()))
    marked = [line for line in lines if line.startswith("*")]
    assert marked == ["* batch_size = 8", "* model.name = 'conv2d'"]
    own = models.hyperparameters(models.registered()["conv2d"])
    assert {f"model.{name}" for name in own} <= {line.split()[0] for line in lines if line.split()}


def test_the_reference_page_has_a_row_for_every_field_and_network():
    page = "\n".join(reference.markdown())
    for name in flatten(base_config()):
        assert f"| `{name[0]}` |" in page
    for name in models.registered():
        assert f"## Network `{name}`" in page
