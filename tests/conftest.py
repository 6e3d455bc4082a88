"""Shared settings and fixtures; data are made on the fly."""

import os
from pathlib import Path

import pytest
from absl import flags

os.environ.setdefault("MPLBACKEND", "Agg")
flags.FLAGS.mark_as_parsed()

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def real_data() -> Path:
    """The folder of real clips and arrays that development machines have beside the checkout."""
    if not REAL_DATA.is_dir():
        pytest.skip("the real data are not beside this checkout (../shared/data)")
    return REAL_DATA
