"""The manifest of a checkpoint's folder: the size and SHA-256 of every file in it.

A folder is a checkpoint once it has its manifest, and is read only after every file has been
compared with it: orbax restores a flipped bit without complaint. It gets its manifest before its
name and keeps it as long as the name, so that a folder with the name and without a manifest is no
leftover of a kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.output import whole_file

NAME = "manifest.json"


def lacks(folder: Path) -> str | None:
    """One line if the folder has no manifest, or one that lists nothing; None if it has one.

    No kill leaves such a folder: it was copied in part, or harmed.
    """
    try:
        _recorded(folder)
    except ConfigError as error:
        return str(error)
    return None


def write(folder: Path, names: Sequence[str] | None = None) -> None:
    """Record the files of the folder, all or those named, and wait until they are on the disk."""
    found = folder.rglob("*") if names is None else (folder / name for name in names)
    files = sorted(path for path in found if path.is_file())
    recorded = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": _sha256(path),
        }
        for path in files
    }
    for path in (*files, *(path for path in folder.rglob("*") if path.is_dir())):
        flush(path)
    with whole_file(folder / NAME) as part:
        part.write_text(json.dumps({"files": recorded}, indent=1))
        flush(part)
    flush(folder)


def damage(folder: Path, names: Sequence[str] | None = None) -> str | None:
    """One line that names the first file that differs from the manifest; None if none does.

    Args:
        folder: what has the manifest.
        names: the files that matter; by default all that are recorded.
    """
    try:
        for name, (size, digest) in _recorded(folder).items():
            if names is not None and name not in names:
                continue
            path = folder / name
            if not path.is_file():
                return f"{path}: missing from the checkpoint"
            if path.stat().st_size != size:
                return f"{path}: damaged: {path.stat().st_size} bytes, {size} when it was saved"
            if _sha256(path) != digest:
                return f"{path}: damaged: not the bytes that were saved (SHA-256 differs)"
    except ConfigError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror or error}"
    return None


def _recorded(folder: Path) -> dict[str, tuple[int, str]]:
    """Name -> size and SHA-256; ConfigError if the folder has no manifest that lists anything."""
    path = folder / NAME
    try:
        files = json.loads(path.read_bytes())["files"]
        recorded = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        what = "copied in part?" if folder.is_dir() else "no such folder"
        raise ConfigError(f"{folder}: no checkpoint: it has no {NAME} ({what})") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: damaged: {error}") from None
    if not recorded:
        raise ConfigError(f"{path}: damaged: it lists no files")
    return recorded


def remove(folder: Path) -> None:
    """Remove a checkpoint, under a hidden name first: a kill leaves no half of one to be taken for
    a checkpoint."""
    shutil.rmtree(hide(folder))


def hide(folder: Path, why: str = "removed") -> Path:
    """Rename a folder to a hidden name, which is that of something unfinished; returns it."""
    hidden = folder.with_name(f".{folder.name}.{why}")
    if hidden.exists():
        shutil.rmtree(hidden)
    return folder.rename(hidden)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
