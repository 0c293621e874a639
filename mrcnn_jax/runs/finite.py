"""Refuses weights that hold no proper numbers: such a network sees nothing, and says so nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mrcnn_jax.config.errors import ConfigError


def refuse_not_finite(leaves: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError that names the first leaf which has a NaN, an infinity or, if it is a
    running variance, a negative number.

    Args:
        leaves: arrays by path, "params/rpn/conv/kernel" or "batch_stats/resnet/bn1/var".
        where: what they are of, for the message.
    """
    for path, leaf in leaves.items():
        fault = fault_of(np.asarray(leaf), is_variance=is_variance(path))
        if fault is not None:
            raise ConfigError(f"{where}: {path}: {fault}")


def is_variance(path: str) -> bool:
    """Whether a variable is the running variance of a batch norm."""
    return path.startswith("batch_stats/") and path.endswith("/var")


def fault_of(values: np.ndarray, *, is_variance: bool) -> str | None:
    """What is wrong with the numbers of a tensor, and with how many; None if nothing is."""
    wrong, what = ~np.isfinite(values), "not finite (NaN or infinite)"
    if is_variance and not wrong.any():
        wrong, what = values < 0, "negative, but it is a variance"
    return f"{wrong.sum()} of {values.size} numbers are {what}" if wrong.any() else None
