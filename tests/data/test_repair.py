"""Boxes and masks of single annotations: every mistake of an exporter, and what becomes of it."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from findings import Read, found
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle_ops

from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.formats import Formats
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.repair import Dropped, mask_rle, object_record
from mrcnn_jax.data.report import Reason
from mrcnn_jax.evaluation.average_precision import coco_figures, match_results
from mrcnn_jax.pixels.rle import decompressed

SQUARE = [20, 10, 24, 10, 24, 14, 20, 14]
HOLED = (20.0, 10.0, 50.0, 30.0)  # the extent of annotation 0's mask, of 550 pixels


def with_runs(counts: Any, size: tuple[int, int] = (60, 80)) -> dict[str, Any]:
    return {"segmentation": {"size": list(size), "counts": counts}}


@pytest.mark.parametrize(
    ("change", "reason", "box"),
    [
        ({"bbox": None}, Reason.BOX_FROM_MASK, HOLED),
        ({"bbox": [20, 10, 30]}, Reason.BOX_FROM_MASK, HOLED),
        ({"bbox": [1, 2, float("nan"), 3]}, Reason.BOX_FROM_MASK, HOLED),
        ({"bbox": [1, 2, None, 3]}, Reason.BOX_FROM_MASK, HOLED),
        ({"bbox": ["1", 2, 3, 3]}, Reason.BOX_FROM_MASK, HOLED),
        ({"bbox": [0, 0, 0, 0]}, Reason.BOX_FROM_MASK, HOLED),
        ({"bbox": [20, 10, 0, 20]}, Reason.BOX_FROM_MASK, HOLED),
        ({"bbox": [20, 10, 30, -3]}, Reason.BOX_FROM_MASK, HOLED),
        ({"bbox": [20, 10, 0.09, 20]}, Reason.BOX_FROM_MASK, HOLED),
        ({"bbox": [60, 40, 20, 20]}, Reason.FAR_FROM_MASK, HOLED),
        ({"bbox": [1000, 1000, 30, 20]}, Reason.FAR_FROM_MASK, HOLED),
        ({"bbox": [20, 10, 15, 19]}, Reason.FAR_FROM_MASK, HOLED),  # IoU .475
        ({"bbox": [20, 10, 16, 20]}, Reason.LOOSE_BOX, (20, 10, 36, 30)),  # IoU .533
        ({"bbox": [20, 10, 25, 20]}, None, (20, 10, 45, 30)),  # IoU .833
        (
            {"bbox": [23, 10, 4, 4], "segmentation": [SQUARE], "area": 16},
            Reason.FAR_FROM_MASK,
            (20, 10, 24, 14),
        ),
        (
            {"bbox": [21.9, 10, 4, 4], "segmentation": [SQUARE], "area": 16},
            None,
            (21.9, 10, 25.9, 14),
        ),  # under two pixels: rounding
        (
            {"bbox": [20, 10, 0.11, 20], "segmentation": None, "area": 2.2},
            None,
            (20, 10, 20.11, 30),
        ),
        ({"id": "0"}, Reason.NUMBERS, HOLED),
        ({"id": 0.0}, Reason.NUMBERS, HOLED),
        ({"image_id": "11", "category_id": "90"}, Reason.NUMBERS, HOLED),
        ({"image_id": 11.0}, Reason.NUMBERS, HOLED),
        (
            {"bbox": [70, 50, 20, 20], "segmentation": None, "area": 100},
            Reason.CLIPPED,
            (70, 50, 80, 60),
        ),
        (
            {"bbox": [-10, -5, 40, 20], "segmentation": None, "area": 450},
            Reason.CLIPPED,
            (0, 0, 30, 15),
        ),
        (
            {"bbox": [-2, 10, 2, 30], "area": 30, "segmentation": [[0, 10, 1, 10, 1, 40, 0, 40]]},
            Reason.BOX_FROM_MASK,
            (0, 10, 1, 40),
        ),
        ({"iscrowd": False}, None, HOLED),
        ({"segmentation": [[20, 10, 50, 10, 50, 30, 20, 30], [1, 2]]}, Reason.POLYGON, HOLED),
        (
            {"segmentation": [[20, 10, 50, 10, 50, 30, 20, 30], [1e7, 0, 1e7, 1e7, 0, 1e7]]},
            Reason.POLYGON,
            HOLED,
        ),
        ({"segmentation": [20, 10, 50, 10, 50, 30, 20, 30]}, Reason.FLAT_POLYGON, HOLED),
        (
            with_runs([20 * 60 + 10, *[20, 40] * 29, 20, 60 * 80 - 49 * 60 - 30]),
            Reason.RUN_LIST,
            HOLED,
        ),
    ],
)
def test_repaired(
    read_mixed: Read, mixed_content: dict[str, Any], change: dict, reason: Reason | None, box: tuple
) -> None:
    mixed_content["annotations"][2].pop("segmentation")  # the one with run lengths in a list
    mixed_content["annotations"][0].update(change)
    dataset = read_mixed(mixed_content)
    assert found(dataset, but={Reason.CATEGORY_IDS}) == ({reason: (1, [0])} if reason else {})
    (record,) = (o for o in dataset.images[0].annotations if o.annotation_id == 0)
    assert record.box == box
    assert record.label == 3
    assert dataset.report.kept["objects"] == 6
    assert json.dumps(dataset.to_coco())


@pytest.mark.parametrize(("iscrowd", "crowd"), [(True, True), (1, True), (False, False)])
def test_a_crowd_may_be_a_truth_value(
    read_mixed: Read, mixed_content: dict[str, Any], iscrowd: Any, crowd: bool
) -> None:
    mixed_content["annotations"][0].update(iscrowd=iscrowd)
    dataset = read_mixed(mixed_content)
    (record,) = (o for o in dataset.images[0].annotations if o.annotation_id == 0)
    assert record.iscrowd == crowd


# Annotation 0's mask has 550 pixels in a box of 600, annotation 5's box, without a mask, 253.125.
@pytest.mark.parametrize(
    ("number", "area", "reason"),
    [
        (0, None, Reason.AREA),
        (0, 0, Reason.AREA),
        (0, -550, Reason.AREA),
        (0, "550", Reason.AREA),
        (0, 1, Reason.WRONG_AREA),  # as one tool writes it everywhere
        (0, 274.9, Reason.WRONG_AREA),
        (0, 275.1, None),
        (0, 629, None),
        (0, 631, Reason.WRONG_AREA),
        (0, 550 / 4800, Reason.WRONG_AREA),  # a share of the image
        (0, 1e8, Reason.WRONG_AREA),
        (5, None, Reason.AREA),
        (5, 265, None),
        (5, 266, Reason.WRONG_AREA),
        (5, 3, None),  # of a thin mask that the file has not
    ],
)
def test_areas(
    read_mixed: Read, mixed_content: dict[str, Any], number: int, area: Any, reason: Reason | None
) -> None:
    raw = next(a for a in mixed_content["annotations"] if a["id"] == number)
    raw["area"] = area
    dataset = read_mixed(mixed_content)
    assert found(dataset) == ({reason: (1, [number])} if reason else {})
    (record,) = (o for i in dataset.images for o in i.annotations if o.annotation_id == number)
    own = 253.125 if number == 5 else rle_ops.area(raw["segmentation"])
    assert record.area == (own if reason else area)


def test_a_tight_box_does_not_make_an_area_wrong() -> None:
    """A box that ends at its last pixel's index, as some tools write it, is too small."""
    mask = np.zeros((30, 30), np.uint8)
    mask[10:20, 10:20] = 1
    rle = rle_ops.encode(np.asfortranarray(mask))
    raw = {"id": 1, "bbox": [10, 10, 9, 9], "area": 100, "segmentation": rle}
    noted: list[Reason] = []
    record = object_record(raw, 1, 30, 30, noted.append, Formats())
    assert (record.area, noted) == (100, [Reason.RUN_BYTES])


def test_sizes_of_the_evaluation_are_those_of_the_masks(
    read_mixed: Read, mixed_content: dict[str, Any]
) -> None:
    """All medium objects are found and no small one, whatever the areas were."""
    clean = read_mixed(mixed_content).to_coco()
    for annotation in mixed_content["annotations"]:
        annotation["area"] = 1e6 if annotation["id"] == 0 else 1
    repaired = read_mixed(mixed_content).to_coco()
    masks = [a for a in clean["annotations"] if a.get("segmentation")]
    results = [a | {"score": 0.9} for a in masks if rle_ops.area(a["segmentation"]) > 32**2]
    metrics = coco_figures(match_results(repaired, results, iou_types=["segm"]))
    sizes = [metrics[f"segm/AP{size}"] for size in "sml"]
    assert sizes == [0, pytest.approx(1), -1]  # -1: there is none


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_id": 99}, Reason.UNKNOWN_IMAGE),
        ({"image_id": [11]}, Reason.UNKNOWN_IMAGE),
        ({"image_id": None}, Reason.UNKNOWN_IMAGE),
        ({"bbox": [20, 10, 0, 20], "segmentation": None}, Reason.DEGENERATE),
        ({"bbox": [20, 10, 30, -3], "segmentation": []}, Reason.DEGENERATE),
        ({"bbox": [20, 10, 0.09, 20], "segmentation": None}, Reason.DEGENERATE),
        ({"bbox": [0, 0, 0, 0]} | with_runs([4800]), Reason.NO_PIXEL),
        ({"bbox": None, "segmentation": [[9, 9, 9.1, 9, 9, 9.1]]}, Reason.NO_PIXEL),
        ({"bbox": [80, 10, 30, 20], "segmentation": None}, Reason.OUTSIDE),
        ({"bbox": [-30, 10, 30, 20], "segmentation": None}, Reason.OUTSIDE),
        ({"bbox": [20, 500, 30, 20], "segmentation": None}, Reason.OUTSIDE),
        ({"bbox": None, "segmentation": None}, Reason.NO_BOX),
        ({"bbox": [1, 2, 3], "segmentation": []}, Reason.NO_BOX),
        ({"bbox": [1, 2, 3, 10**400], "segmentation": None}, Reason.NO_BOX),
        (with_runs([4800], size=(80, 60)), Reason.UNUSABLE_MASK),
        (with_runs([4000, 700]), Reason.UNUSABLE_MASK),
        (with_runs([-1, 4801]), Reason.UNUSABLE_MASK),
        (with_runs([4000.0, 800]), Reason.UNUSABLE_MASK),
        (with_runs("garbage"), Reason.UNUSABLE_MASK),
        (with_runs("b'garbage"), Reason.UNUSABLE_MASK),
        (with_runs("PP1"), Reason.UNUSABLE_MASK),
        (with_runs("o" * 5000), Reason.UNUSABLE_MASK),
        (with_runs(""), Reason.UNUSABLE_MASK),
        (with_runs(None), Reason.UNUSABLE_MASK),
        ({"segmentation": [[1, 1, 5, 5]]}, Reason.UNUSABLE_MASK),
        ({"segmentation": [[1, 1, 5, 5, 6, 1, 3]]}, Reason.UNUSABLE_MASK),
        ({"segmentation": [[1, 1, 5, 5, 6, "1"]]}, Reason.UNUSABLE_MASK),
        ({"segmentation": [[1, 1, 5, 5, 6, 10**400]]}, Reason.UNUSABLE_MASK),
        ({"segmentation": [[-1e9, -1e9, 1e9, -1e9, 0, 1e9]]}, Reason.UNUSABLE_MASK),
        (
            {"segmentation": [[0, 0, 80, 60] * 30_000]},
            Reason.UNUSABLE_MASK,
        ),  # an outline of 4.8 million px
        ({"segmentation": "garbage"}, Reason.UNUSABLE_MASK),
    ],
)
def test_dropped(
    read_mixed: Read, mixed_content: dict[str, Any], change: dict, reason: Reason
) -> None:
    mixed_content["annotations"][0].update(change)
    dataset = read_mixed(mixed_content)
    assert found(dataset) == {reason: (1, [0])}
    assert reason.outcome == "dropped"
    assert dataset.report.kept["objects"] == 5
    assert [o.annotation_id for o in dataset.images[0].annotations] == [5]


@pytest.mark.parametrize("segmentation", [None, [], {}, "", [[]], [[], []], "absent"])
def test_no_segmentation_is_a_box_and_said_so(
    read_mixed: Read, mixed_content: dict[str, Any], segmentation: Any
) -> None:
    mixed_content["annotations"][0]["segmentation"] = segmentation
    if segmentation == "absent":
        del mixed_content["annotations"][0]["segmentation"]
    dataset = read_mixed(mixed_content)
    assert found(dataset) == {}
    assert dataset.images[0].annotations[0].rle is None
    assert dataset.report.kept["objects without a mask (box only)"] == 2
    assert "2 objects without a mask (box only)" in dataset.report.lines()[0]


@pytest.mark.parametrize(
    "segmentation", [[[20, 10, 20.1, 10, 20, 10.1]], {"size": [60, 80], "counts": [4800]}]
)
def test_a_mask_without_a_pixel_leaves_the_box(
    read_mixed: Read, mixed_content: dict[str, Any], segmentation: Any
) -> None:
    mixed_content["annotations"][0]["segmentation"] = segmentation
    dataset = read_mixed(mixed_content)
    assert found(dataset)[Reason.EMPTY_MASK] == (1, [0])
    assert dataset.images[0].annotations[0].box == HOLED
    assert dataset.images[0].annotations[0].rle is None
    assert dataset.report.kept["objects without a mask (box only)"] == 2


def test_honest_boxes_are_not_taken_for_corners(
    read_mixed: Read, mixed_content: dict[str, Any]
) -> None:
    """Boxes that leave the image by far and would fit as corners, beside one that would not; and
    boxes of one pixel."""
    for number, box in ((0, [50, 40, 70, 60]), (1, [40, 30, 60, 50]), (2, [40, 40, 10, 10])):
        mixed_content["annotations"][number] |= {"bbox": box, "segmentation": None, "area": 100}
    dataset = read_mixed(mixed_content)
    assert found(dataset) == {Reason.CLIPPED: (2, [0, 5])}
    mixed_content["annotations"] = [{**mixed_content["annotations"][0], "bbox": [50, 40, 70, 60]}]
    assert found(read_mixed(mixed_content)) == {Reason.CLIPPED: (1, [0])}, "one proves nothing"
    mixed_content["annotations"] = [
        {
            **mixed_content["annotations"][0],
            "bbox": [0, 0, 1, 1],
            "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]],
            "area": 1,
        },
    ]
    assert found(read_mixed(mixed_content)) == {}


@pytest.mark.data
def test_honest_data_is_not_repaired(data_folder: Path) -> None:
    """COCO's own boxes are not called far from their masks, nor taken for another format."""
    for file, images in (
        ("coco300/annotations/instances_train.json", "coco300/images"),
        ("coco300/annotations/instances_val.json", "coco300/images"),
        ("coco_mini/annotations/train_full80.json", "coco_mini/images"),
        ("coco_mini/annotations/val_full80.json", "coco_mini/images"),
    ):
        dataset = read_coco(data_folder / file, data_folder / images, DataConfig())
        noticed = found(dataset)
        loose, _ = noticed.pop(Reason.LOOSE_BOX, (0, []))
        assert loose <= 0.004 * dataset.report.kept["objects"]
        assert noticed.keys() <= {Reason.CLIPPED}


def test_run_lengths_in_every_form_are_one_mask() -> None:
    mask = np.zeros((60, 80), np.uint8, order="F")
    mask[10:30, 20:50] = 1
    mask[15:20, 30:40] = 0
    encoded = rle_ops.encode(mask)["counts"]
    forms = {
        encoded.decode(): None,
        encoded: Reason.RUN_BYTES,
        repr(encoded): Reason.RUN_BYTES,
        tuple(decompressed(encoded.decode())): Reason.RUN_LIST,
    }
    for counts, reason in forms.items():
        notes: list[Reason] = []
        rle = mask_rle(
            {"size": [60, 80], "counts": list(counts) if isinstance(counts, tuple) else counts},
            60,
            80,
            notes.append,
        )
        assert (rle_ops.decode(rle) == mask).all()
        assert notes == ([reason] if reason else [])


@pytest.mark.parametrize(
    ("runs", "extent"),
    [
        ([0, 0, 4800], None),
        ([600, 0, 0, 120, 4080], (10, 0, 12, 60)),
        ([4740, 60, 0], (79, 0, 80, 60)),
    ],
)
def test_runs_of_length_zero(
    read_mixed: Read, mixed_content: dict[str, Any], runs: list[int], extent: tuple | None
) -> None:
    mixed_content["annotations"][0] |= {"bbox": None, **with_runs(runs)}
    dataset = read_mixed(mixed_content)
    boxes = [o.box for o in dataset.images[0].annotations if o.annotation_id == 0]
    assert boxes == ([extent] if extent else [])
    assert (Reason.NO_PIXEL in found(dataset)) == (extent is None)


def test_several_parts_and_holes(read_mixed: Read, mixed_content: dict[str, Any]) -> None:
    """3,000 squares of 2 x 2 on a grid become exactly their pixels."""
    image = mixed_content["images"][-1] | {"height": 60, "width": 80}
    squares = [(2 * (n % 40), 2 * (n // 40 % 30)) for n in range(3000)]
    parts = [[x, y, x + 1, y, x + 1, y + 1, x, y + 1] for x, y in squares]
    mixed_content["annotations"] = [
        {**mixed_content["annotations"][0], "bbox": [0, 0, 80, 60], "segmentation": parts}
    ]
    start = time.perf_counter()
    dataset = read_mixed(mixed_content)
    assert time.perf_counter() - start < 2
    expected = rle_ops.merge(rle_ops.frPyObjects(parts, image["height"], image["width"]))
    assert (rle_ops.decode(dataset.images[0].annotations[0].rle) == rle_ops.decode(expected)).all()
    assert rle_ops.area(dataset.images[0].annotations[0].rle) == 1200


@given(st.text(max_size=30) | st.text(alphabet=[chr(c) for c in range(48, 112)], max_size=30))
@settings(deadline=None, max_examples=200)
def test_garbage_is_no_mask(counts: str) -> None:
    with contextlib.suppress(Dropped):
        rle = mask_rle({"size": [9, 7], "counts": counts}, 9, 7, lambda reason: None)
        assert rle_ops.decode(rle).shape == (9, 7)
