"""The record of a run: metrics, validation, evaluation, failed batches and checkpoints."""

from __future__ import annotations

import gc
import math
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mrcnn_jax import cli, parallel
from mrcnn_jax.cli import Failure
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import config_hash
from mrcnn_jax.config.schema import StageConfig
from mrcnn_jax.data.loader import Split, load, plan_once
from mrcnn_jax.data.order import PlannedBatch, own_rows
from mrcnn_jax.evaluation.proposals import proposal_recall
from mrcnn_jax.figures.curves import curves
from mrcnn_jax.inference.evaluate import evaluate
from mrcnn_jax.inference.predictor import Predictor
from mrcnn_jax.models.mask_rcnn import Variables
from mrcnn_jax.output import progress_bar
from mrcnn_jax.pixels.geometry import boxes_to_image
from mrcnn_jax.runs.arrays import flatten
from mrcnn_jax.runs.environment import environment
from mrcnn_jax.runs.hub_folder import is_hub_folder, source_of
from mrcnn_jax.runs.loggers import open_loggers
from mrcnn_jax.runs.meta import Meta
from mrcnn_jax.runs.metrics import MetricsLog, append_timing, read_metrics
from mrcnn_jax.runs.run import Run
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.structures import Batch, Instances
from mrcnn_jax.training.open import OpenRun, Progress
from mrcnn_jax.training.optimizer import learning_rates
from mrcnn_jax.training.profiler import Profiler
from mrcnn_jax.training.replay import FailedStep, write_failed

# Reported of an evaluation during training.
_FIGURES = {f"{kind}/{figure}" for kind in ("bbox", "segm") for figure in ("AP", "AP50", "AP75")}
_FIGURES |= {"depth/AbsRel", "depth/delta1"}


@dataclass(frozen=True)
class Step:
    """A training step whose metrics have not been read."""

    number: int
    """In its stage, from 1."""
    planned: PlannedBatch
    batch: Batch
    metrics: dict[str, Any]


def batches(
    run: OpenRun, stage: StageConfig, split: Split, plan: Sequence[PlannedBatch]
) -> Generator[Batch, None, None]:
    """The rows of a plan's batches that this process loads, with what the stage's losses need.

    Raises:
        Failure: an image cannot be loaded; names its file.
    """
    rows, depth = own_rows(plan, run.mesh), "depth" in stage.losses
    yield from load(split, rows, run.config.data, depth=depth)


class Watch:
    """Writes what a run leaves behind. Every process has one; the first one writes."""

    def __init__(self, run: OpenRun) -> None:
        first = parallel.is_first()
        self.run = run
        self.log = MetricsLog(run.workdir) if first else None
        self.profiler = Profiler(run.workdir / "profile") if run.config.profile and first else None
        self._predictor: Predictor | None = None
        self._environment = environment() | _started_from(run)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.profiler is not None:
            self.profiler.end()
        if self.log is not None:
            self.log.close(failed=kind is not None)

    def open_loggers(self) -> None:
        """Call when nothing refuses the run any more: services show one that could not begin."""
        if self.log is not None:
            self.log.add(open_loggers(self.run.config, self.run.workdir))

    def begin(self, stage: StageConfig) -> None:
        """Call before the steps of a stage."""
        self._predictor = None
        if self.profiler is not None:
            self.profiler.begin(stage.name)

    def record(self, stage_index: int, step: Step, state: TrainState) -> str:
        """Writes the metrics of a step and returns its losses as text.

        Args:
            state: after this step, or after the next one.

        Raises:
            Failure: a metric is not finite, and no more steps may be skipped.
        """
        stage = self.run.config.stages[stage_index]
        values = {name: float(value) for name, value in jax.device_get(step.metrics).items()}
        skipped = int(values.pop("skipped"))
        broken = tuple(name for name, value in values.items() if not math.isfinite(value))
        if broken:
            _keep_failed(self.run, stage_index, step, broken, skipped, state)
        # The schedule counts the steps that were applied: a skipped step keeps its rate for the
        # next one.
        applied = step.number - 1 - (skipped - bool(broken))
        total_steps = self.run.total_steps(stage_index)
        values["learning_rate"] = float(learning_rates(stage, total_steps)[applied])
        self._write(stage, step.number, self.run.epoch_of(step.number), "train", values)
        losses = {name: value for name, value in values.items() if name.startswith("loss/")}
        return as_text(losses, 3)

    def is_evaluated(self, progress: Progress) -> bool:
        """Whether AP and depth are measured at this end of an epoch or of the stage."""
        config, stage = self.run.config, self.run.config.stages[progress.stage_index]
        evaluates = config.evaluates(stage, has_masks=self.run.has_masks)
        every = config.evaluate_every_epochs if evaluates else 0
        epoch = self.run.epoch_of(progress.step)
        return every > 0 and (self.run.is_last(progress) or epoch % every == 0)

    def is_validated(self, progress: Progress) -> bool:
        """Whether losses are computed on the validation images at this end of an epoch."""
        epoch = self.run.epoch_of(progress.step)
        return self.run.is_last(progress) or epoch % self.run.config.validate_every_epochs == 0

    def end_epoch(self, progress: Progress, validate: Any, state: TrainState) -> dict[str, float]:
        """Validates and evaluates as the config says, writes the figures and returns them."""
        run, stage = self.run, self.run.config.stages[progress.stage_index]
        epoch = run.epoch_of(progress.step)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        values: dict[str, float] = {}
        if self.is_validated(progress):
            values |= _validate(run, stage, validate, variables)
        if self.is_evaluated(progress):
            values |= self._evaluate(progress, variables)
            kinds = ("segm", "bbox") if run.has_masks else ("bbox",)
            measured = (values[f"{kind}/AP"] for kind in kinds if f"{kind}/AP" in values)
            progress.ap = next(measured, None)
        if values:
            self._write(stage, progress.step, epoch, "val", values)
            if self.log is not None:
                curves(read_metrics(run.workdir), run.workdir / "figures")
            # Figures and loaders refer to themselves: their memory would wait for the collector.
            gc.collect()
        return values

    def _evaluate(self, progress: Progress, variables: Variables) -> dict[str, float]:
        """AP and depth on the validation images; {} for all processes but the first."""
        run, split = self.run, self.run.val_split
        if self._predictor is None:
            self._predictor = Predictor(Run(run.config, self.meta(progress), {}), run.mesh)
        self._predictor.load(variables if run.mesh is None else parallel.to_host(variables))
        try:
            found = evaluate(self._predictor, split)
        except ConfigError as error:  # data that cannot be read any more
            raise Failure(str(error)) from error
        figures = {} if found is None else found.metrics
        # What is undefined, such as the AP of masks where no object has one, is -1.
        return {name: value for name, value in figures.items() if name in _FIGURES and value >= 0}

    def meta(self, progress: Progress, *, complete: bool = False) -> Meta:
        """The description of a checkpoint of the run as it stands."""
        run, index = self.run, progress.stage_index
        return Meta(
            step=run.steps_done(progress),
            stage=run.config.stages[index].name,
            stage_index=index,
            stage_step=progress.step,
            stage_complete=complete,
            categories=run.categories,
            environment=self._environment,
            config_hash=config_hash(run.config),
            ap=progress.ap,
            loaded=run.loaded,
            images=run.images,
            validated=progress.validated,
            has_masks=run.has_masks,
            annotations=run.annotations,
        )

    def save(self, progress: Progress, state: TrainState, *, complete: bool) -> None:
        """Writes a checkpoint; Failure if a number in it is not finite."""
        run = self.run
        state = state if run.mesh is None else parallel.to_host(state)
        broken = [path for path, leaf in flatten(state).items() if not np.isfinite(leaf).all()]
        if broken:
            stage = run.config.stages[progress.stage_index]
            raise Failure(
                f"stage {stage.name}, step {progress.step}: not saved: {', '.join(broken[:3])} not "
                f"finite ({len(broken)} in all); the last checkpoint stays"
            )
        if self.log is not None:
            self.log.sync()
            run.checkpoints.save(state, self.meta(progress, complete=complete), run.config)

    def write_timing(self, row: dict[str, Any]) -> None:
        """Appends a row to timing.jsonl.

        Times are kept apart from metrics.jsonl, which is the same to the bit however often a run
        was interrupted.
        """
        if parallel.is_first():
            append_timing(self.run.workdir, row)

    def _write(
        self, stage: StageConfig, step: int, epoch: int, split: str, values: dict[str, float]
    ) -> None:
        if self.log is not None:
            self.log.write(stage=stage.name, step=step, epoch=epoch, split=split, values=values)


def _started_from(run: OpenRun) -> dict[str, str | int]:
    """For the environment of a run that began from a model in the Hub's layout: which one."""
    names = ("weights", "weights_sha256")
    if run.resumed_from is not None:
        before = run.resumed_from.environment
        return {name: before[name] for name in names if name in before}
    if run.config.init_from is None or not is_hub_folder(Path(run.config.init_from)):
        return {}
    source = source_of(Path(run.config.init_from))
    return dict(zip(names, (source.name, source.sha256), strict=True))


def _keep_failed(
    run: OpenRun,
    stage_index: int,
    step: Step,
    broken: tuple[str, ...],
    skipped: int,
    state: TrainState,
) -> None:
    """Writes the batch of a step that is not finite, and warns of it or ends the run."""
    stage = run.config.stages[stage_index]
    records = [run.train_split.dataset.images[i] for i in step.planned.images]
    images = {image.id: [record.annotation_id for record in image.annotations] for image in records}
    failed = FailedStep(stage_index, step.number, broken, images)
    path = run.workdir / f"failed_batch-{stage.name}-{step.number}.npz"
    leaves, structure = jax.tree.flatten(step.batch)
    parts = zip(*parallel.gather([np.asarray(leaf) for leaf in leaves]), strict=True)
    batch = jax.tree.unflatten(structure, [np.concatenate(rows) for rows in parts])
    state = parallel.to_host(state)
    try:
        if parallel.is_first():
            write_failed(path, failed, run.config, batch, state)
        kept = f"the batch is kept in {path} ({cli.command('replay')} FILE)"
    except OSError as error:
        kept = f"the batch could not be kept in {path}: {error.strerror}"
    line = f"stage {stage.name}, {failed}; {kept}"
    allowed = run.config.skip_non_finite
    if skipped > allowed:
        raise Failure(
            f"{line}; --skip-non-finite {skipped} would leave it out and go on from the last "
            "checkpoint"
        )
    tqdm.write(f"warning: {line}; left out, {skipped} of at most {allowed}")


def _validate(
    run: OpenRun, stage: StageConfig, validate: Any, variables: Variables
) -> dict[str, float]:
    """Losses averaged over the validation images, and recall of the proposals for the RPN.

    Those of masks and of depth are averaged over the images that have any, and left out where none
    has.
    """
    plan = plan_once(run.val_split, run.config.data.eval_batch_size)
    key = jax.random.key(run.config.seed)
    images = run.val_split.dataset.images
    masked = {i for i, image in enumerate(images) if image.has_mask}
    deep = {i for i, image in enumerate(images) if image.depth_file is not None}
    if run.config.model.depth_head.kind == "roi":
        deep &= masked
    counted = dict.fromkeys(("loss/mask", "loss/mask_points", "loss/mask_iou"), masked)
    counted["loss/depth"] = deep
    totals: defaultdict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    boxes: list[tuple[int, np.ndarray, np.ndarray]] = []  # image, proposals, ground truth
    has_proposals = "rpn" in stage.losses
    loaded = zip(plan, batches(run, stage, run.val_split, plan), strict=True)
    dispatched = (
        (planned, batch, validate(variables, parallel.place_rows(batch, run.mesh), key))
        for planned, batch in loaded
    )
    with progress_bar(len(images), "validating", disable=not parallel.is_first()) as bar:
        for planned, batch, (values, found) in parallel.one_ahead(dispatched):
            for name, value in jax.device_get(values).items():
                count = sum(i in counted.get(name, planned.images) for i in planned.images)
                totals[name] += float(value) * count
                counts[name] += count
            if has_proposals:
                boxes += _boxes_in_images(batch, parallel.rows_to_host(found, run.mesh))
            bar.update(len(planned.images))
    totals.pop("loss/total", None)  # of all images alike
    means = {name: total / counts[name] for name, total in totals.items() if counts[name]}
    if means:
        means["loss/total"] = sum(means.values())
    if has_proposals:
        pair_of = {i: pair for part in parallel.gather(boxes) for i, *pair in part}
        pairs = [pair_of[i] for planned in plan for i in planned.images]
        proposals, truths = zip(*pairs, strict=True)
        means |= proposal_recall(proposals, truths, limit=run.config.model.rpn.proposals)
    return means


def _boxes_in_images(
    batch: Batch, proposals: Instances
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The index, proposals and objects of each image of a batch, boxes in the image's pixels."""
    for i in np.flatnonzero(batch.valid):
        seen = proposals.boxes[i][proposals.valid[i]]
        truth = batch.ground_truth.boxes[i][batch.ground_truth.valid[i]]
        seen, truth = (boxes_to_image(boxes, batch.scales[i]) for boxes in (seen, truth))
        yield int(batch.indices[i]), seen, truth


def as_text(values: dict[str, float], digits: int) -> str:
    """Metrics on one line."""
    return "  ".join(
        f"{name.removeprefix('loss/')} {value:.{digits}f}" for name, value in values.items()
    )
