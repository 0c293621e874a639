"""Detect and segment objects in images and folders of images with a trained run.

    python predict.py --workdir runs/a image.jpg folder/ --out out/ [--checkpoint best] [--weights
    ema]

Writes out/detections.json (COCO results, with the file's name) and one overlay an image.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mrcnn_jax import cli


@dataclass(frozen=True)
class Arguments:
    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Images, and folders of images."""
    workdir: Path
    """The run's folder."""
    checkpoint: Literal["newest", "best"] = "newest"
    """best: the one of the highest mask AP, of a run with --evaluate-every-epochs."""
    weights: Literal["raw", "ema"] = "raw"
    """ema: their moving average, of a run with ema_decay."""
    out: Path = Path("predictions")
    min_score: float = 0.5
    """Detections below it are not drawn (detections.json has them all)."""


def main() -> None:
    arguments = tyro.cli(Arguments, prog=cli.program(), description=__doc__)
    from mrcnn_jax.commands.predict_files import predict_files

    failed = predict_files(
        arguments.workdir,
        arguments.paths,
        out=arguments.out,
        min_score=arguments.min_score,
        checkpoint=arguments.checkpoint,
        weights=arguments.weights,
    )
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(2 if failed else 0)


def command() -> None:
    cli.run(main)


if __name__ == "__main__":
    command()
