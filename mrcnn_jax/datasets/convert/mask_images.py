"""Folders of instance masks: label images (PNG, also TIFF, BMP, GIF) of the size of their image, 0
where nothing is.

`--layout image`: a file an image, named as it is, with a value (or colour) an instance:
masks/x.png. `--layout folder`: a folder an image, with a file an instance: masks/x/1.png.
`--layout name`: a file an instance, named image_instance: masks/x_1.png.

The class is `--class-name`; or what `--classes`, a JSON file, says of the mask's relative path or
of the value; or the name of a folder: masks/cat/x.png, masks/cat/x/1.png, masks/x/cat/1.png,
masks/cat/x_1.png. Folders named "masks" count for nothing, so that x/images/x.png with
x/masks/1.png is read too (INPUT and --images are then the same folder).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.report import Report
from mrcnn_jax.datasets.convert.common import (
    ImageFolder,
    Options,
    Patch,
    Picture,
    Shape,
    files_in,
    instances,
    read_json,
    read_labels,
)
from mrcnn_jax.datasets.convert.voc import value_name

SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")


@dataclass(frozen=True)
class Masks(Options):
    """A folder of instance masks, PNG; the images are in --images."""

    layout: Literal["image", "folder", "name"] = "image"
    """image: x.png holds all instances of image x, a value each; folder: x/1.png; name: x_1.png."""
    class_name: str | None = None
    """The class of all instances. By default, the name of a folder."""
    classes: Path | None = None
    """A JSON file with the classes: {"x.png": "cat"}, {"x.png": {"1": "cat", "2": "dog"}}, or for
    all files {"1": "cat"}; a colour is "#ff0000"."""

    def image_folder(self) -> Path:
        raise ConfigError("--images: the folder of the images is needed")

    def open_images(self) -> ImageFolder:
        folder = self.images or self.image_folder()
        inside = self.input.resolve() != folder.resolve() and self.input.resolve().is_relative_to(
            folder.resolve()
        )

        def is_mask(file: Path) -> bool:
            return (
                inside and file.resolve().is_relative_to(self.input.resolve())
            ) or "masks" in file.relative_to(folder).parts[:-1]

        return ImageFolder(folder, without=is_mask)

    def pictures(self, images: ImageFolder, report: Report) -> Iterator[Picture]:
        del report  # nothing is lost here
        if not self.input.is_dir():
            raise ConfigError(f"{self.input}: no such folder")
        files = files_in(self.input, SUFFIXES)
        if self.input.resolve() == images.folder.resolve():
            files = [file for file in files if "masks" in file.relative_to(self.input).parts[:-1]]
        if not files:
            raise ConfigError(f"{self.input}: no masks in this folder (PNG, TIFF, BMP or GIF)")
        classes = read_json(self.classes) if self.classes is not None else {}
        by_image: dict[str, list[tuple[Path, str | None]]] = defaultdict(list)
        orphans = []
        for file in files:
            image, class_name = self._owner(file.relative_to(self.input).with_suffix(""), images)
            if image is None:
                orphans.append(file)
            else:
                by_image[image].append((file, self.class_name or class_name))
        if not by_image:
            raise ConfigError(
                f"{files[0]}: no image of that name in {images.folder}: --layout is {self.layout}, "
                "which may be image (x.png), folder (x/1.png) or name (x_1.png)"
            )
        for file in orphans:
            yield Picture(
                str(file),
                str(file.relative_to(self.input)),
                (),
                str(file.relative_to(self.input).with_suffix("")),
                None,
                (),
            )
        for image, its in sorted(by_image.items()):
            yield self._picture(image, its, classes)

    def _owner(self, path: Path, images: ImageFolder) -> tuple[str | None, str | None]:
        """The image of the mask with this relative path (without suffix), if there is one, and the
        folder that may be its class."""
        parts = [*(part for part in path.parts[:-1] if part != "masks"), path.name]
        folders, stem = parts[:-1], parts[-1]
        if self.layout == "folder":
            image = images.with_stem("/".join(folders)) if folders else None
            if image is not None:
                return image, None
            found = [
                (image, i)
                for i, name in enumerate(folders)
                if (image := images.with_stem(name)) is not None
            ]
            if len(found) > 1:
                raise ConfigError(
                    f"{self.input / path.parent}: both {found[0][0]} and {found[1][0]} may be the image of these masks"
                )
            return next(
                (
                    (image, next(iter([*folders[i + 1 :], *reversed(folders[:i])]), None))
                    for image, i in found
                ),
                (None, None),
            )
        stems = (
            [stem]
            if self.layout == "image"
            else [stem[:i] for i in range(len(stem) - 1, 0, -1) if stem[i] == "_"]
        )
        class_name = folders[-1] if folders else None
        keys = (key for name in stems for key in ("/".join([*folders, name]), name))
        return next(
            (image for key in keys if (image := images.with_stem(key)) is not None), None
        ), class_name

    def _picture(
        self, image: str, files: list[tuple[Path, str | None]], classes: dict[str, Any]
    ) -> Picture:
        size: tuple[int, ...] | None = None
        shapes = []
        for file, class_name in files:
            values = read_labels(file)
            if size not in (None, values.shape):
                raise ConfigError(
                    f"{file}: it is {values.shape[0]} x {values.shape[1]}, another mask of {image} is {size[0]} x {size[1]}"
                )  # type: ignore[index]
            size = values.shape
            found = list(instances(values))
            if self.layout != "image":
                if len(found) > 1:
                    raise ConfigError(
                        f"{file}: {len(found)} values besides 0, but it is to hold one instance (--layout {self.layout}); "
                        "--layout image takes a value for an instance"
                    )
                found = found or [
                    (1, Patch(np.zeros((1, 1), bool)))
                ]  # one without a pixel, which will be reported
            name = file.relative_to(self.input).as_posix()
            for value, patch in found:
                label = (
                    class_name
                    if self.class_name is not None
                    else _class(classes, name, value_name(value)) or class_name
                )
                if label is None:
                    given = (
                        f"{self.classes} has none"
                        if self.classes is not None
                        else "--class-name, --classes or a folder of that name"
                    )
                    raise ConfigError(
                        f"{file}: value {value_name(value)}: which class is it? ({given})"
                    )
                shapes.append(Shape(f"{name} value {value_name(value)}", label, patch=patch))
        return Picture(str(files[0][0]), image, (image,), None, size, shapes)  # type: ignore[arg-type]


def _class(classes: dict[str, Any], name: str, value: str) -> str | None:
    """What the JSON file says of a value of a mask, named with or without its suffix."""
    of_file = classes.get(name, classes.get(str(Path(name).with_suffix("").as_posix())))
    if isinstance(of_file, dict):
        of_file = of_file.get(value)
    found = of_file if of_file is not None else classes.get(value)
    if found is not None and not isinstance(found, str):
        raise ConfigError(
            f"--classes: the class of {name}, value {value}, is {found!r}, which is no name"
        )
    return found
