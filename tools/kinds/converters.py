"""Exports of annotation tools, one file of which is damaged or written as other people's tools do.

After a known change the objects are those of the whole export, or it is refused, or the converter
prints more than for the whole one. After random damage that holds for the images of other files.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.convert.common import Options
from mrcnn_jax.convert.cvat import Cvat
from mrcnn_jax.convert.labelme import Labelme
from mrcnn_jax.convert.mask_images import Masks
from mrcnn_jax.convert.voc import Voc
from mrcnn_jax.convert.write import convert
from tools.kinds.mutations import HEIGHT, WIDTH, WrongError, mutated_bytes, one_line

FORMATS = ("labelme", "cvat", "voc", "masks")
BOXES = ((5, 6, 25, 30), (30, 8, 55, 40))  # of a cat and a dog, in each of three images
STEMS = ("a", "b", "c")
XML = '<?xml version="1.0" encoding="utf-8"?>'
Objects = dict[str, list[tuple[str, tuple[float, ...]]]]  # image -> its objects


@dataclass(frozen=True)
class Case:
    format: str
    damage: str
    seed: int

    @property
    def content(self) -> bytes:
        return repr(self).encode()


# -- whole exports ---------------------------------------------------------------------------------


def _corners(box: tuple[int, ...]) -> list[tuple[int, int]]:
    x1, y1, x2, y2 = box
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]


def write_export(form: str, folder: Path) -> Options:
    """Writes a whole export and returns the options that convert it."""
    images = folder / ("JPEGImages" if form == "voc" else "images" if form != "labelme" else "")
    images.mkdir(parents=True)
    rng = np.random.default_rng(2)
    for stem in STEMS:
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{stem}.png")
    out = folder.parent / "converted.json"
    named = list(zip(("cat", "dog"), BOXES, strict=True))
    if form == "labelme":
        for stem in STEMS:
            shapes = [
                {"label": name, "points": _corners(box), "shape_type": "polygon", "group_id": None}
                for name, box in named
            ]
            content = {"imagePath": f"{stem}.png", "imageHeight": HEIGHT, "imageWidth": WIDTH}
            (folder / f"{stem}.json").write_text(json.dumps(content | {"shapes": shapes}))
        return Labelme(folder, out)
    if form == "cvat":
        shown = "".join(
            f'<image id="{i}" name="{stem}.png" width="{WIDTH}" height="{HEIGHT}">'
            + "".join(
                f'<polygon label="{name}" occluded="0" points="'
                + ";".join(f"{x}.00,{y}.00" for x, y in _corners(box))
                + '"></polygon>'
                for name, box in named
            )
            + "</image>\n"
            for i, stem in enumerate(STEMS)
        )
        text = f"<annotations><version>1.1</version>\n{shown}</annotations>\n"
        (folder / "annotations.xml").write_text(f"{XML}\n{text}")
        return Cvat(folder, out)
    if form == "voc":
        (folder / "Annotations").mkdir()
        for stem in STEMS:
            objects = "".join(
                f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin>"
                f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>\n"
                for name, (x1, y1, x2, y2) in named
            )
            (folder / "Annotations" / f"{stem}.xml").write_text(
                f"<annotation><filename>{stem}.png</filename><size><width>{WIDTH}</width>"
                f"<height>{HEIGHT}</height><depth>3</depth></size>\n{objects}</annotation>\n"
            )
        return Voc(folder, out)
    masks = folder / "masks"
    masks.mkdir()
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    for value, (_, (x1, y1, x2, y2)) in enumerate(named, 1):
        values[y1:y2, x1:x2] = value
    for stem in STEMS:
        Image.fromarray(values).save(masks / f"{stem}.png")
    (folder / "classes.json").write_text(json.dumps({"1": "cat", "2": "dog"}))
    return Masks(masks, out, images=images, classes=folder / "classes.json")


def _sources(form: str, folder: Path) -> list[Path]:
    """The files of the export that hold annotations, without images."""
    suffix = {"labelme": ".json", "cvat": ".xml", "voc": ".xml", "masks": ".png"}[form]
    inside = {"voc": "Annotations", "masks": "masks"}.get(form, "")
    return sorted(p for p in (folder / inside).iterdir() if p.suffix == suffix)


# -- known changes ---------------------------------------------------------------------------------


def _replaced(old: str, new: str, count: int = -1) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(old.encode(), new.encode(), count)


BOMB = "<!DOCTYPE x [<!ENTITY a 'aaaaaaaaaa'>" + "".join(
    f"<!ENTITY {chr(98 + i)} '{f'&{chr(97 + i)};' * 10}'>" for i in range(8)
)
CHANGES: dict[str, dict[str, Callable[[bytes], bytes]]] = {
    "labelme": {
        "a path of Windows": _replaced('"imagePath": "', r'"imagePath": "C:\\data\\'),
        "a stale name": _replaced('"imagePath": "', '"imagePath": "old_'),
        "a byte order mark": lambda content: b"\xef\xbb\xbf" + content,
        "no size": _replaced('"imageHeight": 48, "imageWidth": 64, ', ""),
        "another size": _replaced('"imageHeight": 48', '"imageHeight": 96'),
        "a shape of two points": _replaced(", [25, 30], [5, 30]]", "]"),
        "a shape without points": _replaced("[[5, 6], [25, 6], [25, 30], [5, 30]]", "[]"),
        "a flat shape": _replaced("[25, 30], [5, 30]]", "[25, 6], [5, 6]]"),
        "no label": _replaced('"label": "cat"', '"label": null'),
        "nested deeply": lambda content: b"[" * 200_000 + content,
    },
    "cvat": {
        "names without suffix": _replaced('.png"', '"'),
        "names of a folder": _replaced('name="', 'name="task/'),
        "a shape of one point": _replaced(";25.00,6.00;25.00,30.00;5.00,30.00", "", 1),
        "points of text": _replaced("5.00,6.00", "x,y", 1),
        "no size": _replaced(f' width="{WIDTH}" height="{HEIGHT}"', ""),
        "another size": _replaced(f'height="{HEIGHT}"', 'height="96"'),
        "a bomb of entities": _replaced(XML, f"{XML}\n{BOMB}]>"),
        "UTF-16": lambda content: content.decode().replace("utf-8", "utf-16").encode("utf-16"),
    },
    "voc": {
        "names without suffix": _replaced(".png<", "<"),
        "a box of no area": _replaced("<xmax>25<", "<xmax>5<"),
        "a box outside": _replaced("<xmax>55<", "<xmax>5500<"),
        "corners swapped": _replaced("<xmin>6</xmin>", "<xmin>60</xmin>"),
        "numbers of text": _replaced("<xmin>6<", "<xmin>six<"),
        "another size": _replaced(f"<height>{HEIGHT}<", "<height>96<"),
        "a bomb of entities": lambda content: f"{XML}\n{BOMB}]>".encode() + content,
    },
    "masks": {
        "another size": lambda content: _resized(content, Image.Resampling.NEAREST),
        "grey edges": lambda content: _blurred(content),
        "16 bits": lambda content: _png(_values(content).astype(np.uint16)),
        "JPEG": lambda content: _png(_values(content) * 100, "JPEG"),
    },
}


HARMLESS = {  # must be read as what they mean
    ("labelme", "a path of Windows"),
    ("labelme", "a stale name"),
    ("labelme", "a byte order mark"),
    ("labelme", "no size"),
    ("cvat", "names without suffix"),
    ("cvat", "UTF-16"),
    ("voc", "names without suffix"),
    ("masks", "16 bits"),
}


def _values(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def _png(values: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form)
    return buffer.getvalue()


def _resized(content: bytes, how: Image.Resampling) -> bytes:
    return _png(
        np.asarray(Image.fromarray(_values(content)).resize((WIDTH // 2, HEIGHT // 2), how))
    )


def _blurred(content: bytes) -> bytes:
    small = Image.fromarray(_values(content) * 120).resize((50, 40), Image.Resampling.BILINEAR)
    return _png(np.asarray(small.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)))


def case(seed: int, index: int) -> Case:
    """Case number `index`."""
    rng = np.random.default_rng((seed, 3, index))
    form = FORMATS[rng.integers(len(FORMATS))]
    names = ["random"] * len(CHANGES[form]) + list(CHANGES[form])
    return Case(form, names[rng.integers(len(names))], int(rng.integers(2**31)))


def prepare(folder: Path) -> None:
    """Nothing: each case writes its own export."""


# -- what is right ---------------------------------------------------------------------------------


def _converted(options: Options) -> tuple[Objects, str]:
    """The objects of each image in the file that is written, and what is printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        (path,) = convert(options)
    content = json.loads(path.read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    stems = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
    objects: Objects = {stem: [] for stem in stems.values()}
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        objects[stems[a["image_id"]]].append((names[a["category_id"]], (x, y, x + w, y + h)))
    return {stem: sorted(found) for stem, found in objects.items()}, printed.getvalue()


@functools.cache
def _right(form: str, folder: Path) -> tuple[Objects, str]:
    shutil.rmtree(folder / "export", ignore_errors=True)
    found, printed = _converted(write_export(form, folder / "export"))
    expected = sorted(zip(("cat", "dog"), BOXES, strict=True))
    assert all(_same(found[stem], expected) for stem in STEMS), found
    return found, printed


def _same(
    found: list[tuple[str, tuple[float, ...]]] | None,
    right: list[tuple[str, tuple[int, ...]]] | list[tuple[str, tuple[float, ...]]],
) -> bool:
    return (
        found is not None
        and len(found) == len(right)
        and all(
            a == b and np.allclose(box, expected, atol=1)
            for (a, box), (b, expected) in zip(found, right, strict=True)
        )
    )


def _told(printed: str) -> list[str]:
    """The lines of the report, without what is kept."""
    lines = printed.partition(" classes: ")[0].splitlines()[1:-1]
    return [line for line in lines if not line.startswith("kept")]


def outcome(case: Case, folder: Path) -> str:
    """How a case ends; WrongError if it ends badly."""
    right, told = _right(case.format, folder)
    shutil.rmtree(folder / "export", ignore_errors=True)
    options = write_export(case.format, folder / "export")
    rng = np.random.default_rng(case.seed)
    sources = _sources(case.format, folder / "export")
    chosen = sources if rng.random() < 0.3 else [sources[rng.integers(len(sources))]]
    for path in chosen:
        content = path.read_bytes()
        change = CHANGES[case.format].get(case.damage, lambda data: mutated_bytes(rng, data))
        path.write_bytes(change(content))
    try:
        found, printed = _converted(options)
    except ConfigError as error:
        if (case.format, case.damage) in HARMLESS:
            raise WrongError(f"{case.format}: {case.damage}: refused: {error}") from None
        return one_line(error)
    hit = {path.stem for path in chosen}
    checked = [
        stem
        for stem in STEMS
        if case.damage != "random" or (case.format != "cvat" and stem not in hit)
    ]
    wrong = [stem for stem in checked if not _same(found.get(stem), right[stem])]
    if not wrong:
        return "right"
    if _told(printed) != _told(told):
        return "told"
    raise WrongError(
        f"{case.format}: {case.damage}: image {wrong[0]}: {found.get(wrong[0])} instead of "
        f"{right[wrong[0]]}, and nothing tells"
    )
