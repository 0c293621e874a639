"""A run as a folder: its config, and the categories and weights of one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from mrcnn_jax import cli, parallel
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import PATHS, differences, load_config_json, save_config
from mrcnn_jax.config.heads import DepthHeadConfig
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import BOX_LOSSES, Config, Loss, StageConfig
from mrcnn_jax.data.depth_files import depth_source
from mrcnn_jax.data.loader import Split, open_split
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.models.mask_rcnn import Variables, modules_of
from mrcnn_jax.output import listed, part_folder, remove_abandoned
from mrcnn_jax.runs import hub
from mrcnn_jax.runs.checkpoints import Checkpoints, Weights
from mrcnn_jax.runs.finite import refuse_not_finite
from mrcnn_jax.runs.hub_folder import (
    WEIGHTS,
    Source,
    is_hub_folder,
    read_hub_folder,
    source_of,
)
from mrcnn_jax.runs.meta import Meta
from mrcnn_jax.runs.state import TrainState

CheckpointName = Literal["newest", "best"]


@dataclass(frozen=True)
class Run:
    """Config, categories and weights of one checkpoint of a run."""

    config: Config
    meta: Meta
    variables: Variables
    weights: Weights = "raw"
    """"ema": in `variables` the moving average replaces the parameters that it averages."""
    source: Source | None = None
    """Of a model in the Hub's layout: which one it is."""

    @property
    def category_ids(self) -> list[int]:
        """COCO id of label i + 1."""
        return [number for number, _ in self.meta.categories]

    @property
    def class_names(self) -> dict[int, str]:
        """COCO category id -> name."""
        return dict(self.meta.categories)

    @property
    def title(self) -> str:
        """The checkpoint's name, and whether `variables` hold the moving average."""
        return self.meta.name + (", moving average of its weights" if self.weights == "ema" else "")

    @property
    def trained(self) -> frozenset[Loss]:
        """Heads that are not random: all that they read is learnt (`learnt_modules`).

        An imported network has no stages, and all heads.
        """
        model, heads = self.config.model, _heads(self.config.model)
        if not self.config.stages:
            return heads
        learnt = learnt_modules(self.config, self.meta)
        return frozenset(loss for loss in heads if modules_of(loss, model) <= learnt)

    @property
    def has_masks(self) -> bool:
        """Whether masks are given, and what is read through them: of a head that is not random.

        A run of an earlier version does not say what it began with, which may have been one.
        """
        return "mask" in self.trained or bool(self.config.stages and self.meta.loaded is None)

    @property
    def network(self) -> ModelConfig:
        """The network that predicts: without heads that are random, of those it need not have."""
        model, trained = self.config.model, self.trained
        known = sum(loss in trained for loss in BOX_LOSSES)
        cascade = model.box_head.cascade[: max(0, known - 1)]
        # Runs of earlier versions do not say what they began with.
        has_depth = "depth" in trained or self.meta.loaded is None
        has_depth &= model.depth_head.kind != "roi" or self.has_masks  # a map inside the masks
        depth = model.depth_head if has_depth else DepthHeadConfig()
        return replace(
            model,
            box_head=replace(model.box_head, cascade=cascade),
            mask_iou_head=replace(model.mask_iou_head, enabled="mask_iou" in trained),
            depth_head=depth,
        )

    @property
    def untrained_line(self) -> str | None:
        """For people: which heads are still random; None if none are, or it is not known."""
        if self.meta.loaded is None:
            return None
        model = self.config.model
        random = sorted(_heads(model) - self.trained)
        if not random:
            return None
        line = f"checkpoint {self.meta.name}: not trained yet, so random: {', '.join(random)}"
        if self.has_masks:
            return line
        depth = " and distances" if model.depth_head.kind != "none" else ""
        return f"{line}; masks{depth} are left out"


def _heads(model: ModelConfig) -> frozenset[Loss]:
    """The losses of the heads that a network has."""
    heads = set(get_args(Loss)) - ({"depth"} if model.depth_head.kind == "none" else set())
    heads -= set(BOX_LOSSES[len(model.box_head.heads) :])
    return frozenset(heads - (set() if model.mask_iou_head.enabled else {"mask_iou"}))


def begun_stages(config: Config, meta: Meta) -> tuple[StageConfig, ...]:
    """The rows of the stage table that had a step at a checkpoint."""
    return config.stages[: meta.stage_index + (meta.stage_step > 0)]


def learnt_modules(config: Config, meta: Meta) -> frozenset[str]:
    """Modules of a run with stages that are not random at a checkpoint: trained or loaded.

    They are those that the run began with (`Meta.loaded`), and those that a loss of a stage that
    has begun reads: training refuses a frozen module that is random there. Data without a mask
    teach those of masks nothing.
    """
    losses = {loss for stage in begun_stages(config, meta) for loss in stage.losses}
    if not meta.has_masks:
        losses -= {"mask", "mask_iou"}
        if config.model.depth_head.kind == "roi":  # within masks
            losses.discard("depth")
    return frozenset(meta.loaded or ()).union(*(modules_of(loss, config.model) for loss in losses))


def load_run(workdir: Path, checkpoint: CheckpointName = "newest", weights: Weights = "raw") -> Run:
    """Load a run from its folder.

    Args:
        workdir: the run's folder, or a model in the Hub's layout (`hub_folder`).
        checkpoint: the newest intact one, or the one of the best AP (`Meta.ap`).
        weights: the parameters themselves ("raw"), or with the moving average of those that the
            checkpoint's stage trains ("ema", `StageConfig.ema_decay`).

    Raises:
        ConfigError: as of `load_weights`, or the checkpoint holds no moving average.
    """
    runs = load_weights(workdir, checkpoint)
    if weights not in runs:
        meta = runs["raw"].meta
        raise ConfigError(
            f"{workdir}: checkpoint {meta.name} holds no moving average of its weights "
            f"(stages.{meta.stage}.ema_decay)"
        )
    return runs[weights]


def load_weights(workdir: Path, checkpoint: CheckpointName = "newest") -> dict[Weights, Run]:
    """Load a run from its folder with each kind of weights that the checkpoint holds, read once.

    Args:
        checkpoint: as of `load_run`.

    Returns:
        "raw", and "ema" if the checkpoint holds a moving average.

    Raises:
        ConfigError: the folder holds no config or another one than the checkpoint, no such
            checkpoint, (imported) no more than a backbone, or weights that are not finite; or it is
            an address on the Hub.
    """
    if workdir.parts[:1] == ("hf:",):  # a Path has lost one of the slashes
        name, _, revision = "/".join(workdir.parts[1:]).partition("@")
        of = f" --revision {revision}" if revision else ""
        raise ConfigError(
            f"{hub.SCHEME}{name}: a folder is needed here: hf download {name}{of} --local-dir DIR"
        )
    if is_hub_folder(workdir):
        return {"raw": _of_hub_folder(workdir, checkpoint)}
    of_run = load_config_json(workdir / "config.json")
    checkpoints = Checkpoints(workdir, keep=1)
    meta = checkpoints.latest() if checkpoint == "newest" else checkpoints.best()
    if meta is None:
        what = "no checkpoint yet"
        if checkpoint == "best":
            what = "no checkpoint whose AP was measured (--evaluate-every-epochs)"
        raise ConfigError(f"{workdir}: holds {what}")
    config = _config_of(checkpoints, meta, of_run, workdir)
    found = checkpoints.restore_weights(meta)
    for variables in found.values():
        refuse_not_finite(flatten_dict(variables, sep="/"), f"{workdir}: checkpoint {meta.name}")
    if set(found["raw"]["params"]) in ({"resnet"}, {"convnext"}):
        start = cli.command("train", "--weights", workdir)
        raise ConfigError(f"{workdir}: holds only a backbone, to train a detector from: {start}")
    return {name: Run(config, meta, variables, name) for name, variables in found.items()}


def _of_hub_folder(folder: Path, checkpoint: CheckpointName) -> Run:
    if checkpoint == "best":
        raise ConfigError(f"{folder}: holds one checkpoint only, and none that is its best")
    config, meta, variables = read_hub_folder(folder)
    refuse_not_finite(flatten_dict(variables, sep="/"), f"{folder / WEIGHTS}")
    return Run(config, meta, variables, source=source_of(folder))


# Names of data, which are others where a run or its data was moved.
_PLACES = ("root", "cache", *PATHS)


def _config_of(checkpoints: Checkpoints, meta: Meta, of_run: Config, workdir: Path) -> Config:
    """The config that a checkpoint was saved with, under its manifest.

    Only the names of data are taken from the run's own config.json, if something is there.

    Raises:
        ConfigError: names the first fields in which the run's config.json differs otherwise, but
            for those that may differ on resume.
    """
    saved = checkpoints.config(meta)
    if saved is None:
        return of_run
    moved = {
        name: new
        for name in _PLACES
        if (new := getattr(of_run.data, name)) is not None and _exists(Path(new))
    }
    config = replace(saved, data=replace(saved.data, **moved))
    changed = differences(config, of_run)
    if changed:
        raise ConfigError(
            f"{workdir / 'config.json'}: differs from that of checkpoint {meta.name} "
            f"({workdir / 'checkpoints' / meta.name / 'config.json'}, which may be copied over "
            f"it): {listed(changed, separator='; ')}"
        )
    return config


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long a name, or one with a NUL
        return False


def open_data(
    run: Run,
    workdir: Path,
    split_name: Literal["train", "val"],
    annotations: Path | None = None,
    images: Path | None = None,
) -> Split:
    """Open a split of the run's own data, or another data set.

    Each of several processes calls this; the first one reads and builds, the others find its files.

    Args:
        run: gives the data set's paths and limits, and the categories that it may have.
        workdir: the run's folder; the built data set goes to `data` in it unless the config has a
            cache.
        annotations, images: file and folder of another data set, whose categories are the run's or
            some of them; where ids differ, the names decide, and the report says so.

    Raises:
        ConfigError: no data set, or one that cannot be used; a category that the run does not have.
    """
    data = run.config.data
    if (annotations is None) != (images is None):
        raise ConfigError("--annotations and --images go together")
    json_path = annotations or Path(getattr(data, f"{split_name}_annotations"))
    images_path = images or Path(getattr(data, f"{split_name}_images"))
    # A run that was trained keeps the absolute paths of its data.
    if not json_path.is_absolute() and annotations is None:
        raise ConfigError(
            f"{workdir}: its config names no data set (eval takes --annotations and --images)"
        )
    cache = Path(data.cache) if data.cache else workdir / "data"
    data = replace(data, class_names=())  # the run's categories say more

    def opened() -> Split:
        depth = depth_source(run.config, split_name if annotations is None else None)
        dataset = read_coco(json_path, images_path, data, depth=depth)
        try:
            dataset = dataset.matched_to(run.meta.categories, "the run")
        except ConfigError as error:
            made_up = all(name == f"class{number}" for number, name in run.meta.categories)
            if run.meta.stage != "imported" or not made_up:
                raise
            way_on = "its classes have no names: import it again with --categories FILE"
            raise ConfigError(f"{error} ({way_on})") from None
        return open_split(split_name, dataset, cache=cache, data=data)

    return parallel.in_turn(opened)


def write_run(
    out: Path,
    config: Config,
    variables: Variables,
    meta: Meta,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write the folder of a run that was not trained there, completely or not at all.

    Args:
        out: the new folder; it may be there already, but empty.
        config: of the run and of its checkpoint.
        variables: params and batch_stats.
        meta: of the checkpoint.
        texts: further files by name, such as a README.

    Raises:
        ConfigError: it cannot be written.
    """
    nothing = {"opt_state": (), "step": jnp.int32(0), "key": jnp.zeros(2, jnp.uint32)}
    state = TrainState(params=variables["params"], batch_stats=variables["batch_stats"], **nothing)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with part_folder(out) as folder:
            run = folder / "run"
            Checkpoints(run, keep=1).save(state, meta, config)
            save_config(config, run / "config.json")
            for name, text in (texts or {}).items():
                (run / name).write_text(text, encoding="utf-8")
            run.replace(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None


def refuse_taken(out: Path) -> None:
    """Raise ConfigError if `out` exists and is not an empty folder, or has no name of its own."""
    if out.name in ("", ".."):  # what is whole is renamed to it
        raise ConfigError(f"{out}: name a new folder (choose another --out)")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not an empty folder (choose another --out)")


def make_folder(*folders: Path) -> None:
    """Create folders for results, best before the work is done.

    What killed programs left half-written in them is removed.

    Raises:
        ConfigError: one cannot be created.
    """
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be created: {error.strerror}") from None
        remove_abandoned(folder)
