"""Earlier versions of a data set in the cache: told, and removed where no other run can need them.

A change to a file of a data set makes a new folder in the cache (`images`), with a copy of every
image. A file in each folder says what it was made from. Whoever reads the folder shares a lock on
that file, and whoever removes the folder needs the lock alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import weakref
from collections.abc import Sequence
from pathlib import Path

from mrcnn_jax.output import listed, part_folder

MADE_FROM = "made_from"
_KEY = re.compile(r"-[0-9a-f]{16}$")


class HeldFolder:
    """The folder of a data set in the cache; no process removes it while this object is there."""

    def __init__(self, folder: Path, split: str, annotations: Path, images: Path) -> None:
        """Makes the folder if it is not there.

        Args:
            folder: of the data set.
            split: its name, by which images may be left out.
            annotations, images: file and folder that the data set was read from.
        """
        self.folder = folder
        names = (split, str(annotations.resolve()), str(images.resolve()))
        self.made_from = b"\0".join(os.fsencode(name) for name in names)
        with contextlib.suppress(OSError):  # another user's folder, or a file system without locks
            weakref.finalize(self, os.close, _locked(folder, os.O_RDONLY, fcntl.LOCK_SH))
        with contextlib.suppress(OSError):
            if _made_from(folder) != self.made_from:  # a new one, or the data set was moved
                (folder / MADE_FROM).write_bytes(self.made_from)  # into the file that is locked


def remove_earlier(held: Sequence[HeldFolder]) -> None:
    """Removes what a cache of one run has of earlier versions of its data sets, and says so.

    What another process reads stays.

    Args:
        held: the data sets as they are now, in that cache.
    """
    # Folders that do not say what they were made from are of releases with other keys.
    sizes = [size for folder, size in _earlier(held, unknown=True).items() if _remove(folder)]
    if sizes:
        print(f"{held[0].folder.parent}: removed {_counted(sizes)}")


def tell_earlier(held: Sequence[HeldFolder]) -> None:
    """Says what a cache of several runs, which may need it, has of earlier versions of data sets.

    Args:
        held: as of `remove_earlier`.
    """
    if found := _earlier(held, unknown=False):
        names = listed(sorted(folder.name for folder in found))
        print(
            f"{held[0].folder.parent}: also has {_counted(list(found.values()))}: {names} (delete "
            "what no other run uses)"
        )


def _counted(sizes: list[int]) -> str:
    folders = f"{len(sizes)} folder{'s' * (len(sizes) > 1)}, {sum(sizes) / 2**20:,.0f} MiB"
    return f"what was built from earlier versions of these annotations or images: {folders}"


def _earlier(held: Sequence[HeldFolder], *, unknown: bool) -> dict[Path, int]:
    """The folders of earlier versions, with their bytes.

    Args:
        unknown: take those, too, that have the name of a data set and do not say what they are.
    """
    now = {one.folder for one in held}
    found = {}
    for one in held:
        stem = _KEY.sub("", one.folder.name)
        known = {one.made_from, b""} if unknown else {one.made_from}
        for folder in set(one.folder.parent.iterdir()) - now:
            same_name = _KEY.search(folder.name) and _KEY.sub("", folder.name) == stem
            if same_name and folder.is_dir() and _made_from(folder) in known:
                found[folder] = _size(folder)
    return found


def _made_from(folder: Path) -> bytes:
    """What a folder says; b"" if it says nothing."""
    try:
        return (folder / MADE_FROM).read_bytes()
    except OSError:
        return b""


def _size(folder: Path) -> int:
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # removed meanwhile
                size += os.lstat(os.path.join(root, name)).st_size
    return size


def _remove(folder: Path) -> bool:
    """Removes a folder that nobody reads, and returns whether it did."""
    try:
        # Opened to write: NFS locks nothing else against others.
        descriptor = _locked(folder, os.O_RDWR, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    try:
        with part_folder(folder) as part:
            folder.rename(part / "removed")  # at once: what is there is whole
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _locked(folder: Path, access: int, lock: int) -> int:
    """A descriptor of the file in a folder that says what it was made from, and has the lock.

    Args:
        folder: is made if it is not there, as is its file.
        access: as of `os.open`.
        lock: as of `fcntl.flock`.

    Raises:
        OSError: another process has the lock, or there is none.
    """
    path = folder / MADE_FROM
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, access | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            continue  # the folder was removed since
        try:
            fcntl.flock(descriptor, lock)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # the folder was removed before it was locked
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
