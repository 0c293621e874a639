"""What the RPN and the box head are trained towards (the report's figures 5 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float

from mrcnn_jax.figures.draw import PALETTE, Color, Image, darkened, rectangle, resized, side_by_side
from mrcnn_jax.figures.png_pages import column_width, drawn_size, write_pages
from mrcnn_jax.figures.views import Boxes, BoxTargets, Canvas, LevelTargets

TRUTH: Color = (255, 255, 255)
POSITIVE: Color = (40, 230, 90)
NEGATIVE: Color = (180, 180, 180)
BEYOND: Color = (70, 70, 70)  # around the image
SHOWN_NEGATIVES = 10  # a level
SMALL = 30  # pixels as drawn


def rpn_targets_figure(
    targets: Sequence[tuple[Canvas, Sequence[LevelTargets]]], out_dir: Path
) -> list[Path]:
    """For each image the objects, and a panel a level: the anchors drawn as positive, and the first
    SHOWN_NEGATIVES of the negative ones.

    Returns:
        The pages, one an image: `rpn_targets_1.png`, `rpn_targets_2.png`, ...
    """
    cells: list[Image] = []
    panels = 1 + len(targets[0][1])
    columns = min(panels, 3)
    for canvas, levels in targets:
        page = _Page(
            canvas.image,
            np.concatenate([canvas.truth, *(level.positive for level in levels)]),
            columns,
        )
        cells.append(
            _panel(
                page.drawn([(canvas.truth, TRUTH, 2)]),
                f"ground truth ({len(canvas.truth)})",
                columns,
            )
        )
        for level in levels:
            positive, negative = level.positive, level.negative[:SHOWN_NEGATIVES]
            title = f"{level.name}: {len(positive)} of {level.positives} positive, {len(level.negative)} of {level.negatives:,} negative"
            layers = [(negative, NEGATIVE, 1), (canvas.truth, TRUTH, 2), (positive, POSITIVE, 2)]
            cells.append(_panel(page.drawn(layers), title, columns))
    colors = {
        "object": TRUTH,
        "positive anchor drawn for the loss": POSITIVE,
        f"negative anchor drawn for the loss (at most {SHOWN_NEGATIVES} a level are shown)": NEGATIVE,
    }
    return write_pages(
        cells, out_dir, "rpn_targets", rows=-(-panels // columns), columns=columns, colors=colors
    )


def box_targets_figure(
    targets: Sequence[tuple[Canvas, BoxTargets]], class_names: Sequence[str], out_dir: Path
) -> list[Path]:
    """For each image the boxes drawn for the loss by the class they are given, and where the
    regression targets take the foreground.

    Args:
        class_names: of labels 1, 2, ...

    Returns:
        The pages, of two images each: `box_targets_1.png`, `box_targets_2.png`, ...
    """
    rows = []
    for canvas, (boxes, labels, taken_to) in targets:
        page = _Page(canvas.image, np.concatenate([boxes, canvas.truth]), 2)
        foreground = np.flatnonzero(labels > 0)
        layers = [(boxes[labels == 0], NEGATIVE, 1)]
        layers += [(boxes[i][None], class_color(labels[i]), 2) for i in foreground]
        moved = page.drawn(
            [
                *((boxes[i][None], class_color(labels[i]), 1) for i in foreground),
                (taken_to[foreground], TRUTH, 2),
            ]
        )
        for i in foreground:
            page.arrows(moved, boxes[i], taken_to[i], class_color(labels[i]))
        titles = (
            f"{len(boxes)} boxes: {len(foreground)} foreground, {len(boxes) - len(foreground)} background",
            "the foreground, and where its targets take it",
        )
        rows.append(side_by_side([page.drawn(layers), moved], titles, column_width(2)))
    present = sorted({int(label) for _, found in targets for label in found.labels if label > 0})
    colors = {class_names[label - 1]: class_color(label) for label in present}
    colors |= {"background": NEGATIVE, "box that the targets lead to": TRUTH}
    return write_pages(rows, out_dir, "box_targets", rows=2, colors=colors)


def class_color(label: int) -> Color:
    """Of labels 1, 2, ..."""
    return PALETTE[(int(label) - 1) % len(PALETTE)]


class _Page:
    """An image as it is drawn in a column; its borders are as wide as boxes reach beyond them, a
    quarter of its longer side at most."""

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
        """A copy with boxes of a colour and thickness each; those of small boxes are thin, or they
        would be filled."""
        canvas = self.image.copy()
        for boxes, color, thickness in layers:
            for box in self.place(boxes):
                rectangle(
                    canvas, box, color, thickness if (box[2:] - box[:2]).min() >= SMALL else 1
                )
        return canvas

    def arrows(
        self,
        canvas: Image,
        box: Float[np.ndarray, " 4"],
        target: Float[np.ndarray, " 4"],
        color: Color,
    ) -> None:
        """From two corners of a box to those of its target, in place."""
        start, end = (
            np.round(self.place(corners)).astype(int).tolist() for corners in (box, target)
        )
        for x, y in ((0, 1), (2, 3)):
            if (start[x], start[y]) != (end[x], end[y]):
                length = np.hypot(end[x] - start[x], end[y] - start[y])
                cv2.arrowedLine(
                    canvas,
                    (start[x], start[y]),
                    (end[x], end[y]),
                    color,
                    1,
                    cv2.LINE_AA,
                    tipLength=min(1.0, 6 / length),
                )


def _panel(image: Image, title: str, columns: int) -> Image:
    return side_by_side([image], [title], column_width(columns))
