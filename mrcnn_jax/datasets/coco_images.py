"""Where the images of a COCO file are: in the folder that has most of the names that it lists."""

from __future__ import annotations

import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path, PureWindowsPath

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.image_names import written_name
from mrcnn_jax.data.names import role, roles_in
from mrcnn_jax.data.records import LOST_IMAGES
from mrcnn_jax.data.split import Part
from mrcnn_jax.datasets.tree import Tree, base_name, is_inside, mapped, normal, parent
from mrcnn_jax.output import listed

SAMPLE = 50  # names that tell a layout
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "rgb", "jpegimages")
# Folders of pictures with the names of the images that are not these.
DRAWN = re.compile(
    r"(^|[^a-z])(masks?|labels?|depths?|seg|segmentations?|gt|annotations?|annots?)([^a-z]|$)"
)


def coco_part(tree: Tree, annotations: str) -> Part:
    """The COCO file with the folder in which most of its images are; folders named like masks come
    last."""
    path = tree.folder / annotations
    names = list(islice(_file_names(path), SAMPLE))
    places, elsewhere = _places(tree, names)
    from_urls = not places and mapped(path).find(b'"file_name"') < 0
    if from_urls:  # with the folders of their server
        places, elsewhere = _places(tree, map(base_name, names))
    if len(places) > 1:  # such as one with a few examples, or with masks
        every = _file_names(path)
        places, _ = _places(tree, map(base_name, every) if from_urls else every)
    if places:
        beside, most = posixpath.dirname(annotations), max(places.values())

        def preference(place: str) -> tuple[bool, int, int, bool, bool, int]:
            parts = place.split("/")
            shared = len(posixpath.commonprefix([parts, beside.split("/")]))
            own = "/".join(parts[min(shared, len(parts) - 1) :])  # below the annotations' folder
            pictures = 2 * places[place] > most and not DRAWN.search(own.lower())
            same_role = role(place) == role(annotations)
            named = base_name(place).lower() in IMAGE_FOLDERS
            return pictures, places[place], shared, same_role, named, -len(place)

        best = max(sorted(places), key=preference)
        return Part(path, tree.folder / _with_others(tree, annotations, best))
    if elsewhere or not names:
        return Part(path, tree.folder)
    raise ConfigError(f"{path}: none of its images is in {tree.folder}: {listed(names)}")


def _places(tree: Tree, names: Iterable[str]) -> tuple[Counter[str], bool]:
    """How many of the images that an annotation file names are in each folder that has any, and
    whether one has a path of another machine, which `read_coco` finds by its end."""
    places: Counter[str] = Counter()
    elsewhere = False
    for name, times in Counter(map(normal, names)).items():
        forward = posixpath.normpath(name.replace("\\", "/"))
        ends = tree.ending_in(forward)
        depth = len(forward.split("/"))  # not its length: Unicode forms differ in that
        for place in {"/".join(file.split("/")[:-depth]) for file in ends}:
            places[place] += times
        foreign = posixpath.isabs(forward) or PureWindowsPath(name).drive != "" or "\\" in name
        elsewhere |= foreign and not ends and base_name(forward) in tree.by_name
    return places, elsewhere


def _with_others(tree: Tree, annotations: str, place: str) -> str:
    """The folder above this one and others, if names without a folder are in several of them.

    `read_coco` finds there what is in one of them only. Unless too many are missing, or if it would
    find more otherwise, or in folders for something else, `place`.
    """
    names: set[str] = set()
    for name in map(normal, _file_names(tree.folder / annotations)):
        if "/" in name or "\\" in name:  # as all of LVIS, whose file is a gigabyte
            return place
        names.add(name)
    own = {base_name(normal(file)) for file in tree.images if parent(file) == place}
    found = [its for name in names - own if len(its := tree.by_name.get(name, [])) == 1]
    few = len(names - own) <= LOST_IMAGES * len(names)
    if few or not found:
        return place
    above = posixpath.commonpath([place, *(parent(file) for (file,) in found)])
    there = [[f for f in tree.by_name.get(name, []) if is_inside(f, above)] for name in names]
    folders = {parent(file) for its in there for file in its}
    its_role = role(annotations)
    roles = [set(roles_in(folder)) for folder in folders]
    others = its_role is not None and any(named and its_role not in named for named in roles)
    once = sum(len(its) == 1 for its in there)
    return place if above in folders or others or once <= len(names & own) else above


def _file_names(path: Path) -> Iterator[str]:
    """The names of the images in a COCO file, in their order (`written_name`)."""
    content, there = mapped(path), False
    for key in ("file_name", "coco_url"):
        for found in re.finditer(rb'"%s"\s*:\s*("(?:[^"\\]|\\.)*")' % key.encode(), content):
            there = True
            try:
                name = written_name({key: json.loads(found[1])})
            except ValueError:
                continue
            if isinstance(name, str):
                yield name
        if there:
            return
