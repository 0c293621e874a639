"""Finds images that are there twice by their content: in one file, or in training and validation.

Only files of one size are compared: by their ends, which differ where headers are alike, and as a
whole only if those agree. Hence it costs little more than a look at every file's size.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable

from mrcnn_jax.data.records import CocoDataset, ImageRecord
from mrcnn_jax.data.report import Reason

END = 4096  # bytes


def note_copies(training: CocoDataset, validation: CocoDataset | None = None) -> None:
    """Adds to the reports which images are copies, and which validation images are trained on.

    A file that is listed twice under one name is left to `read_coco`, which has reported it.

    Args:
        training: a data set as `read_coco` returns it.
        validation: another one that goes with it, if any.
    """
    datasets = [dataset for dataset in (training, validation) if dataset is not None]
    files = {_path(dataset, image) for dataset in datasets for image in dataset.images}
    first = {file: min(group) for group in equal_files(files) for file in group}
    trained: set[str] = set()
    for dataset in datasets:
        seen: dict[str, str] = {}
        for image in dataset.images:
            path = _path(dataset, image)
            content = first.get(path, path)
            if seen.setdefault(content, path) != path:
                dataset.report.add(Reason.SAME_FILE, image.id)
            if content in trained:
                where = f"{training.annotations_path}"
                dataset.report.add(Reason.IN_TRAINING, image.id, file=where)
        trained.update(seen)


def _path(dataset: CocoDataset, image: ImageRecord) -> str:
    return os.path.abspath(dataset.images_dir / image.file_name)


def equal_files(files: Iterable[str]) -> list[list[str]]:
    """The groups of two or more files of the same bytes; what cannot be read is in none."""
    groups = [list(files)]
    for key in (os.path.getsize, _end, _digest):
        groups = [part for group in groups for part in _parts(group, key)]
    return groups


def _parts(group: list[str], key: Callable[[str], Hashable]) -> list[list[str]]:
    parts: dict[Hashable, list[str]] = defaultdict(list)
    for file in group:
        try:
            parts[key(file)].append(file)
        except OSError:  # whoever needs its pixels will say so
            continue
    return [part for part in parts.values() if len(part) > 1]


def _end(file: str) -> bytes:
    with open(file, "rb") as opened:
        opened.seek(max(os.path.getsize(file) - END, 0))
        return opened.read(END)


def _digest(file: str) -> bytes:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()
