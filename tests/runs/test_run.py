"""A run that an earlier version of this project wrote (tests/write_run_fixture.py) is still one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from write_run_fixture import EXPECTED, FOLDER, LIMIT, digest, get_config, seen

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import differences
from mrcnn_jax.runs.metrics import read_metrics
from mrcnn_jax.runs.run import load_run


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((FOLDER / EXPECTED).read_text())


def test_its_config_means_what_it_meant() -> None:
    """But for where its data was."""
    changed = [line.split(": ")[0] for line in differences(load_run(FOLDER).config, get_config())]
    assert [name for name in changed if not name.startswith(("data.train_", "data.val_"))] == []


def test_it_holds_no_moving_average() -> None:
    with pytest.raises(
        ConfigError,
        match=r"checkpoint \d+-mask holds no moving average of its weights "
        r"\(stages.mask.ema_decay\)",
    ):
        load_run(FOLDER, weights="ema")


def test_its_rows_are_read(expected: dict[str, Any]) -> None:
    rows = read_metrics(FOLDER)
    assert len(rows) == expected["rows"]
    assert rows[-1] == expected["last"]


def test_its_training_state_is_restored_to_the_bit(expected: dict[str, Any]) -> None:
    assert digest(FOLDER) == expected["sha256"]


def test_it_sees_what_it_saw(expected: dict[str, Any]) -> None:
    found = seen(FOLDER)
    assert found.keys() == expected["seen"].keys()
    assert len(found["scores"]) > 3
    for name, values in expected["seen"].items():
        # On another processor the last bits differ; boxes are in pixels.
        np.testing.assert_allclose(
            found[name], values, atol=0.05 if name == "boxes" else 1e-3, err_msg=name
        )


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in Path(FOLDER).rglob("*") if path.is_file()) < LIMIT
