"""The initial weights of a run: random, a pretrained ResNet, or the parameters of another run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from flax.traverse_util import flatten_dict, unflatten_dict

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import differences, load_config_json
from mrcnn_jax.config.schema import Config
from mrcnn_jax.models.mask_rcnn import Variables
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.runs.finite import refuse_not_finite
from mrcnn_jax.weights.backbone import load_resnet

# Leaves with one output per class.
_CLASSES = re.compile(r"params/(box_head/(logits|deltas)|mask_head/(points/)?logits)/(kernel|bias)")
# Fields that change the meaning of the same parameters.
_MEANING = (
    "model.pixel_mean",
    "model.pixel_std",
    "model.resnet.stride_in_1x1",
    "model.resnet.norm_epsilon",
)


def initial_variables(
    shapes: Variables, config: Config, class_names: Sequence[str] = ()
) -> Variables:
    """Reads the part of the variables that `config.init_from` holds, and prints what was loaded.

    Args:
        shapes: all variables of the network, arrays or `jax.ShapeDtypeStruct`.
        config: of the new run.
        class_names: of labels 1..K of the new run, compared with those of the run to start from.

    Raises:
        ConfigError: a file of another kind, or a tensor of another shape (named).
    """
    if config.init_from is None:
        return {}
    source = Path(config.init_from)
    if source.is_dir():
        return _from_run(shapes, config, source, class_names)
    return _from_file(shapes, config, source)


def _from_file(shapes: Variables, config: Config, source: Path) -> Variables:
    """A whole ResNet."""
    modules = [module for module in ("resnet", "res5") if module in shapes["params"]]
    kinds = ("params", "batch_stats")
    wanted = {kind: {module: shapes[kind][module] for module in modules} for kind in kinds}
    loaded = load_resnet(source, wanted)
    others = sorted(shapes["params"].keys() - set(modules))
    print(
        f"{source.name}: loaded into {', '.join(modules)} "
        f"({len(flatten_dict(loaded['params']))} tensors); {', '.join(others)}: random"
    )
    if config.model.resnet.stride_in_1x1:
        print(
            f"warning: {source.name}: torchvision's ResNets have their stride in the 3x3, "
            "this model in the 1x1"
        )
    return loaded


def _from_run(
    shapes: Variables, config: Config, run: Path, class_names: Sequence[str]
) -> Variables:
    """Every variable of the same path, without the outputs per class if the config says so.

    A path that only one of the two has is listed; another shape is an error.
    """
    checkpoints = Checkpoints(run, keep=1)
    meta = checkpoints.latest()
    if meta is None:
        raise ConfigError(f"init_from: {run}: holds no checkpoint")
    source = flatten_dict(checkpoints.restore_weights(meta)["raw"], sep="/")
    refuse_not_finite(source, f"init_from: {run}: checkpoint {meta.name}")
    target = flatten_dict(shapes, sep="/")
    # The same blocks have another name in a C4 network.
    names = "/resnet/layer4/", "/res5/"
    theirs, ours = names if "res5" in shapes["params"] else names[::-1]
    source = {path.replace(theirs, ours): leaf for path, leaf in source.items()}
    left_out = sorted(filter(_CLASSES.fullmatch, source)) if config.init_without_classes else []
    source = {path: leaf for path, leaf in source.items() if path not in left_out}
    loaded = {path: source[path] for path in target if path in source}
    sizes = {path: (leaf.shape, target[path].shape) for path, leaf in loaded.items()}
    differing = {path: pair for path, pair in sizes.items() if pair[0] != pair[1]}
    if differing:
        if all(_CLASSES.fullmatch(path) and a[:-1] == b[:-1] for path, (a, b) in differing.items()):
            raise ConfigError(
                f"init_from: {run}: not for {config.model.num_classes} classes: "
                f"{', '.join(differing)} (--init-without-classes starts these from random weights)"
            )
        first = ", ".join(f"{path} {a} -> {b}" for path, (a, b) in list(differing.items())[:3])
        raise ConfigError(f"init_from: {run}: {len(differing)} shapes differ: {first}")
    lists = {
        "random": sorted(target.keys() - source.keys() - set(left_out)),
        "left out, as asked for": left_out,
        "not used": sorted(source.keys() - target.keys()),
    }
    rest = "".join(f"; {what}: {', '.join(paths)}" for what, paths in lists.items() if paths)
    print(f"{run}: {len(loaded)} of {len(target)} tensors loaded{rest}")
    saved = checkpoints.config(meta) or load_config_json(run / "config.json")
    lines = differences(saved, config)
    changed = [line for line in lines if line.split(":")[0] in _MEANING]
    if changed:
        print(f"warning: {run} was trained with other constants: {'; '.join(changed)}")
    if any(map(_CLASSES.fullmatch, loaded)):
        _warn_of_other_classes(run, [name for _, name in meta.categories], class_names)
    return unflatten_dict(loaded, sep="/")


def _warn_of_other_classes(run: Path, theirs: Sequence[str], ours: Sequence[str]) -> None:
    """Prints which labels have another name than in the run whose outputs per class were loaded."""
    pairs = enumerate(zip(theirs, ours, strict=False), start=1)
    changed = [f"{label} {a!r} -> {b!r}" for label, (a, b) in pairs if a != b]
    if changed:
        order = "in another order" if sorted(theirs) == sorted(ours) else "of other names"
        more = f", ... ({len(changed)} in all)" if len(changed) > 3 else ""
        print(
            f"warning: {run} was trained on classes {order}, label by label: "
            f"{', '.join(changed[:3])}{more}; each keeps the weights of its label "
            "(--init-without-classes starts them from random weights)"
        )
