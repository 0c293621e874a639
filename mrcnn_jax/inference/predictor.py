"""Run a trained network on a split of a data set, or on any images."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float32, UInt8

from mrcnn_jax import parallel
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.loader import Split, depth_of, load
from mrcnn_jax.data.order import PlannedBatch, own_rows
from mrcnn_jax.inference.depth_comparison import DepthComparison
from mrcnn_jax.inference.results import Detections, image_detections
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Prediction, Variables
from mrcnn_jax.output import progress_bar
from mrcnn_jax.pixels.geometry import boxes_to_image
from mrcnn_jax.pixels.transforms import plan_for, resize_image
from mrcnn_jax.runs.run import Run
from mrcnn_jax.runtime import compile_options
from mrcnn_jax.structures import DEPTH_STRIDE, Batch, Instances, blank_batch

Proposals = dict[int, tuple[np.ndarray, np.ndarray]]
"""Image index -> boxes (x1, y1, x2, y2) in original pixels, and their scores."""


class Predictor:
    """The network, compiled once per canvas; NumPy in, NumPy out.

    With a `mesh`, each device gets its rows of a batch, and each process those of its devices.
    """

    def __init__(self, run: Run, mesh: Mesh | None = None) -> None:
        self.run, self.mesh = run, mesh
        self._has_masks = run.has_masks
        network = MaskRCNN(run.network)
        apply: Any = network.apply
        if mesh is not None:
            everywhere, rows = PartitionSpec(), PartitionSpec(parallel.AXIS)
            # Images do not depend on each other, so devices need not communicate.
            apply = jax.shard_map(
                network.apply,
                mesh=mesh,
                in_specs=(everywhere, rows),
                out_specs=rows,
                check_vma=False,
            )
        self._apply = jax.jit(apply, **compile_options(deterministic=run.config.deterministic))
        self.load(run.variables)

    def load(self, variables: Variables) -> None:
        """Use other weights, of which this process has every array as a whole."""
        mesh = self.mesh
        if mesh is None:
            self.variables = jax.device_put(variables)
        else:
            places = jax.tree.map(lambda _: parallel.replicated(mesh), variables)
            self.variables = parallel.place(variables, places)

    def __call__(self, batch: Batch) -> Prediction:
        return self.to_host(self.dispatch(batch))

    def dispatch(self, batch: Batch) -> Prediction:
        """Begin a prediction without waiting for it; `to_host` reads the rows of this process."""
        prediction: Prediction = self._apply(self.variables, parallel.place_rows(batch, self.mesh))
        return prediction

    def to_host(self, prediction: Prediction) -> Prediction:
        """Wait for a prediction that `dispatch` began."""
        return parallel.rows_to_host(prediction, self.mesh)

    def found(self, batch: Batch, prediction: Prediction) -> Iterator[tuple[int, Detections]]:
        """Convert the detections of a batch: (row of a valid image, `Detections` with RLEs)."""
        for row in np.flatnonzero(batch.valid).tolist():
            here = jax.tree.map(operator.itemgetter(row), prediction)
            height, width = batch.original_sizes[row].tolist()
            found, scale = here.detections, batch.scales[row]
            yield row, self.in_image(found, scale, (height, width), depth=here.depth)

    def detections(
        self, image: UInt8[np.ndarray, "h w 3"], *, min_score: float = 0.0
    ) -> Detections:
        """Detect the objects in one image; masks are RLEs."""
        batch = batch_of_one(image, self.run.config.data)
        here = jax.tree.map(operator.itemgetter(0), self(batch))
        return self.in_image(
            here.detections,
            batch.scales[0],
            image.shape[:2],
            depth=here.depth,
            min_score=min_score,
        )

    def detections_of_parts(
        self, images: Sequence[UInt8[np.ndarray, "h w 3"]], *, like: tuple[int, int]
    ) -> list[Detections]:
        """Detect the objects in parts of an image, all seen at the scale of an image of `like`.

        Args:
            images: at most data.eval_batch_size, which is the size of the batch; none larger than
                `like` (height, width).
            like: as of `batch_of`.
        """
        data = self.run.config.data
        batch = batch_of(images, data, like=like, rows=data.eval_batch_size)
        return [found for _, found in self.found(batch, self(batch))]

    def in_image(
        self,
        found: Instances,
        scale: Float32[np.ndarray, " 2"],
        size: tuple[int, int],
        *,
        depth: np.ndarray | None = None,
        stride: int = DEPTH_STRIDE,
        min_score: float = 0.0,
    ) -> Detections:
        """Call `image_detections` with the run's classes and way of pasting masks.

        Masks of a head that is still random are left out, and depths, which are medians over them.
        """
        detections = image_detections(
            found,
            scale=scale,
            size=size,
            categories=self.run.meta.categories,
            paste=self.run.config.model.mask_head.paste,
            depth=depth,
            stride=stride,
            min_score=min_score,
        )
        return detections if self._has_masks else replace(detections, masks=None, depths=None)


def results_of_split(
    predictor: Predictor, split: Split, plan: Sequence[PlannedBatch]
) -> tuple[list[dict[str, Any]], Proposals, DepthComparison]:
    """Predict the images of a plan; every process calls this and gets the results of all of them.

    Returns:
        COCO results in the order of the plan's images, the proposals on each image, and predicted
        depth beside the data set's, where both are there.
    """
    data, depth = predictor.run.config.data, DepthComparison()
    results: list[dict[str, Any]] = []
    proposals: list[tuple[int, np.ndarray, np.ndarray]] = []  # image, boxes, scores
    total = sum(i >= 0 for planned in own_rows(plan, predictor.mesh) for i in planned.indices)
    with progress_bar(total, "evaluating", disable=not parallel.is_first()) as bar:
        for batch, prediction in predict_split(predictor, split, plan):
            for row, found in predictor.found(batch, prediction):
                index = int(batch.indices[row])
                image = split.dataset.images[index]
                results += found.to_coco(image.id)
                if found.depth_map is not None:
                    depth.add(index, image, found.depth_map, depth_of(split, index, data))
                seen = jax.tree.map(operator.itemgetter(row), prediction.proposals)
                seen = jax.tree.map(operator.itemgetter(seen.valid), seen)
                proposals.append(
                    (index, boxes_to_image(seen.boxes, batch.scales[row]), seen.scores)
                )
            bar.update(int(batch.valid.sum()))
    parts = parallel.gather((results, proposals, depth.packed()))
    order = [i for planned in plan for i in planned.indices if i >= 0]
    rank = {split.dataset.images[i].id: n for n, i in enumerate(order)}
    gathered = (result for part, *_ in parts for result in part)
    results = sorted(gathered, key=lambda result: rank[result["image_id"]])
    together = {index: (boxes, scores) for _, part, _ in parts for index, boxes, scores in part}
    whole = DepthComparison()
    for *_, part in parts:
        whole.merge(part)
    return results, together, whole


def predict_split(
    predictor: Predictor, split: Split, plan: Sequence[PlannedBatch]
) -> Iterator[tuple[Batch, Prediction]]:
    """Iterate over a plan's batches and their predictions: the rows of this process.

    The device predicts the next batch while the caller has one.

    Raises:
        Failure: an image cannot be loaded.
    """
    loaded = load(split, own_rows(plan, predictor.mesh), predictor.run.config.data)
    dispatched = ((batch, predictor.dispatch(batch)) for batch in loaded)
    for batch, prediction in parallel.one_ahead(dispatched):
        yield batch, predictor.to_host(prediction)


def batch_of_one(image: UInt8[np.ndarray, "h w 3"], data: DataConfig) -> Batch:
    """Put an image, without ground truth, into a batch of its own."""
    return batch_of([image], data, like=(image.shape[0], image.shape[1]), rows=1)


def batch_of(
    images: Sequence[UInt8[np.ndarray, "h w 3"]],
    data: DataConfig,
    *,
    like: tuple[int, int],
    rows: int,
) -> Batch:
    """Put images, without ground truth, into a batch, all at one scale.

    Args:
        images: at most `rows`, none larger than `like`.
        data: sizes and canvases.
        like: (height, width) of the image whose canvas and scale they get.
        rows: size of the batch; rows without an image are not valid.
    """
    plan = plan_for(*like, data)
    batch = blank_batch(rows, data.canvases[plan.canvas])
    for row, image in enumerate(images):
        size = image.shape[0], image.shape[1]
        resized = tuple(
            max(1, side * whole // original)
            for side, whole, original in zip(size, plan.resized, like, strict=True)
        )
        batch.images[row, : resized[0], : resized[1]] = resize_image(image, resized, data.shrink)
        batch.image_sizes[row], batch.original_sizes[row] = resized, size
        batch.scales[row] = np.divide(resized, size)
        batch.valid[row] = True
    return batch
