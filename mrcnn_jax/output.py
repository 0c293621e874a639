"""Output for people and for the next start: files that are whole or absent, text without control
characters, and text tables."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# What moves a cursor, recolours or retitles a terminal, or makes text read in another order than
# it has: C0 and C1 controls but tab and newline, bidirectional marks, embeddings, overrides and
# isolates, separators of lines; and surrogates, which no stream can encode.
_CODES = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROL, _CONTROL_OR_SPACE = re.compile(f"[{_CODES}]"), re.compile(rf"[\t\n{_CODES}]")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, renamed to `path` when the block ends without an error.

    However the program ends, `path` is the old file or the new one, never a part of one.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def printable(text: str, *, one_line: bool = False) -> str:
    """`text` with escapes such as \\x1b where it has control characters.

    Names of files, classes, tensors and fields are whatever somebody wrote.

    Args:
        text: any.
        one_line: escape tabs and newlines too.
    """
    pattern = _CONTROL_OR_SPACE if one_line else _CONTROL
    return pattern.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_values(value: Any) -> Any:
    """A JSON value with all of its texts `printable`, each on one line."""
    if isinstance(value, str):
        return printable(value, one_line=True)
    if isinstance(value, list | tuple):
        return [printable_values(each) for each in value]
    if isinstance(value, dict):
        return {printable_values(name): printable_values(each) for name, each in value.items()}
    return value


@contextlib.contextmanager
def printable_streams() -> Iterator[None]:
    """Make all that is printed, logged or drawn as a progress bar in the block `printable`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Printable, before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Printable:
    """A text stream that writes what is printable."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        # A progress bar begins with the carriage return that takes it back to its line's start.
        bar = text.startswith("\r")
        self._stream.write("\r" * bar + printable(text[bar:]))
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def text_table(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """One line per row, aligned by column: the first `left` columns to the left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
