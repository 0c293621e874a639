"""Repeat a training step whose loss or gradient was not finite, from the batch that was kept.

    mrcnn replay runs/a/failed_batch-rpn-120.npz

Prints the losses and the gradient norm on the whole batch, then on each of its images alone. With
JAX_DEBUG_NANS=1 in the environment, JAX stops at the first operation that gives NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Arguments:
    file: tyro.conf.Positional[Path]
    """The batch that was kept."""


def run(arguments: Arguments) -> None:
    """Prints the metrics of the step; see `training.replay.replay`."""
    from mrcnn_jax.training.replay import replay

    replay(arguments.file)
