"""Training: stage after stage, epoch after epoch, step after step, from where a run was left."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from mrcnn_jax import cli, parallel
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import save_config
from mrcnn_jax.config.schema import Config, StageConfig
from mrcnn_jax.data.caps import caps
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.inference.out_of_memory import explaining_out_of_memory
from mrcnn_jax.models.initialise import initialise, variable_shapes
from mrcnn_jax.models.mask_rcnn import Variables, example_batch
from mrcnn_jax.output import progress_bar
from mrcnn_jax.runs.arrays import flatten
from mrcnn_jax.runs.finite import refuse_not_finite
from mrcnn_jax.runs.logs import COMMANDS
from mrcnn_jax.runs.metrics import MetricsLog
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.structures import Batch
from mrcnn_jax.training.features import with_cached_features
from mrcnn_jax.training.memory import out_of_memory
from mrcnn_jax.training.open import OpenRun, Progress, open_run, refuse_schedules
from mrcnn_jax.training.optimizer import (
    lengths_of,
    scaling_hint,
    warmup_hint,
    warmup_updates,
)
from mrcnn_jax.training.programs import Prepared, Programs, make_programs, on_devices
from mrcnn_jax.training.stages import summary
from mrcnn_jax.training.stop import StopSignal
from mrcnn_jax.training.watch import Step, Watch, as_text, batches
from mrcnn_jax.weights.choice import Choice


def train(
    config: Config,
    workdir: Path,
    weights: Choice | None = None,
    read_before: Sequence[CocoDataset] = (),
    settle: Callable[[OpenRun], tuple[Config, Prepared]] | None = None,
) -> None:
    """Trains every stage of `config` in `workdir` on all devices.

    A folder with a complete checkpoint is resumed from the newest one. Of several processes
    (`parallel.join`) each calls this, with the same arguments; the first one writes.

    Args:
        config: of the run.
        workdir: its folder.
        weights, read_before: as of `open_run`.
        settle: called once with the opened run, which is new. Returns its config with the final
            length, and what it prepared to decide it, which training goes on with.

    Raises:
        ConfigError: a user's mistake, before anything is compiled (but by `settle`).
        cli.Failure: a loss, gradient or parameter is not finite, an image cannot be loaded, the
            disk or the device's memory is full.
        cli.Stopped: SIGTERM or, in a command, Ctrl-C arrived, and the state is saved.
    """
    try:
        opened = open_run(config, workdir, weights, read_before)
        with opened as run:
            prepared: Prepared | None = None
            if settle is not None:
                config, prepared = settle(run)
                run = replace(run, config=config)
                refuse_schedules(run)
            with Watch(run) as watch, StopSignal(run) as stop:
                _train(watch, stop, prepared)
    except OSError as error:  # a full disk above all
        if cli.lost_output() is not None:
            raise
        where = f"{error.filename or workdir}: {error.strerror or error}"
        raise cli.Failure(f"{where} (the same command goes on from the last checkpoint)") from error


def _train(watch: Watch, stop: StopSignal, prepared: Prepared | None) -> None:
    run = watch.run
    variables, progress, state = _start(run, watch.log, prepared)
    if parallel.is_first():  # only now: a run that could not begin takes no folder
        save_config(run.config, run.workdir / "config.json")
        command = f"{cli.command_line()}\n".encode(errors="backslashreplace")
        with (run.workdir / COMMANDS).open("ab") as file:
            file.write(command)
    watch.open_loggers()
    for cap in caps(run.train_split.dataset, run.config.data, run.config.model):
        print(cap.line())
    canvases = len({plan.canvas for plan in run.train_split.plans})
    stages = run.config.stages[progress.stage_index :]
    programs = None if prepared is None else prepared.programs
    if not stages:
        print("nothing is left to train: the run was finished before")
    elif programs is None:
        print(
            f"training programs to compile: {len(stages) * canvases} (stages to go: {len(stages)}, "
            f"canvases: {canvases})"
        )
    for _ in stages:
        variables = _train_stage(watch, stop, progress, variables, state, programs)
        progress, state, programs = Progress(progress.stage_index + 1), None, None
    if parallel.is_first() and run.config.evaluate_every_epochs:
        best, newest = run.checkpoints.best(), run.checkpoints.latest()
        if best is not None and newest is not None and best.name != newest.name:
            print(
                f"\nbest AP: {best.ap:.4f}, of checkpoint {best.name} (--checkpoint best); the "
                f"newest is {newest.name}"
            )
    parallel.gather("done")  # none leaves while the first one still writes
    print(f"\ndone; next: {cli.command('eval', '--workdir', run.workdir)}")


def first_variables(run: OpenRun) -> Variables:
    """The variables that a new run starts from, random or loaded."""
    example = example_batch(run.config.data.canvases[0])
    random = initialise(run.model, example, seed=run.config.seed)
    return parallel.of_first(unflatten_dict(flatten_dict(random) | flatten_dict(run.initial)))


def _start(
    run: OpenRun, log: MetricsLog | None, prepared: Prepared | None
) -> tuple[Variables, Progress, TrainState | None]:
    """Fresh variables, or those of the newest checkpoint with the state of an unfinished stage."""
    config, meta = run.config, run.resumed_from
    names = [stage.name for stage in config.stages]
    if meta is None:
        if log is not None:  # rows of a run that was killed before its first checkpoint
            log.truncate(names, 0, -1)
        print("a new run")
        variables = first_variables(run) if prepared is None else prepared.variables
        return variables, Progress(0), None
    first_state = functools.partial(run.first_state, meta.stage_index)
    state = run.checkpoints.restore(
        jax.eval_shape(first_state, variable_shapes(config.model)), meta
    )
    refuse_not_finite(flatten(state), f"{run.workdir}: checkpoint {meta.name}")
    if state.skipped > config.skip_non_finite and not meta.stage_complete:
        raise ConfigError(
            f"skip_non_finite: {config.skip_non_finite}, but {run.workdir} has skipped "
            f"{state.skipped} steps"
        )
    if log is not None:
        log.truncate(names, meta.stage_index, meta.stage_step, validated=meta.validated)
    print(f"resumed from stage {meta.stage}, step {meta.stage_step}")
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    if meta.stage_complete:
        return variables, Progress(meta.stage_index + 1), None
    progress = Progress(meta.stage_index, meta.stage_step, validated=meta.validated)
    return variables, progress, state


def optimizer_option(config: Config, index: int) -> str:
    """What the options of a stage's optimiser begin with.

    Where rows may have been added for the network's heads, the stage's name: on the command line
    rows have the numbers of those in the file, which are not known here.
    """
    model = config.model
    heads = model.box_head.cascade, model.mask_iou_head.enabled, model.depth_head.kind != "none"
    if len(config.stages) > 1 and any(heads):
        return f"stages.{config.stages[index].name}.optimizer"
    return f"--stages.{index}.optimizer"


def _train_stage(
    watch: Watch,
    stop: StopSignal,
    progress: Progress,
    variables: Variables,
    state: TrainState | None,
    programs: Programs | None,
) -> Variables:
    """Trains what is left of a stage, from `state` or from its first step; the new variables."""
    run, index = watch.run, progress.stage_index
    config, stage = run.config, run.config.stages[index]
    total_steps = run.total_steps(index)
    table = summary(stage, variables["params"], warmup=warmup_updates(stage, total_steps))
    print(f"\n{index + 1} of {len(config.stages)}: {table}")
    for hint in (
        scaling_hint(stage, optimizer_option(config, index), config.data.batch_size),
        warmup_hint(stage, total_steps),
    ):
        if hint is not None:
            print(hint)
    if state is None:
        state = run.first_state(index, variables)
    state = on_devices(run, state)
    if run.mesh is not None:
        size = parallel.bytes_a_device((state.params, state.opt_state)) / 2**20
        print(f"{run.mesh.size} devices, {size:.2f} MiB of parameters and optimiser state on each")
    programs = programs or make_programs(run, index, state)
    step = programs.step_of(lengths_of(stage, total_steps))
    train_step, validate = (
        with_cached_features(program, config, stage, run.model, variables, split)
        for program, split in ((step, run.train_split), (programs.validate, run.val_split))
    )
    watch.begin(stage)
    while progress.step < total_steps or not progress.validated:
        took, due = "", False
        if progress.validated:
            started, first = time.perf_counter(), progress.step
            with explaining_step_out_of_memory(run, index, train_step, state):
                state, waited = _train_epoch(watch, stop, progress, train_step, state)
            seconds, epoch = time.perf_counter() - started, run.epoch_of(progress.step)
            row = {"stage": stage.name, "epoch": epoch, "steps": progress.step - first}
            row |= {"seconds": round(seconds, 3), "waited_seconds": round(waited, 3)}
            watch.write_timing(row)
            took = f"{seconds:.1f} s, {waited / seconds:.1%} of it waiting for data"
            if left := total_steps - progress.step:
                took += f", {as_minutes(left * seconds / (progress.step - first))} to go"
            due, progress.validated = stop.save_is_due(progress), False
        ends = watch.is_evaluated(progress) or run.is_last(progress)
        validates = ends or watch.is_validated(progress)
        if took and (stop.is_asked or ends or (validates and stop.much_is_unsaved)):
            # Validation takes long, and may need more memory than there is.
            watch.save(progress, state, complete=False)
            stop.obey(progress)
        _end_epoch(watch, progress, validate, state, took)
        if ends or due or stop.is_asked:
            stop.unsaved = True  # Ctrl-C waits for the save
            watch.save(progress, state, complete=run.is_last(progress))
            progress.ap = None
            stop.obey(progress)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return variables if run.mesh is None else parallel.to_host(variables)


def as_minutes(seconds: float) -> str:
    """An estimate of a time, for people."""
    minutes = seconds / 60
    return f"about {minutes:.0f} min" if minutes >= 1 else "under a minute"


def _end_epoch(
    watch: Watch, progress: Progress, validate: Any, state: TrainState, took: str
) -> None:
    """Does what the end of an epoch asks for, and prints it with what the epoch took.

    Raises:
        Failure: an image cannot be loaded, or the device's memory runs out; says how to go on.
    """
    run, stage = watch.run, watch.run.config.stages[progress.stage_index]
    try:
        with explaining_out_of_memory(run.config.data.eval_batch_size, "--data.eval-batch-size"):
            values = watch.end_epoch(progress, validate, state)
    except cli.Failure as error:
        raise cli.Failure(
            f"stage {stage.name}, validation after step {progress.step}: {error}; the same command "
            "goes on from the last checkpoint"
        ) from error
    progress.validated = True
    parts = (took, f"validation: {as_text(values, 4)}" if values else "")
    tqdm.write(
        f"{stage.name} epoch {run.epoch_of(progress.step)}/{run.epochs_begun(progress.stage_index)}"
        f": {'  '.join(part for part in parts if part)}"
    )


@contextmanager
def explaining_step_out_of_memory(
    run: OpenRun, stage_index: int, train_step: Any, state: TrainState
) -> Iterator[None]:
    """Raises Failure if the device's memory runs out in a step of a stage.

    Args:
        train_step, state: of which only shapes are read.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        devices = 1 if run.mesh is None else run.mesh.size
        example = _example(run, run.config.stages[stage_index])
        line = out_of_memory(error, train_step, state, example, multiple=devices)
        if line is None:
            raise
        raise cli.Failure(line) from error


def _train_epoch(
    watch: Watch, stop: StopSignal, progress: Progress, train_step: Any, state: TrainState
) -> tuple[TrainState, float]:
    """Trains what is left of an epoch.

    Its last step is saved by the caller, after the validation that belongs to it.

    Returns:
        The state, and the seconds that this process waited for its batches (the device may have
        had work meanwhile).
    """
    run, index = watch.run, progress.stage_index
    stage = run.config.stages[index]
    epoch, done = divmod(progress.step, run.steps_per_epoch)
    plan = run.plan(index, epoch)[done:]
    started, waited, share = time.perf_counter(), 0.0, 0.0
    pending: Step | None = None
    bar = progress_bar(
        sum(len(planned.images) for planned in plan),
        f"{stage.name} {epoch + 1}/{run.epochs_begun(index)}",
        disable=not parallel.is_first(),
    )

    def record(step: Step) -> None:
        losses = watch.record(index, step, state)
        bar.set_postfix_str(f"{losses}  data {share:.0%}", refresh=False)
        bar.update(len(step.planned.images))

    with bar, closing(batches(run, stage, run.train_split, plan)) as loaded:
        for planned in plan:
            asked = time.perf_counter()
            batch = next(loaded)
            waited += time.perf_counter() - asked
            state, metrics = train_step(state, parallel.place_rows(batch, run.mesh))
            if watch.profiler is not None:
                watch.profiler.step(metrics)
            share = waited / (time.perf_counter() - started)
            # The metrics of a step are read while the next one runs: two batches are in flight.
            if pending is not None:
                record(pending)
            progress.step += 1
            stop.unsaved = True
            pending = Step(progress.step, planned, batch, metrics)
            if planned is not plan[-1] and stop.save_is_due(progress):
                record(pending)
                pending = None
                watch.save(progress, state, complete=False)
                stop.obey(progress)
        if pending is not None:
            record(pending)
    return state, waited


def _example(run: OpenRun, stage: StageConfig) -> Batch:
    """The shapes of a training batch of the largest canvas, and where it lies."""
    canvases = run.config.data.canvases
    largest = max(run.whole_epoch(0, 0), key=lambda planned: math.prod(canvases[planned.canvas]))
    rows = None if run.mesh is None else parallel.by_rows(run.mesh)
    size = run.config.data.batch_size
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype, sharding=rows),
        next(batches(run, stage, run.train_split, [largest])),
    )
