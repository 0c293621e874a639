"""Steps that are not finite: nothing moves but the counts, and beyond the limit nothing moves any
more."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mrcnn_jax.config.schema import OptimizerConfig, ParamGroup, StageConfig
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.training import stages
from mrcnn_jax.training.guard import guarded
from mrcnn_jax.training.optimizer import apply_gradients, make_optimizer

STAGE = StageConfig(
    "rpn",
    ("rpn",),
    (ParamGroup("rpn/.*"),),
    ("fpn/.*",),
    OptimizerConfig(weight_decay=0.1, clip_norm=1.0),
)
PARAMS = {"rpn": {"kernel": jnp.array([0.5, 2.0])}, "fpn": {"kernel": jnp.array([3.0])}}
LABELS = stages.labels(STAGE, PARAMS)
OPTIMIZER = make_optimizer(STAGE, PARAMS, total_steps=10)
START = TrainState(
    PARAMS,
    {"rpn": {"mean": jnp.ones(2)}},
    OPTIMIZER.init(PARAMS),
    jnp.int32(0),
    jnp.zeros(2, jnp.uint32),
)
GOOD, NO_GRADIENT, NO_LOSS = (
    jnp.array(x, jnp.float32) for x in ([1.0, 4.0], [0.0, 1.0], [-1.0, 1.0])
)


def step(
    state: TrainState,
    batch: Any,
    cached: None = None,
    optimizer: optax.GradientTransformation = OPTIMIZER,
) -> tuple[TrainState, dict[str, Any]]:
    """The loss sum(sqrt(batch * kernel)): at 0 it is finite and its gradient is not, below 0
    neither is."""
    trainable, _ = stages.split(state.params, LABELS)
    loss, grads = jax.value_and_grad(
        lambda p: jnp.sqrt(batch * p["rpn"]["kernel"]).sum() + batch.sum()
    )(trainable)
    params, opt_state = apply_gradients(optimizer, state.opt_state, state.params, grads, LABELS)
    statistics = {"rpn": {"mean": state.batch_stats["rpn"]["mean"] + batch}}
    metrics = {
        "loss/total": loss,
        "gradient_norm": jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))),
        "count": jnp.int32(3),
    }
    return state.replace(
        params=params, batch_stats=statistics, opt_state=opt_state, step=state.step + 1
    ), metrics


def bits(state: TrainState) -> list[bytes]:
    """All but the two counts."""
    return [
        np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.replace(step=0, skipped=0))
    ]


def run(batches: list[Any], allowed: int) -> list[tuple[TrainState, dict[str, Any]]]:
    guard = jax.jit(guarded(step, allowed))
    state, found = START, []
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for batch in batches:
            state, metrics = guard(state, batch)
            found.append((state, metrics))
    return found


def test_finite_steps_are_those_of_the_step_itself() -> None:
    (first, metrics), (second, _) = run([GOOD, GOOD + 1], allowed=0)
    plain = jax.jit(step)
    expected, values = plain(START, GOOD)
    assert bits(first) == bits(expected)
    assert bits(second) == bits(plain(expected, GOOD + 1)[0])
    assert (second.step, second.skipped) == (2, 0)
    assert metrics.keys() == values.keys() | {"skipped"}
    assert float(metrics["gradient_norm"]) == float(values["gradient_norm"])


@pytest.mark.parametrize("batch", [NO_GRADIENT, NO_LOSS])
def test_a_step_that_is_not_finite_moves_only_the_counts(batch: Any) -> None:
    (first, _), (second, metrics), (third, _) = run([GOOD, batch, GOOD + 1], allowed=1)
    assert np.isfinite(metrics["loss/total"]) == (batch is NO_GRADIENT)
    assert not np.isfinite(metrics["gradient_norm"])
    assert metrics["skipped"] == 1
    assert bits(second) == bits(first)
    assert (second.step, second.skipped) == (2, 1)
    expected = jax.jit(step)(first, GOOD + 1)[0]
    assert bits(third) == bits(expected)
    assert (third.step, third.skipped) == (3, 1)


@pytest.mark.parametrize("allowed", [0, 2])
def test_beyond_the_limit_the_state_stays_as_the_failing_step_found_it(allowed: int) -> None:
    *_, (failed, _), (after, metrics), (later, _) = run(
        [GOOD, *[NO_GRADIENT] * allowed, NO_LOSS, GOOD, GOOD], allowed
    )
    assert failed.skipped == allowed + 1
    assert np.isfinite(metrics["gradient_norm"])
    assert bits(failed) == bits(run([GOOD], 0)[0][0])
    assert bits(later) == bits(after) == bits(failed)
    assert later.skipped > allowed


def test_a_skipped_step_of_an_accumulated_update_counts_for_nothing() -> None:
    """The next one takes its place: three steps, of which one is not finite, are the two that
    are."""
    optimizer = make_optimizer(
        replace(STAGE, optimizer=replace(STAGE.optimizer, accumulate_steps=2)),
        PARAMS,
        total_steps=10,
    )
    guard = jax.jit(guarded(functools.partial(step, optimizer=optimizer), 1))

    def end(batches: list[Any]) -> TrainState:
        state = START.replace(opt_state=optimizer.init(PARAMS))
        for batch in batches:
            state, _ = guard(state, batch)
        return state

    assert bits(end([GOOD, NO_GRADIENT])) == bits(end([GOOD]))
    two, three = end([GOOD, GOOD + 1]), end([GOOD, NO_GRADIENT, GOOD + 1])
    assert bits(three) == bits(two)
    assert (three.step, three.skipped) == (3, 1)
    assert np.asarray(two.params["rpn"]["kernel"] != PARAMS["rpn"]["kernel"]).all()


def test_frozen_leaves_are_not_copied() -> None:
    """State that the step hands back untouched is the guard's own argument again, so that nothing
    is computed for it."""
    jaxpr = jax.make_jaxpr(guarded(step, 0))(START, GOOD)
    inputs = jax.tree.leaves_with_path(jax.tree.map(lambda _: 0, START))
    (frozen,) = (
        i
        for i, (path, _) in enumerate(inputs)
        if "fpn" in jax.tree_util.keystr(path) and "params" in jax.tree_util.keystr(path)
    )
    assert jaxpr.jaxpr.outvars[frozen] is jaxpr.jaxpr.invars[frozen]
