"""In what form a file as a whole writes its boxes and masks, as far as it is not COCO's.

One annotation that is odd may be repaired or dropped; where most of a file is odd in the same way,
the file means something else (corners for sizes, fractions for pixels, y before x, the pixels of
another picture) and is refused with what it looks like. A box and a mask that disagree do not say
which of them is wrong: the other annotations do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.json_values import is_number, short
from mrcnn_jax.data.usual_mistakes import MOST, Suspect, near, usual_mistake
from mrcnn_jax.pixels.places import (
    FAR_SIDE,
    RLE,
    Box,
    agrees,
    clipped,
    corners_of,
    far,
    outside,
    swapped,
)

SHARE = 0.2  # of a file's annotations: fewer that are odd are faults of their own
SUSPECTS = 2000  # are kept: enough to tell how a file is to be read


def flat_polygons(segmentation: list[Any]) -> tuple[list[Any], bool]:
    """Polygons as COCO writes them, x, y, x, y, ..., and whether they were lists of points.

    A point is [x, y] or {"x": x, "y": y}; polygons of points may be nested once more. What is
    neither is left as it is.
    """
    if _are_points(segmentation):
        return [_flat(segmentation)], True
    parts: list[Any] = []
    for part in segmentation:
        if isinstance(part, list) and part and all(map(_are_points, part)):
            parts += part
        else:
            parts.append(part)
    points = [_are_points(part) for part in parts]
    return [_flat(p) if it else p for p, it in zip(parts, points, strict=True)], any(points)


def _are_points(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(map(_is_point, value))


def _is_point(value: Any) -> bool:
    if isinstance(value, dict):
        return {"x", "y"} <= value.keys()
    return isinstance(value, list) and len(value) == 2 and not isinstance(value[0], list | dict)


def _flat(points: list[Any]) -> list[Any]:
    pairs = ((p["x"], p["y"]) if isinstance(p, dict) else p for p in points)
    return [coordinate for pair in pairs for coordinate in pair]


def polygon_extent(segmentation: Any) -> Box | None:
    """The box around the points of polygons as they are written; None if there are none."""
    if not isinstance(segmentation, list):
        return None
    flat = all(map(is_number, segmentation))
    parts = [segmentation] if flat else flat_polygons(segmentation)[0]
    usable = [p for p in parts if isinstance(p, list) and len(p) >= 6 and all(map(is_number, p))]
    if not usable:
        return None
    x, y = ([value for part in usable for value in part[axis::2]] for axis in (0, 1))
    return float(min(x)), float(min(y)), float(max(x)), float(max(y))


def _in_unit(values: Iterable[float]) -> bool:
    return all(0 <= value <= 1 for value in values)


@dataclass
class Formats:
    """Evidence in a file that its boxes or masks are written in another form than COCO's."""

    boxes: int = 0
    not_sizes: int = 0  # impossible as (x, y, w, h)
    not_corners: int = 0  # impossible as (x1, y1, x2, y2)
    box_fractions: int = 0
    masks: int = 0
    mask_fractions: int = 0
    pairs: int = 0  # annotations with a bbox and a mask
    far: int = 0  # pairs that are not in the same place
    suspects: list[Suspect] = field(default_factory=list)
    suspected: int = 0  # also those that were too many to keep
    other_sizes: list[tuple[list[Any], int, int]] = field(default_factory=list)
    """(size, height, width) of the run lengths of another size than their image."""
    placed: int = 0  # annotations with a box, or else polygons
    leaving: int = 0  # those that leave their image
    leaving_swapped: int = 0  # the same, read as (y, x)
    beyond: int = 0  # wholly to the right of their image or below
    negative: int = 0
    reach: float = 0.0  # the farthest side as a share of the image's

    def add(
        self,
        bbox: Box | None,
        segmentation: Any,
        rle: RLE | None,
        extent: Box | None,
        height: int,
        width: int,
    ) -> None:
        """Counts one annotation.

        Args:
            bbox: as written, with sides over 0; None if there is no such box.
            segmentation: as written; None if there is no mask.
            rle: the mask; None if it is unusable.
            extent: the box around its pixels; None if there are none.
            height: of the image.
            width: of the image.
        """
        corners = None if bbox is None else corners_of(bbox)
        if bbox is not None:
            self._add_box(bbox, extent, height, width)
        # Only of a mask that is odd, or has no box, the points are looked at.
        small = extent is None or max(extent[2] - extent[0], extent[3] - extent[1]) <= FAR_SIDE
        together = corners is not None and agrees(corners, rle, extent, height, width)
        written = polygon_extent(segmentation) if small or not together else None
        if corners is not None and written is not None:
            together = together or near(corners, written)  # also outside of the image
        place = corners or written
        if place is not None:
            self._add_place(place, height, width)
        if not segmentation:
            return
        self.masks += 1
        size = segmentation.get("size") if isinstance(segmentation, dict) else None
        if isinstance(size, list) and size != [height, width]:
            self.other_sizes.append((size, height, width))
        if written and _in_unit(written) and min(height, width) >= 8:
            # A polygon of one pixel in the corner is just that, in whole numbers.
            self.mask_fractions += not all(value in (0, 1) for value in written)
        if bbox is None:
            return
        self.pairs += 1
        # Run lengths of no pixel are in no other place.
        self.far += not together and rle is not None and (extent or written) is not None
        self.suspected += not together
        known = written or extent
        if not together and known is not None and len(self.suspects) < SUSPECTS:
            runs = rle if isinstance(segmentation, dict) else None
            self.suspects.append(Suspect(bbox, known, runs, height, width))

    def _add_box(self, bbox: Box, extent: Box | None, height: int, width: int) -> None:
        def impossible(box: Box) -> bool:
            inside = clipped(box, height, width)
            if outside(box, height, width) > 1 or box[2] <= box[0] or box[3] <= box[1]:
                return True
            return extent is not None and far(inside, extent)

        self.boxes += 1
        self.not_sizes += impossible(corners_of(bbox))
        self.not_corners += impossible(bbox)
        # In a tiny image, or where the mask agrees, a box of one pixel in the corner is just that.
        self.box_fractions += (
            _in_unit(bbox)
            and min(height, width) >= 8
            and (
                extent is None
                or far(corners_of(bbox), extent)
                or not all(value in (0, 1) for value in bbox)
            )
        )

    def _add_place(self, box: Box, height: int, width: int) -> None:
        self.placed += 1
        self.leaving += outside(box, height, width) > 1
        self.leaving_swapped += outside(swapped(box), height, width) > 1
        self.beyond += box[0] >= width or box[1] >= height
        self.negative += min(box) < -1
        self.reach = max(self.reach, box[2] / width, box[3] / height)

    def refuse(self, path: Path) -> None:
        """ConfigError, with what the file looks like, if a telling share of it is odd."""
        for fault in (
            self._fractions,
            self._corners,
            self._other_size,
            self._misread,
            self._leaves,
        ):
            text = fault()
            if text:
                raise ConfigError(f"{path}: {text}")

    def _fractions(self) -> str | None:
        multiply = "they fit as fractions of the image: multiply them by its width and height"
        masks = self.mask_fractions and self.mask_fractions >= 0.5 * self.masks
        if self.box_fractions and self.box_fractions >= 0.5 * self.boxes:
            too = " (the polygons, too)" if masks else ""
            return (
                f"{self.box_fractions} of {self.boxes} boxes lie in 0..1, which is no box in "
                f"pixels; {multiply}{too}"
            )
        if masks:
            return (
                f"{self.mask_fractions} of {self.masks} masks have polygons in 0..1, which is no "
                f"place in pixels; {multiply}"
            )
        return None

    def _corners(self) -> str | None:
        # A correct (x, y, w, h) is often impossible as corners; one or two boxes that leave the
        # image by far prove nothing.
        if self.not_sizes >= max(2, SHARE * self.boxes) and self.not_corners <= 0.05 * self.boxes:
            return (
                f"{self.not_sizes} of {self.boxes} boxes are impossible as [x, y, width, "
                "height]; they fit as [x1, y1, x2, y2]: write [x1, y1, x2 - x1, y2 - y1]"
            )
        return None

    def _other_size(self) -> str | None:
        count = len(self.other_sizes)
        if not count or count < 0.5 * self.masks:
            return None
        exchanged = sum(size == [width, height] for size, height, width in self.other_sizes)
        size, height, width = self.other_sizes[0]
        text = (
            f"{count} of {self.masks} masks are run lengths of another size than their image "
            f"(the first: size {short(size)} in an image of [{height}, {width}], height and width)"
        )
        if exchanged > 0.5 * count:
            return (
                f"{text}; they look like [width, height]: encode the mask as [height, width], its "
                "runs down the columns (pycocotools.mask.encode(np.asfortranarray(mask)))"
            )
        return f"{text}: resize each mask to its image, or list the images that were annotated"

    def _misread(self) -> str | None:
        text = f"of {self.pairs} masks are not where their bbox is"
        known = self.suspects
        many = self.suspected >= max(SHARE * self.pairs, min(2, self.pairs))
        enough = len(known) >= MOST * min(self.suspected, SUSPECTS)
        if known and many and enough and (mistake := usual_mistake(known)) is not None:
            return f"{self.suspected} {text}; {mistake}"
        if self.far >= max(2, 0.5 * self.pairs):
            return (
                f"{self.far} {text}, and no usual mistake explains it (y before x, fractions, "
                "another size): correct the one that is wrong, or leave it out: without bbox boxes "
                "come from the masks, without segmentation there are boxes alone"
            )
        return None

    def _leaves(self) -> str | None:
        what = "boxes" if self.boxes else "polygons"
        least = max(2, SHARE * self.placed)
        if self.leaving >= least and self.leaving_swapped <= 0.05 * self.placed:
            return (
                f"{self.leaving} of {self.placed} {what} leave their image; they fit as y before "
                "x (boxes as [y, x, height, width]): write x first, in boxes and polygons"
            )
        # Garbage reaches farther, and what a tile cuts off lies on all sides.
        another = self.reach <= 10 and self.negative <= 0.05 * self.placed
        if self.beyond >= max(3, least) and another:
            return (
                f"{self.beyond} of {self.placed} {what} lie to the right of their image or below; "
                f"they reach {self.reach:.1f} times its sides and fit a picture of another size: "
                "scale boxes and polygons to the images, or list the images that were annotated"
            )
        return None

    @property
    def in_a_corner(self) -> bool:
        """Whether many boxes all lie in the upper left quarter of their images, or nearly so."""
        return self.placed >= 20 and self.reach <= 0.55
