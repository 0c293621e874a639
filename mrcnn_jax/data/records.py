"""The data set in memory: immutable categories, images and annotations."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.output import listed
from mrcnn_jax.pixels.depth_statistics import DepthSummary
from mrcnn_jax.pixels.places import RLE, Box

LOST_IMAGES = 0.01  # share of the images that may be missing or unreadable


@dataclass(frozen=True)
class Category:
    id: int
    name: str


@dataclass(frozen=True)
class ObjectRecord:
    """One annotation.

    `box` is in original pixels, clipped to the image. `area` is as annotated where that can be,
    since COCO's size classes are defined by it.
    """

    annotation_id: int
    label: int  # 1..K
    box: Box
    rle: RLE | None
    iscrowd: bool
    area: float


@dataclass(frozen=True)
class ImageRecord:
    """One image; `file_name` is spelled as in the image folder."""

    id: int
    file_name: str
    height: int
    width: int
    annotations: tuple[ObjectRecord, ...]
    """Objects and crowds, in the order of the file."""
    upright: bool = False
    """The file's pixels are to be turned as its EXIF orientation says."""
    depth_file: str | None = None
    """Its depth map, relative to the image folder; None: there is none, or it is not read."""

    @property
    def objects(self) -> tuple[ObjectRecord, ...]:
        """The annotations that are trained on and found: without crowds."""
        return tuple(record for record in self.annotations if not record.iscrowd)

    @property
    def crowds(self) -> tuple[ObjectRecord, ...]:
        """The regions to ignore."""
        return tuple(record for record in self.annotations if record.iscrowd)

    @property
    def labels(self) -> set[int]:
        """Of its objects."""
        return {record.label for record in self.objects}

    @property
    def has_mask(self) -> bool:
        """Whether any object has a mask, not only a box."""
        return any(record.rle is not None for record in self.objects)


@dataclass(frozen=True)
class CocoDataset:
    """Checked images in order of their ids. `categories[k]`, also by id, has label k + 1."""

    categories: tuple[Category, ...]
    images: tuple[ImageRecord, ...]
    report: Report
    annotations_path: Path
    images_dir: Path
    listed: int
    """How many images the annotation file lists."""
    lost: tuple[str, ...] = ()
    """"name (reason)" of each listed image that is missing or cannot be used."""
    file_ids: Mapping[int, int] = field(default_factory=dict)
    """Category id -> the id in this annotation file, where `matched_to` replaced the ids."""
    listed_depth: int = 0
    """How many depth maps were to be read."""
    lost_depth: tuple[str, ...] = ()
    """"name (reason)" of each of them that is missing or cannot be used."""
    depth: DepthSummary | None = None
    """Of a checked data set; None without depth maps."""
    annotations_sha256: str = ""
    """Of the bytes that were parsed, whatever is in the annotation file by now. "": made otherwise,
    which no cache can hold."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 1..K."""
        return tuple(category.name for category in self.categories)

    @property
    def has_depth(self) -> bool:
        """Whether any image has a depth map."""
        return any(image.depth_file is not None for image in self.images)

    @property
    def has_masks(self) -> bool:
        """Whether any object has a mask, not only a box."""
        return any(image.has_mask for image in self.images)

    def category_id(self, label: int) -> int:
        """The file's category id of a label in 1..K; ValueError for any other label."""
        if not 1 <= label <= len(self.categories):
            raise ValueError(f"label {label} is outside 1..{len(self.categories)}")
        return self.categories[label - 1].id

    def with_images(self, images: Iterable[ImageRecord]) -> CocoDataset:
        """This data set with other images and a new count of what is kept.

        Raises:
            ConfigError: there are no images; the message says why.
        """
        left = tuple(images)
        if not left:
            lines = self.report.lines()
            reasons = [line for line in lines if line.startswith(("dropped", "left out"))]
            why = "the file lists none"
            if self.listed:
                why = listed([*reasons, *self.lost], len(reasons) + 3, "; ")
            raise ConfigError(f"{self.annotations_path}: no usable image is left: {why}")
        objects = [record for image in left for record in image.objects]
        crowds = sum(len(image.crowds) for image in left)
        kept = {"images": len(left), "objects": len(objects), "crowds": crowds}
        if boxes := sum(record.rle is None for record in objects):
            kept["objects without a mask (box only)"] = boxes
        return replace(self, images=left, report=replace(self.report, kept=kept))

    def refuse_lost_images(self) -> None:
        """`refuse_lost` of this data set's images and their depth maps."""
        refuse_lost(self.lost, self.listed, f"{self.annotations_path}")
        refuse_lost(
            self.lost_depth, self.listed_depth, f"{self.annotations_path}", what="depth maps"
        )

    def refuse_without_objects(self) -> None:
        """ConfigError, saying why, if there is not one object to train on."""
        if self.report.kept["objects"]:
            return
        crowds = self.report.kept["crowds"]
        why = "; ".join(line for line in self.report.lines() if line.startswith("dropped"))
        if crowds:
            why = (
                f"all its {crowds} annotations have iscrowd 1, which makes them regions to ignore "
                "(brush masks of some tools come so): write 0 to train on them"
            )
        raise ConfigError(
            f"{self.annotations_path}: no object to train on: {why or 'it has no annotations'}"
        )

    def matched_to(self, categories: Sequence[tuple[int, str]], where: str) -> CocoDataset:
        """This data set with the ids of other categories, which are found by name.

        Args:
            categories: (id, name) of all that there may be.
            where: where they are, for messages.

        Raises:
            ConfigError: one of this data set's categories is not there.
        """
        own = [(category.id, category.name) for category in self.categories]
        if set(own) <= set(categories):
            return self
        ids = {name: number for number, name in categories}
        names = dict(categories)
        certain = len(ids) == len(categories) and len(set(self.class_names)) == len(own)
        unknown = [
            f"{number} {name!r} (there {names.get(number)!r})"
            for number, name in own
            if (name not in ids if certain else (number, name) not in categories)
        ]
        if unknown:
            raise ConfigError(
                f"{self.annotations_path}: categories that {where} does not have: {listed(unknown)}"
            )
        new = tuple(sorted((Category(ids[name], name) for _, name in own), key=lambda c: c.id))
        labels = {category.name: label for label, category in enumerate(new, 1)}
        label_of = [0, *(labels[name] for name in self.class_names)]
        images = tuple(
            replace(
                i, annotations=tuple(replace(a, label=label_of[a.label]) for a in i.annotations)
            )
            for i in self.images
        )
        report = copy.deepcopy(self.report)
        key = Reason.CATEGORY_IDS, Reason.CATEGORY_IDS.text
        report.findings.pop(key, None)  # labels no longer follow the order of these ids
        for number, name in own:
            if ids[name] != number:
                report.add(Reason.MATCHED, number, file=where)
        file_ids = {ids[name]: number for number, name in own}
        return replace(self, categories=new, images=images, file_ids=file_ids, report=report)

    def to_coco(self) -> dict[str, Any]:
        """The data set in COCO format with the file's own ids, for pycocotools to evaluate against.

        Annotations without a mask have no "segmentation".
        """
        annotations = [
            coco_annotation(
                record.annotation_id,
                image.id,
                self.category_id(record.label),
                record.box,
                record.area,
                record.iscrowd,
                record.rle,
            )
            for image in self.images
            for record in image.annotations
        ]
        images = [
            {"id": i.id, "file_name": i.file_name, "height": i.height, "width": i.width}
            for i in self.images
        ]
        categories = [{"id": c.id, "name": c.name} for c in self.categories]
        content = {"images": images, "annotations": annotations, "categories": categories}
        return {"info": {}, **content}


def coco_annotation(
    annotation_id: int,
    image_id: int,
    category_id: int,
    box: Box,
    area: float,
    iscrowd: bool,
    segmentation: Any,
) -> dict[str, Any]:
    """One entry of "annotations"; without "segmentation" if that is None."""
    x1, y1, x2, y2 = box
    annotation = {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": area,
        "iscrowd": int(iscrowd),
    }
    return annotation if segmentation is None else annotation | {"segmentation": segmentation}


def refuse_lost(lost: Sequence[str], count: int, where: str, what: str = "images") -> None:
    """ConfigError, naming the first ten, if more than 1 % of the `count` listed images are lost."""
    if len(lost) > LOST_IMAGES * count:
        raise ConfigError(
            f"{where}: {len(lost)} of {count} {what} are lost (at most 1 % may be): "
            f"{listed(lost, 10)}"
        )
