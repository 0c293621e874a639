"""Images are found by path, then by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.convert.image_folder import ImageFolder, files_in


def test_names_that_no_file_can_have_are_missing(tmp_path: Path) -> None:
    """Such as a signed address; a file without a suffix is found as it is named."""
    (tmp_path / "IMG1").touch()
    images = ImageFolder(tmp_path)
    assert images.find([f"x.jpg?signature={'a' * 300}", "/IMG1", "../IMG1"]) is None
    assert images.find(["IMG1"]) == "IMG1"
    assert ImageFolder(tmp_path, files=[]).find(["IMG1"]) is None


def test_images_are_found_by_path_then_by_name_and_hidden_files_never(tmp_path: Path) -> None:
    for name in ("a/x.png", "b/x.jpg", "b/y.jpg", ".hidden/z.png", "__MACOSX/z.png", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    images = ImageFolder(tmp_path)
    assert images.files == ["a/x.png", "b/x.jpg", "b/y.jpg"]
    assert images.find(["none.png", "./a\\x.png"]) == "a/x.png"
    assert images.find_elsewhere(["C:/y.jpg"], None) == "b/y.jpg"
    assert images.with_stem("b/x") == "b/x.jpg"
    assert images.with_stem("z") is None
    with pytest.raises(ConfigError, match=r"both a/x.png and b/x.jpg may be the image x"):
        images.with_stem("x")


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.json").touch()
    (tmp_path / "my").mkdir()
    for name in ("one", "two"):
        (tmp_path / "my" / name).symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "my")
    assert files_in(tmp_path / "my", {".json"}) == [tmp_path / "my" / "one" / "a.json"]
    (tmp_path / "my" / "zoo").mkdir()
    (tmp_path / "my" / "zoo" / "b.json").touch()
    (tmp_path / "my" / "animals").symlink_to(tmp_path / "my" / "zoo")  # the folder comes first
    assert tmp_path / "my" / "zoo" / "b.json" in files_in(tmp_path / "my", {".json"})
    assert files_in(tmp_path / "nowhere", {".json"}) == []
