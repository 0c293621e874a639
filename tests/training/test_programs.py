"""A compiled step serves stages of any length, and leaves the state that it is made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from mrcnn_jax.config.schema import Config, OptimizerConfig
from mrcnn_jax.training import loop
from mrcnn_jax.training.open import open_run
from mrcnn_jax.training.optimizer import lengths_of
from mrcnn_jax.training.programs import make_programs, on_devices
from mrcnn_jax.training.watch import batches


def test_stages_of_other_lengths_share_a_compiled_step(tiny_config: Config, tmp_path: Path) -> None:
    """So it is found among those that are kept; what follows from the length is handed to it."""
    programs = set()
    optimizer = OptimizerConfig(
        schedule="step", milestones=(0.5, 0.75), warmup_steps=500, accumulate_steps=3
    )
    stage = replace(tiny_config.stages[0], optimizer=optimizer)
    with open_run(replace(tiny_config, stages=(stage,)), tmp_path) as opened:
        for epochs in (1, 200):
            longer = replace(stage, epochs=epochs)
            run = replace(opened, config=replace(opened.config, stages=(longer,)))
            state = run.first_state(0, loop.first_variables(run))
            step = make_programs(run, 0, state).step_of(lengths_of(longer, run.total_steps(0)))
            programs.add(step.lower(state, loop._example(run, longer)).as_text())
            steps = run.total_steps(0)
            updates = -(-steps // 3)
            falls = [round(updates / 2), round(updates * 3 / 4)]
            found = [np.asarray(number).tolist() for number in step.lengths]
            assert found == [steps, updates, updates // 10, falls]
    assert len(programs) == 1


def test_a_step_leaves_the_variables_that_its_state_was_made_of(
    tiny_config: Config, tiny_run: Path, tmp_path: Path
) -> None:
    """It donates its state; the variables, which serve again, are another copy."""
    config = replace(tiny_config, stages=tiny_config.stages[:1])
    with open_run(config, tmp_path) as run:
        variables = loop.first_variables(run)
        before = jax.tree.map(np.array, variables)
        state = on_devices(run, run.first_state(0, variables))
        step = make_programs(run, 0, state).step_of(lengths_of(config.stages[0], 3))
        (batch,) = batches(run, config.stages[0], run.train_split, run.whole_epoch(0, 0)[:1])
        trained, _ = step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, variables))
    assert any(
        not np.array_equal(new, old)
        for new, old in zip(
            jax.tree.leaves(trained.params), jax.tree.leaves(before["params"]), strict=True
        )
    )
