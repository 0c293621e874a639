"""Depth maps in numbers: how much is known, range, quantiles, and whether they can be right."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

SCALES = (1000, 8000, 256)  # of millimetres, SUN RGB-D and KITTI
USUAL = (0.1, 20.0)  # metres: a scale that gives another median is not proposed
BINS = 500  # of a histogram of metres, per factor e: 0.2 % each
QUANTILES = (0.01, 0.5, 0.99)

Limits = tuple[float, float]  # the least and the largest depth, in metres


@dataclass(frozen=True)
class DepthSummary:
    """Depth maps in numbers; what is unknown in a map counts for its pixels only."""

    maps: int
    known_share: float
    """Of the pixels of all maps."""
    metres: tuple[float, float] | None
    """The least and the largest; None if no pixel is known."""
    quantiles: dict[str, float] | None
    """"1%", "50%" and "99%" of the known pixels in metres, exact to 0.2 %."""

    def line(self, images: int) -> str:
        """For people; `images` is the number of all images."""
        line = f"depth: {self.maps} of {images} images; "
        if self.metres is None or self.quantiles is None:
            return f"{line}not one pixel known"
        low, high = self.metres
        quantiles = ", ".join(f"{name} {metres:.3g}" for name, metres in self.quantiles.items())
        return (
            f"{line}{self.known_share:.1%} of their pixels known, {low:.3g} to {high:.3g} m "
            f"(quantiles {quantiles})"
        )


class MapStatistics(NamedTuple):
    """Of one depth map. Its histogram, whose bin i is number `first` + i of all, counts positive
    depths, also those beyond the limits."""

    pixels: int
    known: int  # within the limits
    metres: Limits  # of those known
    first: int
    histogram: Int[np.ndarray, " n"]

    @staticmethod
    def of(metres: Float[np.ndarray, "h w"], limits: Limits) -> MapStatistics:
        positive = metres[metres > 0]
        known = positive[(positive >= limits[0]) & (positive <= limits[1])]
        bins = np.rint(np.log(positive) * BINS).astype(np.int64)
        first = int(bins.min()) if bins.size else 0
        reached = float(known.min(initial=math.inf)), float(known.max(initial=0.0))
        return MapStatistics(metres.size, known.size, reached, first, np.bincount(bins - first))


@dataclass
class DepthStatistics:
    """The sum over many maps; its fields are JSON values."""

    maps: list[int] = field(default_factory=list)
    """Their images' ids."""
    pixels: int = 0
    known: int = 0
    least: float = math.inf
    most: float = 0.0
    histogram: dict[str, int] = field(default_factory=dict)

    def add(self, image_id: int, one: MapStatistics) -> None:
        """Adds the map of an image."""
        self.maps.append(image_id)
        self.pixels += one.pixels
        self.known += one.known
        self.least, self.most = min(self.least, one.metres[0]), max(self.most, one.metres[1])
        for place in np.flatnonzero(one.histogram).tolist():
            name = str(one.first + place)
            self.histogram[name] = self.histogram.get(name, 0) + int(one.histogram[place])

    def quantiles(self, limits: Limits) -> dict[float, float]:
        """`QUANTILES` of the positive depths in `limits`, each the centre of its bin."""
        bins = np.array(sorted(map(int, self.histogram)))
        counts = np.array([self.histogram[str(number)] for number in bins.tolist()])
        centres = np.exp(bins / BINS)
        inside = (centres >= limits[0] * 0.998) & (centres <= limits[1] * 1.002)
        ends = np.cumsum(counts[inside])
        places = np.searchsorted(ends, np.array(QUANTILES) * (ends[-1] - 1), side="right")
        values = np.clip(centres[inside][places], *limits).tolist()
        return dict(zip(QUANTILES, values, strict=True))

    def summary(self, maps: int) -> DepthSummary | None:
        """The numbers for people, of so many maps; None if there is none."""
        if not maps:
            return None
        share = self.known / self.pixels
        if not self.known:
            return DepthSummary(maps, share, None, None)
        reached = self.least, self.most
        quantiles = {f"{q:.0%}": metres for q, metres in self.quantiles(reached).items()}
        return DepthSummary(maps, share, reached, quantiles)

    def absurd(self, scale: float, limits: Limits, in_metres: bool) -> str | None:
        """Why the depths cannot be right: most are beyond the limits, as with a wrong scale.

        Args:
            scale: data.depth_scale, by which they were read.
            limits: data.depth_range.
            in_metres: whether some come from files that hold metres.
        """
        positive = sum(self.histogram.values())
        if not positive:
            return None
        median = self.quantiles((0.0, math.inf))[0.5]
        if limits[0] <= median <= limits[1] and 2 * self.known >= positive:
            return None
        others = {other: median * scale / other for other in SCALES}
        fitting = [
            f"{other} ({metres:.2g} m)"
            for other, metres in others.items()
            if USUAL[0] <= metres <= USUAL[1]
        ]
        hint = "it is the value of a 16-bit PNG for a metre"
        if USUAL[0] <= median <= USUAL[1]:
            hint = "is the range too narrow?"
        elif in_metres:
            hint = "files .npy hold metres, whatever the scale"
        elif fitting:
            hint = f"{' or '.join(fitting)} would look right"
        return (
            f"data.depth_scale {scale:g} gives a median depth of {median:.3g} m, and "
            f"{1 - self.known / positive:.0%} of all beyond data.depth_range ({limits[0]:g} to "
            f"{limits[1]:g} m): {hint}"
        )
