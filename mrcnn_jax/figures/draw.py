"""Draw boxes, masks and labels into images, which are uint8 RGB [H, W, 3]."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from pycocotools import mask as coco_mask

from mrcnn_jax.evaluation.average_precision import mask_score
from mrcnn_jax.pixels.geometry import check_image
from mrcnn_jax.pixels.rle import moved_rle, segmentation_rle

Image = UInt8[np.ndarray, "h w 3"]
T = TypeVar("T")
Color = tuple[int, int, int]

# Objects take turns with these: light enough for black text, and unlike each other and unlike
# grass, sky and skin.
PALETTE: tuple[Color, ...] = (
    (255, 99, 71),
    (64, 196, 255),
    (255, 214, 10),
    (190, 130, 255),
    (60, 220, 130),
    (255, 130, 200),
    (255, 160, 40),
    (120, 230, 220),
    (170, 200, 255),
    (200, 230, 80),
)
CROWD: Color = (190, 190, 190)
NOTE: Color = (255, 255, 255)
PROPOSAL: Color = (255, 214, 10)
RECALLED: Color = (40, 230, 90)
MISSED: Color = (255, 50, 50)

# Smaller images are enlarged to this before drawing, or text would cover them; on larger ones lines
# and text grow with the image.
SHORT_SIDE = 480
ENLARGED_LONG_SIDE = 1920  # the limit: an image of one row would fill the memory
MARGIN = 6  # around an image on a page, in pixels
FONT, FONT_SCALE, TITLE_SCALE, INK = cv2.FONT_HERSHEY_SIMPLEX, 0.45, 0.55, (0, 0, 0)
# Labels that would together cover more than this share of an image are written smaller; where even
# the least text that can be read, by this factor, is too large, one line counts the objects.
LABEL_SHARE, LEAST_TEXT = 1 / 3, 0.75


def spread(candidates: Sequence[T], count: int) -> list[T]:
    """`count` of the candidates, or all of them if they are fewer, from all over."""
    count = min(count, len(candidates))
    return [candidates[i * len(candidates) // count] for i in range(count)]


def draw_instances(
    image: Image,
    instances: Sequence[Mapping[str, Any]],
    class_names: Mapping[int, str],
    size: tuple[int, int] | None = None,
    labels: Sequence[str] | None = None,
    *,
    min_score: float = 0.5,
) -> Image:
    """Draw objects over an image: tinted and outlined masks, boxes, and labels.

    Many labels are written smaller; too many are left out, which one line below then says, with the
    number of objects of each class.

    Args:
        image: uint8 RGB [H, W, 3].
        instances: COCO results or annotations in pixels of the image: bbox [x, y, width, height],
            category_id and, if there, score (or mask_score besides, which then counts),
            segmentation and iscrowd (drawn grey). The best scores are on top.
        class_names: category id -> name.
        size: (height, width) to draw at; by default the image's own, enlarged to a short side of
            SHORT_SIDE but a long side of at most ENLARGED_LONG_SIDE.
        labels: a text for each object; by default its class and, of results, the score and the
            `depth` in metres if it is known.
        min_score: results below it are left out.

    Returns:
        A new image.

    Raises:
        ValueError: the image is not uint8 RGB.
        KeyError: a category without a name.
    """
    check_image(image)
    canvas, scale = _canvas(image, size)
    texts = labels or [_text(instance, class_names) for instance in instances]
    kept = [i for i, one in enumerate(instances) if _score(one, 1.0) >= min_score]
    colors = [CROWD if instances[i].get("iscrowd") else PALETTE[i % len(PALETTE)] for i in kept]
    instances, texts = [instances[i] for i in kept], [texts[i] for i in kept]
    order = sorted(range(len(instances)), key=lambda i: _score(instances[i], 1.0))
    for i in order:
        if instances[i].get("segmentation"):
            rle = segmentation_rle(instances[i]["segmentation"], image.shape[:2])
            _tint_rle(canvas, rle, colors[i])
    for i in order:
        x, y, width, height = instances[i]["bbox"]
        rectangle(canvas, np.array([x, y, x + width, y + height]) * scale, colors[i], 2)
    style = _fitting_style(canvas, texts)
    if style is None:
        counts = Counter(class_label(instance, class_names) for instance in instances)
        classes = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        _draw_note(canvas, f"{len(texts)} objects, no room for labels: {classes}")
        return canvas
    placed: list[_Label] = []
    for i in reversed(order):
        x, y = instances[i]["bbox"][:2]
        corner = round(x * scale[0]), round(y * scale[1])
        placed.append(_placed_label(canvas, texts[i], corner, colors[i], placed, style))
    for label in reversed(placed):  # where they overlap after all, the best is legible
        _draw_label(canvas, label, style)
    return canvas


def class_label(instance: Mapping[str, Any], class_names: Mapping[int, str]) -> str:
    """The name of an object's class; of a crowd it says that too."""
    return class_names[instance["category_id"]] + (" (crowd)" if instance.get("iscrowd") else "")


def distance_label(metres: float | None) -> str:
    """A depth behind a blank, to end a label with; nothing if it is unknown."""
    return "" if metres is None or not math.isfinite(metres) else f" {metres:.2f} m"


def _score(instance: Mapping[str, Any], default: float) -> float:
    """Of a result; in a user's annotations, a field of another name may mean anything."""
    return mask_score(instance) if "score" in instance else default


def _text(instance: Mapping[str, Any], class_names: Mapping[int, str]) -> str:
    text = class_label(instance, class_names)
    if "score" in instance:
        text += f" {mask_score(instance):.2f}"
        # Of results alone: in a user's annotations, a field of that name may mean anything.
        text += distance_label(instance.get("depth"))
    return text


def draw_proposals(
    image: Image,
    boxes: Float[np.ndarray, "p 4"],
    scores: Float[np.ndarray, " p"],
    ground_truth: Float[np.ndarray, "g 4"],
    recalled: Bool[np.ndarray, " g"],
    size: tuple[int, int] | None = None,
) -> Image:
    """Draw proposals over an image, fainter at lower scores, with the ground truth on top of them.

    Args:
        image: uint8 RGB [H, W, 3].
        boxes: proposals (x1, y1, x2, y2) in pixels of the image.
        scores: their objectness in [0, 1].
        ground_truth: boxes (x1, y1, x2, y2) in pixels of the image, drawn as RECALLED or MISSED.
        recalled: whether some proposal reaches each of them (`evaluation.proposals.recalled`).
        size: as in `draw_instances`.

    Returns:
        A new image.
    """
    canvas, scale = _canvas(image, size)
    canvas = darkened(canvas)
    for i in np.argsort(scores, kind="stable"):
        layer = canvas.copy()
        rectangle(layer, boxes[i] * scale, PROPOSAL, 1)
        strength = float(np.clip(0.25 + 0.65 * scores[i], 0.25, 0.9))
        canvas = cv2.addWeighted(layer, strength, canvas, 1 - strength, 0)
    for box, hit in zip(ground_truth, recalled, strict=True):
        rectangle(canvas, box * scale, RECALLED if hit else MISSED, 2)
    return canvas


def side_by_side(images: Sequence[Image], titles: Sequence[str], width: int = 0) -> Image:
    """Put titled images in a row; white fills up their height, and each one's width to `width`."""
    height = max(image.shape[0] for image in images)
    return np.concatenate(
        [titled(image, title, height, width) for image, title in zip(images, titles, strict=True)],
        axis=1,
    )


def titled(image: Image, title: str, height: int = 0, width: int = 0) -> Image:
    """Put an image on white below its title; a title too long for the width is written smaller.

    White fills up the image's height and width to `height` and `width`, if they are more.
    """
    bar = 30
    height, width = max(height, image.shape[0]), max(width, image.shape[1])
    page = np.full((height + bar + MARGIN, width + 2 * MARGIN, 3), 255, np.uint8)
    page[bar : bar + image.shape[0], MARGIN : MARGIN + image.shape[1]] = image
    text_width = cv2.getTextSize(title, FONT, TITLE_SCALE, 1)[0][0]
    font = TITLE_SCALE * min(1.0, width / max(text_width, 1))
    cv2.putText(page, title, (MARGIN, 21), FONT, font, INK, 1, cv2.LINE_AA)
    return page


def legend(entries: Mapping[str, Color], width: int) -> Image:
    """Explain colours by a patch and a text each, in as many lines as `width` needs."""
    patch, step = 16, 26
    page = np.full((step * (len(entries) + 1), width, 3), 255, np.uint8)
    x, y = MARGIN, MARGIN
    for text, color in entries.items():
        needed = patch + 6 + cv2.getTextSize(text, FONT, TITLE_SCALE, 1)[0][0]
        if x > MARGIN and x + needed > width:
            x, y = MARGIN, y + step
        cv2.rectangle(page, (x, y), (x + patch, y + patch), color, cv2.FILLED)
        cv2.rectangle(page, (x, y), (x + patch, y + patch), INK, 1)
        place = x + patch + 6, y + patch - 3
        cv2.putText(page, text, place, FONT, TITLE_SCALE, INK, 1, cv2.LINE_AA)
        x += needed + 24
    return page[: y + step]


def resized(image: Image, size: tuple[int, int]) -> Image:
    """A new image of `size` (height, width)."""
    smaller = size[0] < image.shape[0] or size[1] < image.shape[1]
    method = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
    return cv2.resize(image, size[::-1], interpolation=method)


def darkened(image: Image) -> Image:
    """A new, darker image, from which lines stand out."""
    return (image * 0.75).astype(np.uint8)


def _canvas(image: Image, size: tuple[int, int] | None) -> tuple[Image, Float[np.ndarray, " 4"]]:
    """A copy of the image to draw into, and the factors that bring boxes onto it."""
    height, width = image.shape[:2]
    if size is None:
        limit = ENLARGED_LONG_SIDE / max(height, width)
        scale = max(1.0, min(SHORT_SIDE / min(height, width), limit))
        size = (round(height * scale), round(width * scale))
    canvas = image.copy() if size == (height, width) else resized(image, size)
    return canvas, np.array([size[1] / width, size[0] / height] * 2)


def tint(
    canvas: Image, mask: UInt8[np.ndarray, "mh mw"], color: Color, corner: tuple[int, int] = (0, 0)
) -> None:
    """Colour and outline a mask in place, with its first pixel at `corner` (x, y) of the canvas."""
    (x, y), (height, width) = corner, mask.shape
    part = canvas[y : y + height, x : x + width]
    by_value = 0.55 * np.arange(256)[:, None] + 0.45 * np.array(color)
    mixed = by_value.astype(np.uint8)
    np.copyto(part, cv2.LUT(part, mixed[None]), where=mask[..., None].astype(bool))
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, contours, -1, color, 1, cv2.LINE_AA, offset=corner)


def _tint_rle(canvas: Image, rle: Mapping[str, Any], color: Color) -> None:
    """Tint the part that holds the mask, in uint8: 12 megapixels would be 288 MB as float64."""
    x, y, width, height = coco_mask.toBbox(rle).astype(int).tolist()
    if not width * height:
        return
    if tuple(rle["size"]) == canvas.shape[:2]:
        mask = coco_mask.decode(moved_rle(rle, (-y, -x), (height, width)))
        tint(canvas, np.ascontiguousarray(mask), color, (x, y))
        return
    mask = np.asarray(coco_mask.decode(rle))
    tint(canvas, cv2.resize(mask, canvas.shape[1::-1], interpolation=cv2.INTER_NEAREST), color)


def rectangle(canvas: Image, box: Float[np.ndarray, " 4"], color: Color, thickness: int) -> None:
    """Outline a box in place; `thickness` grows with the canvas."""
    x1, y1, x2, y2 = np.round(box).astype(int).tolist()
    # The box's edge lies between pixels: its last pixel is one less.
    last = max(x2 - 1, x1), max(y2 - 1, y1)
    cv2.rectangle(canvas, (x1, y1), last, color, round(thickness * _magnification(canvas)))


class _Style(NamedTuple):
    """Of a label's text."""

    font: float
    stroke: int
    gap: int  # around the text

    def patch(self, text: str) -> tuple[int, int, int]:
        """(width, height) of a text's patch, and the baseline above its bottom."""
        (width, height), baseline = cv2.getTextSize(text, FONT, self.font, self.stroke)
        return width + 2 * self.gap, height + baseline + self.gap, baseline


def _fitting_style(canvas: Image, texts: Sequence[str]) -> _Style | None:
    """The style by which all labels cover at most LABEL_SHARE of the canvas; None if none does."""
    style = _text_style(canvas)
    patches = (style.patch(text) for text in texts)
    share = sum(width * height for width, height, _ in patches) / (
        canvas.shape[0] * canvas.shape[1]
    )
    factor = min(1.0, math.sqrt(LABEL_SHARE / max(share, 1e-9)))
    return _text_style(canvas, factor) if factor >= LEAST_TEXT else None


def _draw_note(canvas: Image, text: str) -> None:
    """Write a line at the bottom of the canvas, as small as its width needs."""
    style = _text_style(canvas)
    width = style.patch(text)[0]
    style = _text_style(canvas, min(1.0, canvas.shape[1] / width))
    width, height, baseline = style.patch(text)
    bottom = canvas.shape[0]
    _draw_label(canvas, _Label(text, NOTE, (0, bottom - height, width, bottom), baseline), style)


class _Label(NamedTuple):
    text: str
    color: Color
    box: tuple[int, int, int, int]  # its patch: x1, y1, x2, y2
    baseline: int  # of the text, above the patch's bottom


def _placed_label(
    canvas: Image,
    text: str,
    corner: tuple[int, int],
    color: Color,
    others: Sequence[_Label],
    style: _Style,
) -> _Label:
    """Place a label above `corner`, in the image and off the `others` if there is room nearby."""
    width, height, baseline = style.patch(text)
    x = max(min(corner[0] - 1, canvas.shape[1] - width), 0)
    above = max(corner[1] - height - 1, 0)
    top = above
    for step in (0, -1, -2, 1, 2):
        y = above + step * (height + 1)
        free = all(
            x > o[2] or x + width < o[0] or y > o[3] or y + height < o[1]
            for o in (other.box for other in others)
        )
        if free and 0 <= y <= canvas.shape[0] - height:
            top = y
            break
    return _Label(text, color, (x, top, x + width, top + height), baseline)


def _draw_label(canvas: Image, label: _Label, style: _Style) -> None:
    x1, y1, x2, y2 = label.box
    cv2.rectangle(canvas, (x1, y1), (x2, y2), label.color, cv2.FILLED)
    place = x1 + style.gap, y2 - label.baseline
    cv2.putText(canvas, label.text, place, FONT, style.font, INK, style.stroke, cv2.LINE_AA)


def _text_style(canvas: Image, factor: float = 1.0) -> _Style:
    """The style of labels, which grow with the canvas; `factor` makes them smaller."""
    size = _magnification(canvas) * factor
    return _Style(FONT_SCALE * size, max(round(size), 1), max(round(2 * size), 1))


def _magnification(canvas: Image) -> float:
    return max(1.0, min(canvas.shape[:2]) / SHORT_SIDE)
