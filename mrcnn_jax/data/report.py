"""What happens to a data set while it is checked: every reason, with its outcome, is a row of
`Reason`; `Report` counts them.

What is refused is no row: it raises a ConfigError where it is found.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

FIRST_IDS = 10

Outcome = Literal["dropped", "clipped", "repaired", "truncated", "left out"]
"""dropped: lost, for a fault of the data; left out, truncated: not trained on, because the config
says so."""


class Reason(Enum):
    """(outcome, text); the ids are those of what the text begins with."""

    NAME = "dropped", "images whose file_name is missing, not printable, or leaves the image folder"
    SIZE = "dropped", "images without a size"
    MISSING = "dropped", "images whose file is missing"
    UNDECODABLE = "dropped", "images that cannot be decoded"
    OF_DROPPED_IMAGE = "dropped", "annotations of a dropped image"
    UNKNOWN_IMAGE = "dropped", "annotations with an unknown image_id"
    UNUSABLE_MASK = "dropped", "annotations with an unusable segmentation"
    NO_BOX = "dropped", "annotations without a usable bbox"
    DEGENERATE = (
        "dropped",
        "annotations with a degenerate box (a side zero, negative or under 0.1 px)",
    )
    OUTSIDE = "dropped", "annotations whose box lies outside the image"
    POLYGON = (
        "dropped",
        "annotations with an unusable polygon among others (under 3 points, an odd count, or far outside the image)",
    )

    # Of the converters (data.convert) alone.
    NO_AREA = "dropped", "shapes of type {kind}, which has no area"
    NO_PIXEL = "dropped", "annotations whose mask has no pixel in the image"
    NO_CLASS = (
        "dropped",
        "instances without a class: no <object> has their box, and SegmentationClass has none of the names there",
    )

    CLIPPED = "clipped", "annotations whose box leaves the image"

    CATEGORY_IDS = (
        "repaired",
        "categories whose ids are not 1, 2, 3, ...: labels follow the order of the ids",
    )
    NUMBERS = "repaired", '{items} with ids or sizes like "12" or 12.0: read as integers'
    FILE_NAME = (
        "repaired",
        "images whose file_name is spelled otherwise (backslashes, another Unicode form)",
    )
    BOX_FROM_MASK = "repaired", "annotations without a usable bbox: taken from the mask"
    FAR_FROM_MASK = "repaired", "annotations whose bbox is far from their mask: taken from the mask"
    FLAT_POLYGON = "repaired", "annotations whose polygon is a flat list"
    RUN_LIST = "repaired", "annotations whose run lengths are a list: compressed"
    RUN_BYTES = "repaired", "annotations whose run lengths are bytes: read as text"
    AREA = "repaired", "annotations without an area: computed"
    CONVERTED = "repaired", "images that are {kind}: made 8-bit RGB"
    TURNED = (
        "repaired",
        "images turned as their EXIF orientation says: the annotated size is that of the turned picture",
    )
    TURNED_BY_VOTE = (
        "repaired",
        "images turned as their EXIF orientation says: the size fits either way, and others do not speak against it",
    )
    NOT_TURNED = (
        "repaired",
        "images whose EXIF orientation is passed over: the annotated size is that of the stored pixels",
    )
    NOT_TURNED_BY_VOTE = (
        "repaired",
        "images whose EXIF orientation is passed over: the size fits either way, most others are annotated as stored",
    )

    # Of the converters alone.
    IMAGE_PATH = (
        "repaired",
        "images that lie elsewhere than the annotation says: found by their name",
    )
    EMBEDDED = (
        "repaired",
        "images that were only inside the annotation (imageData): written into the image folder",
    )
    LABEL = (
        "repaired",
        "labels with spaces at their ends or in another Unicode form than NFC: written without, in NFC",
    )
    ZERO_BASED = (
        "repaired",
        "annotations whose box is taken to count pixels from 0: VOC counts from 1, but some box of these files begins at 0",
    )

    NEGATIVE = "left out", "images without objects (data.keep_empty is off)"
    OVER_LIMIT = (
        "truncated",
        "images with more boxes than data.{field} = {limit}: the largest are kept (the count is that of the boxes)",
    )

    # Of the converters alone.
    OTHER_FILE = "left out", "JSON files that are not of labelme (without imagePath and shapes)"
    NOT_LISTED = "left out", "images that {file} does not list (--only)"
    SKIPPED = "left out", "shapes labelled {label} (--skip)"
    UNANNOTATED = (
        "left out",
        "images without an annotation (--keep-unannotated takes them as images without objects)",
    )
    DIFFICULT = (
        "left out",
        "objects marked difficult: written as crowd regions, which are neither trained on nor judged (--difficult object)",
    )

    @property
    def outcome(self) -> Outcome:
        return self.value[0]

    @property
    def text(self) -> str:
        return self.value[1]


@dataclass
class Finding:
    """How often something happened, and to what (ids) first."""

    count: int = 0
    first_ids: list[Any] = field(default_factory=list)
    more: bool = False  # than the first ids


@dataclass
class Report:
    """What was kept, and what happened to the rest: (reason, its text with the details filled in)
    -> count and first ten ids."""

    kept: dict[str, int] = field(default_factory=dict)
    findings: dict[tuple[Reason, str], Finding] = field(default_factory=dict)

    def add(self, reason: Reason, identifier: Any, count: int = 1, **details: Any) -> None:
        """Counts `count` cases of `reason` at one image, annotation or category; `details` fill the
        gaps of its text."""
        finding = self.findings.setdefault((reason, reason.text.format(**details)), Finding())
        finding.count += count
        if len(finding.first_ids) < FIRST_IDS:
            finding.first_ids.append(identifier)
        else:
            finding.more = True

    def lines(self) -> list[str]:
        """For people: one line for what is kept, one for each finding."""
        kept = ", ".join(f"{count} {what}" for what, count in self.kept.items())
        found = [
            f"{reason.outcome} {f.count}: {text} ({', '.join(map(str, f.first_ids))}{', ...' if f.more else ''})"
            for reason, text, f in self._sorted()
        ]
        return [f"kept {kept}", *found]

    def to_dict(self) -> dict[str, Any]:
        """For machines: {"kept": {...}, "findings": [{"outcome", "code", "reason", "count",
        "first_ids"}, ...]}."""
        found = [
            {
                "outcome": reason.outcome,
                "code": reason.name.lower(),
                "reason": text,
                "count": f.count,
                "first_ids": f.first_ids,
            }
            for reason, text, f in self._sorted()
        ]
        return {"kept": self.kept, "findings": found}

    def _sorted(self) -> list[tuple[Reason, str, Finding]]:
        rows = [(reason, text, finding) for (reason, text), finding in self.findings.items()]
        return sorted(rows, key=lambda row: (row[0].outcome, row[1]))
