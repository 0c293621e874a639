"""What `predict` found, as the annotations of the next data set."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import UInt8
from pycocotools import mask as rle_ops

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.records import coco_annotation
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.inference.annotations import data_yaml, yolo_lines
from mrcnn_jax.inference.results import Detections
from mrcnn_jax.output import part_folder, write_file
from mrcnn_jax.pixels.encode import write_image
from mrcnn_jax.pixels.headers import SUFFIXES, VIDEO_SUFFIXES, suffix_of
from mrcnn_jax.pixels.places import box_area, far, mask_extent

LABELS = "labels.txt"  # all classes, in their order: labelme takes it as --labels
Format = Literal["labelme", "yolo", "coco"]
Frame: TypeAlias = UInt8[np.ndarray, "h w 3"]


@contextmanager
def open_annotations(
    form: Format, out: Path, files: Sequence[Path], class_names: dict[int, str], report: Report
) -> Iterator[Annotations]:
    """Makes the folder of the annotations, which has its name once the block has ended.

    What else is written of the same pictures should be in place by then: a later call refuses a
    folder that is there, and is to find nothing in the way of one that was killed.

    Args:
        form: their format.
        out: the folder of all results.
        files: the images and videos that will be predicted.
        class_names: COCO id -> name, in the order of the labels.
        report: counts what is written as a box.

    Raises:
        ConfigError: there are annotations already, which may have been edited since.
    """
    folder = out / form
    if folder.exists():
        raise ConfigError(
            f"{folder}: there are annotations of an earlier call (choose another --out, or "
            "remove them)"
        )
    made = {"labelme": _Labelme, "yolo": _Yolo, "coco": _Coco}[form]
    with part_folder(folder) as part:
        yield made(folder, part, files, class_names, report)
        part.rename(folder)


class Annotations:
    """Annotations of one format in a folder of their own; `add` picture by picture, then `end`.

    Args:
        folder: theirs in the end.
        part: theirs until then, beside it, so that relative paths are the same.
        files, class_names, report: as of `open_annotations`.
    """

    def __init__(
        self,
        folder: Path,
        part: Path,
        files: Sequence[Path],
        class_names: dict[int, str],
        report: Report,
    ) -> None:
        self.folder, self._part, self._class_names, self._report = folder, part, class_names, report
        videos = {file for file in files if file.suffix.lower() in VIDEO_SUFFIXES}
        places = {os.path.abspath(file.parent) for file in files if file not in videos}
        if videos:
            places.add(os.path.abspath(folder))
        self._images = Path(os.path.relpath(os.path.commonpath(places)))
        """The folder that all images and frames are in."""

    def add(self, name: str, file: Path, frame: Frame | None, found: Detections) -> None:
        """Writes the annotations of a picture.

        Args:
            name: of the picture among all, without a suffix.
            file: the image or video.
            frame: RGB pixels of a frame of the video; None of an image.
            found: the objects to write.
        """
        raise NotImplementedError

    def end(self) -> str:
        """Writes what is of all pictures together; returns a line for people."""
        raise NotImplementedError

    def _file_of(self, name: str, file: Path, frame: Frame | None) -> Path:
        """The file of a picture; that of a frame is written."""
        if frame is None:
            return file
        write_image(self._part / f"{name}.png", frame)
        return self._part / f"{name}.png"

    def _tell_boxes(self, name: str, found: Detections) -> None:
        for row, rle in enumerate(found.rles(), 1):
            if rle is None or not rle_ops.area(rle):
                self._report.add(Reason.FOUND_BOX, f"{name}: {row}")


class _Labelme(Annotations):
    def add(self, name: str, file: Path, frame: Frame | None, found: Detections) -> None:
        image = self._file_of(name, file, frame)
        found.to_labelme(self._part / f"{name}.json", image)
        self._tell_boxes(name, found)

    def end(self) -> str:
        # As --categories takes them: each once, without outer spaces.
        names = dict.fromkeys(name.strip() for name in self._class_names.values())
        write_file(self._part / LABELS, "".join(f"{name}\n" for name in names))
        again = cli.command(
            *("convert", "labelme", self.folder, "--images", self._images),
            *("--categories", self.folder / LABELS, "--out", self.folder.with_suffix(".json")),
        )
        return f"annotations for labelme: {self.folder}; once corrected: {again}"


class _Yolo(Annotations):
    def add(self, name: str, file: Path, frame: Frame | None, found: Detections) -> None:
        images, labels = self._part / "images", self._part / "labels"
        for folder in (images, labels):
            folder.mkdir(exist_ok=True)
        if frame is None:
            # Without an image's suffix nobody takes it for one.
            suffix = file.suffix if file.suffix.lower() in SUFFIXES else suffix_of(file)
            shutil.copyfile(file, images / f"{name}{suffix}")
        else:
            write_image(images / f"{name}.png", frame)
        classes = (found.labels - 1).tolist()
        corners = found.masks is not None
        lines = yolo_lines(found.size, classes, found.boxes, found.rles(), corners=corners)
        write_file(labels / f"{name}.txt", "".join(f"{line}\n" for line in lines))
        self._tell_boxes(name, found)

    def end(self) -> str:
        write_file(self._part / "data.yaml", data_yaml(list(self._class_names.values())))
        again = cli.command(
            "convert", "yolo", self.folder, "--out", self.folder.with_suffix(".json")
        )
        return f"YOLO's data set: {self.folder}; once corrected: {again}"


class _Coco(Annotations):
    """The annotations grow in the file; only the images are kept until the end."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._stream = (self._part / "annotations.json").open("w")
        self._stream.write('{"annotations": [')
        self._count = 0
        self._listed: list[dict[str, Any]] = []

    def add(self, name: str, file: Path, frame: Frame | None, found: Detections) -> None:
        image = self._file_of(name, file, frame)
        image = image if frame is None else self.folder / image.name
        file_name = os.path.relpath(image, self._images).replace(os.sep, "/")
        number, (height, width) = len(self._listed) + 1, found.size
        size = {"height": height, "width": width}
        self._listed.append({"id": number, "file_name": file_name, **size})
        for result, box in zip(found.to_coco(number), found.boxes.tolist(), strict=True):
            rle = result.get("segmentation")
            area = float(rle_ops.area(rle)) if rle else 0.0
            rle, area = (rle, area) if area else (None, box_area(tuple(box)))
            extent = mask_extent(rle)
            # A mask that fills little of its box would be taken for one of another object.
            place = tuple(box) if extent is None or not far(tuple(box), extent) else extent
            annotation = coco_annotation(
                self._count + 1, number, result["category_id"], place, area, False, rle
            )
            scores = {name: result[name] for name in ("score", "mask_score") if name in result}
            text = json.dumps(annotation | scores)
            self._stream.write((",\n" if self._count else "\n") + text)
            self._count += 1
        self._tell_boxes(name, found)

    def end(self) -> str:
        categories = [{"id": key, "name": name} for key, name in self._class_names.items()]
        rest = {"images": self._listed, "categories": categories}
        self._stream.write(f"],\n{json.dumps(rest)[1:]}\n")
        self._stream.close()
        path = self.folder / "annotations.json"
        again = cli.command("check", "--annotations", path, "--images", self._images)
        return f"COCO's annotations: {path}; once corrected: {again}"
