"""Random mini-batches of anchors and proposals."""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Num, PRNGKeyArray

_DROP_PATH = 0x64726F70  # far from the few numbers that `image_keys` folds in


class ImageKeys(NamedTuple):
    """Random keys of each image in a batch, one per draw."""

    rpn: PRNGKeyArray  # anchors
    box: PRNGKeyArray  # proposals
    points: PRNGKeyArray  # points of masks


def image_keys(key: PRNGKeyArray, indices: Int32[Array, " b"]) -> ImageKeys:
    """The keys of a step's draws; the one place that says how they are made.

    Each image folds in its own index in the split, so its draws depend neither on its place in the
    batch nor on the other images.

    Args:
        key: the key of the training step, or of the validation.
        indices: index of each image in its split (`Batch.indices`).
    """

    def keys_of(index: Int32[Array, ""]) -> ImageKeys:
        image = jax.random.fold_in(key, index)
        rpn, box = jax.random.split(image)
        return ImageKeys(rpn, box, points=jax.random.fold_in(image, 2))  # 0 and 1: as `split`

    return jax.vmap(keys_of)(indices)


def drop_path_keys(key: PRNGKeyArray, indices: Int32[Array, " b"]) -> PRNGKeyArray:
    """Returns a key per image, by which drop path leaves branches out; as of `image_keys`."""

    def key_of(index: Int32[Array, ""]) -> PRNGKeyArray:
        return jax.random.fold_in(jax.random.fold_in(key, index), _DROP_PATH)

    return jax.vmap(key_of)(indices)


@flax.struct.dataclass
class Samples:
    """Rows drawn: positives, then negatives, then slots left empty (index 0, not valid)."""

    indices: Int32[Array, " count"]
    positive: Bool[Array, " count"]
    valid: Bool[Array, " count"]


def gather_samples(values: Num[Array, "n ..."], samples: Samples) -> Num[Array, "count ..."]:
    """The rows of `values` that were drawn (`sample`); 0 in empty slots.

    No row is drawn twice, which a GPU is told: the gradient is stored, not summed.
    """
    empty = len(values) + jnp.arange(len(samples.indices))  # each of them out of range
    places = jnp.where(samples.valid, samples.indices, empty)
    return values.at[places].get(mode="fill", fill_value=0, unique_indices=True)


def sample(
    key: PRNGKeyArray,
    *,
    positive: Bool[Array, " n"],
    negative: Bool[Array, " n"],
    count: int,
    positive_fraction: float,
) -> Samples:
    """Draws `count` rows uniformly, without replacement.

    At most floor(count * positive_fraction) are positives. Negatives fill the rest, however much
    that is; positives never replace missing negatives. A row that is both counts as positive.

    Args:
        key: of this draw.
        positive: rows to draw positives from.
        negative: rows to draw negatives from.
        count: rows to draw, a static number.
        positive_fraction: the most of `count` that positives take, in [0, 1].

    Returns:
        The rows drawn; slots that no row is left for are empty.
    """
    # The small number undoes rounding: 100 * 0.29 is 28.999999999999996.
    most_positives = math.floor(count * positive_fraction + 1e-6)
    # A random number per row; the rows of the largest are a uniform draw. (Of equal numbers, among
    # 2^23, the lower index wins: this matters only at the cut.) top_k in float32 instead of a sort:
    # 20 times cheaper on a CPU, where XLA sorts any other dtype.
    priority = jax.random.uniform(key, positive.shape, jnp.float32)
    k = min(count, positive.shape[0])
    rows = [
        jax.lax.top_k(jnp.where(among, priority, -1), k)[1]
        for among in (positive, negative & ~positive)
    ]
    positives = jnp.minimum(jnp.sum(positive), most_positives)
    negatives = jnp.minimum(jnp.sum(negative & ~positive), count - positives)

    slot = jnp.arange(count)
    is_positive, is_valid = slot < positives, slot < positives + negatives
    drawn = jnp.where(
        is_positive,
        rows[0].at[slot].get(mode="clip"),
        rows[1].at[slot - positives].get(mode="clip"),
    )
    return Samples(indices=jnp.where(is_valid, drawn, 0), positive=is_positive, valid=is_valid)
