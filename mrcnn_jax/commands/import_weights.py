"""Convert weights of torchvision or detectron2 into the folder of a run.

    python -m mrcnn_jax.commands.import_weights import SOURCE --out DIR [--categories coco.json] [--norm-epsilon
    1e-5]

SOURCE (.pth, .pt, .pkl, .safetensors or .npz) is torchvision's ResNet-18/34/50/101,
maskrcnn_resnet50_fpn or maskrcnn_resnet50_fpn_v2, or detectron2's mask_rcnn_R_50_FPN or
mask_rcnn_R_50_C4. eval.py, predict.py and train.py --init-from take DIR as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mrcnn_jax import cli


@dataclass(frozen=True)
class Arguments:
    command: tyro.conf.Positional[Literal["import"]]
    source: tyro.conf.Positional[Path]
    """The weights file."""
    out: Path
    """The new run's folder."""
    categories: Path | None = None
    """A COCO json whose categories are the classes of the file; by default COCO's, where it has as
    many."""
    norm_epsilon: float | None = None
    """Of the ResNet's batch norm; by default that of the published files."""


def main() -> None:
    arguments = tyro.cli(
        Arguments, prog="python -m mrcnn_jax.commands.import_weights", description=__doc__
    )
    from mrcnn_jax.weights.importer import import_weights

    import_weights(
        arguments.source,
        arguments.out,
        categories=arguments.categories,
        norm_epsilon=arguments.norm_epsilon,
    )


if __name__ == "__main__":
    cli.run(main)
