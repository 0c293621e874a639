"""A folder of the cache: what is written into it is read back whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.output import remove_abandoned, write_file

_UNWRITABLE = tuple(
    map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS))
)

_SEAL = "checksums.json"

Item = TypeVar("Item")
T = TypeVar("T")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes a folder of the cache to write in; ConfigError, with the file's name, if that fails.

    What builds that were killed have left there is removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        yield
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: {error.strerror or error}") from None
    except RuntimeError as error:  # array_record's, from C++
        reason = next((text for text in _UNWRITABLE if text in str(error)), None)
        if reason is None:
            raise
        raise ConfigError(f"{folder}: {reason}") from None


def keep(path: Path, found: Any) -> None:
    """Writes what a check found, JSON values, so that harm to the file is noticed.

    Raises:
        ConfigError: the file cannot be written.
    """
    text = json.dumps(found)
    with writing(path.parent):
        write_file(path, json.dumps({"sha256": _digest(text), "found": text}))


def kept(path: Path) -> Any:
    """What `keep` wrote; None if there is no such file, or it is damaged: a flipped bit would turn
    an image, or refuse it."""
    try:
        content = json.loads(path.read_text())
        whole = content["sha256"] == _digest(content["found"])
        return json.loads(content["found"]) if whole else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def seal(folder: Path) -> None:
    """Writes the checksums of the files in a folder of arrays, so that harm to them is noticed.

    Raises:
        ConfigError: the file of the checksums cannot be written.
    """
    keep(folder / _SEAL, _checksums(folder))


def is_sealed(folder: Path) -> bool:
    """Whether the files of a folder are those that `seal` found in it; all of them are read.

    A file that was cut short, or lost a block, would be read as zeros, or end the program.
    """
    try:
        return bool(kept(folder / _SEAL) == _checksums(folder))
    except OSError:
        return False


def _checksums(folder: Path) -> dict[str, int]:
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.name == _SEAL:
            continue
        sums[path.name] = 0
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                sums[path.name] = zlib.crc32(block, sums[path.name])
    return sums


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def each(
    items: Sequence[Item], function: Callable[[Item], T], *, threads: int, what: str
) -> Iterator[tuple[Item, T]]:
    """(item, what `function` returns for it) in order, from threads: decoders let go of Python's
    lock. `what` stands beside the bar."""
    pool = ThreadPoolExecutor(threads)
    try:
        results = pool.map(function, items)
        shown = tqdm(results, desc=what, total=len(items), unit="img", disable=None, leave=False)
        yield from zip(items, shown, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)
