"""The optimiser of a stage: one chain a parameter group, nothing at all for what is frozen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import OptimizerConfig, StageConfig
from mrcnn_jax.structures import Params
from mrcnn_jax.training import stages


def make_optimizer(
    stage: StageConfig, params: Params, *, total_steps: int
) -> optax.GradientTransformation:
    """The transformation of the full parameter tree that trains the groups of `stage` and gives
    zero updates to the rest.

    The gradient, averaged over `accumulate_steps` steps, is clipped by its global norm first, over
    the trained parameters only; each group then adds the L2 term weight_decay * parameter and runs
    Adam (0.9, 0.999, 1e-8) or SGD with momentum m <- momentum m + g at `learning_rate` * lr_scale,
    or runs AdamW, whose decay is a part of the update. Frozen leaves own no state. `total_steps` is
    the length of the stage, in steps. ConfigError: see `stages.labels` and `learning_rate`.
    """
    config = stage.optimizer
    labels = stages.labels(stage, params)
    schedule = _schedule(stage, total_steps)
    transforms = {
        f"group{i}": _chain(config, schedule, group.lr_scale) for i, group in enumerate(stage.train)
    }
    # `optax.masked` would pass the raw gradients of the leaves it leaves out; the frozen ones end
    # in set_to_zero.
    groups = optax.partition(transforms | {stages.FROZEN: optax.set_to_zero()}, labels)
    trained = jax.tree.map(lambda label: label != stages.FROZEN, labels)
    if config.clip_norm is not None:
        groups = optax.chain(
            optax.masked(optax.clip_by_global_norm(config.clip_norm), trained), groups
        )
    steps = config.accumulate_steps
    if steps == 1:
        return groups
    full, left = divmod(total_steps, steps)
    # The last update of a stage averages what is left. A step that is skipped has changed nothing,
    # and is not waited for.
    several = optax.MultiSteps(
        groups, lambda updates: jnp.where(updates < full, steps, max(left, 1))
    )
    return optax.partition(
        {True: several.gradient_transformation(), False: optax.set_to_zero()}, trained
    )


def learning_rate(
    stage: StageConfig, step: int | Int[Array, ""], total_steps: int
) -> Float[Array, ""]:
    """The rate (before a group's lr_scale) of the update that the step after `step` done ones is
    of, step in 0 .. total_steps - 1.

    Of n = ceil(total_steps / accumulate_steps) updates, the one after i = step // accumulate_steps
    others: a linear warm-up, lr * (i + 1) / (warmup_steps + 1), that no update spends at zero; then
    lr, constant, on the half cosine that reaches 0 at n, or times step_factor from each
    round(milestone * n) on. ConfigError if the warm-up leaves no update of the stage, or a
    milestone is within it.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.asarray(
            _schedule(stage, total_steps)(jnp.asarray(step) // stage.optimizer.accumulate_steps),
            jnp.float32,
        )


def moving_average(average: Params, trained: Params, opt_state: Any, decay: float) -> Params:
    """`average` after a step that led to `opt_state` and `trained`: decay * average + (1 - decay) *
    trained if it made an update."""
    updated = optax.tree.get(opt_state, "mini_step", jnp.int32(0)) == 0  # of MultiSteps
    moved = optax.incremental_update(trained, average, 1 - decay)
    return jax.tree.map(lambda new, old: jnp.where(updated, new, old), moved, average)


def scaling_hint(stage: StageConfig, index: int, batch_size: int) -> str | None:
    """A line for people if the stage's learning rate was meant for batches of another size (Goyal
    et al. 2017), None if not.

    Args:
        index: of the stage in its table: how the command line calls it.
        batch_size: images a step.
    """
    config = stage.optimizer
    batch_size *= config.accumulate_steps
    if config.batch_size == batch_size:
        return None
    option = f"--stages.{index}.optimizer"
    return (
        f"learning rate {config.learning_rate:g} is in use with {batch_size} images an update, and meant for {config.batch_size}; scaled"
        f" linearly it would be {config.learning_rate * batch_size / config.batch_size:g}"
        f" ({option}.learning-rate; {option}.batch-size {batch_size} says that the rate is meant)"
    )


def apply_gradients(
    optimizer: optax.GradientTransformation,
    opt_state: Any,
    params: Params,
    grads: Params,
    labels: dict[str, Any],
) -> tuple[Params, Any]:
    """(params, opt_state) after one update; a pure function to call inside the step's jit.

    `grads` holds the trainable subtree only (`stages.split` with the same `labels`): frozen leaves
    have no gradient, since asking for one would bring their backward pass into the step. Frozen
    leaves are returned as the very arrays they came as: adding a zero update would turn -0.0 into
    0.0.
    """
    trainable, frozen = stages.split(params, labels)
    # The optimiser's masks have the full tree's shape. Nobody reads the result of these zeros: XLA
    # drops them.
    full = stages.merge(grads, jax.tree.map(jnp.zeros_like, frozen))
    with jax.numpy_dtype_promotion(
        "standard"
    ):  # optax's Adam and schedules do not pass strict promotion
        updates, opt_state = optimizer.update(full, opt_state, params)
        trainable = optax.apply_updates(trainable, stages.split(updates, labels)[0])
    return stages.merge(trainable, frozen), opt_state


def _chain(
    config: OptimizerConfig, schedule: optax.Schedule, scale: float
) -> optax.GradientTransformation:
    def rate(step: Any) -> Any:
        return schedule(step) * scale

    mask = (
        None
        if config.decay_vectors
        else lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    )
    if config.name == "adamw":
        return optax.adamw(rate, weight_decay=config.weight_decay, mask=mask)
    update = (
        optax.adam(rate)
        if config.name == "adam"
        else optax.sgd(rate, momentum=config.momentum or None)
    )
    # L2 in the gradient, as in the paper.
    return (
        optax.chain(optax.add_decayed_weights(config.weight_decay, mask), update)
        if config.weight_decay
        else update
    )


def _schedule(stage: StageConfig, total_steps: int) -> optax.Schedule:
    """Updates made -> rate."""
    config, warmup, peak = (
        stage.optimizer,
        stage.optimizer.warmup_steps,
        stage.optimizer.learning_rate,
    )
    updates = -(-total_steps // config.accumulate_steps)
    if warmup >= updates:
        raise ConfigError(
            f"stages.{stage.name}.optimizer.warmup_steps: {warmup}, but the stage has only {updates} updates"
        )
    falls: list[int] = []
    if config.schedule == "step":
        falls = [round(milestone * updates) for milestone in config.milestones]
        if falls and falls[0] < warmup:
            raise ConfigError(
                f"stages.{stage.name}.optimizer.milestones: {config.milestones[0]:g} is update {falls[0]}, within the warm-up of {warmup}"
            )
    after = (
        optax.cosine_decay_schedule(peak, updates - warmup)
        if config.schedule == "cosine"
        else optax.constant_schedule(peak)
    )
    lower = [
        optax.constant_schedule(peak * config.step_factor ** (i + 1)) for i in range(len(falls))
    ]
    if warmup == 0:
        return optax.join_schedules([after, *lower], falls)
    return optax.join_schedules(
        [optax.linear_schedule(peak / (warmup + 1), peak, warmup), after, *lower], [warmup, *falls]
    )
