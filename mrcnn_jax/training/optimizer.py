"""The optimiser of a stage: one chain per parameter group, and no state for frozen parameters."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int, Int32

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import OptimizerConfig, StageConfig
from mrcnn_jax.structures import Params
from mrcnn_jax.training import stages


class Lengths(NamedTuple):
    """Step counts that follow from the length of a stage. They are arguments of the compiled step,
    so that one program serves every length."""

    steps: int | Int32[Array, ""]
    updates: int | Int32[Array, ""]
    """Of `accumulate_steps` steps each, but perhaps the last."""
    warmup: int | Int32[Array, ""]
    """Updates."""
    boundaries: Int32[Array | np.ndarray, " milestones"]
    """The updates from which on the rate is lower."""


def lengths_of(stage: StageConfig, total_steps: int) -> Lengths:
    """Returns the numbers of a stage of so many steps.

    Raises:
        ConfigError: a milestone is within the warm-up.
    """
    config = stage.optimizer
    updates, warmup = _updates(stage, total_steps), warmup_updates(stage, total_steps)
    milestones = config.milestones if config.schedule == "step" else ()
    boundaries = [round(milestone * updates) for milestone in milestones]
    if boundaries and boundaries[0] < warmup:
        raise ConfigError(
            f"stages.{stage.name}.optimizer.milestones: {milestones[0]:g} is update "
            f"{boundaries[0]}, within the warm-up of {warmup}"
        )
    return Lengths(total_steps, updates, warmup, np.array(boundaries, np.int32))


def make_optimizer(
    stage: StageConfig, params: Params, *, total_steps: int
) -> optax.GradientTransformation:
    """Returns `optimizer_of` a stage of so many steps.

    Raises:
        ConfigError: as of `stages.labels` and `lengths_of`.
    """
    return optimizer_of(stage, params, lengths_of(stage, total_steps))


def optimizer_of(
    stage: StageConfig, params: Params, lengths: Lengths
) -> optax.GradientTransformation:
    """Makes the transformation that trains the groups of `stage` and leaves the rest as it is.

    The gradient, averaged over `accumulate_steps` steps, is first clipped by its global norm over
    the trained parameters. Each group then adds the L2 term weight_decay * parameter and runs Adam
    (0.9, 0.999, 1e-8) or SGD with momentum m <- momentum m + g at `learning_rate` * lr_scale, or
    runs AdamW, whose decay is a part of the update. Frozen leaves have no state.

    Args:
        params: the full parameter tree; only its names are read.
        lengths: of the stage.

    Raises:
        ConfigError: as of `stages.labels`.
    """
    config = stage.optimizer
    labels = stages.labels(stage, params)
    rate = functools.partial(_rate, stage.optimizer, lengths)
    chains = {
        f"group{i}": _chain(config, rate, group.lr_scale) for i, group in enumerate(stage.train)
    }
    # `optax.masked` would pass on the raw gradients of the leaves that it leaves out: the frozen
    # ones end in set_to_zero.
    groups = optax.partition(chains | {stages.FROZEN: optax.set_to_zero()}, labels)
    trained = jax.tree.map(lambda label: label != stages.FROZEN, labels)
    if config.clip_norm is not None:
        clip = optax.clip_by_global_norm(config.clip_norm)
        groups = optax.chain(optax.masked(clip, trained), groups)
    steps = config.accumulate_steps
    if steps == 1:
        return groups
    full, left = lengths.steps // steps, lengths.steps % steps
    # The last update of a stage averages the steps that are left. A skipped step has changed
    # nothing: the next one takes its place, so that the last update may lack one.
    several = optax.MultiSteps(
        groups, lambda updates: jnp.where(updates < full, steps, jnp.maximum(left, 1))
    ).gradient_transformation()
    return optax.partition({True: several, False: optax.set_to_zero()}, trained)


def learning_rate(
    stage: StageConfig, step: int | Int[Array, ""], total_steps: int
) -> Float[Array, ""]:
    """The learning rate, before a group's lr_scale, of the update that a step belongs to.

    For update i = step // accumulate_steps of n = ceil(total_steps / accumulate_steps): a linear
    warm-up of w = `warmup_updates`, lr * (i + 1) / (w + 1), that never is zero; then lr, constant,
    on the half cosine that reaches 0 at n, or times step_factor from each round(milestone * n) on.

    Args:
        step: steps done before, 0 .. total_steps - 1.

    Raises:
        ConfigError: as of `lengths_of`.
    """
    config, lengths = stage.optimizer, lengths_of(stage, total_steps)
    with jax.numpy_dtype_promotion("standard"):
        return _rate(config, lengths, jnp.asarray(step) // config.accumulate_steps)


@functools.lru_cache(maxsize=1)
def learning_rates(stage: StageConfig, total_steps: int) -> Float32[np.ndarray, " steps"]:
    """`learning_rate` of every step of a stage.

    Computed one by one while a stage runs, each would wait for the step that the device is busy
    with.
    """
    steps = jnp.arange(total_steps)
    return np.asarray(jax.vmap(lambda step: learning_rate(stage, step, total_steps))(steps))


def warmup_updates(stage: StageConfig, total_steps: int) -> int:
    """The updates of a stage's warm-up: `warmup_steps`, but no more than a tenth of all.

    Args:
        total_steps: length of the stage.
    """
    return min(stage.optimizer.warmup_steps, _updates(stage, total_steps) // 10)


def warmup_hint(stage: StageConfig, total_steps: int) -> str | None:
    """A line for users if the stage is too short for its warm-up."""
    asked, used = stage.optimizer.warmup_steps, warmup_updates(stage, total_steps)
    if asked == used:
        return None
    return (
        f"stages.{stage.name}.optimizer.warmup_steps: {asked}, shortened to {used}: at most a tenth"
        f" of the stage's {_updates(stage, total_steps)} updates"
    )


def moving_average(
    average: Params, trained: Params, opt_state: Any, decay: float, steps: Int[Array, ""]
) -> Params:
    """d * average + (1 - d) * trained if the step that led to `opt_state` was an update.

    After n updates d is min(decay, n / (n + 9)), as in TensorFlow's ExponentialMovingAverage: so a
    short training does not average in what it began with, which may be random.

    Args:
        steps: that were taken, that one too, without skipped ones.
    """
    updated = optax.tree.get(opt_state, "mini_step", jnp.int32(0)) == 0  # of MultiSteps
    updates = optax.tree.get(opt_state, "gradient_step", steps).astype(jnp.float32)
    now = jnp.minimum(jnp.float32(decay), updates / (updates + 9))
    moved = optax.incremental_update(trained, average, 1 - now)
    return jax.tree.map(lambda new, old: jnp.where(updated, new, old), moved, average)


def scaling_hint(stage: StageConfig, option: str, batch_size: int) -> str | None:
    """A line for users if the learning rate was meant for another batch size (Goyal et al. 2017).

    Args:
        stage: with the rate.
        option: how its optimiser is called, "--stages.0.optimizer" for example.
        batch_size: images per step.
    """
    config = stage.optimizer
    batch_size *= config.accumulate_steps
    if config.batch_size == batch_size:
        return None
    scaled = config.learning_rate * batch_size / config.batch_size
    return (
        f"learning rate {config.learning_rate:g} is used with {batch_size} images per update, but "
        f"meant for {config.batch_size}; scaled linearly it would be {scaled:g} "
        f"({option}.learning-rate; {option}.batch-size {batch_size} keeps the rate)"
    )


def apply_gradients(
    optimizer: optax.GradientTransformation,
    opt_state: Any,
    params: Params,
    grads: Params,
    labels: dict[str, Any],
) -> tuple[Params, Any]:
    """Applies one update inside the step's jit, and returns (params, opt_state).

    `grads` holds the trainable subtree only (`stages.split` with the same `labels`): a gradient of
    frozen leaves would bring their backward pass into the step. Frozen leaves are returned as the
    very arrays that came in: adding a zero update would turn -0.0 into 0.0.
    """
    trainable, frozen = stages.split(params, labels)
    # The optimiser's masks have the shape of the full tree. Nothing reads the results of these
    # zeros, so XLA drops them.
    full = stages.merge(grads, jax.tree.map(jnp.zeros_like, frozen))
    # Optax's Adam and schedules do not pass strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(full, opt_state, params)
        trainable = optax.apply_updates(trainable, stages.split(updates, labels)[0])
    return stages.merge(trainable, frozen), opt_state


def _chain(
    config: OptimizerConfig, schedule: optax.Schedule, scale: float
) -> optax.GradientTransformation:
    def rate(update: Any) -> Any:
        return schedule(update) * scale

    def no_vectors(params: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    mask = None if config.decay_vectors else no_vectors
    if config.name == "adamw":
        return optax.adamw(rate, weight_decay=config.weight_decay, mask=mask)
    momentum = config.momentum or None
    update = optax.adam(rate) if config.name == "adam" else optax.sgd(rate, momentum=momentum)
    if not config.weight_decay:
        return update
    # L2 in the gradient, as in the paper.
    return optax.chain(optax.add_decayed_weights(config.weight_decay, mask), update)


def _updates(stage: StageConfig, total_steps: int) -> int:
    return -(-total_steps // stage.optimizer.accumulate_steps)


def _rate(config: OptimizerConfig, lengths: Lengths, update: Int[Array, ""]) -> Float32[Array, ""]:
    """The rate of an update, as of `learning_rate`."""
    warmup, peak = lengths.warmup, jnp.float32(config.learning_rate)
    rising, falling = peak * (update + 1) / (warmup + 1), peak
    if config.schedule == "cosine":
        share = jnp.clip((update - warmup) / (lengths.updates - warmup), 0, 1)
        falling = peak * jnp.cos(jnp.pi / 2 * share) ** 2
    elif config.schedule == "step":
        factors = (config.step_factor**i for i in range(len(lengths.boundaries) + 1))
        rates = jnp.float32([config.learning_rate * factor for factor in factors])
        falling = rates[jnp.sum(update >= lengths.boundaries)]
    return jnp.asarray(jnp.where(update < warmup, rising, falling), jnp.float32)
