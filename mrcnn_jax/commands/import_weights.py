"""Import weights of torchvision, detectron2 or mmdetection as the folder of a run.

    mrcnn import weights.pth --out runs/tv [--categories coco.json] [--norm-epsilon 1e-5]
    mrcnn import torchvision-coco-v1 --download --out runs/coco

The file (.pth, .pt, .pkl, .pth.tar, .safetensors or .npz) holds a ResNet-18/34/50/101 of
torchvision, timm or a self-supervised project, a ConvNeXt of timm, torchvision or its authors, or a
Mask R-CNN of torchvision, detectron2 or mmdetection; docs/weights.md lists them. eval and predict
take the new folder. A name of published weights (docs/weights.md) stands for their file. To train
from a file, give it to `train --weights` as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Arguments:
    source: tyro.conf.Positional[Path]
    """The weights file, or the name of published ones."""
    out: Path
    """The new run's folder."""
    categories: Path | None = None
    """A COCO annotation file whose categories are the classes of the weights; by default the names
    that the file itself states (mmdetection's), else COCO's, if the weights have as many."""
    download: bool = False
    """Fetch the published weights of that name, unless that was done before."""
    norm_epsilon: float | None = None
    """Epsilon of the ResNet's batch norm; by default that of the published weights, and
    1e-5 where these have another depth."""


def run(arguments: Arguments) -> None:
    """Writes the run and prints what went into it; see `weights.importer.import_weights`."""
    from mrcnn_jax.runs.run import refuse_taken
    from mrcnn_jax.weights.importer import import_weights
    from mrcnn_jax.weights.published import locate

    source = arguments.source
    refuse_taken(arguments.out)  # before anything is fetched
    if arguments.download or not source.exists():
        source = locate(str(source), download=arguments.download, option="")
    import_weights(
        source,
        arguments.out,
        categories=arguments.categories,
        norm_epsilon=arguments.norm_epsilon,
    )
