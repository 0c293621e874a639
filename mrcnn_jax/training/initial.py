"""The initial weights of a run: random, a trunk or Mask R-CNN from a file, or those of a run."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import Config
from mrcnn_jax.models.mask_rcnn import Variables
from mrcnn_jax.output import listed
from mrcnn_jax.structures import Params
from mrcnn_jax.training.stages import loaded_modules, trained
from mrcnn_jax.weights.origin import Origin, open_origin
from mrcnn_jax.weights.published import PUBLISHED

# Leaves with one output per class, and those that have it unless boxes or masks are class-agnostic.
_CLASSES = r"params/box_head[23]?/logits/(kernel|bias)"
_BOXES = r"params/box_head[23]?/deltas/(kernel|bias)"
_MASKS = r"params/(mask_head/(points/)?logits|mask_iou_head/ious)/(kernel|bias)"
_MASK_LOGITS = "mask_head/logits/kernel"
_SIZES = {
    "mask_iou_head": ("channels", "convs", "fcs", "hidden"),
    "depth_head": ("channels",),
    "mask_head": ("refine.channels",),
}
"""Fields of modules that decide shapes, and that weights do not fix (`weights.choice`)."""
# Fields that change the meaning of the same parameters: of the trunk's, and of others.
_MEANING = (
    "model.pixel_mean",
    "model.pixel_std",
    "model.resnet.norm_epsilon",
    "model.resnet.stride_in_1x1",
)
_MEANING_OF = {
    "params/rpn/deltas/kernel": "model.rpn.box_weights",
    "params/box_head/deltas/kernel": "model.box_head.box_weights",
    "params/box_head2/deltas/kernel": "model.box_head.cascade_box_weights",
}


class Initial(NamedTuple):
    """What a run begins with that is not random."""

    variables: Variables
    """What was loaded."""
    modules: frozenset[str]
    """Modules of which all parameters were loaded, and were not random there."""
    params: Params
    """The parameters among `variables` that were not random there."""


def initial_variables(
    shapes: Variables, config: Config, class_names: Sequence[str] = ()
) -> Initial:
    """Reads the part of the variables that `config.init_from` holds, and prints what was loaded.

    Every variable of the same path is loaded, without the outputs per class if the config says so,
    and without those of boxes or masks if one of the two has them per class and the other one for
    all classes. A path that only one of the two has is listed; another shape is an error.

    Args:
        shapes: all variables of the network, arrays or `jax.ShapeDtypeStruct`.
        config: of the new run.
        class_names: of labels 1..K of the new run, compared with those of the weights.

    Raises:
        ConfigError: a file of another kind, another trunk, a tensor of another shape (named), or
            masks that another activation reads and no stage trains.
    """
    if config.init_from is None:
        _tell_of_random_weights(shapes, config)
        return Initial({}, frozenset(), {})
    path = Path(config.init_from)
    origin = open_origin(path)
    _refuse_other_trunk(path, origin.model, config.model)
    target, source = flatten_dict(shapes, sep="/"), origin.load()
    untrained = frozenset[str]()
    if origin.learnt is not None:
        untrained = frozenset(name.split("/")[1] for name in source) - origin.learnt
    if untrained:
        print(f"{path}: not trained there, so in part random: {', '.join(sorted(untrained))}")
    # The same blocks have another name in a C4 network.
    names = "/resnet/layer4/", "/res5/"
    theirs, ours = names if "res5" in shapes["params"] else names[::-1]
    source = {path.replace(theirs, ours): leaf for path, leaf in source.items()}
    if "res5" in untrained and "res5" not in shapes["params"]:
        untrained |= {"resnet"}  # a part of which its blocks are here
    per_class = _per_class(config)
    left_out = _left_out(source, origin, config)
    source = {path: leaf for path, leaf in source.items() if path not in left_out}
    loaded = {path: source[path] for path in target if path in source}
    _refuse_other_shapes(loaded, target, origin.model, config)
    if origin.has_heads:
        lists = {
            "random": sorted(target.keys() - source.keys() - set(left_out)),
            "left out": left_out,
            "not used": sorted(source.keys() - target.keys()),
        }
        rest = "".join(f"; {what}: {', '.join(paths)}" for what, paths in lists.items() if paths)
        print(f"{path}: {len(loaded)} of {len(target)} tensors loaded{rest}")
    else:
        modules = [name for name in (config.model.trunk, "res5") if name in shapes["params"]]
        others = ", ".join(sorted(shapes["params"].keys() - set(modules)))
        print(
            f"{path.name}: loaded into {', '.join(modules)} "
            f"({sum(path.startswith('params/') for path in loaded)} tensors); {others}: random"
        )
    _warn_of_other_constants(path, origin, config, loaded)
    if f"params/{_MASK_LOGITS}" in loaded and "mask_head" not in untrained:
        _refuse_other_masks(path, origin.model, config)
    if any(map(per_class.fullmatch, loaded)):
        _warn_of_other_classes(path, origin.class_names, class_names)
    variables = unflatten_dict(loaded, sep="/")
    params = variables.get("params", {})
    return Initial(
        variables,
        loaded_modules(shapes["params"], params) - untrained,
        {name: leaves for name, leaves in params.items() if name not in untrained},
    )


def _refuse_other_trunk(path: Path, theirs: ModelConfig, ours: ModelConfig) -> None:
    if theirs.trunk != ours.trunk:
        raise ConfigError(
            f"init_from: {path}: has a {theirs.trunk_name}, but model.trunk is {ours.trunk}: it "
            f"needs a config with {theirs.trunk}"
        )
    if theirs.trunk == "convnext":
        for name in ("blocks", "channels"):
            there, here = (getattr(model.convnext, name) for model in (theirs, ours))
            if there != here:
                fits = " ".join(map(str, there))
                raise ConfigError(
                    f"init_from: {path}: has a ConvNeXt of {name} {fits}, but model.convnext.{name}"
                    f" is {' '.join(map(str, here))}: --model.convnext.{name} {fits} fits it"
                )
    elif theirs.resnet.depth != ours.resnet.depth:
        raise ConfigError(
            f"init_from: {path}: has a ResNet-{theirs.resnet.depth}, but model.resnet.depth "
            f"is {ours.resnet.depth}: --model.resnet.depth {theirs.resnet.depth} fits it"
        )


def _per_class(config: Config) -> re.Pattern[str]:
    """The leaves of a run that have an output per class."""
    boxes = () if config.model.box_head.class_agnostic else (_BOXES,)
    masks = () if config.model.mask_head.class_agnostic else (_MASKS,)
    return re.compile("|".join((_CLASSES, *boxes, *masks)))


def _left_out(source: Iterable[str], origin: Origin, config: Config) -> list[str]:
    """The outputs of the weights that are not those of the run, whatever their shapes."""
    patterns = [_per_class(config)] if config.init_without_classes else []
    for head, outputs in (("box_head", _BOXES), ("mask_head", _MASKS)):
        theirs, ours = (getattr(model, head) for model in (origin.model, config.model))
        if theirs.class_agnostic != ours.class_agnostic:
            patterns.append(re.compile(outputs))
    return sorted(path for path in source if any(p.fullmatch(path) for p in patterns))


def _refuse_other_shapes(
    loaded: Mapping[str, np.ndarray], target: Variables, theirs: ModelConfig, config: Config
) -> None:
    sizes = {path: (leaf.shape, target[path].shape) for path, leaf in loaded.items()}
    differing = {path: pair for path, pair in sizes.items() if pair[0] != pair[1]}
    if not differing:
        return
    per_class = _per_class(config)
    if all(per_class.fullmatch(path) and a[:-1] == b[:-1] for path, (a, b) in differing.items()):
        raise ConfigError(
            f"init_from: {config.init_from}: not for {config.model.num_classes} classes: "
            f"{', '.join(differing)} (--init-without-classes starts these from random weights)"
        )
    shapes = listed([f"{path} {a} -> {b}" for path, (a, b) in differing.items()])
    line = f"init_from: {config.init_from}: {len(differing)} shapes differ: {shapes}"
    modules = {path.split("/")[1] for path in differing}
    fields = [f"{module}.{size}" for module in sorted(modules) for size in _SIZES.get(module, ())]
    for name in fields:
        there, here = (attrgetter(name)(model) for model in (theirs, config.model))
        if there != here:
            line += f"; --model.{name.replace('_', '-')} {there} fits it (here {here})"
    raise ConfigError(line)


def _warn_of_other_constants(
    path: Path, origin: Origin, config: Config, loaded: Collection[str]
) -> None:
    names = (*_MEANING, *(field for leaf, field in _MEANING_OF.items() if leaf in loaded))
    pairs = {
        name: (attrgetter(name.removeprefix("model."))(origin.model), attrgetter(name)(config))
        for name in names
    }
    changed = [f"{name}: {a!r} -> {b!r}" for name, (a, b) in pairs.items() if a != b]
    if changed:
        print(f"warning: {path} was trained with other constants: {'; '.join(changed)}")


def _refuse_other_masks(path: Path, theirs: ModelConfig, config: Config) -> None:
    """Softmax over the classes reads other masks from the same outputs than a sigmoid for each."""
    there, here = theirs.mask_head.loss, config.model.mask_head.loss
    if (there == "softmax") == (here == "softmax"):
        return
    line = f"{path} has masks trained by {there}, and model.mask_head.loss is {here}"
    trained = [group.pattern for stage in config.stages for group in stage.train]
    if not any(re.fullmatch(pattern, _MASK_LOGITS) for pattern in trained):
        raise ConfigError(
            f"init_from: {line}: no stage trains them again (--model.mask-head.loss {there})"
        )
    print(f"warning: {line}: they are wrong until they have been trained")


def _warn_of_other_classes(path: Path, theirs: Sequence[str], ours: Sequence[str]) -> None:
    """Prints which labels have another name than in the weights whose outputs were loaded."""
    pairs = enumerate(zip(theirs, ours, strict=False), start=1)
    changed = [f"{label} {a!r} -> {b!r}" for label, (a, b) in pairs if a != b]
    if changed:
        order = "in another order" if sorted(theirs) == sorted(ours) else "of other names"
        print(
            f"warning: {path} was trained on classes {order}, label by label: "
            f"{listed(changed)}; each keeps the weights of its label "
            "(--init-without-classes starts them from random weights)"
        )


def better_start(name: str, what: str = "the ResNet") -> str:
    """A line for users: what starts from random weights, and the published ones to start from."""
    return (
        f"{what} starts from random weights, a poor start on photographs; better: --weights {name} "
        f"--download ({PUBLISHED[name]}; others: docs/weights.md)"
    )


def _tell_of_random_weights(shapes: Variables, config: Config) -> None:
    """Prints which weights to start from, unless the config means to start from random ones.

    It does if its ResNet has live batch norm, all of which a stage trains.
    """
    model = config.model
    if model.trunk == "convnext":
        print(better_start("torchvision-convnext-tiny", "the ConvNeXt"))
        return
    whole = flatten_dict(shapes["params"]["resnet"]).keys()
    if model.live_norm and any(
        flatten_dict(trained(stage, shapes["params"]).get("resnet", {})).keys() == whole
        for stage in config.stages
    ):
        return
    name = f"torchvision-resnet{model.resnet.depth}"
    if (model.backbone, model.resnet.depth) == ("fpn", 50):
        name = "torchvision-coco-v1"
    elif name not in PUBLISHED:
        name = "torchvision-resnet18"
    print(better_start(name))
