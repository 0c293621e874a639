"""What a new run starts from: random weights, a pretrained ResNet, or the parameters of another run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mrcnn_jax.config import Config, ConfigError
from mrcnn_jax.models.mask_rcnn import Variables
from mrcnn_jax.training.checkpoints import Checkpoints
from mrcnn_jax.weights.torchvision_resnet import load_resnet


def initial_variables(variables: Variables, config: Config) -> Variables:
    """`variables` with what `config.init_from` holds put in its place, and a line that says what was loaded and what was not.

    Raises:
        ConfigError: a file of another kind, or a tensor of another shape (named).
    """
    if config.init_from is None:
        return variables
    source = Path(config.init_from)
    if source.is_dir():
        return _from_run(variables, source)
    loaded = load_resnet(source, {kind: variables[kind]["resnet"] for kind in ("params", "batch_stats")})
    print(f"{source.name}: loaded into resnet ({len(flatten_dict(loaded['params']))} tensors); fpn, rpn, box_head, mask_head: random")
    return {kind: tree | ({"resnet": loaded[kind]} if kind in loaded else {}) for kind, tree in variables.items()}


def _from_run(variables: Variables, run: Path) -> Variables:
    """Every parameter of the same path; another shape is an error, a missing one stays random and is listed."""
    checkpoints = Checkpoints(run, keep=1)
    meta = checkpoints.latest()
    if meta is None:
        raise ConfigError(f"init_from: {run}: holds no checkpoint")
    source = flatten_dict(dict(zip(("params", "batch_stats"), checkpoints.restore_params(meta), strict=True)), sep="/")
    target = flatten_dict(variables, sep="/")
    differing = [path for path in target if path in source and np.shape(source[path]) != np.shape(target[path])]
    if differing:
        shapes = ", ".join(f"{path} {np.shape(source[path])} -> {np.shape(target[path])}" for path in differing[:3])
        raise ConfigError(f"init_from: {run}: {len(differing)} shapes differ: {shapes}")
    missing = sorted(path for path in target if path not in source)
    print(f"{run}: {len(target) - len(missing)} of {len(target)} tensors loaded" + (f"; random: {', '.join(missing)}" if missing else ""))
    return unflatten_dict({path: source.get(path, value) for path, value in target.items()}, sep="/")
