"""The error of a user's mistake, and the checks of options that raise it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

VERSION: str = sys.modules[__name__.partition(".")[0]].__version__
"""Of the package, which is loaded before its modules."""
OTHER_VERSION = f"(written by another version of mrcnn_jax? this is {VERSION})"
"""Ends the message of a field that a file of a run has and this version does not know."""


class ConfigError(ValueError):
    """A user's mistake in a config, a path or a data set.

    Its text is one line that names the field, file or id.
    """


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def refuse_pipe(path: Path) -> None:
    """Raises ConfigError if `path` is a pipe, socket or device: reading it might never end."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise ConfigError(f"{path}: not a file, but a pipe, socket or device")


def require_share(options: object, prefix: str, *names: str) -> None:
    """Raises ConfigError if one of the options named, an IoU or a score, is not in 0..1."""
    for name in names:
        require(0 <= getattr(options, name) <= 1, f"{prefix}{name}: must be in 0..1")


def require_positive(options: object, prefix: str, *names: str) -> None:
    """Raises ConfigError if one of the options named, a number or a tuple of numbers, is not above
    0 and finite; None passes."""
    for name in names:
        holds = all(0 < value < math.inf for value in _numbers(options, name))
        require(holds, f"{prefix}{name}: must be positive and finite")


def require_weight(options: object, prefix: str, *names: str) -> None:
    """Raises ConfigError if one of the options named, a factor or a tuple of them, is negative or
    not finite."""
    for name in names:
        holds = all(0 <= value < math.inf for value in _numbers(options, name))
        require(holds, f"{prefix}{name}: must be at least 0 and finite")


def _numbers(options: object, name: str) -> Sequence[float]:
    value = getattr(options, name)
    if value is None:
        return ()
    return value if isinstance(value, tuple | list) else (value,)  # a config file may have a list


def require_positives(samples: int, fraction: float, prefix: str) -> None:
    """Raises ConfigError unless a share of the samples can be positives, at least one of them."""
    require(0 < fraction <= 1, f"{prefix}positive_fraction: must be in (0, 1]")
    require(samples >= 1, f"{prefix}samples: must be at least 1")
    require(
        samples * fraction > 1 - 1e-6,
        f"{prefix}samples: {samples}: too few for one positive at {prefix}positive_fraction "
        f"{fraction:g}",
    )


def require_at_least(least: int, options: object, prefix: str, *names: str) -> None:
    """Raises ConfigError if one of the options named is less than `least`; None passes.

    Args:
        least: smallest value allowed.
        options: object that holds the options as attributes.
        prefix: what a message puts before a name, "model.rpn." for example.
    """
    for name in names:
        value = getattr(options, name)
        finite = " and finite" if value == math.inf else ""
        require(
            value is None or least <= value < math.inf,
            f"{prefix}{name}: must be at least {least}{finite}",
        )
