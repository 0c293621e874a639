"""Every layout that a folder may have, by hand, or as the converters' tests write it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from exports import (
    PICTURES,
    RING,
    Drawn,
    as_cvat,
    as_datumaro,
    as_folders,
    as_label_studio,
    as_labelme,
    as_names,
    as_supervisely,
    as_via,
    as_voc,
    as_voc_without_xml,
    as_yolo,
    datumaro_file,
    picture,
    supervisely_bitmap,
    supervisely_file,
)
from PIL import Image

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.convert.common import Options
from mrcnn_jax.convert.mask_images import Masks
from mrcnn_jax.convert.write import convert
from mrcnn_jax.convert.yolo import Yolo
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.datasets.recognise import recognise


def image(path: Path, value: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


def mask(path: Path, *corners: int) -> None:
    """One value for each corner: 1 at the upper left of the first, ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros((8, 8), np.uint8)
    for value, corner in enumerate(corners, 1):
        values[corner : corner + 2, corner : corner + 2] = value
    Image.fromarray(values).save(path)


def coco(path: Path, *names: str, images: Path | None = None, supercategory: bool = False) -> Path:
    """An annotation file with an object in each image; with `images`, the images are written."""
    for name in names if images else ():
        image(images / name.replace("\\", "/"))  # type: ignore[operator]
    categories = [{"id": 1, "name": "ape"}, {"id": 2, "name": "bee"}]
    content = {
        "info": {},
        "images": [
            {"id": n, "file_name": name, "height": 8, "width": 8} for n, name in enumerate(names)
        ],
        "annotations": [
            {
                "id": n,
                "image_id": n,
                "category_id": 1,
                "bbox": [1, 1, 4, 4],
                "area": 16,
                "iscrowd": 0,
                "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]],
            }
            for n in range(len(names))
        ],
        "categories": [{"id": 0, "name": "zoo"}] * supercategory + categories,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def found(folder: Path) -> tuple[str, ...]:
    """Annotations and images of both parts, relative to the folder, after reading them."""
    result = recognise(folder)
    assert result.told.startswith(f"{folder}: ")
    assert "\n" not in result.told
    places = []
    for part in (result.train, result.val):
        if part is not None:
            dataset = read_coco(part.annotations, part.images, DataConfig())
            assert not dataset.lost
            places += [part.annotations, part.images]
    return tuple(place.relative_to(folder).as_posix() for place in places)


def test_cocos_own_layout(tmp_path: Path) -> None:
    for split in ("train", "val"):
        file = tmp_path / "annotations" / f"instances_{split}2017.json"
        coco(file, "1.png", "2.png", images=tmp_path / f"{split}2017")
        for other in ("captions", "person_keypoints"):
            shutil.copy(file, file.with_name(f"{other}_{split}2017.json"))
    names = [f"{part}2017" for part in ("train", "val")]
    assert found(tmp_path) == (
        f"annotations/instances_{names[0]}.json",
        names[0],
        f"annotations/instances_{names[1]}.json",
        names[1],
    )


def test_two_files_beside_their_images(tmp_path: Path) -> None:
    coco(tmp_path / "train.json", "1.png", images=tmp_path / "images")
    coco(tmp_path / "val.json", "2.png", images=tmp_path / "images")
    (tmp_path / "package.json").write_text('{"name": "no annotations"}')
    assert found(tmp_path) == ("train.json", "images", "val.json", "images")


@pytest.mark.parametrize("second", ["valid", "val"])
def test_roboflow(second: str, tmp_path: Path) -> None:
    """The same names in all parts: each part's images are those beside its file."""
    for part in ("train", second, "test"):
        file = tmp_path / part / "_annotations.coco.json"
        coco(file, "1.png", images=file.parent, supercategory=True)
    assert found(tmp_path) == (
        "train/_annotations.coco.json",
        "train",
        f"{second}/_annotations.coco.json",
        second,
    )
    told = recognise(tmp_path).told
    assert "Roboflow's COCO export" in told
    assert told.endswith("; not used: test/_annotations.coco.json")


def test_cvats_coco_export(tmp_path: Path) -> None:
    file = tmp_path / "annotations" / "instances_default.json"
    coco(file, "a/1.png", "b/1.png", images=tmp_path / "images")
    assert found(tmp_path) == ("annotations/instances_default.json", "images")
    assert "CVAT's COCO export" in recognise(tmp_path).told


@pytest.mark.parametrize("slash", ["/", "\\"])
def test_label_studios_coco_export(slash: str, tmp_path: Path) -> None:
    names = [f"images{slash}1.png", f"images{slash}2.png"]
    coco(tmp_path / "result.json", *names, images=tmp_path)
    assert found(tmp_path) == ("result.json", ".")
    assert "Label Studio's COCO export" in recognise(tmp_path).told


def test_what_is_not_used_is_told(tmp_path: Path) -> None:
    coco(tmp_path / "mine.json", "1.png", images=tmp_path)
    for number in range(4):
        (tmp_path / f"{number}.json").write_text('{"shapes": [], "imagePath": "1.png"}')
    assert recognise(tmp_path).told.endswith("; not used: 0.json, 1.json, 2.json and 1 more")
    (tmp_path / "0.json").write_text('{"_via_img_metadata": {}}')
    assert recognise(tmp_path).told.endswith("; not used: 0.json, 1.json, 2.json and 1 more")


def test_runs_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    """A run's folder may lie in the folder that it is trained on."""
    coco(tmp_path / "mine.json", "1.png", images=tmp_path)
    for place in ("runs/a/dataset", "runs/b", ".old", "runs/c/dataset"):
        shutil.copy(tmp_path / "mine.json", coco(tmp_path / place / "train.json"))
    (tmp_path / "runs" / "a" / "dataset" / "split.json").touch()
    (tmp_path / "runs" / "b" / "checkpoints").mkdir()
    (tmp_path / "runs" / "b" / "config.json").touch()
    coco(tmp_path / "other.json", "1.png")
    with pytest.raises(ConfigError, match=r"several"):
        recognise(tmp_path, without=tmp_path / "runs" / "c")
    (tmp_path / "other.json").unlink()
    result = recognise(tmp_path, without=tmp_path / "runs" / "c")
    assert result.train is not None
    assert result.train.annotations == tmp_path / "mine.json"
    assert "not used" not in result.told


def dataset_of(options: Options | None, out: Path) -> CocoDataset:
    """What is read after a conversion."""
    assert options is not None
    convert(replace(options, out=out))
    return read_coco(out, options.open_images().folder, DataConfig())


def converted(options: Options | None, out: Path) -> list[object]:
    """Classes, and the objects of each image by its name, after a conversion."""
    dataset = dataset_of(options, out)
    images = {
        Path(i.file_name).name: [(o.label, o.box, o.rle) for o in i.annotations]
        for i in dataset.images
    }
    return [dataset.class_names, images]


@pytest.mark.parametrize(
    "written",
    [
        as_labelme,
        as_cvat,
        as_voc,
        as_voc_without_xml,
        as_folders,
        as_names,
        as_yolo,
        as_via,
        as_label_studio,
        as_supervisely,
        as_datumaro,
    ],
)
@pytest.mark.parametrize("inside", [".", "export"])
def test_exports_of_tools(
    written: Callable[[Path, Drawn], Options], inside: str, tmp_path: Path
) -> None:
    """What is recognised converts to what the options of the converters' own tests do."""
    folder = tmp_path / "folder"
    (folder / inside).mkdir(parents=True)
    options = written(folder / inside, PICTURES)
    if isinstance(options, Masks):  # nothing says that an image without masks is annotated
        options = replace(options, keep_unannotated=False)
    expected = converted(options, tmp_path / "expected.json")
    result = recognise(folder)
    assert result.told.startswith(f"{folder}: ")
    assert result.train is None
    assert converted(result.export, tmp_path / "found.json") == expected


@pytest.mark.parametrize("written", [as_cvat, as_voc])
def test_exports_beside_their_images(
    written: Callable[[Path, Drawn], Options], tmp_path: Path
) -> None:
    """my/cvat/annotations.xml and my/photos/a.png."""
    (tmp_path / "my" / "export").mkdir(parents=True)
    options = written(tmp_path / "my" / "export", PICTURES)
    expected = converted(options, tmp_path / "expected.json")
    options.image_folder().rename(tmp_path / "my" / "photos")
    export = recognise(tmp_path / "my").export
    assert export is not None
    assert converted(export, tmp_path / "found.json") == expected
    assert export.open_images().folder == tmp_path / "my"


def yolo(folder: Path, *names: str, yaml: str) -> None:
    """A data.yaml, and images with a square of the second class each."""
    for name in names:
        image(folder / name)
        labels = (folder / name.replace("images", "labels")).with_suffix(".txt")
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.write_text("1 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75")
    (folder / "data.yaml").write_text(f"{yaml}\nnames: [ape, bee]\n")


def test_yolo_of_two_parts(tmp_path: Path) -> None:
    """As Roboflow exports it: both parts are converted, with the same classes and images folder."""
    parts = ("train", "valid", "test")
    yolo(
        tmp_path,
        *(f"{part}/images/{n}.png" for part in parts for n in (1, 2)),
        yaml="train: ../train/images\nval: ../valid/images\ntest: ../test/images\n",
    )
    (tmp_path / "args.yaml").write_text("train: true\nnames: x\n")
    result = recognise(tmp_path)
    assert result.told == (
        f"{tmp_path}: YOLO: data.yaml: 2 classes, 2 images of train, 2 of val; not used: test"
    )
    square = [(2, (2.0, 2.0, 6.0, 6.0))]
    for export, part in ((result.export, "train"), (result.val_export, "valid")):
        dataset = dataset_of(export, tmp_path / "out.json")
        assert dataset.class_names == ("ape", "bee")
        assert {i.file_name: [(o.label, o.box) for o in i.annotations] for i in dataset.images} == {
            f"{part}/images/1.png": square,
            f"{part}/images/2.png": square,
        }
        assert dataset.images_dir == tmp_path


@pytest.mark.parametrize(
    ("yaml", "told"),
    [
        ("train: images", "2 images of train"),
        ("train: images\nval: images", "2 images of train, val has images of train, and is divi"),
        (
            "train: images/1.png\nval: images",
            "1 images of train, val has images of train, and is divided anew; 1 images of val alo",
        ),
        ("train: images\nval: gone", "2 images of train; val: no 'gone' in "),
        ("val: images", "2 images of val"),
        ("Validation: images", "2 images of val"),
    ],
)
def test_yolo_of_one_part(yaml: str, told: str, tmp_path: Path) -> None:
    yolo(tmp_path, "images/1.png", "images/2.png", yaml=yaml)
    result = recognise(tmp_path)
    assert result.told.startswith(f"{tmp_path}: YOLO: data.yaml: 2 classes, {told}")
    assert result.val_export is None
    assert converted(result.export, tmp_path / "o.json")[0] == ("ape", "bee")


@pytest.mark.parametrize(
    ("images", "classes", "train"),
    [
        ("images", "classes.txt", "images"),  # Label Studio's
        ("images", "labels/classes.txt", "images"),  # LabelImg's
        ("", "classes.txt", "."),
    ],
)
def test_yolo_without_data_yaml(images: str, classes: str, train: str, tmp_path: Path) -> None:
    """The file to write is told, and works."""
    my = tmp_path / "my"
    yolo(my, f"{images}/1.png".lstrip("/"), yaml="")
    (my / "data.yaml").unlink()
    (my / classes).write_text("ape\nbee: 2\nno\n")
    told = f'; write {my / "data.yaml"}: train: {train}, names: [ape, "bee: 2", "no"]'
    with pytest.raises(ConfigError) as caught:
        recognise(tmp_path)
    assert str(caught.value).endswith(told)
    with pytest.raises(ConfigError) as caught:
        convert(Yolo(my, tmp_path / "o.json"))
    assert str(caught.value) == f"{my}: no data.yaml in this folder{told}"
    (my / "data.yaml").write_text(told.split("yaml: ")[1].replace(", names", "\nnames"))
    assert converted(recognise(tmp_path).export, tmp_path / "o.json")[0] == ("ape", "bee: 2", "no")


def test_via_of_two_parts(tmp_path: Path) -> None:
    """As of the balloon data set: the same names in both folders."""
    for part, label in (("train", "ape"), ("val", "bee")):
        image(tmp_path / part / "a.png")
        shape = {"name": "rect", "x": 1, "y": 1, "width": 4, "height": 4}
        regions = {"0": {"shape_attributes": shape, "region_attributes": {"class": label}}}
        entry = {"filename": "a.png", "size": 9, "regions": regions}
        (tmp_path / part / "via_region_data.json").write_text(json.dumps({"a.png9": entry}))
    result = recognise(tmp_path)
    assert result.told == (
        f"{tmp_path}: VIA: train/via_region_data.json; validation: val/via_region_data.json"
    )
    for export, part, label in ((result.export, "train", "ape"), (result.val_export, "val", "bee")):
        dataset = dataset_of(export, tmp_path / "o.json")
        assert dataset.class_names == (label,)
        assert [i.file_name for i in dataset.images] == [f"{part}/a.png"]


CELLS = """filename,file_size,region_shape_attributes,region_attributes
{}.png,9,"{{""name"":""rect"",""x"":1,""y"":2,""width"":4,""height"":3}}","{{""class"":""{}""}}"
"""


def test_vias_csv(tmp_path: Path) -> None:
    """Of one part and of two; a project in JSON goes before it, and other tables are nothing."""
    folder = tmp_path / "set"
    for part, name in (("train", "a"), ("val", "b")):
        image(folder / part / f"{name}.png")
    (folder / "table.csv").write_text("filename,file_size\na.png,9\n")
    (folder / "folder.csv").mkdir()
    for part, name, told in (
        ("train", "a", "VIA: train/via_export_csv.csv"),
        ("val", "b", "VIA: train/via_export_csv.csv; validation: val/via_export_csv.csv"),
    ):
        (folder / part / "via_export_csv.csv").write_text(CELLS.format(name, part))
        result = recognise(folder)
        assert result.told == f"{folder}: {told}"
    for export, part, name in ((result.export, "train", "a"), (result.val_export, "val", "b")):
        box = [(1, (1.0, 2.0, 5.0, 5.0), None)]
        assert converted(export, tmp_path / "o.json") == [(part,), {f"{name}.png": box}]
    (folder / "project.json").write_text('{"_via_img_metadata": {}}')
    assert recognise(folder).told == f"{folder}: VIA: project.json"


def test_supervisely_of_data_sets(tmp_path: Path) -> None:
    """By their names; a project in a folder beside another meta.json."""
    folder = tmp_path / "set"
    root = folder / "cells"
    as_supervisely_of(root, "train_1", "train_2", "val", "test")
    (folder / "meta.json").write_text("{}")
    result = recognise(folder)
    assert result.told == (
        f"{folder}: Supervisely: train_1, train_2; validation: val; not used: test"
    )
    places = []
    for export in (result.export, result.val_export):
        dataset = dataset_of(export, tmp_path / "o.json")
        assert dataset.class_names == ("unused", "cell")
        places.append([i.file_name for i in dataset.images])
        assert dataset.images_dir == root
    assert places == [["train_1/img/a.png", "train_2/img/a.png"], ["val/img/a.png"]]
    as_supervisely_of(folder / "others", "ds")
    with pytest.raises(ConfigError, match="several projects of Supervisely: cells, others: name"):
        recognise(folder)


def as_supervisely_of(root: Path, *datasets: str) -> None:
    for place in datasets:
        picture(root / place / "img" / "a.png")
        drawn = [supervisely_bitmap("cell", RING)]
        supervisely_file(root / place / "ann" / "a.png.json", drawn)
    classes = [{"title": title, "shape": "bitmap"} for title in ("unused", "cell")]
    (root / "meta.json").write_text(json.dumps({"classes": classes}))


def test_datumaro_of_subsets(tmp_path: Path) -> None:
    """The same names in all; both parts have the classes of the file in its order."""
    for subset in ("train", "val", "test"):
        image(tmp_path / "images" / subset / "a.png")
        drawn = {"type": "bbox", "bbox": [1, 2, 4, 3], "label_id": 1, "group": 0}
        items = [{"id": "a", "image": {"path": "a.png"}, "annotations": [drawn]}]
        datumaro_file(tmp_path / "annotations" / f"{subset}.json", ["bee", "ape"], items)
    result = recognise(tmp_path)
    files = [f"annotations/{subset}.json" for subset in ("train", "val", "test")]
    assert result.told == (
        f"{tmp_path}: Datumaro: {files[0]}; validation: {files[1]}; not used: {files[2]}"
    )
    for export, subset in ((result.export, "train"), (result.val_export, "val")):
        dataset = dataset_of(export, tmp_path / "o.json")
        assert dataset.class_names == ("bee", "ape")
        assert {i.file_name: [o.box for o in i.annotations] for i in dataset.images} == {
            f"images/{subset}/a.png": [(1.0, 2.0, 5.0, 5.0)]
        }


def test_label_studios_own_json(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.png")
    value = {"points": [[0, 0], [50, 0], [50, 50]], "polygonlabels": ["ape"]}
    drawn = {"type": "polygonlabels", "to_name": "image", "value": value}
    drawn |= {"original_width": 8, "original_height": 8}
    task = {"data": {"image": "/data/upload/1/a.png"}, "annotations": [{"result": [drawn]}]}
    (tmp_path / "project-1.json").write_text(json.dumps([task]))
    result = recognise(tmp_path)
    assert result.told == f"{tmp_path}: Label Studio: project-1.json"
    names, images = converted(result.export, tmp_path / "o.json")
    assert names == ("ape",)
    assert isinstance(images, dict)
    assert [box for _, box, _ in images["a.png"]] == [(0.0, 0.0, 4.0, 4.0)]


def of_masks(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    """Objects by image, after a conversion."""
    names, images = converted(recognise(folder).export, folder.parent / "found.json")
    assert "dropped" not in capsys.readouterr().out
    assert names == ("object",)
    assert isinstance(images, dict)
    return {name: len(objects) for name, objects in images.items()}


def test_penn_fudan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mask of instance numbers for each image, with "_mask" behind the image's name."""
    folder = tmp_path / "PennFudanPed"
    for number, corners in (("00001", (0, 4)), ("00002", (2,))):
        image(folder / "PNGImages" / f"FudanPed{number}.png")
        mask(folder / "PedMasks" / f"FudanPed{number}_mask.png", *corners)
        (folder / "Annotation").mkdir(exist_ok=True)
        (folder / "Annotation" / f"FudanPed{number}.txt").touch()
    assert of_masks(folder, capsys) == {"FudanPed00001.png": 2, "FudanPed00002.png": 1}
    assert recognise(folder).told == (
        f"{folder}: masks: 2 files in PedMasks/, one object per value, or per part where most "
        "values have several, all of one class, object"
    )


@pytest.mark.parametrize("place", ["{split}/{what}", "{what}/{split}"])
def test_masks_of_each_split(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A split within the masks names no classes: images/train/x.png and masks/train/x.png."""
    for split, name in (("train", "a"), ("train", "b"), ("val", "c")):
        image(tmp_path / "set" / place.format(split=split, what="images") / f"{name}.png")
        mask(tmp_path / "set" / place.format(split=split, what="masks") / f"{name}.png", 0, 4)
    assert of_masks(tmp_path / "set", capsys) == {"a.png": 2, "b.png": 2, "c.png": 2}


def test_equal_names_in_each_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mask's image is in the folder beside its own."""
    for split, corners in (("train", (0, 4)), ("val", (2,))):
        for layout, place in (("image", "masks"), ("folder", "1/masks")):
            folder = tmp_path / layout / split
            image((folder / place).with_name("images") / "1.png")
            for number, corner in enumerate(corners):
                if layout == "folder":
                    mask(folder / place / f"{number}.png", corner)
            if layout == "image":
                mask(folder / place / "1.png", *corners)
    for layout, place in (("image", ""), ("folder", "1/")):
        dataset = dataset_of(recognise(tmp_path / layout).export, tmp_path / "o.json")
        assert {i.file_name: len(i.annotations) for i in dataset.images} == {
            f"train/{place}images/1.png": 2,
            f"val/{place}images/1.png": 1,
        }


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images/images/{}.tif", "masks/masks/{}.png"),  # as archives of both are unpacked
        ("images/{}.png", "masks/mask_{}.png"),
        ("images/img_{}.png", "masks/mask_{}.png"),
        ("images/{}_img.png", "masks/{}_masks.png"),  # Cellpose's names
        ("images/{}.jpg", "masks/{}.jpg.png"),
    ],
)
def test_names_of_masks(
    images: str, masks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        image(tmp_path / "set" / images.format(number))
        mask(tmp_path / "set" / masks.format(number), 0, 4)
    found = of_masks(tmp_path / "set", capsys)
    assert found == {Path(images).name.format(number): 2 for number in range(2)}


def test_a_folder_for_each_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """x/images/x.png with x/masks/1.png."""
    for name, count in (("x", 2), ("y", 1)):
        image(tmp_path / "set" / name / "images" / f"{name}.png")
        for number in range(count):
            mask(tmp_path / "set" / name / "masks" / f"{number}.png", 3 * number)
    assert of_masks(tmp_path / "set", capsys) == {"x.png": 2, "y.png": 1}


@pytest.mark.parametrize("start", ["", "mask_"])
@pytest.mark.parametrize(
    ("image_place", "mask_place"),
    [("images", "masks/{}"), ("{}/images", "{}/masks"), ("{}/images", "{}/masks/masks")],
)
def test_numbered_masks_in_a_folder_for_each_numbered_image(
    image_place: str,
    mask_place: str,
    start: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The number of a mask is not that of its image."""
    counts = {"1": 2, "2": 1, "3": 3}
    for name, count in counts.items():
        image(tmp_path / "set" / image_place.format(name) / f"{name}.png")
        for number in range(count):
            place = tmp_path / "set" / mask_place.format(name)
            mask(place / f"{start}{number + 1}.png", 2 * number)
    found = of_masks(tmp_path / "set", capsys)
    assert found == {f"{name}.png": count for name, count in counts.items()}
    assert "one object per file" in recognise(tmp_path / "set").told


def test_names_of_masks_that_begin_like_other_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the images' whole names."""
    for name in ("a", "a_flip", "a_rot"):
        image(tmp_path / "set" / "images" / f"{name}.png")
        mask(tmp_path / "set" / "masks" / f"{name}.png.png", 2)
    found = of_masks(tmp_path / "set", capsys)
    assert found == {"a.png": 1, "a_flip.png": 1, "a_rot.png": 1}


def test_folders_that_are_not_understood(tmp_path: Path) -> None:
    def line(folder: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            recognise(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert line(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such folder"
    assert line(tmp_path).endswith("and folders of masks; found no file")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").touch()
    assert "is the folder of a run" in line(tmp_path / "run")
    image(tmp_path / "a.png")
    image(tmp_path / "b.png")
    (tmp_path / "notes.txt").touch()
    assert line(tmp_path).endswith("; found 2 .png, 1 .txt")
    os.mkfifo(tmp_path / "waits.json")
    assert line(tmp_path).endswith("waits.json: not a file, but a pipe, socket or device")
    (tmp_path / "waits.json").unlink()
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.jpg").touch()
    assert f"{tmp_path}: masks/a.jpg is in a format that changes values, no mask" in line(tmp_path)
    (tmp_path / "masks" / "a.jpg").unlink()
    mask(tmp_path / "masks" / "a_7.png", 0)
    mask(tmp_path / "masks" / "c_7_label.png", 0)
    mask(tmp_path / "masks" / "d.png", 0)
    ways = cli.command("convert", "masks", "--help")
    assert line(tmp_path).startswith(
        f"{tmp_path}: masks/a_7.png: a mask, but no image has its name ({ways} says how masks"
    )
    shutil.rmtree(tmp_path / "masks")
    mask(tmp_path / "a_masks.png", 0)
    assert line(tmp_path).startswith(
        f"{tmp_path}: a_masks.png beside images: put masks into a folder of their own, named masks;"
    )
    (tmp_path / "a_masks.png").unlink()
    keys = ("project", "config", "attribute", "file", "metadata", "view")
    (tmp_path / "my.json").write_text(json.dumps({key: {} for key in keys}))
    assert line(tmp_path).startswith(
        f"{tmp_path}: my.json: VIA 3's: not read (VIA 1 and 2 are); looked for COCO's JSON"
    )
    (tmp_path / "data.yaml").write_text("train: nowhere\nnames: [a]\n")
    assert line(tmp_path) == f"{tmp_path / 'data.yaml'}: train: no 'nowhere' in {tmp_path}"
    coco(tmp_path / "x.json", "no.png", "such.png")
    assert line(tmp_path) == (
        f"{tmp_path / 'x.json'}: none of its images is in {tmp_path}: no.png, such.png"
    )
    coco(tmp_path / "x_train.json", "a.png")
    coco(tmp_path / "y_train.json", "a.png")
    assert "x_train.json, y_train.json" in line(tmp_path)
