"""Two small data sets: generated shapes, and one by hand with every kind of segmentation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from findings import Read
from pycocotools import mask as rle_ops

from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.datasets.shapes import write_shapes

SIZES = (
    (60, 80),
    (80, 60),
    (64, 64),
    (50, 96),
    (96, 50),
    (60, 80),
    (60, 80),
)  # (height, width) of images 11, 12, ...


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """33 training images (one empty, one with a crowd) and 8 validation images."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, train=33, val=8, seed=3)
    return folder


@pytest.fixture(scope="session")
def shapes_data() -> DataConfig:
    """Shapes at their own size, so that pixels stay as they are."""
    return DataConfig(
        short_side=128,
        long_side=128,
        canvases=((128, 160),),
        max_objects=8,
        max_ignored=2,
        mask_crop=28,
    )


@pytest.fixture
def mixed_data() -> DataConfig:
    return DataConfig(
        short_side=96,
        long_side=128,
        canvases=((96, 128), (128, 96)),
        max_objects=4,
        max_ignored=1,
        mask_crop=28,
    )


@pytest.fixture
def mixed_content(tmp_path: Path) -> dict[str, Any]:
    """The content of an annotation file with gaps in its category ids; images in tmp_path/images.

    Image 17 has no annotation, image 16 only a crowd.
    """
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    images = []
    for number, (height, width) in enumerate(SIZES):
        coarse = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
        cv2.imwrite(
            str(tmp_path / "images" / f"photo {number}.png"), cv2.resize(coarse, (width, height))
        )
        images.append(
            {
                "id": 11 + number,
                "file_name": f"photo {number}.png",
                "height": height,
                "width": width,
            }
        )
    mask = np.zeros((60, 80), np.uint8)
    mask[10:30, 20:50] = 1
    mask[15:20, 30:40] = 0  # a hole
    compressed = rle_ops.encode(np.asfortranarray(mask))["counts"].decode()
    runs = [30 * 80, 30 * 80]  # column by column: the right half of 80 x 60
    triangle = [10.0, 10.0, 40.0, 10.0, 10.0, 50.0]
    annotations = [
        _annotation(
            0, 11, 90, [20, 10, 30, 20], {"size": [60, 80], "counts": compressed}, area=550
        ),
        _annotation(5, 11, 3, [0, 0, 12.5, 20.25], None),
        _annotation(6, 12, 7, [30, 0, 30, 80], {"size": [80, 60], "counts": runs}),
        _annotation(7, 13, 3, [10, 10, 30, 40], [triangle]),
        _annotation(
            8,
            14,
            7,
            [10, 10, 80, 40],
            [triangle, [60.0, 20.0, 90.0, 20.0, 90.0, 40.0, 60.0, 40.0]],
            area=1200,
        ),
        _annotation(9, 15, 90, [10, 10, 30, 40], [triangle]),
        _annotation(
            4, 16, 3, [20, 10, 30, 20], {"size": [60, 80], "counts": compressed}, iscrowd=1
        ),
    ]
    categories = [
        {"id": 90, "name": "ninety"},
        {"id": 3, "name": "three"},
        {"id": 7, "name": "seven"},
    ]
    return {"images": images[::-1], "annotations": annotations, "categories": categories}


def _annotation(
    number: int, image: int, category: int, bbox: list[float], segmentation: Any, **more: Any
) -> dict[str, Any]:
    base = {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": bbox,
        "area": bbox[2] * bbox[3],
        "iscrowd": 0,
    }
    return {**base, **({} if segmentation is None else {"segmentation": segmentation}), **more}


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes an annotation file beside tmp_path/images."""

    def write(content: Any) -> Path:
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def mixed_file(write_json: Callable[[Any], Path], mixed_content: dict[str, Any]) -> Path:
    return write_json(mixed_content)


@pytest.fixture
def read_mixed(tmp_path: Path, write_json: Callable[[Any], Path]) -> Read:
    """Reads the content of an annotation file, with the images in tmp_path/images by default."""

    def read(content: Any, folder: Path = tmp_path / "images", **options: Any) -> CocoDataset:
        return read_coco(write_json(content), folder, DataConfig(), **options)

    return read
