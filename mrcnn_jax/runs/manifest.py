"""The manifest of a checkpoint's folder: the size and SHA-256 of every file in it.

A folder is a checkpoint once it has its manifest, and is read only after every file has been
compared with it: orbax restores a flipped bit without complaint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from mrcnn_jax.output import whole_file

NAME = "manifest.json"


def exists(folder: Path) -> bool:
    """Whether the folder was saved to the end."""
    return (folder / NAME).is_file()


def write(folder: Path) -> None:
    """Record every file of the folder; when this returns, all of them are on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
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


def damage(folder: Path) -> str | None:
    """One line that names the first file that differs from the manifest; None if none does."""
    try:
        files = json.loads((folder / NAME).read_text())["files"]
        recorded = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{folder}: no such checkpoint (it has no {NAME})"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{folder / NAME}: damaged: {error}"
    for name, (size, digest) in recorded.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: missing from the checkpoint"
        if path.stat().st_size != size:
            return f"{path}: damaged: {path.stat().st_size} bytes, {size} when it was saved"
        if _sha256(path) != digest:
            return f"{path}: damaged: not the bytes that were saved (SHA-256 differs)"
    return None


def remove(folder: Path) -> None:
    """Remove a checkpoint, its manifest first: half a checkpoint must not count as one."""
    (folder / NAME).unlink()
    shutil.rmtree(folder)


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
