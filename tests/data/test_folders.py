"""Which folders are looked into; tests/convert/test_image_folder.py has the files in them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.folders import folders_in


def test_links_are_followed_once_and_hidden_folders_never(tmp_path: Path) -> None:
    for name in ("far/2.png", "far/1.png", "far/.2.png", "my/a/3.png", "my/.thumbs/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    my = tmp_path / "my"
    (my / "batch1").symlink_to(tmp_path / "far")
    (my / "again").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(my)
    assert list(folders_in(my)) == [
        (str(my), []),
        (str(my / "a"), ["3.png"]),
        (str(my / "again"), ["1.png", "2.png"]),
    ]
    assert list(folders_in(my, lambda _, inside: "a" in inside)) == []
    assert list(folders_in(tmp_path / "nowhere")) == []


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(place: str) -> object:
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ConfigError, match=f"^{tmp_path}: Permission denied$"):
        list(folders_in(tmp_path))
