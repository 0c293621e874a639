from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from mrcnn_jax.pixels.depth_statistics import DepthStatistics, MapStatistics

LIMITS = (0.02, 100.0)


def statistics(*maps: np.ndarray, limits: tuple[float, float] = LIMITS) -> DepthStatistics:
    total = DepthStatistics()
    for number, metres in enumerate(maps):
        total.add(number, MapStatistics.of(metres.astype(np.float32), limits))
    return total


def test_numbers_are_those_of_all_pixels_together() -> None:
    rng = np.random.default_rng(0)
    maps = [rng.lognormal(mean, 1.0, (40, 50)).astype(np.float32) for mean in (-2, 0, 2, 6)]
    for metres in maps:
        metres[rng.random(metres.shape) < 0.3] = 0
    values = np.concatenate(maps, axis=None)
    known = values[(values >= LIMITS[0]) & (values <= LIMITS[1])]
    total = statistics(*maps)
    for again in (total, DepthStatistics(**json.loads(json.dumps(asdict(total))))):
        summary = again.summary(len(maps))
        assert summary is not None
        assert summary.maps == 4
        assert summary.known_share == known.size / values.size
        assert summary.metres == (known.min(), known.max())
        assert summary.quantiles == pytest.approx(
            {f"{q}%": np.quantile(known, q / 100, method="lower") for q in (1, 50, 99)}, rel=0.003
        )


@pytest.mark.parametrize("depth", [0.0201, 0.7, 1.0, 3.3333, 99.99])
def test_one_depth_is_all_quantiles(depth: float) -> None:
    summary = statistics(np.full((3, 4), depth)).summary(1)
    assert summary is not None
    value = float(np.float32(depth))
    assert summary.metres == (value, value)
    assert summary.quantiles == dict.fromkeys(("1%", "50%", "99%"), value)
    assert summary.line(2) == (
        f"depth: 1 of 2 images; 100.0% of their pixels known, {value:.3g} to {value:.3g} m "
        f"(quantiles 1% {value:.3g}, 50% {value:.3g}, 99% {value:.3g})"
    )


def test_nothing_known() -> None:
    total = statistics(np.zeros((3, 4)), np.zeros((3, 4)))
    summary = total.summary(2)
    assert summary is not None
    assert (summary.known_share, summary.metres, summary.quantiles) == (0, None, None)
    assert summary.line(5) == "depth: 2 of 5 images; not one pixel known"
    assert total.absurd(1000, LIMITS, in_metres=False) is None
    assert DepthStatistics().summary(0) is None


@pytest.mark.parametrize(
    ("metres", "scale", "in_metres", "hint"),
    [
        (900.0, 1, False, "1000 (0.9 m) or 8000 (0.11 m) or 256 (3.5 m) would look right"),
        (19_000.0, 1, False, "1000 (19 m) or 8000 (2.4 m) would look right"),
        (0.002, 8_000_000, False, "1000 (16 m) or 8000 (2 m) would look right"),
        (0.001, 1000, False, "it is the value of a 16-bit PNG for a metre"),
        (812.0, 1000, True, "files .npy hold metres, whatever the scale"),
    ],
)
def test_a_scale_that_cannot_be_right(
    metres: float, scale: float, in_metres: bool, hint: str
) -> None:
    reason = statistics(np.full((4, 4), metres)).absurd(scale, LIMITS, in_metres)
    assert reason == (
        f"data.depth_scale {scale:g} gives a median depth of {metres:.3g} m, and 100% of all "
        f"beyond data.depth_range (0.02 to 100 m): {hint}"
    )


@pytest.mark.parametrize("beyond", [0, 5, 8, 9])
def test_a_range_may_hide_half_of_the_depths(beyond: int) -> None:
    """Below as well as above it, so that the median stays in it."""
    metres = np.full(16, 1.0)
    metres[: beyond // 2] = 0.1
    metres[16 - (beyond - beyond // 2) :] = 7.0
    limits = (0.5, 2.0)
    reason = statistics(metres.reshape(4, 4), limits=limits).absurd(1000, limits, in_metres=False)
    assert (reason is None) == (beyond <= 8)
    assert reason is None or reason.endswith(
        "56% of all beyond data.depth_range (0.5 to 2 m): is the range too narrow?"
    )


def test_a_sparse_map_far_away_is_right() -> None:
    """As of a laser scanner: few pixels, up to 80 m."""
    metres = np.zeros((50, 50))
    metres[::10, ::5] = np.linspace(4, 80, 50).reshape(5, 10)
    total = statistics(metres)
    assert total.absurd(256, LIMITS, in_metres=False) is None
    summary = total.summary(1)
    assert summary is not None
    assert summary.known_share == 0.02
    assert math.isclose(summary.metres[1], 80)
