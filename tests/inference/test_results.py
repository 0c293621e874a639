"""Detections on canvases -> COCO results in original pixels."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ops.test_points import bilinear_loop
from pycocotools import mask as coco_mask

from mrcnn_jax.inference.results import Detections, image_detections, reduced
from mrcnn_jax.pixels.rle import PasteStyle, decoded, paste_rle
from mrcnn_jax.structures import Instances

SCALES = np.array([[2.0, 2.5], [1.0, 1.0], [np.nan, np.nan]], np.float32)
SIZES = np.array([[20, 30], [40, 10], [-1, -1]], np.int32)


def _detections(masks: bool = True) -> Instances:
    boxes = np.full((3, 2, 4), np.nan, np.float32)
    boxes[0, 0] = (10, 8, 50, 24)  # original: x 4..20, y 4..12
    boxes[0, 1] = (-5, 30, 80, 50)  # original: x -2..32, y 15..25; the image ends at 30 x 20
    boxes[1, 1] = (1, 2, 5, 12)
    return Instances(
        boxes=boxes,
        valid=np.array([[True, True], [False, True], [True, True]]),
        labels=np.array([[1, 3], [99, 2], [-7, 0]], np.int32),
        scores=np.array([[0.75, 0.5], [np.nan, 0.25], [9, 9]], np.float32),
        masks=np.ones((3, 2, 28, 28), np.float32) if masks else None,
    )


CATEGORIES = [(7, "a"), (90, "b"), (11, "c")]


def _in_image(
    here: Instances, image: int, paste: PasteStyle = "exact", **options: Any
) -> Detections:
    height, width = SIZES[image].tolist()
    return image_detections(
        here,
        scale=SCALES[image],
        size=(height, width),
        categories=CATEGORIES,
        paste=paste,
        **options,
    )


def _found(detections: Instances, image: int, paste: PasteStyle = "exact") -> Detections:
    return _in_image(jax.tree.map(lambda field: field[image], detections), image, paste)


def _results(masks: bool = True, paste: PasteStyle = "exact") -> list[dict]:
    detections = _detections(masks)
    first, second = (_found(detections, image, paste) for image in (0, 1))
    return first.to_coco(101) + second.to_coco(0)


def test_ids_boxes_and_scores_are_those_of_the_original_image() -> None:
    results = _results(masks=False)
    assert [(r["image_id"], r["category_id"], r["score"]) for r in results] == [
        (101, 7, 0.75),
        (101, 11, 0.5),
        (0, 90, 0.25),
    ]
    np.testing.assert_allclose(
        [r["bbox"] for r in results], [[4, 4, 16, 8], [0, 15, 30, 5], [1, 2, 4, 10]], atol=1e-6
    )
    assert all("segmentation" not in r for r in results)


def test_labelmes_file_names_its_image(tmp_path: Path) -> None:
    found = _found(_detections(), 0)
    with pytest.raises(ValueError, match=r"to_labelme: this image was no file: name one"):
        found.to_labelme(tmp_path / "x.json")
    (tmp_path / "sub").mkdir()
    found.to_labelme(tmp_path / "sub" / "x.json", image=tmp_path / "y.png")
    content = json.loads((tmp_path / "sub" / "x.json").read_text())
    assert content["imagePath"] == "../y.png"
    assert [shape["label"] for shape in content["shapes"]] == ["a", "c"]
    first = content["shapes"][0]["points"]
    assert sorted(first) == [[4, 4], [4, 12], [20, 4], [20, 12]]
    replace(found, path=tmp_path / "z.png").to_labelme(str(tmp_path / "z.json"))
    assert json.loads((tmp_path / "z.json").read_text())["imagePath"] == "z.png"
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    (tmp_path / "y.png").touch()
    found.to_labelme(tmp_path / "link" / "x.json", image=tmp_path / "y.png")
    content = json.loads((tmp_path / "link" / "x.json").read_text())
    assert (tmp_path / "link" / content["imagePath"]).resolve() == (tmp_path / "y.png").resolve()
    # Of an image beside it, by a way through the link: nothing of where the link leads.
    (tmp_path / "link" / "z.png").touch()
    found.to_labelme(tmp_path / "real" / "deep" / "z.json", image=tmp_path / "link" / "z.png")
    assert json.loads((tmp_path / "link" / "z.json").read_text())["imagePath"] == "z.png"


@pytest.mark.parametrize("kind", ["rle", "pixels", "none"])
def test_those_with_a_score(kind: str) -> None:
    found = _found(_detections(kind != "none"), 0)
    if kind == "pixels":
        assert isinstance(found.masks, tuple)
        found = replace(found, masks=decoded(found.masks, found.size))
    every = found.to_coco()
    assert [r["score"] for r in every] == [0.75, 0.5]
    for score, count in ((0.5, 2), (0.6, 1), (0.8, 0)):
        assert found.at_least(score).to_coco() == every[:count]
        assert len(found.at_least(score).rles()) == count
    with pytest.raises(ValueError, match=r"^score: 50: must be in 0\.\.1$"):
        found.at_least(50)


@dataclass(kw_only=True)
class _Supervised:
    """The arguments of `supervision.Detections` that are given."""

    xyxy: np.ndarray
    mask: np.ndarray | None
    confidence: np.ndarray
    class_id: np.ndarray
    data: dict[str, np.ndarray]


@pytest.mark.parametrize("masks", [True, False])
def test_supervision_has_the_same(masks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the library is not installed, what its class is made with."""
    found = _found(_detections(masks), 0)
    try:
        import supervision
    except ImportError:
        with pytest.raises(ImportError, match=r"^to_supervision: .*pip install supervision\)$"):
            found.to_supervision()
        stand_in = types.ModuleType("supervision")
        stand_in.Detections = _Supervised  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "supervision", stand_in)
        seen = found.to_supervision()
        assert isinstance(seen, _Supervised)
    else:
        seen = found.to_supervision()
        assert isinstance(seen, supervision.Detections)
    assert seen.xyxy.tolist() == [[4, 4, 20, 12], [0, 15, 30, 20]]
    assert seen.class_id.tolist() == [0, 2]
    assert seen.confidence.tolist() == [0.75, 0.5]
    assert seen.data["class_name"].tolist() == ["a", "c"]
    if not masks:
        assert seen.mask is None
        return
    expected = np.zeros((2, 20, 30), bool)
    expected[0, 4:12, 4:20] = expected[1, 15:, :] = True
    assert (seen.mask == expected).all()
    if isinstance(seen, _Supervised):
        return
    assert seen.area.tolist() == [128, 150]
    assert seen[seen.confidence > 0.6]["class_name"].tolist() == ["a"]


def test_masks_have_the_size_of_the_original_image() -> None:
    results = _results()
    masks = [coco_mask.decode(r["segmentation"]) for r in results]
    assert [m.shape for m in masks] == [(20, 30), (20, 30), (40, 10)]
    expected = np.zeros((20, 30), np.uint8)
    expected[4:12, 4:20] = 1
    np.testing.assert_array_equal(masks[0], expected)


def test_masks_are_pasted_as_the_config_says() -> None:
    exact, other = _results(), _results(paste="torchvision")
    ones = np.ones((28, 28), np.float32)
    assert (
        other[0]["segmentation"]
        == paste_rle(ones, np.array([4, 4, 20, 12]), (20, 30), "torchvision")
        != exact[0]["segmentation"]
    )
    assert [result["bbox"] for result in other] == [result["bbox"] for result in exact]


def test_a_clipped_box_does_not_move_its_mask() -> None:
    detections = _detections()
    mask = np.linspace(0, 1, 28, dtype=np.float32)[None, :].repeat(
        28, 0
    )  # half of it is the object: right of the box's middle
    detections.masks[0, 1] = mask
    result = _found(detections, 0).to_coco()[1]
    assert result["segmentation"] == paste_rle(mask, np.array([-2, 15, 32, 25]), (20, 30))
    assert not coco_mask.decode(result["segmentation"])[:, :14].any()  # the middle of -2..32 is 15


def test_results_go_through_json() -> None:
    results = _results()
    assert json.loads(json.dumps(results)) == results


def test_depth_of_a_map_is_the_median_under_each_mask() -> None:
    """Of a plane, interpolated between the cells' centres, in a loop over pixels."""
    rng = np.random.default_rng(0)
    detections = jax.tree.map(lambda field: field[0], _detections())
    detections = detections.replace(masks=rng.random((2, 28, 28)).astype(np.float32))
    detections.masks[1] = 0  # an object without a pixel
    cells = rng.uniform(1, 5, (13, 21)).astype(np.float32)
    image = cells[:10, :19]  # 20 x 30 pixels by (2, 2.5) in cells of 4: ten and 19 of them
    cells[10:], cells[:, 19:] = np.nan, np.nan
    found = _in_image(detections, 0, depth=cells)
    for y, x in np.ndindex(20, 30):
        assert found.depth_map[y, x] == pytest.approx(
            bilinear_loop(image, (x + 0.5) * 2.5 / 4, (y + 0.5) * 2 / 4), rel=1e-5
        )
    masks = decoded(found.masks, (20, 30))
    assert found.depths[0] == np.median(found.depth_map[masks[0]])
    assert np.isnan(found.depths[1])
    results = json.loads(json.dumps(found.to_coco()))
    assert [result["depth"] for result in results] == [pytest.approx(float(found.depths[0])), None]


def test_depth_of_boxes_is_inside_the_masks_alone_and_follows_their_scores() -> None:
    detections = jax.tree.map(lambda field: field[0], _detections())
    detections.boxes[1] = (30, 16, 75, 40)  # original: x 12..30, y 8..20; they overlap
    depth = np.stack([np.full((28, 28), 2.0), np.full((28, 28), 3.0)]).astype(np.float32)
    depth[1, :, 14:] = 5
    found = _in_image(detections, 0, depth=depth)
    first, second = decoded(found.masks, (20, 30))
    assert (first & second).any()
    assert (found.depth_map[first] == 2).all()  # the better one
    np.testing.assert_allclose(found.depth_map[second & ~first].min(), 3)
    np.testing.assert_allclose(found.depth_map[second & ~first].max(), 5)
    assert np.isnan(found.depth_map[~(first | second)]).all()
    assert found.depths[0] == 2
    assert 3 < found.depths[1] < 5
    only = _in_image(detections, 0, depth=depth, min_score=0.6)
    assert only.depths.tolist() == [2]


def test_without_a_depth_head_nothing_speaks_of_depth() -> None:
    found = _found(_detections(), 0)
    assert found.depths is None
    assert found.depth_map is None
    assert all("depth" not in result for result in found.to_coco())


def test_a_result_on_a_smaller_picture() -> None:
    """Every third pixel of its mask; the box in thirds; nothing else changes."""
    mask = np.zeros((30, 45), np.uint8)
    mask[6:18, 9:33] = 1
    result = {
        "bbox": [9.0, 6.0, 24.0, 12.0],
        "score": 0.5,
        "category_id": 7,
        "segmentation": coco_mask.encode(np.asfortranarray(mask)),
    }
    small = reduced(result, 3)
    assert small["bbox"] == [3.0, 2.0, 8.0, 4.0]
    assert (small["score"], small["category_id"]) == (0.5, 7)
    np.testing.assert_array_equal(coco_mask.decode(small["segmentation"]), mask[1::3, 1::3])
    assert "segmentation" not in reduced({"bbox": [3.0, 3.0, 3.0, 3.0]}, 3)
    assert result["bbox"] == [9.0, 6.0, 24.0, 12.0]
