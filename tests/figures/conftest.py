from __future__ import annotations

from typing import Any

import pytest

from mrcnn_jax.figures import draw


@pytest.fixture
def titles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The titles above images, in order."""
    written: list[str] = []

    def keep(image: Any, title: str, *rest: Any) -> Any:
        written.append(title)
        return titled(image, title, *rest)

    titled = draw.titled
    monkeypatch.setattr(draw, "titled", keep)
    return written
