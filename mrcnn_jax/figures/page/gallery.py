"""The page's images: those that went worst and best, with the outlines of their masks."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

from mrcnn_jax.evaluation.matches import SCORE, image_qualities, matches_at_half
from mrcnn_jax.figures.draw import Image
from mrcnn_jax.pixels.encode import encode_image

LONG_SIDE = 640  # of an image on the page, in pixels; boxes and masks are in these
# An image's JPEG and the outlines of its masks take the first quality and tolerance (in pixels)
# that keep them within these bytes, so that the file stays below 15 MB. In a gallery of more than
# FULL images each has less.
JPEG_BYTES, OUTLINE_BYTES, FULL = 150_000, 70_000, 60
QUALITIES = (85, 70, 50, 30, 15)
TOLERANCES = (0.6, 1.5, 4.0, 10.0)


def gallery(evaluation: COCOeval, read_image: Callable[[int], Image], limit: int) -> dict[str, Any]:
    """Collect the images with the worst and the best panoptic quality, ready for JSON.

    Args:
        evaluation: of masks, or of boxes (`evaluation.average_precision.match_results`).
        read_image: image id -> uint8 RGB in original pixels.
        limit: number of images at most, half of them the worst and half the best.
    """
    qualities = image_qualities(evaluation)
    ranked = list(qualities)
    best = limit // 2
    chosen = ranked
    if len(ranked) > limit:
        chosen = ranked[: limit - best] + ranked[len(ranked) - best :]
    matches = matches_at_half(evaluation)
    place = {category: k for k, category in enumerate(evaluation.params.catIds)}
    share = min(1.0, FULL / max(len(chosen), 1))
    shown = []
    for number in chosen:
        image = read_image(number)
        scale = LONG_SIDE / max(image.shape[:2])
        truth = evaluation.cocoGt.imgToAnns[number]
        found = sorted(evaluation.cocoDt.imgToAnns[number], key=lambda d: -d["score"])
        order = {annotation["id"]: i for i, annotation in enumerate(truth)}
        drawn = _drawn([*truth, *found], place, scale, share * OUTLINE_BYTES)
        detections = []
        for shape, detection in zip(drawn[len(truth) :], found, strict=True):
            match = matches[detection["id"]]
            taken = None if match.annotation is None else order[match.annotation]
            score = float(detection["score"])
            shape |= {"score": score, "match": taken, "ignored": match.ignored}
            if detection.get("depth") is not None:
                shape["depth"] = round(detection["depth"], 3)  # metres
            detections.append(shape)
        shown.append(
            {
                "name": str(evaluation.cocoGt.imgs[number].get("file_name", number)),
                "quality": round(float(qualities[number]), 5),
                "width": max(round(image.shape[1] * scale), 1),
                "height": max(round(image.shape[0] * scale), 1),
                "jpeg": _jpeg(image, share * JPEG_BYTES),
                "objects": [
                    {**shape, "crowd": bool(annotation["iscrowd"])}
                    for shape, annotation in zip(drawn, truth, strict=False)
                ],
                "detections": detections,
            }
        )
    return {"score": SCORE, "ranked": len(ranked), "images": shown}


def _drawn(
    instances: Sequence[Mapping[str, Any]], place: Mapping[int, int], scale: float, budget: float
) -> list[dict[str, Any]]:
    """Class, box and outline of each instance, at the finest tolerance within `budget` bytes."""
    segmentations = [one.get("segmentation") for one in instances]
    masks = [one if isinstance(one, dict) else None for one in segmentations]
    for tolerance in TOLERANCES:
        paths = [outline(mask, scale, tolerance) for mask in masks]
        if sum(map(len, paths)) <= budget:
            break
    boxes = [[round(float(side) * scale, 1) for side in instance["bbox"]] for instance in instances]
    return [
        {"class": place[i["category_id"]], "box": box, "path": path}
        for i, box, path in zip(instances, boxes, paths, strict=True)
    ]


def outline(rle: Mapping[str, Any] | None, scale: float, tolerance: float = TOLERANCES[0]) -> str:
    """Trace a mask as an SVG path, to be filled by the even-odd rule.

    Args:
        rle: a compressed RLE; None: no mask.
        scale: pixels of the page per pixel of the mask.
        tolerance: points may be left out that lie at most about this far from the path, in pixels
            of the page.

    Returns:
        The path in whole pixels of the page; "" for an empty mask.
    """
    if rle is None:
        return ""
    x, y, width, height = (int(side) for side in coco_mask.toBbox(rle))
    if not width * height:
        return ""
    # With a border of zeros, or an enlarged mask would have no half-way to its outside.
    inside = np.asarray(coco_mask.decode(rle))[y : y + height, x : x + width]
    mask = np.pad(inside, 1).astype(np.float32)
    # A contour runs through the centres of its pixels, half a pixel inside the mask: at twice the
    # scale that is half as much.
    size = max(round(mask.shape[1] * scale * 2), 1), max(round(mask.shape[0] * scale * 2), 1)
    method = cv2.INTER_LINEAR if scale > 0.5 else cv2.INTER_AREA
    drawn = (cv2.resize(mask, size, interpolation=method) >= 0.5).astype(np.uint8)
    contours, _ = cv2.findContours(drawn, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parts = []
    for contour in contours:
        points = cv2.approxPolyDP(contour, 2 * tolerance, closed=True)[:, 0] + 0.5
        if len(points) > 1:  # two: a line, which its stroke shows
            corner = [x - 1, y - 1]  # the mask begins one pixel before its box
            places = ((points * mask.shape[::-1] / size + corner) * scale).round().astype(int)
            steps = np.diff(places, axis=0).ravel().tolist()
            parts.append(f"M{places[0, 0]} {places[0, 1]}l{' '.join(map(str, steps))}z")
    return "".join(parts)


def _jpeg(image: Image, budget: float) -> str:
    """Encode as a base64 JPEG, in the best of QUALITIES within `budget` bytes, or the worst."""
    scale = min(1.0, LONG_SIDE / max(image.shape[:2]))
    size = max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    for quality in QUALITIES:
        text = base64.b64encode(encode_image(small, ".jpg", quality=quality)).decode()
        if len(text) <= budget:
            break
    return text
