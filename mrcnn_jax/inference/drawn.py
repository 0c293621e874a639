"""What `predict` draws into a folder: names, their list, and what an earlier call left."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

from mrcnn_jax.config.errors import refuse_pipe
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.output import named, whole_file

LIST = "images.json"
"""The images of a folder of results, with what was drawn of each."""
LONGEST = 200  # bytes of a picture's name: file systems have 255, and files are written under more
_END = b"]\n"
_DRAWN = re.compile(r"\d{5,}_[^/]*\.png", re.DOTALL)  # names of overlays and depth maps


@contextlib.contextmanager
def growing_files(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Yields `paths` themselves to write to, so that they stay if the program is killed.

    They are removed if the block fails. Where there is one of them, as of an earlier call, what is
    there stays until the block succeeds (`whole_file`), and lists of two calls never lie together.

    Raises:
        OSError: with one of them as its file, if writing failed.
    """
    with contextlib.ExitStack() as stack:
        if any(map(os.path.lexists, paths)):
            yield tuple(stack.enter_context(whole_file(path)) for path in paths)
            return
        stack.enter_context(named(paths[0]))
        try:
            yield paths
        except BaseException:
            for path in paths:
                path.unlink(missing_ok=True)
            raise


class JSONList:
    """A JSON list that grows in a file; its end stands behind each entry already, for a disk that
    is full or a program that is killed.

    Args:
        stream: the empty file, without a buffer, which would keep what the disk did not take.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.count = 0
        self._stream, self._size, self._before = stream, 0, 0
        self._write(b"[")

    def add(self, *entries: dict[str, Any]) -> None:
        """Adds all of them, or, if it is interrupted or raises OSError, none."""
        self._before = self._size
        if not entries:
            return
        text = ",\n".join(map(json.dumps, entries))
        self._write(((",\n" if self.count else "") + text).encode())
        self.count += len(entries)

    def leave_out(self, count: int) -> None:
        """Undoes the last `add`, of so many entries, which another list did not take."""
        self._size, self.count = self._before, self.count - count

    def end(self) -> None:
        """Leaves what was added as a whole, whatever came after it."""
        self._write(b"")
        self._stream.truncate()

    def _write(self, content: bytes) -> None:
        self._stream.seek(self._size)
        rest = memoryview(content + _END)
        while rest:  # a disk that is nearly full takes a part
            rest = rest[self._stream.write(rest) :]
        self._size += len(content)


def picture_name(number: int, file: Path, frame: int | None, report: Report) -> str:
    """The name of a picture, without suffix; the number keeps files of one name apart.

    Args:
        number: of the picture among all.
        file: the image or video that it is of.
        frame: of the video.
        report: counts names that are too long.
    """
    start, end = f"{number:05d}_", ("" if frame is None else f"_{frame:06d}")
    stem = file.stem.encode(errors="surrogateescape")
    room = LONGEST - len(start) - len(end) - len(".png")
    if len(stem) <= room:
        return f"{start}{file.stem}{end}"
    name = f"{start}{stem[:room].decode(errors='ignore')}{end}"
    report.add(Reason.SHORTENED, f"{name}.png")
    return name


def drawn_in(folder: Path) -> set[str]:
    """The names of what an earlier call drew into a folder, by its list; empty without one.

    Raises:
        ValueError: the folder's `LIST` cannot be read, or is another file of that name.
    """
    path = folder / LIST
    try:
        refuse_pipe(path)
        images = json.loads(path.read_bytes())
        return {name for image in images for name in image["pictures"] if _DRAWN.fullmatch(name)}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path}: not written by predict") from None


def images_listed(folder: Path) -> int:
    """How many images an earlier call found in a folder, whose list `drawn_in` can read."""
    path = folder / LIST
    return len(json.loads(path.read_bytes())) if path.exists() else 0


def take_back(out: Path, drawn: Collection[str], new: Collection[str]) -> str:
    """Removes what a call drew that was ended early, where the results of an earlier one stay.

    Args:
        out: the folder of results.
        drawn: the names of pictures that are in the earlier call's list, and were drawn again.
        new: the names of the others, which were not there before.

    Returns:
        A line for people.
    """
    removed = [name for name in new if (out / name).exists()]
    for name in removed:
        (out / name).unlink()
    counts = f" (pictures drawn again: {len(drawn)}, new ones removed: {len(removed)})"
    return f"ended early: the earlier results in {out} stay{counts if drawn or removed else ''}"


def remove_earlier(
    out: Path, earlier: Collection[str], kept: Collection[Path | str], report: Report
) -> None:
    """Removes what only an earlier call drew, and tells of other pictures that look like it.

    Args:
        out: the folder of results.
        earlier: as of `drawn_in`, before this call.
        kept: the inputs, resolved, and the names of what this call drew.
        report: counts both.
    """
    for path in sorted(out.iterdir()):
        ours = _DRAWN.fullmatch(path.name) and path.is_file()
        if not ours or path.name in kept or path.resolve() in kept:
            continue
        if path.name in earlier:
            path.unlink()
        report.add(Reason.REPLACED if path.name in earlier else Reason.LEFT, path.name)
