"""Boxes and masks of a whole file in another form than COCO's: named and refused; and files that
look like it but are right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from findings import found
from pycocotools import mask as rle_ops

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.formats import flat_polygons, polygon_extent
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.data.report import Reason

POINTS = [[10, 10], [30, 10], [30, 30]]
SIZES = ((240, 320), (320, 200), (200, 360))  # (height, width) of images 1, 2, 3
Change = Callable[[dict[str, Any], int, int], None]  # of an annotation, given height and width


def content(sizes: tuple[tuple[int, int], ...] = SIZES) -> dict[str, Any]:
    """30 triangles with a right angle, wide or tall, anywhere in the images."""
    rng = np.random.default_rng(5)
    annotations = []
    for number in range(30):
        height, width = sizes[number % 3]
        w, h = (int(side) for side in rng.integers(20, 70, 2))
        x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        annotations.append(
            {
                "id": number + 1,
                "image_id": number % 3 + 1,
                "category_id": 1,
                "bbox": [x, y, w, h],
                "area": w * h / 2,
                "iscrowd": 0,
                "segmentation": [[x, y, x + w, y, x, y + h]],
            }
        )
    images = [
        {"id": i, "file_name": f"{i}.png", "height": h, "width": w}
        for i, (h, w) in enumerate(sizes, 1)
    ]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}],
    }


def read(folder: Path, data: dict[str, Any]) -> CocoDataset:
    for image in data["images"]:
        (folder / image["file_name"]).touch()
    path = folder / "instances.json"
    path.write_text(json.dumps(data))
    return read_coco(path, folder, DataConfig())


def changed(change: Change, sizes: Any = SIZES, *, every: int = 1) -> dict[str, Any]:
    data = content(sizes)
    for annotation in data["annotations"][::every]:
        change(annotation, *sizes[annotation["image_id"] - 1])
    return data


def points(change: Callable[[float, float, int, int], tuple[float, float]]) -> Change:
    """Changes each point (x, y) of the polygons."""

    def apply(annotation: dict[str, Any], height: int, width: int) -> None:
        (polygon,) = annotation["segmentation"]
        pairs = zip(polygon[::2], polygon[1::2], strict=True)
        annotation["segmentation"] = [
            [value for x, y in pairs for value in change(x, y, height, width)]
        ]

    return apply


def boxes(change: Callable[..., list[float]]) -> Change:
    def apply(annotation: dict[str, Any], height: int, width: int) -> None:
        annotation["bbox"] = change(*annotation["bbox"])

    return apply


def both(*changes: Change) -> Change:
    def apply(annotation: dict[str, Any], height: int, width: int) -> None:
        for change in changes:
            change(annotation, height, width)

    return apply


def without(field: str) -> Change:
    return lambda annotation, height, width: annotation.update({field: None})


def runs(mask_of: Callable[[np.ndarray], np.ndarray], size: Callable[[int, int], Any]) -> Change:
    """The mask as run lengths of the array that `mask_of` makes of it, called of `size`."""

    def apply(annotation: dict[str, Any], height: int, width: int) -> None:
        rle = rle_ops.merge(rle_ops.frPyObjects(annotation["segmentation"], height, width))
        encoded = rle_ops.encode(np.asfortranarray(mask_of(rle_ops.decode(rle))))
        counts = encoded["counts"].decode()
        annotation["segmentation"] = {"size": size(height, width), "counts": counts}

    return apply


SWAP = points(lambda x, y, h, w: (y, x))
FRACTIONS = points(lambda x, y, h, w: (x / w, y / h))
OTHERS = [annotation["segmentation"] for annotation in content()["annotations"]]
HALF = points(lambda x, y, h, w: (x / 2, y / 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (FRACTIONS, "30 of 30 masks have polygons in 0..1, .*: multiply them by its width and"),
        (both(FRACTIONS, without("bbox")), "30 of 30 masks have polygons in 0..1"),
        (both(FRACTIONS, boxes(lambda *_: [0, 0, 0, 0])), "30 of 30 masks have polygons in 0..1"),
        (
            both(FRACTIONS, lambda a, h, w: a.update(bbox=[a["bbox"][0] / w, 0.1, 0.2, 0.3])),
            r"30 of 30 boxes lie in 0..1, .* multiply them .* \(the polygons, too\)",
        ),
        (SWAP, r"30 of 30 masks are not where .*; the polygons fit as \(y, x\): write x, y, "),
        (
            both(SWAP, boxes(lambda x, y, w, h: [y, x, h, w])),
            r"boxes leave their image; they fit as y before x .*, in boxes and polygons",
        ),
        (both(SWAP, without("bbox")), "polygons leave their image; they fit as y before x"),
        (
            both(without("segmentation"), boxes(lambda x, y, w, h: [y, x, h, w])),
            "boxes leave their image; they fit as y before x",
        ),
        (
            boxes(lambda x, y, w, h: [y, x, h, w]),
            r"the boxes fit as \[y, x, height, width\]: write \[x, y, width, height\]",
        ),
        (boxes(lambda x, y, w, h: [y, x, y + h, x + w]), r"the boxes fit as \[y1, x1, y2, x2\]"),
        (
            boxes(lambda x, y, w, h: [x + w / 2, y + h / 2, w, h]),
            r"the boxes fit as \[centre x, centre y, width, height\]: write the upper left corner",
        ),
        (HALF, "masks fit as drawn on a picture of 0.5 times the width and 0.5 times the height"),
        (points(lambda x, y, h, w: (2 * x, 2 * y)), "a picture of 2 times the width and 2 times"),
        (points(lambda x, y, h, w: (8 * x, 8 * y)), "a picture of 8 times the width and 8 times"),
        (
            points(lambda x, y, h, w: (640 * x / w, 480 * y / h)),
            r"drawn on a picture of 640 x 480 \(width x height\): scale x by width / 640 and y by",
        ),
        (points(lambda x, y, h, w: (100 * x / w, 100 * y / h)), "a picture of 100 x 100"),
        (points(lambda x, y, h, w: (x, h - y)), "upside down: y counts from the top"),
        (
            lambda a, h, w: points(lambda x, y, *_: (x - a["bbox"][0], y - a["bbox"][1]))(a, h, w),
            "the masks fit as counted from the corner of their box: add its x and y",
        ),
        (
            both(points(lambda x, y, *_: (2 * x, 2 * y)), boxes(lambda *b: [2 * v for v in b])),
            r"\d+ of 30 boxes lie to the right of their image or below; they reach \d.\d times",
        ),
        (
            runs(np.ascontiguousarray, lambda h, w: [w, h]),
            r"30 of 30 masks are run lengths of another size .*\(the first: size \[320, 240\] in "
            r"an image of \[240, 320\].*they look like \[width, height\]",
        ),
        (
            runs(lambda m: m[::2, ::2], lambda h, w: [h // 2, w // 2]),
            r"size \[120, 160\] in an image of \[240, 320\].*: resize each mask to its image",
        ),
        (
            runs(lambda m: m.ravel().reshape(m.shape[::-1]).T, lambda h, w: [h, w]),
            "the run lengths fit as rows: they run down the columns",
        ),
        (
            lambda a, h, w: a.update({"segmentation": OTHERS[-a["id"]]}),
            r"of 30 masks are not where their bbox is, and no usual mistake explains it",
        ),
    ],
)  # fmt: skip
def test_refused_with_what_it_looks_like(tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, changed(change))
    text = str(caught.value)
    assert re.search(message, text), text
    assert text.startswith(f"{tmp_path / 'instances.json'}: ")
    assert "\n" not in text


def test_square_images_and_a_part_of_the_file(tmp_path: Path) -> None:
    """Square images hold an exchanged mask too, and a third of the file is enough."""
    square = ((240, 240),) * 3
    with pytest.raises(ConfigError, match=r"the polygons fit as \(y, x\)"):
        read(tmp_path, changed(SWAP, square))
    with pytest.raises(ConfigError, match="fit when rows and columns are exchanged"):
        read(tmp_path, changed(runs(np.transpose, lambda h, w: [h, w]), square))
    with pytest.raises(ConfigError, match=r"^\S+ 10 of 30 masks .* fit as \(y, x\)"):
        read(tmp_path, changed(SWAP, every=3))


def test_one_annotation_is_enough_where_it_fits(tmp_path: Path) -> None:
    data = changed(SWAP)
    data["annotations"] = data["annotations"][:1]
    with pytest.raises(ConfigError, match=r"1 of 1 masks .* the polygons fit as \(y, x\)"):
        read(tmp_path, data)


@pytest.mark.parametrize(
    ("change", "every", "reasons"),
    [
        (lambda *_: None, 1, {}),
        # A few that are wrong are each repaired.
        (SWAP, 10, {Reason.FAR_FROM_MASK: 3}),
        (HALF, 10, {Reason.FAR_FROM_MASK: 3, Reason.WRONG_AREA: 3}),
        (FRACTIONS, 10, {Reason.EMPTY_MASK: 3}),
        (boxes(lambda *_: [0, 0, 0, 0]), 1, {Reason.BOX_FROM_MASK: 30}),
        (boxes(lambda x, y, w, h: [x, y, 0, h]), 4, {Reason.BOX_FROM_MASK: 8}),
        (runs(np.zeros_like, lambda h, w: [h, w]), 1, {Reason.EMPTY_MASK: 30}),
        # Boxes of whole things whose masks are of what is seen of them.
        (
            boxes(lambda x, y, w, h: [x, y, w, 1.6 * h]),
            1,
            {Reason.CLIPPED: None, Reason.LOOSE_BOX: None},
        ),
        # Objects of a tile that reach into its neighbours.
        (
            both(without("segmentation"), boxes(lambda x, y, w, h: [x - 90, y - 90, 200, 200])),
            1,
            {Reason.CLIPPED: None},
        ),
        # Objects of less than a pixel, somewhere and in the corner.
        (
            lambda a, *_: a.update(
                bbox=[7.3, 7.3, 0.2, 0.2],
                segmentation=[[7.3, 7.3, 7.5, 7.3, 7.5, 7.5]],
                area=0.02,
            ),
            1,
            {Reason.EMPTY_MASK: 30, Reason.SAME_ANNOTATION: 27, Reason.IN_A_CORNER: 30},
        ),
        (
            lambda a, *_: a.update(
                bbox=[0, 0, 1, 1], segmentation=[[0, 0, 1, 0, 1, 1, 0, 1]], area=1
            ),
            1,
            {Reason.SAME_ANNOTATION: 27, Reason.IN_A_CORNER: 30},
        ),
    ],
)  # fmt: skip
def test_right_files_that_look_like_it(
    tmp_path: Path, change: Change, every: int, reasons: dict[Reason, int | None]
) -> None:
    dataset = read(tmp_path, changed(change, every=every))
    assert dataset.report.kept["objects"] == 30
    counts = {reason: count for reason, (count, _) in found(dataset, but=set()).items()}
    assert counts == {r: counts[r] if n is None else n for r, n in reasons.items()}


def test_boxes_of_zeros_come_from_the_masks(tmp_path: Path) -> None:
    dataset = read(tmp_path, changed(boxes(lambda *_: [0, 0, 0, 0])))
    expected = {a["id"]: a["bbox"] for a in content()["annotations"]}
    for image in dataset.images:
        for record in image.annotations:
            x, y, w, h = expected[record.annotation_id]
            # The last row and column of a triangle may have no pixel.
            assert np.abs(np.subtract(record.box, (x, y, x + w, y + h))).max() <= 2


def test_many_boxes_in_the_upper_left_quarter_are_noticed(tmp_path: Path) -> None:
    """Annotated on a picture of half the size, boxes and masks alike: nothing else tells."""
    half = both(HALF, boxes(lambda *box: [side / 2 for side in box]))
    assert found(read(tmp_path, changed(half)), but=set())[Reason.IN_A_CORNER][0] == 30


@pytest.mark.parametrize(
    "segmentation",
    [
        [[[10, 10], [30, 10], [30, 30], [10, 30]], [[40, 20], [65, 20], [65, 50]]],
        [[{"x": 10, "y": 10}, {"x": 30, "y": 10}, {"x": 30, "y": 30}, {"x": 10, "y": 30}],
         [40, 20, 65, 20, 65, 50]],
        [[[[10, 10], [30, 10], [30, 30], [10, 30]]], [[[40, 20], [65, 20], [65, 50]]]],
    ],
)  # fmt: skip
def test_polygons_of_points(tmp_path: Path, segmentation: Any) -> None:
    assert flat_polygons(segmentation) == (
        [[10, 10, 30, 10, 30, 30, 10, 30], [40, 20, 65, 20, 65, 50]],
        True,
    )
    data = content()
    flat = {"bbox": [10, 10, 55, 40], "segmentation": flat_polygons(segmentation)[0], "area": 775}
    data["annotations"] = [data["annotations"][0] | flat]
    expected = read(tmp_path, data).images[0].objects
    data["annotations"][0]["segmentation"] = segmentation
    dataset = read(tmp_path, data)
    assert dataset.images[0].annotations == expected
    assert found(dataset) == {Reason.PAIRS: (1, [1])}


@pytest.mark.parametrize(
    ("segmentation", "extent"),
    [
        ([[1, 2, 3, 4, 5, 9], [0.5, 7, 1, 7, 1, 8]], (0.5, 2, 5, 9)),
        ([1, 2, 3, 4, 5, 9], (1, 2, 5, 9)),
        ([POINTS], (10, 10, 30, 30)),
        ([[1, 2, 3, 4, 5, "9"], [1, 2]], None),
        ({"size": [60, 80], "counts": [4800]}, None),
        (None, None),
    ],
)
def test_the_extent_of_polygons_is_that_of_their_points(segmentation: Any, extent: Any) -> None:
    assert polygon_extent(segmentation) == extent


@pytest.mark.parametrize("one", [POINTS, [{"x": x, "y": y} for x, y in POINTS]])
def test_one_polygon_of_points(one: Any) -> None:
    assert flat_polygons(one) == ([[10, 10, 30, 10, 30, 30]], True)


@pytest.mark.parametrize(
    "parts", [[[1, 2, 3, 4, 5, 6]], [[1, 2, 3, 4, 5, 6], [1, 2, 3]], ["a", None], [[], [[], []]]]
)
def test_what_is_not_points_stays(parts: list[Any]) -> None:
    assert flat_polygons(parts)[1] is False
    assert flat_polygons(parts)[0] == parts
