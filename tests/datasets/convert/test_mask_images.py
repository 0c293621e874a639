"""Folders of instance masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from exports import (
    HEIGHT,
    PICTURES,
    RING,
    TWO,
    WIDTH,
    as_names,
    block,
    break_masks,
    checked,
    objects,
    picture,
    png,
    refuses,
)

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.datasets.convert.common import (
    Options,
)
from mrcnn_jax.datasets.convert.mask_images import Masks
from mrcnn_jax.datasets.convert.write import convert


def test_masks_beside_their_images(tmp_path: Path) -> None:
    """x/images/x.png with x/masks/1.png; and one class for all."""
    for name, drawn in PICTURES.items():
        stem = Path(name).stem
        picture(tmp_path / stem / "images" / name)
        (tmp_path / stem / "masks").mkdir()
        for number, (_, mask) in enumerate(drawn):
            (tmp_path / stem / "masks" / f"{number}.png").write_bytes(
                png(mask.astype(np.uint8) * 255)
            )
    options = Masks(
        tmp_path,
        tmp_path / "out.json",
        images=tmp_path,
        layout="folder",
        class_name="nucleus",
        keep_unannotated=True,
    )
    with pytest.raises(ConfigError, match=r"a/masks/0.png: value 255: unknown class"):
        convert(dataclasses.replace(options, class_name=None))
    convert(options)
    dataset = checked(options, tmp_path / "cache")
    assert dataset.class_names == ("nucleus",)
    for name, drawn in PICTURES.items():
        found = [mask for _, mask in objects(dataset, f"{Path(name).stem}/images/{name}")]
        assert len(found) == len(drawn)
        assert all(
            (mask == expected).all() for mask, (_, expected) in zip(found, drawn, strict=True)
        )


def test_masks_in_colours_by_value_and_by_class_folder(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "x.jpg")
    for name, mask, colour in (
        ("cat", RING, (255, 0, 0)),
        ("dog", block(40, 0, 50, 9), (0, 0, 255)),
    ):
        values = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        values[mask] = colour
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(png(values))
    (tmp_path / "classes.json").write_text('{"#ff0000": "red", "dog/x": "blue"}')
    for classes, names in ((None, ("cat", "dog")), (tmp_path / "classes.json", ("red", "blue"))):
        options = Masks(
            tmp_path, tmp_path / "out.json", images=tmp_path / "images", classes=classes
        )
        (tmp_path / "out.json").unlink(missing_ok=True)
        convert(options)
        found = objects(checked(options, tmp_path / "cache"), "x.jpg")
        assert tuple(label for label, _ in found) == names
        assert (found[0][1] == RING).all()


def test_masks_without_an_image_and_hidden_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = as_names(tmp_path, {"a.png": PICTURES["a.png"]})
    (tmp_path / "masks" / "ядро" / "b_1.png").write_bytes(png(TWO))
    (tmp_path / "masks" / "ядро" / "._a_1.png").write_bytes(b"what macOS puts into archives")
    with pytest.raises(
        ConfigError, match=r"1 of 2 images are lost .*: ядро/b_1 \(images whose file is missing\)"
    ):
        convert(options)
    convert(
        Masks(
            tmp_path / "masks",
            options.out,
            images=tmp_path / "images",
            layout="name",
            allow_missing=True,
        )
    )
    assert len(objects(checked(options, tmp_path / "cache"), "a.png")) == 3
    assert "dropped 1: images whose file is missing (ядро/b_1.png)" in capsys.readouterr().out


def test_more_than_one_image_of_a_name_and_more_than_one_instance(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        picture(tmp_path / "images" / name)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").write_bytes(png(TWO))
    with pytest.raises(ConfigError, match=r"images: both a.jpg and a.png may be the image a$"):
        convert(
            Masks(
                tmp_path / "masks",
                tmp_path / "out.json",
                images=tmp_path / "images",
                class_name="x",
            )
        )
    (tmp_path / "images" / "a.jpg").unlink()
    (tmp_path / "masks" / "a.png").rename(tmp_path / "masks" / "a_1.png")
    with pytest.raises(
        ConfigError,
        match=r"a_1.png: 2 values besides 0, but only one instance per file with --layout name",
    ):
        convert(
            Masks(
                tmp_path / "masks",
                tmp_path / "out.json",
                images=tmp_path / "images",
                class_name="x",
                layout="name",
            )
        )


def test_instances_belong_to_the_image_with_the_longest_name(tmp_path: Path) -> None:
    for name in ("a", "a_1"):
        picture(tmp_path / "images" / f"{name}.jpg")
    (tmp_path / "masks" / "a_1").mkdir(parents=True)
    (tmp_path / "masks" / "a_1" / "a_1_2.png").write_bytes(png(RING))
    options = Masks(
        tmp_path / "masks",
        tmp_path / "out.json",
        images=tmp_path / "images",
        layout="name",
        class_name="x",
    )
    convert(options)
    assert [image.file_name for image in checked(options, tmp_path / "cache").images] == ["a_1.jpg"]
    (tmp_path / "masks" / "a_1" / "a").mkdir()
    (tmp_path / "masks" / "a_1" / "a_1_2.png").rename(tmp_path / "masks" / "a_1" / "a" / "1.png")
    with pytest.raises(
        ConfigError, match=r"masks/a_1/a: both a_1.jpg and a.jpg may be the image of these masks"
    ):
        convert(dataclasses.replace(options, layout="folder"))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (break_masks(None), r"masks: no masks in this folder"),
        (break_masks(TWO, images=None), r"--images: the folder of the images is needed"),
        (
            break_masks(TWO, class_name=None),
            r"masks/a.png: value 1: unknown class \(--class-name, --classes or a folder of that",
        ),
        (
            break_masks(TWO, layout="folder"),
            r"masks/a.png: no image of that name in .*: --layout is folder; it can be",
        ),
        (break_masks(TWO[:9]), r"a.png is 40 x 52, annotated as 9 x 52"),
        (
            break_masks(np.zeros((HEIGHT, WIDTH), np.uint8)),
            r"masks: no object is left, and so no class",
        ),
        (
            break_masks(b"\xff\xd8\xff\xe0"),
            r"masks/a.png: not an image that can hold labels: none of PNG, TIFF, BMP, GIF",
        ),
    ],
)
def test_mistakes_are_refused_in_one_line(
    write: Callable[[Path], Options], message: str, tmp_path: Path
) -> None:
    refuses(write(tmp_path), message, tmp_path)
