"""Import weights of torchvision, detectron2 or mmdetection as the folder of a run.

    mrcnn import weights.pth --out runs/tv [--categories coco.json] [--data.short-side 640 ...]
    mrcnn import torchvision-coco-v1 --download --out runs/coco

The file (.pth, .pt, .pkl, .pth.tar, .safetensors or .npz) holds a ResNet-18/34/50/101 of
torchvision, timm or a self-supervised project, a ConvNeXt of timm, torchvision or its authors, or a
Mask R-CNN of torchvision, detectron2 or mmdetection; docs/weights.md lists them. eval and predict
take the new folder. A name of published weights (docs/weights.md) stands for their file. To train
from a file, give it to `train --weights` as it is.

What a file does not state is presumed to be as published, and printed: sizes and pixels of images,
anchors, and where blocks stride. Options of the same names change it, as does any field of the
network, `--model.*`, if the tensors still fit. Below, its values are those of torchvision's
maskrcnn_resnet50_fpn; only what is given replaces those of the file's own network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import tyro

from mrcnn_jax.commands.arguments import fields_given
from mrcnn_jax.config.files import values_of
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import Config, Shrink
from mrcnn_jax.config.tables import TORCHVISION


@dataclass(frozen=True)
class _Images:
    """How images are put on canvases; None: as presumed."""

    short_side: int | None = None
    """An image is resized until its short side is this, or its long side is `long_side`, whichever
    comes first (pixels); presumably 800."""
    long_side: int | None = None
    """Most pixels of the long side after resizing; presumably 1333."""
    canvases: tuple[tuple[int, int], ...] | None = None
    """(height, width) of the canvases, multiples of 32; by default those for the sides, lying and
    upright."""
    shrink: Shrink | None = None
    """How images are made smaller; presumably as the project does it."""


@dataclass(frozen=True)
class _Network(ModelConfig):
    def __post_init__(self) -> None:
        """Checks nothing: fields have to go together in the file's network."""


@dataclass(frozen=True, kw_only=True)
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
    channel_order: Literal["rgb", "bgr"] | None = None
    """Of the images that the network was trained on; presumably as the project reads them. A run
    reads RGB: the first kernel is turned for it, and model.pixel_mean and pixel_std are those of
    red, green and blue."""
    data: _Images = _Images()
    model: _Network = _Network(**vars(TORCHVISION))


@dataclass(frozen=True)
class Request:
    """A command line."""

    arguments: Arguments
    values: Mapping[str, Any]
    """The fields of a config that were given, by dotted name."""


def parse(argv: Sequence[str], program: str) -> Request:
    """The arguments, and which of them are fields that replace those of the file's network."""
    arguments = tyro.cli(Arguments, args=argv, prog=program, description=__doc__)
    names = [name for name in fields_given(argv) if name.startswith("model.")]
    values = values_of(Config(model=arguments.model), sorted(names))
    for field in fields(arguments.data):
        if (value := getattr(arguments.data, field.name)) is not None:
            values[f"data.{field.name}"] = value
    return Request(arguments, values)


def run(request: Request) -> None:
    """Writes the run and prints what went into it; see `weights.importer.import_weights`."""
    from mrcnn_jax.runs.run import refuse_taken
    from mrcnn_jax.weights.importer import import_weights
    from mrcnn_jax.weights.published import locate

    arguments = request.arguments
    source = arguments.source
    refuse_taken(arguments.out)  # before anything is fetched
    if arguments.download or not source.exists():
        source = locate(str(source), download=arguments.download, option="")
    import_weights(
        source,
        arguments.out,
        categories=arguments.categories,
        values=request.values,
        channel_order=arguments.channel_order,
    )
