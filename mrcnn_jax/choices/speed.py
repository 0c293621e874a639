"""How long the parts of a training take on this machine, measured before it begins.

Steps are those of the run, on its images, from its first state: a copy of it, whose results are
thrown away. The training that follows takes over the compiled programs, and has the same bits as
without.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import jax

from mrcnn_jax import parallel
from mrcnn_jax.data.loader import Split, plan_once
from mrcnn_jax.data.order import PlannedBatch
from mrcnn_jax.inference.evaluate import evaluation_of
from mrcnn_jax.inference.out_of_memory import explaining_out_of_memory
from mrcnn_jax.inference.predictor import Predictor, results_of_split
from mrcnn_jax.output import part_folder
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.runs.meta import Meta
from mrcnn_jax.runs.run import Run
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.structures import Batch
from mrcnn_jax.training import loop
from mrcnn_jax.training.open import OpenRun
from mrcnn_jax.training.optimizer import lengths_of
from mrcnn_jax.training.programs import Prepared, make_programs, on_devices
from mrcnn_jax.training.watch import batches

# Of each program, calls after the first: these at least, and so long.
CALLS, SECONDS = 3, 5.0
MOST_CALLS = 200


@dataclass(frozen=True)
class Speed:
    """Seconds that the parts of a training of one stage take."""

    step: float
    """A training step, averaged over the canvases of an epoch."""
    loading: float
    """From the beginning of an epoch to its first batch."""
    compiling: float
    """What is left to be compiled after measuring: of evaluation."""
    validation: float
    """The losses on all validation images."""
    evaluation: float
    """AP on all validation images; 0 if the config does not ask for it."""
    saving: float
    """A checkpoint."""


@dataclass(frozen=True)
class Timed:
    """Seconds of a program: its first call, which compiles, and each of the next ones."""

    first: float
    each: float
    loading: float
    """Until a loader has its first batch."""

    @property
    def compiling(self) -> float:
        return max(0.0, self.first - self.each)


def measure(run: OpenRun) -> tuple[Speed, Prepared]:
    """Compiles the programs of a new run of one stage, and times them on its most used canvas.

    Those of other canvases are taken to need as much longer as they have more pixels. In one
    process.

    Raises:
        cli.Failure: the device's memory is too small, or an image cannot be loaded.
    """
    variables = loop.first_variables(run)
    state = on_devices(run, run.first_state(0, variables))
    programs = make_programs(run, 0, state)
    train_step = programs.step_of(lengths_of(run.config.stages[0], run.total_steps(0)))

    plan = run.whole_epoch(0, 0)
    with loop.explaining_step_out_of_memory(run, 0, train_step, state):
        state, training = _steps(run, train_step, state, plan)
    trained = {"params": state.params, "batch_stats": state.batch_stats}
    plan_of_val = plan_once(run.val_split, run.config.data.eval_batch_size)
    key = jax.random.key(run.config.seed)

    def validate(batch: Batch) -> None:
        placed = parallel.place_rows(batch, run.mesh)
        jax.device_get(programs.validate(trained, placed, key))

    evaluation = compiling = 0.0
    with explaining_out_of_memory(run.config.data.eval_batch_size, "--data.eval-batch-size"):
        validating = _calls(run, plan_of_val, validate)
        _on_other_canvases(run, run.val_split, plan_of_val, validate)
        if run.config.evaluate_every_epochs and run.config.evaluates(
            run.config.stages[0], has_masks=run.has_masks
        ):
            size = run.config.data.eval_batch_size * (1 if run.mesh is None else run.mesh.size)
            plan_of_eval = plan_once(run.val_split, size)
            predictor = Predictor(
                Run(run.config, _meta(run), parallel.to_host(variables)), run.mesh
            )
            evaluating = _calls(
                run, plan_of_eval, lambda batch: list(predictor.found(batch, predictor(batch)))
            )
            # It is compiled again, but that of this canvas is found if compiled programs are kept.
            canvases = len({planned.canvas for planned in plan_of_eval})
            kept = bool(os.environ.get("JAX_COMPILATION_CACHE_DIR"))
            compiling = evaluating.compiling * (canvases - kept)
            evaluation = evaluating.each * _batches(run, plan_of_eval)
            evaluation += _comparing(run, predictor, plan_of_eval)
    gc.collect()  # loaders refer to themselves
    speed = Speed(
        step=training.each * _batches(run, plan) / len(plan),
        loading=training.loading,
        compiling=compiling,
        validation=validating.each * _batches(run, plan_of_val),
        evaluation=evaluation,
        saving=_saving(run, state),
    )
    return speed, Prepared(variables, programs)


def _steps(
    run: OpenRun, train_step: Any, state: TrainState, plan: Sequence[PlannedBatch]
) -> tuple[TrainState, Timed]:
    """Times training steps; as in training, the metrics of a step are read while the next runs.

    One is taken on each of the other canvases, too: so all are compiled.
    """
    pending: Any = None

    def step(batch: Batch) -> None:
        nonlocal state, pending
        state, metrics = train_step(state, parallel.place_rows(batch, run.mesh))
        jax.device_get(pending)
        pending = metrics

    used = _most_used(plan)
    epochs = math.ceil((MOST_CALLS + 1) / sum(planned.canvas == used for planned in plan))
    long = (planned for epoch in range(epochs) for planned in run.whole_epoch(0, epoch))
    of_canvas = [planned for planned in long if planned.canvas == used][: MOST_CALLS + 1]
    timed = _timed(run, run.train_split, of_canvas, step, lambda: jax.device_get(pending))
    _on_other_canvases(run, run.train_split, plan, step)
    jax.device_get(pending)  # an error of the last step is raised here
    return state, timed


def _calls(run: OpenRun, plan: Sequence[PlannedBatch], call: Callable[[Batch], object]) -> Timed:
    """Times a program on validation images."""
    of_canvas = [planned for planned in plan if planned.canvas == _most_used(plan)]
    repeated = (of_canvas * (CALLS + 1))[: MOST_CALLS + 1]
    return _timed(run, run.val_split, repeated, call)


def _on_other_canvases(
    run: OpenRun, split: Split, plan: Sequence[PlannedBatch], call: Callable[[Batch], object]
) -> None:
    """Calls a program on one batch of each canvas but the most used, for which it is compiled."""
    used = _most_used(plan)
    others = {planned.canvas: planned for planned in plan if planned.canvas != used}
    if not others:
        return  # no threads or processes are started to load nothing
    with closing(batches(run, run.config.stages[0], split, list(others.values()))) as loaded:
        for batch in loaded:
            call(batch)


def _timed(
    run: OpenRun,
    split: Split,
    plan: Sequence[PlannedBatch],
    call: Callable[[Batch], object],
    wait: Callable[[], object] = lambda: None,
) -> Timed:
    """Times a call for each batch, with the loading of those after the first.

    Args:
        wait: returns when the calls before it are done.
    """
    clock, stage = time.perf_counter, run.config.stages[0]
    started = clock()
    with closing(batches(run, stage, split, plan[:1])) as loaded:
        next(loaded)
        loading = clock() - started
    with closing(batches(run, stage, split, plan)) as loaded:
        batch = next(loaded)
        started = clock()
        call(batch)
        wait()
        first, begun, calls = clock() - started, clock(), 0
        # Loaded while the program was compiled: where loading may be slower than the program, only
        # the batches after these cost what training will wait for.
        ready = run.config.data.threads + 2
        for number, batch in enumerate(loaded, 1):
            call(batch)
            calls += 1
            taken = clock() - begun
            keeps_up = number > ready or loading <= taken / calls
            if keeps_up and calls >= CALLS and taken >= SECONDS:
                break
            if number == ready < len(plan) - 1:
                wait()
                begun, calls = clock(), 0
        wait()
        return Timed(first, (clock() - begun) / calls, loading)


def _saving(run: OpenRun, state: TrainState) -> float:
    """Seconds of a checkpoint on the disk of the run, where it is removed again."""
    with part_folder(run.workdir / "speed") as folder:
        started = time.perf_counter()
        state = state if run.mesh is None else parallel.to_host(state)
        Checkpoints(folder, keep=1).save(state, _meta(run), run.config)
        return time.perf_counter() - started


def _comparing(run: OpenRun, predictor: Predictor, plan: Sequence[PlannedBatch]) -> float:
    """Seconds from the detections in all images of a plan to AP, by those in a few batches."""
    few = [planned for planned in plan if planned.canvas == _most_used(plan)][:CALLS]
    found = results_of_split(predictor, run.val_split, few)
    started = time.perf_counter()
    evaluation_of(run.config, run.val_split, *found)
    seconds = time.perf_counter() - started
    images, compared = (sum(len(planned.images) for planned in some) for some in (plan, few))
    return seconds * images / compared


def _meta(run: OpenRun) -> Meta:
    return Meta(
        step=0,
        stage=run.config.stages[0].name,
        stage_index=0,
        stage_step=1,  # all heads that the stage trains take part
        stage_complete=False,
        categories=run.categories,
        config_hash="",
        loaded=run.loaded,
        has_masks=run.has_masks,
    )


def _most_used(plan: Iterable[PlannedBatch]) -> int:
    """The canvas of most batches."""
    return Counter(planned.canvas for planned in plan).most_common(1)[0][0]


def _batches(run: OpenRun, plan: Sequence[PlannedBatch]) -> float:
    """The batches of a plan, counted as batches of its most used canvas by their pixels."""
    pixels = [math.prod(run.config.data.canvases[planned.canvas]) for planned in plan]
    return sum(pixels) / math.prod(run.config.data.canvases[_most_used(plan)])
