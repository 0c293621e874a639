"""An annotation file as a whole: what is refused, and which images and categories it has.

(Single annotations: test_repair.py; image files: test_images.py.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from findings import Read, found
from PIL import Image
from pycocotools import mask as rle_ops

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.report import Reason

DATA = DataConfig()


def test_everything_comes_through(mixed_file: Path) -> None:
    dataset = read_coco(mixed_file, mixed_file.parent / "images", DATA)
    assert [image.id for image in dataset.images] == list(range(11, 18))
    assert dataset.class_names == ("three", "seven", "ninety")
    assert [dataset.category_id(label) for label in (1, 2, 3)] == [3, 7, 90]
    for label in (0, 4, -1):
        with pytest.raises(ValueError, match=str(label)):
            dataset.category_id(label)
    first = dataset.images[0].annotations
    assert [(o.annotation_id, o.label, o.box, o.iscrowd) for o in first] == [
        (0, 3, (20.0, 10.0, 50.0, 30.0), False),
        (5, 1, (0.0, 0.0, 12.5, 20.25), False),
    ]
    assert first[1].rle is None
    half = rle_ops.decode(dataset.images[1].annotations[0].rle)
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
    """The same content with every bbox changed, given the image's width and height; with or without
    its masks."""

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
            "categories: id 90: name 'a.+nb' is not printable",
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
        (lambda c: [c], "expected a JSON object, not a list"),
        (lambda c: 3, "expected a JSON object, not a int"),
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
            r"2 of 7 boxes are impossible as \[x, y, width, height\]; they fit as \[x1, y1, x",
        ),
        (
            _each_box(_as_corners, masks=True),
            r"\d of 7 boxes are impossible as \[x, y, width, height\]; they fit as \[x1, y1, x",
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
    with pytest.raises(ConfigError, match=r"none.json: No such file or directory"):
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
    read_mixed: Read, mixed_content: dict[str, Any], ids: tuple, repaired: bool
) -> None:
    """Also if the categories and the annotations write the same id in different ways."""
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
    dataset = read_mixed(mixed_content)
    order = sorted(names, key=lambda old: int(new[old]))
    assert dataset.class_names == tuple(names[old] for old in order)
    assert [dataset.category_id(label) for label in (1, 2, 3)] == sorted(map(int, ids))
    assert [o.label for o in dataset.images[0].annotations] == [
        order.index(90) + 1,
        order.index(3) + 1,
    ]
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


def test_one_category_of_id_0(read_mixed: Read, mixed_content: dict[str, Any]) -> None:
    mixed_content["categories"] = [{"id": 0, "name": "cell"}]
    for annotation in mixed_content["annotations"]:
        annotation["category_id"] = 0
    dataset = read_mixed(mixed_content)
    assert {o.label for image in dataset.images for o in image.annotations} == {1}
    assert dataset.category_id(1) == 0
    assert found(dataset, but=set())[Reason.CATEGORY_IDS] == (1, [0])


@pytest.mark.parametrize(("name", "noticed"), [("Seven ", True), ("sevens", False)])
def test_classes_of_one_name_are_noticed(
    read_mixed: Read, name: str, noticed: bool, mixed_content: dict[str, Any]
) -> None:
    mixed_content["categories"].append({"id": 8, "name": name})
    dataset = read_mixed(mixed_content)
    assert dataset.class_names == ("three", "seven", name, "ninety")
    assert found(dataset) == ({Reason.SAME_NAME: (2, [7, 8])} if noticed else {})


def test_lost_images(read_mixed: Read, tmp_path: Path, mixed_content: dict[str, Any]) -> None:
    (tmp_path / "images" / "photo 0.png").unlink()
    mixed_content["images"][0]["file_name"] = "../instances.json"
    mixed_content["images"][1]["height"] = None
    (tmp_path / "images" / "photo 5.png").write_bytes(b"no image")
    with pytest.raises(
        ConfigError,
        match=r"3 of 7 images are lost .*: '../instances.json' .*, 'photo 5.png' .*, 'photo 0",
    ) as caught:
        read_mixed(mixed_content)
    assert "\n" not in str(caught.value)
    dataset = read_mixed(mixed_content, lost_images=True)
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


def test_sizes_that_are_missing_come_from_the_file(
    read_mixed: Read, tmp_path: Path, mixed_content: dict[str, Any]
) -> None:
    """Of the upright picture, since annotations are mostly drawn on that."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 30)).save(tmp_path / "images" / "photo 6.png", exif=exif)
    first, *_, last = mixed_content["images"]
    del last["height"], last["width"]
    first |= {"height": 0, "width": None}
    mixed_content["images"][1]["width"] = "?"
    dataset = read_mixed(mixed_content)
    sizes = {image.id: (image.height, image.width) for image in dataset.images}
    assert (sizes[11], sizes[16], sizes[17]) == ((60, 80), (60, 80), (50, 30))
    assert found(dataset) == {Reason.SIZE_FROM_FILE: (3, [17, 16, 11])}


def test_a_file_may_lack_info_and_images_their_annotations(
    read_mixed: Read, mixed_content: dict
) -> None:
    assert "info" not in mixed_content
    dataset = read_mixed({**mixed_content, "annotations": []})
    assert dataset.report.kept == {"images": 7, "objects": 0, "crowds": 0}


def test_what_is_listed_twice_is_noticed(read_mixed: Read, mixed_content: dict[str, Any]) -> None:
    """A file under two ids, however it is spelled, and an annotation under two ids."""
    mixed_content["images"][0] |= {"file_name": "./photo 0.png", "height": 60, "width": 80}
    again = [{**a, "id": 20 + a["id"]} for a in mixed_content["annotations"][:3]]
    again[0]["category_id"] = 3  # another class, box or mask is another annotation
    again[2]["bbox"] = [30.5, 0, 29.5, 80]
    mixed_content["annotations"] += again
    dataset = read_mixed(mixed_content)
    assert found(dataset, but={Reason.CATEGORY_IDS, Reason.RUN_LIST}) == {
        Reason.SAME_FILE: (1, [11]),
        Reason.SAME_ANNOTATION: (1, [25]),
    }
    assert dataset.report.kept["objects"] == 9
    (line,) = (line for line in dataset.report.lines() if "listed twice" in line)
    assert line.startswith("noticed 1: images whose file is that of an image before")


def test_many_crowds_are_noticed(read_mixed: Read, mixed_content: dict[str, Any]) -> None:
    """From 5 % on, but not a single one."""
    first, *others = mixed_content["annotations"]
    assert found(read_mixed(mixed_content)) == {}  # 1 of 7
    others[0]["iscrowd"] = 1
    box = {**others[-1], "segmentation": [], "iscrowd": 0}
    for count, told in ((33, True), (34, False)):  # 2 of 40; 2 of 41
        more = [{**box, "id": 100 + n, "bbox": [n / 4, 0, 20, 20]} for n in range(count)]
        dataset = read_mixed({**mixed_content, "annotations": [first, *others, *more]})
        assert (Reason.MANY_CROWDS in found(dataset)) == told


def test_keys_that_occur_twice_are_told(tmp_path: Path, mixed_file: Path) -> None:
    text = mixed_file.read_text().replace('"id": 17,', '"id": 99, "id": 17, ')
    mixed_file.write_text(text.replace('{"images"', '{"categories": [], "images"'))
    dataset = read_coco(mixed_file, tmp_path / "images", DATA)
    assert found(dataset) == {Reason.REPEATED_KEY: (2, ["'id'", "'categories'"])}
    assert len(dataset.images) == 7
    assert len(dataset.categories) == 3


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
    start = time.process_time()  # whatever else the machine does
    assert read_coco(path, tmp_path / "images", DATA).report.kept["objects"] == 5000
    assert time.process_time() - start < 5
