"""What `predict` draws into a folder: names, their list, and what an earlier call left."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

from mrcnn_jax.config.errors import refuse_pipe
from mrcnn_jax.data.report import Reason, Report

LIST = "images.json"
"""The images of a folder of results, with what was drawn of each."""
LONGEST = 200  # bytes of a picture's name: file systems have 255, and files are written under more
_DRAWN = re.compile(r"\d{5,}_[^/]*\.png", re.DOTALL)  # names of overlays and depth maps


class JSONList:
    """A JSON list that grows in a file, entry by entry."""

    def __init__(self, stream: IO[str]) -> None:
        self.count = 0
        self._stream = stream
        stream.write("[")

    def add(self, entry: dict[str, Any]) -> None:
        self._stream.write((",\n" if self.count else "") + json.dumps(entry))
        self.count += 1
        self._stream.flush()

    def end(self) -> None:
        self._stream.write("]\n")


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
