"""Tags of TIFFs by which they are refused, as Pillow gives them; test_tiff_windows.py has files."""

from __future__ import annotations

from typing import Any

import pytest

from mrcnn_jax.pixels.tiff_tags import nodata, refusal


@pytest.mark.parametrize(
    ("tags", "told"),
    [
        ({}, None),
        ({273: (8,), 279: (0,)}, None),  # old writers do not know it
        ({273: (8, 20), 279: (12, 12)}, None),
        ({273: (8, 20), 279: (12, 0)}, "strips without data"),
        ({273: (8, 20), 279: (0, 0)}, None),  # nor these, where nothing is compressed
        ({259: 5, 273: (8, 20), 279: (0, 0)}, "strips without data"),
        ({273: (0,), 279: (0,)}, "strips without data"),
        ({324: (0, 20), 325: (0, 12)}, "tiles without data"),
        ({254: 1, 330: (900, 1800)}, "a camera's raw file"),
        ({254: 0, 330: (900, 1800)}, None),  # a pyramid of OME-TIFF
        ({254: 1}, None),
    ],
)
def test_what_is_refused(tags: dict[int, Any], told: str | None) -> None:
    why = refusal(tags)
    assert why is None if told is None else why is not None and why.startswith(told)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("65535", 65535),
        ("65535.0 ", 65535),
        (b"-9999", -9999),
        ("0", None),
        ("nan", None),
        ("inf", None),
        ("1e300", None),
        ("0.5", None),
        ("none", None),
        ((1, 2), None),
        (None, None),
    ],
)
def test_nodata_is_a_whole_number(text: Any, value: int | None) -> None:
    assert nodata({42113: text}) == value
    assert nodata({}) is None
