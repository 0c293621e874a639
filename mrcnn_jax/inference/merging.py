"""Detections of overlapping tiles -> those of the whole image.

1. Two detections of one class from different tiles are the same object if their masks agree in the
   region that both tiles see: IoU of at least AGREE there. The best agreements come first, and an
   object has at most one detection of each tile. Where a mask has no pixel, its box is compared.
2. A detection is cut if its box comes within `margin` pixels of a border of its tile that is not
   the image's. Of an object's detections, the best one that is not cut gives mask and box. Pieces
   that it covers by less than AGREE are added, and if all are cut, all are joined; those without a
   pixel count only if there are no others. The score is
   the highest; the mask score, where there is one, the highest of those that make the mask.
3. Of what is left, best first, a detection is a repetition if a better one of its class from other
   tiles has a mask IoU of at least AGREE with it, or, if it is cut, covers at least that share of
   it. Other cut detections stay as they are.

Masks are run lengths, which are compared and joined without building an image.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from pycocotools import mask as coco_mask

from mrcnn_jax.inference.results import Detections
from mrcnn_jax.pixels.places import RLE
from mrcnn_jax.pixels.rle import moved_rle
from mrcnn_jax.pixels.windows import Window

AGREE = 0.5
# Boxes of cut objects end near the border, but not quite at it: this share of a tile's side, in
# pixels at least CLOSE.
NEAR, CLOSE = 0.01, 2.0


@dataclass(frozen=True, eq=False)
class TileDetection:
    """A detection in the pixels of the image."""

    windows: frozenset[int]
    """Numbers of the tiles that it was seen in."""
    label: int
    score: float
    box: Float64[np.ndarray, " 4"]
    mask: RLE
    place: RLE
    """What it is compared by: its mask, or its box where the mask has no pixel."""
    cut: bool
    mask_score: float | None = None
    depth: float | None = None
    pieces: int = 1
    """Detections that its mask is joined from."""


@dataclass(frozen=True)
class Merged:
    """The objects of an image, best first, and what became of the rest."""

    objects: tuple[TileDetection, ...]
    joined: int
    """Objects made of pieces."""
    repeated: int
    """Detections left out, since their object was seen in another tile, too."""
    cut: int
    """Objects that are cut, and of which no other piece was found."""


def in_image(
    found: Detections, number: int, window: Window, size: tuple[int, int]
) -> Iterator[TileDetection]:
    """The detections in a tile, with masks as RLEs, in the pixels of its image.

    A detection without a mask, or with an empty one, is merged by its box.

    Args:
        found: in pixels of the tile.
        number: of the tile.
        window: its place.
        size: (height, width) of the image.
    """
    y, x = window.y1, window.x1
    near = [max(CLOSE, NEAR * side) for side in window.size]
    inner = np.array([x > 0, y > 0, window.x2 < size[1], window.y2 < size[0]])
    height, width = window.size
    for row, mask in enumerate(found.rles()):
        x1, y1, x2, y2 = found.boxes[row].tolist()
        gaps = np.array([x1, y1, width - x2, height - y2])
        close = gaps <= [near[1], near[0], near[1], near[0]]
        here = mask if mask and coco_mask.area(mask) else _of_box(found.boxes[row], window.size)
        place = moved_rle(here, (y, x), size)
        yield TileDetection(
            windows=frozenset({number}),
            label=int(found.labels[row]),
            score=float(found.scores[row]),
            box=found.boxes[row] + [x, y, x, y],
            mask=place if mask is None else moved_rle(mask, (y, x), size),
            place=place,
            cut=bool((close & inner).any()),
            mask_score=None if found.mask_scores is None else float(found.mask_scores[row]),
            depth=None if found.depths is None else float(found.depths[row]),
        )


def _of_box(box: Float64[np.ndarray, " 4"], size: tuple[int, int]) -> RLE:
    """The mask of a box: its pixels, at least one."""
    x1, y1, x2, y2 = np.rint(box).astype(int).tolist()
    pixels = np.zeros((*size, 1), np.uint8, order="F")
    pixels[min(y1, size[0] - 1) : max(y2, y1 + 1), min(x1, size[1] - 1) : max(x2, x1 + 1)] = 1
    rle: RLE = coco_mask.encode(pixels)[0]
    return rle


def merge(
    found: Sequence[TileDetection], windows: Sequence[Window], size: tuple[int, int]
) -> Merged:
    """Merge the detections of tiles by the rule above.

    Args:
        found: of all tiles.
        windows: the tiles' places, by their numbers.
        size: (height, width) of the image.
    """
    groups = _groups(found, windows, size)
    whole = [_one([found[i] for i in group]) for group in groups]
    objects = _without_repetitions(whole)
    return Merged(
        objects=tuple(objects),
        joined=sum(item.pieces > 1 for item in objects),
        repeated=len(found) - sum(item.pieces for item in objects),
        cut=sum(item.cut and item.pieces == 1 for item in objects),
    )


def _groups(
    found: Sequence[TileDetection], windows: Sequence[Window], size: tuple[int, int]
) -> list[list[int]]:
    """The numbers of the detections of each object."""

    @functools.lru_cache(maxsize=64)
    def region(place: Window) -> RLE:
        return moved_rle(
            coco_mask.encode(np.ones(place.size, np.uint8, order="F")), place[:2], size
        )

    def seen(item: TileDetection, place: Window) -> RLE:
        x1, y1, x2, y2 = item.box.tolist()
        # The mask may reach a pixel beyond its box.
        inside = place.x1 < x1 - 1 and place.y1 < y1 - 1 and x2 + 1 < place.x2 and y2 + 1 < place.y2
        if inside:
            return item.place
        return coco_mask.merge([item.place, region(place)], intersect=True)

    agreements = []
    for i, j in _near_pairs(found):
        a, b = found[i], found[j]
        place = windows[min(a.windows)].common(windows[min(b.windows)])
        if min(place.size) < 1:
            continue
        agreement = float(coco_mask.iou([seen(a, place)], [seen(b, place)], [0])[0, 0])
        if agreement >= AGREE:
            agreements.append((agreement, i, j))
    agreements.sort(key=lambda pair: (-pair[0], pair[1:]))
    group_of = {i: [i] for i in range(len(found))}
    for _, i, j in agreements:
        one, other = group_of[i], group_of[j]
        tiles = [found[k].windows for k in (*one, *other)]
        if one is other or len(frozenset().union(*tiles)) < len(tiles):
            continue
        one += other
        group_of |= dict.fromkeys(other, one)
    return [group for i, group in group_of.items() if i == group[0]]


def _one(group: Sequence[TileDetection]) -> TileDetection:
    """The object that is seen in several tiles; see 2. of the rule."""
    if len(group) == 1:
        return group[0]
    # Those whose mask has no pixel say no more than where the object is.
    seen = [item for item in group if coco_mask.area(item.mask)] or group
    best = max((item for item in seen if not item.cut), key=lambda i: i.score, default=None)
    parts = [best] if best is not None else []
    parts += [item for item in seen if item.cut and (best is None or _covered(item, best) < AGREE)]
    corners = np.array([part.box for part in parts])
    largest = max(parts, key=lambda part: int(coco_mask.area(part.mask)))
    mask, place = parts[0].mask, parts[0].place
    if len(parts) > 1:
        mask, place = (
            coco_mask.merge([getattr(part, name) for part in parts]) for name in ("mask", "place")
        )
    mask_scores = [part.mask_score for part in parts if part.mask_score is not None]
    return TileDetection(
        windows=frozenset().union(*(item.windows for item in group)),
        label=group[0].label,
        score=max(item.score for item in group),
        box=np.concatenate([corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)]),
        mask=mask,
        place=place,
        cut=best is None,
        mask_score=max(mask_scores, default=None),
        depth=largest.depth,
        pieces=len(parts),
    )


def _covered(item: TileDetection, other: TileDetection) -> float:
    """The share of a detection that another one covers."""
    return float(coco_mask.iou([item.place], [other.place], [1])[0, 0])


def _without_repetitions(found: Sequence[TileDetection]) -> list[TileDetection]:
    """The detections that repeat none with a better score, best first; see 3. of the rule."""
    # A mask without a pixel is worse than any other.
    found = sorted(found, key=lambda item: (not coco_mask.area(item.mask), -item.score))
    near: dict[int, list[int]] = defaultdict(list)
    for i, j in _near_pairs(found):
        near[max(i, j)].append(min(i, j))
    kept: set[int] = set()

    def repeats(item: TileDetection, better: TileDetection) -> bool:
        shared = float(coco_mask.iou([item.place], [better.place], [0])[0, 0])
        return shared >= AGREE or (item.cut and _covered(item, better) >= AGREE)

    for i, item in enumerate(found):
        if not any(repeats(item, found[j]) for j in near[i] if j in kept):
            kept.add(i)
    return sorted((found[i] for i in kept), key=lambda item: -item.score)


def _near_pairs(found: Sequence[TileDetection]) -> Iterator[tuple[int, int]]:
    """Pairs of one class, from different tiles, whose boxes meet; each once."""
    if not found:
        return
    boxes = np.array([item.box for item in found])
    # Most objects are in few of the squares, and few in one of them.
    side = max(float(np.median(boxes[:, 2:] - boxes[:, :2])) * 2, 8.0)
    squares: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for i, item in enumerate(found):
        x1, y1, x2, y2 = (boxes[i] // side).astype(int).tolist()
        places = [
            (item.label, y, x) for y, x in itertools.product(range(y1, y2 + 1), range(x1, x2 + 1))
        ]
        others = {j for place in places for j in squares[place]}
        for place in places:
            squares[place].append(i)
        for j in sorted(others):
            meet = (boxes[i, :2] <= boxes[j, 2:]).all() and (boxes[j, :2] <= boxes[i, 2:]).all()
            if meet and not item.windows & found[j].windows:
                yield j, i


def detections(
    merged: Iterable[TileDetection],
    size: tuple[int, int],
    categories: Sequence[tuple[int, str]],
    *,
    masks: bool = True,
    mask_scores: bool = False,
    depths: bool = False,
    min_score: float = 0.0,
) -> Detections:
    """Convert merged detections; masks are RLEs, and there is no depth map.

    Args:
        merged: best first.
        size: (height, width) of the image.
        categories: (COCO id, name) of label 1, 2, ..., K.
        masks, mask_scores, depths: whether the network gives them, also where nothing was found.
        min_score: detections below it are left out (`Detections.ranking_scores`).
    """

    def score(item: TileDetection) -> float:
        return item.score if item.mask_score is None else item.mask_score

    kept = [item for item in merged if score(item) >= min_score]
    return Detections(
        size=size,
        boxes=np.array([item.box for item in kept], np.float64).reshape(-1, 4),
        labels=np.array([item.label for item in kept], np.int32),
        category_ids=tuple(int(categories[item.label - 1][0]) for item in kept),
        class_names=tuple(categories[item.label - 1][1] for item in kept),
        scores=np.array([item.score for item in kept], np.float32),
        masks=tuple(moved_rle(item.mask, (0, 0), size) for item in kept) if masks else None,
        mask_scores=np.array([item.mask_score for item in kept], np.float32)
        if mask_scores
        else None,
        depths=np.array([item.depth for item in kept], np.float32) if depths else None,
    )
