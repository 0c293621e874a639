"""Harm to a manifest is found, whichever bit it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mrcnn_jax.runs import manifest


def test_any_flipped_bit_of_the_manifest_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "00000003-rpn"
    (folder / "model" / "d").mkdir(parents=True)
    for name in ("meta.json", "model/_METADATA", "model/d/0"):
        (folder / name).write_text(name)
    lacking = f"{folder}: no checkpoint: it has no manifest.json (copied in part?)"
    assert manifest.damage(folder) == manifest.lacks(folder) == lacking
    manifest.write(folder)
    assert manifest.damage(folder) is None
    path = folder / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(flipped))
        around = content[max(0, position - 20) : position + 20]
        assert manifest.damage(folder) is not None, (position, around)
    for length in range(len(content) - 3, len(content)):
        path.write_bytes(content[:length])
        assert manifest.damage(folder) is not None


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"files": {}}', b'{"files": []}', b"[1]", b"\xff", b"[" * 100_000]
)
def test_a_manifest_that_lists_nothing_is_none(content: bytes, tmp_path: Path) -> None:
    """`{"files": {}}` vouched for every file, since none of those that it lists was harmed."""
    (tmp_path / "meta.json").write_text("{}")
    (tmp_path / manifest.NAME).write_bytes(content)
    fault = manifest.damage(tmp_path)
    assert fault is not None
    assert fault == manifest.lacks(tmp_path)
    assert fault.startswith(f"{tmp_path / manifest.NAME}: damaged: ")
    assert "\n" not in fault


def test_of_some_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    manifest.write(tmp_path, ("a",))
    (tmp_path / "b").write_text("c")
    assert manifest.damage(tmp_path) is None
    (tmp_path / "a").write_text("c")
    assert manifest.damage(tmp_path) is not None


def test_a_removed_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "00000003-rpn"
    folder.mkdir()
    (folder / "meta.json").write_text("{}")
    manifest.write(folder)
    assert manifest.lacks(folder) is None
    (tmp_path / f".{folder.name}.removed").mkdir()  # a kill in an earlier removal
    manifest.remove(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_in_a_removal_leaves_no_folder_with_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "00000003-rpn"
    folder.mkdir()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        manifest.remove(folder)
    assert [path.name for path in tmp_path.iterdir()] == [".00000003-rpn.removed"]
