"""Options that several commands share."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import differences, resolve_paths
from mrcnn_jax.config.optional_heads import following_heads
from mrcnn_jax.config.schema import Config

if TYPE_CHECKING:
    from mrcnn_jax.runs.run import Run


def fields_given(words: Iterable[str]) -> frozenset[str]:
    """Dotted names of the fields among the options of a command line.

    --model.roi.no-aligned is of the same field as --model.roi.aligned.
    """
    names = (word[2:].partition("=")[0] for word in words if word.startswith("--"))
    return frozenset(re.sub(r"(^|\.)no_", r"\1", name.replace("-", "_")) for name in names)


def with_heads(config: Config) -> tuple[Config, tuple[str, ...]]:
    """The config whose table has all heads of its network, and a line if some were added."""
    followed = following_heads(config)
    if followed == config:
        return config, ()
    rows = ", ".join(f"{row.name} ({' '.join(row.losses)})" for row in followed.stages)
    return followed, (f"stages: {rows}, with the heads of the network",)


@dataclass(frozen=True, kw_only=True)
class FromWeights:
    weights: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Of a new run: weights to start from, which set depth, batch norm and other constants of the
    config: a run's folder, a file of torchvision, detectron2, mmdetection, timm or MoCo, for
    example, the name of published ones, such as torchvision-coco-v1, or hf://org/name, a model of
    mrcnn_jax on the Hugging Face Hub."""
    download: bool = False
    """Fetch the published weights that --weights names, unless that was done before."""

    def refuse_contradiction(self, given: frozenset[str]) -> None:
        """Raises ConfigError if the options do not go together.

        Args:
            given: as of `fields_given`.
        """
        if self.download and self.weights is None:
            raise ConfigError("--download: needs --weights with the name of published ones")
        if self.weights is not None and "init_from" in given:
            raise ConfigError("--weights: not with --init-from, which it sets")


@dataclass(frozen=True, kw_only=True)
class OfCheckpoint:
    workdir: Path
    """The run's folder."""
    checkpoint: Literal["newest", "best"] = "newest"
    """best: the one with the highest mask AP (box AP where no object has a mask), of a run with
    --evaluate-every-epochs."""


@dataclass(frozen=True, kw_only=True)
class OfWeights(OfCheckpoint):
    weights: Literal["raw", "ema"] = "raw"
    """ema: their moving average, of a run with ema_decay."""


def with_batch(run: Run, size: int | None) -> Run:
    """The run with another data.eval_batch_size; None: its own."""
    if size is None:
        return run
    data = replace(run.config.data, eval_batch_size=size)
    return replace(run, config=replace(run.config, data=data))


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run's folder has a checkpoint."""
    return any(workdir.glob("checkpoints/[!.]*"))


def next_workdir(workdir: Path) -> Path:
    """The folder for a run that starts from another one: its name and the first number that is
    free, `runs/a_2`."""
    base = workdir if workdir.name else workdir.resolve()
    folders = (Path(f"{base}_{i}") for i in itertools.count(2))
    return next(folder for folder in folders if not folder.exists())


def longer(saved: Config, config: Config, workdir: Path) -> str:
    """The command that trains a finished run of one stage on, where a config asks for nothing else;
    "" if it asks for something else.

    Args:
        saved: of the run.
        config: with another length.
        workdir: of the run.
    """
    if not 0 < len(saved.stages) == len(config.stages):
        return ""
    from mrcnn_jax.runs.checkpoints import Checkpoints

    (*_, before), (*others, last) = saved.stages, config.stages
    meta = Checkpoints(workdir, keep=1).latest()
    if meta is None or not meta.stage_complete or (meta.stage, len(others)) != (before.name, 0):
        return ""
    same = replace(config, stages=(*others, replace(last, epochs=before.epochs)))
    if last.epochs <= before.epochs or differences(saved, resolve_paths(same, needs_start=False)):
        return ""
    command = cli.command("train", "--resume", workdir, "--epochs", f"{last.epochs:g}")
    return f"; to train it longer: {command}"


@dataclass(frozen=True, kw_only=True)
class WithCard(OfWeights):
    weights_licence: str | None = None
    """Licence of the weights that the run started from, for the model card; by default the card
    says that it is not stated."""
