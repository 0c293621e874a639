"""Images are found by the names that annotation files give them, as people and tools write them."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from findings import Read, found

from mrcnn_jax.data.report import Reason


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
    read_mixed: Read, tmp_path: Path, mixed_content: dict[str, Any], name: Any
) -> None:
    (tmp_path / "outside.png").write_bytes(b"")
    mixed_content["images"][-1]["file_name"] = name
    dataset = read_mixed(mixed_content, lost_images=True)
    assert found(dataset)[Reason.NAME] == (1, [11])


@pytest.mark.parametrize(
    ("on_disk", "written"),
    [
        ("a.png", "C:\\Users\\me\\data\\a.png"),
        ("a.png", "/home/me/data/a.png"),
        ("a.png", "\\\\server\\share\\a.png"),
        ("a.png", "data\\images\\a.png"),
        ("a.png", "..\\images\\a.png"),
        ("sub/é.png", "D:/data/sub/" + unicodedata.normalize("NFD", "é.png")),
        ("sub/a.png", "/home/me/elsewhere/a.png"),
        ("b/a.png", "/home/me/b/a.png"),  # though there is another a.png
    ],
)
def test_paths_of_another_machine_are_found_by_their_end(
    read_mixed: Read, tmp_path: Path, mixed_content: dict[str, Any], on_disk: str, written: str
) -> None:
    path = tmp_path / "images" / on_disk
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "images" / "photo 0.png").rename(path)
    if on_disk == "b/a.png":
        (tmp_path / "images" / "a.png").write_bytes(b"")
    mixed_content["images"][-1]["file_name"] = written
    dataset = read_mixed(mixed_content)
    assert dataset.images[0].file_name == on_disk
    assert found(dataset) == {Reason.FOUND_BY_NAME: (1, [11])}


def test_a_name_that_fits_two_files_or_images_is_none(
    read_mixed: Read, tmp_path: Path, mixed_content: dict[str, Any]
) -> None:
    """D:\\other\\a.png with two a.png; C:\\x\\p.png and C:\\y\\p.png with one p.png; and a relative
    name is nowhere else than it says."""
    for name in ("a/a.png", "b/a.png", "sub/p.png", "sub/q.png"):
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"")
    names = ("D:\\other\\a.png", "C:\\x\\p.png", "C:\\y\\p.png", "other/q.png")
    for image, name in zip(mixed_content["images"], names, strict=False):
        image["file_name"] = name
    dataset = read_mixed(mixed_content, lost_images=True)
    told = found(dataset)
    assert told[Reason.AMBIGUOUS] == (3, [17, 16, 15])
    assert told[Reason.MISSING] == (1, [14])
    assert len(dataset.lost) == 4


def test_names_are_looked_for_where_a_folder_is_recognised(
    read_mixed: Read,
    tmp_path: Path,
    mixed_content: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In links to folders, and not in hidden ones, such as of small copies, or where nobody may
    look."""
    folder = tmp_path / "my"
    (tmp_path / "images").rename(tmp_path / "batch")
    folder.mkdir()
    (folder / "batch1").symlink_to(tmp_path / "batch")
    (folder / ".thumbs").mkdir()
    scan = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("recycle"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    (folder / "recycle").mkdir()
    monkeypatch.setattr(os, "scandir", refusing)
    for image in mixed_content["images"]:
        (folder / ".thumbs" / image["file_name"]).write_bytes(b"")
    dataset = read_mixed(mixed_content, folder)
    assert len(dataset.images) == 7
    assert {image.file_name[:7] for image in dataset.images} == {"batch1/"}


def test_names_without_a_folder_in_subfolders(
    read_mixed: Read, tmp_path: Path, mixed_content: dict[str, Any]
) -> None:
    """In which "photo 5.png" is twice. Nothing is looked up so if one lies where its name says."""
    folder = tmp_path / "images"
    for number, image in enumerate(mixed_content["images"]):
        place = folder / "ab"[number % 2] / image["file_name"]
        place.parent.mkdir(exist_ok=True)
        (folder / image["file_name"]).rename(place)
    (folder / "c").mkdir()
    (folder / "c" / "photo 5.png").write_bytes(b"")
    dataset = read_mixed(mixed_content, lost_images=True)
    told = found(dataset)
    assert told[Reason.IN_SUBFOLDER][0] == len(dataset.images) == 6
    assert told[Reason.AMBIGUOUS] == (1, [16])
    assert {image.file_name[:2] for image in dataset.images} == {"a/", "b/"}
    (folder / "photo 5.png").write_bytes(b"")
    dataset = read_mixed(mixed_content, lost_images=True)
    assert [image.id for image in dataset.images] == [16]
    assert found(dataset)[Reason.MISSING][0] == 6


def test_an_image_listed_twice_by_a_path_of_another_machine_is_found(
    read_mixed: Read, mixed_content: dict[str, Any]
) -> None:
    *_, other, photo = mixed_content["images"]
    other |= {side: photo[side] for side in ("height", "width")}
    other["file_name"] = photo["file_name"] = "C:\\me\\photo 0.png"
    dataset = read_mixed(mixed_content)
    told = found(dataset)
    assert told[Reason.FOUND_BY_NAME][0] == 2
    assert Reason.AMBIGUOUS not in told
    assert told[Reason.SAME_FILE][0] >= 1


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
    read_mixed: Read, tmp_path: Path, mixed_content: dict[str, Any], on_disk: str, written: str
) -> None:
    path = tmp_path / "images" / on_disk
    (tmp_path / "images" / "sub").mkdir()
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "images" / "photo 0.png").rename(path)
    mixed_content["images"][-1]["file_name"] = written
    dataset = read_mixed(mixed_content)
    assert (tmp_path / "images" / dataset.images[0].file_name).read_bytes() == path.read_bytes()
    assert (Reason.FILE_NAME in found(dataset)) == (dataset.images[0].file_name != written)
    assert dataset.lost == ()
