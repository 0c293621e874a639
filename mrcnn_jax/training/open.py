"""Opens a run: every refusal that comes before compiling, in the order in which it is met."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mrcnn_jax import parallel
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import config_hash, load_config_json, resolve_paths
from mrcnn_jax.config.schema import Config
from mrcnn_jax.data.images import other_versions
from mrcnn_jax.data.loader import Split, open_split
from mrcnn_jax.data.order import PlannedBatch, plan_epoch, repeat_factors
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.models.initialise import variable_shapes
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Variables
from mrcnn_jax.output import remove_abandoned
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.runs.loggers import refuse_missing
from mrcnn_jax.runs.logs import METRICS
from mrcnn_jax.runs.meta import Meta
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.runtime import warn_of_slow_versions
from mrcnn_jax.training.features import refuse_unusable_cache
from mrcnn_jax.training.initial import initial_variables
from mrcnn_jax.training.optimizer import lengths_of, make_optimizer
from mrcnn_jax.training.resume import (
    annotation_hashes,
    refuse_another_config,
    refuse_another_run,
    refuse_lost_checkpoints,
)
from mrcnn_jax.training.splits import (
    categories_of,
    read_splits,
    refuse_without_depth,
    refuse_without_masks,
)
from mrcnn_jax.training.stages import (
    live_modules,
    refuse_partly_live,
    refuse_random_frozen,
    trained,
)
from mrcnn_jax.weights.choice import Choice


@dataclass
class Progress:
    """Where a run stands."""

    stage_index: int
    step: int = 0
    """Steps done in the stage."""
    ap: float | None = None
    """AP of the parameters, if it was just measured, as of `Meta.ap`."""
    validated: bool = True
    """False: at the end of an epoch whose validation has yet to come."""


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A run that may start or go on: its config, data and network, and where it was left."""

    config: Config
    """With resolved paths."""
    workdir: Path
    mesh: Mesh | None
    model: MaskRCNN
    train_split: Split
    val_split: Split
    repeats: np.ndarray
    """How often each training image is used in an epoch, see `repeat_factors`."""
    checkpoints: Checkpoints
    resumed_from: Meta | None
    initial: Variables
    """The variables of a new run that are not random."""
    loaded: tuple[str, ...] | None
    """As of `Meta.loaded`."""
    images: str
    """As of `Meta.images`."""
    has_masks: bool
    """As of `Meta.has_masks`."""
    annotations: Mapping[str, str]
    """As of `Meta.annotations`."""

    def plan(self, stage_index: int, epoch: int) -> list[PlannedBatch]:
        """The batches of an epoch that a stage trains: of its last one, perhaps the first part."""
        left = self.total_steps(stage_index) - epoch * self.steps_per_epoch
        return self.whole_epoch(stage_index, epoch)[: max(0, left)]

    def whole_epoch(self, stage_index: int, epoch: int) -> list[PlannedBatch]:
        """The batches of an epoch, were it trained to its end.

        They are a pure function of the data's sizes and classes, the seed and the epoch counted
        over all stages, each of which begins with an epoch of its own.
        """
        epochs_before = sum(map(self.epochs_begun, range(stage_index)))
        return plan_epoch(
            [plan.canvas for plan in self.train_split.plans],
            self.config.data.batch_size,
            seed=self.config.seed,
            epoch=epochs_before + epoch,
            shuffle=True,
            repeats=self.repeats,
        )

    @property
    def categories(self) -> tuple[tuple[int, str], ...]:
        """(id, name) of labels 1..K."""
        return categories_of(self.train_split.dataset)

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """The same for all epochs and stages."""
        return len(self.whole_epoch(0, 0))

    def total_steps(self, stage_index: int) -> int:
        """Steps of a whole stage, at least 1."""
        return max(1, round(self.config.stages[stage_index].epochs * self.steps_per_epoch))

    def epochs_begun(self, stage_index: int) -> int:
        """Epochs of a whole stage; the last one may be a part."""
        return math.ceil(self.total_steps(stage_index) / self.steps_per_epoch)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 1, that a step belongs to, counted from 1 in its stage."""
        return math.ceil(step / self.steps_per_epoch)

    def is_last(self, progress: Progress) -> bool:
        """Whether all steps of its stage are done."""
        return progress.step == self.total_steps(progress.stage_index)

    def steps_done(self, progress: Progress) -> int:
        """Steps since the run began, over all stages."""
        return sum(map(self.total_steps, range(progress.stage_index))) + progress.step

    def first_state(self, stage_index: int, variables: Variables) -> TrainState:
        """The state at the first step of a stage."""
        params, stage = variables["params"], self.config.stages[stage_index]
        optimizer = make_optimizer(stage, params, total_steps=self.total_steps(stage_index))
        key = jax.random.fold_in(jax.random.key(self.config.seed), stage_index)
        return TrainState(
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(params),
            step=jnp.int32(0),
            key=jax.random.key_data(key),
            ema=trained(stage, params) if stage.ema_decay else {},
        )


@contextmanager
def open_run(
    config: Config,
    workdir: Path,
    weights: Choice | None = None,
    read_before: Sequence[CocoDataset] = (),
) -> Iterator[OpenRun]:
    """Checks config, folder and data of a run, and holds the folder's lock while it is open.

    Nothing is compiled here. Of several processes each calls this.

    Args:
        config: of the run.
        workdir: its folder.
        weights: those of `config.init_from`, whose outputs per class are left out of a new run with
            other classes; None: `config.init_without_classes` decides.
        read_before: data sets that `read_coco` has read before; they are not read again.

    Raises:
        ConfigError: a user's mistake, in one line; AnotherConfig if it is that of the folder.
    """
    if not config.stages:
        raise ConfigError("stages: the config has none")
    began = _began_with(config.init_from, workdir)
    config = resolve_paths(
        replace(config, init_from=began or config.init_from), needs_start=not began
    )
    parallel.in_turn(lambda: refuse_missing(config.loggers) if parallel.is_first() else None)
    mesh = parallel.data_mesh()
    parallel.refuse_uneven(config.data.batch_size, mesh)
    with ExitStack() as stack:
        parallel.in_turn(
            lambda: stack.enter_context(_locked(workdir)) if parallel.is_first() else None
        )
        refuse_another_config(config, workdir)
        yield _open(config, workdir, mesh, weights, read_before)


def _began_with(init_from: str | None, workdir: Path) -> str | None:
    """The name that a run saved of the weights that it began with, if these are they, and it has
    a checkpoint: so they are not read again."""
    saved = workdir / "config.json"
    if not any(workdir.glob("checkpoints/[!.]*")) or not saved.exists():
        return None
    began, shared = load_config_json(saved).init_from, os.environ.get("MRCNN_DATA", "")
    names = (str(Path(folder, init_from or "").resolve()) for folder in ("", shared))
    return began if began in (init_from, *names) else None


@contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it; the lock ends with the process."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("wb")
    except OSError as error:
        raise ConfigError(f"{workdir}: cannot be written to: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{workdir}: another run is training in this folder") from None
        except OSError as error:
            print(f"{workdir}: {error.strerror}: no lock keeps a second run out of this folder")
        remove_abandoned(workdir)
        yield


def _open(
    config: Config,
    workdir: Path,
    mesh: Mesh | None,
    weights: Choice | None,
    read_before: Sequence[CocoDataset],
) -> OpenRun:
    """The refusals that follow in a locked folder, the cheap ones first."""
    data = config.data
    train_set, val_set = read_splits(config, read_before)
    checkpoints = Checkpoints(workdir, keep=config.keep_checkpoints)
    checkpoints.refuse_incomplete()
    resumed_from = checkpoints.latest()
    if resumed_from is not None:
        checkpoints.refuse_damaged_log(resumed_from, METRICS)
        refuse_another_run(config, workdir, train_set, resumed_from)
    else:
        refuse_lost_checkpoints(config, workdir)

    # Shapes are enough to check the stage table and the weights to start from.
    model = MaskRCNN(config.model, deterministic=config.deterministic)
    shapes = variable_shapes(config.model)
    for stage in config.stages:
        refuse_partly_live(stage, shapes["params"], live_modules(config.model))
    initial: Variables = {}
    began: Mapping[str, Any] = {}
    if resumed_from is None:
        config = _without_other_classes(config, weights, train_set)
        initial, modules, began = initial_variables(shapes, config, train_set.class_names)
        loaded: tuple[str, ...] | None = tuple(sorted(modules))
        refuse_random_frozen(config, shapes["params"], modules, began)
    else:
        loaded = resumed_from.loaded
        if loaded is not None:  # rows may have been added to its table
            refuse_random_frozen(config, shapes["params"], loaded)
    warn_of_slow_versions()

    cache = Path(data.cache) if data.cache else workdir / "data"
    train_split, val_split = parallel.in_turn(
        lambda: (
            open_split("train", train_set, cache=cache, data=data),
            open_split("val", val_set, cache=cache, data=data),
        )
    )
    for split in (train_split, val_split):
        dataset = split.dataset
        print("\n".join(dataset.report.lines()))
        if dataset.depth is not None:
            print(dataset.depth.line(len(dataset.images)))
    if not data.cache and (line := other_versions([train_split.folder, val_split.folder])):
        print(line)
    refuse_without_depth(config, train_split.dataset, val_split.dataset)
    if resumed_from is None:
        refuse_without_masks(config, train_split.dataset, began)
    refuse_unusable_cache(config, model, shapes, (train_split, val_split))
    repeats = repeat_factors(train_split.dataset, data.repeat_threshold)
    images = _hash([*_images(train_split), repeats.tolist()])
    if resumed_from is not None and resumed_from.images not in (None, images):
        # Rare classes are those of the annotations: one more label may change what is repeated.
        or_repeats = ", or not repeated as often (data.repeat_threshold)"
        raise ConfigError(
            f"{data.train_annotations}: not the training images that {workdir} began with"
            f"{or_repeats if data.repeat_threshold > 0 else ''}, by which its steps are counted "
            f"({len(train_split.plans)} now): bring them back, or begin a new run with its weights "
            f"(--weights {workdir}, another --workdir)"
        )
    run = OpenRun(
        config=config,
        workdir=workdir,
        mesh=mesh,
        model=model,
        train_split=train_split,
        val_split=val_split,
        repeats=repeats,
        checkpoints=checkpoints,
        resumed_from=resumed_from,
        initial=initial,
        loaded=loaded,
        images=images,
        has_masks=train_set.has_masks,
        annotations=annotation_hashes({"train": train_set, "val": val_set}, resumed_from),
    )
    if repeats.max() > 1:
        used = sum(len(planned.images) for planned in run.whole_epoch(0, 0))
        print(
            f"{(repeats > 1).sum()} training images are repeated (data.repeat_threshold): "
            f"{used} an epoch"
        )
    refuse_schedules(run)
    parallel.in_turn(lambda: _refuse_full_disk(run, shapes) if parallel.is_first() else None)
    _refuse_differing_processes(run)
    return run


def refuse_schedules(run: OpenRun) -> None:
    """Raises ConfigError if a stage's rate cannot follow its steps: a milestone in its warm-up."""
    for index, stage in enumerate(run.config.stages):
        lengths_of(stage, run.total_steps(index))


def _without_other_classes(config: Config, weights: Choice | None, dataset: CocoDataset) -> Config:
    """Leaves the outputs per class of the weights out if they are of other classes, and says so."""
    why = weights.other_classes(dataset.class_names) if weights is not None else None
    if why is None:
        return config
    print(f"the outputs per class of these weights are left out: {why}")
    return replace(config, init_without_classes=True)


def _refuse_full_disk(run: OpenRun, shapes: Variables) -> None:
    """Raises ConfigError if the disk has no room for the checkpoints that the run will keep."""
    config = run.config
    sizes = []
    for index in range(len(config.stages)):
        state = jax.eval_shape(functools.partial(run.first_state, index), shapes)
        sizes.append(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)))
    # The last one of every stage, those between, the best, and the one that is being written; a
    # resumed run has some of them.
    others = config.keep_checkpoints + 1 + (config.evaluate_every_epochs > 0)
    files = (path for path in run.checkpoints.folder.rglob("*") if path.is_file())
    needed = sum(sizes) + others * max(sizes) - sum(path.stat().st_size for path in files)
    free = shutil.disk_usage(run.workdir).free
    if free < needed:
        raise ConfigError(
            f"{run.workdir}: its checkpoints need {needed / 2**20:,.0f} MiB of disk, and "
            f"{free / 2**20:,.0f} MiB are free (--keep-checkpoints is {config.keep_checkpoints})"
        )


def _refuse_differing_processes(run: OpenRun) -> None:
    """Raises ConfigError if the processes would not do the same steps on the same data."""
    fields = (
        "save_every_steps",
        "validate_every_epochs",
        "evaluate_every_epochs",
        "skip_non_finite",
        "shard_parameters",
    )
    values: dict[str, Any] = {"the config": config_hash(run.config)}
    values |= {name: getattr(run.config, name) for name in fields}
    values["data.eval_batch_size"] = run.config.data.eval_batch_size
    meta = run.resumed_from
    values["the newest checkpoint in --workdir"] = meta.name if meta else None
    for split in (run.train_split, run.val_split):
        values[f"data.{split.name}_annotations"] = _hash(_images(split))
    parallel.refuse_differing(values)


def _images(split: Split) -> list[tuple[int, str, int, bool]]:
    """What steps and their order follow from: id, file, canvas of each image, whether it has
    depth."""
    return [
        (image.id, image.file_name, plan.canvas, image.depth_file is not None)
        for image, plan in zip(split.dataset.images, split.plans, strict=True)
    ]


def _hash(values: list[Any]) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]
