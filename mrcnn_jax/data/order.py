"""The order of an epoch: which images make each batch, planned before anything is loaded.

The plan is a pure function of (canvas of each image, how often each is repeated, seed, epoch) and
holds the keys of the augmentation. The loader thus has no state worth saving: to resume, or to
replay a step, pass the rest of the plan to `loader.load`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from mrcnn_jax.data.records import CocoDataset


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


def repeat_factors(dataset: CocoDataset, threshold: float) -> Float[np.ndarray, " n"]:
    """How often each image is used in an epoch, at least once (Gupta et al. 2019, section 5).

    Args:
        dataset: crowd regions do not count; an image without objects is used once.
        threshold: classes in a smaller share of the images are repeated.

    Returns:
        max(1, sqrt(threshold / share of the images with the class)) of each image's rarest class.
    """
    labels = [image.labels for image in dataset.images]
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


def own_rows(plan: Sequence[PlannedBatch], mesh: Mesh | None) -> list[PlannedBatch]:
    """This process's rows of every batch of a plan, which is first padded with -1 to a multiple of
    the number of devices. Without a mesh, the whole plan."""
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
