"""Which recipe follows from the device and the weights, and what it takes from them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mrcnn_jax.choices.devices import Device
from mrcnn_jax.choices.recipes import Start, recipe_for
from mrcnn_jax.config.model import ConvNeXtConfig, ModelConfig
from mrcnn_jax.config.tables import TORCHVISION

WHOLE = Start("weights", TORCHVISION, ("ape",))
TRUNK = Start("weights", TORCHVISION, has_heads=False)
LIVE = replace(WHOLE, model=replace(TORCHVISION, resnet=replace(TORCHVISION.resnet, norm="live")))
SMALL = ConvNeXtConfig(blocks=(1, 2, 3, 4), channels=(8, 16, 24, 32))
CONVNEXT = ModelConfig(trunk="convnext", convnext=SMALL)


@pytest.mark.parametrize(
    ("device", "start", "name"),
    [
        ("cpu", None, "scratch"),
        ("gpu", None, "scratch"),
        ("cpu", TRUNK, "finetune_cpu"),
        ("gpu", TRUNK, "finetune"),
        ("cpu", WHOLE, "finetune"),
    ],
)
def test_the_device_and_the_weights_decide(device: Device, start: Start | None, name: str) -> None:
    recipe = recipe_for(device, {}, start)
    assert (recipe.name, recipe.init_from) == (name, None if start is None else "weights")


def test_sizes_are_those_of_the_trunk_in_the_file() -> None:
    trunk = ModelConfig(resnet=replace(TORCHVISION.resnet, depth=18))
    recipe = recipe_for("cpu", {}, replace(TRUNK, model=trunk))
    assert (recipe.model.resnet.depth, recipe.model.fpn_channels) == (18, 128)
    recipe = recipe_for("cpu", {}, replace(TRUNK, model=CONVNEXT))
    assert recipe.model.trunk == "convnext"
    assert recipe.model.convnext.channels == SMALL.channels
    assert recipe.stages[0].train[0].pattern == "convnext/(stage[4]|norm[2345])/.*"
    assert recipe.stages[0].frozen == ("convnext/(stem|stage[123])/.*",)


def test_live_norm_is_trained_as_a_whole() -> None:
    assert recipe_for("gpu", {}, LIVE).stages[0].train[0].pattern == "resnet/.*"
    assert recipe_for("gpu", {}, WHOLE).stages[0].frozen


def test_outputs_per_class_fit_classes_of_their_number_and_names() -> None:
    two = replace(TORCHVISION, num_classes=2)
    assert Start("weights", two, ("ape", "bee")).fits(("ape", "bee"))
    assert Start("weights", two, ()).fits(("ape", "bee"))
    assert not Start("weights", two, ("ape", "bee")).fits(("bee", "ape"))
    assert not Start("weights", two, ()).fits(("ape",))
