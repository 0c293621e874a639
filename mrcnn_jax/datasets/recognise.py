"""Recognises how a folder keeps its images and annotations, by what is in it.

Files are told by their names and by keys that occur in them: no annotation is parsed here. The
images of a COCO file are where the first names that it lists are found.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.convert.common import Options
from mrcnn_jax.convert.cvat import Cvat
from mrcnn_jax.convert.datumaro import Datumaro
from mrcnn_jax.convert.label_studio import LabelStudio
from mrcnn_jax.convert.labelme import Labelme
from mrcnn_jax.convert.mask_images import LOSSY, Masks, image_stems, plain_stems
from mrcnn_jax.convert.mask_images import SUFFIXES as MASK_SUFFIXES
from mrcnn_jax.convert.supervisely import Supervisely
from mrcnn_jax.convert.via import Via, is_csv
from mrcnn_jax.convert.voc import Voc, is_mask
from mrcnn_jax.convert.yolo import PARTS, Yolo, missing_yaml
from mrcnn_jax.data.names import ROLES, role
from mrcnn_jax.data.other_formats import NOT_VIA3
from mrcnn_jax.data.split import Part
from mrcnn_jax.datasets.coco_images import SAMPLE, coco_part
from mrcnn_jax.datasets.tree import Tree, base_name, is_inside, mapped, parent, walk, xml_root
from mrcnn_jax.output import listed

LOOKED_FOR = (
    "COCO's JSON (of Roboflow, CVAT and Label Studio, too), YOLO's data.yaml, JSON of labelme, "
    "VIA (or its CSV), Label Studio, Supervisely and Datumaro, CVAT's annotations.xml, Pascal "
    "VOC's XML or SegmentationObject/, and folders of masks"
)
# Files of COCO 2017 that annotate something else.
OTHER_TASKS = ("captions", "person_keypoints", "panoptic", "stuff", "image_info")
TOOLS = {
    "_annotations.coco.json": "Roboflow's COCO export",
    "instances_default.json": "CVAT's COCO export",
    "result.json": "Label Studio's COCO export",
}
CLASS = "object"  # of masks whose files and folders name none
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
    tree = Tree(folder, tuple(walk(folder, without)))
    looks = (_coco, _yolo, _labelme, _via, _label_studio, _supervisely, _datumaro)
    for look in (*looks, _cvat, _voc, _masks):
        found = look(tree)
        if found is not None:
            return found
    kinds = Counter(PurePosixPath(file).suffix.lower() or "without suffix" for file in tree.files)
    there = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "no file"
    what = _masks_without_images(tree)
    lossy = [file for file in tree.with_suffix(*LOSSY) if "mask" in parent(file).lower()]
    if lossy:
        what += f"{lossy[0]} is in a format that changes values, no mask (PNG, TIFF, BMP, GIF); "
    what += "".join(f"{file}: {NOT_VIA3}; " for file in tree.of_kind("via3")[:1])
    classes = [parent(file) for file in tree.files if base_name(file) == "classes.txt"]
    roots = [parent(place) if base_name(place) == "labels" else place for place in classes]
    way = next(filter(None, (missing_yaml(folder / root) for root in roots)), "")
    raise ConfigError(f"{folder}: {what}looked for {LOOKED_FOR}; found {there}{way}")


# -- COCO ------------------------------------------------------------------------------------------


def _coco(tree: Tree) -> Recognised | None:
    found = tree.of_kind("coco")
    found = [file for file in found if not base_name(file).startswith(OTHER_TASKS)] or found
    if not found:
        return None
    by_role = defaultdict(list)
    for file in found:
        by_role[role(file)].append(file)
    train = by_role["train"] or by_role[None] or by_role["val"] or by_role["test"]
    first = tree.only(train, "annotation files that may be the training images'")
    val = [] if train is by_role["val"] else by_role["val"]
    second = tree.only(val, "annotation files of validation images") if val else None
    parts = [coco_part(tree, file) for file in (first, second) if file is not None]
    kind = TOOLS.get(base_name(first), "COCO's format")
    named = [
        f"{file}, images in {_shown(tree, part.images)}"
        for file, part in zip((first, second), parts, strict=False)
        if file is not None
    ]
    told = f"{tree.folder}: {kind}: " + "; validation: ".join(named)
    unused = [file for file in found if file not in (first, second)]
    unused += [file for file, kind in tree.jsons.items() if kind != "coco"]
    if unused:
        told += f"; not used: {listed(unused)}"
    return Recognised(told, parts[0], parts[1] if len(parts) > 1 else None)


def _shown(tree: Tree, folder: Path) -> str:
    return f"{folder.relative_to(tree.folder).as_posix()}/".replace("./", "the folder itself")


# -- exports that are converted --------------------------------------------------------------------


def _yolo(tree: Tree) -> Recognised | None:
    files = [f for f in tree.with_suffix(".yaml", ".yml") if _is_data_yaml(tree.folder / f)]
    files = [file for file in files if base_name(file) in ("data.yaml", "data.yml")] or files
    if not files:
        return None
    file = tree.only(files, "data.yaml of YOLO")
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
            if alone := len(set(images["val"]) - set(images["train"])):
                told += f"; {alone} images of val alone are not used"
    told += f"; not used: {', '.join(unused)}" if unused else ""
    told += "".join(f"; {why}" for why in options.data.absent.values())
    return Recognised(told, export=train, val_export=val)


def _is_data_yaml(path: Path) -> bool:
    """Whether a YAML file has the keys of a data set of YOLO."""
    text = mapped(path)[:1_000_000]
    return all(
        re.search(rb"^(" + keys + rb")\s*:", text, re.MULTILINE)
        for keys in (b"names|nc", b"(?i:" + "|".join(ROLES).encode() + b")")
    )


def _labelme(tree: Tree) -> Recognised | None:
    files = tree.of_kind("labelme")
    if not files:
        return None
    told = f"{tree.folder}: labelme: {len(files)} JSON files"
    return Recognised(told, export=Labelme(tree.folder, OUT, skip=("__ignore__",)))


def _via(tree: Tree) -> Recognised | None:
    """One file, or one for training and one for validation."""
    found = tree.of_kind("via")
    found = found or [file for file in tree.with_suffix(".csv") if is_csv(tree.folder / file)]
    return _of_files(tree, found, "VIA", lambda path: Via(path, OUT, images=tree.folder))


def _datumaro(tree: Tree) -> Recognised | None:
    """One subset, or one for training and one for validation."""
    found = tree.of_kind("datumaro")
    return _of_files(tree, found, "Datumaro", lambda path: Datumaro(path, OUT, images=tree.folder))


def _of_files(
    tree: Tree, found: list[str], tool: str, options: Callable[[Path], Options]
) -> Recognised | None:
    """The export of a tool that writes a file, or one for training and one for validation.

    `options` are those of a file; both must have the same images folder.
    """
    if not found:
        return None
    by_role = defaultdict(list)
    for file in found:
        by_role[role(file)].append(file)
    train = by_role["train"] or by_role[None] or by_role["val"] or by_role["test"]
    first = tree.only(train, f"files of {tool} that may be the training images'")
    told, used, val = f"{tree.folder}: {tool}: {first}", [first], None
    if by_role["val"] and train is not by_role["val"]:
        second = tree.only(by_role["val"], f"files of {tool} of validation images")
        told += f"; validation: {second}"
        used.append(second)
        val = options(tree.folder / second)
    unused = [file for file in found if file not in used]
    told += f"; not used: {', '.join(unused)}" if unused else ""
    return Recognised(told, export=options(tree.folder / first), val_export=val)


def _supervisely(tree: Tree) -> Recognised | None:
    """A project; if its data sets are named so, some for training and some for validation."""
    files = tree.of_kind("supervisely")
    if not files:
        return None
    metas = [parent(file) for file in tree.files if base_name(file) == "meta.json"]
    sets = list(dict.fromkeys(parent(parent(file)) for file in files))
    above = [[meta for meta in metas if is_inside(one, meta)] for one in sets]
    roots = {max(found, key=len, default="") for found in above}
    root = tree.only(sorted(roots), "projects of Supervisely")
    by_role = defaultdict(list)
    for one in sets:
        inside = posixpath.relpath(one or ".", root or ".")
        by_role[role(inside)].append(inside)
    train = by_role["train"] or by_role[None] or by_role["val"] or by_role["test"]
    val = [] if train is by_role["val"] else by_role["val"]
    unused = [one for named in by_role.values() if named not in (train, val) for one in named]
    told = f"{tree.folder}: Supervisely: {', '.join(train)}"
    told += f"; validation: {', '.join(val)}" if val else ""
    told += f"; not used: {', '.join(unused)}" if unused else ""
    parts = [Supervisely(tree.folder / root, OUT, datasets=tuple(named)) for named in (train, val)]
    return Recognised(told, export=parts[0], val_export=parts[1] if val else None)


def _label_studio(tree: Tree) -> Recognised | None:
    files = tree.of_kind("label_studio")
    if not files:
        return None
    file = tree.only(files, "JSON files of Label Studio")
    return Recognised(
        f"{tree.folder}: Label Studio: {file}",
        export=LabelStudio(tree.folder / file, OUT, images=tree.folder),
    )


def _cvat(tree: Tree) -> Recognised | None:
    files = [file for file in tree.with_suffix(".xml") if base_name(file) == "annotations.xml"]
    files = [file for file in files if xml_root(tree.folder / file) == "annotations"]
    if not files:
        return None
    file = tree.only(files, "annotations.xml of CVAT")
    export = Cvat((tree.folder / file).parent, OUT)
    return Recognised(f"{tree.folder}: CVAT for images: {file}", export=_with_images(tree, export))


def _with_images(tree: Tree, export: Options) -> Options:
    """The export with the folder that has its images: all, if that of its format has none."""
    usual = export.image_folder().relative_to(tree.folder).as_posix().removeprefix(".")
    there = (file for file in tree.images if is_inside(file, usual))
    has_any = any(not is_mask(PurePosixPath(file)) for file in there)
    return export if has_any else replace(export, images=tree.folder)


def _voc(tree: Tree) -> Recognised | None:
    xmls = [f for f in tree.with_suffix(".xml") if xml_root(tree.folder / f) == "annotation"]
    objects = [f for f in tree.with_suffix(".png") if "SegmentationObject" in f.split("/")[:-1]]
    if not xmls and not objects:
        return None
    roots = set()
    for file in (*xmls, *objects):
        parts = file.split("/")[:-1]
        named = [i for i, p in enumerate(parts) if p in ("Annotations", "SegmentationObject")]
        roots.add("/".join(parts[: named[0]] if named else []))
    root = tree.only(sorted(roots), "data sets in Pascal VOC's format")
    told = f"{tree.folder}: Pascal VOC: {len(xmls)} XML files, {len(objects)} of masks"
    return Recognised(told, export=_with_images(tree, Voc(tree.folder / root, OUT)))


def _masks(tree: Tree) -> Recognised | None:
    """Folders whose name holds "mask", with an image for each mask or folder of masks."""
    inside, others = _mask_folders(tree)
    if not inside or not others:
        return None
    stems = {PurePosixPath(file).stem for file in others}
    if all(base_name(folder) == "masks" for folder in inside) and len(inside) > 1:
        # x/images/x.png with x/masks/1.png, or images/ and masks/ in folders for each split.
        masks, images = "", ""
        files = [posixpath.join(folder[:-5], file) for folder in inside for file in inside[folder]]
    else:
        masks = tree.only(sorted(inside), "folders of masks")
        images = posixpath.commonpath([posixpath.dirname(file) for file in others])
        files = inside[masks]
    layout = _layout(files, stems)
    if layout is None:
        return None
    depth = {"image": 0, "name": 0, "folder": 1}[layout]
    folders = {tuple(file.split("/")[:-1][: -depth or None]) for file in files}
    alone = masks == "" or all(
        part.lower() in ROLES or part == "masks" for place in folders for part in place
    )
    export = Masks(
        tree.folder / masks,
        OUT,
        images=tree.folder / images,
        layout=layout,
        class_name=CLASS if alone else None,
    )
    each = "one object per file"
    if layout == "image":
        each = "one object per value, or per part where most values have several"
    classes = f"all of one class, {CLASS}" if alone else "classes by the names of folders"
    where = f"{masks}/" if masks else "masks/ folders"
    told = f"{tree.folder}: masks: {len(files)} files in {where}, {each}, {classes}"
    return Recognised(told, export=export)


def _mask_folders(tree: Tree) -> tuple[dict[str, list[str]], list[str]]:
    """The files of each folder of masks, relative to it; and all other images."""
    inside, others = defaultdict(list), []
    for file in tree.images:
        parts = file.split("/")
        place = next((i for i, part in enumerate(parts[:-1]) if "mask" in part.lower()), None)
        if place is None:
            others.append(file)
        elif PurePosixPath(file).suffix.lower() in MASK_SUFFIXES:
            inside["/".join(parts[: place + 1])].append("/".join(parts[place + 1 :]))
    return inside, others


def _masks_without_images(tree: Tree) -> str:
    """What hinders the use of masks that are there, for a message; "" if there are none."""
    inside, others = _mask_folders(tree)
    stems = {PurePosixPath(file).stem for file in others}
    alone = (
        f"{folder}/{file}"
        for folder, files in sorted(inside.items())
        for file in files
        if stems.isdisjoint(image_stems(PurePosixPath(file).stem))
    )
    if first := next(alone, None):
        ways = cli.command("convert", "masks", "--help")
        return f"{first}: a mask, but no image has its name ({ways} says how masks are named); "
    if named := [file for file in others if re.search(r"[_-]masks?\.", base_name(file).lower())]:
        return f"{named[0]} beside images: put masks into a folder of their own, named masks; "
    return ""


def _layout(files: list[str], stems: set[str]) -> Literal["image", "folder", "name"] | None:
    """How masks name their images: the first way by which most of the first files do.

    In a folder for each image the masks may have numbers, as the images do: 2.png in 1/ is of image
    1, so folders come first where masks in them have other names. The names of `image_stems` that
    are not plain come last: 1/mask_1.png is of image 1, too.
    """
    sample = list(map(PurePosixPath, files[:SAMPLE]))
    in_folders = [file for file in sample if not stems.isdisjoint(file.parts[:-1])]
    others = any(file.parts[-2] not in plain_stems(file.stem) for file in in_folders)
    if others and 2 * len(in_folders) > len(sample):
        return "folder"
    fits: tuple[tuple[Literal["image", "folder", "name"], int], ...] = (
        ("image", sum(not stems.isdisjoint(plain_stems(file.stem)) for file in sample)),
        ("folder", len(in_folders)),
        (
            "name",
            sum(
                any(file.stem[:i] in stems for i, c in enumerate(file.stem) if c == "_")
                for file in sample
            ),
        ),
        ("image", sum(not stems.isdisjoint(image_stems(file.stem)) for file in sample)),
    )
    return next((layout for layout, count in fits if 2 * count > len(sample)), None)
