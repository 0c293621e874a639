"""coco300 from COCO's own files, against the data set that the figures were measured on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.datasets.coco300 import write_coco300

FIELDS = {"id", "image_id", "category_id", "iscrowd", "area", "bbox", "segmentation"}


@pytest.fixture(scope="module")
def coco(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO's layout, with as many of its images as $MRCNN_DATA/coco_mini has."""
    mini, root = data_folder / "coco_mini", tmp_path_factory.mktemp("coco")
    if not mini.exists():
        pytest.skip("$MRCNN_DATA has no coco_mini")
    content: dict[str, dict[str, Any]] = {
        f"{split}2017": {"images": [], "annotations": []} for split in ("train", "val")
    }
    for split in ("train", "train_extra", "val"):
        part = json.loads((mini / "annotations" / f"{split}_full80.json").read_text())
        origin = {image["id"]: image["origin"] for image in part["images"]}
        for image in part["images"]:
            content[image["origin"]]["images"].append(image)
        for annotation in part["annotations"]:
            content[origin[annotation["image_id"]]]["annotations"].append(annotation)
    (root / "annotations").mkdir()
    for split, values in content.items():
        (root / "annotations" / f"instances_{split}.json").write_text(
            json.dumps(values | {"categories": part["categories"]})
        )
        (root / split).symlink_to(mini / "images")
    return root


def test_it_is_the_data_set_that_was_measured(
    coco: Path, data_folder: Path, tmp_path: Path
) -> None:
    write_coco300(coco, tmp_path)
    for split, count in (("train", 300), ("val", 114)):
        name = f"annotations/instances_{split}.json"
        ours, theirs = (
            json.loads((root / name).read_text()) for root in (tmp_path, data_folder / "coco300")
        )
        assert len(ours["images"]) == count
        assert ours["categories"] == theirs["categories"]
        for name in ("id", "file_name", "width", "height"):
            assert [image[name] for image in ours["images"]] == [
                image[name] for image in theirs["images"]
            ]
        assert [{name: a[name] for name in FIELDS} for a in ours["annotations"]] == theirs[
            "annotations"
        ]
    names = [image["file_name"] for image in ours["images"]]
    assert len(list((tmp_path / "images").iterdir())) == 414
    for name in names[::10]:
        ours, theirs = (
            cv2.imread(str(root / "images" / name)) for root in (tmp_path, data_folder / "coco300")
        )
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "annotations/instances_train2017.json: No such file or directory"),
        ("{", "annotations/instances_train2017.json: not JSON "),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}',
            "instances_train2017.json: not COCO 2017's file of that name: 'supercategory'",
        ),
        (
            '{"images": [], "annotations": [], "categories": []}',
            ": image 25 is not in its annotation files (414 missing in all)",
        ),
    ],
)
def test_mistakes(content: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        if content is not None:
            (tmp_path / "coco" / "annotations" / f"instances_{split}.json").write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        write_coco300(tmp_path / "coco", tmp_path / "out")
    assert not (tmp_path / "out").exists()
