"""The image files of a folder, found by the names that annotations give them."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.folders import folders_in
from mrcnn_jax.pixels.headers import SUFFIXES


class ImageFolder:
    """The image files in a folder and its subfolders, by relative path (with /).

    Args:
        folder: the folder.
        without: whether to leave a file out.
        files: those that count; by default all in it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        without: Callable[[Path], bool] = lambda _: False,
        files: Sequence[Path] | None = None,
    ) -> None:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such image folder")
        self.folder, self._whole = folder, files is None
        if files is None:
            found = [file for file in files_in(folder, SUFFIXES) if not without(file)]
        else:
            found = [file for file in files if file.is_file()]
        self.files = [file.relative_to(folder).as_posix() for file in found]
        self._exact = {unicodedata.normalize("NFC", file): file for file in self.files}
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_path: dict[str, list[str]] = defaultdict(list)  # without its suffix
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for key, file in self._exact.items():
            self._by_name[PurePosixPath(key).name].append(file)
            self._by_path[str(PurePosixPath(key).with_suffix(""))].append(file)
            self._by_stem[PurePosixPath(key).stem].append(file)

    def find(self, names: Sequence[str]) -> str | None:
        """The first of these relative paths that exists, whatever its slashes and Unicode form.

        A name without an image's suffix (as in CVAT's tasks of videos) is the file of that name,
        else any image of that name; see `_only`.
        """
        for name in names:
            path = normal_path(name)
            if file := self._exact.get(path):
                return file
            if PurePosixPath(path).suffix.lower() in SUFFIXES:
                continue
            inside = not path.startswith(("/", ".."))
            if inside and self._whole and os.path.isfile(self.folder / path):
                return path
            if path in self._by_path:
                return self._only(self._by_path[path], name)
        return None

    def like(self, name: str) -> list[str]:
        """The files with this path, or with this path before their suffix."""
        path = normal_path(name)
        exact = [self._exact[path]] if path in self._exact else []
        return exact + self._by_path.get(path, [])

    def find_elsewhere(self, names: Sequence[str], stem: str | None) -> str | None:
        """The file with one of these names in any folder, else `with_stem`; see `_only`."""
        for name in names:
            if found := self._by_name.get(PurePosixPath(normal_path(name)).name):
                return self._only(found, names[0])
        return None if stem is None else self.with_stem(stem)

    def outside(self, names: Sequence[str]) -> str | None:
        """The first of these relative paths that leads to a file outside of the folder."""
        away = (name for name in names if os.path.normpath(name).startswith(("..", os.sep)))
        return next((name for name in away if os.path.isfile(self.folder / name)), None)

    def with_stem(self, stem: str) -> str | None:
        """The file with this path, or this name in any folder, whatever its suffix; see `_only`."""
        path = normal_path(stem)
        found = self._by_path.get(path, []) + self._by_stem.get(path, [])
        return self._only(list(dict.fromkeys(found)), stem) if found else None

    def _only(self, found: list[str], name: str) -> str:
        """The file found; ConfigError if there are several."""
        if len(found) > 1:
            raise ConfigError(
                f"{self.folder}: both {found[0]} and {found[1]} may be the image {name}"
            )
        return found[0]


def files_in(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files with these suffixes in a folder and its subfolders, sorted; as of `folders_in`."""
    paths = (Path(root, name) for root, names in folders_in(folder) for name in names)
    return sorted(path for path in paths if path.suffix.lower() in suffixes and path.is_file())


def normal_path(name: str) -> str:
    """A relative path as `ImageFolder` spells it: with /, in NFC, without "./"."""
    return str(PurePosixPath(unicodedata.normalize("NFC", name.replace("\\", "/"))))
