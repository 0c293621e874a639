"""A train step that is not finite changes nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.structures import Batch
from mrcnn_jax.training.step import CachedFeatures, TrainStep


def guarded(train_step: TrainStep, allowed: int) -> TrainStep:
    """Makes `train_step` apply an update only if all metrics (losses, gradient norm) are finite.

    A step that is left out counts in `step` and `skipped`, which is added to the metrics. Once
    `skipped` exceeds `allowed`, no further step is applied: the host reads the metrics of a step
    while the next one runs, and still finds the parameters that failed.
    """

    def step(
        state: TrainState, batch: Batch, cached: CachedFeatures | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        updated, metrics = train_step(state, batch, cached)
        finite = jnp.stack([jnp.isfinite(value).all() for value in metrics.values()]).all()
        applied = finite & (state.skipped <= allowed)
        # A frozen leaf comes back as the very array it was.
        kept = jax.tree.map(
            lambda new, old: old if new is old else jnp.where(applied, new, old), updated, state
        )
        skipped = jnp.where(applied, state.skipped, state.skipped + 1)
        return kept.replace(step=updated.step, skipped=skipped), metrics | {"skipped": skipped}

    return step
