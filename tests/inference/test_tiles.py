"""An image in tiles: what is found, in what memory, and by which calls of the detector."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import mrcnn_jax
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.report import Report
from mrcnn_jax.inference.results import Detections
from mrcnn_jax.inference.tiles import Tiling, detect_in_tiles
from mrcnn_jax.inference.windowed_images import ArrayImage, open_windowed
from mrcnn_jax.pixels.windows import Window
from tests.inference.frames import read
from tests.inference.perfect import CATEGORIES, as_set, seen
from tests.sparse_tiff import sparse_tiff


def reds(images: Sequence[np.ndarray]) -> list[Detections]:
    """The perfect detector, by the red channel."""
    return [seen(image[..., 0]) for image in images]


def scene_of_discs() -> np.ndarray:
    """Small ones in rows, and one that lies on many tiles."""
    scene = np.zeros((300, 420, 3), np.uint8)
    for number, (y, x) in enumerate((y, x) for y in range(12, 300, 25) for x in range(12, 420, 25)):
        if np.hypot(y - 150, x - 210) > 130:
            cv2.circle(scene, (x, y), 10, (1 + number % 200, 0, 0), cv2.FILLED)
    cv2.circle(scene, (210, 150), 115, (250, 0, 0), cv2.FILLED)
    return scene


@pytest.mark.parametrize(("tile", "overlap", "batch"), [(100, 30, 4), (64, 24, 1), (420, 0, 3)])
def test_tiles_find_what_the_whole_image_shows(tile: int, overlap: int, batch: int) -> None:
    scene = scene_of_discs()
    calls: list[int] = []

    def detect(images: Sequence[np.ndarray]) -> list[Detections]:
        calls.append(len(images))
        assert {image.shape for image in images} == {(min(tile, 300), min(tile, 420), 3)}
        return reds(images)

    found = detect_in_tiles(
        ArrayImage(scene), Tiling(tile, overlap), detect, CATEGORIES, batch=batch, limit=1000
    )
    assert as_set(found) == as_set(seen(scene[..., 0]))
    assert found.size == (300, 420)
    assert found.tiles is not None
    assert sum(calls) == found.tiles.tiles
    assert set(calls[:-1]) <= {batch}
    assert (found.tiles.cut, found.tiles.full) == (0, ())
    assert (found.tiles.joined > 0) == (tile < 240)


def test_scores_and_full_tiles() -> None:
    """The lowest score of each tile that has as many objects as there may be; merged objects under
    the least score are left out."""
    scene = np.zeros((64, 130, 3), np.uint8)
    for colour, x in ((100, 20), (150, 40), (200, 100)):
        cv2.circle(scene, (x, 30), 5, (colour, 0, 0), cv2.FILLED)
    found = detect_in_tiles(
        ArrayImage(scene), Tiling(64, 0), reds, CATEGORIES, batch=2, limit=2, min_score=0.84
    )
    assert found.scores.tolist() == pytest.approx([0.9, 0.85])
    assert found.tiles is not None
    assert found.tiles.full == (pytest.approx(0.85),)


def test_nothing_found_has_as_many_scores() -> None:
    """A network that gives mask scores and depths gives none of them for no object, not None."""

    def scored(images: Sequence[np.ndarray]) -> list[Detections]:
        return [
            replace(found, mask_scores=found.scores, depths=found.scores) for found in reds(images)
        ]

    scene = ArrayImage(np.zeros((64, 130, 3), np.uint8))
    for detect, shape in ((scored, (0,)), (reds, None)):
        found = detect_in_tiles(scene, Tiling(64, 0), detect, CATEGORIES, batch=2, limit=2)
        for values in (found.mask_scores, found.depths):
            assert (None if values is None else values.shape) == shape


def test_a_large_tiff_is_looked_at_in_little_memory(tmp_path: Path) -> None:
    """108 MB of pixels in less than 40 % of that; objects at borders and corners of tiles."""
    side, discs = 6000, {(3000, 3000): 9, (500, 40): 12, (5950, 5950): 15, (984, 1968): 18}
    sparse_tiff(tmp_path / "large.tif", side, discs)

    tracemalloc.start()
    try:
        scene = open_windowed(tmp_path / "large.tif", DataConfig(), Report())
        found = detect_in_tiles(scene, Tiling(512, 128), reds, CATEGORIES, batch=2, limit=100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 43e6
    centres = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
    assert {(int(y), int(x)) for x, y in centres} == set(discs)
    masks = found.masks
    assert isinstance(masks, tuple)
    assert masks[0]["size"] == [side, side]
    np.testing.assert_allclose(coco_mask.area(list(masks)), np.pi * 40**2, rtol=0.02)


def test_too_many_pixels_for_run_lengths() -> None:
    class Huge:
        size = 70_000, 70_000

        def read(self, window: Window) -> np.ndarray:
            raise AssertionError("read")

    with pytest.raises(ConfigError, match="70000 x 70000: COCO's masks have fewer than"):
        detect_in_tiles(Huge(), Tiling(512, 64), reds, CATEGORIES, batch=1, limit=9)


# -- by a network ----------------------------------------------------------------------------------


def assert_same(found: Detections, expected: Detections) -> None:
    assert len(found.scores) == len(expected.scores) > 0
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-2)
    assert found.category_ids == expected.category_ids
    ious = [
        coco_mask.iou([a], [b], [0])[0, 0]
        for a, b in zip(found.masks, expected.masks, strict=True)
        if coco_mask.area(a)
    ]
    assert min(ious) > 0.99


def test_one_tile_is_the_image(model: mrcnn_jax.Model, folder: Path) -> None:
    expected = model.predict(folder / "0.png", rle=True)
    found = model.predict(folder / "0.png", tile=128)
    assert_same(found, expected)
    assert found.path == folder / "0.png"
    assert found.tiles is not None
    assert found.tiles.tiles == 1
    best = model.predict(folder / "0.png", tile=128, min_score=float(expected.scores[2]) - 1e-3)
    assert len(best.scores) == 3


def test_images_side_by_side_are_tiles(model: mrcnn_jax.Model, folder: Path) -> None:
    """Each gives what it gives alone; from an array and, by windows, from a file."""
    one, two = (read(folder / name) for name in ("0.png", "2.png"))
    scene = np.concatenate([one, two], axis=1)
    alone = [model.predict(image, rle=True) for image in (one, two)]
    moved = alone[1].boxes + np.array([128, 0, 128, 0])
    boxes = np.concatenate([alone[0].boxes, moved])
    scores = np.concatenate([found.scores for found in alone])
    order = np.argsort(-scores, kind="stable")
    found = model.predict(scene, tile=128, overlap=0)
    np.testing.assert_allclose(found.scores, scores[order], atol=1e-4)
    np.testing.assert_allclose(found.boxes, boxes[order], atol=1e-2)
    Image.fromarray(scene).save(folder.parent / "scene.tif", tiffinfo={278: 16})
    (of_file,) = model.predict_many([folder.parent / "scene.tif"], tile=128, overlap=0)
    np.testing.assert_array_equal(of_file.boxes, found.boxes)
    assert of_file.masks == found.masks


def test_other_views_are_refused(model: mrcnn_jax.Model) -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    for wrong in ({"flip": True}, {"scales": (0.5, 1.0)}, {"overlap": 128}, {"tile": 8}):
        with pytest.raises(ValueError, match=r"^(tile|overlap): "):
            model.predict(image, **{"tile": 128, **wrong})


def test_scales_are_those_of_a_tile(model: mrcnn_jax.Model, folder: Path) -> None:
    """A smaller image is not enlarged: with tiles of twice its size, it has half of its scale."""
    sizes: list[tuple[int, int]] = []
    inner = model._predictor.detections_of_parts

    def parts(images: Sequence[np.ndarray], *, like: tuple[int, int]) -> list[Detections]:
        sizes.append(like)
        return inner(images, like=like)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model._predictor, "detections_of_parts", parts)
        found = model.predict(read(folder / "0.png"), tile=256)
    assert sizes == [(256, 256)]
    assert found.size == (128, 128)
    assert (found.boxes <= 128).all()
