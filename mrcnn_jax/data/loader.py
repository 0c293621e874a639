"""From a checked data set to padded batches, each of one canvas, as planned by `order`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Float, Int, UInt8

from mrcnn_jax.cli import Failure
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import AugmentConfig, DataConfig
from mrcnn_jax.data.builder import RandomAccess, build
from mrcnn_jax.data.images import check_split
from mrcnn_jax.data.order import PlannedBatch, plan_epoch
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.pixels.augment import CanvasImage, DecodedImage, augmented, plain
from mrcnn_jax.pixels.decode import decode_image
from mrcnn_jax.pixels.depth import decode_depth, depth_cells
from mrcnn_jax.pixels.geometry import Plan
from mrcnn_jax.pixels.transforms import plan_for
from mrcnn_jax.structures import Batch, blank_batch

TRAIN = "train"
# For the process, Python's own, that removes what a run shared with its workers and left.
_QUIET = "ignore:resource_tracker:UserWarning"


@dataclass(frozen=True)
class Split:
    """An annotation file ready to load: image i is `dataset.images[i]`, `source[i]`, `plans[i]`."""

    name: str
    dataset: CocoDataset
    source: RandomAccess
    plans: tuple[Plan, ...]
    folder: Path
    """In the cache: what is made from these very files, and from nothing else."""


def open_split(name: str, dataset: CocoDataset, *, cache: Path, data: DataConfig) -> Split:
    """Checks a data set, pixels included, and builds its records unless `cache` holds them.

    Args:
        name: of the split; "train" leaves out images without objects unless `data.keep_empty`.
        dataset: as `read_coco` returns it; what is lost from here on is in the result's report.
        cache: where the checks and the records are kept.

    Raises:
        ConfigError: as of `check_split` and `build`, or too many images are lost.
    """
    keep_empty = data.keep_empty or name != TRAIN
    dataset, folder = check_split(dataset, cache=cache, data=data, keep_empty=keep_empty)
    dataset.refuse_lost_images()
    plans = tuple(plan_for(image.height, image.width, data) for image in dataset.images)
    return Split(name, dataset, build(dataset, folder), plans, folder)


def plan_once(split: Split, batch_size: int, limit: int | None = None) -> list[PlannedBatch]:
    """Every image of a split, or the first `limit`, exactly once and without augmentation."""
    canvases = [plan.canvas for plan in split.plans][:limit]
    return plan_epoch(canvases, batch_size, seed=0, epoch=0, shuffle=False)


def load(
    split: Split, plan: Sequence[PlannedBatch], data: DataConfig, *, depth: bool = False
) -> Iterator[Batch]:
    """Batches of NumPy arrays in exactly the order of `plan`.

    Args:
        split: the images.
        plan: the batches.
        data: canvases, limits and augmentation; `threads`, or `workers` (processes) if there are
            any, load ahead. Workers are spawned: the caller's script needs a `__main__` guard.
        depth: fill in the depth maps, if the split has any.

    Yields:
        The batches. Nothing is read before the first is asked for.

    Raises:
        Failure: an image cannot be loaded; names its file.
    """
    has_depth = tuple(depth and image.depth_file is not None for image in split.dataset.images)
    images = _Batches(
        split.source,
        split.plans,
        tuple(image.id for image in split.dataset.images),
        has_depth,
        any(has_depth),
        len(split.dataset.categories),
        tuple(plan),
        data,
    )
    dataset = grain.MapDataset.source(images)
    if data.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain hands absl's flags on to its processes
        if _QUIET not in sys.warnoptions:
            sys.warnoptions.append(_QUIET)
        read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        ahead = grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=2)
        iterator = iter(dataset.to_iter_dataset(read).mp_prefetch(ahead, _leave_ctrl_c))
    else:
        read = grain.ReadOptions(data.threads, data.threads + 2)
        iterator = iter(dataset.to_iter_dataset(read))
    try:
        for batch in iterator:
            # Copied out of the memory shared with a worker process, which dies with the iterator.
            yield jax.tree.map(np.array, batch) if data.workers else batch
    except RuntimeError as error:
        raise Failure(f"{split.dataset.images_dir}: {error}") from error
    finally:
        iterator.close()


def _leave_ctrl_c(worker: int, workers: int) -> None:
    """Leaves Ctrl-C, which a terminal sends to all processes, to the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class _Batches:
    """Grain's source, also in worker processes: hence picklable, and NumPy only."""

    source: RandomAccess
    plans: tuple[Plan, ...]
    image_ids: tuple[int, ...]
    has_depth: tuple[bool, ...]  # of each image: a depth map that is wanted
    any_depth: bool  # whether one of them has, once: there may be millions
    num_classes: int
    plan: tuple[PlannedBatch, ...]
    data: DataConfig

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, position: int) -> Batch:
        planned, augment = self.plan[position], self.data.augment
        keys = planned.keys if augment != AugmentConfig() else ()
        canvas = self.data.canvases[planned.canvas]
        batch = blank_batch(
            len(planned.indices),
            canvas,
            objects=self.data.max_objects,
            ignored=self.data.max_ignored,
            mask_crop=self.data.mask_crop,
            count_lost=bool(keys),
            depth=self.any_depth,
        )
        for row, index in enumerate(planned.indices):
            if index < 0:
                continue
            decoded, name = self._decoded(index)
            try:
                shown = (
                    augmented(decoded, canvas, keys[row], augment, self._another)
                    if keys
                    else plain(decoded)
                )
                self._fill(batch, row, index, shown)
            except Exception as error:
                raise RuntimeError(f"{name}: {error}") from error
        return batch

    def _another(self, rng: np.random.Generator) -> DecodedImage:
        return self._decoded(int(rng.integers(len(self.plans))))[0]

    def _decoded(self, index: int) -> tuple[DecodedImage, str]:
        """A decoded image and the name of its file; a RuntimeError with that name if it fails."""
        record = self.source[index]
        name = record["file_name"].decode()
        try:
            if record["image_id"] != self.image_ids[index]:
                raise ValueError(
                    f"record {index} is image {record['image_id']}, not {self.image_ids[index]}: "
                    "delete the data cache"
                )
            objects = record["objects"]
            labels = np.asarray(objects["label"], np.int32)
            wrong = np.flatnonzero((labels < 1) | (labels > self.num_classes))
            if wrong.size:
                number, label = objects["annotation_id"][wrong[0]], labels[wrong[0]]
                raise ValueError(
                    f"annotation {number}: label {label} is outside 1..{self.num_classes}"
                )
            return DecodedImage(
                image=_pixels(record, self.data),
                boxes=np.asarray(objects["box"], np.float32).reshape(-1, 4),
                labels=labels,
                iscrowd=np.asarray(objects["iscrowd"], bool),
                counts=objects["counts"],
                resized=self.plans[index].resized,
                shrink=self.data.shrink,
                depth=_metres(record, self.data) if self.has_depth[index] else None,
            ), name
        except Exception as error:
            raise RuntimeError(f"{name}: {error}") from error

    def _fill(self, batch: Batch, row: int, index: int, shown: CanvasImage) -> None:
        """Writes an image and its annotations into a row of the (NumPy) batch."""
        truth, ignore = batch.ground_truth, batch.ignore
        assert truth.labels is not None
        assert truth.masks is not None
        assert truth.has_mask is not None
        height, width = shown.transform.size
        batch.images[row, :height, :width] = shown.pixels
        batch.image_sizes[row] = shown.transform.size
        batch.original_sizes[row] = shown.transform.original
        batch.scales[row] = shown.transform.scale
        batch.indices[row] = index
        batch.valid[row] = True

        kept = _largest([seen.area for seen in shown.objects], self.data.max_objects)
        for place, number in enumerate(kept):
            seen = shown.objects[number]
            truth.boxes[row, place] = seen.on_canvas
            truth.labels[row, place] = seen.label
            truth.valid[row, place] = True
            crop = seen.crop(self.data.mask_crop)
            if crop is not None:
                truth.masks[row, place] = crop
                # A mask that covers half of no cell would be an empty target.
                truth.has_mask[row, place] = crop.max() >= 128
        if batch.depth is not None and shown.depth is not None:
            batch.depth[row] = depth_cells(shown.depth, shown.transform, batch.images.shape[1:3])
        if batch.lost is not None:
            batch.lost[row] = shown.lost + len(shown.objects) - len(kept)

        crowds = _largest([seen.area for seen in shown.crowds], self.data.max_ignored)
        for place, number in enumerate(crowds):
            ignore.boxes[row, place] = shown.crowds[number].on_canvas
            ignore.valid[row, place] = True


def image_of(split: Split, index: int, data: DataConfig) -> UInt8[np.ndarray, "h w 3"]:
    """An image of a split, RGB in its own pixels.

    Raises:
        Failure: it cannot be decoded; names its file.
        ConfigError: the built data set is damaged.
    """
    try:
        return _pixels(split.source[index], data)
    except ConfigError:
        raise  # of the built data set, which it names
    except ValueError as error:
        name = split.dataset.images[index].file_name
        raise Failure(f"{split.dataset.images_dir}: {name}: {error}") from error


def _pixels(record: dict[str, Any], data: DataConfig) -> UInt8[np.ndarray, "h w 3"]:
    upright = bool(record["upright"])
    return decode_image(record["image"], upright=upright, max_pixels=data.max_pixels)


def depth_of(split: Split, index: int, data: DataConfig) -> Float[np.ndarray, "h w"] | None:
    """The depth map of an image of a split, in the image's own pixels.

    Args:
        split: the images.
        index: of one of them.
        data: scale, range and limits.

    Returns:
        float32 metres, 0 where unknown; None if the image has no map.

    Raises:
        ConfigError: the built data set is damaged.
    """
    name = split.dataset.images[index].depth_file
    if name is None:
        return None
    try:
        return _metres(split.source[index], data)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def _metres(record: dict[str, Any], data: DataConfig) -> Float[np.ndarray, "h w"]:
    if not record["depth"]:  # the file could not be read when this was built
        raise ValueError("the record has no depth map: delete the data cache")
    return decode_depth(
        record["depth"],
        scale=data.depth_scale,
        limits=data.depth_range,
        max_pixels=data.max_pixels,
    )


def _largest(areas: Sequence[float], limit: int) -> Int[np.ndarray, " k"]:
    """The places of at most `limit` areas, the largest, in their order."""
    return np.sort(np.argsort(-np.asarray(areas, np.float64), kind="stable")[:limit])
