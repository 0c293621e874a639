"""A start in a folder that holds a run, which must be that run: its config, classes and logs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import config_hash, differences, load_config_json
from mrcnn_jax.config.schema import Config
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.output import listed
from mrcnn_jax.runs.logs import METRICS
from mrcnn_jax.runs.meta import Meta
from mrcnn_jax.runs.metrics import Row, read_metrics
from mrcnn_jax.training.splits import categories_of


class AnotherConfig(ConfigError):
    """The folder holds a run whose config differs in what may not change."""


def refuse_another_config(config: Config, workdir: Path) -> None:
    """Raises AnotherConfig if `workdir` holds a run of another config."""
    path = workdir / "config.json"
    if path.exists():
        _refuse_differences(path, config, f"{workdir}: holds a run of another config")


def _refuse_differences(path: Path, config: Config, text: str) -> None:
    changed = differences(load_config_json(path), config)
    if changed:
        raise AnotherConfig(f"{text}: {listed(changed, separator='; ')} (choose another --workdir)")


def refuse_another_run(config: Config, workdir: Path, dataset: CocoDataset, meta: Meta) -> None:
    """Raises ConfigError if a checkpoint is of another config, or of other categories."""
    # A version of this project with one more field has another hash for the same config: the
    # checkpoint's own copy decides.
    if meta.config_hash != config_hash(config):
        text = f"{workdir}: checkpoint {meta.name} is of another config"
        _refuse_differences(workdir / "checkpoints" / meta.name / "config.json", config, text)
    categories = categories_of(dataset)
    if meta.categories != categories:
        raise ConfigError(
            f"{config.data.train_annotations}: categories {categories}, but the run began with "
            f"{meta.categories}: bring them back, or begin a new run with its weights (--weights "
            f"{workdir}, another --workdir)"
        )


def refuse_lost_checkpoints(config: Config, workdir: Path) -> None:
    """Raises ConfigError if a run without checkpoints has rows that are newer than its first one.

    Its folder was copied without them, and a new run would remove the rows.
    """
    if not (workdir / "config.json").exists() or not (workdir / METRICS).exists():
        return
    first, every = config.stages[0], load_config_json(workdir / "config.json").save_every_steps

    def is_later(row: Row) -> bool:
        # A stage is saved at its end, before it is validated.
        ends = row["split"] == "val" and row["epoch"] >= first.epochs
        return row["stage"] != first.name or row["step"] > every or ends

    rows = read_metrics(workdir)
    if any(map(is_later, rows)):
        row = rows[-1]
        raise ConfigError(
            f"{workdir}: holds metrics up to stage {row['stage']}, step {row['step']}, but no "
            "checkpoint: copy its checkpoints too, or choose another --workdir"
        )


def annotation_hashes(
    data_sets: Mapping[str, CocoDataset], resumed_from: Meta | None
) -> dict[str, str]:
    """The hashes of annotation files as they were read; says which differ from those of the newest
    checkpoint."""
    hashes = {}
    for split, data_set in data_sets.items():
        path = data_set.annotations_path
        hashes[split] = data_set.annotations_sha256[:16]
        if resumed_from and resumed_from.annotations.get(split, hashes[split]) != hashes[split]:
            left = "what is left of the training is on" if split == "train" else "it validates on"
            print(f"{path}: changed since {resumed_from.name} was saved: {left} what is there now")
    return hashes
