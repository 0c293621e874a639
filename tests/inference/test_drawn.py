"""What predict draws: told from photographs by its list alone, never by a name."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mrcnn_jax.data.report import Report
from mrcnn_jax.inference.drawn import (
    LIST,
    JSONList,
    drawn_in,
    growing_files,
    images_listed,
    picture_name,
    remove_earlier,
    take_back,
)


def test_a_growing_file_is_there_unless_one_was(tmp_path: Path) -> None:
    path, other = tmp_path / LIST, tmp_path / "detections.json"

    def full(*parts: Path) -> None:
        assert parts == (path, other)
        for part in parts:
            part.write_text("new")
        raise OSError(28, "full")

    with pytest.raises(OSError, match=LIST), growing_files(path, other) as parts:
        full(*parts)
    assert not path.exists()
    assert not other.exists()
    path.write_text("earlier")
    with growing_files(path, other) as parts:
        for part in parts:
            part.write_text("new")
        assert path.read_text() == "earlier"
        assert not other.exists()  # beside a list of another call
    assert path.read_text() == other.read_text() == "new"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_list_grows_and_ends(count: int) -> None:
    stream = io.BytesIO()
    entries = JSONList(stream)
    for number in range(count):
        entries.add({"id": number})
        entries.add()
    assert entries.count == count
    entries.end()
    assert json.loads(stream.getvalue()) == [{"id": number} for number in range(count)]
    entries.add({"id": 3}, {"id": 4})
    entries.end()
    assert entries.count == count + 2
    assert [entry["id"] for entry in json.loads(stream.getvalue())] == [*range(count), 3, 4]


class Disk(io.BytesIO):
    """A file on a disk that is full after `room` bytes."""

    room = 3

    def write(self, content: Any) -> int:
        if not (taken := content[: max(0, self.room - self.tell())]):
            raise OSError(28, "No space left on device")
        return super().write(taken)


def test_a_list_on_a_full_disk_has_all_that_was_added_as_a_whole() -> None:
    """Whatever the byte at which the disk is full, and even with none to free for its end."""
    pairs = [[{"id": 1}, {"id": 2}], [{"id": 3}, {"id": 4}]]
    found = set()
    for room in range(3, 60):
        stream = Disk()
        entries, stream.room, whole = JSONList(stream), room, []
        for pair in pairs:
            try:
                entries.add(*pair)
            except OSError:
                break
            whole += pair
        entries.end()
        assert json.loads(stream.getvalue()) == whole
        assert entries.count == len(whole)
        found.add(len(whole))
    assert found == {0, 2, 4}
    stream = Disk()
    stream.room = 2
    with pytest.raises(OSError, match="No space left"):
        JSONList(stream)


def test_what_another_list_did_not_take_is_left_out() -> None:
    stream = io.BytesIO()
    entries = JSONList(stream)
    entries.add({"id": 1})
    entries.add({"id": 2}, {"id": 3})
    entries.leave_out(2)
    entries.end()
    assert json.loads(stream.getvalue()) == [{"id": 1}]
    entries.add({"id": 4})
    entries.add()  # of an image without detections
    entries.leave_out(0)
    entries.end()
    assert (json.loads(stream.getvalue()), entries.count) == ([{"id": 1}, {"id": 4}], 2)


def test_what_was_drawn_beside_earlier_results_is_taken_back(tmp_path: Path) -> None:
    assert images_listed(tmp_path) == 0
    (tmp_path / LIST).write_text("[]\n")
    assert images_listed(tmp_path) == 0
    (tmp_path / LIST).write_text('[{"pictures": []}]\n')
    assert images_listed(tmp_path) == 1
    for name in ("00001_a.png", "00002_b.png"):
        (tmp_path / name).touch()
    line = f"ended early: the earlier results in {tmp_path} stay"
    counts = " (pictures drawn again: 1, new ones removed: 1)"
    assert take_back(tmp_path, {"00001_a.png"}, {"00002_b.png", "00003_c.png"}) == line + counts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00001_a.png", LIST]
    assert take_back(tmp_path, (), ()) == line


def test_what_was_drawn_is_what_the_list_says(tmp_path: Path) -> None:
    assert drawn_in(tmp_path) == drawn_in(tmp_path / "nowhere") == set()
    listed = ["00001_a.png", "../00002_b.png", "photo.png", "00003_c_depth.png"]
    (tmp_path / LIST).write_text(json.dumps([{"pictures": listed}, {"pictures": []}]))
    assert drawn_in(tmp_path) == {"00001_a.png", "00003_c_depth.png"}
    assert drawn_in(tmp_path / LIST) == set()
    for content in (b"", b"\xff", b"{}x", b"[3]", b"3", b'{"images": []}', b"[" * 100_000):
        (tmp_path / LIST).write_bytes(content)
        with pytest.raises(ValueError, match=r"images\.json: not written by predict$"):
            drawn_in(tmp_path)
    (tmp_path / LIST).unlink()
    os.mkfifo(tmp_path / LIST)
    with pytest.raises(ValueError, match=r"images\.json: not written by predict$"):
        drawn_in(tmp_path)


def test_what_an_earlier_call_drew_is_removed(tmp_path: Path) -> None:
    """But what this call drew, or read, stays, and so does what no list names."""
    names = ["00001_a.png", "00002_b.png", "00003_mine.png", "00004_input.png", "photo.png"]
    for name in names:
        (tmp_path / name).touch()
    report = Report()
    kept = {"00001_a.png", (tmp_path / "00004_input.png").resolve()}
    remove_earlier(tmp_path, {*names[:2], names[3], "photo.png"}, kept, report)
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[0], *names[2:]]
    assert [line.partition("(")[2] for line in report.lines()[1:]] == [
        "00003_mine.png)",
        "00002_b.png)",
    ]


def test_names() -> None:
    report = Report()
    assert picture_name(7, Path("x/a.b.jpg"), None, report) == "00007_a.b"
    assert picture_name(123456, Path("clip.mp4"), 3, report) == "123456_clip_000003"
    assert not report.findings
    long = picture_name(1, Path("é" * 120 + ".png"), 2, report)
    assert len(f"{long}.png".encode()) <= 200
    assert long.endswith("é_000002")
    assert report.lines()[1:] == [
        f"repaired 1: pictures whose file's name is too long for theirs: shortened ({long}.png)"
    ]
