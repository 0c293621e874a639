"""Weights to start a run from: the folder of another run, or another project's file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import load_config_json
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import Config, Shrink
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.runs.finite import refuse_not_finite
from mrcnn_jax.runs.hub_folder import is_hub_folder
from mrcnn_jax.runs.meta import Meta
from mrcnn_jax.runs.run import learnt_modules, load_run
from mrcnn_jax.weights.network import read_network, unnamed
from mrcnn_jax.weights.tensors import SUFFIXES


@dataclass(frozen=True)
class Origin:
    """What is known of weights before they are loaded."""

    title: str
    """What they are, "maskrcnn_resnet50_fpn (torchvision)" for example."""
    model: ModelConfig
    """The network that they are of; of a ResNet or ConvNeXt alone only its part of it."""
    has_heads: bool
    """Whether they are of more than a ResNet or ConvNeXt."""
    shrink: Shrink
    """How images were made smaller for the whole network; of a ResNet alone it says nothing."""
    class_names: tuple[str, ...]
    """Of labels 1..K; () if they are unknown, or there are no heads."""
    presumed: frozenset[str]
    """Dotted names of the fields that neither a config nor the weights' shapes state."""
    load: Callable[[], Mapping[str, np.ndarray]]
    """Reads all variables, "params/resnet/stem/kernel" for example; ConfigError if one is missing,
    of another shape or not finite."""
    learnt: frozenset[str] | None = None
    """Modules that are not random there, since they were trained or loaded; None: all, or the run
    does not say."""


def open_origin(path: Path) -> Origin:
    """Reads what weights are of.

    Args:
        path: the folder of a run, a model in the Hub's layout, or a file of one of
            `families.FAMILIES`.

    Raises:
        ConfigError: a folder without a checkpoint, one as of `load_run`, or a file as of
            `network.read_network`.
    """
    if is_hub_folder(path):
        return _of_hub_folder(path)
    return _of_run(path) if path.is_dir() else _of_file(path)


def _of_hub_folder(folder: Path) -> Origin:
    run = load_run(folder)
    title = f"checkpoint {run.meta.name} of a run of {run.config.name} ({run.source})"
    return _of_checkpoint(title, run.config, run.meta, lambda: flatten_dict(run.variables, sep="/"))


def _of_file(path: Path) -> Origin:
    network = read_network(path)
    # Two files with the same tensors may be trained with different ones: torchvision's networks
    # with epsilon 0 or 1e-5, ResNets with other pixels, any on images made smaller elsewhere.
    presumed = {"model.resnet.norm_epsilon", "data.shrink"}
    if not network.has_heads:
        presumed |= {"model.resnet.stride_in_1x1"}
        if not network.pixels_stated:
            presumed |= {"model.pixel_mean", "model.pixel_std"}
    return Origin(
        network.title,
        network.model,
        network.has_heads,
        network.family.shrink,
        tuple(name for _, name in network.categories),
        frozenset(presumed),
        lambda: flatten_dict(network.variables(), sep="/"),
    )


def _of_run(run: Path) -> Origin:
    checkpoints = Checkpoints(run, keep=1)
    meta = checkpoints.latest()
    if meta is None:
        files = sorted(path.name for path in run.iterdir() if path.name.endswith(SUFFIXES))
        hint = f" (to start from a file in it, name the file: {run / files[0]})" if files else ""
        raise ConfigError(f"{run}: holds no checkpoint{hint}")

    def load() -> dict[str, np.ndarray]:
        leaves = flatten_dict(checkpoints.restore_weights(meta)["raw"], sep="/")
        refuse_not_finite(leaves, f"{run}: checkpoint {meta.name}")
        return leaves

    config = checkpoints.config(meta) or load_config_json(run / "config.json")
    title = f"checkpoint {meta.name} of a run of {config.name}"
    return _of_checkpoint(title, config, meta, load)


def _of_checkpoint(
    title: str, config: Config, meta: Meta, load: Callable[[], Mapping[str, np.ndarray]]
) -> Origin:
    named = meta.categories != unnamed(len(meta.categories))
    return Origin(
        title,
        config.model,
        len(meta.categories) > 0,  # an imported ResNet or ConvNeXt has none
        config.data.shrink,
        tuple(name for _, name in meta.categories) if named else (),
        frozenset(),
        load,
        None if meta.loaded is None else learnt_modules(config, meta),
    )
