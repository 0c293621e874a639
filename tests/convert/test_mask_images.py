"""Folders of instance masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import cv2
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
from mrcnn_jax.convert import mask_images
from mrcnn_jax.convert.common import Options, blended
from mrcnn_jax.convert.mask_images import Masks
from mrcnn_jax.convert.write import convert


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


LABELS = np.zeros((HEIGHT, WIDTH), np.uint8)
for number, (x, y) in enumerate([(8, 9), (24, 12), (40, 9), (12, 30), (30, 28), (44, 31)], 1):
    cv2.circle(LABELS, (x, y), 6, number, -1)
MASK = np.where(LABELS > 0, 255, 0).astype(np.uint8)


@pytest.mark.parametrize("labels", [MASK, LABELS], ids=["0 and 255", "6 labels"])
@pytest.mark.parametrize("method", [cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA])
@pytest.mark.parametrize("scale", [0.4, 0.7, 1.5])
def test_masks_with_edges_of_a_resizing_are_refused(
    labels: np.ndarray, method: int, scale: float
) -> None:
    """With nearest neighbour they stay what they are."""
    resized = cv2.resize(labels, None, fx=scale, fy=scale, interpolation=method)
    assert blended(resized.astype(np.int64))
    resized = cv2.resize(labels, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    assert not blended(resized.astype(np.int64))


@pytest.mark.parametrize("quality", [40, 75, 95])
def test_masks_that_were_a_jpeg_are_refused(quality: int) -> None:
    encoded = cv2.imencode(".jpg", MASK, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    assert blended(cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE).astype(np.int64))


def test_labels_that_touch_are_right() -> None:
    """Cells of 16 pixels without a gap, dots of a pixel, lines, labels inside one another."""
    cells = np.kron(np.arange(1, 101).reshape(10, 10), np.ones((4, 4), np.int64))
    dots = np.zeros((40, 40), np.int64)
    dots[1::3, 1::3] = np.arange(169).reshape(13, 13)
    lines = np.zeros((40, 40), np.int64)
    lines[:, 1::4], lines[10:30, 20] = np.arange(10), 77
    nested = np.zeros((40, 40), np.int64)
    for number in range(6):
        nested[3 * number : 40 - 3 * number, 3 * number : 40 - 3 * number] = number
    shuffled = np.random.default_rng(0).permutation(200) + 1
    for values in (cells, shuffled[cells], dots, lines, nested, LABELS.astype(np.int64)):
        assert not blended(values)


def test_grey_edges_and_files_that_change_values_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write = break_masks(cv2.resize(MASK[::2, ::2], (WIDTH, HEIGHT)))
    refuses(write(tmp_path / "1"), r"a.png: many values lie between those around them", tmp_path)
    options = break_masks(TWO)(tmp_path / "2")
    picture(tmp_path / "2" / "images" / "b.png")
    (tmp_path / "2" / "masks" / "b.jpg").write_bytes(b"")
    convert(options)
    assert len(objects(checked(options, tmp_path / "cache"), "a.png")) == 2
    assert (
        "left out 1: files of masks in a format that changes values (JPEG, WebP) (b.jpg)"
        in capsys.readouterr().out
    )


def test_blends_are_refused_before_their_values_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interpolated mask in colours has tens of thousands of them."""
    colours = np.stack([MASK, np.rot90(MASK, 2), MASK // 2], axis=-1)

    def never(_: object) -> object:
        raise AssertionError("values were looked at")

    monkeypatch.setattr(mask_images, "instances", never)
    write = break_masks(cv2.resize(colours[::2, ::2], (WIDTH, HEIGHT)))
    refuses(write(tmp_path), r"a.png: many values lie between those around them", tmp_path)


THREE = block(0, 0, 20, 20) | block(20, 20, 29, 25) | block(30, 0, 50, 10) | block(40, 30, 41, 31)


def found_in(options: Masks, out: Path) -> list[np.ndarray]:
    """The masks of the objects in a.png, largest first."""
    options = dataclasses.replace(options, out=out / "out.json")
    convert(options)
    masks = [mask for _, mask in objects(checked(options, out / "cache"), "a.png")]
    return sorted(masks, key=np.sum, reverse=True)


def test_values_of_several_objects_are_taken_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A corner joins two blocks, and a pixel is a speck; unless one object per value is asked for.

    Whether there are several is decided by most values: not by one instance that is in two parts.
    """
    options = break_masks(THREE.astype(np.uint8) * 255)(tmp_path)
    assert isinstance(options, Masks)
    joined, single = block(0, 0, 20, 20) | block(20, 20, 29, 25), block(30, 0, 50, 10)
    for parts in ("auto", "connected"):
        its = found_in(dataclasses.replace(options, parts=parts), tmp_path)
        assert [mask.tolist() for mask in its] == [joined.tolist(), single.tolist()]
        told = capsys.readouterr().out
        assert (
            "noticed 1: values of masks with several parts that do not touch: each part is an "
            "object (--parts value makes one of each value) (a.png value 255)"
        ) in told
        assert "left out 1: parts of masks under 4 pixels and 1 % of the largest part" in told
    (mask,) = found_in(dataclasses.replace(options, parts="value"), tmp_path)
    assert (mask == THREE).all()
    assert "parts" not in capsys.readouterr().out
    instances = THREE + 2 * block(0, 30, 10, 40) + np.uint8(3) * block(20, 30, 30, 40)
    (tmp_path / "masks" / "a.png").write_bytes(png(instances.astype(np.uint8)))
    assert len(found_in(options, tmp_path)) == 3
    assert "parts" not in capsys.readouterr().out
    assert len(found_in(dataclasses.replace(options, parts="connected"), tmp_path)) == 4


def test_masks_of_one_value_that_stays_one_object_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = break_masks(THREE.astype(np.uint8))(tmp_path)
    assert isinstance(options, Masks)
    for name in "bcd":
        picture(tmp_path / "images" / f"{name}.png")
        mask = block(3, 3, 9, 9).astype(np.uint8)
        (tmp_path / "masks" / f"{name}.png").write_bytes(png(mask))
    assert len(found_in(options, tmp_path)) == 1
    assert (
        "noticed 1: masks of one value with several parts that do not touch: one object, as most "
        "here have one part (--parts connected makes one of each part) (a.png value 1)"
    ) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            break_masks(TWO, layout="name", parts="value"),
            r"^--parts: value: goes with --layout image, not name$",
        ),
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
