"""Optimisers against plain NumPy loops; frozen leaves bit for bit, under everything that could move
them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import OptimizerConfig, ParamGroup, StageConfig
from mrcnn_jax.training import stages
from mrcnn_jax.training.optimizer import (
    apply_gradients,
    learning_rate,
    learning_rates,
    make_optimizer,
    moving_average,
    scaling_hint,
    warmup_hint,
)

STEPS = 20
SCALES = {
    "head/kernel": 1.0,
    "head/bias": 1.0,
    "neck/kernel": 0.1,
}  # the trained leaves and their groups' lr_scale


def stage(**optimizer: Any) -> StageConfig:
    groups = (ParamGroup("head/.*"), ParamGroup("neck/.*", lr_scale=0.1))
    return StageConfig(
        name="box",
        losses=("box",),
        train=groups,
        frozen=("body/.*",),
        optimizer=OptimizerConfig(**optimizer),
    )


def initial() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "head": {
            "kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=4), jnp.float32),
        },
        "neck": {"kernel": jnp.asarray(rng.normal(size=(2, 2)), jnp.float32)},
        "body": {
            "kernel": jnp.asarray(rng.normal(size=(5, 5)), jnp.float32),
            # Values whose bits do not survive "+ 0" or a NumPy-like comparison: -0.0, a NaN with a
            # payload, subnormals, infinity.
            "odd": jnp.asarray(
                np.array([0x80000000, 0x7FC00001, 0x00000001, 0x7F800000], np.uint32).view(
                    np.float32
                )
            ),
            "half": jnp.full(3, -0.0, jnp.bfloat16),
        },
    }


def gradients(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(100 + step)
    shapes = {"head/kernel": (3, 4), "head/bias": (4,), "neck/kernel": (2, 2)}
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def nested(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        module, name = path.split("/")
        tree.setdefault(module, {})[name] = jnp.asarray(leaf)
    return tree


def run(table: StageConfig) -> tuple[dict[str, np.ndarray], Any]:
    """`STEPS` jitted updates with donated state, under the strict promotion that the step's own
    code has to pass."""
    params = initial()
    optimizer = make_optimizer(table, params, total_steps=STEPS)
    labels = stages.labels(table, params)
    state = optimizer.init(params)
    traces = []

    def step_once(params: Any, state: Any, grads: Any) -> Any:
        traces.append(1)
        return apply_gradients(optimizer, state, params, grads, labels)

    update = jax.jit(step_once, donate_argnums=(0, 1))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for step in range(STEPS):
            params, state = update(params, state, nested(gradients(step)))
    assert len(traces) == 1, "the state's types changed between steps: a second compilation"
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}, state


def rate(config: OptimizerConfig, step: int, steps: int = STEPS) -> float:
    """The schedule in plain Python."""
    peak = config.learning_rate
    step, updates = step // config.accumulate_steps, math.ceil(steps / config.accumulate_steps)
    warmup = min(config.warmup_steps, math.floor(updates / 10))
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return peak
    if config.schedule == "step":
        for milestone in config.milestones:
            peak *= config.step_factor if step >= round(milestone * updates) else 1
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (updates - warmup)))


def reference(config: OptimizerConfig) -> dict[str, np.ndarray]:
    """The same updates as a float64 loop over leaves."""
    params = {
        path: np.asarray(leaf, np.float64)
        for path, leaf in flatten_dict(initial(), sep="/").items()
        if path in SCALES
    }
    first = {path: np.zeros_like(leaf) for path, leaf in params.items()}
    second = {path: np.zeros_like(leaf) for path, leaf in params.items()}
    for made, step in enumerate(range(0, STEPS, config.accumulate_steps)):
        # One batch as large as several, whose gradient is the mean of theirs; the last one has what
        # is left.
        parts = [gradients(s) for s in range(step, min(step + config.accumulate_steps, STEPS))]
        grads = {
            path: sum(part[path].astype(np.float64) for part in parts) / len(parts)
            for path in params
        }
        if config.clip_norm is not None:
            norm = math.sqrt(sum(float((grad**2).sum()) for grad in grads.values()))
            grads = {path: grad * min(1.0, config.clip_norm / norm) for path, grad in grads.items()}
        for path, param in params.items():
            decay = config.weight_decay * param * (config.decay_vectors or param.ndim > 1)
            grad = grads[path] + decay * (config.name != "adamw")
            if config.name != "sgd":
                first[path] = 0.9 * first[path] + 0.1 * grad
                second[path] = 0.999 * second[path] + 0.001 * grad**2
                mean, variance = (
                    first[path] / (1 - 0.9 ** (made + 1)),
                    second[path] / (1 - 0.999 ** (made + 1)),
                )
                direction = mean / (np.sqrt(variance) + 1e-8) + decay * (config.name == "adamw")
            else:
                first[path] = config.momentum * first[path] + grad
                direction = first[path]
            params[path] = param - rate(config, step) * SCALES[path] * direction
    return params


RECIPES = {
    "sgd_momentum_l2": {"name": "sgd", "learning_rate": 0.02, "momentum": 0.9, "weight_decay": 0.1},
    "sgd_plain": {"name": "sgd", "learning_rate": 0.05, "momentum": 0.0},
    "sgd_clip_cosine_warmup": {
        **{"name": "sgd", "learning_rate": 0.3, "momentum": 0.9, "weight_decay": 0.1},
        **{"clip_norm": 0.5, "schedule": "cosine", "warmup_steps": 2},
    },
    "adam": {"name": "adam", "learning_rate": 1e-2},
    "adam_l2_clip": {
        "name": "adam",
        "learning_rate": 1e-2,
        "weight_decay": 0.3,
        "clip_norm": 2.0,
        "schedule": "cosine",
    },
    "adamw": {"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.5},
    "adamw_kernels_step": {
        **{"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.5, "decay_vectors": False},
        **{"schedule": "step", "warmup_steps": 2, "milestones": (0.3, 0.62), "step_factor": 0.5},
    },
    "sgd_kernels": {
        "name": "sgd",
        "learning_rate": 0.02,
        "weight_decay": 0.3,
        "decay_vectors": False,
    },
    "sgd_accumulated": {
        **{
            "name": "sgd",
            "learning_rate": 0.3,
            "momentum": 0.9,
            "weight_decay": 0.1,
            "clip_norm": 0.5,
        },
        **{"accumulate_steps": 3, "schedule": "cosine"},
    },
    "adamw_accumulated": {
        "name": "adamw",
        "learning_rate": 1e-2,
        "weight_decay": 0.5,
        "accumulate_steps": 4,
    },
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_twenty_steps_equal_a_numpy_loop_and_leave_the_frozen_bits(recipe: str) -> None:
    table = stage(**RECIPES[recipe])
    params, _ = run(table)
    expected = reference(table.optimizer)
    for path, leaf in expected.items():
        np.testing.assert_allclose(params[path], leaf, rtol=2e-5, atol=2e-6, err_msg=path)
    before = flatten_dict(initial(), sep="/")
    for path in ("body/kernel", "body/odd", "body/half"):
        assert params[path].dtype == before[path].dtype
        assert params[path].tobytes() == np.asarray(before[path]).tobytes(), path


def test_frozen_leaves_are_the_very_same_arrays() -> None:
    table = stage(name="sgd", weight_decay=0.1)
    params = initial()
    optimizer = make_optimizer(table, params, total_steps=STEPS)
    updated, _ = apply_gradients(
        optimizer,
        optimizer.init(params),
        params,
        nested(gradients(0)),
        stages.labels(table, params),
    )
    for name, leaf in params["body"].items():
        assert updated["body"][name] is leaf


@pytest.mark.parametrize("recipe", RECIPES)
def test_frozen_leaves_own_no_state(recipe: str) -> None:
    table = stage(**RECIPES[recipe])
    params = initial()
    state = make_optimizer(table, params, total_steps=STEPS).init(params)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]
    ]
    assert not [path for path in paths if "body" in path or stages.FROZEN in path]
    copies = {"adam": 2, "adamw": 2, "sgd": 1 if table.optimizer.momentum else 0}[
        table.optimizer.name
    ]
    copies += table.optimizer.accumulate_steps > 1  # the gradients so far
    moments = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.shape)
    assert moments == sorted([(3, 4), (4,), (2, 2)] * copies)


def test_the_clip_norm_sees_the_trainable_gradients_only() -> None:
    """One plain SGD step at rate 1 moves by the clipped gradient: its norm is the limit, although
    frozen leaves are huge."""
    groups = (ParamGroup("(head|neck)/.*"),)
    optimizer_config = OptimizerConfig(name="sgd", learning_rate=1.0, momentum=0.0, clip_norm=0.25)
    table = StageConfig(
        name="box", losses=("box",), train=groups, frozen=("body/.*",), optimizer=optimizer_config
    )
    params = initial()
    optimizer = make_optimizer(table, params, total_steps=1)
    updated, _ = apply_gradients(
        optimizer,
        optimizer.init(params),
        params,
        nested(gradients(0)),
        stages.labels(table, params),
    )
    moved = {
        p: np.asarray(flatten_dict(params, sep="/")[p], np.float64)
        - flatten_dict(updated, sep="/")[p]
        for p in SCALES
    }
    grads = gradients(0)
    norm = math.sqrt(sum(float((grad.astype(np.float64) ** 2).sum()) for grad in grads.values()))
    assert norm > 1
    for path, grad in grads.items():
        np.testing.assert_allclose(moved[path], grad * 0.25 / norm, rtol=1e-4, atol=1e-6)
    # The transformation itself, should somebody hand it gradients of frozen leaves: they neither
    # count nor come out.
    full = stages.merge(
        nested(grads), {"body": jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e9), params["body"])}
    )
    updates, _ = optimizer.update(full, optimizer.init(params), params)
    np.testing.assert_allclose(
        updates["head"]["kernel"], -grads["head/kernel"] * 0.25 / norm, rtol=1e-5
    )
    assert all(not np.asarray(leaf, np.float32).any() for leaf in jax.tree.leaves(updates["body"]))


def test_between_two_updates_nothing_moves_but_the_mean_of_the_gradients() -> None:
    """Three steps make an update, and 20 of them seven, the last one of two; the moving average
    follows the updates alone."""
    table = stage(name="sgd", learning_rate=0.1, momentum=0.5, accumulate_steps=3)
    params = initial()
    optimizer, labels = (
        make_optimizer(table, params, total_steps=STEPS),
        stages.labels(table, params),
    )

    @jax.jit
    def step_once(params: Any, state: Any, average: Any, grads: Any, steps: Any) -> Any:
        params, state = apply_gradients(optimizer, state, params, grads, labels)
        trained = stages.split(params, labels)[0]
        return params, state, moving_average(average, trained, state, 0.4, steps)

    def kept(found: Any) -> Any:
        """All but the frozen parameters, the mean so far and its count."""
        params, state, average = found
        return (
            stages.split(params, labels)[0],
            average,
            [leaf for _, leaf in optax.tree.get_all_with_path(state, "trace")],
        )

    average, state = stages.split(params, labels)[0], optimizer.init(params)
    found, moved = (params, state, average), []
    expected = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), average)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for step in range(STEPS):
            before, found = (
                kept(found),
                step_once(*found, nested(gradients(step)), jnp.int32(step + 1)),
            )
            trained, average, _ = kept(found)
            mean = optax.tree.get(found[1], "acc_grads")["head"]["bias"]
            if np.array_equal(trained["head"]["bias"], before[0]["head"]["bias"]):
                jax.tree.map(np.testing.assert_array_equal, kept(found), before)
                so_far = [gradients(s)["head/bias"] for s in range(step // 3 * 3, step + 1)]
                np.testing.assert_allclose(mean, np.mean(so_far, axis=0), rtol=1e-5)
            else:
                moved.append(step)
                assert not np.asarray(mean).any()
                decay = min(0.4, len(moved) / (len(moved) + 9))  # .1, .18, ... .4, .4
                expected = jax.tree.map(
                    lambda old, new, d=decay: d * old + (1 - d) * np.asarray(new, np.float64),
                    expected,
                    trained,
                )
    assert moved == [2, 5, 8, 11, 14, 17, 19]
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7),
        average,
        expected,
    )


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
@pytest.mark.parametrize("warmup", [0, 1, 4])  # of 60 updates, or 20
def test_learning_rate_is_the_formula(schedule: str, warmup: int, accumulate: int) -> None:
    table = stage(
        learning_rate=0.3, schedule=schedule, warmup_steps=warmup, accumulate_steps=accumulate
    )
    traced = jax.jit(lambda step: learning_rate(table, step, 60))
    together = learning_rates(table, 60)
    assert (together.dtype, together.shape) == (np.float32, (60,))
    for step in range(60):
        expected = rate(table.optimizer, step, 60)
        assert expected > 0
        np.testing.assert_allclose(learning_rate(table, step, 60), expected, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(together[step], expected, rtol=1e-5, atol=1e-8)
        with jax.numpy_dtype_promotion("strict"):
            value = traced(jnp.int32(step))
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("asked", "accumulate", "steps", "used"),
    [(10, 1, 100, 10), (11, 1, 100, 10), (500, 1, 109, 10), (3, 4, 77, 2), (1, 1, 9, 0)],
)
def test_a_warmup_takes_a_tenth_of_its_stage_at_most(
    asked: int, accumulate: int, steps: int, used: int
) -> None:
    """In updates: 77 steps by four are 20 of them."""
    table = stage(learning_rate=0.3, warmup_steps=asked, accumulate_steps=accumulate)
    rates = [float(learning_rate(table, step, steps)) for step in range(0, steps, accumulate)]
    assert [rate < np.float32(0.3) for rate in rates] == [i < used for i in range(len(rates))]
    line = f"stages.box.optimizer.warmup_steps: {asked}, shortened to {used}: at most a tenth of"
    line += f" the stage's {len(rates)} updates"
    assert warmup_hint(table, steps) == (None if asked == used else line)


def test_a_milestone_within_the_warmup_is_an_error() -> None:
    table = stage(schedule="step", milestones=(0.05, 0.5), warmup_steps=6)
    with pytest.raises(
        ConfigError,
        match=r"stages\.box\.optimizer\.milestones: 0\.05 is update 3, within the warm-up of 6",
    ):
        make_optimizer(table, initial(), total_steps=60)
    # At its end the first fall follows at once.
    assert float(
        learning_rate(replace(table, optimizer=replace(table.optimizer, warmup_steps=3)), 3, 60)
    ) == np.float32(1e-4)


def test_wrong_patterns_are_caught_here_too() -> None:
    table = StageConfig(
        name="box", losses=("box",), train=(ParamGroup("head/.*"),), frozen=("body/.*",)
    )
    with pytest.raises(ConfigError, match="neck/kernel"):
        make_optimizer(table, initial(), total_steps=STEPS)


def test_another_batch_size_gives_a_hint_and_scales_nothing() -> None:
    table = stage(learning_rate=0.02, batch_size=16)
    assert scaling_hint(table, "--stages.0.optimizer", 16) is None
    four = stage(learning_rate=0.02, batch_size=16, accumulate_steps=4)
    assert scaling_hint(four, "--stages.0.optimizer", 4) is None
    assert scaling_hint(table, "--stages.1.optimizer", 4) == (
        "learning rate 0.02 is used with 4 images per update, but meant for 16; scaled linearly it "
        "would be 0.005 (--stages.1.optimizer.learning-rate; "
        "--stages.1.optimizer.batch-size 4 keeps the rate)"
    )
    assert float(learning_rate(table, 0, STEPS)) == np.float32(0.02)
