"""Convert the export of an annotation tool to an annotation file in COCO's format, or cut a data
set in COCO's format into tiles.

    mrcnn convert labelme|cvat|voc|masks INPUT --out annotations.json [--images DIR] [--split 0.1]
    mrcnn convert tile annotations.json --images DIR --out tiles/ [--tile 1024 --overlap 128]

Prints what is dropped, clipped or repaired, with the reason and the first places, and the command
that checks the result, images included. Exit status 2, and one line, if the export cannot be used.
`mrcnn convert labelme --help` lists the options of a format.
"""

from __future__ import annotations

from typing import Annotated

import tyro

from mrcnn_jax.datasets.convert.common import Options
from mrcnn_jax.datasets.convert.cvat import Cvat
from mrcnn_jax.datasets.convert.labelme import Labelme
from mrcnn_jax.datasets.convert.mask_images import Masks
from mrcnn_jax.datasets.convert.tile_data import Tile
from mrcnn_jax.datasets.convert.voc import Voc

Arguments = (
    Annotated[Labelme, tyro.conf.subcommand("labelme")]
    | Annotated[Cvat, tyro.conf.subcommand("cvat")]
    | Annotated[Voc, tyro.conf.subcommand("voc")]
    | Annotated[Masks, tyro.conf.subcommand("masks")]
    | Annotated[Tile, tyro.conf.subcommand("tile")]
)


def run(arguments: Options | Tile) -> None:
    """Converts, writes and prints: see `datasets.convert.write.convert` and `cut_tiles.cut`."""
    from mrcnn_jax.datasets.convert.cut_tiles import cut
    from mrcnn_jax.datasets.convert.write import convert

    if isinstance(arguments, Tile):
        cut(arguments)
    else:
        convert(arguments)
