"""Changes of the environment are listed by name, with both values."""

from __future__ import annotations

import json

from mrcnn_jax.runs.environment import changes, environment


def test_the_same_environment_has_no_changes() -> None:
    here = environment()
    assert changes(json.loads(json.dumps(here))) == []
    assert here["devices"] == 1
    del here["devices"]  # as a version wrote it that used one device
    assert changes(here) == []


def test_changes_are_named() -> None:
    here = environment()
    assert changes(here | {"mrcnn_jax": "0.0.1"}) == []
    assert changes(here | {"cores": -1, "jaxlib": "0.0.1"}) == [
        f"cores -1 -> {here['cores']}",
        f"jaxlib '0.0.1' -> {here['jaxlib']!r}",
    ]
