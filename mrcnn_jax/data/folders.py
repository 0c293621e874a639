"""The folders of files that somebody has: which are looked into."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mrcnn_jax.config.errors import ConfigError


def folders_in(
    folder: Path,
    leave: Callable[[str, list[str]], bool] = lambda *_: False,
    *,
    refuse_unreadable: bool = True,
) -> Iterator[tuple[str, list[str]]]:
    """A folder and its subfolders, each with the sorted names of its files.

    Hidden ones are passed over, and those of systems. Links are followed, to each folder once.

    Args:
        folder: the first one; nothing comes of one that is not there.
        leave: whether a folder, given with the names of its subfolders, is passed over.
        refuse_unreadable: else a folder that cannot be read is passed over.

    Raises:
        ConfigError: a folder cannot be read.
    """
    hidden = (".", "__MACOSX", "lost+found")
    seen: set[str] = set()
    refuse = _refuse_unreadable if refuse_unreadable else None
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(root)
        if real in seen or leave(root, folders):
            folders.clear()
            continue
        seen.add(real)
        shown = (name for name in folders if not name.startswith(hidden))
        # Of a folder and a link to it, the folder.
        folders[:] = sorted(shown, key=lambda name: (os.path.islink(f"{root}/{name}"), name))
        yield root, sorted(name for name in names if not name.startswith(hidden))


def _refuse_unreadable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
