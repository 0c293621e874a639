"""Output for people and for the next start: files that are whole or absent, text without control
characters, text tables, and the first of many names."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import secrets
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

# What moves a cursor, recolours or retitles a terminal, or makes text read in another order than
# it has: C0 and C1 controls but tab and newline, bidirectional marks, embeddings, overrides and
# isolates, separators of lines; and surrogates, which no stream can encode.
_CODES = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROL, _CONTROL_OR_SPACE = re.compile(f"[{_CODES}]"), re.compile(rf"[\t\n{_CODES}]")

# What is being written has such a name beside its final one, and its writer holds a lock on it: a
# free lock tells that the writer is dead, on whichever host or in whichever container it ran.
_PART = re.compile(r"\..*\.[0-9a-f]{8}\.part")
_ADDED = len(b"..01234567.part")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a hidden name beside `path` to write to, renamed to `path` if the block succeeds.

    However the program ends, `path` is the old file or the new one, never a part of one.

    Raises:
        OSError: with `path` as its file, if writing failed.
    """
    with named(path), _part(path, folder=False) as part:
        yield part
        part.replace(path)


def progress_bar(total: int | None, what: str, *, unit: str = "img", **options: Any) -> Any:
    """Returns a tqdm bar that vanishes at its end; outside a terminal it is drawn every 30 s.

    Args:
        options: others of tqdm.
    """
    from tqdm import tqdm  # late: most commands draw none

    every = 0.5 if sys.stderr.isatty() else 30
    options |= {"mininterval": every, "maxinterval": max(10, every)}
    return tqdm(total=total, desc=what, unit=unit, leave=False, **options)


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8, that is whole or absent (`whole_file`)."""
    with whole_file(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def part_folder(path: Path) -> Iterator[Path]:
    """Yields a new hidden folder beside `path`, removed in the end, from which `path` is renamed.

    What killed programs left beside `path` is removed first.
    """
    remove_abandoned(path.parent)
    with named(path), _part(path, folder=True) as part:
        yield part


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Gives an OSError that names no file, or a hidden part of one, the name `path`."""
    try:
        yield
    except OSError as error:
        inside = error.filename is None or any(map(_PART.fullmatch, Path(error.filename).parts))
        if error.errno is None or not inside:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def remove_abandoned(folder: Path) -> None:
    """Removes what killed programs left half-written in a folder; what is being written stays."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _PART.fullmatch(path.name):
                with contextlib.suppress(OSError), _locked(path, wait=False):
                    _remove(path)


@contextlib.contextmanager
def _part(path: Path, *, folder: bool) -> Iterator[Path]:
    """Yields a new locked file or folder beside `path`; it is removed if it is still there."""
    name = path.name.encode(errors="surrogateescape")
    if len(name) > 100:  # a name that just fits must not become one that does not
        name = name[:-_ADDED]
    with contextlib.ExitStack() as stack:
        while True:
            part = path.with_name(
                f".{name.decode(errors='surrogateescape')}.{secrets.token_hex(4)}.part"
            )
            part.mkdir() if folder else part.touch(exist_ok=False)
            stack.callback(_remove, part)
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(_locked(part, wait=True))
            if part.exists():
                break  # else another program took it for abandoned before it was locked
        yield part


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Holds the lock of a file or folder.

    Args:
        path: what is locked.
        wait: for the lock; where the file system has no locks, go on without it. If not, OSError
            tells that the lock is held, or that there are none.
    """
    access = os.O_RDONLY if path.is_dir() else os.O_RDWR  # NFS locks only what is written to
    descriptor = os.open(path, access | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                raise
        yield
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    made = {name: PrintableStream(stream) for name, stream in before.items()}
    for name, stream in made.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in before.items():
            if getattr(sys, name) is made[name]:  # not another one that the block has put there
                setattr(sys, name, stream)


class PrintableStream:
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


def listed(names: Collection[str], most: int = 3, separator: str = ", ") -> str:
    """The first names, and how many more there are: "a, b, c and 4 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(itertools.islice(names, most)) + more


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
