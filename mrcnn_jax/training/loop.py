"""A run: stage after stage, resumed where it stopped, watched by validation, curves and
checkpoints."""

from __future__ import annotations

import fcntl
import functools
import gc
import hashlib
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from mrcnn_jax import cli, parallel
from mrcnn_jax.config.files import (
    config_hash,
    differences,
    load_config_json,
    resolve_paths,
    save_config,
)
from mrcnn_jax.config.schema import Config, ConfigError, StageConfig
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.loader import (
    PlannedBatch,
    Split,
    load,
    open_split,
    own_rows,
    plan_epoch,
    plan_once,
    repeat_factors,
)
from mrcnn_jax.evaluation.average_precision import evaluate as coco_ap
from mrcnn_jax.evaluation.proposals import proposal_recall
from mrcnn_jax.figures.curves import curves
from mrcnn_jax.inference.predictor import Predictor, results_of_split
from mrcnn_jax.models.initialise import initialise
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Variables, example_batch
from mrcnn_jax.pixels.geometry import boxes_to_image
from mrcnn_jax.runs.checkpoints import Checkpoints, Meta, flatten
from mrcnn_jax.runs.metrics import MetricsLog, read_metrics
from mrcnn_jax.runs.run import Run
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.runtime import compile_options, warn_of_slow_versions
from mrcnn_jax.structures import Batch, Params
from mrcnn_jax.training.guard import guarded
from mrcnn_jax.training.initial import initial_variables
from mrcnn_jax.training.memory import out_of_memory
from mrcnn_jax.training.optimizer import learning_rate, make_optimizer, scaling_hint
from mrcnn_jax.training.profiler import Profiler
from mrcnn_jax.training.replay import FailedStep, write_failed
from mrcnn_jax.training.stages import refuse_partly_live, refuse_random_frozen, summary, trained
from mrcnn_jax.training.step import make_train_step, make_validation_step

_AP = {
    f"{kind}/{figure}" for kind in ("bbox", "segm") for figure in ("AP", "AP50", "AP75")
}  # of an evaluation in training


class TrainingError(RuntimeError):
    """Training can't go on: its text is one line that names the loss, step and images, or the file;
    the last checkpoint stays."""


class Stopped(Exception):
    """SIGTERM arrived, and the state is saved."""


def train(config: Config, workdir: Path) -> None:
    """Trains every stage of `config` in `workdir`, from the newest complete checkpoint if there is
    one, on all devices.

    Of several processes (`parallel.join`) each calls this, with the same config and folder; the
    first one writes.

    Raises:
        ConfigError: a user's mistake, before anything is compiled.
        TrainingError: a loss, gradient or parameter is not finite, an image cannot be loaded, the
            disk or the device's memory is full.
    """
    if not config.stages:
        raise ConfigError("stages: the config has none")
    config = resolve_paths(config)
    parallel.refuse_uneven(config.data.batch_size, parallel.data_mesh())
    with ExitStack() as stack:
        parallel.in_turn(
            lambda: stack.enter_context(_locked(workdir)) if parallel.is_first() else None
        )
        refuse_another_config(config, workdir)
        try:
            _Run(config, workdir).train()
        except OSError as error:  # a full disk above all
            where = f"{error.filename or workdir}: {error.strerror or error}"
            raise TrainingError(
                f"{where} (the same command goes on from the last checkpoint)"
            ) from error


@contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    """One run a folder at a time; the lock goes with the process, however it ends."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"{workdir}: cannot be written to: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{workdir}: another run is training in this folder") from None
        yield


def refuse_another_config(config: Config, workdir: Path) -> None:
    """ConfigError if `workdir` holds a run of another config: same config, same run."""
    path = workdir / "config.json"
    if path.exists():
        changed = differences(load_config_json(path), config)
        if changed:
            raise ConfigError(
                f"{workdir}: holds a run of another config: {'; '.join(changed[:3])} (choose another --workdir)"
            )


@dataclass
class _Progress:
    """Where a run stands: steps done in a stage, the lowest validation loss seen in it, and the
    mask AP if it was just measured."""

    stage_index: int
    step: int = 0
    best: float | None = None
    mask_ap: float | None = None


@dataclass(frozen=True)
class _Pending:
    """A step whose numbers have not been read."""

    step: int
    planned: PlannedBatch
    batch: Batch
    metrics: dict[str, Any]


class _Run:
    def __init__(self, config: Config, workdir: Path) -> None:
        self.config, self.workdir, self.mesh = config, workdir, parallel.data_mesh()
        data = config.data
        cache = Path(data.cache) if data.cache else workdir / "data"
        for path in (
            "train",
            "val",
        ):  # the cheap checks of both files come before any image is read
            dataset = read_coco(
                Path(getattr(data, f"{path}_annotations")),
                Path(getattr(data, f"{path}_images")),
                data,
            )
            if len(dataset.categories) != config.model.num_classes:
                names = ", ".join(category.name for category in dataset.categories)
                raise ConfigError(
                    f"model.num_classes: {config.model.num_classes}, but {dataset.annotations_path} has {len(dataset.categories)}: {names}"
                )
        self.model = MaskRCNN(config.model)
        self.checkpoints = Checkpoints(workdir, keep=config.keep_checkpoints)
        self.resumed_from = self.checkpoints.latest()
        if self.resumed_from is not None and self.resumed_from.config_hash != config_hash(config):
            # A version of this project with a field more has another hash for the same config: its
            # own copy decides.
            changed = differences(
                load_config_json(self.checkpoints.folder / self.resumed_from.name / "config.json"),
                config,
            )
            if changed:
                name = self.resumed_from.name
                raise ConfigError(
                    f"{workdir}: checkpoint {name} is of another config: {'; '.join(changed[:3])} (choose another --workdir)"
                )
        # Shapes are enough to check the whole stage table, and the weights to start from, before
        # anything is compiled.
        shapes = jax.eval_shape(
            lambda batch: self.model.init(jax.random.key(0), batch), example_batch(data.canvases[0])
        )
        for stage in config.stages:
            refuse_partly_live(
                stage,
                shapes["params"],
                live={"resnet"} if config.model.resnet.norm == "live" else set(),
            )
        self.initial = initial_variables(shapes, config) if self.resumed_from is None else {}
        if self.resumed_from is None:
            refuse_random_frozen(
                config.stages, shapes["params"], loaded=self.initial.get("params", {})
            )
        warn_of_slow_versions()
        self.train_split, self.val_split = parallel.in_turn(
            lambda: (
                open_split(
                    "train",
                    Path(data.train_annotations),
                    Path(data.train_images),
                    cache=cache,
                    data=data,
                ),
                open_split(
                    "val", Path(data.val_annotations), Path(data.val_images), cache=cache, data=data
                ),
            )
        )
        if self.train_split.dataset.class_names != self.val_split.dataset.class_names:
            raise ConfigError(
                f"{data.val_annotations}: its categories differ from those of {data.train_annotations}"
            )
        for split in (self.train_split, self.val_split):
            print("\n".join(split.dataset.report.lines()))
        self.repeats = repeat_factors(self.train_split.dataset, data.repeat_threshold)
        if self.repeats.max() > 1:
            used = sum(len(_real(planned)) for planned in self._plan(0, 0))
            print(
                f"{(self.repeats > 1).sum()} training images are repeated (data.repeat_threshold): {used} an epoch"
            )
        categories = tuple(
            (category.id, category.name) for category in self.train_split.dataset.categories
        )
        if self.resumed_from is not None and self.resumed_from.categories != categories:
            raise ConfigError(
                f"{data.train_annotations}: categories {categories}, but the run began with {self.resumed_from.categories}"
            )
        for index, stage in enumerate(config.stages):
            learning_rate(stage, 0, self._total_steps(index))  # a warm-up longer than its stage
        parallel.in_turn(lambda: self._refuse_full_disk(shapes) if parallel.is_first() else None)
        self._refuse_differing_processes()
        self.log = MetricsLog(workdir) if parallel.is_first() else None
        self.stop_signal: int | None = None
        self.profiler = (
            Profiler(workdir / "profile") if config.profile and parallel.is_first() else None
        )

    def _refuse_full_disk(self, shapes: Variables) -> None:
        """ConfigError if the disk has no room for the checkpoints that the run will keep at
        once."""
        sizes = []
        for index in range(len(self.config.stages)):
            state = jax.eval_shape(functools.partial(self._first_state, index), shapes)
            sizes.append(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)))
        # The last one of every stage, those between, the best, and one while it is written; a run
        # that is resumed has some of them.
        needed = sum(sizes) + (
            self.config.keep_checkpoints + 1 + (self.config.evaluate_every_epochs > 0)
        ) * max(sizes)
        needed -= sum(
            path.stat().st_size for path in self.checkpoints.folder.rglob("*") if path.is_file()
        )
        free = shutil.disk_usage(self.workdir).free
        if free < needed:
            raise ConfigError(
                f"{self.workdir}: its checkpoints need {needed / 2**20:,.0f} MiB of disk, and {free / 2**20:,.0f} MiB are free"
                f" (--keep-checkpoints is {self.config.keep_checkpoints})"
            )

    def _refuse_differing_processes(self) -> None:
        """ConfigError if the processes would not do the same steps on the same data."""
        config = self.config
        fields = (
            "save_every_steps",
            "validate_every_epochs",
            "evaluate_every_epochs",
            "skip_non_finite",
            "shard_parameters",
        )
        values: dict[str, Any] = {"the config": config_hash(config)} | {
            name: getattr(config, name) for name in fields
        }
        values["the newest checkpoint in --workdir"] = (
            self.resumed_from.name if self.resumed_from else None
        )
        for split in (self.train_split, self.val_split):
            images = [
                (image.id, image.file_name, plan.canvas)
                for image, plan in zip(split.dataset.images, split.plans, strict=True)
            ]
            values[f"data.{split.name}_annotations"] = hashlib.sha256(
                repr(images).encode()
            ).hexdigest()[:16]
        parallel.refuse_differing(values)

    # -- the plan of the run -----------------------------------------------------------------------

    def _plan(self, stage_index: int, epoch: int) -> list[PlannedBatch]:
        """The batches of an epoch: a pure function of the data's sizes and classes, the seed and
        the epoch counted over all stages."""
        epochs_before = sum(stage.epochs for stage in self.config.stages[:stage_index])
        data = self.config.data
        return plan_epoch(
            [plan.canvas for plan in self.train_split.plans],
            data.batch_size,
            seed=self.config.seed,
            epoch=epochs_before + epoch,
            shuffle=True,
            repeats=self.repeats,
        )

    # -- training ----------------------------------------------------------------------------------

    def train(self) -> None:
        alone = (
            jax.process_count() == 1
        )  # several processes stop at a step that JAX, which has the signal, agrees on
        handler = signal.signal(signal.SIGTERM, self._on_sigterm) if alone else None
        try:
            variables, progress, state = self._start()
            if parallel.is_first():
                save_config(
                    self.config, self.workdir / "config.json"
                )  # only now: a run that could not begin takes no folder
                with (self.workdir / "commands.txt").open("a") as file:
                    file.write(f"{cli.command_line()}\n")
            canvases = len({plan.canvas for plan in self.train_split.plans})
            stages = self.config.stages[progress.stage_index :]
            print(
                f"{len(stages)} stages to go x {canvases} canvases = {len(stages) * canvases} training programs to compile"
            )
            for _ in stages:
                variables = self._train_stage(progress, variables, state)
                progress, state = _Progress(progress.stage_index + 1), None
            parallel.gather("done")  # none leaves while the first one still writes
            print(f"\ndone: evaluate with  python eval.py --workdir {self.workdir}")
        finally:
            if alone:
                signal.signal(signal.SIGTERM, handler)
            if self.profiler is not None:
                self.profiler.end()
            if self.log is not None:
                self.log.close()

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = number

    def _start(self) -> tuple[Variables, _Progress, TrainState | None]:
        """Fresh variables, or those of the newest complete checkpoint with the state of the stage
        it stands in."""
        variables = initialise(
            self.model, example_batch(self.config.data.canvases[0]), seed=self.config.seed
        )
        meta = self.resumed_from
        names = [stage.name for stage in self.config.stages]
        if meta is None:
            if self.log is not None:
                self.log.truncate(
                    names, 0, -1
                )  # what a run that was killed before its first checkpoint wrote
            print("a new run")
            variables = unflatten_dict(flatten_dict(variables) | flatten_dict(self.initial))
            return parallel.of_first(variables), _Progress(0), None
        template = self._first_state(meta.stage_index, variables)
        state = self.checkpoints.restore(template, meta)
        if state.skipped > self.config.skip_non_finite and not meta.stage_complete:
            raise ConfigError(
                f"skip_non_finite: {self.config.skip_non_finite}, but {self.workdir} has skipped {state.skipped} steps"
            )
        if self.log is not None:
            self.log.truncate(names, meta.stage_index, meta.stage_step)
        print(f"resumed from stage {meta.stage}, step {meta.stage_step}")
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        if meta.stage_complete:
            return variables, _Progress(meta.stage_index + 1), None
        return variables, _Progress(meta.stage_index, meta.stage_step, meta.best_metric), state

    def _first_state(self, stage_index: int, variables: Variables) -> TrainState:
        """The state at the first step of a stage."""
        params: Params = variables["params"]
        stage = self.config.stages[stage_index]
        optimizer = make_optimizer(stage, params, total_steps=self._total_steps(stage_index))
        key = jax.random.key_data(jax.random.fold_in(jax.random.key(self.config.seed), stage_index))
        batch_stats = variables.get("batch_stats", {})
        ema = trained(stage, params) if stage.ema_decay else {}
        return TrainState(
            params=params,
            batch_stats=batch_stats,
            opt_state=optimizer.init(params),
            step=jnp.int32(0),
            key=key,
            ema=ema,
        )

    def _total_steps(self, stage_index: int) -> int:
        return self.config.stages[stage_index].epochs * len(self._plan(stage_index, 0))

    def _train_stage(
        self, progress: _Progress, variables: Variables, state: TrainState | None
    ) -> Variables:
        index, stage = progress.stage_index, self.config.stages[progress.stage_index]
        total_steps = self._total_steps(index)
        steps_per_epoch = total_steps // stage.epochs
        params: Params = variables["params"]
        print(f"\n{index + 1} of {len(self.config.stages)}: {summary(stage, params)}")
        hint = scaling_hint(stage, index, self.config.data.batch_size)
        if hint is not None:
            print(hint)
        optimizer = make_optimizer(stage, params, total_steps=total_steps)
        state = state if state is not None else self._first_state(index, variables)
        in_step: dict[str, Any] = {}
        in_validation: dict[str, Any] = {}
        if self.mesh is None:
            # A copy, since the step donates its state and `variables` may be the caller's.
            state = jax.tree.map(jnp.array, state)
        else:
            everywhere, layout = parallel.replicated(self.mesh), self._layout(state, self.mesh)
            in_step["out_shardings"] = (layout, everywhere)
            in_validation["out_shardings"] = (everywhere, parallel.by_rows(self.mesh))
            state = parallel.place(state, layout)
            size = parallel.bytes_a_device((state.params, state.opt_state)) / 2**20
            print(
                f"{self.mesh.size} devices, {size:.2f} MiB of parameters and optimiser state on each"
            )
        step = guarded(
            make_train_step(self.model, stage, params, optimizer, self.mesh),
            self.config.skip_non_finite,
        )
        deterministic = self.config.deterministic
        train_step = jax.jit(
            step, **compile_options(deterministic=deterministic, donate_argnums=0, **in_step)
        )
        validate = jax.jit(
            make_validation_step(self.model, stage, self.mesh),
            **compile_options(deterministic=deterministic, **in_validation),
        )
        evaluate_every = self.config.evaluate_every_epochs if "mask" in stage.losses else 0
        predictor: Predictor | None = None

        if self.profiler is not None:
            self.profiler.begin(stage.name)
        for epoch in range(progress.step // steps_per_epoch, stage.epochs):
            started, first = time.perf_counter(), progress.step
            try:
                state, waited = self._train_epoch(progress, epoch, total_steps, train_step, state)
            except jax.errors.JaxRuntimeError as error:
                devices = 1 if self.mesh is None else self.mesh.size
                line = out_of_memory(error, train_step, state, self._example(), multiple=devices)
                if line is None:
                    raise
                raise TrainingError(line) from error
            seconds = time.perf_counter() - started
            last = epoch + 1 == stage.epochs
            line = f"{stage.name} epoch {epoch + 1}/{stage.epochs}: {seconds:.1f} s, {waited / seconds:.1%} of it waiting for data"
            self._append_timing(stage, epoch, seconds, waited, steps=progress.step - first)
            values: dict[str, float] = {}
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            if last or (epoch + 1) % self.config.validate_every_epochs == 0:
                values |= self._validate(stage, validate, variables)
                progress.best = float(
                    np.fmin(
                        values["loss/total"], progress.best if progress.best is not None else np.inf
                    )
                )
            evaluate = evaluate_every > 0 and (last or (epoch + 1) % evaluate_every == 0)
            if evaluate:
                predictor = predictor or Predictor(
                    Run(self.config, self._meta(progress), {}), self.mesh
                )
                values |= self._evaluate(predictor, variables)
                progress.mask_ap = values.get("segm/AP")
            if values:
                if self.log is not None:
                    self.log.write(
                        stage=stage.name,
                        step=progress.step,
                        epoch=epoch + 1,
                        split="val",
                        values=values,
                    )
                    curves(read_metrics(self.workdir), self.workdir / "figures")
                # figures and loaders refer to themselves: what they held would wait for Python's
                # own time
                gc.collect()
                line += "  validation: " + "  ".join(
                    f"{name.removeprefix('loss/')} {value:.4f}" for name, value in values.items()
                )
            tqdm.write(line)
            if self._save_is_due(progress) or evaluate or last:
                self._save(progress, state, complete=last)
                progress.mask_ap = None
                self._stop_if_asked(progress)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return variables if self.mesh is None else parallel.to_host(variables)

    def _layout(self, state: TrainState, mesh: Mesh) -> TrainState:
        """Where each leaf of the state lies."""
        layout = jax.tree.map(lambda _: parallel.replicated(mesh), state)
        if not self.config.shard_parameters:
            return layout
        leaves = state.params, state.opt_state, state.ema
        params, opt_state, ema = jax.tree.map(lambda leaf: parallel.spread(leaf, mesh), leaves)
        return layout.replace(params=params, opt_state=opt_state, ema=ema)

    def _train_epoch(
        self, progress: _Progress, epoch: int, total_steps: int, train_step: Any, state: TrainState
    ) -> tuple[TrainState, float]:
        """What is left of an epoch, and the seconds that this process waited for its batches (the
        device may have had work meanwhile).

        The last step is saved by the caller, after the validation that belongs to it.
        """
        stage = self.config.stages[progress.stage_index]
        steps_per_epoch = total_steps // stage.epochs
        plan = self._plan(progress.stage_index, epoch)[progress.step - epoch * steps_per_epoch :]
        bar = tqdm(
            total=sum(len(_real(planned)) for planned in plan),
            desc=f"{stage.name} {epoch + 1}/{stage.epochs}",
            unit="img",
            leave=False,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            disable=not parallel.is_first(),
        )
        pending: _Pending | None = None
        started = time.perf_counter()
        with bar:
            batches = _Timed(self._batches(self.train_split, plan))
            for planned, batch in zip(plan, batches, strict=True):
                state, metrics = train_step(state, parallel.place_rows(batch, self.mesh))
                if self.profiler is not None:
                    self.profiler.step(metrics)
                waiting = batches.seconds / (time.perf_counter() - started)
                # The numbers of a step are read while the next one runs: two batches are in flight.
                if pending is not None:
                    self._record(
                        progress.stage_index, epoch, total_steps, pending, state, bar, waiting
                    )
                progress.step += 1
                pending = _Pending(progress.step, planned, batch, metrics)
                if planned is not plan[-1] and self._save_is_due(progress):
                    self._record(
                        progress.stage_index, epoch, total_steps, pending, state, bar, waiting
                    )
                    pending = None
                    self._save(progress, state, complete=False)
                    self._stop_if_asked(progress)
            if pending is not None:
                self._record(progress.stage_index, epoch, total_steps, pending, state, bar, waiting)
        return state, batches.seconds

    def _batches(self, split: Split, plan: Sequence[PlannedBatch]) -> Iterator[Batch]:
        """The rows of this process."""
        try:
            yield from load(split, own_rows(plan, self.mesh), self.config.data)
        except RuntimeError as error:
            raise TrainingError(f"{split.dataset.images_dir}: {error}") from error

    def _example(self) -> Batch:
        """A training batch's shapes, and where it lies."""
        rows = None if self.mesh is None else parallel.by_rows(self.mesh)
        batch = next(self._batches(self.train_split, self._plan(0, 0)[:1]))
        size = self.config.data.batch_size
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype, sharding=rows),
            batch,
        )

    def _save_is_due(self, progress: _Progress) -> bool:
        """To be asked once after each step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(
            self._steps_done(progress)
        ):
            self.stop_signal = signal.SIGTERM
        return progress.step % self.config.save_every_steps == 0 or self.stop_signal is not None

    def _steps_done(self, progress: _Progress) -> int:
        """Since the run began, over all stages."""
        return sum(self._total_steps(i) for i in range(progress.stage_index)) + progress.step

    def _stop_if_asked(self, progress: _Progress) -> None:
        if self.stop_signal is not None:
            stage = self.config.stages[progress.stage_index].name
            raise Stopped(
                f"stopped by signal {self.stop_signal}: stage {stage}, step {progress.step} is saved in {self.workdir}"
            )

    def _record(
        self,
        stage_index: int,
        epoch: int,
        total_steps: int,
        pending: _Pending,
        state: TrainState,
        bar: tqdm[Any],
        waiting: float,
    ) -> None:
        """Writes the numbers of a step; `state` is that of this step, or of the next one.
        `waiting`: share of time, for the bar."""
        stage = self.config.stages[stage_index]
        values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        skipped = int(values.pop("skipped"))
        broken = tuple(name for name, value in values.items() if not math.isfinite(value))
        if broken:
            self._keep_failed(stage_index, pending, broken, skipped, state)
        # The optimiser's schedule counts the steps that were applied; a skipped one stays on its
        # rate.
        values["learning_rate"] = float(
            learning_rate(stage, pending.step - 1 - (skipped - bool(broken)), total_steps)
        )
        if self.log is not None:
            self.log.write(
                stage=stage.name, step=pending.step, epoch=epoch + 1, split="train", values=values
            )
        shown = "  ".join(
            f"{name.removeprefix('loss/')} {value:.3f}"
            for name, value in values.items()
            if name.startswith("loss/")
        )
        bar.set_postfix_str(f"{shown}  data {waiting:.0%}", refresh=False)
        bar.update(len(_real(pending.planned)))

    def _keep_failed(
        self,
        stage_index: int,
        pending: _Pending,
        broken: tuple[str, ...],
        skipped: int,
        state: TrainState,
    ) -> None:
        """Keeps the batch of a step that is not finite, and says so; TrainingError if no more may
        be skipped."""
        stage, allowed = self.config.stages[stage_index], self.config.skip_non_finite
        records = [self.train_split.dataset.images[i] for i in _real(pending.planned)]
        images = {image.id: [record.annotation_id for record in image.objects] for image in records}
        failed = FailedStep(stage_index, pending.step, broken, images)
        path = self.workdir / f"failed_batch-{stage.name}-{pending.step}.npz"
        rows = parallel.gather(pending.batch)
        batch = (
            jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
            if len(rows) > 1
            else pending.batch
        )
        state = parallel.to_host(state)
        try:
            if parallel.is_first():
                write_failed(path, failed, self.config, batch, state)
            kept = f"the batch is kept in {path} (python -m mrcnn_jax.training.replay FILE)"
        except OSError as error:
            kept = f"the batch could not be kept in {path}: {error.strerror}"
        line = f"stage {stage.name}, {failed}; {kept}"
        if skipped > allowed:
            raise TrainingError(
                f"{line}; --skip-non-finite {skipped} would leave it out and go on from the last checkpoint"
            )
        tqdm.write(f"warning: {line}; left out, {skipped} of at most {allowed}")

    def _validate(
        self, stage: StageConfig, validate: Any, variables: Variables
    ) -> dict[str, float]:
        """Losses averaged over the validation images, and for the RPN's stage the recall of its
        proposals."""
        plan = plan_once(self.val_split, self.config.data.eval_batch_size)
        key = jax.random.key(self.config.seed)
        totals: dict[str, float] = {}
        count = 0
        seen: dict[
            int, tuple[np.ndarray, np.ndarray]
        ] = {}  # index of an image -> proposals, ground truth
        for planned, batch in zip(plan, self._batches(self.val_split, plan), strict=True):
            values, found = validate(variables, parallel.place_rows(batch, self.mesh), key)
            values, found = jax.device_get(values), parallel.rows_to_host(found, self.mesh)
            images = len(_real(planned))
            count += images
            for name, value in values.items():
                totals[name] = totals.get(name, 0.0) + float(value) * images
            for i in np.flatnonzero(batch.valid):
                truth = batch.ground_truth
                seen[int(batch.indices[i])] = (
                    boxes_to_image(found.boxes[i][found.valid[i]], batch.scales[i]),
                    boxes_to_image(truth.boxes[i][truth.valid[i]], batch.scales[i]),
                )
        values = {name: total / max(count, 1) for name, total in totals.items()}
        if "rpn" in stage.losses:
            seen = {index: boxes for part in parallel.gather(seen) for index, boxes in part.items()}
            proposals, truths = zip(
                *(seen[index] for planned in plan for index in _real(planned)), strict=True
            )
            values |= proposal_recall(proposals, truths, limit=self.config.model.rpn.proposals)
        return values

    def _evaluate(self, predictor: Predictor, variables: Variables) -> dict[str, float]:
        """COCO's AP on the validation images, of the first process; the others, which help it, get
        {}."""
        predictor.load(variables if self.mesh is None else parallel.to_host(variables))
        split, devices = self.val_split, 1 if self.mesh is None else self.mesh.size
        try:
            results, _ = results_of_split(
                predictor, split, plan_once(split, self.config.data.eval_batch_size * devices)
            )
        except jax.errors.JaxRuntimeError:
            raise
        except RuntimeError as error:
            raise TrainingError(f"{split.dataset.images_dir}: {error}") from error
        figures = coco_ap(split.dataset.to_coco(), results) if parallel.is_first() else {}
        return {name: value for name, value in figures.items() if name in _AP}

    def _meta(self, progress: _Progress, *, complete: bool = False) -> Meta:
        """What a checkpoint tells of the run as it stands."""
        return Meta(
            step=self._steps_done(progress),
            stage=self.config.stages[progress.stage_index].name,
            stage_index=progress.stage_index,
            stage_step=progress.step,
            stage_complete=complete,
            categories=tuple(
                (category.id, category.name) for category in self.train_split.dataset.categories
            ),
            config_hash=config_hash(self.config),
            best_metric=progress.best,
            mask_ap=progress.mask_ap,
        )

    def _save(self, progress: _Progress, state: TrainState, *, complete: bool) -> None:
        index, state = progress.stage_index, state if self.mesh is None else parallel.to_host(state)
        broken = [path for path, leaf in flatten(state).items() if not np.isfinite(leaf).all()]
        if broken:
            where = f"stage {self.config.stages[index].name}, step {progress.step}"
            raise TrainingError(
                f"{where}: not saved: {', '.join(broken[:3])} not finite ({len(broken)} in all); the last checkpoint stays"
            )
        if self.log is None:
            return
        self.log.sync()
        self.checkpoints.save(state, self._meta(progress, complete=complete), self.config)

    def _append_timing(
        self, stage: StageConfig, epoch: int, seconds: float, waited: float, *, steps: int
    ) -> None:
        """Wall time is kept apart from metrics.jsonl, which is the same to the bit however often a
        run was interrupted."""
        row = {
            "stage": stage.name,
            "epoch": epoch + 1,
            "steps": steps,
            "seconds": round(seconds, 3),
            "waited_seconds": round(waited, 3),
        }
        if not parallel.is_first():
            return
        with (self.workdir / "timing.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


class _Timed:
    """An iterator that counts the seconds for which it was waited for."""

    def __init__(self, items: Iterator[Batch]) -> None:
        self._items = items
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        asked = time.perf_counter()
        try:
            return next(self._items)
        finally:
            self.seconds += time.perf_counter() - asked


def _real(planned: PlannedBatch) -> list[int]:
    """The images of a batch, without what fills it up."""
    return [index for index in planned.indices if index >= 0]
