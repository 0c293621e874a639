"""The recipe that a chosen config is made from: by the device and the weights to start from.

`configs/finetune.py` from imported weights, on a CPU `configs/finetune_cpu.py` from those of a
ResNet alone, and `configs/scratch.py` from random ones. With a ConvNeXt in place of the ResNet they
are the same but for optimiser and layers trained. Fields that a user gives replace theirs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mrcnn_jax.choices.batch import LARGEST
from mrcnn_jax.choices.devices import Device
from mrcnn_jax.config.errors import ConfigError, require
from mrcnn_jax.config.files import load_config_file, with_fields
from mrcnn_jax.config.heads import DepthHeadConfig
from mrcnn_jax.config.model import ModelConfig, Trunk
from mrcnn_jax.config.schema import Config, ParamGroup, Shrink
from mrcnn_jax.config.tables import joint

NAMES: dict[Trunk, str] = {"resnet": "ResNet", "convnext": "ConvNeXt"}
# Fields of a recipe that choices and their reasons are computed from, whatever is given instead.
_KEPT = ("name", "stages.0.optimizer.learning_rate", "stages.0.optimizer.batch_size")
# Networks for which nothing is chosen: the field, its value in others, what to do.
_NOT_CHOSEN = (
    ("model.backbone", "fpn", "write a config (configs/coco300_c4.py is one)"),
    (
        "model.depth_head.kind",
        "none",
        "give a config, --config finetune for example, which gets a stage for it",
    ),
)


@dataclass(frozen=True)
class Start:
    """The run or the file that training starts from."""

    path: str
    """As of `Config.init_from`."""
    model: ModelConfig
    """Its network; without heads its trunk alone counts."""
    class_names: tuple[str, ...] = ()
    """() if they are unknown."""
    shrink: Shrink = "area"
    presumed: Collection[str] = ()
    """As of `Choice.presumed`: fields that options may change."""
    has_heads: bool = True
    """Whether it has a whole network, not only a ResNet or ConvNeXt."""

    def fits(self, class_names: tuple[str, ...]) -> bool:
        """Whether its outputs per class can be those of these classes."""
        if len(class_names) != self.model.num_classes:
            return False
        return self.class_names in ((), class_names)


def recipe_for(device: Device, given: Mapping[str, Any], start: Start | None = None) -> Config:
    """The config that the network, the stage and the augmentation are taken from.

    Args:
        device: what trains.
        given: fields by dotted name, which replace the recipe's. What they rule out of a recipe,
            and nobody asked for, gives way: a cascade, for example, to a box per class.
        start: weights to start from; None: random ones.

    Raises:
        ConfigError: a field is given that no recipe goes with.
    """
    for field, usual, instead in _NOT_CHOSEN:
        require(
            given.get(field, usual) == usual,
            f"{field}: {given.get(field)}: nothing is chosen for such a network: {instead}",
        )
    init_from = None if start is None else start.path
    recipe = replace(_recipe(device, given, start), init_from=init_from)
    (stage,) = recipe.stages
    norm = given.get("model.resnet.norm", recipe.model.resnet.norm)
    if recipe.model.trunk == "resnet" and norm == "live":  # trained as a whole
        everything = load_config_file("scratch").stages[0].train
        table = joint(everything, epochs=stage.epochs, optimizer=stage.optimizer)
        recipe = replace(recipe, stages=table)
    fields = {  # of the data, all but the augmentation follow later
        field: value
        for field, value in given.items()
        if field not in _KEPT and not re.match(r"data\.(?!augment\.)", field)
    }
    recipe = with_fields(recipe, _giving_way(recipe.model, given) | fields)
    optimizer = recipe.stages[0].optimizer
    require(
        optimizer.name == stage.optimizer.name or "stages.0.optimizer.learning_rate" in given,
        f"stages.0.optimizer.name: {optimizer.name}: give --stages.0.optimizer.learning-rate as "
        f"well: the one that would be chosen is for {stage.optimizer.name}",
    )
    other: Trunk = "convnext" if recipe.model.trunk == "resnet" else "resnet"
    for field in given:
        require(
            not field.startswith(f"model.{other}."),
            f"{field}: this network has a {NAMES[recipe.model.trunk]}, no {NAMES[other]}",
        )
    return recipe


def _recipe(device: Device, given: Mapping[str, Any], start: Start | None) -> Config:
    """The recipe before other fields are given, with the network that training starts from."""
    asked = given.get("model.trunk")
    if start is None:
        recipe = load_config_file("scratch")
        return _around_convnext(recipe, device) if asked == "convnext" else recipe
    if asked not in (None, start.model.trunk):
        raise ConfigError(
            f"model.trunk: {asked}, but {start.path} needs a config with {start.model.trunk}"
        )
    if not start.has_heads:
        recipe = load_config_file("finetune_cpu" if device == "cpu" else "finetune")
        return _around(start.model, recipe, device)
    require(
        start.model.backbone == "fpn",
        f"init_from: {start.path}: a C4 network, for which nothing is chosen: write a config "
        "(configs/coco300_c4.py is one)",
    )
    recipe = load_config_file("finetune")
    if start.model.trunk == "convnext":
        recipe = _around_convnext(recipe, device)
    without = replace(start.model.mask_iou_head, enabled=False)
    model = replace(start.model, depth_head=DepthHeadConfig(), mask_iou_head=without)
    return replace(recipe, model=model)


def _giving_way(model: ModelConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Other values of fields that what is given rules out; they do not replace what is given."""
    box, mask = "model.box_head.", "model.mask_head."
    fields: dict[str, Any] = {}
    agnostic = given.get(f"{box}class_agnostic", model.box_head.class_agnostic)
    first = given.get(f"{box}foreground_iou", model.box_head.foreground_iou)
    if given.get(f"{box}cascade"):
        fields[f"{box}class_agnostic"] = True
    elif not agnostic or first >= min(model.box_head.cascade, default=1.0):
        fields[f"{box}cascade"] = ()
    loss = given.get(f"{mask}loss", model.mask_head.loss)
    if loss != "bce":
        fields[f"{mask}soft_targets"] = False
    if loss == "softmax":
        fields[f"{mask}class_agnostic"] = False
    return fields


def _around(trunk: ModelConfig, recipe: Config, device: Device) -> Config:
    """`recipe` with a trunk of the same sizes."""
    if trunk.trunk == "convnext":
        recipe = _around_convnext(recipe, device)
    model, resnet, convnext = recipe.model, trunk.resnet, trunk.convnext
    return replace(
        recipe,
        model=replace(
            model,
            resnet=replace(model.resnet, depth=resnet.depth, width=resnet.width),
            convnext=replace(model.convnext, blocks=convnext.blocks, channels=convnext.channels),
        ),
    )


def _around_convnext(recipe: Config, device: Device) -> Config:
    """`recipe` with a ConvNeXt, by AdamW as in configs/convnext.py where it has SGD.

    The same of its stages are trained, with all their norms; without weights everything.
    """
    (stage,), like = recipe.stages, load_config_file("convnext")
    first, *heads = stage.train
    trained, frozen = ParamGroup("convnext/.*"), tuple[str, ...]()
    if stage.frozen:
        last = "4" if recipe.name == "finetune_cpu" else "234"
        others = "".join(number for number in "1234" if number not in last)
        trained = ParamGroup(f"convnext/(stage[{last}]|norm[2345])/.*", first.lr_scale)
        frozen = (f"convnext/(stem|stage[{others}])/.*",)
    optimizer = stage.optimizer
    if optimizer.name == "sgd":
        batch = LARGEST if device == "gpu" else optimizer.batch_size
        optimizer = replace(like.stages[0].optimizer, schedule="cosine", batch_size=batch)
    return replace(
        recipe,
        model=replace(recipe.model, trunk="convnext"),
        stages=joint(
            (trained, *heads),
            frozen,
            epochs=stage.epochs,
            optimizer=optimizer,
        ),
    )
