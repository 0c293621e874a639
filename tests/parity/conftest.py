"""The peer's suite: collected by `make parity`, which names this folder, and never by a plain `pytest`."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    named = any(Path(argument.split("::")[0]).resolve().is_relative_to(Path(__file__).parent) for argument in config.args)
    return None if named else True
