"""From a checked data set to padded batches of one canvas, in an order that is made on the host
before the epoch.

The order is a pure function of (canvases of the images, how often each is repeated, seed, epoch),
and the plan holds what augmentation is drawn from, so the loader has no state worth saving: to
resume, or to replay a step, pass the rest of the plan to `load`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import Float, Int

from mrcnn_jax.config.schema import AugmentConfig, DataConfig
from mrcnn_jax.data.augment import Picture, Scene, augmented, plain
from mrcnn_jax.data.builder import RandomAccess, build
from mrcnn_jax.data.coco import CocoDataset
from mrcnn_jax.data.images import check_split
from mrcnn_jax.data.transforms import Plan, resize_plan
from mrcnn_jax.pixels.decode import decode_image
from mrcnn_jax.structures import Batch, blank_batch

TRAIN = "train"


@dataclass(frozen=True)
class Split:
    """One annotation file, ready to be loaded: image i is `dataset.images[i]`, `source[i]` and
    `plans[i]`."""

    name: str
    dataset: CocoDataset
    source: RandomAccess
    plans: tuple[Plan, ...]


@dataclass(frozen=True)
class PlannedBatch:
    """A canvas number and the images that go onto it, filled up with -1.

    `keys`: for each of them, what its augmentation is drawn from; none: they are loaded as they
    are, whatever `data.augment` says.
    """

    canvas: int
    indices: tuple[int, ...]
    keys: tuple[tuple[int, ...], ...] = ()


def open_split(
    name: str, annotations: str | Path, images: str | Path, *, cache: Path, data: DataConfig
) -> Split:
    """Reads, checks and (unless `cache` has it) builds a split; what was lost on the way is in
    `dataset.report`.

    The split named "train" leaves out images without objects unless `data.keep_empty`. ConfigError
    as of `check_split` and `build`.
    """
    keep_empty = data.keep_empty or name != TRAIN
    dataset, folder = check_split(
        Path(annotations), Path(images), cache=cache, data=data, keep_empty=keep_empty
    )
    plans = tuple(resize_plan(image.height, image.width, data) for image in dataset.images)
    return Split(name, dataset, build(dataset, folder), plans)


def repeat_factors(dataset: CocoDataset, threshold: float) -> Float[np.ndarray, " n"]:
    """How often each image is used in an epoch, 1 or more (Gupta et al. 2019, section 5): max(1,
    sqrt(threshold / share)) of its rarest class, where share is that of the images with the class.
    Crowd regions do not count; an image without objects is used once.
    """
    labels = [
        {record.label for record in image.objects if not record.iscrowd} for image in dataset.images
    ]
    images_with = Counter(label for found in labels for label in found)
    wanted = threshold * len(labels)
    return np.array(
        [
            max([1.0, *(math.sqrt(wanted / images_with[label]) for label in found)])
            for found in labels
        ]
    )


def plan_epoch(
    canvas_of_image: Sequence[int],
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool,
    repeats: Float[np.ndarray, " n"] | None = None,
) -> list[PlannedBatch]:
    """The batches of an epoch: every image once, one canvas a batch, incomplete batches filled up
    with -1.

    Their number is the same in every epoch. With `shuffle`, as in training, images are permuted
    within their canvas, batches of all canvases are mixed, and every image has the key of its
    augmentation; without, they come by canvas and image number.

    With `repeats` (`repeat_factors`) an image comes as often as its factor says: its whole part,
    and once more with a chance of what is left. For the number of batches to stay, how many of a
    canvas come once more is fixed, the sum of their chances rounded, and the chances are scaled to
    it: of which images, each epoch draws anew.
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
            batches.append(
                PlannedBatch(
                    int(canvas), (*indices, *[-1] * fill), (*keys, *[()] * fill) if shuffle else ()
                )
            )
    return [batches[i] for i in rng.permutation(len(batches))] if shuffle else batches


def _times(factors: Float[np.ndarray, " n"], rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """Whole numbers in place of the factors, of one sum in every draw: systematic sampling of what
    is over their whole parts."""
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
    """Every image of a split exactly once, in order, or its first `limit` images."""
    return plan_epoch(
        [plan.canvas for plan in split.plans][:limit], batch_size, seed=0, epoch=0, shuffle=False
    )


def load(split: Split, plan: Sequence[PlannedBatch], data: DataConfig) -> Iterator[Batch]:
    """Batches of NumPy arrays in exactly the order of `plan`, made ahead by threads or, if
    `data.workers`, by processes.

    Nothing is read before the first `next`. An image that cannot be loaded raises a RuntimeError
    that names its file. Worker processes are spawned: the caller's script needs a `__main__` guard.
    """
    images = _Batches(
        split.source,
        split.plans,
        tuple(i.id for i in split.dataset.images),
        len(split.dataset.categories),
        tuple(plan),
        data,
    )
    dataset = grain.MapDataset.source(images)
    if data.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain hands absl's flags on to its processes
        in_process = dataset.to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        )
        iterator = iter(
            in_process.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=2)
            )
        )
    else:
        iterator = iter(
            dataset.to_iter_dataset(
                grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=data.threads + 2)
            )
        )
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
        )
        for row, index in enumerate(planned.indices):
            if index < 0:
                continue
            picture, name = self._picture(index)
            try:
                if keys:
                    scene = augmented(
                        picture,
                        canvas,
                        keys[row],
                        augment,
                        lambda rng: self._picture(int(rng.integers(len(self.plans))))[0],
                    )
                else:
                    scene = plain(picture)
                self._fill(batch, row, index, scene)
            except Exception as error:
                raise RuntimeError(f"{name}: {error}") from error
        return batch

    def _picture(self, index: int) -> tuple[Picture, str]:
        """An image, decoded, and the name of its file; a RuntimeError names that if it fails."""
        record = self.source[index]
        name = record["file_name"].decode()
        try:
            if record["image_id"] != self.image_ids[index]:
                raise ValueError(
                    f"record {index} is image {record['image_id']}, not {self.image_ids[index]}: delete the data cache"
                )
            objects = record["objects"]
            labels = np.asarray(objects["label"], np.int32)
            wrong = np.flatnonzero((labels < 1) | (labels > self.num_classes))
            if wrong.size:
                number = objects["annotation_id"][wrong[0]]
                raise ValueError(
                    f"annotation {number}: label {labels[wrong[0]]} is outside 1..{self.num_classes}"
                )
            return Picture(
                image=decode_image(
                    record["image"],
                    upright=bool(record["upright"]),
                    max_pixels=self.data.max_pixels,
                ),
                boxes=np.asarray(objects["box"], np.float32).reshape(-1, 4),
                labels=labels,
                iscrowd=np.asarray(objects["iscrowd"], bool),
                counts=objects["counts"],
                resized=self.plans[index].resized,
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
                # A mask that covers no cell by half would be an empty target.
                truth.has_mask[row, place] = crop.max() >= 128
        if batch.lost is not None:
            batch.lost[row] = scene.lost + len(scene.objects) - len(kept)

        for place, number in enumerate(
            _largest([seen.area for seen in scene.crowds], self.data.max_ignored)
        ):
            ignore.boxes[row, place] = scene.crowds[number].on_canvas
            ignore.valid[row, place] = True


def _largest(areas: Sequence[float], limit: int) -> Int[np.ndarray, " k"]:
    """At most `limit` places, those of the largest areas, in their order."""
    return np.sort(np.argsort(-np.asarray(areas, np.float64), kind="stable")[:limit])


def own_rows(plan: Sequence[PlannedBatch], mesh: Mesh | None) -> list[PlannedBatch]:
    """What this process loads of a plan: its rows of every batch, which is filled up (-1) to as
    many for each device."""
    if mesh is None:
        return list(plan)
    own = []
    for planned in plan:
        filled = planned.indices + (-1,) * (-len(planned.indices) % mesh.size)
        share = len(filled) // jax.process_count()
        start = jax.process_index() * share
        own.append(
            PlannedBatch(
                planned.canvas, filled[start : start + share], planned.keys[start : start + share]
            )
        )
    return own
