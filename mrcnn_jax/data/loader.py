"""From a checked data set to padded batches of one canvas, in an order that is made on the host before the epoch.

The order is a pure function of (canvases of the images, seed, epoch), so the loader has no state worth saving: to resume, or to
replay a step, pass the rest of the plan to `load`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Float

from mrcnn_jax.config import DataConfig
from mrcnn_jax.data.builder import RandomAccess, build
from mrcnn_jax.data.coco import CocoDataset
from mrcnn_jax.data.decode import decode_image
from mrcnn_jax.data.images import check_split
from mrcnn_jax.data.transforms import Plan, mask_crop, resize_image, resize_plan
from mrcnn_jax.structures import Batch, Instances

TRAIN = "train"


@dataclass(frozen=True)
class Split:
    """One annotation file, ready to be loaded: image i is `dataset.images[i]`, `source[i]` and `plans[i]`."""

    name: str
    dataset: CocoDataset
    source: RandomAccess
    plans: tuple[Plan, ...]


@dataclass(frozen=True)
class PlannedBatch:
    """A canvas number and the images that go onto it, filled up with -1."""

    canvas: int
    indices: tuple[int, ...]


def open_split(name: str, annotations: str | Path, images: str | Path, *, cache: Path, data: DataConfig) -> Split:
    """Reads, checks and (unless `cache` has it) builds a split; what was lost on the way is in `dataset.report`.

    The split named "train" leaves out images without objects unless `data.keep_empty`. ConfigError as of `check_split` and `build`.
    """
    keep_empty = data.keep_empty or name != TRAIN
    dataset, folder = check_split(Path(annotations), Path(images), cache=cache, data=data, keep_empty=keep_empty)
    plans = tuple(resize_plan(image.height, image.width, data) for image in dataset.images)
    return Split(name, dataset, build(dataset, folder), plans)


def plan_epoch(canvas_of_image: Sequence[int], batch_size: int, *, seed: int, epoch: int, shuffle: bool) -> list[PlannedBatch]:
    """The batches of an epoch: every image once, one canvas a batch, incomplete batches filled up with -1.

    Their number is the same in every epoch. With `shuffle`, images are permuted within their canvas and batches of all
    canvases are mixed; without, they come by canvas and image number.
    """
    rng = np.random.default_rng((seed, epoch))
    canvases = np.asarray(canvas_of_image)
    batches = []
    for canvas in np.unique(canvases):
        members = np.flatnonzero(canvases == canvas)
        if shuffle:
            members = rng.permutation(members)
        for start in range(0, len(members), batch_size):
            indices = members[start : start + batch_size].tolist()
            batches.append(PlannedBatch(int(canvas), (*indices, *[-1] * (batch_size - len(indices)))))
    return [batches[i] for i in rng.permutation(len(batches))] if shuffle else batches


def plan_once(split: Split, batch_size: int, limit: int | None = None) -> list[PlannedBatch]:
    """Every image of a split exactly once, in order, or its first `limit` images."""
    return plan_epoch([plan.canvas for plan in split.plans][:limit], batch_size, seed=0, epoch=0, shuffle=False)


def load(split: Split, plan: Sequence[PlannedBatch], data: DataConfig) -> Iterator[Batch]:
    """Batches of NumPy arrays in exactly the order of `plan`, made ahead by threads or, if `data.workers`, by processes.

    Nothing is read before the first `next`. An image that cannot be loaded raises a RuntimeError that names its file. Worker
    processes are spawned: the caller's script needs a `__main__` guard.
    """
    images = _Batches(
        split.source, split.plans, tuple(i.id for i in split.dataset.images), len(split.dataset.categories), tuple(plan), data
    )
    dataset = grain.MapDataset.source(images)
    if data.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain hands absl's flags on to its processes
        in_process = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        iterator = iter(in_process.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=2)))
    else:
        iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=data.threads + 2)))
    try:
        for batch in iterator:
            # Out of the memory shared with a worker process, which dies with the iterator.
            yield jax.tree.map(np.array, batch) if data.workers else batch
    finally:
        iterator.close()


@dataclass(frozen=True)
class _Batches:
    """What grain reads from, also in worker processes: hence picklable, and NumPy only."""

    source: RandomAccess
    plans: tuple[Plan, ...]
    image_ids: tuple[int, ...]
    num_classes: int
    plan: tuple[PlannedBatch, ...]
    data: DataConfig

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, position: int) -> Batch:
        planned = self.plan[position]
        batch = _empty_batch(len(planned.indices), self.data.canvases[planned.canvas], self.data)
        for row, index in enumerate(planned.indices):
            if index < 0:
                continue
            record = self.source[index]
            name = record["file_name"].decode()
            try:
                if record["image_id"] != self.image_ids[index]:
                    raise ValueError(f"record {index} is image {record['image_id']}, not {self.image_ids[index]}: delete the data cache")
                self._fill(batch, row, index, record)
            except Exception as error:
                raise RuntimeError(f"{name}: {error}") from error
        return batch

    def _fill(self, batch: Batch, row: int, index: int, record: dict[str, Any]) -> None:
        """Writes an image and its annotations into a row of the (NumPy) batch."""
        plan, truth, ignore = self.plans[index], batch.ground_truth, batch.ignore
        assert truth.labels is not None
        assert truth.masks is not None
        assert truth.has_mask is not None
        image = decode_image(record["image"], upright=bool(record["upright"]), max_pixels=self.data.max_pixels)
        height, width = plan.resized
        batch.images[row, :height, :width] = resize_image(image, plan.resized)
        batch.image_sizes[row] = plan.resized
        batch.original_sizes[row] = image.shape[:2]
        batch.scales[row] = plan.scale
        batch.indices[row] = index
        batch.valid[row] = True

        objects = record["objects"]
        labels = np.asarray(objects["label"], np.int32)
        wrong = np.flatnonzero((labels < 1) | (labels > self.num_classes))
        if wrong.size:
            number = objects["annotation_id"][wrong[0]]
            raise ValueError(f"annotation {number}: label {labels[wrong[0]]} is outside 1..{self.num_classes}")
        boxes = np.asarray(objects["box"], np.float32).reshape(-1, 4)
        y, x = plan.scale
        # The minimum is against rounding only: boxes are inside their image.
        on_canvas = np.minimum(boxes * np.array([x, y, x, y], np.float32), np.array([width, height, width, height], np.float32))
        iscrowd = np.asarray(objects["iscrowd"], bool)

        kept = _largest(boxes, np.flatnonzero(~iscrowd), self.data.max_objects)
        truth.boxes[row, : len(kept)] = on_canvas[kept]
        truth.labels[row, : len(kept)] = labels[kept]
        truth.valid[row, : len(kept)] = True
        for place, number in enumerate(kept):
            counts = objects["counts"][number]
            if counts:
                crop = mask_crop({"size": list(image.shape[:2]), "counts": counts}, boxes[number].tolist(), self.data.mask_crop)
                truth.masks[row, place] = crop
                # A mask that covers no cell by half would be an empty target.
                truth.has_mask[row, place] = crop.max() >= 128

        crowds = _largest(boxes, np.flatnonzero(iscrowd), self.data.max_ignored)
        ignore.boxes[row, : len(crowds)] = on_canvas[crowds]
        ignore.valid[row, : len(crowds)] = True


def _largest(boxes: Float[np.ndarray, "n 4"], rows: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` of the rows, those of the largest boxes, in the order of the file."""
    if len(rows) <= limit:
        return rows
    areas = np.prod(boxes[rows, 2:] - boxes[rows, :2], axis=1)
    return np.sort(rows[np.argsort(-areas, kind="stable")[:limit]])


def _empty_batch(size: int, canvas: tuple[int, int], data: DataConfig) -> Batch:
    """All rows invalid; sizes and scales of an invalid image are 1, since downstream code divides by them."""
    objects, crop = data.max_objects, data.mask_crop
    return Batch(
        images=np.zeros((size, *canvas, 3), np.uint8),
        image_sizes=np.ones((size, 2), np.int32),
        original_sizes=np.ones((size, 2), np.int32),
        scales=np.ones((size, 2), np.float32),
        indices=np.zeros(size, np.int32),
        valid=np.zeros(size, bool),
        ground_truth=Instances(
            boxes=np.zeros((size, objects, 4), np.float32),
            valid=np.zeros((size, objects), bool),
            labels=np.zeros((size, objects), np.int32),
            masks=np.zeros((size, objects, crop, crop), np.uint8),
            has_mask=np.zeros((size, objects), bool),
        ),
        ignore=Instances(boxes=np.zeros((size, data.max_ignored, 4), np.float32), valid=np.zeros((size, data.max_ignored), bool)),
    )
