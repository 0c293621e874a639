"""Objects that were found, as annotations that tools open and `mrcnn convert` reads again.

Outlines are those of `pixels.outlines`. Neither format has a polygon with a hole: labelme gets such
an object as a mask. YOLO has one polygon per object: parts and holes are joined by seams of no
width. An object whose mask has no pixel is a box, in YOLO beside polygons one of four corners.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float

from mrcnn_jax.pixels.outlines import joined, outlines, signed_area
from mrcnn_jax.pixels.rle import decoded_region

# Compressed: of large images, pixels of all masks would not fit into memory.
Masks = Iterable[dict[str, Any] | None]
Boxes = Float[np.ndarray, "n 4"]


def labelme_content(
    image: str,
    size: tuple[int, int],
    names: Sequence[str],
    boxes: Boxes,
    masks: Masks,
    scores: Sequence[float],
) -> dict[str, Any]:
    """The content of labelme's JSON file of an image.

    Several parts of one object share a group_id. The score is in the description.

    Args:
        image: where the image is from the JSON file.
        size: (height, width) in pixels.
        names: the class of each object.
        boxes: (x1, y1, x2, y2) of each object in pixels.
        masks: of each object, as a compressed RLE of the image; None: it has no mask.
        scores: of each object, probabilities.
    """
    shapes = []
    for number, (name, box, rle, score) in enumerate(
        zip(names, boxes.tolist(), masks, scores, strict=True), 1
    ):
        base: dict[str, Any] = {
            "label": name,
            "description": f"{score:.3f}",
            "flags": {},
            "mask": None,
        }
        mask, (y, x) = decoded_region(rle)
        loops = outlines(mask)
        if not loops:
            points = [[box[:2], box[2:]]]
            kind, group = "rectangle", None
        elif min(map(signed_area, loops)) < 0:
            last = [x + mask.shape[1] - 1, y + mask.shape[0] - 1]
            points, kind, group = [[[x, y], last]], "mask", None
            base["mask"] = _png(mask)
        else:
            points, kind = [(loop + np.array([x, y])).tolist() for loop in loops], "polygon"
            group = number if len(loops) > 1 else None
        shapes += [
            base | {"points": part, "group_id": group, "shape_type": kind} for part in points
        ]
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": image,
        "imageData": None,
        "imageHeight": size[0],
        "imageWidth": size[1],
    }


def yolo_lines(
    size: tuple[int, int],
    classes: Sequence[int],
    boxes: Boxes,
    masks: Masks,
    *,
    corners: bool,
) -> list[str]:
    """The lines of YOLO's label file of an image.

    Ultralytics reads the four numbers of a box as two points where the file has a polygon, too, and
    drops all polygons of a data set that has boxes: so it has to be one or the other.

    Args:
        size: (height, width) in pixels.
        classes: of each object, from 0.
        boxes: (x1, y1, x2, y2) of each object in pixels.
        masks: of each object, as a compressed RLE of the image; None: it has no mask.
        corners: an object without a pixel is a polygon of four points, not a box of four numbers.
    """
    height, width = size
    lines = []
    for number, (x1, y1, x2, y2), rle in zip(classes, boxes.tolist(), masks, strict=True):
        mask, (y, x) = decoded_region(rle)
        loops = outlines(mask)
        if loops:
            points = joined(loops) + np.array([x, y])
        elif corners:
            points = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
        else:
            points = np.array([[(x1 + x2) / 2, (y1 + y2) / 2], [x2 - x1, y2 - y1]])
        shares = (points / (width, height)).ravel().tolist()
        lines.append(" ".join([str(number), *(f"{share:.6f}" for share in shares)]))
    return lines


def data_yaml(names: Sequence[str], *parts: str) -> str:
    """The content of YOLO's data.yaml.

    Args:
        names: of the classes 0, 1, 2, ...
        parts: "train", "val", each a folder of images/; none: images/ itself is both, since
            Ultralytics refuses a file that lacks one.
    """
    both = ["train: images\n", "val: images  # the same: name others to measure by\n"]
    folders = [f"{part}: images/{part}\n" for part in parts] or both
    quoted = (json.dumps(name, ensure_ascii=False) for name in names)
    classes = [f"  {number}: {name}\n" for number, name in enumerate(quoted)]
    return "".join([*folders, "names:\n", *classes])


def _png(mask: Bool[np.ndarray, "h w"]) -> str:
    """A mask as a PNG of 0 and 1, base64, as labelme keeps it."""
    done, encoded = cv2.imencode(".png", mask.astype(np.uint8))
    assert done, mask.shape
    return base64.b64encode(encoded.tobytes()).decode("ascii")
