"""The check as a command: its summary, its sheet, its exit status."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tiny
from exports import PICTURES, as_labelme
from PIL import Image

from mrcnn_jax import cli
from mrcnn_jax.commands import check
from mrcnn_jax.commands.check import Arguments
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data import images
from mrcnn_jax.figures import draw

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(mixed_file: Path) -> Arguments:
    return Arguments(
        annotations=mixed_file,
        images=mixed_file.parent / "images",
        cache=mixed_file.parent / "cache",
    )


@pytest.fixture
def my(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the data set of tests/tiny.py."""
    return shutil.copytree(tiny_data, tmp_path / "my")


@contextmanager
def changed(file: Path) -> Iterator[dict[str, Any]]:
    """The content of a JSON file, which is written again after the block."""
    content = json.loads(file.read_text())
    yield content
    file.write_text(json.dumps(content))


def config_file(folder: Path, config: str) -> Path:
    """Of a config that is written as an expression."""
    path = folder / "config.py"
    path.write_text(
        "from mrcnn_jax.config.model import *\nfrom mrcnn_jax.config.schema import *\n"
        f"def get_config():\n    return {config}\n"
    )
    return path


def as_json(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    check.run(dataclasses.replace(arguments, as_json=True))
    return json.loads(capsys.readouterr().out)


def test_what_a_recipe_needs(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    """With the default config, by which an image of 60 x 80 becomes 800 x 1066."""
    found = as_json(arguments, capsys)
    assert found["usable"]
    assert found["objects_by_class"] == {"three": 2, "seven": 2, "ninety": 2}
    assert found["images_by_size"] == {
        "60 x 80": 3,
        "80 x 60": 1,
        "64 x 64": 1,
        "50 x 96": 1,
        "96 x 50": 1,
    }
    assert found["images_by_canvas"] == {"800 x 1088": 5, "1088 x 800": 2}
    assert (found["max_objects_per_image"], found["caps"]) == (2, [])
    assert (found["images_without_objects"], found["objects_without_mask"]) == (2, 1)
    # Boxes of 30 x 20, 12.5 x 20.25, 30 x 80, 30 x 40 (twice) and 80 x 40 px, on images magnified
    # 13.3, 13.3, 13.3, 12.5, 11.3, 11.3 times.
    assert found["objects_by_canvas_side"] == {
        **dict.fromkeys(("under 8", "8 to 16", "16 to 32", "32 to 64", "64 to 128"), 0),
        "128 to 256": 1,
        "256 to 512": 3,
        "from 512": 2,
    }
    assert found["small_objects_share"] == pytest.approx(2 / 6)  # areas of 550 and 253.1
    assert found["small_objects_share_on_canvas"] == 0
    assert found["kept"]["images"] == 7
    assert {finding["code"] for finding in found["findings"]} == {"category_ids", "run_list"}


def test_the_config_decides(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = "short_side=32, long_side=64, canvases=((64, 64),), max_objects=1, keep_empty=False"
    config = config_file(tmp_path, f"Config(data=DataConfig({data}))")
    found = as_json(dataclasses.replace(arguments, config=config), capsys)
    assert found["images_by_canvas"] == {"64 x 64": 5}
    (cap,) = found["caps"]
    assert (cap["field"], cap["images"], cap["most"]) == ("data.max_objects", 1, 2)
    assert found["objects_by_canvas_side"]["from 512"] == 0
    assert found["small_objects_share"] == pytest.approx(2 / 6)
    assert found["small_objects_share_on_canvas"] == 1
    assert {(f["outcome"], f["count"]) for f in found["findings"] if f["code"] == "negative"} == {
        ("left out", 2)
    }


def test_classes_of_one_name_are_counted_apart(
    arguments: Arguments, capsys: pytest.CaptureFixture[str]
) -> None:
    with changed(arguments.annotations) as content:
        for category in content["categories"]:
            category["name"] = "seven" if category["name"] == "three" else category["name"]
    ids = [c["id"] for c in content["categories"] if c["name"] == "seven"]
    found = as_json(arguments, capsys)["objects_by_class"]
    assert found == {f"seven ({number})": 2 for number in ids} | {"ninety": 2}


def test_lines_for_people(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    check.run(arguments)
    text = capsys.readouterr().out
    assert text.startswith(
        "kept 7 images, 6 objects, 1 crowds, 1 objects without a mask (box only)\n"
    )
    assert (
        "repaired 3: categories whose ids are not 1, 2, 3, ...: labels follow their order "
        "(90, 3, 7)" in text
    )
    assert "three: 2, seven: 2, ninety: 2" in text
    assert "small objects (area under 32 x 32 px): 33.3% in the images, 0.0% on the canvas" in text
    assert "most objects in an image: 2\n" in text


def test_every_limit_that_images_exceed(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "ModelConfig(box_head=BoxHeadConfig(detections=1))"
    config = config_file(tmp_path, f"Config(data=DataConfig(max_objects=1), model={model})")
    check.run(arguments)
    assert "set it to" not in capsys.readouterr().out
    check.run(dataclasses.replace(arguments, config=config))
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "data.max_objects = 1: images with more objects: 1 (up to 2 in one): the smallest are not "
        "trained on; set it to 2 or more (11)",
        "model.box_head.detections = 1: images with more objects: 1 (up to 2 in one): no more can "
        "be found; set it to 2 or more (11)",
    ]
    found = as_json(dataclasses.replace(arguments, config=config), capsys)
    assert [(cap["field"], cap["most"]) for cap in found["caps"]] == [
        ("data.max_objects", 2),
        ("model.box_head.detections", 2),
    ]


def test_nothing_to_train_on_is_not_usable(
    arguments: Arguments,
    mixed_content: dict[str, Any],
    write_json: Callable[[Any], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for annotation in mixed_content["annotations"]:
        annotation["iscrowd"] = 1
    write_json(mixed_content)
    with pytest.raises(
        ConfigError, match="no object to train on: all its 7 annotations have iscro"
    ):
        check.run(arguments)
    assert "noticed 7: annotations with iscrowd 1" in capsys.readouterr().out


def test_copies_of_images_are_noticed(
    arguments: Arguments,
    mixed_content: dict[str, Any],
    write_json: Callable[[Any], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Photos 0, 5 and 6 have one size: 5 is made a copy of 0, and 6 lists 0 once more."""
    (arguments.images / "photo 5.png").write_bytes((arguments.images / "photo 0.png").read_bytes())
    mixed_content["images"][0]["file_name"] = "photo 0.png"
    write_json(mixed_content)
    check.run(arguments)
    assert "noticed 2: images whose file is that of an image before" in capsys.readouterr().out


def test_lost_images_are_shown_and_refused(
    arguments: Arguments, capsys: pytest.CaptureFixture[str]
) -> None:
    (arguments.images / "photo 6.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="1 of 7 images are lost"):
        check.run(arguments)
    assert "dropped 1: images that cannot be decoded (17)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="1 of 7 images are lost"):
        check.run(dataclasses.replace(arguments, as_json=True))
    found = json.loads(capsys.readouterr().out)
    assert not found["usable"]
    assert "1 of 7 images are lost" in found["error"]
    assert found["kept"]["images"] == 6


def test_strict_allows_no_loss_but_what_the_config_leaves_out(
    arguments: Arguments,
    mixed_content: dict[str, Any],
    write_json: Callable[[Any], Path],
    tmp_path: Path,
) -> None:
    config = config_file(tmp_path, "Config(data=DataConfig(keep_empty=False, max_objects=1))")
    strict = dataclasses.replace(arguments, strict=True, config=config)
    check.run(strict)
    mixed_content["annotations"][1]["bbox"] = [0, 0, 0, 0]
    write_json(mixed_content)
    check.run(dataclasses.replace(strict, strict=False))
    with pytest.raises(ConfigError, match="--strict: dropped 1 annotations with a degenerate box"):
        check.run(strict)


def test_images_are_decoded_once(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the check, and no more by a training that uses its cache; without --cache it goes to the
    user's folder."""
    from mrcnn_jax.config.schema import DataConfig
    from mrcnn_jax.data.loader import open_split
    from mrcnn_jax.data.reading import read_coco

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded")

    check.run(arguments)
    with monkeypatch.context() as patch:
        patch.setattr(images, "image_kind", refuse)
        check.run(arguments)
        assert arguments.cache is not None
        dataset = read_coco(arguments.annotations, arguments.images, DataConfig())
        split = open_split("train", dataset, cache=arguments.cache, data=DataConfig())
        assert len(split.source) == 7
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    check.run(dataclasses.replace(arguments, cache=None))
    assert len(list((tmp_path / "home" / "mrcnn_jax").iterdir())) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "~/home")
    assert cli.cache_folder() == tmp_path / "home" / "mrcnn_jax"

    def nobody() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nobody)
    check.run(arguments)  # which names a cache
    with pytest.raises(ConfigError, match=r"^XDG_CACHE_HOME: name a folder for what is .*: no h"):
        check.run(dataclasses.replace(arguments, cache=None))


def test_contact_sheet(
    arguments: Arguments, mixed_content: dict[str, Any], write_json: Callable[[Any], Path]
) -> None:
    """A dark image shows its box and mask in colour; one of a single row is drawn like any
    other."""
    Image.new("RGB", (80, 60)).save(arguments.images / "photo 0.png")
    Image.new("RGB", (5000, 1)).save(arguments.images / "photo 1.png")
    mixed_content["images"][-2] |= {"height": 1, "width": 5000}
    mixed_content["annotations"][2] |= {"bbox": [100, 0, 300, 1], "segmentation": None}
    write_json(mixed_content)
    sheet = arguments.annotations.parent / "sheet.png"
    check.run(dataclasses.replace(arguments, contact_sheet=sheet))
    drawn = cv2.imread(str(sheet))[..., ::-1].astype(int)
    assert drawn.shape[0] < 500
    assert drawn.shape[1] > 1500  # six images in a row
    first = drawn[30:300, 6:326]
    tinted = (first.max(-1) - first.min(-1) > 30).mean()
    # The mask is 550 of 4,800 pixels, and the box and label of each object come to it.
    assert 0.1 < tinted < 0.3
    with pytest.raises(OSError, match=r"No such file or directory: '/none/sheet.png'"):
        check.run(dataclasses.replace(arguments, contact_sheet=Path("/none/sheet.png")))


def test_a_contact_sheet_shows_and_counts_objects(
    arguments: Arguments,
    mixed_content: dict[str, Any],
    write_json: Callable[[Any], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Crowds are none of them: image 16 has only one, image 11 gets another."""
    crowd = next(a for a in mixed_content["annotations"] if a["iscrowd"])
    mixed_content["annotations"].append(crowd | {"id": 99, "image_id": 11})
    write_json(mixed_content)
    titles: list[str] = []
    titled = draw.titled

    def noted(image: np.ndarray, title: str) -> np.ndarray:
        titles.append(title)
        return titled(image, title)

    monkeypatch.setattr(draw, "titled", noted)
    sheet = arguments.annotations.parent / "sheet.png"
    check.run(dataclasses.replace(arguments, contact_sheet=sheet))
    counts = {11: 2, 12: 1, 13: 1, 14: 1, 15: 1}
    assert titles == [f"image {number}: {count}" for number, count in counts.items()]


def _command(arguments: Arguments, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mrcnn_jax", "check", *more]
    for name in ("annotations", "images", "cache"):
        command += [f"--{name}", str(getattr(arguments, name))]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_exit_status(arguments: Arguments) -> None:
    done = _command(arguments, "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["usable"]
    arguments.annotations.write_text("{")
    start = time.perf_counter()
    done = _command(arguments)
    assert time.perf_counter() - start < 5
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert str(arguments.annotations) in done.stderr


def test_depth_maps_are_checked_too(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that the file names, those of --depth, and those of the config whose file it is."""
    content = json.loads(arguments.annotations.read_text())
    for image in content["images"]:
        depth = np.full((image["height"], image["width"]), 5000, np.uint16)
        depth[: len(depth) // 2] = 0
        path = tmp_path / "maps" / image["file_name"]
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), depth)
    assert as_json(arguments, capsys)["depth"] is None

    by_option = dataclasses.replace(arguments, depth=tmp_path / "maps")
    found = as_json(by_option, capsys)["depth"]
    assert found == {
        "maps": 7,
        "known_share": 0.5,
        "metres": [5, 5],
        "quantiles": {"1%": 5, "50%": 5, "99%": 5},
    }
    check.run(dataclasses.replace(by_option, depth_scale=8000))
    assert (
        "\ndepth: 7 of 7 images; 50.0% of their pixels known, 0.625 to 0.625 m (quantiles 1% "
        "0.625, 50% 0.625, 99% 0.625)\n"
    ) in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"data\.depth_scale 1 gives a median depth of 5e\+03 m"):
        check.run(dataclasses.replace(by_option, depth_scale=1))

    data = f"root={str(tmp_path)!r}, val_depth='maps', depth_scale=2500"
    data += ", val_annotations='instances.json'"
    config = config_file(tmp_path, f"Config(data=DataConfig({data}))")
    by_config = dataclasses.replace(arguments, config=config)
    assert as_json(by_config, capsys)["depth"]["metres"] == [2, 2]

    for image in content["images"][1:]:
        image["depth_file"] = f"../maps/{image['file_name']}"
    content["images"][1]["depth_file"] = "../maps/none.png"
    arguments.annotations.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="1 of 6 depth maps are lost"):
        check.run(arguments)
    text = capsys.readouterr().out
    assert "\ndepth: 5 of 7 images; 50.0% of their pixels known, 5 to 5 m (" in text
    assert (
        "\ndropped 1: images whose depth map is missing: their depth counts as unknown (16" in text
    )
    content["images"][1]["depth_file"] = None
    arguments.annotations.write_text(json.dumps(content))
    check.run(dataclasses.replace(arguments, strict=True))


# -- a folder --------------------------------------------------------------------------------------


def test_a_folder_is_checked_file_by_file(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check.run(Arguments(folder=tiny_data, cache=tmp_path))
    text = capsys.readouterr().out
    assert text.startswith(f"{tiny_data}: COCO's format: annotations/instances_train.json")
    for split in ("train", "val"):
        assert f"\n{tiny_data}/annotations/instances_{split}.json:\nkept " in text
    assert text.count(f"`train {tiny_data}` chooses its own, and limits, by these counts\n") == 2
    check.run(Arguments(folder=tiny_data, cache=tmp_path, as_json=True))
    out, err = capsys.readouterr()
    assert [json.loads(line)["usable"] for line in out.splitlines()] == [True, True]
    assert err.startswith(f"{tiny_data}: ")
    check.run(Arguments(folder=tiny_data, cache=tmp_path, contact_sheet=tmp_path / "sheet.png"))
    sheets = [tmp_path / name for name in ("sheet.png", "sheet_val.png")]
    assert sheets[0].read_bytes() != sheets[1].read_bytes()


def test_validation_may_have_the_classes_of_a_config_under_other_ids(
    my: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As training takes it; the config of a run names the classes in training's order."""
    names = [c["name"] for c in tiny.read(my, "train")["categories"]]
    with changed(tiny.annotations(my, "val")) as content:
        for category in content["categories"]:
            category["id"] = 99 - category["id"]
        for annotation in content["annotations"]:
            annotation["category_id"] = 99 - annotation["category_id"]
    config = config_file(tmp_path, f"Config(data=DataConfig(class_names={tuple(names)}))")
    check.run(Arguments(folder=my, cache=tmp_path, config=config))
    assert capsys.readouterr().out.count("\nkept ") == 2


def test_limits_of_a_folder_are_those_that_are_asked_for(
    my: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`train my/` chooses its own; a config has its own."""
    with changed(tiny.annotations(my, "train")) as content:
        (first, *_) = (a for a in content["annotations"] if not a["iscrowd"])
        number = max(a["id"] for a in content["annotations"]) + 1
        content["annotations"] += [
            first | {"id": number + i, "bbox": [i % 10, i // 10, 20, 20], "segmentation": []}
            for i in range(101)
        ]
    check.run(Arguments(folder=my, cache=tmp_path))
    told = capsys.readouterr().out
    assert "most objects in an image: 10" in told
    assert "set it to" not in told
    check.run(Arguments(folder=my, cache=tmp_path, config=Path("shapes")))
    told = capsys.readouterr().out
    assert "data.max_objects = 12: images with more objects: " in told
    assert "chooses its own" not in told


def test_classes_of_validation_are_those_of_training(my: Path, tmp_path: Path) -> None:
    file = tiny.annotations(my, "val")
    with changed(file) as content:
        content["categories"][0]["name"] = "elephant"
    with pytest.raises(ConfigError, match=r"instances_val.json: categories that .* 'elephant'"):
        check.run(Arguments(folder=my, cache=tmp_path))
    with changed(file) as content:
        lost = content["categories"].pop(0)["id"]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != lost]
    with pytest.raises(ConfigError, match=r"instances_val.json: 'categories' lacks 'disc' of"):
        check.run(Arguments(folder=my, cache=tmp_path))


def test_images_of_both_files_are_told(
    my: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = (tiny.read(my, split)["images"][0] for split in ("train", "val"))
    shutil.copy(my / "images" / train["file_name"], my / "images" / val["file_name"])
    check.run(Arguments(folder=my, cache=tmp_path))
    line = f"noticed 1: images that are in {my}/annotations/instances_train.json, too"
    assert line in capsys.readouterr().out


def test_a_check_that_did_not_end_says_nothing_good(
    arguments: Arguments, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "check_split", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check.run(dataclasses.replace(arguments, as_json=True))
    assert json.loads(capsys.readouterr().out) == {"usable": False}


def test_an_export_is_converted_to_be_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    as_labelme(tmp_path / "photos", PICTURES)
    before = sorted(tmp_path.rglob("*"))
    check.run(Arguments(folder=tmp_path / "photos", cache=tmp_path.parent / "cache"))
    assert sorted(tmp_path.rglob("*")) == before
    text = capsys.readouterr().out
    assert "photos: labelme: 3 JSON files\nkept 3 images" in text
    assert "objects per class: " in text


@pytest.mark.parametrize(
    "options", [{}, {"annotations": Path("a")}, {"folder": Path("a"), "annotations": Path("b")}]
)
def test_what_is_checked_is_said_once(options: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"^check needs a folder, or --annotations and --images$"):
        check.run(Arguments(**options))
