"""What names say, by hand."""

from __future__ import annotations

import pytest

from mrcnn_jax.data.names import image_roles, originals, role, tiles, videos
from mrcnn_jax.pixels.windows import windows


def test_the_role_of_an_annotation_file() -> None:
    """By its name, else by the nearest folder."""
    roles = {
        "instances_train2017.json": "train",
        "train/valid.json": "val",
        "test/train/a.json": "train",
        "Testing/a.train.json": "test",
        "trainer/a.json": None,
    }
    assert {file: role(file) for file in roles} == roles


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (["train/a.png", "Valid/b.png", "test_2/x/c.png"], ["train", "val", "test"]),
        (["a/train/a.png", "a/val/a.png", "b/test/c.png"], ["train", "val", "test"]),
        (["val/train/a.png", "val/bus/a.png", "train/train/a.png"], ["val", "val", "train"]),
        (["all/train/train/a.png", "all/train/val/a.png"], ["train", "val"]),
        (["train/a.png", "train/b.png"], [None, None]),  # nothing that tells them apart
        (["train/a.png", "b.png", "train_test/val_1.png"], ["train", None, None]),
        (["train_val/a.png", "test/a.png"], ["train", "test"]),
    ],
)
def test_the_roles_of_images(names: list[str], roles: list[str | None]) -> None:
    """By the outermost folder below the common one."""
    assert image_roles(names) == roles


@pytest.mark.parametrize("size", [(1, 1), (1025, 1024), (3000, 2100), (200_000, 900)])
@pytest.mark.parametrize("folder", ["slides/a", "a", ""])
def test_tiles_are_known(size: tuple[int, int], folder: str) -> None:
    """Of any image, also where those without objects were left out; beside other images."""
    places = windows(size, 1024, 128)
    names = [f"{folder}/{y:05d}_{x:05d}.png".lstrip("/") for y, x, *_ in places]
    for kept in (names, names[::3]):
        assert tiles([*kept, "b/1.png"]) == set(range(len(kept)))
        assert originals([*kept, "b/1.png"]) == [folder] * len(kept) + ["b/1"]


@pytest.mark.parametrize(
    "names",
    [
        ["20240131_123456.jpg", "20240131_123512.jpg"],  # of a phone
        ["00000_00001.png", "00000_00002.png", "00001_00001.png", "00000_00003.png"],  # frames
        ["240131_101112.jpg", "240131_115103.jpg", "240201_140507.jpg", "240202_153000.jpg"],
        ["00000_00896.png", "00000_01792.png", "other.png"],
        [f"240131_{time}.jpg" for time in (101000, 101500, 102000, 103000)],  # on a grid, too
    ],
)
def test_other_names_with_numbers_are_no_tiles(names: list[str]) -> None:
    assert tiles(names) == set()


def test_frames_of_videos() -> None:
    assert videos(["x/a_0001", "x/a_2", "y/a1", "y/0001", "b"]) == ["x/a", "x/a", "y/a", "y/", "b"]


def uploaded(*names: str) -> list[str]:
    """As Label Studio names its uploads."""
    return [f"{0xA0000000 + number:08x}-{name}" for number, name in enumerate(names)]


def test_frames_that_were_uploaded() -> None:
    """But dates, which are eight digits too, stay."""
    assert videos(["x/3f2c1a9b-clip1_0001", "x/12345678-clip1_0002"]) == ["x/clip1"] * 2
    assert videos([*uploaded("a_1", "a_2", "b_1", "b_3"), "c_1"]) == [*"aabbc"]
    twice = [f"clip_{number:04}" for number in range(9)] * 2
    assert videos(uploaded(*twice)) == ["clip"] * 18  # also if others have equal names
    dates = ["20240131-0001", "20240201-0001"]
    assert videos(dates) == ["20240131", "20240201"]


@pytest.mark.parametrize("names", [["image1"], ["image"], ["image1", "image2"]])
def test_uploads_of_equal_names_are_no_video(names: list[str]) -> None:
    """They were one group, and could not be divided."""
    named = uploaded(*names * 10)
    assert len({*videos(named)}) == len(named)
    assert originals([f"{name}.jpg" for name in named]) == named
