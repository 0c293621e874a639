"""Turns what an annotation tool exports into an annotation file in COCO's format.

    python -m mrcnn_jax.commands.convert labelme|cvat|voc|masks INPUT --out annotations.json [--images
    DIR] [--split 0.1] ...

What is dropped, cut or mended is printed with its reason and first places, and so is the command
that checks the result, images included. Exit status 2, and one line, if the export cannot be used.
`... convert labelme --help` lists the options of a format.
"""

from __future__ import annotations

from typing import Annotated

import tyro

from mrcnn_jax import cli
from mrcnn_jax.datasets.convert.cvat import Cvat
from mrcnn_jax.datasets.convert.labelme import Labelme
from mrcnn_jax.datasets.convert.mask_images import Masks
from mrcnn_jax.datasets.convert.voc import Voc
from mrcnn_jax.datasets.convert.write import convert

Format = (
    Annotated[Labelme, tyro.conf.subcommand("labelme")]
    | Annotated[Cvat, tyro.conf.subcommand("cvat")]
    | Annotated[Voc, tyro.conf.subcommand("voc")]
    | Annotated[Masks, tyro.conf.subcommand("masks")]
)


def main() -> None:
    convert(tyro.cli(Format, prog="python -m mrcnn_jax.commands.convert", description=__doc__))  # type: ignore[arg-type]


if __name__ == "__main__":
    cli.run(main)
