"""Bits are flipped one at a time, and what happens then is called by its name."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.runs.run import Run
from tools import bit_flips


@pytest.fixture
def folder(kept_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(kept_run, tmp_path / "run")


def read(folder: Path, _: Run) -> Any:
    """What a reader may make of "text" if one bit of it is not as it was."""
    content = (folder / "file").read_bytes()
    if content[0] != ord("t"):
        raise ConfigError("one line")
    if content[1] != ord("e"):
        raise ConfigError("two\nlines")
    if content[2] != ord("x"):
        logging.getLogger("mrcnn_jax.any").warning("told")
    if content[3] != ord("t"):
        raise KeyError("file")
    return content[:3] + content[5:]


def test_outcomes(folder: Path) -> None:
    (folder / "file").write_bytes(b"text12")
    kinds = {"any": bit_flips.Kind("file", read), "none": bit_flips.Kind("absent", read)}
    result = bit_flips.flip_all(folder, kinds, flips=60, seed=0)
    (outcomes,) = result.outcomes.values()
    assert set(outcomes) == {"refused", "error", "told", "nothing changed", "silent"}
    assert outcomes.total() == 60
    assert len(result.failures) == outcomes["error"] + outcomes["silent"]
    silent = next(line for line in result.failures if line.endswith("silent"))
    assert "any: file, bit " in silent
    assert " of byte 5: " in silent
    assert (folder / "file").read_bytes() == b"text12"
    assert bit_flips.flip_all(folder, kinds, flips=60, seed=0) == result


def test_no_flip_in_a_runs_folder_is_silent(folder: Path) -> None:
    """But in the logs of this one, which is of a version whose checkpoints say nothing of them."""
    kinds = {name: kind for name, kind in bit_flips.KINDS.items() if name != "metrics.jsonl"}
    result = bit_flips.flip_all(folder, kinds, flips=3, seed=1)
    assert result.failures == []
    assert set(result.outcomes) >= {"config.json", "checkpoint: meta.json", "checkpoint: arrays"}
    assert all(outcomes.total() == 3 for outcomes in result.outcomes.values())
