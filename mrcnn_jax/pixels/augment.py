"""Augmentation of training images (`AugmentConfig`), and what remains visible of their objects.

Every draw comes from a key (seed, epoch, how often the image was used in it, image) and from
nothing else, so that a resumed run sees the same pictures. The canvas of an image never changes.
Masks stay in the pixels of their own image until they are cropped to their box, so that none is
resampled twice.

An object that the canvas cuts, or that others are pasted over, keeps the visible part of its mask;
its box shrinks to that part, or without a mask to the part on the canvas. It is lost, and counted,
if no pixel of its mask is visible, if a side of its box is under LEAST, or if it has no mask and
its whole box is hidden. The same holds for crowd regions, except that pasted objects do not hide
them, and lost ones are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int32, UInt8
from pycocotools import mask as rle_ops

from mrcnn_jax.config.schema import AugmentConfig, Shrink
from mrcnn_jax.pixels.geometry import mask_box
from mrcnn_jax.pixels.rle import moved_rle
from mrcnn_jax.pixels.transforms import Transform, coverage

LEAST = 1.0  # canvas pixels: augmented objects with a shorter side are not trained on
GREY = (0.299, 0.587, 0.114)  # weights of R, G, B (ITU-R BT.601)

Box = tuple[float, ...]  # (x1, y1, x2, y2) in the pixels of the object's own image
Size = tuple[int, int]


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image and its annotations, in its own pixels."""

    image: UInt8[np.ndarray, "h w 3"]
    boxes: Float[np.ndarray, "n 4"]
    labels: Int32[np.ndarray, " n"]
    iscrowd: Bool[np.ndarray, " n"]
    counts: Sequence[bytes]  # compressed run lengths, empty without a mask
    resized: Size  # the image's size on its canvas without augmentation
    shrink: Shrink
    depth: Float[np.ndarray, "h w"] | None = None  # metres, 0 where unknown

    @property
    def size(self) -> Size:
        return self.image.shape[0], self.image.shape[1]

    def mask(self, number: int) -> UInt8[np.ndarray, "h w"] | None:
        counts = self.counts[number]
        return rle_ops.decode({"size": list(self.size), "counts": counts}) if counts else None


@dataclass(frozen=True)
class Seen:
    """The visible part of an object: its box, and its mask if that is not the annotated one."""

    decoded: DecodedImage
    transform: Transform
    number: int
    box: Box
    left: UInt8[np.ndarray, "h w"] | None = None

    @property
    def label(self) -> int:
        return int(self.decoded.labels[self.number])

    @property
    def area(self) -> float:
        """Area of the box in canvas pixels."""
        y, x = self.transform.scale
        corners = np.array(self.box, np.float32)
        return float(np.prod(corners[2:] - corners[:2])) * y * x

    @property
    def on_canvas(self) -> Float[np.ndarray, " 4"]:
        return self.transform.boxes(np.array([self.box], np.float32))[0]

    @property
    def mask(self) -> UInt8[np.ndarray, "h w"] | None:
        """The visible mask, 0 and 1, in the pixels of its image; None if there is none."""
        return self.decoded.mask(self.number) if self.left is None else self.left

    def crop(self, size: int) -> UInt8[np.ndarray, "size size"] | None:
        """Coverage 0..255 of the mask inside the box; None without a mask."""
        mask, box, counts = self.left, self.box, self.decoded.counts[self.number]
        if mask is None:
            if not counts:
                return None
            # Only what `coverage` looks at: a large photograph has many pixels for each object.
            (height, width), (x1, y1, x2, y2) = self.decoded.size, box
            left, top = max(math.floor(x1) - 1, 0), max(math.floor(y1) - 1, 0)
            near = min(math.ceil(y2) + 1, height) - top, min(math.ceil(x2) + 1, width) - left
            rle = {"size": [height, width], "counts": counts}
            mask = rle_ops.decode(moved_rle(rle, (-top, -left), near))
            box = (x1 - left, y1 - top, x2 - left, y2 - top)
        return coverage(mask, box, size)[:, :: -1 if self.transform.flip else 1]


@dataclass(frozen=True)
class CanvasImage:
    """An image as it goes onto its canvas, in `transform.size`, and the objects visible in it."""

    transform: Transform
    pixels: UInt8[np.ndarray, "vh vw 3"]
    objects: list[Seen]
    crowds: list[Seen]
    lost: int = 0  # objects of which too little is visible
    # Metres that are seen, in the image's own pixels.
    depth: Float[np.ndarray, "h w"] | None = None


def plain(decoded: DecodedImage) -> CanvasImage:
    """The image on its canvas without augmentation."""
    transform = Transform(decoded.size, decoded.resized, decoded.resized, shrink=decoded.shrink)
    return CanvasImage(
        transform,
        transform.pixels(decoded.image),
        _seen(decoded, transform, ~decoded.iscrowd, 0),
        _seen(decoded, transform, decoded.iscrowd, 0),
        depth=decoded.depth,
    )


def augmented(
    decoded: DecodedImage,
    canvas: Size,
    key: Sequence[int],
    config: AugmentConfig,
    another: Callable[[np.random.Generator], DecodedImage],
) -> CanvasImage:
    """The image on a canvas (height, width) with augmentation drawn from `key`.

    `another` draws a training image whose objects may be pasted.
    """
    rng = np.random.default_rng(tuple(key))
    transform = _drawn(decoded, rng, config)
    size = min(transform.resized[0], canvas[0]), min(transform.resized[1], canvas[1])
    transform = _placed(transform, size, rng)
    pixels = transform.pixels(decoded.image)
    hidden = np.zeros(decoded.size, bool)
    pasted: list[Seen] = []
    if rng.random() < config.copy_paste:
        source = another(rng)
        theirs = _placed(_drawn(source, rng, config), size, rng)
        over, pasted = _chosen(_seen(source, theirs, ~source.iscrowd, LEAST), size, rng)
        pixels = np.where(over[..., None], theirs.pixels(source.image), pixels)
        hidden = transform.from_canvas(over)
    objects = _seen(decoded, transform, ~decoded.iscrowd, LEAST, hidden)
    lost = int(np.sum(~decoded.iscrowd)) - len(objects)
    return CanvasImage(
        transform,
        _coloured(pixels, rng, config),
        objects + pasted,
        _seen(decoded, transform, decoded.iscrowd, LEAST),
        lost,
        _followed(decoded, transform) if config.depth_follows_scale else decoded.depth,
    )


def _followed(decoded: DecodedImage, transform: Transform) -> Float[np.ndarray, "h w"] | None:
    """Metres at which one camera would see the image in the size that it was drawn."""
    if decoded.depth is None:
        return None
    factor = math.sqrt(math.prod(transform.resized) / math.prod(decoded.resized))
    return decoded.depth / np.float32(factor)


def _drawn(decoded: DecodedImage, rng: np.random.Generator, config: AugmentConfig) -> Transform:
    """The whole image, mirrored or not, at a drawn size."""
    flip, factor = bool(rng.random() < config.flip), rng.uniform(*config.scale)
    height, width = (max(1, round(side * factor)) for side in decoded.resized)
    return Transform(
        decoded.size, (height, width), (height, width), flip=flip, shrink=decoded.shrink
    )


def _placed(transform: Transform, size: Size, rng: np.random.Generator) -> Transform:
    """A random window of `size`: inside the image, or around it on an axis where it is shorter."""
    spare = transform.resized[0] - size[0], transform.resized[1] - size[1]
    y, x = (int(rng.integers(min(0, pixels), max(0, pixels) + 1)) for pixels in spare)
    return replace(transform, size=size, offset=(y, x))


def _chosen(
    objects: list[Seen], size: Size, rng: np.random.Generator
) -> tuple[Bool[np.ndarray, "h w"], list[Seen]]:
    """The canvas pixels that pasted objects cover, and these objects: each with probability .5."""
    over, chosen = np.zeros(size, bool), []
    for seen in objects:
        mask = seen.mask if rng.random() < 0.5 else None
        shape = np.zeros(size, bool) if mask is None else seen.transform.pixels(255 * mask) >= 128
        if shape.any():
            over |= shape
            chosen.append(seen)
    return over, chosen


def _seen(
    decoded: DecodedImage,
    transform: Transform,
    which: Bool[np.ndarray, " n"],
    least: float,
    hidden: Bool[np.ndarray, "h w"] | None = None,
) -> list[Seen]:
    """The annotations `which` of which enough is visible, in their order.

    `hidden`: pixels of the image that are pasted over.
    """
    found = []
    (y, x), window = transform.scale, transform.window
    if hidden is None:
        hidden = np.broadcast_to(np.False_, decoded.size)
    for number in np.flatnonzero(which).tolist():
        whole: Box = tuple(decoded.boxes[number].tolist())
        box, left = _common(whole, window), None
        near = slice(int(box[1]), math.ceil(box[3])), slice(int(box[0]), math.ceil(box[2]))
        if box != whole or hidden[near].any():
            mask = decoded.mask(number)
            if mask is not None and mask.any():
                left = mask * ~hidden
                if box != whole or (left != mask).any():
                    box = _common(box, _extent(left[near], near))
            elif hidden[near].all():
                continue
        if min((box[2] - box[0]) * x, (box[3] - box[1]) * y) >= least:
            found.append(Seen(decoded, transform, number, box, left))
    return found


def _extent(part: UInt8[np.ndarray, "h w"], place: tuple[slice, slice]) -> Box:
    """The box around the pixels of a part of a mask at `place`; without any, sides are 0."""
    x1, y1, x2, y2 = map(float, mask_box(part))
    top, left = place[0].start, place[1].start
    return left + x1, top + y1, left + x2, top + y2


def _common(a: Box, b: Box) -> Box:
    """The intersection of two boxes; if there is none, a side is not positive."""
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def _coloured(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, config: AugmentConfig
) -> UInt8[np.ndarray, "h w 3"]:
    """Brightness, contrast and saturation as one linear map of colours, clipped once; then hue."""
    brightness, contrast, saturation = (
        rng.uniform(1 - x, 1 + x) for x in (config.brightness, config.contrast, config.saturation)
    )
    turn = round(256 * rng.uniform(-config.hue, config.hue)) % 256
    if (brightness, contrast, saturation) != (1, 1, 1):
        grey = np.array(GREY)
        colours = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * grey)
        constant = (1 - contrast) * brightness * float(grey @ image.mean(axis=(0, 1)))
        image = cv2.transform(image, np.column_stack([colours, np.full(3, constant)]))  # type: ignore[assignment]
    if turn:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
        hsv[..., 0] += np.uint8(turn)  # 256 hues: the overflow is the turn past 360 degrees
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)  # type: ignore[assignment]
    return image
