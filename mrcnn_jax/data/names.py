"""What the names of files say: whether they are for training, validation or tests, and which images
were made of one."""

from __future__ import annotations

import math
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Literal

Role = Literal["train", "val", "test"]

ROLES: dict[str, Role] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # Label Studio's, before the name of an upload
NUMBER = re.compile(r"[\W_]*[0-9]+$")  # of a frame, behind the name of its video
EXPORTED = re.compile(r"(_\w{3,4})?\.rf\.[0-9a-f]{32}$")  # Roboflow's, of each version of an image
TILE = re.compile(r"(\d{5}|[1-9]\d{5})_(\d{5}|[1-9]\d{5})")  # as of `convert.cut_tiles`: y, x
STRIDE = 16  # pixels: tiles lie no closer; frames of numbered clips do
BEGIN = 100_000  # pixels: below it the first tiles begin; dates, YYMMDD_HHMMSS, do not


def role(file: str) -> Role | None:
    """Whether an annotation file is for training, validation or tests, by its name or folder's."""
    path = PurePosixPath(file)
    for part in (path.name.partition(".")[0], *map(str, reversed(path.parts[:-1]))):
        if found := roles_in(part):
            return found[0]
    return None


def roles_in(text: str) -> list[Role]:
    """The roles that the words of a text name, in their order."""
    return [ROLES[word] for word in re.split(r"[^a-z]+", text.lower()) if word in ROLES]


def image_roles(file_names: Sequence[str]) -> list[Role | None]:
    """What each image is for, by its folders below the one that is common to all.

    The outermost that says so counts: those in it may be named after classes. Images of train_val
    are for training.

    Args:
        file_names: relative paths, with /.
    """
    folders = [PurePosixPath(posixpath.dirname(posixpath.normpath(n))).parts for n in file_names]
    common = len(posixpath.commonprefix(folders)) if folders else 0  # of any sequences
    return [next(filter(None, map(_only_role, parts[common:])), None) for parts in folders]


def _only_role(part: str) -> Role | None:
    found = set(roles_in(part))
    if found == {"train", "val"}:
        return "train"
    return found.pop() if len(found) == 1 else None


def tiles(file_names: Sequence[str]) -> set[int]:
    """The numbers of the images that are tiles, as `convert tile` names them: NAME/Y_X.png.

    All images of their folder are, and lie on a grid that begins near 0 (tiles without objects are
    left out).

    Args:
        file_names: relative paths, with /.
    """
    places = [TILE.fullmatch(PurePosixPath(name).stem) for name in file_names]
    inside = defaultdict(list)
    for number, name in enumerate(file_names):
        inside[posixpath.dirname(name)].append(number)
    found = set()
    for numbers in inside.values():
        its = [place for number in numbers if (place := places[number]) is not None]
        if len(its) == len(numbers) and all(
            _is_axis(sorted({int(place[axis]) for place in its})) for axis in (1, 2)
        ):
            found.update(numbers)
    return found


def _is_axis(places: list[int]) -> bool:
    """Whether tiles may begin at these places."""
    step = math.gcd(*places[:-1])  # the last tile of a row or column is shifted inwards
    return places[0] < BEGIN and (step == 0 or step >= STRIDE)


def originals(file_names: Sequence[str]) -> list[str]:
    """The path, without suffix, of what each image was made of.

    That of a tile is its folder. Roboflow's versions of an image lose what it puts behind a name.

    Args:
        file_names: relative paths, with /.
    """
    cut = tiles(file_names)
    folders, stems = [], []
    for number, name in enumerate(file_names):
        folder, stem = posixpath.dirname(name), PurePosixPath(name).stem
        if number in cut:
            folder, stem = posixpath.split(folder)
        folders.append(folder)
        stems.append(EXPORTED.sub("", stem))
    return list(map(posixpath.join, folders, stems))


def videos(names: Sequence[str]) -> list[str]:
    """The path of the video that each image would be a frame of: without the number at its end.

    Frames that were uploaded to Label Studio lose what it puts before their names, too. Frames have
    numbers of their own: if one number is in more uploads of a name than there are numbers, these
    are different images that somebody named alike, as many a phone's photographs, and keep it.

    Args:
        names: as of `originals`.
    """
    folders, stems = map(posixpath.dirname, names), list(map(posixpath.basename, names))
    plain = [UPLOADED.sub("", stem) for stem in stems]
    if all(stem[:8].isdecimal() for stem, rest in zip(stems, plain, strict=True) if stem != rest):
        plain = stems  # they are dates
    pairs = [(f, NUMBER.sub("", rest)) for f, rest in zip(folders, plain, strict=True)]
    frames: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for pair, stem, rest in zip(pairs, stems, plain, strict=True):
        if stem != rest:
            frames[pair][rest] += 1
    alike = {pair for pair, its in frames.items() if max(its.values()) > len(its)}
    return [
        posixpath.join(pair[0], NUMBER.sub("", stem) if pair in alike else pair[1])
        for pair, stem in zip(pairs, stems, strict=True)
    ]
