"""The options of cutting a data set into tiles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Tile:
    annotations: tyro.conf.Positional[Path]
    """The annotation file, in COCO format."""
    images: Path
    """The folder that its file names are relative to."""
    out: Path
    """The new folder, for annotations.json and images/."""
    tile: int = 1024
    """Side of a tile in pixels. A smaller image is one tile."""
    overlap: int | None = None
    """Pixels that neighbouring tiles share at least; by default an eighth of --tile."""
    least_share: float = 0.25
    """Share of an object's pixels that must lie in a tile for it to be an object there."""
    small_parts: Literal["crowd", "drop"] = "crowd"
    """What becomes of an object with a smaller share in a tile: a crowd, which is neither trained
    on nor evaluated, or nothing, so that it is background."""
    keep_empty: bool = False
    """Keep tiles without objects."""
