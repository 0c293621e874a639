"""The recipe that a chosen config is made from: by the device and the weights to start from.

`configs/finetune.py` from imported weights, on a CPU `configs/finetune_cpu.py` from those of a
ResNet alone, and `configs/scratch.py` from random ones. With a ConvNeXt in place of the ResNet they
are the same but for optimiser and layers trained.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from mrcnn_jax.config.files import load_config_file
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import Config, ParamGroup, Shrink
from mrcnn_jax.config.tables import joint
from mrcnn_jax.training.batch import LARGEST, Device
from mrcnn_jax.training.wishes import Wishes


@dataclass(frozen=True)
class Start:
    """The run that training starts from."""

    model: ModelConfig
    class_names: tuple[str, ...]
    """() if they are unknown."""
    shrink: Shrink = "area"
    presumed: Collection[str] = ()
    """As of `Choice.presumed`: fields that options may change."""

    def fits(self, class_names: tuple[str, ...]) -> bool:
        """Whether its outputs per class can be those of these classes."""
        if len(class_names) != self.model.num_classes:
            return False
        return self.class_names in ((), class_names)


def recipe_for(
    device: Device, wishes: Wishes, start: Start | None, trunk: ModelConfig | None
) -> Config:
    """The config that the network, the stage and the augmentation are taken from.

    Args:
        device: what trains.
        wishes: values that are given, of which `init_from` counts.
        start: the run that `wishes.init_from` names; None: it names a file with a trunk alone, or
            nothing, and weights are random.
        trunk: the network that that file has the trunk of.
    """
    if wishes.init_from is None:
        return load_config_file("scratch")
    if start is None:
        recipe = load_config_file("finetune_cpu" if device == "cpu" else "finetune")
        return recipe if trunk is None else _around(trunk, recipe, device)
    recipe = load_config_file("finetune")
    if start.model.trunk == "convnext":
        return _around_convnext(recipe, device)
    if start.model.resnet.norm == "live":
        everything = load_config_file("scratch").stages[0].train
        stages = joint(everything, epochs=1, optimizer=recipe.stages[0].optimizer)
        recipe = replace(recipe, stages=stages)
    return recipe


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
    """`recipe` with a ConvNeXt, trained by AdamW as configs/convnext.py does.

    The same of its stages are trained, with all their norms.
    """
    (stage,), like = recipe.stages, load_config_file("convnext")
    first, *heads = stage.train
    last = "4" if recipe.name == "finetune_cpu" else "234"
    trained = ParamGroup(f"convnext/(stage[{last}]|norm[2345])/.*", first.lr_scale)
    others = "".join(number for number in "1234" if number not in last)
    optimizer = stage.optimizer
    if optimizer.name == "sgd":
        batch = LARGEST if device == "gpu" else optimizer.batch_size
        optimizer = replace(like.stages[0].optimizer, schedule="cosine", batch_size=batch)
    return replace(
        recipe,
        model=replace(recipe.model, trunk="convnext"),
        stages=joint(
            (trained, *heads),
            (f"convnext/(stem|stage[{others}])/.*",),
            epochs=stage.epochs,
            optimizer=optimizer,
        ),
    )
