"""A run as a folder: its config, and the categories and weights of one checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import load_config_json, save_config
from mrcnn_jax.config.schema import Config, Loss
from mrcnn_jax.models.mask_rcnn import MODULES_OF, Variables
from mrcnn_jax.runs.checkpoints import Checkpoints, Meta, Weights
from mrcnn_jax.runs.state import TrainState

Choice = Literal["newest", "best"]


@dataclass(frozen=True)
class Run:
    """Config, categories and weights of one checkpoint of a run."""

    config: Config
    meta: Meta
    variables: Variables
    weights: Weights = "raw"
    """"ema": in `variables` the moving average replaces the parameters that it averages."""

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
        """Heads that are no longer random: those of the stages begun, and those these need.

        An imported network has no stages, and all heads.
        """
        if not self.config.stages:
            return frozenset(MODULES_OF)
        begun = self.config.stages[: self.meta.stage_index + (self.meta.stage_step > 0)]
        modules = set().union(*(MODULES_OF[loss] for stage in begun for loss in stage.losses))
        return frozenset(loss for loss, needed in MODULES_OF.items() if needed <= modules)


def load_run(workdir: Path, checkpoint: Choice = "newest", weights: Weights = "raw") -> Run:
    """Load a run from its folder.

    Args:
        workdir: the run's folder.
        checkpoint: the newest intact one, or the one of the best mask AP
            (`Config.evaluate_every_epochs`).
        weights: the parameters themselves ("raw"), or with the moving average of those that the
            checkpoint's stage trains ("ema", `StageConfig.ema_decay`).

    Raises:
        ConfigError: the folder holds no config, no such checkpoint or weights, or (imported) no
            more than a backbone.
    """
    config = load_config_json(workdir / "config.json")
    checkpoints = Checkpoints(workdir, keep=1)
    meta = checkpoints.latest() if checkpoint == "newest" else checkpoints.best()
    if meta is None and checkpoint == "newest":
        raise ConfigError(f"{workdir}: holds no checkpoint yet")
    if meta is None:
        raise ConfigError(
            f"{workdir}: holds no checkpoint whose mask AP was measured (--evaluate-every-epochs)"
        )
    params, batch_stats = checkpoints.restore_params(meta, weights)
    if set(params) == {"resnet"}:
        raise ConfigError(
            f"{workdir}: holds only a backbone, to train a detector from: "
            f"train.py --init-from {workdir}"
        )
    return Run(config, meta, {"params": params, "batch_stats": batch_stats}, weights)


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
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            run = Path(folder) / "run"
            Checkpoints(run, keep=1).save(state, meta, config)
            save_config(config, run / "config.json")
            for name, text in (texts or {}).items():
                (run / name).write_text(text, encoding="utf-8")
            run.replace(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None


def refuse_taken(out: Path) -> None:
    """Raise ConfigError if `out` exists and is not an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not an empty folder (choose another --out)")


def make_folder(folder: Path) -> None:
    """Create a folder for results, best before the work is done.

    Raises:
        ConfigError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be created: {error.strerror}") from None
