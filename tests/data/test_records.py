"""The data set in memory: labels, COCO format, lost images."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from pycocotools import mask as rle_ops
from pycocotools.coco import COCO

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.reading import read_coco

DATA = DataConfig()


def test_to_coco_is_what_pycocotools_reads_from_the_file(
    mixed_file: Path, mixed_content: dict[str, Any]
) -> None:
    ours = read_coco(mixed_file, mixed_file.parent / "images", DATA).to_coco()
    theirs = COCO(str(mixed_file))
    assert {a["id"] for a in ours["annotations"]} == set(theirs.anns)
    for a in ours["annotations"]:
        raw = theirs.anns[a["id"]]
        for key in ("image_id", "category_id", "area", "iscrowd", "bbox"):
            assert a[key] == raw[key], key
        assert ("segmentation" in a) == ("segmentation" in raw)
        if "segmentation" in a:
            assert (rle_ops.decode(a["segmentation"]) == theirs.annToMask(raw)).all()
    assert {(c["id"], c["name"]) for c in ours["categories"]} == {
        (3, "three"),
        (7, "seven"),
        (90, "ninety"),
    }
    json.dumps(ours)


def test_one_image_in_a_hundred_may_be_lost(mixed_file: Path) -> None:
    dataset = read_coco(mixed_file, mixed_file.parent / "images", DATA)
    dataclasses.replace(dataset, listed=100, lost=("a",)).refuse_lost_images()
    with pytest.raises(ConfigError, match=r"2 of 199 images are lost .*: a, b$"):
        dataclasses.replace(dataset, listed=199, lost=("a", "b")).refuse_lost_images()
