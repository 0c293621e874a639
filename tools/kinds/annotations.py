"""COCO annotation files. Half of the cases have a known damage, the others a random one.

After a known damage the objects are those of the whole file, or the file is refused, or the report
says something that it does not say of the whole one; harmless variants must be read as they are.
After a random one that holds for the objects whose own entries are untouched: what a changed number
should have been, nobody knows.
"""

from __future__ import annotations

import functools
import json
import posixpath
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle_ops

from mrcnn_jax.commands.data_summary import summary, summary_lines
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.builder import make_record
from mrcnn_jax.data.images import check_split
from mrcnn_jax.data.loader import Split, load, plan_once
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.pixels.transforms import plan_for
from tools.kinds.annotation_damage import DAMAGES, mixed_file, prepare, whole_file
from tools.kinds.mutations import (
    HEIGHT,
    WIDTH,
    WrongError,
    mutate_value,
    mutated_bytes,
    one_line,
)

__all__ = ["case", "mixed_file", "outcome", "prepare", "whole_file"]

DATA = DataConfig(
    short_side=64,
    long_side=64,
    canvases=((64, 64),),
    max_objects=4,
    max_ignored=1,
    mask_crop=14,
    threads=1,
)
Object = tuple[str, str, tuple[float, ...], bytes]  # file, class, box, compressed mask


@dataclass(frozen=True)
class Case:
    content: bytes
    damage: str = "random"
    harmless: bool = False


def case(seed: int, index: int) -> Case:
    """Case number `index`."""
    rng = np.random.default_rng((seed, 0, index))
    if rng.random() < 0.5:
        name = list(DAMAGES)[rng.integers(len(DAMAGES))]
        change, harmless = DAMAGES[name]
        content = whole_file()
        changed = change(rng, content)
        text = changed if isinstance(changed, bytes) else json.dumps(content).encode()
        return Case(text, name.replace("_", " "), harmless)
    content = mixed_file()
    if rng.random() < 0.75:
        for _ in range(rng.integers(1, 5)):
            mutate_value(rng, content)
        return Case(json.dumps(content).encode("utf-8", "surrogatepass"))
    return Case(mutated_bytes(rng, json.dumps(content).encode()))


# -- what is right ---------------------------------------------------------------------------------


class Records:
    """The records of a data set, made from its folder instead of an ArrayRecord file."""

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.dataset.images[index]
        record = make_record(image, (self.dataset.images_dir / image.file_name).read_bytes())
        names = ("annotation_id", "label", "box", "iscrowd", "counts")
        objects = {name: [each[name] for each in record["objects"]] for name in names}
        return {**record, "file_name": record["file_name"].encode(), "objects": objects}


def through(annotations: Path, images: Path, cache: Path) -> CocoDataset:
    """The whole pipeline, from two files to batches; ConfigError if it refuses them.

    Raises:
        ValueError: a batch does not hold what it promises.
    """
    dataset = read_coco(annotations, images, DATA, lost_images=True)
    dataset, folder = check_split(dataset, cache=cache, data=DATA, keep_empty=True)
    found = summary(dataset, DATA)
    json.dumps(found)
    "\n".join(summary_lines(dataset, found)).encode()
    plans = tuple(plan_for(image.height, image.width, DATA) for image in dataset.images)
    split = Split("train", dataset, Records(dataset), plans, folder)
    for batch in load(split, plan_once(split, 2), DATA):
        truth = batch.ground_truth
        for boxes, valid in ((truth.boxes, truth.valid), (batch.ignore.boxes, batch.ignore.valid)):
            inside = np.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= 64).all()
            if not inside or (boxes[valid][:, 2:] <= boxes[valid][:, :2]).any():
                raise ValueError(f"boxes {boxes[valid].tolist()}")
    return dataset


def objects_of(dataset: CocoDataset) -> dict[int, Object]:
    """Annotation id -> what is known of the object."""
    return {
        record.annotation_id: (
            posixpath.normpath(image.file_name),
            dataset.class_names[record.label - 1] + " crowd" * record.iscrowd,
            record.box,
            (record.rle or {"counts": ""})["counts"].encode(),
        )
        for image in dataset.images
        for record in image.annotations
    }


def findings_of(dataset: CocoDataset) -> Counter[str]:
    """What is told of the data set -> how often."""
    kept = {text: n for text, n in dataset.report.kept.items() if text not in ("images", "objects")}
    return Counter(kept | {text: f.count for (_, text), f in dataset.report.findings.items()})


@functools.cache
def _right(folder: Path, known: bool) -> tuple[dict[int, Object], Counter[str]]:
    path = folder / "whole.json"
    path.write_text(json.dumps(whole_file() if known else mixed_file()))
    dataset = through(path, folder / "images", folder / "cache")
    assert not (known and dataset.report.findings)
    return objects_of(dataset), findings_of(dataset)


def outcome(case: Case, folder: Path) -> str:
    """How a case ends; WrongError if it ends badly."""
    known = case.damage != "random"
    right, told = _right(folder, known)
    path = folder / "mutated.json"
    path.write_bytes(case.content)
    try:
        dataset = through(path, folder / "images", folder / "cache")
    except ConfigError as error:
        if case.harmless:
            raise WrongError(f"{case.damage}: harmless, but refused: {error}") from None
        return one_line(error)
    found = objects_of(dataset)
    expected = right if known else {i: right[i] for i in _untouched(case.content) & right.keys()}
    wrong = [i for i, each in expected.items() if not _same(found.get(i), each)]
    wrong += found.keys() - right.keys() if known else []
    if not wrong:
        return "right"
    if not case.harmless and findings_of(dataset) != told:
        return "told"
    one = wrong[0]
    raise WrongError(
        f"{case.damage}: {len(wrong)} of {len(right)} objects are wrong, and nothing tells: "
        f"annotation {one}: {found.get(one)} instead of {right.get(one)}"
    )


def _untouched(content: bytes) -> set[int]:
    """Ids of the annotations whose entries, and those of their image and class, are as they were;
    none of a file that is no such file."""
    before = mixed_file()
    try:
        now = json.loads(content)
        kept = {
            name: [item for item in now[name] if item in before[name]]
            for name in ("images", "annotations", "categories")
        }
        ids = {name: Counter(item.get("id") for item in now[name]) for name in kept}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return set()
    alone = {
        name: {item["id"] for item in items if ids[name][item["id"]] == 1}
        for name, items in kept.items()
    }
    return {
        a["id"]
        for a in kept["annotations"]
        if a["id"] in alone["annotations"]
        and a["image_id"] in alone["images"]
        and a["category_id"] in alone["categories"]
    }


def _same(found: Object | None, right: Object) -> bool:
    if found is None or found[:2] != right[:2]:
        return False
    if not np.allclose(found[2], right[2], atol=1):
        return False
    if found[3] == right[3]:
        return True
    masks = [{"size": [HEIGHT, WIDTH], "counts": counts} for counts in (found[3], right[3])]
    return bool(rle_ops.iou(masks[:1], masks[1:], [False])[0, 0] > 0.8)
