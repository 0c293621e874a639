"""A generated COCO data set: discs, rectangles and triangles on textured backgrounds.

Properties of every image (tests/datasets/test_shapes.py):

- It has up to 8 objects; the box of the visible part has a short side of 12 to 64 px.
- Masks are modal (visible pixels only), and boxes are tight around them. At least 40 % of each
  object is visible, whether another object or the image's border hides the rest.
- One image in 33 has no object, and one in 33 a crowd region: a cluster of small shapes of one
  class, annotated as one.
- It is a pure function of (seed, split, index): the same seed gives the same bytes, and splits
  share no random stream.

With depth, the same shapes stand at the same places, each a plane of its own, slightly tilted, that
is nearer than all that it covers; the background is a floor behind them. The cue is haze: a colour
keeps exp(-metres / HAZE_METRES) of its difference from HAZE. Haze alone cannot tell a pale object
that is near from a vivid one that is far, so one channel of every object's colour is about 0: what
is seen in it is haze (the dark channel of He et al. 2009).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.records import coco_annotation
from mrcnn_jax.output import write_file
from mrcnn_jax.pixels.encode import write_depth, write_image
from mrcnn_jax.pixels.geometry import mask_box
from mrcnn_jax.pixels.rle import encoded

CLASSES = ("disc", "rectangle", "triangle")
MAX_OBJECTS = 8
SHORT_SIDE = (12, 64)
MIN_VISIBLE = 0.4
# Fixed places instead of chances, so that every split of 33 images or more has both.
PERIOD, EMPTY_AT, CROWD_AT = 33, 7, 19

SUPERSAMPLING = 8
ATTEMPTS = 20  # to place an object before giving up
CONTRAST = 60.0  # distance in RGB (0..255) of an object's colours from the background's

# Metres. The floor's are at the top and the bottom of the image.
NEAR, FAR, FLOOR = 1.0, 5.5, (8.0, 6.0)
HAZE, HAZE_METRES = (200.0, 208.0, 216.0), 6.0

Split = Literal["train", "val"]


@dataclass
class Drawn:
    """An annotation while its image is drawn; `visible` shrinks as later objects cover it."""

    label: int
    visible: Bool[np.ndarray, "h w"]
    whole_area: int
    iscrowd: bool = False

    @property
    def visible_share(self) -> float:
        """Visible pixels / all pixels of the object, including those outside the image."""
        return float(self.visible.sum()) / self.whole_area

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Tight (x1, y1, x2, y2) around the visible pixels; zeros if there is none."""
        return mask_box(self.visible)

    def within_bounds(self) -> bool:
        if self.visible_share < MIN_VISIBLE:
            return False
        x1, y1, x2, y2 = self.box
        return self.iscrowd or SHORT_SIDE[0] <= min(x2 - x1, y2 - y1) <= SHORT_SIDE[1]


def _outline(
    rng: np.random.Generator, label: int, short_side: float
) -> Float[np.ndarray, "points 2"]:
    """A rotated outline (x, y) around the origin, with this short side of its bounding box."""
    if label == 1:
        angles = 2 * np.pi / 64 * np.arange(64)
    elif label == 2:
        angles = np.pi / 4 + np.pi / 2 * np.arange(4)
    else:
        angles = 2 * np.pi / 3 * np.arange(3) + rng.uniform(-0.25, 0.25, 3)
    points = np.stack([np.cos(angles) * rng.uniform(1.0, 1.7), np.sin(angles)], axis=1)
    turn = rng.uniform(0, 2 * np.pi)
    points = points @ np.array(
        [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    )
    points = points - (points.min(0) + points.max(0)) / 2
    return points * (short_side / np.ptp(points, axis=0).min())


def _coverage(outline: Float[np.ndarray, "points 2"]) -> tuple[Float[np.ndarray, "h w"], int, int]:
    """The share of each pixel inside the outline, in a patch around it; its left and top."""
    left, top = np.floor(outline.min(0)).astype(int) - 1
    right, bottom = np.ceil(outline.max(0)).astype(int) + 1
    fine = np.zeros(((bottom - top) * SUPERSAMPLING, (right - left) * SUPERSAMPLING), np.uint8)
    # fillPoly takes sample centres, in 1/16; our coordinates are continuous: hence the half.
    points = np.round(((outline - (left, top)) * SUPERSAMPLING - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(fine, [points], 255, shift=4)
    patch = cv2.resize(fine, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
    return patch.astype(np.float32) / 255, int(left), int(top)


def _on_canvas(
    patch: Float[np.ndarray, "h w"], left: int, top: int, size: int
) -> Float[np.ndarray, "s s"]:
    """The patch, clipped, on a size x size canvas."""
    canvas = np.zeros((size, size), np.float32)
    height, width = patch.shape
    y1, y2, x1, x2 = max(top, 0), min(top + height, size), max(left, 0), min(left + width, size)
    if y1 < y2 and x1 < x2:
        canvas[y1:y2, x1:x2] = patch[y1 - top : y2 - top, x1 - left : x2 - left]
    return canvas


def _colour(
    rng: np.random.Generator, avoid: list[Float[np.ndarray, " 3"]]
) -> Float[np.ndarray, " 3"]:
    """A random colour at least CONTRAST away from those to avoid, or else the farthest of 20."""
    candidates = rng.uniform(10, 245, (20, 3))
    if not avoid:
        return candidates[0]
    distances = np.linalg.norm(candidates[:, None] - np.stack(avoid)[None], axis=-1).min(1)
    return candidates[int(np.argmax(np.minimum(distances, CONTRAST)))]


def _smooth(
    rng: np.random.Generator, height: int, width: int, channels: int
) -> Float[np.ndarray, "h w *c"]:
    """Noise in [0, 1], or a little beyond, that varies over about 10 px."""
    coarse = rng.random((height // 10 + 3, width // 10 + 3, channels), np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def texture(
    rng: np.random.Generator, height: int, width: int, first: np.ndarray, second: np.ndarray
) -> Float[np.ndarray, "h w 3"]:
    """Returns a blend of two colours: even, gradient, stripes or smooth noise.

    Args:
        rng: chooses which, and its details.
        height, width: in pixels.
        first, second: RGB, 0..255.
    """
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = x * np.cos(angle) + y * np.sin(angle)
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: np.full_like(ramp, 0.5),
        lambda: (ramp - ramp.min()) / np.ptp(ramp),
        lambda: 0.5 + 0.5 * np.sin(2 * np.pi * ramp / rng.uniform(5, 16)),
        lambda: _smooth(rng, height, width, 1),
    )
    blend = kinds[rng.integers(len(kinds))]()[..., None]
    return first.astype(np.float32) * (1 - blend) + second.astype(np.float32) * blend


def _background(
    rng: np.random.Generator, size: int
) -> tuple[Float[np.ndarray, "s s 3"], list[np.ndarray]]:
    """Texture, smooth and fine noise and thin lines as distractors; and the texture's colours."""
    first = _colour(rng, [])
    second = np.clip(first + rng.uniform(-60, 60, 3), 0, 255)
    picture = texture(rng, size, size, first, second) + 60 * (_smooth(rng, size, size, 3) - 0.5)
    lined = np.clip(picture, 0, 255).astype(np.uint8)
    for _ in range(rng.integers(0, 6)):
        (x1, y1), (x2, y2) = rng.integers(0, size, (2, 2)).tolist()
        cv2.line(lined, (x1, y1), (x2, y2), _colour(rng, []).tolist(), 1, cv2.LINE_AA)
    return lined + 5 * rng.standard_normal((size, size, 3), np.float32), [first, second]


def _deep(colour: Float[np.ndarray, " 3"]) -> Float[np.ndarray, " 3"]:
    """The colour without its grey: its darkest channel is 0."""
    return colour - colour.min()


def hazed(
    colours: Float[np.ndarray, "h w 3"], metres: Float[np.ndarray, "h w"]
) -> Float[np.ndarray, "h w 3"]:
    """RGB, 0..255, as it is seen from that far."""
    haze = np.array(HAZE, np.float32)
    return haze + (colours - haze) * np.exp(-metres / HAZE_METRES)[..., None]


def _floor(size: int) -> Float[np.ndarray, "s s"]:
    """The background's metres."""
    rows = np.linspace(*FLOOR, size, dtype=np.float32)
    return np.repeat(rows[:, None], size, axis=1)


def _plane(
    rng: np.random.Generator,
    limits: Float[np.ndarray, " 2"],
    outline: Float[np.ndarray, "points 2"],
    size: int,
) -> Float[np.ndarray, "s s"]:
    """Metres of a plane that stays within `limits` over the outline, tilted to a random side."""
    centre = (outline.min(0) + outline.max(0)) / 2
    radius = np.linalg.norm(outline - centre, axis=1).max() + 1
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:size, 0:size] + 0.5
    along = (x - centre[0]) * math.cos(angle) + (y - centre[1]) * math.sin(angle)
    return (limits.mean() + np.ptp(limits) / 2 * along / radius).astype(np.float32)


def draw_image(
    seed: int, split: Split, index: int, size: int, *, depth: bool = False
) -> tuple[UInt8[np.ndarray, "s s 3"], list[Drawn], Float[np.ndarray, "s s"]]:
    """Draws an image of the data set.

    Args:
        seed, split, index: determine the image.
        size: of its sides, in pixels.
        depth: draw the haze, from which depth can be told; the objects stay the same.

    Returns:
        RGB pixels; the annotations in drawing order: later ones cover earlier ones; and the metres
        of each pixel, those of the object that owns it.
    """
    key = seed, ("train", "val").index(split), index
    rng, depth_rng = np.random.default_rng(key), np.random.default_rng((*key, 1))
    picture, colours = _background(rng, size)
    metres = _floor(size)
    if depth:
        picture = hazed(picture, metres)
    # Disjoint ranges of depth, from far to near. A crowd, drawn first, takes the farthest.
    ranges = np.sort(depth_rng.uniform(NEAR, FAR, 2 * MAX_OBJECTS + 2))[::-1].reshape(-1, 2)
    drawn: list[Drawn] = []

    def paint(
        coverage: Float[np.ndarray, "s s"],
        plane: Float[np.ndarray, "s s"],
        first: np.ndarray,
        second: np.ndarray,
    ) -> None:
        inside = coverage > 0
        window = np.ix_(inside.any(1), inside.any(0))
        below, weight = picture[window], coverage[window][..., None]
        height, width = below.shape[:2]
        fill = texture(rng, height, width, first, second)
        fill = fill + 4 * rng.standard_normal(below.shape, np.float32)
        if depth:
            fill = hazed(fill, plane[window])
        np.copyto(metres, plane, where=coverage >= 0.5)
        picture[window] = below + (fill - below) * weight

    def palette() -> tuple[np.ndarray, np.ndarray]:
        first = _colour(rng, colours)
        second = np.clip(first + rng.uniform(-70, 70, 3), 0, 255)
        if depth:
            first, second = _deep(first), _deep(second)
        far = min(float(np.linalg.norm(second - colour)) for colour in colours) >= CONTRAST
        return first, second if far else first

    if index % PERIOD == CROWD_AT:
        label = int(rng.integers(1, len(CLASSES) + 1))
        centre, spread = rng.uniform(0.3 * size, 0.7 * size, 2), rng.uniform(12, 24)
        region = np.zeros((size, size), bool)
        for _ in range(rng.integers(12, 25)):
            outline = _outline(rng, label, rng.uniform(5, 10)) + centre
            outline = outline + rng.uniform(-spread, spread, 2)
            coverage = _on_canvas(*_coverage(outline), size)
            paint(coverage, np.full_like(metres, ranges[0].mean()), *palette())
            region |= coverage >= 0.5
        drawn.append(Drawn(label, region, int(region.sum()), iscrowd=True))

    wanted = 0 if index % PERIOD == EMPTY_AT else int(rng.integers(1, MAX_OBJECTS + 1))
    for number in np.sort(depth_rng.permutation(MAX_OBJECTS)[:wanted]) + 1:
        for _ in range(ATTEMPTS):
            label = int(rng.integers(1, len(CLASSES) + 1))
            outline = _outline(rng, label, rng.uniform(*SHORT_SIDE))
            outline = outline + rng.uniform(0.08 * size, 0.92 * size, 2)
            patch, left, top = _coverage(outline)
            coverage = _on_canvas(patch, left, top, size)
            # A pixel belongs to the object that covers at least half of it.
            mine = coverage >= 0.5
            after = [Drawn(d.label, d.visible & ~mine, d.whole_area, d.iscrowd) for d in drawn]
            after.append(Drawn(label, mine, int((patch >= 0.5).sum())))
            if all(d.within_bounds() for d in after):
                drawn = after
                paint(coverage, _plane(depth_rng, ranges[number], outline, size), *palette())
                break
    return np.clip(np.round(picture), 0, 255).astype(np.uint8), drawn, metres


def _annotation(drawn: Drawn, annotation_id: int, image_id: int) -> dict[str, Any]:
    area, (rle,) = int(drawn.visible.sum()), encoded([drawn.visible])
    return coco_annotation(
        annotation_id, image_id, drawn.label, drawn.box, area, drawn.iscrowd, rle
    ) | {"visible_share": round(drawn.visible_share, 4)}


def write_shapes(
    out: Path, *, train: int, val: int, size: int = 128, seed: int = 0, depth: bool = False
) -> None:
    """Writes the data set's folder and prints one line about it.

    Args:
        out: gets images/*.png and annotations/instances_{train,val}.json, whose ids of images and
            annotations are unique over both splits.
        train, val: number of images.
        size: of the sides of an image, in pixels.
        seed: the same seed gives the same bytes.
        depth: write depth/*.png too, 16-bit PNGs in millimetres that `depth_file` of each image
            names; the pictures then have haze, and the annotations stay the same.

    Raises:
        ConfigError: `size` is too small for the objects.
        OSError: a file cannot be written; has its name.
    """
    if size < 128:
        raise ConfigError(f"size: {size}: must be at least 128 px")
    for name in ("images", "annotations", *(["depth"] if depth else [])):
        (out / name).mkdir(parents=True, exist_ok=True)
    # Those of earlier pictures would fit the new ones in all but what they show.
    for split in ("train", "val"):
        (out / "annotations" / f"instances_{split}.json").unlink(missing_ok=True)
    seen: Counter[str] = Counter()
    image_id = annotation_id = 0
    for split, count in (("train", train), ("val", val)):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            picture, drawn, metres = draw_image(
                seed,
                split,  # type: ignore[arg-type]
                index,
                size,
                depth=depth,
            )
            image_id += 1
            name = f"{split}_{index:05d}.png"
            write_image(out / "images" / name, picture)
            images.append({"id": image_id, "file_name": name, "height": size, "width": size})
            if depth:
                write_depth(out / "depth" / name, metres)
                images[-1]["depth_file"] = f"../depth/{name}"
            for item in drawn:
                annotation_id += 1
                annotations.append(_annotation(item, annotation_id, image_id))
                seen["crowd" if item.iscrowd else CLASSES[item.label - 1]] += 1
            seen["empty"] += not drawn
        content = {
            "info": {"description": f"Generated shapes, split {split}, seed {seed}"},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": label, "name": name} for label, name in enumerate(CLASSES, 1)],
        }
        path = out / "annotations" / f"instances_{split}.json"
        write_file(path, json.dumps(content) + "\n")
    classes = ", ".join(f"{seen[name]} {name}s" for name in CLASSES)
    print(
        f"{out}: {train} + {val} images of {size} x {size}: {classes}; "
        f"{seen['empty']} images empty, {seen['crowd']} crowd regions"
    )
