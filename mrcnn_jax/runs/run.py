"""A trained run, restored from its folder: config, categories and weights of one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import load_config_json
from mrcnn_jax.config.schema import Config, Loss
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
    def has_average(self) -> bool:
        """Whether the checkpoint holds a moving average of its weights."""
        return bool(self.config.stages) and self.config.stages[self.meta.stage_index].ema_decay > 0

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
        checkpoint: the newest whole one, or the one of the best mask AP
            (`Config.evaluate_every_epochs`).
        weights: the parameters themselves, or with their moving average (`StageConfig.ema_decay`)
            where the checkpoint's stage trains.

    Raises:
        ConfigError: the folder holds no config, no such checkpoint or weights, or (imported) no
            more than a backbone.
    """
    config = load_config_json(workdir / "config.json")
    checkpoints = Checkpoints(workdir, keep=1)
    meta = checkpoints.latest() if checkpoint == "newest" else checkpoints.best()
    if meta is None:
        what = (
            "no checkpoint yet"
            if checkpoint == "newest"
            else "no checkpoint whose mask AP was measured (--evaluate-every-epochs)"
        )
        raise ConfigError(f"{workdir}: holds {what}")
    params, batch_stats = checkpoints.restore_params(meta, weights)
    if set(params) == {"resnet"}:
        raise ConfigError(
            f"{workdir}: holds only a backbone, to train a detector from: train.py --init-from {workdir}"
        )
    return Run(config, meta, {"params": params, "batch_stats": batch_stats}, weights)


def make_folder(folder: Path) -> None:
    """For results; ConfigError if that is not possible, best asked before the work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror}") from None
