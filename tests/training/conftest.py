"""Shared by the tests of whole runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mrcnn_jax.config.schema import Config
from mrcnn_jax.training import watch


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`stop_at(step)`: this process gets SIGTERM while the batch of that step (counted from now) is
    made."""
    real = watch.load

    def arm(step: int) -> None:
        made = 0

        def load(split: Any, plan: Any, data: Any, **options: Any) -> Iterator[Any]:
            nonlocal made
            for batch in real(split, plan, data, **options):
                if split.name == "train":
                    made += 1
                    if made == step:
                        os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        monkeypatch.setattr(watch, "load", load)

    return arm


@pytest.fixture
def mask_config(tiny_run: Path, tiny_config: Config) -> Config:
    """The last stage of the tiny run, from the run itself: an epoch of the smallest programs, which
    the run has compiled."""
    return replace(tiny_config, init_from=str(tiny_run), stages=tiny_config.stages[2:])
