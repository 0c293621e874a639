"""Detections on a canvas -> detections in the original image -> COCO results."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32

from mrcnn_jax.inference.annotations import labelme_content
from mrcnn_jax.output import write_file
from mrcnn_jax.pixels.geometry import depth_in_image, in_image
from mrcnn_jax.pixels.rle import PasteStyle, decoded, encoded, paste_rle, sampled_rle
from mrcnn_jax.structures import DEPTH_STRIDE, Instances

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True)
class TileCounts:
    """How the detections of tiles became those of their image (`inference.merging`)."""

    tiles: int
    joined: int
    """Objects that are cut in every tile, and joined from their pieces."""
    repeated: int
    """Detections left out, since their object was seen in another tile too."""
    cut: int
    """Objects that are cut, and of which no other piece was found."""
    full: tuple[float, ...]
    """Of each tile with as many detections as the network gives: the lowest score."""


@dataclass(frozen=True, eq=False)
class Detections:
    """Detections in one image of H x W pixels: N objects, best first."""

    size: tuple[int, int]
    """(H, W) of the original image in pixels."""
    boxes: Float64[np.ndarray, "n 4"]
    """float64 [N, 4]: (x1, y1, x2, y2) in pixels of the original image, continuous in
    [0, W] x [0, H]."""
    labels: Int32[np.ndarray, " n"]
    """int32 [N]: the classes, 1..K."""
    category_ids: tuple[int, ...]
    """N COCO ids of the classes, as in the annotations that the run was trained on."""
    class_names: tuple[str, ...]
    """N names of the classes, from the same annotations."""
    scores: Float32[np.ndarray, " n"]
    """float32 [N]: probabilities of the classes, in 0..1."""
    masks: Bool[np.ndarray, "n h w"] | tuple[dict[str, Any], ...] | None
    """bool [N, H, W]: pixels of each object; or, where RLEs were asked for, N compressed COCO RLEs,
    {"size": [H, W], "counts": str}, which `rles` gives of either.

    None: the network has no mask head, or one that is not trained yet.
    """
    mask_scores: Float32[np.ndarray, " n"] | None = None
    """float32 [N], of the masks: probability of the class * predicted IoU of the mask, at most the
    former.

    None: the network has no mask-IoU head, or one that is not trained yet.
    """
    depths: Float32[np.ndarray, " n"] | None = None
    """float32 [N]: metres from the camera: the median of the depth map over each mask; NaN if it
    has no pixel.

    None: the network has no depth head, or no masks.
    """
    depth_map: Float32[np.ndarray, "h w"] | None = None
    """float32 [H, W]: metres of each pixel. A RoI head's are inside the masks alone, NaN elsewhere.

    None: the network has no depth head, or the image was looked at in tiles.
    """
    path: Path | None = None
    """The file that was read, if any."""
    tiles: TileCounts | None = None
    """None: the image was seen in one piece."""

    @property
    def ranking_scores(self) -> Float32[np.ndarray, " n"]:
        """Scores that a minimum score is compared with: `mask_scores`, or `scores` without them."""
        return self.scores if self.mask_scores is None else self.mask_scores

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """Convert to COCO results, ready for JSON.

        Args:
            image_id: the COCO id that each of them carries.

        Returns:
            For each detection a dict: image_id, category_id, bbox ([x, y, width, height] in pixels
            of the original image), score, and, if there are masks, segmentation (compressed RLE of
            the original image's size), if there are mask scores, mask_score, and, if there is
            depth, depth (metres, or None).
        """
        results: list[dict[str, Any]] = []
        pairs = zip(self.boxes.tolist(), self.rles(), strict=True)
        for row, ((x1, y1, x2, y2), rle) in enumerate(pairs):
            result: dict[str, Any] = {
                "image_id": int(image_id),
                "category_id": self.category_ids[row],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(self.scores[row]),
            }
            if rle is not None:
                result["segmentation"] = rle
            if self.mask_scores is not None:
                result["mask_score"] = float(self.mask_scores[row])
            if self.depths is not None:
                depth = float(self.depths[row])
                result["depth"] = depth if math.isfinite(depth) else None
            results.append(result)
        return results

    def to_labelme(self, path: str | Path, image: str | Path | None = None) -> None:
        """Write the objects as labelme's JSON (`annotations.labelme_content`).

        Args:
            path: the file to write.
            image: the file of the image, by default the one that was read (`self.path`); labelme
                looks for it where it is from `path`.

        Raises:
            ValueError: the image has no file, and none is given.
            OSError: the file cannot be written.
        """
        source = self.path if image is None else Path(image)
        if source is None:
            raise ValueError("to_labelme: this image was no file: name one (image=...)")
        # labelme opens it from the folder itself, not through links to it.
        real = os.path.join(os.path.realpath(source.parent), source.name)
        beside = os.path.relpath(real, os.path.realpath(Path(path).parent))
        content = labelme_content(
            beside,
            self.size,
            self.class_names,
            self.boxes,
            self.rles(),
            self.ranking_scores.tolist(),
        )
        write_file(Path(path), json.dumps(content) + "\n")

    def to_supervision(self) -> supervision.Detections:
        """Convert to `supervision.Detections`, for its annotators, trackers and metrics.

        Returns:
            xyxy float32 [N, 4], mask bool [N, H, W] or None, confidence float32 [N], class_id (0 is
            the first class), data["class_name"] and, if there are mask scores, data["mask_score"].

        Raises:
            ImportError: supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError(f"to_supervision: {error} (pip install supervision)") from None
        masks, data = self.masks, {"class_name": np.array(self.class_names, str)}
        if self.mask_scores is not None:
            data["mask_score"] = self.mask_scores
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32),
            mask=decoded(masks, self.size) if isinstance(masks, tuple) else masks,
            confidence=self.scores,
            class_id=self.labels.astype(int) - 1,
            data=data,
        )

    def at_least(self, score: float) -> Detections:
        """Those with this score or a higher one: `ranking_scores`.

        Raises:
            ValueError: the score is not in 0..1.
        """
        refuse_score(score, "score")
        kept = np.flatnonzero(self.ranking_scores >= score).tolist()

        def of(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[row] for row in kept)

        masks = self.masks
        if masks is not None:
            masks = of(masks) if isinstance(masks, tuple) else masks[kept]
        return replace(
            self,
            boxes=self.boxes[kept],
            labels=self.labels[kept],
            category_ids=of(self.category_ids),
            class_names=of(self.class_names),
            scores=self.scores[kept],
            masks=masks,
            mask_scores=None if self.mask_scores is None else self.mask_scores[kept],
            depths=None if self.depths is None else self.depths[kept],
        )

    def rles(self) -> Sequence[dict[str, Any] | None]:
        """The mask of each object as a compressed COCO RLE; Nones if there are no masks."""
        if self.masks is None:
            return [None] * len(self.scores)
        return self.masks if isinstance(self.masks, tuple) else encoded(self.masks)


def refuse_score(score: float, name: str = "min_score") -> None:
    """ValueError, with the argument's name, if it is no probability (such as percent)."""
    if not 0 <= score <= 1:
        raise ValueError(f"{name}: {score}: must be in 0..1")


def reduced(result: Mapping[str, Any], step: int) -> dict[str, Any]:
    """A COCO result on a picture that is `step` times smaller each way; its mask is sampled."""
    small = dict(result) | {"bbox": [value / step for value in result["bbox"]]}
    if "segmentation" in result:
        small["segmentation"] = sampled_rle(result["segmentation"], step)
    return small


def image_detections(
    found: Instances,
    *,
    scale: Float32[np.ndarray, " 2"],
    size: tuple[int, int],
    categories: Sequence[tuple[int, str]],
    paste: PasteStyle,
    depth: Float32[np.ndarray, "h4 w4"] | Float32[np.ndarray, "n m m"] | None = None,
    stride: int = DEPTH_STRIDE,
    min_score: float = 0.0,
) -> Detections:
    """Convert the valid detections on a canvas to those in its image, with masks as RLEs.

    Args:
        found: NumPy leaves: boxes float32 in pixels of the canvas, labels 1..K, scores, valid, and
            masks (float32 probabilities [N, M, M]) and mask_scores, or None.
        scale: (y, x): canvas pixels = original pixels * scale.
        size: (height, width) of the original image.
        categories: (COCO id, name) of label 1, 2, ..., K.
        paste: how masks become pixels (`pixels.geometry.paste_region`).
        depth: metres, of the canvas or of the cells of each box (`Prediction.depth`).
        stride: canvas pixels between the cells of a depth map.
        min_score: detections below it are left out (`Detections.ranking_scores`).
    """
    assert found.scores is not None
    scores = found.scores if found.mask_scores is None else found.mask_scores
    kept = found.valid.copy()
    kept[kept] = scores[kept] >= min_score  # the scores of invalid rows may be anything
    found = jax.tree.map(lambda field: field[kept], found)
    assert found.labels is not None
    assert found.scores is not None
    boxes, clipped = in_image(found.boxes, scale, size)
    numbers = found.labels.tolist()
    masks = depths = depth_map = None
    if depth is not None:
        assert found.masks is not None
        depth = depth if depth.ndim == 2 else depth[kept]
        depth_map, depths = depth_in_image(
            depth, found.masks, boxes, scale, size, stride=stride, style=paste
        )
    if found.masks is not None:
        pairs = zip(found.masks, boxes, strict=True)
        masks = tuple(paste_rle(mask, box, size, paste) for mask, box in pairs)
    return Detections(
        size=size,
        boxes=clipped,
        labels=found.labels,
        category_ids=tuple(int(categories[label - 1][0]) for label in numbers),
        class_names=tuple(categories[label - 1][1] for label in numbers),
        scores=found.scores,
        masks=masks,
        mask_scores=found.mask_scores,
        depths=depths,
        depth_map=depth_map,
    )
