"""Lists in text files that options name: of classes, and of images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.convert.common import normal_label, read_lines
from mrcnn_jax.convert.image_folder import normal_path

NO_NAMES = ("__ignore__", "_background_")  # in a labels.txt of labelme


def read_classes(path: Path) -> tuple[str, ...]:
    """The class names in a text file; ConfigError if there are none, or one is there twice."""
    names = tuple(name for line in read_lines(path) if (name := normal_label(line)) not in NO_NAMES)
    (name, times), *_ = Counter(names).most_common(1) or [("", 0)]
    if times != 1:
        problem = f"{name!r} is named {times} times" if names else "no names"
        raise ConfigError(f"{path}: {problem}")
    return names


class Only:
    """The list of --only.

    Args:
        path: its file; None: every image is wanted.
    """

    def __init__(self, path: Path | None) -> None:
        self._line: dict[str, str] | None = None
        """Name -> line, also without the flag that VOC's lists of a class put behind it."""
        self._met: set[str] = set()
        if path is not None:
            lines = read_lines(path)
            flagged = (line for line in lines if line.endswith((" 1", " -1", " 0")))
            self._line = {normal_path(line): line for line in lines}
            self._line |= {normal_path(line.rsplit(maxsplit=1)[0]): line for line in flagged}

    def names(self, file: str) -> bool:
        """Whether an image is wanted."""
        if self._line is None:
            return True
        found = {self._line[name] for name in _spellings(file) if name in self._line}
        self._met |= found
        return bool(found)

    def left(self) -> list[str]:
        """The lines that have named no image."""
        return [] if self._line is None else sorted({*self._line.values()} - self._met)


def _spellings(file: str) -> set[str]:
    """How a list may name an image: with or without its folders and its suffix."""
    path = PurePosixPath(file := normal_path(file))
    return {file, path.name, path.stem, str(path.with_suffix(""))} if path.name else {file}
