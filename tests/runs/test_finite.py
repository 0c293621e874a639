"""Weights that hold no proper numbers are named."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.runs.finite import refuse_not_finite

ONES = {
    "params/rpn/conv/kernel": np.ones((2, 3), np.float32),
    "params/half": np.ones(3, jnp.bfloat16),
    "batch_stats/resnet/bn1/mean": np.array([-1.0, 0.0]),
    "batch_stats/resnet/bn1/var": np.array([0.0, -0.0]),  # of channels that are always 0
    "key": np.zeros(2, np.uint32),
}


def test_proper_numbers_pass() -> None:
    refuse_not_finite(ONES, "a run")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("path", [path for path in ONES if path != "key"])
def test_a_number_that_is_not_finite(path: str, value: float) -> None:
    leaf = ONES[path].copy()
    leaf.flat[-1] = value
    line = f"a run: {path}: 1 of {leaf.size} numbers are not finite (NaN or infinite)"
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}$"):
        refuse_not_finite(ONES | {path: leaf}, "a run")


def test_a_negative_variance() -> None:
    path = "batch_stats/resnet/bn1/var"
    with pytest.raises(ConfigError, match=rf"^a run: {path}: 1 of 2 numbers are negative, but"):
        refuse_not_finite(ONES | {path: np.array([-1e-9, 1.0])}, "a run")
