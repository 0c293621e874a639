"""What every test shares: a persistent compilation cache, the data folder, strict promotion for the pure code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before jax is imported anywhere: a test process is several times faster with the programs of the last run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

STRICT = ("ops", "models")  # folders under tests/ whose tests run under strict dtype and rank promotion


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    if Path(request.node.path).parent.name not in STRICT:
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """$MRCNN_DATA; the test is skipped, with that reason, where it is unset."""
    folder = os.environ.get("MRCNN_DATA")
    if not folder:
        pytest.skip("$MRCNN_DATA is not set: this test reads real images and weights")
    return Path(folder)
