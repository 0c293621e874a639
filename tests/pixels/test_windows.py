"""Windows cover an image with one size, and share what they should."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.pixels.windows import Window, check_tiles, windows


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 60), st.data())
@settings(deadline=None, max_examples=200)
def test_windows_cover_the_image_and_share_the_overlap(
    height: int, width: int, tile: int, data: st.DataObject
) -> None:
    """Any two neighbouring pixels are together in a window if there is an overlap."""
    overlap = data.draw(st.integers(0, tile - 1))
    found = windows((height, width), tile, overlap)
    seen = np.zeros((height, width), int)
    for window in found:
        assert window.size == (min(tile, height), min(tile, width))
        assert 0 <= window.y1 < window.y2 <= height
        assert 0 <= window.x1 < window.x2 <= width
        seen[window.y1 : window.y2, window.x1 : window.x2] += 1
    assert seen.min() >= 1
    assert len(set(found)) == len(found)
    for places in ({w.y1 for w in found}, {w.x1 for w in found}):
        for before, after in itertools.pairwise(sorted(places)):
            assert before + tile - after >= overlap


def test_windows_by_hand() -> None:
    assert windows((10, 4), 6, 2) == [Window(0, 0, 6, 4), Window(4, 0, 10, 4)]
    assert [w.y1 for w in windows((11, 4), 6, 2)] == [0, 4, 5]
    assert windows((3, 4), 6, 2) == [Window(0, 0, 3, 4)]
    assert len(windows((20_000, 20_000), 1024, 128)) == 23**2
    assert Window(0, 0, 6, 4).common(Window(4, 1, 10, 9)) == Window(4, 1, 6, 4)


@pytest.mark.parametrize(("tile", "overlap"), [(31, 0), (64, 64), (64, -1), (64.0, 8), (64, 8.0)])
def test_what_makes_no_windows_is_refused(tile: int, overlap: int) -> None:
    with pytest.raises(ConfigError, match=r"^(tile|overlap): "):
        check_tiles(tile, overlap)
