"""What a file of annotations becomes: every accident of an exporter with its outcome. (Accidents of
images: test_images.py.)"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as rle_ops
from pycocotools.coco import COCO

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.coco import CocoDataset, _Dropped, _rle, _runs, read_coco
from mrcnn_jax.data.report import Reason, Report

DATA = DataConfig()


def found(
    dataset: CocoDataset, *, but: set[Reason] = frozenset({Reason.CATEGORY_IDS, Reason.RUN_LIST})
) -> dict[Reason, tuple[int, list]]:
    """Reason -> (count, first ids), without those that `mixed_content` has by itself."""
    return {
        reason: (f.count, f.first_ids)
        for (reason, _), f in dataset.report.findings.items()
        if reason not in but
    }


def test_everything_comes_through(mixed_file: Path) -> None:
    dataset = read_coco(mixed_file, mixed_file.parent / "images", DATA)
    assert [image.id for image in dataset.images] == list(range(11, 18))
    assert dataset.class_names == ("three", "seven", "ninety")
    assert [dataset.category_id(label) for label in (1, 2, 3)] == [3, 7, 90]
    for label in (0, 4, -1):
        with pytest.raises(ValueError, match=str(label)):
            dataset.category_id(label)
    first = dataset.images[0].objects
    assert [(o.annotation_id, o.label, o.box, o.iscrowd) for o in first] == [
        (0, 3, (20.0, 10.0, 50.0, 30.0), False),
        (5, 1, (0.0, 0.0, 12.5, 20.25), False),
    ]
    assert first[1].rle is None
    half = rle_ops.decode(dataset.images[1].objects[0].rle)
    assert (half == (np.arange(60)[None, :] >= 30) * np.ones((80, 1))).all()
    assert found(dataset, but=frozenset()) == {
        Reason.CATEGORY_IDS: (3, [90, 3, 7]),
        Reason.RUN_LIST: (1, [6]),
    }
    assert dataset.report.kept == {
        "images": 7,
        "objects": 6,
        "crowds": 1,
        "objects without a mask (box only)": 1,
    }
    assert (dataset.listed, dataset.lost) == (7, ())


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


# -- refused: one line that names the file ---------------------------------------------------------


def _without(key: str) -> Any:
    return lambda content: {k: v for k, v in content.items() if k != key}


def _repeat(key: str) -> Any:
    return lambda content: {**content, key: [*content[key], content[key][0]]}


def _set(key: str, position: int, **change: Any) -> Any:
    """The same content with an image, annotation or category changed."""

    def changed(content: dict[str, Any]) -> dict[str, Any]:
        content[key][position] |= change
        return content

    return changed


def _each_box(change: Callable[[list[float], float, float], list[float]], masks: bool) -> Any:
    """The same content with every bbox changed (given its image's width and height), with or
    without its masks."""

    def changed(content: dict[str, Any]) -> dict[str, Any]:
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        for annotation in content["annotations"]:
            annotation["bbox"] = change(annotation["bbox"], *sizes[annotation["image_id"]])
            if not masks:
                annotation.pop("segmentation", None)
        return content

    return changed


def _as_corners(box: list[float], *_: float) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y + h]


def _as_fractions(box: list[float], width: float, height: float) -> list[float]:
    x, y, w, h = box
    return [x / width, y / height, w / width, h / height]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("images"), "'images' is missing"),
        (_without("annotations"), "'annotations' is missing"),
        (_without("categories"), "'categories' is missing"),
        (_repeat("images"), "images: id 17 occurs more than once"),
        (_repeat("annotations"), "annotations: id 0 occurs more than once"),
        (_repeat("categories"), "categories: id 90 occurs more than once"),
        (_set("annotations", 3, id="0"), "annotations: id 0 occurs more than once"),
        (_set("images", 0, id="photo"), "images: id 'photo' is not an integer"),
        (_set("annotations", 0, id=1.5), "annotations: id 1.5 is not an integer"),
        (_set("categories", 0, id=2**63), "categories: id 9223372036854775808 is not an integer"),
        (
            _set("categories", 0, name="a\nb"),
            "categories: id 90: its name 'a.+nb' is not printable",
        ),
        (lambda c: {**c, "categories": []}, "'categories' is empty"),
        (lambda c: {**c, "categories": c["categories"][:2]}, "annotation 6: unknown category_id 7"),
        (_set("annotations", 0, category_id=[3]), r"annotation 0: unknown category_id \[3\]"),
        (_set("annotations", 0, category_id=None), "annotation 0: unknown category_id None"),
        (
            _set("annotations", 0, iscrowd="perhaps"),
            "annotation 0: iscrowd 'perhaps' is neither 0 nor 1",
        ),
        (lambda c: {**c, "images": []}, "no usable image is left: the file lists none"),
        (
            lambda c: {**c, "images": [{**i, "file_name": "no.png"} for i in c["images"]]},
            r"7 of 7 images are lost .*'no.png' \(images whose",
        ),
        (
            _set("images", 6, height=10_001, width=10_000),
            "image 11: 'photo 0.png': 10001 x 10000 is over 100000000 pixels",
        ),
        (lambda c: [c], "a JSON object is needed, this is a list"),
        (lambda c: 3, "a JSON object is needed, this is a int"),
        (_set("annotations", 1, area=float("nan")), "annotations 5: area is or holds NaN"),
        (
            _set("annotations", 3, segmentation=[[1, 1, 9, 1, float("inf"), 9]]),
            "annotations 7: segmentation is or holds NaN",
        ),
        (_set("images", 6, height=float("nan")), "images 11: height is or holds NaN"),
        (lambda c: {**c, "info": {"version": float("nan")}}, "info: version is or holds NaN"),
        (
            _set("annotations", 1, bbox=[1, 2, float("nan"), 3]),
            "annotation 5: bbox holds NaN or Infinity, and there is no mask",
        ),
        # Two of the seven leave their image when read as x, y, w, h: enough, since none is
        # impossible as corners.
        (
            _each_box(_as_corners, masks=False),
            r"2 of 7 boxes are impossible as \[x, y, width, height\]; as \[x1, y1, x2, y2\] they fit",
        ),
        (
            _each_box(_as_corners, masks=True),
            r"\d of 7 boxes are impossible as \[x, y, width, height\]; as \[x1, y1, x2, y2\] they fit",
        ),
        (
            _each_box(_as_fractions, masks=False),
            "7 of 7 boxes lie in 0..1, which is no box in pixels; .* multiply them",
        ),
        (
            _each_box(_as_fractions, masks=True),
            "7 of 7 boxes lie in 0..1, which is no box in pixels; .* multiply them",
        ),
    ],
)
def test_refused_in_one_line(
    tmp_path: Path,
    write_json: Callable[[Any], Path],
    mixed_content: dict[str, Any],
    change: Any,
    message: str,
) -> None:
    path = write_json(change(mixed_content))
    with pytest.raises(ConfigError, match=message) as caught:
        read_coco(path, tmp_path / "images", DATA)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_broken_files_are_refused(tmp_path: Path, mixed_file: Path) -> None:
    whole = mixed_file.read_bytes()
    for content in (b"", whole[:-10], whole[: len(whole) // 2], b"\xff\xfe\x00", b"[" * 100_000):
        mixed_file.write_bytes(content)
        with pytest.raises(ConfigError, match="not JSON") as caught:
            read_coco(mixed_file, tmp_path / "images", DATA)
        assert "\n" not in str(caught.value)
    mixed_file.write_bytes(whole[:-10])
    with pytest.raises(ConfigError, match=r"line 1 column \d+"):
        read_coco(mixed_file, tmp_path / "images", DATA)
    with pytest.raises(ConfigError, match="no such annotation file"):
        read_coco(tmp_path / "none.json", tmp_path / "images", DATA)
    mixed_file.write_bytes(whole)
    with pytest.raises(ConfigError, match="no such image folder"):
        read_coco(mixed_file, tmp_path / "none", DATA)


def test_class_names_are_those_of_the_config(mixed_file: Path) -> None:
    images = mixed_file.parent / "images"
    assert read_coco(
        mixed_file, images, DataConfig(class_names=("three", "seven", "ninety"))
    ).class_names == ("three", "seven", "ninety")
    for names in (
        ("three", "seven"),
        ("seven", "three", "ninety"),
        ("three", "seven", "ninety", "more"),
    ):
        with pytest.raises(
            ConfigError,
            match="its classes, by id, are three, seven, ninety; data.class_names are "
            + ", ".join(names),
        ):
            read_coco(mixed_file, images, DataConfig(class_names=names))


def test_honest_boxes_are_not_taken_for_corners(
    tmp_path: Path, write_json: Callable[[Any], Path], mixed_content: dict[str, Any]
) -> None:
    """Boxes that leave the image by far, and would fit as corners, beside one that would not; and
    boxes of one pixel."""
    for number, box in ((0, [50, 40, 70, 60]), (1, [40, 30, 60, 50]), (2, [40, 40, 10, 10])):
        mixed_content["annotations"][number] |= {"bbox": box, "segmentation": None}
    dataset = read_coco(write_json(mixed_content), tmp_path / "images", DATA)
    assert found(dataset) == {Reason.CLIPPED: (2, [0, 5])}
    mixed_content["annotations"] = [{**mixed_content["annotations"][0], "bbox": [50, 40, 70, 60]}]
    assert found(read_coco(write_json(mixed_content), tmp_path / "images", DATA)) == {
        Reason.CLIPPED: (1, [0])
    }, "one proves nothing"
    mixed_content["annotations"] = [
        {
            **mixed_content["annotations"][0],
            "bbox": [0, 0, 1, 1],
            "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]],
        },
    ]
    assert found(read_coco(write_json(mixed_content), tmp_path / "images", DATA)) == {}


@pytest.mark.data
def test_honest_data_is_not_repaired(data_folder: Path) -> None:
    """On COCO's own boxes and masks neither the test for a box far from its mask nor those for
    other formats fire."""
    for file, images in (
        ("coco300/annotations/instances_train.json", "coco300/images"),
        ("coco300/annotations/instances_val.json", "coco300/images"),
        ("coco_mini/annotations/train_full80.json", "coco_mini/images"),
        ("coco_mini/annotations/val_full80.json", "coco_mini/images"),
    ):
        assert set(found(read_coco(data_folder / file, data_folder / images, DATA))) <= {
            Reason.CLIPPED
        }


# -- repaired, clipped and dropped: counted with their ids -----------------------------------------

SQUARE = [20, 10, 24, 10, 24, 14, 20, 14]
HOLED = (20.0, 10.0, 50.0, 30.0)  # the extent of annotation 0's mask, of 550 pixels


def _rle_of_mask(counts: Any, size: tuple[int, int] = (60, 80)) -> dict[str, Any]:
    return {"segmentation": {"size": list(size), "counts": counts}}


@pytest.mark.parametrize(
    ("change", "reason", "box"),
    [
        ({"bbox": None}, Reason.BOX_FROM_MASK, HOLED),
        ({"bbox": [20, 10, 30]}, Reason.BOX_FROM_MASK, HOLED),
        ({"bbox": [1, 2, float("nan"), 3]}, Reason.BOX_FROM_MASK, HOLED),
        ({"bbox": [1, 2, None, 3]}, Reason.BOX_FROM_MASK, HOLED),
        ({"bbox": ["1", 2, 3, 3]}, Reason.BOX_FROM_MASK, HOLED),
        ({"bbox": [60, 40, 20, 20]}, Reason.FAR_FROM_MASK, HOLED),
        ({"bbox": [1000, 1000, 30, 20]}, Reason.FAR_FROM_MASK, HOLED),
        ({"bbox": [20, 10, 15, 19]}, Reason.FAR_FROM_MASK, HOLED),  # IoU .475
        ({"bbox": [20, 10, 16, 20]}, None, (20, 10, 36, 30)),  # IoU .533
        (
            {"bbox": [23, 10, 4, 4], "segmentation": [SQUARE]},
            Reason.FAR_FROM_MASK,
            (20, 10, 24, 14),
        ),
        (
            {"bbox": [21.9, 10, 4, 4], "segmentation": [SQUARE]},
            None,
            (21.9, 10, 25.9, 14),
        ),  # under two pixels: rounding
        ({"bbox": [20, 10, 0.11, 20], "segmentation": None}, None, (20, 10, 20.11, 30)),
        ({"area": None}, Reason.AREA, HOLED),
        ({"area": -550}, Reason.AREA, HOLED),
        ({"id": "0"}, Reason.NUMBERS, HOLED),
        ({"id": 0.0}, Reason.NUMBERS, HOLED),
        ({"image_id": "11", "category_id": "90"}, Reason.NUMBERS, HOLED),
        ({"image_id": 11.0}, Reason.NUMBERS, HOLED),
        ({"bbox": [70, 50, 20, 20], "segmentation": None}, Reason.CLIPPED, (70, 50, 80, 60)),
        ({"bbox": [-10, -5, 40, 20], "segmentation": None}, Reason.CLIPPED, (0, 0, 30, 15)),
        ({"iscrowd": False}, None, HOLED),
        ({"segmentation": [[20, 10, 50, 10, 50, 30, 20, 30], [1, 2]]}, Reason.POLYGON, HOLED),
        (
            {"segmentation": [[20, 10, 50, 10, 50, 30, 20, 30], [1e7, 0, 1e7, 1e7, 0, 1e7]]},
            Reason.POLYGON,
            HOLED,
        ),
        ({"segmentation": [20, 10, 50, 10, 50, 30, 20, 30]}, Reason.FLAT_POLYGON, HOLED),
        (
            _rle_of_mask([20 * 60 + 10, *[20, 40] * 29, 20, 60 * 80 - 49 * 60 - 30]),
            Reason.RUN_LIST,
            HOLED,
        ),
    ],
)
def test_repaired(
    tmp_path: Path,
    write_json: Callable[[Any], Path],
    mixed_content: dict[str, Any],
    change: dict,
    reason: Reason | None,
    box: tuple,
) -> None:
    mixed_content["annotations"][2].pop("segmentation")  # the one with run lengths in a list
    mixed_content["annotations"][0].update(change)
    dataset = read_coco(write_json(mixed_content), tmp_path / "images", DATA)
    assert found(dataset, but={Reason.CATEGORY_IDS}) == ({reason: (1, [0])} if reason else {})
    (record,) = (o for o in dataset.images[0].objects if o.annotation_id == 0)
    assert record.box == box
    assert record.label == 3
    assert (record.area == 550) == ("area" not in change or reason is Reason.AREA)
    assert dataset.report.kept["objects"] == 6
    assert json.dumps(dataset.to_coco())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_id": 99}, Reason.UNKNOWN_IMAGE),
        ({"image_id": [11]}, Reason.UNKNOWN_IMAGE),
        ({"image_id": None}, Reason.UNKNOWN_IMAGE),
        ({"bbox": [20, 10, 0, 20]}, Reason.DEGENERATE),
        ({"bbox": [20, 10, 30, -3]}, Reason.DEGENERATE),
        ({"bbox": [20, 10, 0.09, 20]}, Reason.DEGENERATE),
        ({"bbox": [80, 10, 30, 20], "segmentation": None}, Reason.OUTSIDE),
        ({"bbox": [-30, 10, 30, 20], "segmentation": None}, Reason.OUTSIDE),
        ({"bbox": [20, 500, 30, 20], "segmentation": None}, Reason.OUTSIDE),
        ({"bbox": None, "segmentation": None}, Reason.NO_BOX),
        ({"bbox": [1, 2, 3], "segmentation": []}, Reason.NO_BOX),
        ({"bbox": [1, 2, 3, 10**400], "segmentation": None}, Reason.NO_BOX),
        (_rle_of_mask([4800], size=(80, 60)), Reason.UNUSABLE_MASK),
        (_rle_of_mask([4000, 700]), Reason.UNUSABLE_MASK),
        (_rle_of_mask([-1, 4801]), Reason.UNUSABLE_MASK),
        (_rle_of_mask([4000.0, 800]), Reason.UNUSABLE_MASK),
        (_rle_of_mask("garbage"), Reason.UNUSABLE_MASK),
        (_rle_of_mask("b'garbage"), Reason.UNUSABLE_MASK),
        (_rle_of_mask("PP1"), Reason.UNUSABLE_MASK),
        (_rle_of_mask("o" * 5000), Reason.UNUSABLE_MASK),
        (_rle_of_mask(""), Reason.UNUSABLE_MASK),
        (_rle_of_mask(None), Reason.UNUSABLE_MASK),
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
    tmp_path: Path,
    write_json: Callable[[Any], Path],
    mixed_content: dict[str, Any],
    change: dict,
    reason: Reason,
) -> None:
    mixed_content["annotations"][0].update(change)
    dataset = read_coco(write_json(mixed_content), tmp_path / "images", DATA)
    assert found(dataset) == {reason: (1, [0])}
    assert reason.outcome == "dropped"
    assert dataset.report.kept["objects"] == 5
    assert [o.annotation_id for o in dataset.images[0].objects] == [5]


@pytest.mark.parametrize("segmentation", [None, [], {}, "", [[]], [[], []], "absent"])
def test_no_segmentation_is_a_box_and_said_so(
    tmp_path: Path,
    write_json: Callable[[Any], Path],
    mixed_content: dict[str, Any],
    segmentation: Any,
) -> None:
    mixed_content["annotations"][0]["segmentation"] = segmentation
    if segmentation == "absent":
        del mixed_content["annotations"][0]["segmentation"]
    dataset = read_coco(write_json(mixed_content), tmp_path / "images", DATA)
    assert found(dataset) == {}
    assert dataset.images[0].objects[0].rle is None
    assert dataset.report.kept["objects without a mask (box only)"] == 2
    assert "2 objects without a mask (box only)" in dataset.report.lines()[0]


@pytest.mark.parametrize(
    ("ids", "repaired"),
    [
        ((1, 2, 3), False),
        ((0, 1, 2), True),
        ((3, 7, 90), True),
        ((2, 3, 1), True),
        (("1", 2.0, 3), False),
    ],
)
def test_category_ids_become_labels_in_their_order(
    tmp_path: Path,
    write_json: Callable[[Any], Path],
    mixed_content: dict[str, Any],
    ids: tuple,
    repaired: bool,
) -> None:
    """The ids may also be written in one way there and in another in the annotations."""
    names = {90: "ninety", 3: "three", 7: "seven"}
    new = dict(zip(names, ids, strict=True))
    mixed_content["categories"] = [{"id": new[old], "name": name} for old, name in names.items()]
    for number, annotation in enumerate(mixed_content["annotations"]):
        written = int(new[annotation["category_id"]])
        annotation |= {
            "category_id": str(written) if number % 2 else float(written),
            "image_id": str(annotation["image_id"]),
        }
    for image in mixed_content["images"]:
        image |= {"id": float(image["id"]), "height": str(image["height"])}
    dataset = read_coco(write_json(mixed_content), tmp_path / "images", DATA)
    order = sorted(names, key=lambda old: int(new[old]))
    assert dataset.class_names == tuple(names[old] for old in order)
    assert [dataset.category_id(label) for label in (1, 2, 3)] == sorted(map(int, ids))
    assert [o.label for o in dataset.images[0].objects] == [order.index(90) + 1, order.index(3) + 1]
    assert (Reason.CATEGORY_IDS in found(dataset, but=set())) == repaired
    texts = {
        text: f.count
        for (reason, text), f in dataset.report.findings.items()
        if reason is Reason.NUMBERS
    }
    assert texts == {
        Reason.NUMBERS.text.format(items=items): n
        for items, n in (("annotations", 7), ("images", 7), ("categories", 2))[
            : 2 + (ids[0] == "1")
        ]
    }
    for item in (
        *dataset.to_coco()["images"],
        *dataset.to_coco()["annotations"],
        *dataset.to_coco()["categories"],
    ):
        assert type(item["id"]) is int


def test_one_category_of_id_0(
    tmp_path: Path, write_json: Callable[[Any], Path], mixed_content: dict[str, Any]
) -> None:
    mixed_content["categories"] = [{"id": 0, "name": "cell"}]
    for annotation in mixed_content["annotations"]:
        annotation["category_id"] = 0
    dataset = read_coco(write_json(mixed_content), tmp_path / "images", DATA)
    assert {o.label for image in dataset.images for o in image.objects} == {1}
    assert dataset.category_id(1) == 0
    assert found(dataset, but=set())[Reason.CATEGORY_IDS] == (1, [0])


def test_run_lengths_in_every_form_are_one_mask() -> None:
    mask = np.zeros((60, 80), np.uint8, order="F")
    mask[10:30, 20:50] = 1
    mask[15:20, 30:40] = 0
    encoded = rle_ops.encode(mask)["counts"]
    forms = {
        encoded.decode(): None,
        encoded: Reason.RUN_BYTES,
        repr(encoded): Reason.RUN_BYTES,
        tuple(_runs(encoded.decode())): Reason.RUN_LIST,
    }
    for counts, reason in forms.items():
        notes: list[Reason] = []
        rle = _rle(
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
    tmp_path: Path,
    write_json: Callable[[Any], Path],
    mixed_content: dict[str, Any],
    runs: list[int],
    extent: tuple | None,
) -> None:
    mixed_content["annotations"][0] |= {"bbox": None, **_rle_of_mask(runs)}
    dataset = read_coco(write_json(mixed_content), tmp_path / "images", DATA)
    boxes = [o.box for o in dataset.images[0].objects if o.annotation_id == 0]
    assert boxes == ([extent] if extent else [])
    assert (Reason.NO_BOX in found(dataset)) == (extent is None)


def test_several_parts_and_holes(
    tmp_path: Path, write_json: Callable[[Any], Path], mixed_content: dict[str, Any]
) -> None:
    """3,000 squares of 2 x 2 on a grid are as many pixels as they have; as runs, holes stay
    holes."""
    image = mixed_content["images"][-1] | {"height": 60, "width": 80}
    squares = [(2 * (n % 40), 2 * (n // 40 % 30)) for n in range(3000)]
    parts = [[x, y, x + 1, y, x + 1, y + 1, x, y + 1] for x, y in squares]
    mixed_content["annotations"] = [
        {**mixed_content["annotations"][0], "bbox": [0, 0, 80, 60], "segmentation": parts}
    ]
    start = time.perf_counter()
    dataset = read_coco(write_json(mixed_content), tmp_path / "images", DATA)
    assert time.perf_counter() - start < 2
    expected = rle_ops.merge(rle_ops.frPyObjects(parts, image["height"], image["width"]))
    assert (rle_ops.decode(dataset.images[0].objects[0].rle) == rle_ops.decode(expected)).all()
    assert rle_ops.area(dataset.images[0].objects[0].rle) == 1200


# -- images that are listed ------------------------------------------------------------------------


def test_lost_images(
    tmp_path: Path, write_json: Callable[[Any], Path], mixed_content: dict[str, Any]
) -> None:
    (tmp_path / "images" / "photo 0.png").unlink()
    mixed_content["images"][0]["file_name"] = "../instances.json"
    mixed_content["images"][1]["height"] = None
    path = write_json(mixed_content)
    with pytest.raises(
        ConfigError,
        match=r"3 of 7 images are lost .*: '../instances.json' \(.*\), 'photo 5.png' \(.*\), 'photo 0.png' \(",
    ) as caught:
        read_coco(path, tmp_path / "images", DATA)
    assert "\n" not in str(caught.value)
    dataset = read_coco(path, tmp_path / "images", DATA, lost_images=True)
    assert found(dataset) == {
        Reason.NAME: (1, [17]),
        Reason.SIZE: (1, [16]),
        Reason.MISSING: (1, [11]),
        Reason.OF_DROPPED_IMAGE: (3, [0, 5, 4]),
    }
    assert [image.id for image in dataset.images] == [12, 13, 14, 15]
    assert len(dataset.lost) == 3
    with pytest.raises(ConfigError, match="3 of 7 images are lost"):
        dataset.refuse_lost_images()


def test_one_image_in_a_hundred_may_be_lost(mixed_file: Path) -> None:
    dataset = read_coco(mixed_file, mixed_file.parent / "images", DATA)
    dataclasses.replace(dataset, listed=100, lost=("a",)).refuse_lost_images()
    with pytest.raises(ConfigError, match=r"2 of 199 images are lost .*: a, b$"):
        dataclasses.replace(dataset, listed=199, lost=("a", "b")).refuse_lost_images()


@pytest.mark.parametrize(
    "name",
    [
        "../outside.png",
        "a/../../outside.png",
        "/etc/hostname",
        "..\\outside.png",
        "..",
        "",
        None,
        7,
        "a\0b",
        "\ud800",
    ],
)
def test_file_names_that_leave_the_folder_or_are_none(
    tmp_path: Path, write_json: Callable[[Any], Path], mixed_content: dict[str, Any], name: Any
) -> None:
    (tmp_path / "outside.png").write_bytes(b"")
    mixed_content["images"][-1]["file_name"] = name
    dataset = read_coco(write_json(mixed_content), tmp_path / "images", DATA, lost_images=True)
    assert found(dataset)[Reason.NAME] == (1, [11])


@pytest.mark.parametrize(
    ("on_disk", "written"),
    [
        ("with two  spaces .png", "with two  spaces .png"),
        ("Straße 日本 🌳.png", "Straße 日本 🌳.png"),
        ("narrow\u202fspace.png", "narrow\u202fspace.png"),
        ("sub folder/é.png", "sub folder\\é.png"),
        (unicodedata.normalize("NFD", "é.png"), unicodedata.normalize("NFC", "é.png")),
        ("back\\slash.png", "back\\slash.png"),
        ("a.png", "sub/../a.png"),
    ],
)
def test_file_names_are_found(
    tmp_path: Path,
    write_json: Callable[[Any], Path],
    mixed_content: dict[str, Any],
    on_disk: str,
    written: str,
) -> None:
    path = tmp_path / "images" / on_disk
    (tmp_path / "images" / "sub").mkdir()
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "images" / "photo 0.png").rename(path)
    mixed_content["images"][-1]["file_name"] = written
    dataset = read_coco(write_json(mixed_content), tmp_path / "images", DATA)
    assert (tmp_path / "images" / dataset.images[0].file_name).read_bytes() == path.read_bytes()
    assert (Reason.FILE_NAME in found(dataset)) == (dataset.images[0].file_name != written)
    assert dataset.lost == ()


def test_a_file_may_lack_info_and_images_their_annotations(
    tmp_path: Path, write_json: Callable[[Any], Path], mixed_content: dict
) -> None:
    assert "info" not in mixed_content
    dataset = read_coco(write_json({**mixed_content, "annotations": []}), tmp_path / "images", DATA)
    assert dataset.report.kept == {"images": 7, "objects": 0, "crowds": 0}


def test_report_keeps_the_first_ten_ids() -> None:
    report = Report(kept={"images": 3})
    for number in range(25):
        report.add(Reason.OUTSIDE, number)
    report.add(Reason.OVER_LIMIT, 7, 3, field="max_objects", limit=2)
    outside, over = Reason.OUTSIDE.text, Reason.OVER_LIMIT.text.format(field="max_objects", limit=2)
    assert report.lines() == [
        "kept 3 images",
        f"dropped 25: {outside} (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)",
        f"truncated 3: {over} (7)",
    ]
    assert report.to_dict()["findings"] == [
        {
            "outcome": "dropped",
            "code": "outside",
            "reason": outside,
            "count": 25,
            "first_ids": list(range(10)),
        },
        {
            "outcome": "truncated",
            "code": "over_limit",
            "reason": over,
            "count": 3,
            "first_ids": [7],
        },
    ]


# -- run lengths -----------------------------------------------------------------------------------


@given(
    arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(0, 1))
)
@settings(deadline=None, max_examples=60)
def test_run_lengths_are_those_of_a_loop(mask: np.ndarray) -> None:
    runs, value = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    assert _runs(rle_ops.encode(np.asfortranarray(mask))["counts"].decode()) == runs


@given(st.text(max_size=30) | st.text(alphabet=[chr(c) for c in range(48, 112)], max_size=30))
@settings(deadline=None, max_examples=200)
def test_garbage_is_no_mask(counts: str) -> None:
    with contextlib.suppress(_Dropped):
        rle = _rle({"size": [9, 7], "counts": counts}, 9, 7, lambda reason: None)
        assert rle_ops.decode(rle).shape == (9, 7)


def test_five_thousand_annotations_take_less_than_five_seconds(
    tmp_path: Path, write_json: Callable[[Any], Path], mixed_content: dict[str, Any]
) -> None:
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    polygon = np.stack([40 + 20 * np.cos(angles), 30 + 20 * np.sin(angles)], 1).ravel().tolist()
    template = {
        "image_id": 11,
        "category_id": 3,
        "bbox": [20, 10, 40, 40],
        "area": 1256,
        "iscrowd": 0,
        "segmentation": [polygon],
    }
    mixed_content["annotations"] = [{**template, "id": number} for number in range(5000)]
    path = write_json(mixed_content)
    start = time.perf_counter()
    assert read_coco(path, tmp_path / "images", DATA).report.kept["objects"] == 5000
    assert time.perf_counter() - start < 5
