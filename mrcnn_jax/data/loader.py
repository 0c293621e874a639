"""From a checked data set to padded batches, each of one canvas, in an order planned per epoch.

The plan is a pure function of (canvas of each image, how often each is repeated, seed, epoch) and
holds the keys of the augmentation. The loader thus has no state worth saving: to resume, or to
replay a step, pass the rest of the plan to `load`.
"""

from __future__ import annotations

import math
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from mrcnn_jax.cli import Failure
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import AugmentConfig, DataConfig
from mrcnn_jax.data.builder import RandomAccess, build
from mrcnn_jax.data.images import check_split
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.pixels.augment import Picture, Scene, augmented, plain
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


@dataclass(frozen=True)
class PlannedBatch:
    """The number of a canvas and the images that go onto it, filled up with -1.

    `keys` are those of the images' augmentation; if empty, nothing is augmented, whatever
    `data.augment` says.
    """

    canvas: int
    indices: tuple[int, ...]
    keys: tuple[tuple[int, ...], ...] = ()

    @property
    def images(self) -> list[int]:
        """The indices without what fills the batch up."""
        return [index for index in self.indices if index >= 0]


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


def repeat_factors(dataset: CocoDataset, threshold: float) -> Float[np.ndarray, " n"]:
    """How often each image is used in an epoch, at least once (Gupta et al. 2019, section 5).

    Args:
        dataset: crowd regions do not count; an image without objects is used once.
        threshold: classes in a smaller share of the images are repeated.

    Returns:
        max(1, sqrt(threshold / share of the images with the class)) of each image's rarest class.
    """
    labels = [{o.label for o in image.objects} for image in dataset.images]
    images_with = Counter(label for found in labels for label in found)
    wanted = threshold * len(labels)
    factors = ((math.sqrt(wanted / images_with[label]) for label in found) for found in labels)
    return np.array([max([1.0, *its]) for its in factors])


def plan_epoch(
    canvas_of_image: Sequence[int],
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool,
    repeats: Float[np.ndarray, " n"] | None = None,
) -> list[PlannedBatch]:
    """The batches of an epoch, as many in every epoch.

    Args:
        canvas_of_image: canvas number of each image.
        batch_size: images per batch; incomplete batches are filled up with -1.
        seed, epoch: what the order is drawn from.
        shuffle: permute images within their canvas, mix the batches of all canvases, and give every
            image the key of its augmentation. Otherwise images come by canvas and number.
        repeats: how often each image comes (`repeat_factors`): the whole part of its factor, and
            once more with the probability of the rest. So that the number of batches stays the
            same, the number of extra images per canvas is fixed to the rounded sum of these
            probabilities, which are scaled to it; each epoch draws anew which images they are.
    """
    rng = np.random.default_rng((seed, epoch))
    canvases = np.asarray(canvas_of_image)
    used: Counter[int] = Counter()
    batches = []
    for canvas in np.unique(canvases):
        members = np.flatnonzero(canvases == canvas)
        if repeats is not None:
            members = np.repeat(members, _times(repeats[members], rng))
        if shuffle:
            members = rng.permutation(members)
        for start in range(0, len(members), batch_size):
            indices = members[start : start + batch_size].tolist()
            fill = batch_size - len(indices)
            keys: list[tuple[int, ...]] = []
            for index in indices if shuffle else ():
                used[index] += 1
                keys.append((seed, epoch, used[index], index))
            keys += [()] * fill if shuffle else []
            batches.append(PlannedBatch(int(canvas), (*indices, *[-1] * fill), tuple(keys)))
    return [batches[i] for i in rng.permutation(len(batches))] if shuffle else batches


def _times(factors: Float[np.ndarray, " n"], rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """Whole numbers for the factors, always of the same sum: systematic sampling of fractions."""
    times = np.floor(factors)
    chances = factors - times
    more = int(chances.sum() + 0.5)
    if more:
        order = rng.permutation(len(factors))
        marks = np.append(0, np.cumsum(chances[order]) * (more / chances.sum()))
        marks[-1] = more
        times[order] += np.diff(np.floor(marks + float(rng.random(dtype=np.float32))))
    return times.astype(np.intp)


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
    images = _Batches(
        split.source,
        split.plans,
        tuple(image.id for image in split.dataset.images),
        tuple(depth and image.depth_file is not None for image in split.dataset.images),
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
            depth=any(self.has_depth),
        )
        for row, index in enumerate(planned.indices):
            if index < 0:
                continue
            picture, name = self._picture(index)
            try:
                scene = (
                    augmented(picture, canvas, keys[row], augment, self._another)
                    if keys
                    else plain(picture)
                )
                self._fill(batch, row, index, scene)
            except Exception as error:
                raise RuntimeError(f"{name}: {error}") from error
        return batch

    def _another(self, rng: np.random.Generator) -> Picture:
        return self._picture(int(rng.integers(len(self.plans))))[0]

    def _picture(self, index: int) -> tuple[Picture, str]:
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
            return Picture(
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

    def _fill(self, batch: Batch, row: int, index: int, scene: Scene) -> None:
        """Writes an image and its annotations into a row of the (NumPy) batch."""
        truth, ignore = batch.ground_truth, batch.ignore
        assert truth.labels is not None
        assert truth.masks is not None
        assert truth.has_mask is not None
        height, width = scene.view.size
        batch.images[row, :height, :width] = scene.pixels
        batch.image_sizes[row] = scene.view.size
        batch.original_sizes[row] = scene.view.original
        batch.scales[row] = scene.view.scale
        batch.indices[row] = index
        batch.valid[row] = True

        kept = _largest([seen.area for seen in scene.objects], self.data.max_objects)
        for place, number in enumerate(kept):
            seen = scene.objects[number]
            truth.boxes[row, place] = seen.on_canvas
            truth.labels[row, place] = seen.label
            truth.valid[row, place] = True
            crop = seen.crop(self.data.mask_crop)
            if crop is not None:
                truth.masks[row, place] = crop
                # A mask that covers half of no cell would be an empty target.
                truth.has_mask[row, place] = crop.max() >= 128
        if batch.depth is not None and scene.depth is not None:
            batch.depth[row] = depth_cells(scene.depth, scene.view, batch.images.shape[1:3])
        if batch.lost is not None:
            batch.lost[row] = scene.lost + len(scene.objects) - len(kept)

        crowds = _largest([seen.area for seen in scene.crowds], self.data.max_ignored)
        for place, number in enumerate(crowds):
            ignore.boxes[row, place] = scene.crowds[number].on_canvas
            ignore.valid[row, place] = True


def image_of(split: Split, index: int, data: DataConfig) -> UInt8[np.ndarray, "h w 3"]:
    """An image of a split, RGB in its own pixels.

    Raises:
        Failure: it cannot be loaded; names its file.
    """
    try:
        return _pixels(split.source[index], data)
    except (ValueError, RuntimeError) as error:
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


def own_rows(plan: Sequence[PlannedBatch], mesh: Mesh | None) -> list[PlannedBatch]:
    """This process's rows of every batch of a plan; batches are filled up (-1) to as many rows for
    each device. Without a mesh, the whole plan."""
    if mesh is None:
        return list(plan)
    own = []
    for planned in plan:
        filled = planned.indices + (-1,) * (-len(planned.indices) % mesh.size)
        share = len(filled) // jax.process_count()
        start = jax.process_index() * share
        rows = slice(start, start + share)
        own.append(PlannedBatch(planned.canvas, filled[rows], planned.keys[rows]))
    return own
