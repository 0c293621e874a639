"""Draw the report's figures from the folders of runs.

    python -m mrcnn_jax.commands.figures proposals runs/fpn runs/c4 --out figures/ [--titles FPN C4]
    [--images ID ...] [--count 6]

One column a run, the same validation images in each:
    proposals     the RPN's proposals, and the objects they reach and miss (figure 1)
    masks         the masks of the same objects from their ground-truth boxes, zoomed, with their
    IoU (figures 2, 3) detections    detections with masks beside the ground truth (figure 7)

Of one run:
    rpn_targets   the anchors that the RPN is trained on, a panel a level (figure 5)
    box_targets   the boxes that the box head is trained on, and where their targets lead (figure 6)
    curves        every loss in training and validation, a figure a stage
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import Loss

if TYPE_CHECKING:
    from mrcnn_jax.data.loader import Split
    from mrcnn_jax.runs.run import Run

Name = Literal["proposals", "masks", "detections", "rpn_targets", "box_targets", "curves"]
NEEDS: dict[Name, Loss] = {
    "proposals": "rpn",
    "box_targets": "rpn",
    "masks": "mask",
    "detections": "mask",
}  # which head trained
OF_ONE_RUN = ("rpn_targets", "box_targets", "curves")


@dataclass(frozen=True)
class Arguments:
    name: tyro.conf.Positional[Name]
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path
    """Where the pages go."""
    titles: tuple[str, ...] = ()
    """Of the columns; by default the names of the runs' folders."""
    images: tuple[int, ...] = ()
    """COCO ids of the images that are shown; by default from all over the validation images."""
    count: int = 6
    """How many images are shown."""


def draw(arguments: Arguments) -> list[Path]:
    """The pages that were written; ConfigError if the runs cannot be shown, or not beside each
    other."""
    # Late: importing jax takes seconds, and a typo should not wait for it.
    from mrcnn_jax.figures import views
    from mrcnn_jax.figures.comparison import detections_figure, proposals_figure
    from mrcnn_jax.figures.curves import curves
    from mrcnn_jax.figures.mask_comparison import masks_figure
    from mrcnn_jax.figures.targets import box_targets_figure, rpn_targets_figure
    from mrcnn_jax.runs.metrics import read_metrics
    from mrcnn_jax.runs.run import make_folder

    name, out = arguments.name, arguments.out
    titles = column_titles(arguments)
    if name == "curves":
        make_folder(out)
        return curves(read_metrics(arguments.runs[0]), out)
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
    """One a run; ConfigError for a wrong number of runs or titles, or the same twice."""
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
        folders = [run.resolve() for run in runs]
        above = Path(os.path.commonpath([folder.parent for folder in folders]))
        titles = tuple(folder.relative_to(above).as_posix() for folder in folders)
    twice = [title for title, number in Counter(titles).items() if number > 1]
    if twice:
        raise ConfigError(f"--titles: two columns are named {twice[0]!r}")
    return titles


def open_runs(arguments: Arguments) -> list[tuple[Run, Split]]:
    """Runs with their validation images; ConfigError if one has not trained what is to be shown, or
    its images are others."""
    from mrcnn_jax.commands.evaluate import open_data
    from mrcnn_jax.runs.run import load_run

    need = NEEDS.get(arguments.name)
    runs: list[Run] = []
    for folder in arguments.runs:
        run = load_run(folder)
        if need is not None and need not in run.trained:
            raise ConfigError(
                f"{folder}: {arguments.name}: its {need} head is not trained yet (checkpoint {run.meta.name})"
            )
        if runs and run.meta.categories != runs[0].meta.categories:
            raise ConfigError(f"{folder}: has other categories than {arguments.runs[0]}")
        runs.append(run)
    opened = [
        (run, open_data(run, folder, "val"))
        for run, folder in zip(runs, arguments.runs, strict=True)
    ]
    first = opened[0][1].dataset
    for folder, (_, split) in zip(arguments.runs, opened, strict=True):
        if split.dataset.to_coco() != first.to_coco():
            raise ConfigError(f"{folder}: has other validation data than {arguments.runs[0]}")
    return opened


def main() -> None:
    pages = draw(
        tyro.cli(Arguments, prog="python -m mrcnn_jax.commands.figures", description=__doc__)
    )
    print("\n".join(map(str, pages)))


if __name__ == "__main__":
    cli.run(main)
