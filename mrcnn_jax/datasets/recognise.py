"""Recognises how a folder keeps its images and annotations, by what is in it.

Files are told by their names and by keys that occur in them: no annotation is parsed here. The
images of a COCO file are where the first names that it lists are found.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

from mrcnn_jax.config.errors import ConfigError, refuse_pipe
from mrcnn_jax.convert.common import Options
from mrcnn_jax.convert.cvat import Cvat
from mrcnn_jax.convert.label_studio import LabelStudio
from mrcnn_jax.convert.labelme import Labelme
from mrcnn_jax.convert.mask_images import LOSSY, Masks, without_mask
from mrcnn_jax.convert.mask_images import SUFFIXES as MASK_SUFFIXES
from mrcnn_jax.convert.via import Via
from mrcnn_jax.convert.voc import Voc
from mrcnn_jax.convert.yolo import PARTS, Yolo
from mrcnn_jax.data.split import Part
from mrcnn_jax.pixels.decode import SUFFIXES

LOOKED_FOR = (
    "COCO's JSON (of Roboflow, CVAT and Label Studio, too), YOLO's data.yaml, JSON of labelme, "
    "VIA and Label Studio, CVAT's annotations.xml, Pascal VOC's XML or SegmentationObject/, and "
    "folders of masks"
)
ROLES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
# Files of COCO 2017 that annotate something else.
OTHER_TASKS = ("captions", "person_keypoints", "panoptic", "stuff", "image_info")
TOOLS = {
    "_annotations.coco.json": "Roboflow's COCO export",
    "instances_default.json": "CVAT's COCO export",
    "result.json": "Label Studio's COCO export",
}
CLASS = "object"  # of masks whose files and folders name none
SAMPLE = 50  # names that tell a layout
OUT = Path("annotations.json")  # to be replaced


@dataclass(frozen=True)
class Recognised:
    """What a folder holds: one or two COCO files, or exports that are to be converted to such."""

    told: str
    """One line for people."""
    train: Part | None = None
    val: Part | None = None
    """None: validation images are to be split off."""
    export: Options | None = None
    """Converted, it is the training part; where it is written to is to be replaced."""
    val_export: Options | None = None
    """The validation part of the same export, with the same images folder; None: as for `val`."""


def recognise(folder: Path, *, without: Path | None = None) -> Recognised:
    """Finds the annotations and images of a folder.

    Args:
        folder: anything that a user has; runs in it, and hidden files, are passed over.
        without: another folder in it to pass over.

    Raises:
        ConfigError: no such folder, nothing that can be read, or several things that could be
            meant; says what was found.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    if (folder / "checkpoints").is_dir() and (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: is the folder of a run, not one of images and annotations")
    tree = _Tree(folder, tuple(_walk(folder, without)))
    for look in (_coco, _yolo, _labelme, _via, _label_studio, _cvat, _voc, _masks):
        found = look(tree)
        if found is not None:
            return found
    kinds = Counter(PurePosixPath(file).suffix.lower() or "without suffix" for file in tree.files)
    there = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "no file"
    what = ""
    lossy = [file for file in tree.with_suffix(*LOSSY) if "mask" in _parent(file).lower()]
    if lossy:
        what += f"{lossy[0]} is in a format that changes values, no mask (PNG, TIFF, BMP, GIF); "
    raise ConfigError(f"{folder}: {what}looked for {LOOKED_FOR}; found {there}")


# -- files -----------------------------------------------------------------------------------------


def _walk(folder: Path, without: Path | None) -> Iterator[str]:
    """The relative paths, with /, of the files in a folder. Links are followed, once each."""
    seen = {os.path.realpath(without)} if without is not None else set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        is_run = "checkpoints" in folders or os.path.isfile(f"{root}/dataset/split.json")
        if real in seen or (is_run and Path(root) != folder):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(root, name), folder).replace(os.sep, "/")


@dataclass(frozen=True)
class _Tree:
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
            found[_name(_normal(file))].append(file)
        return found

    @functools.cached_property
    def jsons(self) -> dict[str, str]:
        """JSON file -> the kind of `_kind`; others are left out."""
        kinds = {file: _kind(self.folder / file) for file in self.with_suffix(".json")}
        return {file: kind for file, kind in kinds.items() if kind is not None}

    def of_kind(self, kind: str) -> list[str]:
        return [file for file, its in self.jsons.items() if its == kind]


def _name(file: str) -> str:
    return file.rpartition("/")[2]


def _parent(file: str) -> str:
    return file.rpartition("/")[0]


def _normal(file: str) -> str:
    return unicodedata.normalize("NFC", file)


def _mapped(path: Path) -> mmap.mmap | bytes:
    """The bytes of a file, read as they are looked at."""
    refuse_pipe(path)
    try:
        with path.open("rb") as opened:
            if os.fstat(opened.fileno()).st_size == 0:
                return b""
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


Kind = Literal["coco", "labelme", "via", "label_studio"]


def _kind(path: Path) -> Kind | None:
    """What wrote a JSON file, by the keys in it."""
    content = _mapped(path)

    def has(key: str) -> bool:
        return content.find(f'"{key}"'.encode()) >= 0

    if has("shapes") and has("imagePath"):
        return "labelme"
    if has("shape_attributes") or has("_via_img_metadata"):
        return "via"
    if has("annotations") and has("result") and has("to_name"):
        return "label_studio"
    keys = sum(map(has, ("images", "annotations", "categories")))
    return "coco" if keys >= 2 else None


def _xml_root(path: Path) -> str | None:
    """The name of an XML file's first element."""
    found = re.search(rb"<([A-Za-z_][\w.-]*)[\s>]", _mapped(path)[:4096])
    return found[1].decode() if found else None


def _only(tree: _Tree, found: list[str], what: str) -> str:
    """The only one of `found`; ConfigError if there are several."""
    if len(found) > 1:
        more = ", ..." if len(found) > 3 else ""
        raise ConfigError(
            f"{tree.folder}: several {what}: {', '.join(found[:3])}{more}: name a folder with one "
            "of them, or write a config that names files and folders (--config)"
        )
    return found[0]


# -- COCO ------------------------------------------------------------------------------------------


def _coco(tree: _Tree) -> Recognised | None:
    found = tree.of_kind("coco")
    found = [file for file in found if not _name(file).startswith(OTHER_TASKS)] or found
    if not found:
        return None
    by_role = defaultdict(list)
    for file in found:
        by_role[_role(file)].append(file)
    train = by_role["train"] or by_role[None] or by_role["val"] or by_role["test"]
    first = _only(tree, train, "annotation files that may be the training images'")
    val = [] if train is by_role["val"] else by_role["val"]
    second = _only(tree, val, "annotation files of validation images") if val else None
    parts = [_part(tree, file) for file in (first, second) if file is not None]
    kind = TOOLS.get(_name(first), "COCO's format")
    named = [
        f"{file}, images in {_shown(tree, part.images)}"
        for file, part in zip((first, second), parts, strict=False)
        if file is not None
    ]
    told = f"{tree.folder}: {kind}: " + "; validation: ".join(named)
    unused = [file for file in found if file not in (first, second)] + tree.of_kind("labelme")
    if unused:
        told += f"; not used: {', '.join(unused[:3])}"
        told += f", ... ({len(unused)})" if len(unused) > 3 else ""
    return Recognised(told, parts[0], parts[1] if len(parts) > 1 else None)


def _role(file: str) -> str | None:
    """Whether an annotation file is for training, validation or tests, by its name or folder's."""
    path = PurePosixPath(file)
    for part in (path.name.partition(".")[0], *map(str, reversed(path.parts[:-1]))):
        words = re.split(r"[^a-z]+", part.lower())
        found = [ROLES[word] for word in words if word in ROLES]
        if found:
            return found[0]
    return None


def _shown(tree: _Tree, folder: Path) -> str:
    return f"{folder.relative_to(tree.folder).as_posix()}/".replace("./", "the folder itself")


def _part(tree: _Tree, annotations: str) -> Part:
    """The COCO file with the folder in which most of the first names that it lists are found."""
    path = tree.folder / annotations
    names = list(islice(_file_names(path), SAMPLE))
    places: Counter[str] = Counter()
    elsewhere = False  # paths of another machine, which `read_coco` finds by their ends
    for name in map(_normal, names):
        forward = posixpath.normpath(name.replace("\\", "/"))
        same_name = tree.by_name.get(_name(forward), [])
        ends = [f for f in same_name if f"/{_normal(f)}".endswith(f"/{forward}")]
        depth = len(forward.split("/"))  # not its length: Unicode forms differ in that
        places.update({"/".join(file.split("/")[:-depth]) for file in ends})
        foreign = posixpath.isabs(forward) or PureWindowsPath(name).drive != "" or "\\" in name
        elsewhere |= foreign and not ends and bool(same_name)
    if places:
        beside = posixpath.dirname(annotations)

        def preference(place: str) -> tuple[int, int, bool, int]:
            shared = len(posixpath.commonprefix([place.split("/"), beside.split("/")]))
            return places[place], shared, _role(place) == _role(annotations), -len(place)

        return Part(path, tree.folder / max(sorted(places), key=preference))
    if elsewhere or not names:
        return Part(path, tree.folder)
    more = ", ..." if len(names) > 3 else ""
    raise ConfigError(
        f"{path}: none of its images is in {tree.folder}: {', '.join(names[:3])}{more}"
    )


def _file_names(path: Path) -> Iterator[str]:
    """The values of "file_name" in a JSON file, in their order."""
    for found in re.finditer(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', _mapped(path)):
        try:
            yield json.loads(found[1])
        except ValueError:
            continue


# -- exports that are converted --------------------------------------------------------------------


def _yolo(tree: _Tree) -> Recognised | None:
    files = [f for f in tree.with_suffix(".yaml", ".yml") if _is_data_yaml(tree.folder / f)]
    files = [file for file in files if _name(file) in ("data.yaml", "data.yml")] or files
    if not files:
        return None
    file = _only(tree, files, "data.yaml of YOLO")
    options = Yolo(tree.folder / file, OUT)
    images = options.data.images
    first = next(part for part in PARTS if part in images)
    train = replace(options, part=first)
    counts = f"{len(images[first])} images of {first}"
    told = f"{tree.folder}: YOLO: {file}: {len(options.data.names)} classes, {counts}"
    unused = [part for part in images if part not in (first, "val")]
    val = None
    if first == "train" and "val" in images:
        if set(images["train"]).isdisjoint(images["val"]):
            val = replace(options, part="val")
            told += f", {len(images['val'])} of val"
        else:  # such as both the same folder
            told += ", val has images of train, and is divided anew"
    told += f"; not used: {', '.join(unused)}" if unused else ""
    told += "".join(f"; {why}" for why in options.data.absent.values())
    return Recognised(told, export=train, val_export=val)


def _is_data_yaml(path: Path) -> bool:
    """Whether a YAML file has the keys of a data set of YOLO."""
    text = _mapped(path)[:1_000_000]
    return all(
        re.search(rb"^(" + keys + rb")\s*:", text, re.MULTILINE)
        for keys in (b"names|nc", b"train|val|test")
    )


def _labelme(tree: _Tree) -> Recognised | None:
    files = tree.of_kind("labelme")
    if not files:
        return None
    told = f"{tree.folder}: labelme: {len(files)} JSON files"
    return Recognised(told, export=Labelme(tree.folder, OUT, skip=("__ignore__",)))


def _via(tree: _Tree) -> Recognised | None:
    """One JSON file, or one for training and one for validation."""
    found = tree.of_kind("via")
    if not found:
        return None
    by_role = defaultdict(list)
    for file in found:
        by_role[_role(file)].append(file)
    train = by_role["train"] or by_role[None] or by_role["val"] or by_role["test"]
    first = _only(tree, train, "JSON files of VIA that may be the training images'")
    told, val = f"{tree.folder}: VIA: {first}", None
    if by_role["val"] and train is not by_role["val"]:
        second = _only(tree, by_role["val"], "JSON files of VIA of validation images")
        told += f"; validation: {second}"
        val = Via(tree.folder / second, OUT, images=tree.folder)
    return Recognised(
        told, export=Via(tree.folder / first, OUT, images=tree.folder), val_export=val
    )


def _label_studio(tree: _Tree) -> Recognised | None:
    files = tree.of_kind("label_studio")
    if not files:
        return None
    file = _only(tree, files, "JSON files of Label Studio")
    return Recognised(
        f"{tree.folder}: Label Studio: {file}",
        export=LabelStudio(tree.folder / file, OUT, images=tree.folder),
    )


def _cvat(tree: _Tree) -> Recognised | None:
    files = [file for file in tree.with_suffix(".xml") if _name(file) == "annotations.xml"]
    files = [file for file in files if _xml_root(tree.folder / file) == "annotations"]
    if not files:
        return None
    file = _only(tree, files, "annotations.xml of CVAT")
    return Recognised(
        f"{tree.folder}: CVAT for images: {file}", export=Cvat((tree.folder / file).parent, OUT)
    )


def _voc(tree: _Tree) -> Recognised | None:
    xmls = [f for f in tree.with_suffix(".xml") if _xml_root(tree.folder / f) == "annotation"]
    objects = [f for f in tree.with_suffix(".png") if "SegmentationObject" in f.split("/")[:-1]]
    if not xmls and not objects:
        return None
    roots = set()
    for file in (*xmls, *objects):
        parts = file.split("/")[:-1]
        named = [i for i, p in enumerate(parts) if p in ("Annotations", "SegmentationObject")]
        roots.add("/".join(parts[: named[0]] if named else []))
    root = _only(tree, sorted(roots), "data sets in Pascal VOC's format")
    told = f"{tree.folder}: Pascal VOC: {len(xmls)} XML files, {len(objects)} of masks"
    return Recognised(told, export=Voc(tree.folder / root, OUT))


def _masks(tree: _Tree) -> Recognised | None:
    """Folders whose name holds "mask", with an image for each mask or folder of masks."""
    inside = defaultdict(list)  # folder of masks -> its files, relative to it
    others = []
    for file in tree.images:
        parts = file.split("/")
        place = next((i for i, part in enumerate(parts[:-1]) if "mask" in part.lower()), None)
        if place is None:
            others.append(file)
        elif PurePosixPath(file).suffix.lower() in MASK_SUFFIXES:
            inside["/".join(parts[: place + 1])].append("/".join(parts[place + 1 :]))
    if not inside or not others:
        return None
    stems = {PurePosixPath(file).stem for file in others}
    if all(_name(folder) == "masks" for folder in inside) and len(inside) > 1:
        # x/images/x.png with x/masks/1.png, or images/ and masks/ in folders for each split.
        masks, images = "", ""
        files = [posixpath.join(folder[:-5], file) for folder in inside for file in inside[folder]]
    else:
        masks = _only(tree, sorted(inside), "folders of masks")
        images = posixpath.commonpath([posixpath.dirname(file) for file in others])
        files = inside[masks]
    layout = _layout(files, stems)
    if layout is None:
        return None
    depth = {"image": 0, "name": 0, "folder": 1}[layout]
    alone = masks == "" or all(file.count("/") == depth for file in files)
    export = Masks(
        tree.folder / masks,
        OUT,
        images=tree.folder / images,
        layout=layout,
        class_name=CLASS if alone else None,
    )
    each = "one object per value" if layout == "image" else "one object per file"
    classes = f"all of one class, {CLASS}" if alone else "classes by the names of folders"
    where = f"{masks}/" if masks else "masks/ folders"
    told = f"{tree.folder}: masks: {len(files)} files in {where}, {each}, {classes}"
    return Recognised(told, export=export)


def _layout(files: list[str], stems: set[str]) -> Literal["image", "folder", "name"] | None:
    """How masks name their images: the first way by which most of the first files do."""
    sample = list(map(PurePosixPath, files[:SAMPLE]))
    fits: dict[Literal["image", "folder", "name"], int] = {
        "image": sum(without_mask(file.stem) in stems or file.stem in stems for file in sample),
        "folder": sum(not stems.isdisjoint(file.parts[:-1]) for file in sample),
        "name": sum(
            any(file.stem[:i] in stems for i, c in enumerate(file.stem) if c == "_")
            for file in sample
        ),
    }
    return next((layout for layout, count in fits.items() if 2 * count > len(sample)), None)
