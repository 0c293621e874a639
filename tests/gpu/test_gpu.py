"""A GPU beside the CPU of its machine: losses, updates, detections, frozen parameters, resuming.

    JAX_PLATFORMS=cuda,cpu python -m pytest -n 0 tests/gpu

$MRCNN_GPU_TESTS=cpu takes the CPU for the GPU, to try the tests themselves.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from training.test_step import BOX, CONFIG, MASK, RPN, SGD, batch, moved

from mrcnn_jax import runtime
from mrcnn_jax.config.schema import Config, ParamGroup, StageConfig
from mrcnn_jax.config.tables import joint
from mrcnn_jax.models.initialise import initialise
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Variables, example_batch
from mrcnn_jax.runs.run import load_run
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.training.loop import train
from mrcnn_jax.training.optimizer import make_optimizer
from mrcnn_jax.training.step import make_train_step

PLATFORM = os.environ.get("MRCNN_GPU_TESTS", "gpu")
pytestmark = pytest.mark.skipif(
    PLATFORM == "gpu" and jax.default_backend() != "gpu", reason="no GPU"
)
# Frozen batch norm: on the few cells of the tiny network, batch statistics would magnify rounding.
MODEL = MaskRCNN(replace(CONFIG, resnet=replace(CONFIG.resnet, norm="frozen")))
JOINT = joint((ParamGroup(".*"),), epochs=1, optimizer=SGD)[0]
LOSS, GRADIENT = (
    1e-4,
    1e-3,
)  # bounds: of each loss; of a parameter's change, relative to the largest


@pytest.fixture(autouse=True)
def float32_products() -> Iterator[None]:
    """A GPU would round factors to 10 bits, in the layers too."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def variables() -> Variables:
    return jax.tree.map(np.asarray, initialise(MODEL, example_batch((64, 64)), seed=0))


def on(platform: str, function: Any, *arguments: Any) -> Any:
    """The result of a compiled function on a device of that platform, as NumPy arrays."""
    device = jax.devices(platform)[0]
    options = runtime.compiler_options(platform)
    placed = jax.device_put(arguments, device)
    return jax.tree.map(np.asarray, jax.jit(function, compiler_options=options)(*placed))


def step(platform: str, stage: StageConfig, variables: Variables) -> tuple[TrainState, Any, Any]:
    """State and metrics after one step of SGD, and the state before."""
    optimizer = make_optimizer(stage, variables["params"], total_steps=100)
    start = TrainState(
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
        step=np.int32(0),
        key=jax.random.key_data(jax.random.key(0)),
    )
    function = make_train_step(MODEL, stage, variables["params"], optimizer)
    state, metrics = on(platform, function, start, batch(0))
    return state, metrics, jax.tree.map(np.asarray, start)


@pytest.mark.parametrize("stage", [RPN, BOX, MASK, JOINT], ids=lambda stage: stage.name)
def test_losses_and_updates_are_those_of_the_cpu(stage: StageConfig, variables: Variables) -> None:
    stage = replace(stage, optimizer=SGD, ema_decay=0.0)
    (expected, losses, start), (state, found, _) = (
        step(platform, stage, variables) for platform in ("cpu", PLATFORM)
    )
    assert losses.keys() == found.keys()
    for name in losses:
        assert abs(found[name] - losses[name]) <= LOSS * max(1, abs(losses[name])), name
    before, ours, theirs = (
        flatten_dict(tree, sep="/") for tree in (start.params, state.params, expected.params)
    )
    largest = max(float(np.abs(theirs[path] - before[path]).max()) for path in before)
    for path in before:
        np.testing.assert_allclose(
            ours[path] - before[path],
            theirs[path] - before[path],
            atol=GRADIENT * largest,
            err_msg=path,
        )


def test_frozen_parameters_keep_their_bits(variables: Variables) -> None:
    state, _, start = step(PLATFORM, replace(BOX, ema_decay=0.0), variables)
    changed = moved(start.params, state.params)
    assert changed
    assert all(path.startswith("box_head/") for path in changed)
    assert moved(start.batch_stats, state.batch_stats) == set()


def test_detections_are_those_of_the_cpu(variables: Variables) -> None:
    expected, found = (
        on(platform, MODEL.apply, variables, batch(0)).detections for platform in ("cpu", PLATFORM)
    )
    assert expected.valid.any()
    np.testing.assert_array_equal(found.valid, expected.valid)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.01)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(found.masks, expected.masks, atol=1e-3)


def test_a_deterministic_run_resumes_with_equal_bits(tiny_config: Config, tmp_path: Path) -> None:
    """The whole run on the default device, and one that goes on from its first checkpoint."""
    config = replace(
        tiny_config,
        stages=joint((ParamGroup(".*"),), epochs=2, optimizer=SGD),
        deterministic=True,
        save_every_steps=tiny.STEPS,
        keep_checkpoints=9,
    )
    train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for checkpoint in (tmp_path / "resumed" / "checkpoints").iterdir():
        if not checkpoint.name.startswith(f"{tiny.STEPS:08d}-"):
            shutil.rmtree(checkpoint)
    train(config, tmp_path / "resumed")
    whole, resumed = (load_run(tmp_path / name).variables for name in ("whole", "resumed"))
    assert moved(whole["params"], resumed["params"]) == set()
    rows = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "resumed")]
    assert rows[0] == rows[1]
