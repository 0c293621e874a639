"""Generate a data set: a COCO folder with images/ and annotations/instances_{train,val}.json.

mrcnn generate shapes --out DIR [--train 1000 --val 100 --size 128 --seed 0 --depth]
mrcnn generate bins --out DIR [--train 600 --val 100 --size 480 640 --seed 0 --processes 1]
mrcnn generate coco300 --coco DIR --out DIR
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mrcnn_jax.config.errors import require_at_least


@dataclass(frozen=True)
class Shapes:
    """Discs, rectangles and triangles that occlude each other on textured backgrounds."""

    out: Path
    """The new folder."""
    train: int = 1000
    """Training images."""
    val: int = 100
    """Validation images."""
    size: int = 128
    """Width and height of an image in pixels."""
    seed: int = 0
    depth: bool = False
    """Write depth too. Pictures then have haze, from which it can be told; masks stay the same."""


@dataclass(frozen=True)
class Bins:
    """Boxes, cylinders, capsules and ellipsoids in a bin, with depth; needs mujoco."""

    out: Path
    """The new folder."""
    train: int = 600
    """Training images."""
    val: int = 100
    """Validation images."""
    size: tuple[int, int] = (480, 640)
    """Height and width of an image in pixels."""
    seed: int = 0
    processes: int = 1
    """How many draw at the same time; the files are the same."""


@dataclass(frozen=True)
class Coco300:
    """300 training and 114 validation images of COCO 2017 with vehicles, persons and animals."""

    coco: Path
    """COCO 2017 as cocodataset.org has it: annotations/, train2017/ and val2017/."""
    out: Path
    """The new folder."""


Arguments = (
    Annotated[Shapes, tyro.conf.subcommand("shapes")]
    | Annotated[Bins, tyro.conf.subcommand("bins")]
    | Annotated[Coco300, tyro.conf.subcommand("coco300")]
)


def run(arguments: Shapes | Bins | Coco300) -> None:
    """Writes the data set and prints its size."""
    if isinstance(arguments, Coco300):
        from mrcnn_jax.datasets.coco300 import write_coco300

        write_coco300(arguments.coco, arguments.out)
        return
    require_at_least(0, arguments, "--", "train", "val", "seed")
    if isinstance(arguments, Bins):
        from mrcnn_jax.datasets.bins import write_bins

        write_bins(**vars(arguments))
    else:
        from mrcnn_jax.datasets.shapes import write_shapes

        write_shapes(**vars(arguments))
