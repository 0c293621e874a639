"""Convert the export of an annotation tool to an annotation file in COCO's format, or cut a data
set in COCO's format into tiles.

    mrcnn convert labelme|cvat|voc|masks|yolo|via|label-studio|supervisely|datumaro INPUT
    --out annotations.json [--images DIR] [--split 0.1]
    mrcnn convert to-yolo annotations.json --images DIR --out my_yolo
    mrcnn convert tile annotations.json --images DIR --out tiles/ [--tile 1024 --overlap 128]

Prints what is dropped, clipped or repaired, with the reason and the first places, and the command
that checks the result, images included. Exit status 2, and one line, if the export cannot be used.
`mrcnn convert labelme --help` lists the options of a format.
"""

from __future__ import annotations

from typing import Annotated

import tyro

from mrcnn_jax.commands import to_yolo
from mrcnn_jax.convert.common import Options
from mrcnn_jax.convert.cvat import Cvat
from mrcnn_jax.convert.datumaro import Datumaro
from mrcnn_jax.convert.label_studio import LabelStudio
from mrcnn_jax.convert.labelme import Labelme
from mrcnn_jax.convert.mask_images import Masks
from mrcnn_jax.convert.supervisely import Supervisely
from mrcnn_jax.convert.tile_data import Tile
from mrcnn_jax.convert.via import Via
from mrcnn_jax.convert.voc import Voc
from mrcnn_jax.convert.yolo import Yolo

Arguments = (
    Annotated[Labelme, tyro.conf.subcommand("labelme")]
    | Annotated[Cvat, tyro.conf.subcommand("cvat")]
    | Annotated[Voc, tyro.conf.subcommand("voc")]
    | Annotated[Masks, tyro.conf.subcommand("masks")]
    | Annotated[Yolo, tyro.conf.subcommand("yolo")]
    | Annotated[Via, tyro.conf.subcommand("via")]
    | Annotated[LabelStudio, tyro.conf.subcommand("label-studio")]
    | Annotated[Supervisely, tyro.conf.subcommand("supervisely")]
    | Annotated[Datumaro, tyro.conf.subcommand("datumaro")]
    | Annotated[to_yolo.ToYolo, tyro.conf.subcommand("to-yolo")]
    | Annotated[Tile, tyro.conf.subcommand("tile")]
)


def run(arguments: Options | to_yolo.ToYolo | Tile) -> None:
    """Converts, writes and prints: see `convert.write.convert` and `convert.cut_tiles.cut`."""
    from mrcnn_jax.convert.cut_tiles import cut
    from mrcnn_jax.convert.write import convert

    if isinstance(arguments, to_yolo.ToYolo):
        to_yolo.run(arguments)
    elif isinstance(arguments, Tile):
        cut(arguments)
    else:
        convert(arguments)
