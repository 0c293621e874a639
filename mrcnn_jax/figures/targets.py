"""The training targets of the RPN and the box head (figures 5 and 6 of the report)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float

from mrcnn_jax.figures.draw import PALETTE, Color, Image, darkened, rectangle, resized
from mrcnn_jax.figures.png_pages import drawn_size, row_of_columns, write_pages
from mrcnn_jax.figures.views import Boxes, BoxTargets, Canvas, LevelTargets

TRUTH: Color = (255, 255, 255)
POSITIVE: Color = (40, 230, 90)
NEGATIVE: Color = (180, 180, 180)
BEYOND: Color = (70, 70, 70)  # around the image
SHOWN_NEGATIVES = 10  # of each level
SMALL = 30  # pixels on the page


def rpn_targets_figure(
    targets: Sequence[tuple[Canvas, Sequence[LevelTargets]]], out_dir: Path
) -> list[Path]:
    """Draw each image's objects, and a panel for each level with the anchors sampled for the loss.

    Args:
        targets: of each image (`views.rpn_ground_truth`), in canvas pixels.
        out_dir: folder of the pages, created if need be.

    Returns:
        The pages, one for each image: `rpn_targets_1.png`, `rpn_targets_2.png`, ...
    """
    cells: list[Image] = []
    panels = 1 + len(targets[0][1])
    columns = min(panels, 3)
    for canvas, levels in targets:
        shown = np.concatenate([canvas.truth, *(level.positive for level in levels)])
        page = _Page(canvas.image, shown, columns)
        truth = (canvas.truth, TRUTH, 2)
        layers = {f"ground truth ({len(canvas.truth)})": [truth]}
        for level in levels:
            title = (
                f"{level.name}: {len(level.positive)} of {level.positives} positive, "
                f"{len(level.negative)} of {level.negatives:,} negative"
            )
            negative = (level.negative[:SHOWN_NEGATIVES], NEGATIVE, 1)
            layers[title] = [negative, truth, (level.positive, POSITIVE, 2)]
        cells += [
            row_of_columns([page.drawn(layer)], [title], columns) for title, layer in layers.items()
        ]
    colors = {
        "object": TRUTH,
        "positive anchor in the loss": POSITIVE,
        f"negative anchor in the loss (at most {SHOWN_NEGATIVES} of a level are shown)": NEGATIVE,
    }
    return write_pages(
        cells, out_dir, "rpn_targets", rows=-(-panels // columns), columns=columns, colors=colors
    )


def box_targets_figure(
    targets: Sequence[tuple[Canvas, BoxTargets]], class_names: Sequence[str], out_dir: Path
) -> list[Path]:
    """Draw the boxes sampled for the loss, coloured by class, and where their targets move them.

    Args:
        targets: of each image (`views.box_ground_truth`), in canvas pixels.
        class_names: of labels 1, 2, ...
        out_dir: folder of the pages, created if need be.

    Returns:
        The pages, of two images each: `box_targets_1.png`, `box_targets_2.png`, ...
    """
    rows = []
    for canvas, (boxes, labels, taken_to) in targets:
        page = _Page(canvas.image, np.concatenate([boxes, canvas.truth]), 2)
        foreground = np.flatnonzero(labels > 0)
        colored = [(boxes[i][None], class_color(labels[i])) for i in foreground]
        background = boxes[labels == 0]
        sampled = page.drawn([(background, NEGATIVE, 1), *((*one, 2) for one in colored)])
        moved = page.drawn([*((*one, 1) for one in colored), (taken_to[foreground], TRUTH, 2)])
        for i in foreground:
            page.arrows(moved, boxes[i], taken_to[i], class_color(labels[i]))
        titles = (
            f"{len(boxes)} boxes: {len(foreground)} foreground, {len(background)} background",
            "the foreground, and where its targets take it",
        )
        rows.append(row_of_columns([sampled, moved], titles, 2))
    present = sorted({int(label) for _, found in targets for label in found.labels if label > 0})
    colors = {class_names[label - 1]: class_color(label) for label in present}
    colors |= {"background": NEGATIVE, "box that the targets lead to": TRUTH}
    return write_pages(rows, out_dir, "box_targets", rows=2, colors=colors)


def class_color(label: int) -> Color:
    """The colour of a label 1, 2, ..."""
    return PALETTE[(int(label) - 1) % len(PALETTE)]


class _Page:
    """An image scaled to its column, with a border for the boxes that reach beyond it.

    The border is at most a quarter of the longer side wide.
    """

    def __init__(self, image: Image, boxes: Boxes, columns: int) -> None:
        height, width = image.shape[:2]
        beyond = np.concatenate([-boxes[:, :2], boxes[:, 2:] - [width, height]]).max(
            axis=0, initial=0
        )
        x, y = np.ceil(np.minimum(beyond, max(height, width) / 4)).astype(int).tolist()
        wide = np.full((height + 2 * y, width + 2 * x, 3), BEYOND, np.uint8)
        wide[y : y + height, x : x + width] = darkened(image)
        size = drawn_size(wide, columns)
        self.image = resized(wide, size)
        self.corner = np.array([x, y] * 2)
        self.scale = np.array([size[1] / wide.shape[1], size[0] / wide.shape[0]] * 2)

    def place(self, boxes: Boxes) -> Float[np.ndarray, "_ 4"]:
        return (boxes + self.corner) * self.scale

    def drawn(self, layers: Sequence[tuple[Boxes, Color, int]]) -> Image:
        """A copy with boxes on it, each layer with a colour and a thickness."""
        canvas = self.image.copy()
        for boxes, color, thickness in layers:
            for box in self.place(boxes):
                small = (box[2:] - box[:2]).min() < SMALL  # thick lines would fill it
                rectangle(canvas, box, color, 1 if small else thickness)
        return canvas

    def arrows(
        self,
        canvas: Image,
        box: Float[np.ndarray, " 4"],
        target: Float[np.ndarray, " 4"],
        color: Color,
    ) -> None:
        """Draw arrows from two corners of a box to those of its target, in place."""
        start, end = (
            np.round(self.place(corners)).astype(int).tolist() for corners in (box, target)
        )
        for corner in (slice(0, 2), slice(2, 4)):
            a, b = start[corner], end[corner]
            if a != b:
                tip = min(1.0, 6 / np.hypot(b[0] - a[0], b[1] - a[1]))
                cv2.arrowedLine(canvas, a, b, color, 1, cv2.LINE_AA, tipLength=tip)
