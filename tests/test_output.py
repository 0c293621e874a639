"""Files that are whole or absent, and aligned tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from mrcnn_jax.output import text_table, whole_file


def test_a_file_is_replaced_when_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("old", "new"):
        with whole_file(path) as part:
            part.write_text(text)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fill() -> None:
        with whole_file(path) as part:
            part.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk"):
        fill()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_columns_are_aligned() -> None:
    rows = [("", "name", "count"), ("a", "long one", "3"), ("bb", "x", "12,345")]
    assert text_table(rows, left=2) == [
        "    name       count",
        "a   long one       3",
        "bb  x         12,345",
    ]
    assert text_table([("a", "b"), ("cc", "")], left=2) == ["a   b", "cc"]
