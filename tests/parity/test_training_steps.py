"""benchmarks/accuracy_vs_torchvision.py: both sides take the same steps, and the peer resumes."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from parity.compare import Measured

pytest.importorskip("torchvision")

import joint_run
from accuracy_vs_torchvision import parser
from peer_training import Peer

from mrcnn_jax.data.loader import Split, load, plan_once
from mrcnn_jax.models.mask_rcnn import MaskRCNN
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.structures import Batch
from mrcnn_jax.training.optimizer import make_optimizer
from mrcnn_jax.training.step import make_train_step

STEPS = 3
# After rounding has gone through the updates; masks: 0 or 1 here, averages there.
BOUNDS = {"rpn_objectness": 1e-3, "rpn_box": 1e-3, "box_class": 1e-3, "box_box": 1e-3, "mask": 0.02}


def test_steps_of_both_sides(data_folder: Path, tmp_path: Path, measured: Measured) -> None:
    """Nothing is left to chance: every anchor and every proposal is a sample."""
    arguments = parser().parse_args(
        ["--steps", str(STEPS), "--all-samples", "--workdir", str(tmp_path)]
    )
    joint_run.prepare(arguments)
    plan, config = joint_run.planned_config(arguments)
    split, _ = joint_run.splits(config)
    batches = list(load(split, plan_once(split, config.data.batch_size), config.data))
    assert len(batches) == plan.steps == STEPS

    with np.load(joint_run.initial_weights(arguments)) as initial:
        variables = unflatten_dict(dict(initial), sep="/")
    (stage,), params = config.stages, variables["params"]
    optimizer = make_optimizer(stage, params, total_steps=plan.steps)
    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(params, variables["batch_stats"], optimizer.init(params), jnp.int32(0), key)
    step = jax.jit(make_train_step(MaskRCNN(config.model), stage, params, optimizer))

    peer = Peer(arguments, config)
    for number, batch in enumerate(batches):
        state, ours = step(state, batch)
        if number == STEPS - 1:
            peer.save(tmp_path / "checkpoint.pt", number)
        theirs = peer_step(peer, batch, split, plan.rates[number])
        for name, bound in BOUNDS.items():
            measured(
                f"loss {name} of a step",
                "v1",
                abs(float(ours[f"loss/{name}"]) - theirs[name]) / theirs[name],
                bound,
            )

    again = Peer(arguments, config)
    assert again.restore(tmp_path / "none.pt") == 0
    assert again.restore(tmp_path / "checkpoint.pt") == STEPS - 1
    assert peer_step(again, batches[-1], split, plan.rates[-1]) == theirs
    assert (
        peer_step(again, batches[-1], split, plan.rates[-1]) != theirs
    )  # which it made a step from


def peer_step(peer: Peer, batch: Batch, split: Split, rate: float) -> dict[str, float]:
    return peer.train_step(peer.images(batch), peer.targets(batch, split.source), rate=rate, seed=0)
