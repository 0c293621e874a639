"""Names a file that is given where a COCO file is expected, and the command that converts it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mrcnn_jax import cli
from mrcnn_jax.pixels.headers import VIDEO_SUFFIXES

HEAD = 4096  # bytes that tell a format
VIA3 = frozenset(("project", "config", "file", "metadata", "view"))  # keys of its projects
NOT_VIA3 = "VIA 3's: not read (VIA 1 and 2 are)"


def other_format(path: Path, content: dict[str, Any] | None = None) -> str | None:
    """Says what a file is that is no COCO file.

    Args:
        path: the file.
        content: the JSON object in it, if it is one.

    Returns:
        What it is, and what to do; None if it is not known.
    """
    if content is not None:
        return _of_json(content, path)
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return "a video, which predict takes"
    if not path.is_file():  # opening a pipe that nobody writes to would never end
        return None
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return None
    if head.startswith(b"PK\3\4"):
        return "a zip archive: unpack it and name the file in it"
    text = head.decode(errors="replace").lstrip("\ufeff \r\n\t")
    root = re.search(r"<([A-Za-z_][\w.-]*)[\s>]", text)
    if text.startswith("<") and root is not None:
        return _of_xml(root[1], path)
    if text.startswith("[") and '"annotations"' in text and '"images"' not in text:
        return f"Label Studio's: {_convert('label-studio', path)}"
    if suffix == ".csv" and "region_shape_attributes" in text.partition("\n")[0]:
        return f"VIA's: {_convert('via', path)}"
    if suffix in (".yaml", ".yml") and re.search(r"^(names|nc)\s*:", text, re.MULTILINE):
        return f"YOLO's: {_convert('yolo', path)}"
    if re.match(r"\d+( +-?[\d.]+){4,} *(\r?\n|$)", text):
        return f"labels of YOLO's: {_convert('yolo', _with_data_yaml(path))}"
    return None


def _with_data_yaml(path: Path) -> Path:
    """The folder above a file, of at most three, that has a data.yaml, else the nearest."""
    above = [*path.parents][:3]
    return next((folder for folder in above if (folder / "data.yaml").is_file()), above[0])


def _project(path: Path) -> Path:
    """The folder of Supervisely's project: above that of the data set, if it has a meta.json."""
    dataset = path.parent.parent
    return dataset.parent if (dataset.parent / "meta.json").is_file() else dataset


def _of_json(content: dict[str, Any], path: Path) -> str | None:
    if "shapes" in content and "imagePath" in content:
        return f"labelme's: {_convert('labelme', path.parent)}"
    if content.keys() >= VIA3:
        return NOT_VIA3
    entries = content.get("_via_img_metadata", content)
    if isinstance(entries, dict) and any(
        isinstance(entry, dict) and "regions" in entry for entry in entries.values()
    ):
        return f"VIA's: {_convert('via', path)}"
    if "objects" in content and "size" in content:
        return f"Supervisely's: {_convert('supervisely', _project(path))}"
    if "items" in content and "categories" in content:
        return f"Datumaro's: {_convert('datumaro', path)}"
    return None


def _of_xml(root: str, path: Path) -> str | None:
    if root == "annotations":
        return f"CVAT's: {_convert('cvat', path.parent)}"
    if root == "annotation":
        folder = path.parent.parent if path.parent.name == "Annotations" else path.parent
        return f"Pascal VOC's: {_convert('voc', folder)}"
    return None


def _convert(name: str, folder: Path) -> str:
    return cli.command("convert", name, folder, "--out", "annotations.json")
