"""Evaluate a run: COCO box and mask AP, proposal recall and pictures, from the run's folder alone.

    python eval.py --workdir runs/a [--split train --limit 50] [--annotations x.json --images dir/]
    [--checkpoint best]

Writes eval/metrics.json, eval/detections.json (COCO results), figures/, and eval/report.html: all
of it on one page for a browser. Where the run has a moving average of its weights, eval_ema/ has
the same of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mrcnn_jax import cli
from mrcnn_jax.config.schema import DistributedConfig


@dataclass(frozen=True)
class Arguments:
    workdir: Path
    """The run's folder."""
    checkpoint: Literal["newest", "best"] = "newest"
    """best: the one of the highest mask AP, of a run with --evaluate-every-epochs."""
    split: Literal["val", "train"] = "val"
    limit: int | None = None
    """Only the first images of the split."""
    annotations: Path | None = None
    """Another COCO json than the run's own; goes with --images."""
    images: Path | None = None
    figures: int = 8
    """Images that are drawn."""
    report_images: int = 60
    """Images in report.html: half of them the worst, half the best."""
    boundary: bool = False
    """Also boundary AP, by which masks are judged at their outlines (Cheng et al. 2021). It takes a
    while on many images."""
    out: Path | None = None
    """Where the results go: by default <workdir>/eval, or <workdir>/eval_train for the training
    images."""
    distributed: DistributedConfig = DistributedConfig()


def main() -> None:
    arguments = tyro.cli(Arguments, prog=cli.program(), description=__doc__)
    from mrcnn_jax import parallel
    from mrcnn_jax.commands.evaluate import evaluate_weights

    parallel.join(arguments.distributed)
    evaluate_weights(
        arguments.workdir,
        split_name=arguments.split,
        limit=arguments.limit,
        annotations=arguments.annotations,
        images=arguments.images,
        figures=arguments.figures,
        report_images=arguments.report_images,
        boundary=arguments.boundary,
        out=arguments.out,
        checkpoint=arguments.checkpoint,
    )


def command() -> None:
    cli.run(main)


if __name__ == "__main__":
    command()
