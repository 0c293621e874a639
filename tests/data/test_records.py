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
from mrcnn_jax.data.report import Reason

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


def test_categories_are_matched_by_name(mixed_file: Path, mixed_content: dict[str, Any]) -> None:
    """The file's ids are 3, 7, 90 for three, seven, ninety. Other ids in another order, with one
    more between: labels, ids and annotations follow the names."""
    dataset = read_coco(mixed_file, mixed_file.parent / "images", DATA)
    own = [(3, "three"), (7, "seven"), (90, "ninety")]
    assert dataset.matched_to([*own, (1, "one")], "run") is dataset
    before = len(dataset.report.findings)
    matched = dataset.matched_to([(7, "ninety"), (8, "one"), (9, "seven"), (2, "three")], "run")
    assert len(dataset.report.findings) == before  # those of the file stay its own
    assert [(c.id, c.name) for c in matched.categories] == [
        (2, "three"),
        (7, "ninety"),
        (9, "seven"),
    ]
    ids = {3: 2, 90: 7, 7: 9}
    expected = {a["id"]: ids[a["category_id"]] for a in mixed_content["annotations"]}
    content = matched.to_coco()
    assert {a["id"]: a["category_id"] for a in content["annotations"]} == expected
    assert (
        matched.report.findings[Reason.MATCHED, Reason.MATCHED.text.format(file="run")].count == 3
    )
    assert matched.with_images(matched.images).file_ids == {7: 90, 9: 7, 2: 3}


@pytest.mark.parametrize(
    ("there", "unknown"),
    [
        ([(3, "three"), (7, "seven")], r"90 'ninety' \(there None\)$"),
        ([(3, "Three"), (7, "seven"), (90, "ninety")], r"3 'three' \(there 'Three'\)$"),
        # Two of one name: only the ids can tell them apart.
        ([(1, "three"), (3, "three"), (8, "seven"), (90, "ninety")], r"7 'seven' \(there None\)$"),
    ],
)
def test_categories_that_cannot_be_matched_are_named(
    mixed_file: Path, there: list[tuple[int, str]], unknown: str
) -> None:
    dataset = read_coco(mixed_file, mixed_file.parent / "images", DATA)
    message = rf"instances.json: categories that the run does not have: {unknown}"
    with pytest.raises(ConfigError, match=message):
        dataset.matched_to(there, "the run")


def test_a_file_without_an_object_to_train_on(
    mixed_file: Path, mixed_content: dict[str, Any]
) -> None:
    folder = mixed_file.parent / "images"
    read_coco(mixed_file, folder, DATA).refuse_without_objects()
    for annotation in mixed_content["annotations"]:
        annotation["iscrowd"] = 1
    for left, why in (
        (mixed_content["annotations"], "all its 7 annotations have iscrowd 1, .*: write 0 to"),
        ([], "it has no annotations"),
        ([mixed_content["annotations"][0] | {"iscrowd": 0, "segmentation": "x"}], "dropped 1: .*"),
    ):
        mixed_file.write_text(json.dumps(mixed_content | {"annotations": left}))
        with pytest.raises(ConfigError, match=rf"json: no object to train on: {why}"):
            read_coco(mixed_file, folder, DATA).refuse_without_objects()


def test_one_image_in_a_hundred_may_be_lost(mixed_file: Path) -> None:
    dataset = read_coco(mixed_file, mixed_file.parent / "images", DATA)
    dataclasses.replace(dataset, listed=100, lost=("a",)).refuse_lost_images()
    with pytest.raises(ConfigError, match=r"2 of 199 images are lost .*: a, b$"):
        dataclasses.replace(dataset, listed=199, lost=("a", "b")).refuse_lost_images()
