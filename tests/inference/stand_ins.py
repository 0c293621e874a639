"""A stand-in for the network, for what is done with its detections."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.inference import api


def load_stand_in(
    monkeypatch: pytest.MonkeyPatch,
    predict: Callable[..., Any],
    network: ModelConfig | None = None,
    **more: Any,
) -> None:
    """From here on `api.load` gives a model with this `predict`, and `more` attributes."""
    network = network or ModelConfig()
    config = SimpleNamespace(data=DataConfig(), model=network)
    run = SimpleNamespace(config=config, network=network, untrained_line=None)
    model = SimpleNamespace(**{"run": run, "class_names": {}, "predict": predict} | more)
    monkeypatch.setattr(api, "load", lambda *_, **__: model)
