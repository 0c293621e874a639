"""The compiled programs of a stage: a step of its training, and one of its validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mrcnn_jax import parallel
from mrcnn_jax.config.schema import Config
from mrcnn_jax.models.mask_rcnn import Variables
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.runtime import compile_options
from mrcnn_jax.training.guard import guarded
from mrcnn_jax.training.open import OpenRun
from mrcnn_jax.training.optimizer import Lengths, optimizer_of
from mrcnn_jax.training.step import make_train_step, make_validation_step


@dataclass(frozen=True)
class OfLength:
    """A jitted step that is handed the length of its stage: another length needs no other program,
    so that compiled programs that were kept serve again."""

    program: Any
    lengths: Lengths

    def __call__(self, state: TrainState, *batch: Any) -> Any:
        return self.program(self.lengths, state, *batch)

    def lower(self, state: TrainState, *batch: Any) -> Any:
        """As of a jitted function."""
        return self.program.lower(self.lengths, state, *batch)


@dataclass(frozen=True)
class Programs:
    """Jitted programs of a stage, whatever its length."""

    step: Any
    """(lengths, state, batch, cached features of it) -> (state, metrics). It donates the state."""
    validate: Any
    """As of `training.step.ValidationStep`."""

    def step_of(self, lengths: Lengths) -> OfLength:
        """The training step of a stage of these lengths."""
        return OfLength(self.step, jax.tree.map(np.int32, lengths))


@dataclass(frozen=True)
class Prepared:
    """Initial variables and compiled programs of a new run, made while its speed was measured and
    used again by its training."""

    variables: Variables
    programs: Programs
    """Of its first stage."""


def make_programs(run: OpenRun, stage_index: int, state: TrainState) -> Programs:
    """The programs of a stage on all devices, compiled when they are called.

    Args:
        state: of the stage; only its shapes are read.
    """
    config, mesh, stage = run.config, run.mesh, run.config.stages[stage_index]
    in_step: dict[str, Any] = {}
    in_validation: dict[str, Any] = {}
    if mesh is not None:
        everywhere = parallel.replicated(mesh)
        in_step["out_shardings"] = (_layout(state, mesh, config), everywhere)
        in_validation["out_shardings"] = (everywhere, parallel.by_rows(mesh))
    model = run.model.clone(mesh=mesh)

    def step(lengths: Lengths, state: TrainState, *batch: Any) -> Any:
        optimizer = optimizer_of(stage, state.params, lengths)
        own = make_train_step(model, stage, state.params, optimizer)
        return guarded(own, config.skip_non_finite)(state, *batch)

    deterministic = config.deterministic
    return Programs(
        step=jax.jit(
            step, **compile_options(deterministic=deterministic, donate_argnums=1, **in_step)
        ),
        validate=jax.jit(
            make_validation_step(model, stage),
            **compile_options(deterministic=deterministic, **in_validation),
        ),
    )


def on_devices(run: OpenRun, state: TrainState) -> TrainState:
    """A copy of the state, placed as the programs of a stage take it."""
    if run.mesh is None:
        # The step donates its state, and the variables may be the caller's.
        return jax.tree.map(jnp.array, state)
    return parallel.place(state, _layout(state, run.mesh, run.config))


def _layout(state: TrainState, mesh: Mesh, config: Config) -> TrainState:
    """The sharding of each leaf of the state."""
    layout = jax.tree.map(lambda _: parallel.replicated(mesh), state)
    if not config.shard_parameters:
        return layout
    leaves = state.params, state.opt_state, state.ema
    params, opt_state, ema = jax.tree.map(lambda leaf: parallel.spread(leaf, mesh), leaves)
    return layout.replace(params=params, opt_state=opt_state, ema=ema)
