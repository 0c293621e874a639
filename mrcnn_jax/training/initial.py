"""What a new run starts from: random weights, a pretrained ResNet, or the parameters of another
run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import differences, load_config_json
from mrcnn_jax.config.schema import Config
from mrcnn_jax.models.mask_rcnn import Variables
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.weights.backbone import load_resnet

# Leaves with an output a class.
_CLASSES = re.compile(r"params/(box_head/(logits|deltas)|mask_head/(points/)?logits)/(kernel|bias)")
# Fields by which the same parameters mean something else.
_MEANING = (
    "model.pixel_mean",
    "model.pixel_std",
    "model.resnet.stride_in_1x1",
    "model.resnet.norm_epsilon",
)


def initial_variables(shapes: Variables, config: Config) -> Variables:
    """The part of the variables that `config.init_from` holds, and a line that says what was loaded
    and what was not.

    Args:
        shapes: all variables of the network, arrays or `jax.ShapeDtypeStruct`.

    Raises:
        ConfigError: a file of another kind, or a tensor of another shape (named).
    """
    if config.init_from is None:
        return {}
    source = Path(config.init_from)
    return (
        _from_run(shapes, config, source) if source.is_dir() else _from_file(shapes, config, source)
    )


def _from_file(shapes: Variables, config: Config, source: Path) -> Variables:
    """A ResNet, all of it."""
    modules = [module for module in ("resnet", "res5") if module in shapes["params"]]
    loaded = load_resnet(
        source,
        {
            kind: {module: shapes[kind][module] for module in modules}
            for kind in ("params", "batch_stats")
        },
    )
    others = sorted(shapes["params"].keys() - set(modules))
    print(
        f"{source.name}: loaded into {', '.join(modules)} ({len(flatten_dict(loaded['params']))} tensors); {', '.join(others)}: random"
    )
    if config.model.resnet.stride_in_1x1:
        print(
            f"warning: {source.name}: torchvision's ResNets have their stride in the 3x3, this model in the 1x1"
        )
    return loaded


def _from_run(shapes: Variables, config: Config, run: Path) -> Variables:
    """Every parameter of the same path, without the outputs per class if the config says so.

    One that only one of the two has is listed; another shape is an error.
    """
    checkpoints = Checkpoints(run, keep=1)
    meta = checkpoints.latest()
    if meta is None:
        raise ConfigError(f"init_from: {run}: holds no checkpoint")
    source = flatten_dict(
        dict(zip(("params", "batch_stats"), checkpoints.restore_params(meta), strict=True)), sep="/"
    )
    target = flatten_dict(shapes, sep="/")
    # The same blocks have another name in a C4 network.
    theirs, ours = (
        ("/resnet/layer4/", "/res5/")
        if "res5" in shapes["params"]
        else ("/res5/", "/resnet/layer4/")
    )
    source = {path.replace(theirs, ours): leaf for path, leaf in source.items()}
    left_out = (
        sorted(path for path in source if _CLASSES.fullmatch(path))
        if config.init_without_classes
        else []
    )
    source = {path: leaf for path, leaf in source.items() if path not in left_out}
    differing = [
        path
        for path in target
        if path in source and np.shape(source[path]) != np.shape(target[path])
    ]
    if differing:
        if all(
            _CLASSES.fullmatch(path) and np.shape(source[path])[:-1] == np.shape(target[path])[:-1]
            for path in differing
        ):
            what = f"not for {config.model.num_classes} classes: {', '.join(differing)}"
            raise ConfigError(
                f"init_from: {run}: {what} (--init-without-classes starts these from random weights)"
            )
        first = ", ".join(
            f"{path} {np.shape(source[path])} -> {np.shape(target[path])}" for path in differing[:3]
        )
        raise ConfigError(f"init_from: {run}: {len(differing)} shapes differ: {first}")
    loaded = {path: source[path] for path in target if path in source}
    lists = {
        "random": sorted(target.keys() - source.keys() - set(left_out)),
        "left out, as asked for": left_out,
        "not used": sorted(source.keys() - target.keys()),
    }
    rest = "".join(f"; {what}: {', '.join(paths)}" for what, paths in lists.items() if paths)
    print(f"{run}: {len(loaded)} of {len(target)} tensors loaded{rest}")
    changed = [
        line
        for line in differences(load_config_json(run / "config.json"), config)
        if line.split(":")[0] in _MEANING
    ]
    if changed:
        print(f"warning: {run} was trained with other constants: {'; '.join(changed)}")
    return unflatten_dict(loaded, sep="/")
