"""The report of a data set's check: a `Reason` for each thing that can happen, and their counts.

Refusals are not listed: they raise a ConfigError where they are found.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

FIRST_IDS = 10

Outcome = Literal["dropped", "clipped", "repaired", "left out", "noticed"]
"""dropped: lost, through a fault in the data; left out: not used, as the config says;
noticed: used as it is, and perhaps not meant so."""


class Reason(Enum):
    """(outcome, text); the ids in a report are those of the things that the text begins with."""

    NAME = "dropped", "images whose file_name is missing, not printable, or leaves the image folder"
    SIZE = "dropped", "images without a size, whose file gives none"
    MISSING = "dropped", "images whose file is missing"
    UNDECODABLE = "dropped", "images that cannot be decoded"
    OF_DROPPED_IMAGE = "dropped", "annotations of a dropped image"
    UNKNOWN_IMAGE = "dropped", "annotations with an unknown image_id"
    UNUSABLE_MASK = "dropped", "annotations with an unusable segmentation"
    NO_PIXEL = "dropped", "annotations whose mask has no pixel in the image"
    NO_BOX = "dropped", "annotations without a usable bbox"
    DEGENERATE = "dropped", "annotations with a degenerate box (a side under 0.1 px)"
    OUTSIDE = "dropped", "annotations whose box lies outside the image"
    MISSING_DEPTH = "dropped", "images whose depth map is missing: their depth counts as unknown"
    UNDECODABLE_DEPTH = (
        "dropped",
        "images whose depth map cannot be decoded: their depth counts as unknown",
    )
    POLYGON = (
        "dropped",
        "annotations with an unusable polygon among others (under 3 points, an odd count, or far "
        "outside the image)",
    )
    REPEATED_KEY = (
        "dropped",
        "values of a JSON object whose key is there again: the last one is used",
    )
    CLIPPED = "clipped", "annotations whose box leaves the image"
    CATEGORY_IDS = (
        "repaired",
        "categories whose ids are not 1, 2, 3, ...: labels follow their order",
    )
    NUMBERS = "repaired", '{items} with ids or sizes like "12" or 12.0: read as integers'
    FILE_NAME = "repaired", "images whose file_name has backslashes or another Unicode form"
    FOUND_BY_NAME = (
        "repaired",
        "images whose file_name is a path of another machine: found by the end of it",
    )
    IN_SUBFOLDER = (
        "repaired",
        "images whose file_name has no folder: found in the only subfolder with such a file",
    )
    FROM_URL = "repaired", "images without a file_name: found by the end of their coco_url"
    AMBIGUOUS = "dropped", "images that are not where their file_name says, and may be two files"
    SIZE_FROM_FILE = "repaired", "images without a height and width: taken from the file"
    BOX_FROM_MASK = "repaired", "annotations without a usable bbox: taken from the mask"
    FAR_FROM_MASK = "repaired", "annotations whose bbox is far from their mask: taken from the mask"
    EMPTY_MASK = "repaired", "annotations whose mask has no pixel: kept as a box without a mask"
    FLAT_POLYGON = "repaired", "annotations whose polygon is a flat list"
    PAIRS = "repaired", "annotations whose polygons are lists of points: read as x, y, x, y, ..."
    RUN_LIST = "repaired", "annotations whose run lengths are a list: compressed"
    RUN_BYTES = "repaired", "annotations whose run lengths are bytes: read as text"
    AREA = "repaired", "annotations without an area: computed"
    WRONG_AREA = (
        "repaired",
        "annotations whose area cannot be (over their box, or under half or over twice their "
        "mask): computed",
    )
    CONVERTED = "repaired", "images that are {kind}: converted to 8-bit RGB"
    PAGES = "repaired", "images with {pages} pages or frames: only the first is read"
    TURNED = "repaired", "images turned as EXIF says: annotated in the size of the turned picture"
    TURNED_BY_VOTE = (
        "repaired",
        "images turned as EXIF says: the size fits either way, and no majority speaks against it",
    )
    NOT_TURNED = "repaired", "images whose EXIF turn is ignored: annotated in the size as stored"
    NOT_TURNED_BY_VOTE = (
        "repaired",
        "images whose EXIF turn is ignored: the size fits either way, and most are annotated as "
        "stored",
    )
    SAME_NAME = (
        "noticed",
        "categories of one name (but for case and spaces): each is a class of its own",
    )
    MATCHED = "repaired", "categories with other ids in {file}: matched by their names"
    SAME_FILE = "noticed", "images whose file is that of an image before (listed twice, or a copy)"
    SAME_ANNOTATION = (
        "noticed",
        "annotations that repeat one before: class, box and mask are the same",
    )
    LOOSE_BOX = (
        "noticed",
        "annotations whose bbox fits their mask badly (overlap under .8): used as it is",
    )
    IN_TRAINING = "noticed", "images that are in {file}, too: trained on, they prove nothing"
    IN_A_CORNER = (
        "noticed",
        "annotations that all lie in the upper left of their image: of a smaller picture?",
    )
    MANY_CROWDS = (
        "noticed",
        "annotations with iscrowd 1, 5 % of all or more: regions to ignore, neither trained on nor "
        "evaluated: right for groups, parts cut by tiles and VOC's difficult objects; if they are "
        "objects (CVAT's brush masks in its COCO export), export 'CVAT for images 1.1' or write "
        "iscrowd 0",
    )
    NO_DEPTH = "noticed", "images without a depth map in {folder}: their depth counts as unknown"
    NEGATIVE = "left out", "images without objects (data.keep_empty is off)"

    # Of images to predict on.
    PASSED_OVER = "left out", "{what}: passed over"
    REPLACED = "repaired", "pictures of the earlier prediction in this folder: removed"
    LEFT = "noticed", "pictures of neither this prediction nor the one before: left in the folder"
    REDUCED = "repaired", "pictures of images too large for one: drawn at 1/{step} of the size"
    FOUND_BOX = "noticed", "objects found whose mask has no pixel: annotated by their boxes"
    SHORTENED = "repaired", "pictures whose file's name is too long for theirs: shortened"

    # Of the converters (convert) only.
    NO_AREA = "dropped", "shapes of type {kind}, which has no area"
    CURVED = "dropped", "closed vectors with curves or branches, which are not read (draw polygons)"
    NO_CLASS = (
        "dropped",
        "instances without a class: no <object> has their box, nor SegmentationClass a name there",
    )
    IMAGE_PATH = "repaired", "images that are not where the annotation says: found by their name"
    NAMED_OTHERWISE = (
        "repaired",
        "annotations beside an image of their name that name another one: that is taken",
    )
    EMBEDDED = "repaired", "images that were only in the annotation: written into the image folder"
    LABEL = "repaired", "labels with outer spaces or not in Unicode's form NFC: normalised"
    ZERO_BASED = (
        "repaired",
        "annotations whose box is taken to count from 0: VOC counts from 1, but some begin at 0, "
        "or most have decimals, as of CVAT and Datumaro",
    )
    NO_ATTRIBUTE = "dropped", "regions whose attribute {attribute} names no class, or several"
    NO_ATTRIBUTES = (
        "noticed",
        "regions without an attribute, as all here: of one class, {label}",
    )
    NO_LABEL = "dropped", "shapes without a label"
    FIRST_IMAGE = (
        "noticed",
        "tasks with several images, none of which its data names as the interface does: that under "
        "{key} is taken",
    )
    CANCELLED = "left out", "annotations that were cancelled"
    OLDER = "left out", "annotations of an image that has a newer one"
    CROWD = "left out", "annotations with iscrowd 1: YOLO has none"
    BOX_LINE = "noticed", "annotations without a mask, as all here: written as boxes"
    BOX_POLYGON = (
        "noticed",
        "annotations without a mask: written as polygons of four corners (Ultralytics drops all "
        "polygons of a data set with boxes)",
    )
    NO_LABEL_FILE = "noticed", "images without a label file: read as images without objects"
    BOXES_ALONE = (
        "noticed",
        "objects that are boxes, as all here: a mask head learns nothing from them (--rectangles "
        "mask makes masks of them)",
    )
    LOSSY_MASK = "left out", "files of masks in a format that changes values (JPEG, WebP)"
    TAKEN_APART = (
        "noticed",
        "values of masks with several parts that do not touch: each part is an object (--parts "
        "value makes one of each value)",
    )
    IN_PARTS = (
        "noticed",
        "masks of one value with several parts that do not touch: one object, as most here have "
        "one part (--parts connected makes one of each part)",
    )
    SPECK = "left out", "parts of masks under 4 pixels and 1 % of the largest part of their value"
    OTHER_FILE = "left out", "JSON files that labelme did not write (no imagePath and shapes)"
    NOT_LISTED = "left out", "images that {file} does not list (--only)"
    LISTED_ONLY = "noticed", "lines of {file} (--only) that name no image"
    DELETED = "left out", "objects marked as deleted"
    SKIPPED = "left out", "shapes labelled {label} (--skip)"
    UNANNOTATED = "left out", "images without an annotation (see --keep-unannotated)"
    DIFFICULT = (
        "left out",
        "difficult objects: written as crowds, neither trained on nor evaluated (see --difficult)",
    )

    # Of a data set that is cut into tiles.
    CUT = "clipped", "objects that a border of a tile cuts: what lies in the tile is kept"
    SMALL_PART = (
        "left out",
        "objects of which less than {share} lies in a tile: made crowds there, neither trained on "
        "nor evaluated (see --small-parts)",
    )
    NO_SMALL_PART = (
        "left out",
        "objects of which less than {share} lies in a tile: dropped there, so they are background "
        "(see --small-parts)",
    )
    NO_OBJECT = "left out", "tiles without an object (see --keep-empty)"
    NO_DEPTH_TILES = "left out", "depth maps: they are not cut"

    @property
    def outcome(self) -> Outcome:
        return self.value[0]

    @property
    def text(self) -> str:
        return self.value[1]


@dataclass
class Finding:
    """How often something happened, and the ids of the first cases."""

    count: int = 0
    first_ids: list[Any] = field(default_factory=list)
    more: bool = False  # there are more ids


@dataclass
class Report:
    """Counts of what was kept, and of the rest by (reason, its text with details)."""

    kept: dict[str, int] = field(default_factory=dict)
    findings: dict[tuple[Reason, str], Finding] = field(default_factory=dict)

    def add(self, reason: Reason, identifier: Any, count: int = 1, **details: Any) -> None:
        """Counts cases of `reason` for one identifier; `details` fill the gaps in its text."""
        finding = self.findings.setdefault((reason, reason.text.format(**details)), Finding())
        finding.count += count
        if len(finding.first_ids) < FIRST_IDS:
            finding.first_ids.append(identifier)
        else:
            finding.more = True

    def lines(self) -> list[str]:
        """For people: a line for what is kept, then one per finding."""
        kept = ", ".join(f"{count} {what}" for what, count in self.kept.items())
        lines = [f"kept {kept}"]
        for reason, text, finding in self._sorted():
            ids = ", ".join(map(str, finding.first_ids)) + (", ..." if finding.more else "")
            lines.append(f"{reason.outcome} {finding.count}: {text} ({ids})")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """For machines.

        {"kept": {...}, "findings": [{"outcome", "code", "reason", "count", "first_ids"}, ...]}
        """
        found = [
            {
                "outcome": reason.outcome,
                "code": reason.name.lower(),
                "reason": text,
                "count": finding.count,
                "first_ids": finding.first_ids,
            }
            for reason, text, finding in self._sorted()
        ]
        return {"kept": self.kept, "findings": found}

    def _sorted(self) -> list[tuple[Reason, str, Finding]]:
        rows = [(reason, text, finding) for (reason, text), finding in self.findings.items()]
        return sorted(rows, key=lambda row: (row[0].outcome, row[1]))
