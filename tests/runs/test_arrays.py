"""Arrays in folders of orbax, by their paths; what does not fit is a table."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.runs.arrays import ArrayFolders, flatten, refuse_other_leaves

FOLDER = Path("run/00000003-rpn")
STATE = {
    "params": {
        "resnet": {"conv1": {"kernel": jnp.full(3, -0.0)}},
        "fpn": {"kernel": jnp.linspace(0.0, 1.0, 7)},
        "rpn": {"conv": {"kernel": jnp.ones((2, 3)), "half": jnp.full(3, -0.0, jnp.bfloat16)}},
    },
    "step": jnp.int32(3),
}


def refused(wanted: dict[str, Any]) -> list[str]:
    """The lines of the refusal."""
    with pytest.raises(ConfigError) as caught:
        refuse_other_leaves(flatten(STATE), flatten(wanted), FOLDER)
    return str(caught.value).split("\n")


def test_arrays_come_back_by_their_paths_bit_for_bit(tmp_path: Path) -> None:
    flat = {path: np.asarray(leaf) for path, leaf in flatten(STATE).items()}
    assert [leaf.shape for leaf in flat.values()] == [x.shape for x in jax.tree.leaves(STATE)]
    ArrayFolders().save(tmp_path / "model", flat)
    found = ArrayFolders().restore(tmp_path / "model")
    assert found.keys() == flat.keys()
    for path, leaf in flat.items():
        assert (found[path].dtype, found[path].shape) == (leaf.dtype, leaf.shape)
        assert found[path].tobytes() == leaf.tobytes()
    refuse_other_leaves(found, flatten(STATE), tmp_path)


def test_another_model_is_refused_with_a_table_of_the_leaves() -> None:
    params = {
        "resnet": STATE["params"]["resnet"],
        "fpn": {"kernel": jnp.ones(8), "bias": jnp.ones(1)},
        "rpn": {"conv": {"half": jnp.ones(3)}},
    }
    first, *table = refused(STATE | {"params": params})
    assert first == (
        f"{FOLDER}: does not fit this model and stage: 1 missing, 1 extra, 2 differing"
    )
    assert table == [
        "             leaf                    checkpoint     this model",
        "  missing    params/fpn/bias         -              float32[1]",
        "  extra      params/rpn/conv/kernel  float32[2, 3]  -",
        "  differing  params/fpn/kernel       float32[7]     float32[8]",
        "  differing  params/rpn/conv/half    bfloat16[3]    float32[3]",
    ]


def test_long_tables_of_leaves_are_cut() -> None:
    extra = {f"leaf{i:02}": jnp.ones(2) for i in range(23)}
    first, _, *rows = refused(STATE | {"params": STATE["params"] | extra})
    assert first.endswith(": 23 missing")
    assert [row.split()[:2] for row in rows[:-1]] == [
        ["missing", f"params/leaf{i:02}"] for i in range(20)
    ]
    assert rows[-1].split() == ["missing", "...", "and", "3", "more"]


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of orbax's threads, after they failed
def test_what_the_system_refuses_is_an_error_of_the_system(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No file may grow beyond 100 bytes, as on a full disk; nothing else is logged."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            ArrayFolders().save(tmp_path / "model", {"a": np.ones(10_000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not caplog.records
