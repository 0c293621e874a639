"""Random geometry for hypothesis and NumPy tests."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.extra import numpy as hnp

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


def float_boxes(
    n: int, *, low: float = -512, high: float = 4096, min_size: float = 0, max_size: float = 4096
) -> st.SearchStrategy[np.ndarray]:
    """float32 [n, 4], corners from `low` on, sides in [min_size, max_size].

    None is subnormal: XLA takes those for zero on some processors.
    """
    corners = hnp.arrays(np.float64, (n, 2), elements=st.floats(low, high))
    sides = hnp.arrays(np.float64, (n, 2), elements=st.floats(min_size, max_size))

    def boxes(pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        both = np.concatenate([pair[0], pair[0] + pair[1]], axis=1)
        return np.where(np.abs(both) < np.finfo(np.float32).tiny, 0, both).astype(np.float32)

    return st.tuples(corners, sides).map(boxes)


def integer_boxes(n: int, *, high: int = 12, max_size: int = 8) -> st.SearchStrategy[np.ndarray]:
    """Small integer corners, float32 [n, 4]: exact areas, frequent ties and degenerate boxes."""
    corners = hnp.arrays(np.int64, (n, 2), elements=st.integers(0, high))
    sides = hnp.arrays(np.int64, (n, 2), elements=st.integers(0, max_size))
    return st.tuples(corners, sides).map(
        lambda pair: np.concatenate([pair[0], pair[0] + pair[1]], axis=1).astype(np.float32)
    )


def random_boxes(
    rng: np.random.Generator,
    n: int,
    *,
    extent: float = 64,
    min_size: float = 1,
    max_size: float = 32,
) -> np.ndarray:
    """float32 [n, 4] with corners in [0, extent] and sides in [min_size, max_size]."""
    corners, sides = rng.uniform(0, extent, (n, 2)), rng.uniform(min_size, max_size, (n, 2))
    return np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
