"""Which file of a folder is meant by the name that a COCO file gives an image."""

from __future__ import annotations

import functools
import os
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

from mrcnn_jax.data.folders import folders_in
from mrcnn_jax.data.json_values import is_text
from mrcnn_jax.data.repair import Dropped
from mrcnn_jax.data.report import Reason


def written_name(item: dict[str, Any]) -> Any:
    """The file_name of an image; without one (LVIS), its folder and name in coco_url."""
    name, url = item.get("file_name"), item.get("coco_url")
    if name is None and isinstance(url, str):
        return "/".join(urlsplit(url).path.split("/")[-2:]) or None
    return name


def name_forms(name: str) -> Iterator[str]:
    """A name as written, and in both Unicode forms that file systems use."""
    yield from (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))


class FilesByName:
    """Finds the files of names in a folder; also of paths of another machine, C:\\me\\a.jpg or
    /home/me/a.jpg, and of names without a folder, if all lie in subfolders."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder, self._names = folder, names

    def look(self, name: Any, *, of_url: bool) -> tuple[str, Reason | None]:
        """Find the file of a name.

        Args:
            name: as of `written_name`.
            of_url: whether it is that of a URL.

        Returns:
            How it is spelled in the folder, and how it was found if it is not where it says.

        Raises:
            Dropped: there is no such file, or more than one.
        """
        try:
            found = _found(self._folder, name)
        except Dropped as dropped:
            bare = "/" not in str(name) and self._all_in_subfolders
            if dropped.reason is not Reason.MISSING or not (of_url or bare):
                raise
            found = None
        if found is not None:
            return found, Reason.FROM_URL if of_url else None
        if of_url:
            return self._find(str(name)), Reason.FROM_URL
        bare = PureWindowsPath(name).name == name
        return self._find(name), Reason.IN_SUBFOLDER if bare else Reason.FOUND_BY_NAME

    @functools.cached_property
    def _all_in_subfolders(self) -> bool:
        """Whether no file lies where a name without a folder says."""
        return not any(
            os.path.isfile(self._folder / form)
            for name in self._names
            if "/" not in name
            for form in name_forms(name)
        )

    @functools.cached_property
    def _files(self) -> dict[str, list[str]]:
        """Relative paths by name, of the folders that `folders_in` finds."""
        files = defaultdict(list)
        for root, names in folders_in(self._folder, refuse_unreadable=False):
            for name in names:
                path = os.path.relpath(os.path.join(root, name), self._folder)
                if is_text(path):
                    files[unicodedata.normalize("NFC", name)].append(path)
        return files

    def _find(self, name: str) -> str:
        """The file at the path's longest end with a folder, else the only one with its name."""
        path = PureWindowsPath(name)  # knows both slashes
        parts = [part for part in path.parts if part not in (path.anchor, "..")]
        for start in range(len(parts) - 1):
            for end in name_forms("/".join(parts[start:])):
                if os.path.isfile(self._folder / end):
                    return end
        files = self._files.get(unicodedata.normalize("NFC", parts[-1]), []) if parts else []
        if len(files) > 1:
            raise Dropped(Reason.AMBIGUOUS)
        if not files or not os.path.isfile(self._folder / files[0]):
            leaves = path.anchor or ".." in path.parts
            raise Dropped(Reason.NAME if leaves else Reason.MISSING)
        return files[0]


def _found(folder: Path, name: Any) -> str | None:
    """How `name` is spelled in the folder; None if it is a path of another machine."""
    if not is_text(name):
        raise Dropped(Reason.NAME)
    forward = name.replace("\\", "/")
    leaves = False
    for spelling in (name, *name_forms(forward)):
        if posixpath.isabs(spelling) or posixpath.normpath(spelling).split("/")[0] == "..":
            leaves = True
        elif os.path.isfile(folder / spelling):  # Path.is_file raises if the name is too long
            return spelling
    if posixpath.isabs(forward) or "\\" in name or PureWindowsPath(name).drive:
        return None
    raise Dropped(Reason.NAME if leaves else Reason.MISSING)
