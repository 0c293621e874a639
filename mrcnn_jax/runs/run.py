"""A trained run, restored from its folder: config, categories and weights of one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mrcnn_jax import cli, parallel
from mrcnn_jax.config.files import load_config_json
from mrcnn_jax.config.schema import Config, ConfigError, Loss
from mrcnn_jax.data.loader import Split, open_split
from mrcnn_jax.models.mask_rcnn import MODULES_OF, Variables
from mrcnn_jax.runs.checkpoints import Checkpoints, Meta, Weights

Choice = Literal["newest", "best"]


@dataclass(frozen=True)
class Run:
    """What the folder of a run holds: config, categories and weights of a whole checkpoint."""

    config: Config
    meta: Meta
    variables: Variables
    weights: Weights = "raw"
    """ema: `variables` hold the moving average where it was kept."""

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
        """Heads that are not random: those of the stages begun, and those before them, which a
        stage refuses to do without.

        An imported network has no stages, and all heads."""
        if not self.config.stages:
            return frozenset(MODULES_OF)
        begun = self.config.stages[: self.meta.stage_index + (self.meta.stage_step > 0)]
        modules = set().union(*(MODULES_OF[loss] for stage in begun for loss in stage.losses))
        return frozenset(loss for loss, needed in MODULES_OF.items() if needed <= modules)


def load_run(workdir: Path, checkpoint: Choice = "newest", weights: Weights = "raw") -> Run:
    """A run from its folder.

    Args:
        checkpoint: the newest whole one, or the one with the best mask AP
            (`Config.evaluate_every_epochs`).
        weights: the parameters themselves, or with their moving average (`StageConfig.ema_decay`)
            where the checkpoint's stage trains.

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


def load_weights(workdir: Path, checkpoint: Choice = "newest") -> dict[Weights, Run]:
    """A run from its folder with each kind of weights that the checkpoint holds, read once.

    Args:
        checkpoint: as of `load_run`.

    Returns:
        "raw", and "ema" if the checkpoint holds a moving average.

    Raises:
        ConfigError: the folder holds no config, no such checkpoint, or (imported) no more than a
            backbone.
    """
    config = load_config_json(workdir / "config.json")
    checkpoints = Checkpoints(workdir, keep=1)
    meta = checkpoints.latest() if checkpoint == "newest" else checkpoints.best()
    if meta is None:
        what = "no checkpoint yet"
        if checkpoint == "best":
            what = "no checkpoint whose mask AP was measured (--evaluate-every-epochs)"
        raise ConfigError(f"{workdir}: holds {what}")
    found = checkpoints.restore_weights(meta)
    if set(found["raw"]["params"]) == {"resnet"}:
        start = cli.command("train", "--init-from", workdir)
        raise ConfigError(f"{workdir}: holds only a backbone, to train a detector from: {start}")
    return {name: Run(config, meta, variables, name) for name, variables in found.items()}


def open_data(
    run: Run,
    workdir: Path,
    split_name: Literal["train", "val"],
    annotations: Path | None = None,
    images: Path | None = None,
) -> Split:
    """A split of the run's own data, or another data set.

    Each of several processes calls this; the first one reads and builds, the others find its files.

    Args:
        run: gives the data set's paths and limits, and the categories that it may have.
        workdir: the run's folder; the built data set goes to `data` in it unless the config has a
            cache.
        annotations, images: file and folder of another data set, whose categories are the run's or
            some of them.

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
            f"{workdir}: its config names no data set: give --annotations and --images"
        )
    cache = Path(data.cache) if data.cache else workdir / "data"
    if annotations is not None:
        data = replace(data, class_names=())  # it may have only some of them
    split = parallel.in_turn(
        lambda: open_split(split_name, json_path, images_path, cache=cache, data=data)
    )
    unknown = [
        f"{category.id} {category.name!r} (there {run.class_names.get(category.id)!r})"
        for category in split.dataset.categories
        if (category.id, category.name) not in run.meta.categories
    ]
    if unknown:
        more = ", ..." if len(unknown) > 3 else ""
        raise ConfigError(
            f"{json_path}: categories that the run does not have: {', '.join(unknown[:3])}{more}"
        )
    return split


def make_folder(*folders: Path) -> None:
    """Makes folders for results; ConfigError if that is not possible. Call before the work."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be made: {error.strerror}") from None
