"""Draw the report's figures from the folders of runs.

    mrcnn figures proposals runs/fpn runs/c4 --out figures/ [--titles FPN C4]

One column per run, with the same validation images in each:

    proposals     the RPN's proposals, and the objects that they reach and miss (figure 1)
    masks         masks of the same objects from their ground-truth boxes, zoomed, with their IoU
                  (figures 2, 3)
    detections    detections with masks beside the ground truth (figure 7)

Of one run:

    rpn_targets   the anchors that the RPN is trained on, one panel per level (figure 5)
    box_targets   the boxes that the box head is trained on, and where their targets lead (figure 6)
    curves        every loss in training and validation, one figure per stage
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import Loss

if TYPE_CHECKING:
    from mrcnn_jax.data.loader import Split
    from mrcnn_jax.runs.run import Run

Name = Literal["proposals", "masks", "detections", "rpn_targets", "box_targets", "curves"]
# The head that a figure needs trained.
NEEDS: dict[Name, Loss] = {
    "proposals": "rpn",
    "box_targets": "rpn",
    "masks": "mask",
    "detections": "box",
}
OF_ONE_RUN = ("rpn_targets", "box_targets", "curves")


@dataclass(frozen=True)
class Arguments:
    name: tyro.conf.Positional[Name]
    """Which figure."""
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path
    """The folder of the pages."""
    titles: tuple[str, ...] = ()
    """Titles of the columns; by default the names of the runs' folders."""
    images: tuple[int, ...] = ()
    """COCO ids of the images to show; by default some from all over the validation images."""
    count: int = 6
    """How many images are shown."""


def run(arguments: Arguments) -> None:
    """Draws, and prints the pages."""
    print("\n".join(map(str, draw(arguments))))


def draw(arguments: Arguments) -> list[Path]:
    """The pages that were written.

    Raises:
        ConfigError: the runs cannot be shown, or not beside each other.
    """
    from mrcnn_jax.figures import views
    from mrcnn_jax.figures.comparison import detections_figure, proposals_figure
    from mrcnn_jax.figures.curves import curves
    from mrcnn_jax.figures.mask_comparison import masks_figure
    from mrcnn_jax.figures.panels import stage_panels
    from mrcnn_jax.figures.targets import box_targets_figure, rpn_targets_figure
    from mrcnn_jax.runs.checkpoints import Checkpoints
    from mrcnn_jax.runs.logs import METRICS
    from mrcnn_jax.runs.metrics import read_metrics
    from mrcnn_jax.runs.run import make_folder

    name, out = arguments.name, arguments.out
    titles = column_titles(arguments)
    if name == "curves":
        (folder,) = arguments.runs
        checkpoints = Checkpoints(folder, keep=1)
        if (meta := checkpoints.latest()) is not None:
            checkpoints.refuse_damaged_log(meta, METRICS)
        rows = read_metrics(folder)
        if not stage_panels(rows):
            raise ConfigError(f"{folder}: no loss is recorded yet")
        make_folder(out)
        return curves(rows, out)
    opened = open_runs(arguments)
    run, split = opened[0]
    indices = views.choose(split, arguments.count, arguments.images, with_mask=name == "masks")
    make_folder(out)
    if name == "rpn_targets":
        return rpn_targets_figure(views.rpn_ground_truth(run, split, indices), out)
    if name == "box_targets":
        return box_targets_figure(
            views.box_ground_truth(run, split, indices), split.dataset.class_names, out
        )
    pixels = views.read_images(split, indices, run.config.data)
    columns = list(zip(titles, opened, strict=True))
    if name == "proposals":
        found = {title: views.proposals(*one, indices) for title, one in columns}
        return proposals_figure(pixels, found, views.truth_boxes(split, indices), out)
    truth = views.annotations_of(split, indices)
    if name == "detections":
        seen = {title: views.detections(*one, indices) for title, one in columns}
        return detections_figure(pixels, truth, seen, run.class_names, out)
    objects = [views.largest_object(split.dataset.images[i]) for i in indices]
    shown = [
        next(a for a in here if a["id"] == record.annotation_id)
        for here, record in zip(truth, objects, strict=True)
    ]
    masks = {title: views.masks_of(*one, indices, objects) for title, one in columns}
    return masks_figure(pixels, shown, masks, run.class_names, out)


def column_titles(arguments: Arguments) -> tuple[str, ...]:
    """One title per run; ConfigError for a wrong number of runs or titles, or two equal ones."""
    runs, titles = arguments.runs, arguments.titles
    if not runs:
        raise ConfigError(f"{arguments.name}: which run's folder?")
    if arguments.name in OF_ONE_RUN and len(runs) > 1:
        raise ConfigError(f"{arguments.name}: of one run, but {len(runs)} are given")
    if arguments.count < 1:
        raise ConfigError(f"--count: {arguments.count}: must be at least 1")
    if titles and len(titles) != len(runs):
        raise ConfigError(f"--titles: {len(titles)} for {len(runs)} runs")
    if not titles:
        folders = [Path(os.path.abspath(run)) for run in runs]
        above = Path(os.path.commonpath([folder.parent for folder in folders]))
        titles = tuple(folder.relative_to(above).as_posix() for folder in folders)
    twice = [title for title, number in Counter(titles).items() if number > 1]
    if twice:
        raise ConfigError(f"--titles: two columns are named {twice[0]!r}")
    return titles


def open_runs(arguments: Arguments) -> list[tuple[Run, Split]]:
    """Runs with their validation images; ConfigError if one lacks the head, or differs in data."""
    from mrcnn_jax.runs.run import load_run, open_data

    first_folder, need = arguments.runs[0], NEEDS.get(arguments.name)
    runs: list[Run] = []
    for folder in arguments.runs:
        run = load_run(folder)
        if need is not None and need not in run.trained:
            raise ConfigError(
                f"{folder}: {arguments.name}: its {need} head is not trained yet "
                f"(checkpoint {run.meta.name})"
            )
        if runs and run.meta.categories != runs[0].meta.categories:
            raise ConfigError(f"{folder}: has other categories than {first_folder}")
        runs.append(run)
    splits = [open_data(*pair, "val") for pair in zip(runs, arguments.runs, strict=True)]
    truth = splits[0].dataset.to_coco()
    for folder, split in zip(arguments.runs[1:], splits[1:], strict=True):
        if split.dataset.to_coco() != truth:
            raise ConfigError(f"{folder}: has other validation data than {first_folder}")
    return list(zip(runs, splits, strict=True))
