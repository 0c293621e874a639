"""What a new run starts from: random weights, a pretrained ResNet, or the parameters of another run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mrcnn_jax.config import Config, ConfigError
from mrcnn_jax.models.mask_rcnn import Variables
from mrcnn_jax.training.checkpoints import Checkpoints
from mrcnn_jax.weights.torchvision_resnet import load_resnet


def initial_variables(shapes: Variables, config: Config) -> Variables:
    """The part of the variables that `config.init_from` holds, and a line that says what was loaded and what was not.

    Args:
        shapes: all variables of the network, arrays or `jax.ShapeDtypeStruct`.

    Raises:
        ConfigError: a file of another kind, or a tensor of another shape (named).
    """
    if config.init_from is None:
        return {}
    source = Path(config.init_from)
    if source.is_dir():
        return _from_run(shapes, source)
    loaded = load_resnet(source, {kind: shapes[kind]["resnet"] for kind in ("params", "batch_stats")})
    print(f"{source.name}: loaded into resnet ({len(flatten_dict(loaded['params']))} tensors); fpn, rpn, box_head, mask_head: random")
    return {kind: {"resnet": tree} for kind, tree in loaded.items()}


def _from_run(shapes: Variables, run: Path) -> Variables:
    """Every parameter of the same path; another shape is an error, one that only one of the two has is listed."""
    checkpoints = Checkpoints(run, keep=1)
    meta = checkpoints.latest()
    if meta is None:
        raise ConfigError(f"init_from: {run}: holds no checkpoint")
    source = flatten_dict(dict(zip(("params", "batch_stats"), checkpoints.restore_params(meta), strict=True)), sep="/")
    target = flatten_dict(shapes, sep="/")
    differing = [path for path in target if path in source and np.shape(source[path]) != np.shape(target[path])]
    if differing:
        first = ", ".join(f"{path} {np.shape(source[path])} -> {np.shape(target[path])}" for path in differing[:3])
        raise ConfigError(f"init_from: {run}: {len(differing)} shapes differ: {first}")
    loaded = {path: source[path] for path in target if path in source}
    lists = {"random": sorted(target.keys() - source.keys()), "not used": sorted(source.keys() - target.keys())}
    rest = "".join(f"; {what}: {', '.join(paths)}" for what, paths in lists.items() if paths)
    print(f"{run}: {len(loaded)} of {len(target)} tensors loaded{rest}")
    return unflatten_dict(loaded, sep="/")
