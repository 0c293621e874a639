"""The files of a folder that somebody has, and what they are by the keys that occur in them."""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import re
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from mrcnn_jax.config.errors import ConfigError, refuse_pipe
from mrcnn_jax.data.folders import folders_in
from mrcnn_jax.data.other_formats import VIA3
from mrcnn_jax.output import listed
from mrcnn_jax.pixels.headers import SUFFIXES

TEXTS = (".json", ".xml", ".txt", ".csv", ".yaml", ".yml")
READ, LEAST_READ = 10**9, 10**5  # bytes of all texts, and of each: what follows may be an image
Kind = Literal["coco", "labelme", "via", "via3", "label_studio", "supervisely", "datumaro"]


def walk(folder: Path, without: Path | None) -> Iterator[str]:
    """The relative paths, with /, of the files in a folder, without those of runs; as of
    `folders_in`."""
    left_out = None if without is None else os.path.realpath(without)

    def leave(root: str, folders: list[str]) -> bool:
        is_run = "checkpoints" in folders and os.path.isfile(f"{root}/config.json")
        is_run |= os.path.isfile(f"{root}/dataset/split.json")
        return os.path.realpath(root) == left_out or (is_run and Path(root) != folder)

    for root, names in folders_in(folder, leave):
        for name in names:
            yield os.path.relpath(os.path.join(root, name), folder).replace(os.sep, "/")


@dataclass(frozen=True)
class Tree:
    """The files of a folder, as relative paths."""

    folder: Path
    files: tuple[str, ...]

    def with_suffix(self, *suffixes: str) -> list[str]:
        return [file for file in self.files if PurePosixPath(file).suffix.lower() in suffixes]

    @functools.cached_property
    def images(self) -> list[str]:
        return self.with_suffix(*SUFFIXES)

    @functools.cached_property
    def by_name(self) -> dict[str, list[str]]:
        """Images by the last part of their path."""
        found = defaultdict(list)
        for file in self.images:
            found[base_name(normal(file))].append(file)
        return found

    @functools.cached_property
    def _by_end(self) -> tuple[list[str], list[str]]:
        """The `_reversed` paths of the images, in their order, and the images in the same."""
        found = sorted((_reversed(normal(file)), file) for file in self.images)
        return [end for end, _ in found], [file for _, file in found]

    def ending_in(self, path: str) -> list[str]:
        """The images whose `normal` path is this one, or ends in its parts."""
        ends, files = self._by_end
        first = _reversed(path)
        after = first[:-1] + chr(ord("/") + 1)  # more than all that begin with `first`
        return files[bisect_left(ends, first) : bisect_left(ends, after)]

    @functools.cached_property
    def jsons(self) -> dict[str, Kind]:
        """JSON file -> its kind (`json_kind`); others are left out."""
        kinds = {file: json_kind(self.folder / file) for file in self.with_suffix(".json")}
        return {file: kind for file, kind in kinds.items() if kind is not None}

    def of_kind(self, kind: Kind) -> list[str]:
        return [file for file, its in self.jsons.items() if its == kind]

    def only(self, found: list[str], what: str) -> str:
        """The only one of `found`; ConfigError, which says `what` they are, if they are several."""
        if len(found) > 1:
            raise ConfigError(
                f"{self.folder}: several {what}: {listed(found)}: name a folder with "
                "one of them, or write a config that names files and folders (--config)"
            )
        return found[0]


def fingerprint(folder: Path, without: Path | None) -> str:
    """A hash of what annotations are made from: the names and sizes of images and texts, and what
    texts begin with, each with the same part of `READ` bytes.

    Args:
        folder, without: as of `walk`.
    """
    suffixes = {file: PurePosixPath(file).suffix.lower() for file in sorted(walk(folder, without))}
    texts = sum(suffix in TEXTS for suffix in suffixes.values())
    most = max(LEAST_READ, READ // max(texts, 1))
    found = hashlib.sha256()
    for file, suffix in suffixes.items():
        path = folder / file
        if suffix not in (*SUFFIXES, *TEXTS):
            continue
        found.update(f"{file}\0".encode(errors="surrogateescape"))
        with suppress(OSError, ConfigError):  # a broken link, for example
            size = path.stat().st_size
            found.update(f"{size}\0".encode())
            if suffix in TEXTS:
                found.update(mapped(path)[:most])
    return found.hexdigest()


def base_name(file: str) -> str:
    return file.rpartition("/")[2]


def parent(file: str) -> str:
    return file.rpartition("/")[0]


def is_inside(file: str, folder: str) -> bool:
    """Whether a file is in a folder, or the folder itself; "" has all."""
    return folder in ("", file) or file.startswith(f"{folder}/")


def _reversed(path: str) -> str:
    """The parts of a path, the last one first, each with a / behind it."""
    return "".join(f"{part}/" for part in reversed(path.split("/")))


def normal(file: str) -> str:
    return unicodedata.normalize("NFC", file)


def mapped(path: Path) -> mmap.mmap | bytes:
    """The bytes of a file, read as they are looked at."""
    refuse_pipe(path)
    try:
        with path.open("rb") as opened:
            if os.fstat(opened.fileno()).st_size == 0:
                return b""
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def json_kind(path: Path) -> Kind | None:
    """What wrote a JSON file, by the keys in it."""
    content = mapped(path)

    def has(key: str) -> bool:
        return content.find(f'"{key}"'.encode()) >= 0

    if has("shapes") and has("imagePath"):
        return "labelme"
    keys = sum(map(has, ("images", "annotations", "categories")))
    if keys == 3:
        return "coco"
    if has("shape_attributes") or has("_via_img_metadata"):
        return "via"
    if has("annotations") and has("result") and has("to_name"):
        return "label_studio"
    if path.parent.name == "ann" and has("objects") and has("size"):
        return "supervisely"
    if has("items") and has("labels") and has("categories") and not has("images"):
        return "datumaro"
    if all(map(has, VIA3)):
        return "via3"
    return "coco" if keys == 2 else None


def xml_root(path: Path) -> str | None:
    """The name of an XML file's first element."""
    found = re.search(rb"<([A-Za-z_][\w.-]*)[\s>]", mapped(path)[:4096])
    return found[1].decode() if found else None
